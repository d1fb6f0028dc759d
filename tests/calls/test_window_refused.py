"""What data can get wrong over paged raw state is skipped and counted exactly; `WindowEngine.step` checks every other byte."""

from __future__ import annotations

import random

import pytest
import torch
from support.helpers import SPECS, Backend, make_tokens, norm_error
from support.window_support import SCORE, VALUE, WindowEngine
from torch import Tensor

import kvfold
from kvfold import CompressorSpec
from kvfold.contract import MOST_POSITIONS, pooled_bound

SPEC = SPECS["indexer"]
TOP, BOTTOM = (1 << 31) - 1, -(1 << 31)
BEYOND = "one page too far"


def started(backend: Backend, spec: CompressorSpec = SPEC, old: int = 6, **options: int) -> tuple[WindowEngine, Tensor]:
    """An engine whose one sequence has `old` tokens, and pages for 7 more; and all these tokens."""
    tokens = make_tokens(spec, old + 7, seed=70)
    engine = WindowEngine(spec, backend, **{"num_sequences": 1, "length": old + 7, "page_size": 3, **options})
    engine.put(0, tokens[:old])
    engine.give(0, old + 7)
    return engine, tokens


# The step adds positions 6..12. Window 1 ends: it writes 6 and 7, and is made of 0..7. Window 2 ends: it writes 8..11, and is
# made of 4..11. Window 3 writes 12. A page is 3 positions.
BAD_PAGES = {
    # what: (changes of a table as (pool, column, page), errors, windows made, windows dropped)
    "no page to write values": ([(VALUE, 2, -1)], 0, {1, 2}, ()),
    "no page to write scores": ([(SCORE, 4, -1)], 0, {1, 2}, ()),
    "no pages to write": ([(pool, column, -1) for pool in (VALUE, SCORE) for column in (2, 3, 4)], 0, {1, 2}, ()),
    "a page of -2 to write": ([(VALUE, 2, -2)], 2, {1, 2}, ()),
    "a page beyond the pool to write": ([(VALUE, 4, BEYOND)], 1, {1, 2}, ()),
    "a score page beyond its pool": ([(SCORE, 4, BEYOND)], 1, {1, 2}, ()),
    "a page far beyond to write": ([(SCORE, 3, TOP)], 1, {1, 2}, ()),
    "the same window twice": ([(VALUE, 3, -3), (SCORE, 3, TOP)], 1, {1, 2}, ()),
    "no page to read values": ([(VALUE, 0, -1)], 1, {2}, ()),
    "no page to read scores": ([(SCORE, 1, -1)], 2, set(), ()),
    "no page to read, but not wanted": ([(SCORE, 1, -1)], 1, set(), (2,)),
    "no page to read, and none wanted": ([(VALUE, 0, -1), (SCORE, 1, -1)], 0, set(), (1, 2)),
    "a page far below to read": ([(VALUE, 1, BOTTOM)], 2, set(), ()),
    "a page beyond the pool to read": ([(SCORE, 0, BEYOND)], 1, {2}, ()),
    "a page beyond to read, though not wanted": ([(SCORE, 0, BEYOND)], 1, {2}, (1,)),
    "no page to read and a wrong one to write": ([(VALUE, 0, -1), (VALUE, 2, -2)], 2, {2}, ()),
    "all wrong": ([(pool, column, TOP) for pool in (VALUE, SCORE) for column in range(5)], 3, set(), ()),
}


@pytest.mark.parametrize("what", BAD_PAGES)
def test_bad_pages(backend: Backend, what: str) -> None:
    changes, errors, made, dropped = BAD_PAGES[what]
    engine, tokens = started(backend)
    for pool, column, page in changes:
        engine.tables[pool][0, column] = len(engine.pools[pool]) if page == BEYOND else page
    step = engine.step([(0, 6, tokens[6:])], strict=False, dropped=tuple((0, window) for window in dropped))
    assert step.errors == errors
    assert {window for _, window in step.pooled} == made - set(dropped)


