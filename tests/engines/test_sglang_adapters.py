"""The benchmark of adapters over SGLang's pools, in a small form on a CPU: its cases run, and their kernels are known."""

from __future__ import annotations

import pytest
from support.launched import launched

from benchmarks.lib.adapter_kernels import adapter_keys
from benchmarks.lib.adapter_steps import ENGINES, Case
from benchmarks.run import adapters


def test_each_variant_runs() -> None:
    args = adapters.parse(["--engine", "sglang", "--batches", "2", "--shapes", "step", "--commit", "none"])
    rows, failed = adapters.run(args, "cpu", {"step": (128, 4)})
    assert failed == 0 and [row["variant"] for row in rows] == ["pools", "fold"] * 2
    assert all(row["host_us"] > 0 for row in rows)


@pytest.mark.parametrize("variant", ENGINES["sglang"].variants)
def test_their_kernels_are_compiled_beforehand(variant: str) -> None:
    known = set(adapter_keys().values())
    for batch, new, mode in ((16, 4, "hit"), (64, 1, "spread")):
        with launched() as found, ENGINES["sglang"].step(Case("step", batch, new, mode), variant, (128, 4), "cpu") as ready:
            before = len(found)
            ready.call()
            assert before and len(found) == before + 3 and set(found) <= known
