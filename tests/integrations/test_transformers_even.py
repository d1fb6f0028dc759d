"""Sequences that go on together on a CPU: the bits of `compress` over a plan and a `FoldState`, however they are cut."""

import random

import pytest
import torch

from kvfold import CompressorSpec, EntryCache, FoldState, StepPlan, compress, reference
from kvfold.backend_torch import even
from kvfold.storage.fold_state import state_kind

SHAPES = [(16, False), (16, True), (8, False), (6, True), (4, True), (2, True), (2, False), (1, False)]
SPECS = [CompressorSpec(head_dim=32, ratio=ratio, overlap=overlap, rope_dim=16) for ratio, overlap in SHAPES]
LENGTH = 134


def whole(spec, kv, gate, ape, norm_weight, rope):
    """Entries by one step of `compress`."""
    batch, length = kv.shape[:2]
    count, rows = length // spec.ratio, torch.arange(batch, dtype=torch.int32)
    ends = torch.arange(batch + 1, dtype=torch.int32) * length
    plan = StepPlan.build(
        spec.ratio, torch.zeros_like(rows), ends, length, state_slots=rows,
        cache_block_table=rows[:, None].contiguous(), rows_per_page=count,
    )  # fmt: skip
    cache = EntryCache.allocate("fp32" if kv.dtype == torch.float32 else "bf16", batch, count, spec)
    tokens = torch.cat([kv, gate], -1).flatten(0, 1)
    state = FoldState.allocate(spec, batch, 8)
    compress(tokens, plan, state, cache, spec=spec, ape=ape, norm_weight=norm_weight, rope=rope)
    return cache.read(torch.arange(batch * count)).view(batch, count, -1)


@pytest.mark.parametrize("elements", [1 << 10, 1 << 18])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_bits(spec, seed, elements, monkeypatch):
    """Random cuts, with tokens taken back, windows in one piece or in several, hard scores and -inf among them."""
    monkeypatch.setattr(even, "_ELEMENTS", elements)
    draw, _ = random.Random(seed), torch.manual_seed(seed)
    batch, most, dtype = draw.choice((1, 2)), draw.choice((1, 2, 5, 20)), draw.choice((torch.float32, torch.bfloat16))
    kv, gate = torch.randn(batch, LENGTH, spec.channels).to(dtype), (9 * torch.randn(batch, LENGTH, spec.channels)).to(dtype)
    gate[torch.rand(gate.shape) < 0.1] = -torch.inf
    ape, norm_weight, rope = torch.randn(spec.ratio, spec.channels), torch.randn(spec.head_dim), reference.rope_table(256, 16)
    want = whole(spec, kv, gate, ape, norm_weight, rope)
    rows = torch.zeros(batch, *even.even_shape(spec, most), dtype=torch.float32 if state_kind(spec) == "fold" else dtype)
    entries = torch.full((batch, LENGTH // spec.ratio, spec.head_dim), 7.0, dtype=dtype)
    at = furthest = 0
    while at < LENGTH:
        end = min(LENGTH, at + draw.choice((1, 1, 1, 2, 3, 5, 17, 80)))
        turns = rope[torch.arange(at // spec.ratio, end // spec.ratio) * spec.ratio]
        even.step_even(kv[:, at:end], gate[:, at:end], at, rows, entries, spec, ape, norm_weight, turns)
        at, furthest = end, max(furthest, end)
        if draw.random() < 0.3 and at < LENGTH:
            at = max(at - draw.randint(0, most), furthest - most, 0)
    assert torch.equal(entries.float().nan_to_num(99.0), want.nan_to_num(99.0))
