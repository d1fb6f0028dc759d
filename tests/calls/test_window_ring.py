"""Block tables as rings: a sequence's last raw rows in an engine's few pages; the same bits as with pages for all."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from support.helpers import Backend, bits
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, StepPlan, WindowState

PAIRS = CompressorSpec(16, 2, has_ape=False, rope_dim=0)
CSA = CompressorSpec(16, 4, overlap=True, rope_dim=0)
WIDE = CompressorSpec(32, 16, rope_dim=0)


class Ring(NamedTuple):
    """Rows per page and pages of a sequence."""

    spec: CompressorSpec
    page_size: int
    pages: int

    @property
    def rows(self) -> int:
        return self.page_size * self.pages


# One block of a request; a flat pool of which each request has some rows; a pending row; rings of several pages, and such that
# no window lies on one page.
RINGS = {
    "pairs-8": Ring(PAIRS, 8, 1), "pairs-2x2": Ring(PAIRS, 2, 2), "pairs-3": Ring(PAIRS, 3, 1), "pending": Ring(PAIRS, 1, 1),
    "csa-4x3": Ring(CSA, 4, 3), "csa-16": Ring(CSA, 16, 1), "csa-7": Ring(CSA, 7, 1), "csa-5x2": Ring(CSA, 5, 2),
    "wide-16": Ring(WIDE, 16, 1), "wide-17x2": Ring(WIDE, 17, 2),
}  # fmt: skip


class Both:
    """Sequences over rings and, beside it, over a page for every position; each step must be the same to the bit in both."""

    def __init__(self, ring: Ring, backend: Backend, sequences: int, length: int, dtype: torch.dtype = torch.float32) -> None:
        self.ring, self.backend, self.length = ring, backend, length
        spec, device = ring.spec, backend.device
        draw = torch.Generator().manual_seed(3)
        self.ape = torch.randn(spec.ratio, spec.channels, generator=draw).to(device) if spec.has_ape else None
        # One pool of value and score rows, with other rows between, as an engine's blocks have them.
        count = sequences * ring.pages + 1
        self.pool = torch.full((count, ring.page_size + 1, 2 * spec.channels), torch.nan, dtype=dtype, device=device)
        rows = self.pool[:, : ring.page_size]
        self.state = WindowState(rows[..., : spec.channels], rows[..., spec.channels :])
        order = random.Random(1).sample(range(1, count), count - 1)  # page 0 is none
        self.pages = [order[b * ring.pages :][: ring.pages] for b in range(sequences)]
        self.whole = WindowState.allocate(spec, sequences, length, dtype=dtype, device=device)
        self.oldest = [0] * sequences  # the first position of each that is still in its ring

    def step(self, batch: list[tuple[int, int, Tensor]], slots: list[int] | None = None) -> Tensor:
        """Sequences, starts and new tokens; which entries have a slot. Returns the pooled rows."""
        spec, device = self.ring.spec, self.backend.device
        lengths = [len(new) for _, _, new in batch]
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
        starts = torch.tensor([start for _, start, _ in batch], device=device)
        entries = sum((start + n) // spec.ratio - start // spec.ratio for (_, start, _), n in zip(batch, lengths, strict=True))
        given = torch.tensor(slots or [7] * entries, dtype=torch.int64, device=device)
        kv_score, made = torch.cat([new for _, _, new in batch]).to(device), []
        for state, pages, how in (
            (self.whole, [[b] for b, _, _ in batch], {"page_size": self.length}),
            (
                self.state,
                [self.pages[b] for b, _, _ in batch],
                {"page_size": self.ring.page_size, "ring": True, "null_page": 0},
            ),
        ):
            table = torch.tensor(pages, dtype=torch.int32, device=device)
            plan = StepPlan.build(
                spec.ratio, starts, offsets, max(lengths), block_tables=(table, table), entry_slots=given, **how
            )
            rows = torch.full((len(given), spec.head_dim), 777.0, device=device)
            kvfold.compress(
                kv_score, plan, state, None, spec=spec, ape=self.ape, norm_weight=None, rope=None, rows=rows,
                backend=self.backend.name,
            )  # fmt: skip
            assert int(plan.errors) == 0
            made.append(rows)
        assert torch.equal(bits(made[0]), bits(made[1]))
        assert not made[0].isnan().any()
        for (b, start, _), n in zip(batch, lengths, strict=True):
            self.oldest[b] = max(self.oldest[b] if start else 0, start + n - self.ring.rows)
            self.check(b, start + n)
        return made[0]

    def reach(self, b: int) -> int:
        """The least position from which a sequence can go on: all rows that a window may need are there."""
        return self.oldest[b] and self.oldest[b] + self.ring.spec.window_rows - 1

    def check(self, b: int, end: int) -> None:
        """The ring of a sequence has its last rows, and nobody wrote elsewhere."""
        position = torch.arange(self.oldest[b], end)
        page = torch.tensor(self.pages[b])[position // self.ring.page_size % self.ring.pages].to(self.backend.device)
        for ring, whole in ((self.state.kv, self.whole.kv), (self.state.score, self.whole.score)):
            found = ring[page, (position % self.ring.page_size).to(page.device)]
            assert torch.equal(bits(found), bits(whole[b, position.to(page.device)]))
        assert self.pool[0].isnan().all() and self.pool[:, -1].isnan().all()


def tokens(spec: CompressorSpec, length: int, draw: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    return torch.randn(length, 2 * spec.channels, generator=generator)


@pytest.mark.parametrize("name", RINGS)
def test_histories(name: str, backend: Backend) -> None:
    """Prompts and chunks that are longer than the ring, steps of which drafts are rejected, and slots with new owners."""
    ring, draw = RINGS[name], random.Random(name)
    both, at = Both(ring, backend, 3, 200), [0, 0, 0]
    drafts = max(ring.rows - ring.spec.window_rows + 1, 1)  # new tokens of a step that can be taken back
    for turn in range(8 if backend.slow else 24):
        batch = []
        for b in range(3):
            if at[b] > 120 or (turn and draw.random() < 0.1):
                at[b] = 0  # another sequence, in rows of which some are of the one before
            n = draw.choice([0, 1, min(drafts, 4), drafts, draw.randint(1, 3 * ring.rows), 2 * ring.rows + 1])
            n = min(n, 60)
            batch.append((b, at[b], tokens(ring.spec, n, draw)))
        batch = [part for part in batch if len(part[2])]
        if not batch:
            continue
        both.step(batch)
        for b, start, new in batch:
            at[b] = draw.randint(min(max(both.reach(b), start), start + len(new)), start + len(new))


@pytest.mark.parametrize("name", ["pairs-8", "pending", "csa-7", "csa-4x3", "wide-16"])
def test_every_phase_of_a_long_chunk(name: str, backend: Backend) -> None:
    """Chunks from every start in a window, so long that new rows take the places of the old ones that it needs."""
    ring, draw = RINGS[name], random.Random(name)
    spec = ring.spec
    starts = [spec.ratio * 3 + i for i in range(spec.ratio)]
    if backend.slow and spec.ratio > 4:
        starts = starts[:: spec.ratio // 2]
    both = Both(ring, backend, len(starts), 200)
    both.step([(b, 0, tokens(spec, start, draw)) for b, start in enumerate(starts)])
    more = [ring.rows + draw.choice([-1, 0, 1, ring.rows, 2 * ring.rows - 1]) for _ in starts]
    batch = [(b, start, tokens(spec, max(n, 1), draw)) for b, (start, n) in enumerate(zip(starts, more, strict=True))]
    both.step(batch)
    both.step([(b, start + len(new), tokens(spec, 2 * spec.ratio, draw)) for b, start, new in batch])


@pytest.mark.parametrize("dropped", [[-1], [-1, 5], [5, -1]])
@pytest.mark.parametrize("name", ["pairs-8", "csa-7", "wide-16"])
def test_rows_are_kept_where_entries_are_dropped(name: str, dropped: list[int], backend: Backend) -> None:
    """Who would have pooled old rows stores the new ones in their place also where nobody wants the entry."""
    ring, draw = RINGS[name], random.Random(name)
    spec, start, n = ring.spec, 3 * ring.spec.ratio + 1, 3 * ring.rows + 2 * ring.spec.ratio
    both = Both(ring, backend, 1, 400, torch.bfloat16)
    both.step([(0, 0, tokens(spec, start, draw))])
    entries = (start + n) // spec.ratio - start // spec.ratio
    both.step([(0, start, tokens(spec, n, draw))], ([*dropped] + [7] * entries)[:entries])
    both.step([(0, start + n, tokens(spec, spec.ratio, draw))])


def test_a_step_without_entries(backend: Backend) -> None:
    """Nobody pools where neither rows nor a cache are given: the work items store all."""
    ring, draw = RINGS["csa-7"], random.Random(5)
    spec, device = ring.spec, backend.device
    both = Both(ring, backend, 1, 100)
    both.step([(0, 0, tokens(spec, 13, draw))])
    new = tokens(spec, 30, draw).to(device)
    for state, table, how in (
        (both.whole, [[0]], {"page_size": 100}),
        (both.state, [both.pages[0]], {"page_size": 7, "ring": True}),
    ):
        tables = (torch.tensor(table, dtype=torch.int32, device=device),) * 2
        ints = {"dtype": torch.int32, "device": device}
        plan = StepPlan.build(4, torch.tensor([13], **ints), torch.tensor([0, 30], **ints), 30, block_tables=tables, **how)
        kvfold.compress(new, plan, state, None, spec=spec, ape=both.ape, norm_weight=None, rope=None, backend=backend.name)
        assert int(plan.errors) == 0
    both.oldest[0] = 43 - 7
    both.check(0, 43)


def test_a_ring_that_is_too_small(backend: Backend) -> None:
    """A step needs up to a window's rows less one: what cannot hold them is refused before anything is written."""
    state, ints = WindowState.allocate(CSA, 2, 6, device=backend.device), {"dtype": torch.int32, "device": backend.device}
    state.kv.fill_(7), state.score.fill_(7)
    table = torch.tensor([[1]], **ints)
    plan = StepPlan.build(4, torch.tensor([0], **ints), torch.tensor([0, 4], **ints), 4, block_tables=(table,) * 2, page_size=6,
                          ring=True)  # fmt: skip
    with pytest.raises(ValueError, match=r"plan must have rings of at least 7 rows, .* got 6"):
        kvfold.compress(
            torch.zeros(4, 4 * 16, device=backend.device), plan, state, None, spec=CSA,
            ape=torch.zeros(4, 32, device=backend.device), norm_weight=None, rope=None, backend=backend.name,
        )  # fmt: skip
    assert (state.kv == 7).all() and (state.score == 7).all()


