"""What states and plans remember of their calls: not for calls with other tensors, and not in copies of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.helpers import SPECS, Backend, Weights, make_tokens

import kvfold
from kvfold.storage.formats import FORMATS

STEPS = ((0, 9), (9, 3), (12, 4))


def window_state(spec: kvfold.CompressorSpec, device: torch.device) -> kvfold.WindowState:
    state = kvfold.WindowState.allocate(spec, 1, 256, device=device)
    state.kv.zero_()
    state.score.zero_()
    return state


def make_plan(spec, window: bool, start: int, new: int, device: torch.device) -> kvfold.StepPlan:
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    where: dict = {"block_tables": (zero[:, None], zero[:, None]), "page_size": 256} if window else {"state_slots": zero}
    return kvfold.StepPlan.build(
        spec.ratio, zero + start, torch.tensor([0, new], dtype=torch.int32, device=device), 16,
        cache_block_table=zero[:, None], rows_per_page=64, **where,
    )  # fmt: skip


def pickled(things):
    return pickle.loads(pickle.dumps(things))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("window", [False, True], ids=["fold", "window"])
def test_a_copy_goes_on_by_itself(backend: Backend, window: bool, copied) -> None:
    spec, device = SPECS["indexer"], backend.device
    weights = {k: v.to(device) for k, v in vars(Weights.make(spec)).items()}
    tokens = make_tokens(spec, 16, 1).to(device)

    def play(state, cache, steps) -> None:
        for start, new in steps:
            plan = copied(make_plan(spec, window, start, new, device))
            plan.update(plan.start_pos.clone(), plan.cu_seqlens.clone())
            kv_score = tokens[start : start + new]
            kvfold.compress(kv_score, plan, state, cache, spec=spec, backend=backend.name, **weights)
            assert int(plan.errors) == 0

    def both():
        state = window_state(spec, device) if window else kvfold.FoldState.allocate(spec, 1, 4, device=device)
        return state, kvfold.EntryCache.allocate("indexer_fp8_vllm", 1, 64, spec, device=device)

    want = both()
    play(*want, STEPS)
    mine = both()
    play(*mine, STEPS[:2])
    theirs = copied(mine)
    held = [x.clone() for x in vars(mine[0]).values() if isinstance(x, torch.Tensor)]
    play(*theirs, STEPS[2:])
    assert torch.equal(theirs[1].storage, want[1].storage)
    # The original is as it was, and goes on to the same.
    assert all(map(torch.equal, held, [x for x in vars(mine[0]).values() if isinstance(x, torch.Tensor)]))
    assert not torch.equal(mine[1].storage, want[1].storage)
    play(*mine, STEPS[2:])
    assert torch.equal(mine[1].storage, want[1].storage)


@pytest.mark.parametrize("window", [False, True], ids=["fold", "window"])
def test_other_tensors_in_the_next_call(backend: Backend, window: bool) -> None:
    """Another cache, other formats over the same memory, weights replaced or moved, entry slots and pools replaced."""
    spec, device = SPECS["indexer"], backend.device
    tokens = make_tokens(spec, 8, 2).to(device)
    plan = make_plan(spec, window, 0, 8, device)
    state = window_state(spec, device) if window else kvfold.FoldState.allocate(spec, 1, 8, device=device)
    weights = {k: v.to(device) for k, v in vars(Weights.make(spec)).items()}
    storage = torch.zeros(1, 64 * 1024, dtype=torch.uint8, device=device)

    def cache_of(fmt: str) -> kvfold.EntryCache:
        return kvfold.EntryCache(storage[:, : FORMATS[fmt].page_bytes(spec, 64)], fmt, 64, spec)

    def check(fmt: str) -> None:
        storage.zero_()
        kvfold.compress(tokens, plan, state, cache_of(fmt), spec=spec, backend=backend.name, **weights)
        got = storage.clone()
        fresh = window_state(spec, device) if window else kvfold.FoldState.allocate(spec, 1, 8, device=device)
        like = make_plan(spec, window, 0, 8, device)
        like.entry_slots.copy_(plan.entry_slots)
        storage.zero_()
        kvfold.compress(tokens, like, fresh, cache_of(fmt), spec=spec, backend=backend.name, **weights)
        assert torch.equal(got, storage)
        assert bool(got.any())

    check("indexer_fp8_vllm")
    check("bf16")
    check("fp32")
    weights = {k: v.clone() for k, v in vars(Weights.make(spec, seed=3)).items()}
    weights = {k: v.to(device) for k, v in weights.items()}
    check("fp32")
    plan.entry_slots = torch.where(plan.entry_slots >= 0, plan.entry_slots + 5, -1)
    check("fp32")
    if window:
        state.kv = state.kv.clone()
    else:
        state.rows = state.rows.clone()
    check("fp32")
