"""The benchmark of adapters over TensorRT-LLM's operators, which needs no engine, in a small form on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.launched import launched

from benchmarks.lib.adapter_kernels import adapter_keys
from benchmarks.lib.adapter_steps import ENGINES, Case
from benchmarks.run import adapters, precompile


def test_each_variant_runs(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    args = ["--engine", "trtllm", "--batches", "3", "--shapes", "step", "--out", str(out), "--commit", "none"]
    rows, failed = adapters.run(adapters.parse(args), "cpu", {"step": (128, 4)})
    assert failed == 0
    assert [(row["case"], row["variant"]) for row in rows] == [
        (f"step b3 {step}", variant) for step in ("n4 hit", "n1 spread") for variant in ("records", "operators")
    ]
    assert [json.loads(line)["engine"] for line in out.read_text().splitlines()] == ["trtllm"] * 4
    assert all(row["host_us"] > 0 for row in rows)


@pytest.mark.parametrize("variant, launches", [("records", 4), ("operators", 6)])
def test_their_kernels_are_compiled_beforehand(variant: str, launches: int) -> None:
    """A layer of each ratio, one with an indexer: which kernels they launch, and that all are known."""
    known, step = set(adapter_keys().values()), ENGINES["trtllm"].step
    for batch, new, mode in ((16, 4, "hit"), (64, 1, "spread")):
        with launched() as found, step(Case("step", batch, new, mode), variant, (128, 4), "cpu") as ready:
            ready.call()
            assert len(found) == launches and set(found) <= known


def test_what_is_asked_for() -> None:
    assert adapters.parse([]).variants == ["window", "fold", "own"]
    assert adapters.parse(["--engine", "sglang", "--variants", "fold"]).variants == ["fold"]
    with pytest.raises(SystemExit):
        adapters.parse(["--engine", "trtllm", "--variants", "own"])
    names = [case.name for case in adapters.cases([16, 64], ["HCA", "step"])]
    assert names[:3] == ["HCA b16 n4 hit", "HCA b16 n1 spread", "step b16 n4 hit"] and len(names) == 8
    starts = Case("HCA", 16, 4, "spread").starts
    assert [(start + 4) % 128 == 0 for start in starts] == [True] + [False] * 15
    assert set(precompile.keys("adapters trtllm")) < set(adapter_keys().values())
