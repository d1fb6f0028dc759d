"""Every script of examples/ that needs no engine runs and ends well, on a CPU and on a GPU. Those of engines: tests/engines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
OF_ENGINES = ("vllm", "sglang")  # how their names begin
# What the last line of a script must say; each of these compares bits before.
LAST = {
    "context_parallel.py": "all bytes are those of one process",
    "serve.py": "one prefill of them alone, to the bit",
    "tensorrt_llm_operators.py": "the same bytes by operators and by one call",
    "train.py": "those of kvfold.compress, to the bit",
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("script", [name for name in SCRIPTS if not name.startswith(OF_ENGINES)])
def test_example(script: str, device: str) -> None:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, str(ROOT / "examples" / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert LAST.get(script, "") in done.stdout.splitlines()[-1]


def test_without_vllm(tmp_path: Path) -> None:
    """A newcomer is told what is missing, where neither vLLM nor the folder of `make engines` is."""
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    script = shutil.copy(ROOT / "examples" / "vllm_plugin.py", tmp_path / "script.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "make engines" in done.stderr and "Traceback" not in done.stderr


def test_they_are_there() -> None:
    assert {*LAST} <= {*SCRIPTS}