def test_a_dummy_batch_changes_no_byte(backend: Backend) -> None:
    """Tokens are there, all slots are -1 and all tables the null page: no state, no entry, no error."""
    device, draw = backend.device, random.Random(2)
    for spec, ring in ((PAIRS, True), (PAIRS, False), (CSA, False)):
        state = WindowState.allocate(spec, 3, 8, device=device)
        cache = kvfold.EntryCache.allocate("bf16", 2, 4, spec, device=device)
        state.kv.fill_(3), state.score.fill_(3), cache.storage.fill_(3)
        zeros = torch.zeros(2, 4, dtype=torch.int32, device=device)
        for entries in (
            {"token_slots": torch.full((30,), -1, device=device)},
            {"cache_block_table": zeros, "rows_per_page": 4},
        ):
            plan = StepPlan.build(
                spec.ratio, torch.tensor([5, 0], device=device), torch.tensor([0, 9, 30], device=device), 21,
                block_tables=(zeros, zeros), page_size=8, ring=ring, null_page=0, **entries,
            )  # fmt: skip
            kvfold.compress(
                tokens(spec, 30, draw).to(device), plan, state, cache, spec=spec,
                ape=torch.zeros(spec.ratio, spec.channels, device=device) if spec.has_ape else None,
                norm_weight=torch.ones(16, device=device), rope=None, backend=backend.name,
            )  # fmt: skip
            assert int(plan.errors) == 0
            assert (state.kv == 3).all() and (state.score == 3).all() and (cache.storage == 3).all()
