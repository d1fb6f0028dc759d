"""Snapshots of prefix-cache pages: taken however a sequence was cut, and restored as if the slot had seen all of it."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple

import pytest
import torch
from helpers import SPECS, Backend, Engine, Weights, bits, make_tokens
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, FoldState, Snapshots

FP32, BF16 = torch.float32, torch.bfloat16


class Case(NamedTuple):
    spec: CompressorSpec
    page_size: int
    length: int
    dtype: torch.dtype = FP32
    state_dtype: torch.dtype = FP32


CASES = {
    "hca-64": Case(SPECS["hca"], 64, 200),
    "hca-96": Case(SPECS["hca"], 96, 200, BF16),
    "hca-128": Case(SPECS["hca"], 128, 135),
    "csa-4": Case(SPECS["csa"], 4, 18),
    "csa-8": Case(SPECS["csa"], 8, 27, BF16, BF16),
    "csa-64": Case(SPECS["csa"], 64, 70, BF16, FP32),
    "indexer-4": Case(SPECS["indexer"], 4, 23, BF16, BF16),
    "fold-16 pages of 5": Case(CompressorSpec(head_dim=64, ratio=16), 5, 38),
    "fold-16 pages of 1": Case(CompressorSpec(head_dim=64, ratio=16, has_ape=False), 1, 20),
    "fold-12 pages of 18": Case(CompressorSpec(head_dim=64, ratio=12), 18, 80),
    "rows-3 overlap": Case(CompressorSpec(head_dim=64, ratio=3, overlap=True), 6, 32),
    "rows-1 overlap": Case(CompressorSpec(head_dim=64, ratio=1, overlap=True), 2, 14),
    "rows-9 overlap": Case(CompressorSpec(head_dim=64, ratio=9, overlap=True), 9, 40),
    "rows-2": Case(CompressorSpec(head_dim=64, ratio=2), 4, 13),
}
WAYS = ("once", "chunks", "decode", "drafts")


class Prefix:
    """A sequence, its pages' snapshots taken in several ways, and its one uninterrupted run, whose ring holds every position."""

    def __init__(self, backend: Backend, case: Case, max_new_tokens: int = 4) -> None:
        self.backend, self.case, self.spec = backend, case, case.spec
        self.weights, self.max_new_tokens = Weights.make(case.spec), max_new_tokens
        self.tokens = make_tokens(case.spec, case.length, seed=31, dtype=case.dtype)
        self.ends = list(range(case.page_size, case.length, case.page_size))
        whole = self.engine(1, case.length)
        whole.step([(0, 0, self.tokens)])
        self.whole, self.rows = whole, whole.held(0, case.length)

    def engine(self, num_slots: int, max_new_tokens: int | None = None) -> Engine:
        entries = self.case.length // self.spec.ratio + 4  # drafts reach behind the end
        return Engine(
            self.spec, self.backend, num_slots=num_slots, max_new_tokens=max_new_tokens or self.max_new_tokens,
            max_entries=entries, state_dtype=self.case.state_dtype, weights=self.weights,
        )  # fmt: skip

    def needed(self, end: int) -> range:
        """Positions whose rows are the snapshot of the page that ends at `end`."""
        return self.whole.state.history_of(end)

    def snapshot(self, snapshots: Snapshots, page: int) -> dict[int, Tensor]:
        """The bits of the row of each position that a snapshot holds, in the shape of a state row."""
        rows = bits(snapshots.rows[page]).cpu().view(-1, *self.whole.state.rows.shape[2:])
        return {x: rows[i] for i, x in enumerate(snapshots.positions[page].tolist()) if x != -1}

    def check(self, snapshots: Snapshots, page: int, end: int) -> None:
        """A snapshot has the bits of the uninterrupted run."""
        found = self.snapshot(snapshots, page)
        assert sorted(found) == list(self.needed(end)), f"page {page}, end {end}"
        for x, row in found.items():
            assert torch.equal(row, self.rows[x]), f"page {page}, end {end}: row of position {x}"


