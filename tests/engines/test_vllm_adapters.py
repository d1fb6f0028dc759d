"""The benchmark of adapters, in a small form on a CPU: its cases run, and nothing is refused in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines import vllm_cpu  # noqa: F401
from support.launched import launched

from benchmarks.lib.adapter_kernels import adapter_keys
from benchmarks.lib.adapter_steps import ENGINES, Case
from benchmarks.run import adapters


def test_each_variant_runs(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    args = adapters.parse(["--out", str(out), "--batches", "1", "--shapes", "step", "--only", "n4 hit", "--commit", "none"])
    rows, failed = adapters.run(args, "cpu", {"step": (128, 4)})
    assert failed == 0 and [row["variant"] for row in rows] == ["window", "fold", "own"]
    assert all(row["host_us"] > 0 for row in rows)
    assert [json.loads(line)["case"] for line in out.read_text().splitlines()] == [row["case"] for row in rows]


@pytest.mark.parametrize("variant", ["window", "fold"])
def test_their_kernels_are_compiled_beforehand(variant: str) -> None:
    known = set(adapter_keys().values())
    with launched() as found, ENGINES["vllm"].step(Case("step", 4, 4, "hit"), variant, (128, 4), "cpu") as ready:
        before = len(found)
        ready.call()
        assert before and len(found) == before + 3 and set(found) <= known
