"""Calls with plans of an engine's metadata: the same bits as with plain plans, in other places."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from support.helpers import Backend, bits
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, StepPlan, WindowState

ROWS = CompressorSpec(16, 4, overlap=True, rope_dim=8)
FOLD = CompressorSpec(32, 16, rope_dim=8)
KINDS = {"rows": ROWS, "fold": FOLD, "window": ROWS, "window fold": FOLD}
FIRST = 5  # rows of kv_score that are not of the step
STEPS = [([0, 0, 0], [37, 16, 3]), ([37, 16, 3], [4, 1, 2]), ([39, 17, 3], [1, 3, 1]), ([40, 20, 4], [33, 60, 0])]


class Layer:
    """A state and a cache, and what is passed to every call."""

    def __init__(self, kind: str, backend: Backend) -> None:
        spec, device = KINDS[kind], backend.device
        self.spec, self.device, self.kind = spec, device, kind
        draw = torch.Generator().manual_seed(5)
        self.cache = EntryCache.allocate("bf16", 12, 5, spec, device=device)
        self.cache.storage.zero_()
        if kind in ("rows", "fold"):
            self.state: Any = FoldState.allocate(spec, 5, 60, device=device)
        else:
            self.state = WindowState.allocate(spec, 40, 16, device=device)
            self.state.kv.zero_(), self.state.score.zero_()
        self.given = {
            "spec": spec, "ape": torch.randn(spec.ratio, spec.channels, generator=draw).to(device),
            "norm_weight": torch.ones(spec.head_dim, device=device), "backend": backend.name,
            "rope": kvfold.reference.rope_table(200, 8).to(device),
        }  # fmt: skip

    def where(self, engine: bool) -> dict[str, Any]:
        """Where the state of three sequences is: plainly, or with int64, between other columns, and nulls."""
        if self.kind in ("rows", "fold"):
            slots = torch.tensor([[7, 3], [7, 1], [7, 4]], device=self.device)[:, 1]
            return {"state_slots": slots, "null_slot": 0} if engine else {"state_slots": slots.int().contiguous()}
        tables = torch.arange(1, 40, device=self.device).view(3, 13)
        plain = tables[:, :8].int().contiguous()
        if engine:
            return {"block_tables": (tables[:, :8], plain), "page_size": 16, "null_page": 0}
        return {"block_tables": (plain, plain), "page_size": 16}

    def contents(self) -> list[Tensor]:
        return [bits(x) if x.is_floating_point() else x for x in (*self.state._tensors, self.cache.storage)]


def slots_of(spec: CompressorSpec, starts: list[int], lengths: list[int]) -> list[list[int]]:
    """The cache slots of each sequence's entries."""
    both = zip(starts, lengths, strict=True)
    return [[b * 20 + w for w in range(s // spec.ratio, (s + n) // spec.ratio)] for b, (s, n) in enumerate(both)]


@pytest.mark.parametrize("kind", KINDS)
def test_entries_have_reserved_places(kind: str, backend: Backend) -> None:
    """A prompt, decoding with drafts rejected, a long chunk: with a slot per token, total lengths, places with gaps between."""
    plain, engine = Layer(kind, backend), Layer(kind, backend)
    spec, device, draw = plain.spec, backend.device, torch.Generator().manual_seed(9)
    for starts, lengths in STEPS:
        ends, slots = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), slots_of(spec, starts, lengths)
        scores = torch.randn(int(ends[-1]), 2 * spec.channels, generator=draw).to(device)
        one = StepPlan.build(
            spec.ratio, torch.tensor(starts).int().to(device), ends.int().to(device), max(lengths),
            entry_slots=torch.tensor([*chain(*slots), -1, -1], device=device), **plain.where(False),
        )  # fmt: skip
        dense = torch.full((one.entry_capacity, spec.head_dim), 7.0, device=device)
        kvfold.compress(scores, one, plain.state, plain.cache, rows=dense, **plain.given)

        by_token = [-1] * (FIRST + int(ends[-1]) + 2)
        for b, (start, some) in enumerate(zip(starts, slots, strict=True)):
            for i, slot in enumerate(some):
                last = (start // spec.ratio + i + 1) * spec.ratio - 1
                by_token[FIRST + int(ends[b]) + last - start] = slot
        places = torch.tensor([2, *(2 + torch.tensor([len(some) + 3 for some in slots]).cumsum(0)).tolist()])
        before = torch.full((FIRST, 2 * spec.channels), torch.nan, device=device)
        many = torch.full((int(places[-1]), spec.head_dim), 7.0, device=device)
        two = StepPlan.build(
            spec.ratio, None, (ends + FIRST).to(device), max(lengths), max_tokens=int(ends[-1]),
            seq_lens=(torch.tensor(starts) + torch.tensor(lengths)).to(device),
            token_slots=torch.tensor(by_token, device=device),
            cu_rows=places.to(device), max_rows=40, **engine.where(True),
        )  # fmt: skip
        kvfold.compress(torch.cat([before, scores]), two, engine.state, engine.cache, rows=many, **engine.given)
        assert int(one.errors) == int(two.errors) == 0
        assert all(torch.equal(x, y) for x, y in zip(plain.contents(), engine.contents(), strict=True))
        taken = torch.zeros(len(many), dtype=torch.bool)
        for b, some in enumerate(slots):
            at = int(places[b])
            taken[at : at + len(some)] = True
            first = int(one.cu_entries[b])
            assert torch.equal(bits(many[at : at + len(some)]), bits(dense[first : first + len(some)]))
        assert (many[~taken.to(device)] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_too_short(kind: str, backend: Backend) -> None:
    """A place behind `rows` is refused and counted, once for each entry; the others and the state are as ever."""
    layer, device = Layer(kind, backend), backend.device
    spec, n = layer.spec, 4 * layer.spec.ratio
    scores = torch.randn(2 * n, 2 * spec.channels, generator=torch.Generator().manual_seed(1)).to(device)
    given = {k: tuple(x[:2] for x in v) if isinstance(v, tuple) else v[:2] if isinstance(v, Tensor) else v
             for k, v in layer.where(True).items()}  # fmt: skip
    plan = StepPlan.build(
        spec.ratio, torch.tensor([0, 0], device=device), torch.tensor([0, n, 2 * n], device=device), n,
        cu_rows=torch.tensor([1, 5, 9], device=device), max_rows=20, **given,
    )  # fmt: skip
    rows = torch.full((7, spec.head_dim), 7.0, device=device)
    kvfold.compress(scores, plan, layer.state, None, rows=rows, **layer.given)
    assert int(plan.errors) == 2
    assert (rows[0] == 7).all() and (rows[1:] != 7).any(1).all()


def test_store_of_reserved_places(backend: Backend) -> None:
    """Pooled rows in places with gaps between: the records are those of rows that stand one behind the other."""
    layer, other = Layer("rows", backend), Layer("rows", backend)
    device = backend.device
    pooled = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(device)
    lengths = torch.tensor([0, 0], device=device), torch.tensor([0, 8, 20], device=device), 12
    slots, place = torch.tensor([3, 9, 20, 21, 22], dtype=torch.int32, device=device), [1, 2, 6, 7, 8]
    some = {k: v for k, v in layer.given.items() if k != "ape"}
    states = {"state_slots": torch.tensor([0, 1], device=device)}
    kvfold.store(pooled, StepPlan.build(4, *lengths, entry_slots=slots, **states), layer.cache, **some)
    spread = torch.full((9, 16), torch.nan, device=device)
    spread[place] = pooled
    apart = torch.full((10,), -1, dtype=torch.int32, device=device)
    apart[place] = slots
    plan = StepPlan.build(4, *lengths, entry_slots=apart, cu_rows=torch.tensor([1, 6, 9], device=device), **states)
    kvfold.store(spread, plan, other.cache, **some)
    assert torch.equal(layer.cache.storage, other.cache.storage) and layer.cache.storage.any() and int(plan.errors) == 0
    kvfold.store(spread[:8], plan, other.cache, **some)
    assert int(plan.errors) == 1


def test_a_dummy_batch_of_slots(backend: Backend) -> None:
    """Tokens are there, state slots are the null one and token slots -1: no byte changes over a `FoldState` either."""
    layer, device = Layer("fold", backend), backend.device
    before = [x.clone() for x in layer.contents()]
    plan = StepPlan.build(
        16, torch.tensor([30, 7], device=device), torch.tensor([0, 20, 41], device=device), 21, null_slot=0,
        state_slots=torch.zeros(2, dtype=torch.int64, device=device), token_slots=torch.full((41,), -1, device=device),
    )  # fmt: skip
    kvfold.compress(torch.randn(41, 64, device=device), plan, layer.state, layer.cache, **layer.given)
    assert int(plan.errors) == 0 and int(plan.num_items) == 0
    assert all(torch.equal(x, y) for x, y in zip(before, layer.contents(), strict=True))