@pytest.mark.parametrize(
    "columns, errors, made",
    [((4, 6), 1, {1, 2}), ((5, 3), 2, {1, 2}), ((1, 1), 3, set()), ((5, 0), 3, set()), ((0, 0), 3, set())],
)
def test_tables_that_are_too_narrow(backend: Backend, columns: tuple[int, int], errors: int, made: set[int]) -> None:
    engine, tokens = started(backend)
    engine.tables = [table[:, :width] for table, width in zip(engine.tables, columns, strict=True)]
    step = engine.step([(0, 6, tokens[6:])], strict=False)
    assert step.errors == errors and {window for _, window in step.pooled} == made


@pytest.mark.parametrize(
    "start, errors", [(1000, 2), (MOST_POSITIONS - 7, 2), (MOST_POSITIONS - 6, 1), (TOP - 7, 1), (-3, 1), (BOTTOM, 1)]
)
def test_starts_that_cannot_be(backend: Backend, start: int, errors: int) -> None:
    """Beyond the tables nothing is found, in each window that the step touches; beyond 2**30 it is refused whole.

    Beside it the other sequence goes on.
    """
    engine, tokens = started(backend, num_sequences=2)
    step = engine.step([(1, start, tokens[:7]), (0, 6, tokens[6:])], strict=False)
    assert step.errors == errors and {owner for owner in step.pooled} == {(1, 1), (1, 2)}


@pytest.mark.parametrize("seed", range(12))
def test_any_tables(backend: Backend, seed: int) -> None:
    """Random tables with holes and nonsense, against the rules position by position; entries that are made are right."""
    rng = random.Random(seed)
    spec = [SPEC, CompressorSpec(head_dim=128, ratio=16), CompressorSpec(head_dim=128, ratio=4)][seed % 3]
    engine = WindowEngine(spec, backend, num_sequences=4, length=5 * spec.ratio, page_size=rng.choice((1, 2, 3, 5)), seed=seed)
    batch, texts = [], []
    for i in range(4):
        start = rng.randint(0, 3 * spec.ratio)
        texts.append(make_tokens(spec, start + rng.randint(0, 2 * spec.ratio), seed=100 * seed + i))
        engine.put(i, texts[i][:start])
        engine.give(i, len(texts[i]))
        batch.append((i, start, texts[i][start:]))
    for pool in (VALUE, SCORE):
        strange = (-1, -1, -2, BOTTOM, len(engine.pools[pool]), TOP)
        table = engine.tables[pool]
        for i in range(4):
            for column in range(table.shape[1]):
                if rng.random() < 0.2 / spec.ratio:
                    table[i, column] = rng.choice(strange)
    dropped = tuple((b, window) for b in range(4) for window in range(5) if rng.random() < 0.3)
    step = engine.step(batch, strict=False, padding=1, dropped=dropped)
    for (b, window), row in step.pooled.items():
        assert norm_error(row[None], engine.reference(texts[b])[window][None]) <= pooled_bound(spec.window_rows)


class Call:
    """A call with a plan made by hand, for two sequences of 6 old tokens each; `check` compares what it did."""

    def __init__(self, backend: Backend) -> None:
        self.engine, self.tokens = started(backend, num_sequences=2)
        self.engine.put(1, self.tokens[:6])
        self.engine.give(1, 13)
        self.device = backend.device

    def run(
        self, starts: list[int], cu_seqlens: list[int], kv_score: Tensor, sequences: list[int], slots: list[int] | None
    ) -> tuple[int, Tensor]:
        """Errors counted, and the pooled rows, NaN where none was written."""
        ints = {"dtype": torch.int32, "device": self.device}
        plan = kvfold.StepPlan.build(
            SPEC.ratio,
            torch.tensor(starts, **ints),
            torch.tensor(cu_seqlens, **ints),
            8,
            block_tables=tuple(table[sequences].to(self.device) for table in self.engine.tables),
            page_size=3,
            entry_slots=None if slots is None else torch.tensor(slots, dtype=torch.int64, device=self.device),
        )
        rows = torch.full((plan.entry_capacity, SPEC.head_dim), torch.nan, device=self.device)
        if slots is None:
            self.engine.cache = None
        self.engine.compress(kv_score.to(self.device), plan, rows=rows)
        self.engine.check_canaries()
        return int(plan.errors), rows.cpu()


