"""Long steps over input rows: which program takes a window, and how many windows it takes side by side, changes no bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import SPECS, Backend, Engine, Step, change_long_rows, make_tokens
from torch import Tensor

FORMATS = {"csa": "fp8_ds_mla", "indexer": "indexer_fp8_vllm"}
# What another table would have. With 3 programs most windows are dealt out and some are drawn, as of a prompt of 64k.
TABLES: dict[str, dict[str, Any]] = {
    "few programs": {"programs": 3},
    "one at a time": {"together": 1},
    "four side by side": {"together": 4, "num_warps": 2},
}
# (state slot, start, new tokens) of each step: prompts with and without history, some of which end inside a window or fill an
# odd number of them, a sequence that is absent, and one whose history the slot does not hold.
STEPS = (
    ((0, 0, 45), (1, 0, 3), (2, 0, 18)),
    ((0, 45, 9), (-1, 0, 5), (3, 0, 25)),
    ((1, 50, 12), (2, 18, 30), (0, 54, 10), (3, 25, 1)),
)
REFUSED = 1


def serve(backend: Backend, name: str) -> tuple[list[Step], Engine]:
    spec, steps = SPECS[name], []
    engine = Engine(spec, backend, fmt=FORMATS[name], num_slots=5, max_new_tokens=4, max_entries=24, state_dtype=torch.bfloat16)
    for seed, batch in enumerate(STEPS):
        new = [
            (slot, start, make_tokens(spec, n, seed=100 * seed + i, dtype=torch.bfloat16))
            for i, (slot, start, n) in enumerate(batch)
        ]
        steps.append(engine.step(new, strict=False, padding=7))
    return steps, engine


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", FORMATS)
def test_no_bit_follows_the_table(backend: Backend, name: str, table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.name != "triton":
        pytest.skip("the table is of kernels")
    if backend.slow and name == "csa" and table != "few programs":
        pytest.skip("its row has one window to a program")
    steps, engine = serve(backend, name)
    assert [step.errors for step in steps] == [0, 0, REFUSED]
    change_long_rows(monkeypatch, **TABLES[table])
    others, other = serve(backend, name)
    assert [step.errors for step in others] == [0, 0, REFUSED]
    for step, again in zip(steps, others, strict=True):
        assert step.pooled.keys() == again.pooled.keys()
        assert all(same(row, again.pooled[owner]) for owner, row in step.pooled.items())
    assert all(same(ours, theirs) for ours, theirs in zip(engine.snapshot(), other.snapshot(), strict=True))


def test_what_is_drawn_is_counted_and_the_count_put_back(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of any number of windows, up to some rounds of 3 programs, one behind the other over one count."""
    if backend.name != "triton":
        pytest.skip("other backends draw nothing")
    change_long_rows(monkeypatch, programs=3)
    spec = SPECS["indexer"]
    counts = (3, 7, 13, 22) if backend.slow else range(3, 49)
    engine = Engine(spec, backend, fmt="bf16", num_slots=len(counts), max_new_tokens=4, max_entries=48)
    tokens = make_tokens(spec, 49 * spec.ratio, seed=5)
    whole = engine.weights.entries(tokens, spec)
    for slot, windows in enumerate(counts):
        engine.step([(slot, 0, tokens[: windows * spec.ratio + windows % spec.ratio])])
        _, count = engine.state._workspaces[-1]
        assert count.shape == (1,) and int(count) == 0
        assert (engine.entries(slot, windows).cpu() - whole[:windows]).abs().max() < 0.05  # bf16 up to 8