def steps_of(way: str, prefix: Prefix, rng: random.Random) -> list[tuple[int, Tensor]]:
    """(start, new tokens) of each step; what is not near the end of a page goes in chunks, as a token takes a while."""
    tokens, case = prefix.tokens, prefix.case
    if way == "once":
        return [(0, tokens)]
    wrong = make_tokens(case.spec, case.length + 8, seed=32, dtype=case.dtype)
    found, at = [], 0
    while at < case.length:
        near = any(-6 <= at - end < 2 for end in prefix.ends)
        ahead = min([end - 6 for end in prefix.ends if end - 6 > at], default=case.length)
        if way == "chunks":
            n = rng.choice((1, 2, 3, case.page_size, rng.randint(1, 2 * case.spec.ratio + 1)))
        else:
            n = 1 if near else max(ahead - at, 1)
        n = min(n, case.length - at)
        if way == "drafts" and near:
            n, drafts = rng.randint(0, min(2, case.length - at)), rng.randint(1, 2)
            found.append((at, torch.cat([tokens[at : at + n], wrong[at + n : at + n + drafts]])))
        else:
            found.append((at, tokens[at : at + n]))
        at += n
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_hit_at_every_page_end(backend: Backend, name: str) -> None:
    case, rng = CASES[name], random.Random(1)
    prefix = Prefix(backend, case)
    # The interpreter is slow: there each way of cutting is for a quarter of the cases.
    ways = WAYS[list(CASES).index(name) % len(WAYS) :][:1] if backend.slow else WAYS
    engine, pages = prefix.engine(len(ways)), len(prefix.ends) + 1  # drafts may reach one page further
    engine.make_snapshots(len(ways) * pages + 1, case.page_size)
    order = rng.sample(range(1, len(ways) * pages + 1), len(ways) * pages)  # nobody has snapshot 0
    tables = [order[i * pages : (i + 1) * pages] for i in range(len(ways))]
    for i, way in enumerate(ways):
        for start, new in steps_of(way, prefix, rng):
            # Absent sequences have table rows that nobody looks at, and padding stands behind the tokens.
            batch = [(-1, case.page_size - 1, prefix.tokens[:1]), (i, start, new), (i - 1, case.page_size, new[:0])]
            engine.step(batch, padding=2, snapshot_table=[[-7] * pages, tables[i], [-7] * pages])
        for end, page in zip(prefix.ends, tables[i], strict=False):
            prefix.check(engine.snapshots, page, end)
    assert not prefix.snapshot(engine.snapshots, 0) and engine.snapshots.rows[0].isnan().all()
    resume(prefix, engine.snapshots, tables[0])


def resume(prefix: Prefix, snapshots: Snapshots, pages: list[int]) -> None:
    """A slot for each page end, full of a former owner's NaN and tags; restored, they go on like the uninterrupted run."""
    case, ends = prefix.case, prefix.ends
    engine = prefix.engine(len(ends) + 2)
    slots = random.Random(2).sample(range(len(ends) + 2), len(ends) + 1)
    state = engine.state
    for slot, end in zip(slots, ends, strict=False):
        # What a slot holds of the same positions, at home and in spare rows, must not be taken for the new owner's.
        places = range(state.ring + state.history)
        owned = [max(x for x in range(end + state.ring) if x % state.ring == i % state.ring) for i in places]
        spares = [max(x for x in range(end + state.history) if x % state.history == i) for i in range(state.history)]
        state.positions[slot] = torch.tensor(owned[: state.ring] + spares)
    before = engine.snapshot()
    ids = [page if len(prefix.needed(end)) else -1 for page, end in zip(pages, ends, strict=False)]
    call_restore(engine, snapshots, [*slots, -1], [*ids, -1, 0], [*ends, 0, 3])  # the last two have nothing to do
    engine.check_untouched(before, slots[:-1], [])
    for slot, end in zip(slots, ends, strict=False):
        want = [-1] * (state.ring + state.history)
        for x in prefix.needed(end):
            want[x % state.ring] = x
        assert engine.tags(slot) == want
    ratio, at = case.spec.ratio, dict(zip(slots, ends, strict=False))
    far = max(ratio + 2, 2 * ratio if ratio < 16 else 0)
    for most in (1, ratio // 2 + 1, far):
        batch = [(slot, start, prefix.tokens[start : start + most]) for slot, start in at.items() if start < case.length]
        engine.step(batch)
        for slot, start, new in batch:
            at[slot] = start + len(new)
            held = engine.held(slot, at[slot])
            assert set(state.history_of(at[slot])) <= set(held)
            for x, row in held.items():
                assert torch.equal(row, prefix.rows[x]), f"slot {slot} at {at[slot]}: row of position {x}"
    for slot, end in zip(slots, ends, strict=False):
        made = slice(end // ratio, at[slot] // ratio)
        ours, theirs = (one.records(i, made.stop)[made] for one, i in ((engine, slot), (prefix.whole, 0)))
        assert torch.equal(ours, theirs), f"entries behind {end}"


def call_restore(engine: Engine, snapshots: Snapshots, slots: list[int], pages: list[int], ends: list[int]) -> int:
    """Returns how many were refused; expects that to be as many as `ends` that are given as None would be."""
    slots, pages, start_pos, errors = (
        torch.tensor(x, dtype=torch.int32, device=engine.backend.device) for x in (slots, pages, ends, [0])
    )
    kvfold.restore(engine.state, snapshots, slots, pages, start_pos, errors, backend=engine.backend.name)
    engine.check_canaries()
    return int(errors)
