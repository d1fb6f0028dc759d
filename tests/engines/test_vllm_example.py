"""The example of the vLLM plug-in, as far as it goes on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_is_replaced() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "examples" / "vllm_plugin.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "kvfold: off" in lines and "the compressor of V4 is kvfold.integrations.vllm.v4.Compressor" in lines
    assert lines.count("ratio 128: 17 blocks of 32,832 bytes for each request and layer") == 2
    assert "ratio 128: 1 blocks of 37,440 bytes for each request and layer" in lines