def test_negative_lengths(backend: Backend) -> None:
    call = Call(backend)
    before, new = call.engine.snapshot(), call.tokens[6:]
    # The first sequence has tokens 0..6 of kv_score, the second a negative number of them.
    errors, rows = call.run([6, 6], [0, 7, 3], new, [0, 1], [0, 1, 2])
    assert errors == 1 and rows[:2].isfinite().all() and rows[2].isnan().all()
    call.engine.check_change(before, [(0, 6, new)], call.engine.predict([(0, 6, new)]), [0, 1])


def test_tokens_beyond_kv_score(backend: Backend) -> None:
    """A sequence whose tokens do not all fit is refused whole, and counted once, however many windows it touches."""
    call = Call(backend)
    before, new = call.engine.snapshot(), call.tokens[6:]
    errors, rows = call.run([6, 6], [0, 7, 14], torch.cat([new, new])[:13], [0, 1], [0, 1, 3, 4])
    assert errors == 1 and rows[:2].isfinite().all() and rows[2:].isnan().all()
    call.engine.check_change(before, [(0, 6, new)], call.engine.predict([(0, 6, new)]), [0, 1])


@pytest.mark.parametrize(
    "slots, errors, made",
    [
        ([0, 9999], 1, [True, False]),  # beyond the cache
        ([-2, 1], 1, [False, True]),
        ([-1, -1], 0, [False, False]),
        ([0], 1, [True]),  # fewer places than entries
        ([], 2, []),
        (None, 0, [True, True]),  # no cache
    ],
)
def test_entry_slots(backend: Backend, slots: list[int] | None, errors: int, made: list[bool]) -> None:
    call = Call(backend)
    before, new = call.engine.snapshot(), call.tokens[6:]
    counted, rows = call.run([6], [0, 7], new, [0], slots)
    assert counted == errors
    written = ~rows.isnan().any(dim=1)
    if slots is None or max([0, *slots]) < 9000:  # `rows` has no say in what the cache refuses
        assert written.tolist()[: len(made)] == made
    if slots is not None:
        kept = [slot for slot, done in zip(slots, made, strict=True) if done]
        call.engine.check_change(before, [(0, 6, new)], call.engine.predict([(0, 6, new)]), kept)


def test_an_entry_is_counted_once(backend: Backend) -> None:
    """Without its old rows, and beyond E: its rows are kept all the same."""
    call = Call(backend)
    call.engine.tables[VALUE][0, 0] = -1
    before, new = call.engine.snapshot(), call.tokens[6:]
    assert call.run([6], [0, 7], new, [0], [])[0] == 2  # window 1 misses rows and window 2 has no place
    call.engine.check_change(before, [(0, 6, new)], call.engine.predict([(0, 6, new)]), [])


def test_nothing_to_do(backend: Backend) -> None:
    """No sequences, no tokens, and padding whose tables hold nonsense: no byte changes and nothing is counted."""
    call = Call(backend)
    before, empty = call.engine.snapshot(), call.tokens[:0]
    call.engine.tables[VALUE][1] = -99
    assert call.run([], [0], empty, [], [])[0] == 0
    assert call.run([], [0], call.tokens, [], [])[0] == 0
    assert call.run([6, -5], [0, 0, 0], empty, [0, 1], [0])[0] == 0
    assert call.run([6, 5], [0, 0, 0], call.tokens * torch.nan, [0, 1], [0])[0] == 0
    for was, now in zip(before, call.engine.snapshot(), strict=True):
        assert torch.equal(was, now)
    step = call.engine.step([(1, 3, empty), (0, 6, call.tokens[6:])], padding=3)
    assert {owner for owner in step.pooled} == {(1, 1), (1, 2)}
