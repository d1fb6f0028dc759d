"""Whole histories of a serving engine as plain data, what each step of one must do, and `run`, which plays one on a backend.

A history prints as Python. `History.program` makes it a program that replays it, which is how a failing one is reported.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from helpers import Backend, Engine, Weights, bits, make_tokens, norm_error
from torch import Tensor
from window_support import WindowEngine

import kvfold
from kvfold import CompressorSpec, reference

SLOTS = 3  # sequences that an engine has at most
ROWS_PER_PAGE = 2  # entries per page of the cache
BOUNDS = (1, 4, 8, 1024)  # what plans are told of the longest step: it chooses a kernel, and there shall be few


class Case(NamedTuple):
    """A compressor, its dtypes and its cache. `limit`: tokens of the longest sequence. `page_size`: of a `WindowState`."""

    spec: CompressorSpec
    limit: int
    fmt: str = "fp32"
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    page_size: int = 0

    @property
    def columns(self) -> int:
        """Cache pages of the longest sequence."""
        return -(-self.limit // (self.spec.ratio * ROWS_PER_PAGE))


_BF16 = torch.bfloat16
_CSA = CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=16, hadamard=True)
_SIXTEEN = CompressorSpec(head_dim=32, ratio=16, rope_dim=16)
CASES = {
    "fold-16": Case(_SIXTEEN, 84),
    "fold-32-bf16": Case(CompressorSpec(head_dim=16, ratio=32, rope_dim=4, has_ape=False), 130, "fp8_tensor", _BF16),
    "fold-128": Case(CompressorSpec(head_dim=16, ratio=128, rope_dim=16), 290, "bf16"),
    "csa": Case(_CSA, 40),
    "csa-bf16-state": Case(_CSA, 40, "fp8_tensor", _BF16, _BF16),
    "csa-bf16-input": Case(CompressorSpec(head_dim=128, ratio=4, overlap=True), 40, "indexer_fp8_vllm", _BF16),
    "overlap-3": Case(CompressorSpec(head_dim=16, ratio=3, overlap=True, rope_dim=0), 36),
    "rows-8": Case(CompressorSpec(head_dim=16, ratio=8, rope_dim=4), 60, "bf16"),
    "window-csa": Case(_CSA, 40, page_size=6),
    "window-csa-bf16-state": Case(_CSA, 40, "bf16", _BF16, _BF16, page_size=4),
    "window-16": Case(_SIXTEEN, 84, "bf16", state_dtype=_BF16, page_size=16),
    "window-128": Case(CompressorSpec(head_dim=16, ratio=128, rope_dim=16), 290, dtype=_BF16, page_size=48),
}


def _short(step: tuple) -> str:
    """The Python that makes a step again, without the fields that have their default."""
    given = [f"{n}={v!r}" for n, v in step._asdict().items() if n not in step._field_defaults or v != step._field_defaults[n]]
    return f"{type(step).__name__}({', '.join(given)})"


class Feed(NamedTuple):
    """A place in a call's batch: `count` new tokens for the sequence of `slot`, whose first one is at position `start`.

    The first one of an empty slot is a sequence that arrives. A smaller `start` than the sequence has tokens rejects drafts.
    Slot -1 is padding. `hole`: the column of the sequence's table of cache pages that is -1 in this call.
    """

    slot: int
    start: int
    count: int
    hole: int | None = None
    __repr__ = _short


class Call(NamedTuple):
    """One call of `compress`, or the same one `times` over, with `padding` rows behind the last token."""

    feeds: tuple[Feed, ...]
    times: int = 1
    padding: int = 0
    __repr__ = _short


class End(NamedTuple):
    """A sequence ends: its cache pages and its slot, with whatever they hold, are for others."""

    slot: int
    __repr__ = _short


class Move(NamedTuple):
    """Preemption: state row and tags are copied to an empty slot, where the sequence goes on. `FoldState` only."""

    source: int
    target: int
    __repr__ = _short


class Share(NamedTuple):
    """A sequence arrives in an empty slot that shares the pages of the first `end` positions of another. `WindowState` only."""

    source: int
    target: int
    end: int
    __repr__ = _short


Step = Call | End | Move | Share


@dataclass(frozen=True)
class History:
    """`steps` of an engine with `SLOTS` slots; `max_new_tokens` is the state's."""

    case: str
    max_new_tokens: int
    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        steps = "".join(f"    {step!r},\n" for step in self.steps)
        return f"History({self.case!r}, {self.max_new_tokens}, (\n{steps}))"

    def program(self, backend: str = "torch") -> str:
        """Python that replays this history, to be run in the directory of the tests. `backend`: a key of `conftest.BACKENDS`."""
        names = ", ".join(sorted({type(step).__name__ for step in self.steps} | {"Feed", "History", "run"}))
        return f"import conftest\nfrom history_support import {names}\n\nrun({self!r}, conftest.BACKENDS[{backend!r}])\n"


@dataclass
class Sequence:
    """A sequence: the text that it is now, how much of it is there, and its cache pages."""

    text: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # where its next step may be relied on to start
    floor: int = 0  # the pages of earlier positions are shared, so nobody writes them


class Outcome(NamedTuple):
    """What a feed must do. `text` -1: nothing. `refused`: nothing, and it is counted."""

    text: int = -1
    end: int = 0
    refused: bool = False
    starts: tuple[int, ...] = ()
    pages: tuple[int, ...] = ()


class Simulation:
    """What an engine knows: the tokens of each sequence, as `texts`, where it may start next, and its cache pages.

    A text only grows. Where a sequence turns back it gets a new one, so that all that was ever to be seen is a prefix of a text.
    Which starts beyond those that may be relied on are refused is `reference.Simulator`'s verdict.
    """

    def __init__(self, name: str, max_new_tokens: int) -> None:
        self.case, self.max_new_tokens = CASES[name], max_new_tokens
        self.texts: list[Tensor] = []
        self.slots: list[Sequence | None] = [None] * SLOTS
        self.verdict = reference.Simulator(self.case.spec, SLOTS, max_new_tokens, weights(self.case.spec).ape)
        self.free = list(range(SLOTS * self.case.columns))
        self.calls = 0

    def apply(self, step: Step) -> list[Outcome]:
        """Does a step; the outcome of each feed if it is a call."""
        match step:
            case Call():
                self.calls += 1
                return [self._feed(feed, 1000 * self.calls + place) for place, feed in enumerate(step.feeds)]
            case End():
                self.free += self.slots[step.slot].pages
                self.slots[step.slot] = None
            case Move():
                self.slots[step.target], self.slots[step.source] = self.slots[step.source], None
                self.verdict.slots[step.target] = list(self.verdict.slots[step.source])
            case Share():
                source = self.slots[step.source]
                self.texts.append(self.texts[source.text][: step.end])
                shared = step.end // self.case.page_size * self.case.page_size
                source.floor = max(source.floor, shared)
                self.slots[step.target] = Sequence(len(self.texts) - 1, step.end, starts=[step.end], floor=shared)
                self._give_pages(self.slots[step.target], step.end)
        return []

    def tokens(self, feed: Feed, seed: int) -> Tensor:
        return make_tokens(self.case.spec, feed.count, seed, self.case.dtype)

    def _feed(self, feed: Feed, seed: int) -> Outcome:
        if feed.slot == -1 or feed.count == 0:
            return Outcome()
        end, new = feed.start + feed.count, self.tokens(feed, seed)
        if feed.start < 0 or feed.slot >= SLOTS:
            return Outcome(refused=True)
        sequence = self.slots[feed.slot] or Sequence(-1)
        accepted = self.case.page_size > 0 or self.verdict.step(feed.slot, feed.start, new.float()) is not None
        assert accepted or feed.start not in sequence.starts, f"{feed} may be relied on"
        self.slots[feed.slot] = sequence
        self._give_pages(sequence, end)
        pages = tuple(-1 if column == feed.hole else page for column, page in enumerate(sequence.pages))
        if not accepted:
            return Outcome(refused=True, pages=pages)
        old = self.texts[sequence.text] if sequence.length else new[:0]
        if not 0 < len(old) == feed.start:
            self.texts.append(old[:0])
            sequence.text = len(self.texts) - 1
        self.texts[sequence.text] = torch.cat([old[: feed.start], new])
        sequence.length = end
        # DESIGN.md, "What may be relied on".
        late = feed.start if feed.count <= self.max_new_tokens else end - self.max_new_tokens
        sequence.starts = [feed.start, *range(max(late, feed.start + 1), end + 1)]
        return Outcome(sequence.text, end, starts=tuple(sequence.starts), pages=pages)

    def _give_pages(self, sequence: Sequence, end: int) -> None:
        while len(sequence.pages) * ROWS_PER_PAGE < end // self.case.spec.ratio:
            sequence.pages.append(self.free.pop())


@functools.cache
def weights(spec: CompressorSpec) -> Weights:
    return Weights.make(spec)


def make_engine(case: Case, backend: Backend, slots: int, max_new_tokens: int, pages: int, length: int) -> Engine:
    """An engine with empty state and `pages` pages of cache for each slot; `length`: tokens of its longest sequence."""
    options = {
        "max_entries": pages * ROWS_PER_PAGE,
        "rows_per_page": ROWS_PER_PAGE,
        "fmt": case.fmt,
        "state_dtype": case.state_dtype,
        "weights": weights(case.spec),
    }
    if case.page_size == 0:
        return Engine(case.spec, backend, num_slots=slots, max_new_tokens=max_new_tokens, **options)
    options.pop("max_entries"), options.pop("rows_per_page")
    return WindowEngine(case.spec, backend, num_sequences=slots, length=length, page_size=case.page_size, **options)


class Truth:
    """Each text in one call in fresh state, on the same backend: the bits that every other way to it must give.

    Its pooled rows are also held against the exact ones.
    """

    def __init__(self, case: Case, backend: Backend, texts: list[Tensor]) -> None:
        longest = max(map(len, texts))
        windows = [len(text) // case.spec.ratio for text in texts]
        pages = -(-max(windows) // ROWS_PER_PAGE)
        engine = make_engine(case, backend, len(texts), longest, max(pages, 1), longest)
        step = engine.step([(i, 0, text) for i, text in enumerate(texts)])
        self.pooled = step.pooled
        self.records = [engine.records(i, n) for i, n in enumerate(windows)]
        self.rows = [engine.held(i, len(text)) for i, text in enumerate(texts)] if case.page_size == 0 else []
        for i, text in enumerate(texts):
            if windows[i]:
                want = reference.pooled(text, case.spec, engine.weights.ape)
                want = engine.reference(text) if case.page_size else want
                got = torch.stack([self.pooled[i, w] for w in range(windows[i])])
                assert norm_error(got, want) <= 2e-6, f"text {i} in one call is not what the reference says"


def run(history: History, backend: Backend) -> None:
    """Plays a history; AssertionError at the first step after which anything is not what the simulation says."""
    case, simulation = CASES[history.case], Simulation(history.case, history.max_new_tokens)
    outcomes = [simulation.apply(step) for step in history.steps]
    if not simulation.texts:
        return
    truth = Truth(case, backend, simulation.texts)
    player = (PagePlayer if case.page_size else SlotPlayer)(case, backend, history.max_new_tokens, truth)
    for number, (step, outcome) in enumerate(zip(history.steps, outcomes, strict=True)):
        try:
            player.play(step, outcome)
        except AssertionError as error:
            raise AssertionError(f"step {number}, {step}: {error}") from error


class SlotPlayer:
    """Plays the steps of a history over a `FoldState` and checks all of state and cache after each."""

    def __init__(self, case: Case, backend: Backend, max_new_tokens: int, truth: Truth) -> None:
        self.case, self.truth, self.calls = case, truth, 0
        self.engine = make_engine(case, backend, SLOTS, max_new_tokens, case.columns, case.limit)
        self.cache = self.engine.cache.storage.clone()  # what the cache must be, byte for byte

    def play(self, step: Step, outcomes: list[Outcome]) -> None:
        state = self.engine.state
        match step:
            case Call():
                self.calls += 1
                self._call(step, outcomes)
            case End():
                state.rows[step.slot] = torch.nan  # the tags stay: nobody clears a slot between owners
            case Move():
                state.rows[step.target], state.positions[step.target] = state.rows[step.source], state.positions[step.source]
                state.rows[step.source] = torch.nan

    def _call(self, call: Call, outcomes: list[Outcome]) -> None:
        engine, case, device = self.engine, self.case, self.engine.backend.device
        lengths = [feed.count for feed in call.feeds]
        tables = torch.full((len(call.feeds), case.columns), -1, dtype=torch.int32)
        for b, outcome in enumerate(outcomes):
            tables[b, : len(outcome.pages)] = torch.tensor(outcome.pages, dtype=torch.int32)
        ints = {"dtype": torch.int32, "device": device}
        plan = kvfold.StepPlan.build(
            case.spec.ratio,
            torch.tensor([feed.start for feed in call.feeds], **ints),
            torch.tensor([0, *lengths]).cumsum(0).int().to(device),
            min(bound for bound in BOUNDS if bound >= max(lengths)),
            state_slots=torch.tensor([feed.slot for feed in call.feeds], **ints),
            cache_block_table=tables.to(device),
            rows_per_page=ROWS_PER_PAGE,
            max_tokens=sum(lengths),
        )
        kv_score = new_tokens(case, call, self.calls).to(device)
        before = engine.snapshot()
        for repetition in range(call.times):
            plan.errors.zero_()
            pooled = torch.full((plan.entry_capacity, case.spec.head_dim), torch.nan, device=device)
            engine.compress(kv_score, plan, pooled)
            refused = sum(outcome.refused for outcome in outcomes)
            assert int(plan.errors) == refused, f"{int(plan.errors)} errors counted, not {refused}"
            engine.check_canaries()
            self._check_entries(call, outcomes, plan, pooled.cpu())
            self._check_state(call, outcomes, before)
            after = engine.snapshot()
            if repetition:
                assert all(map(torch.equal, after, first)), "the same call again changed something"
            first = after

    def _check_entries(self, call: Call, outcomes: list[Outcome], plan: kvfold.StepPlan, pooled: Tensor) -> None:
        """The pooled rows and, byte for byte, the cache: the entries of this call and nothing else."""
        first, seen = plan.cu_entries.tolist(), torch.zeros(len(pooled), dtype=torch.bool)
        for b, (feed, outcome) in enumerate(zip(call.feeds, outcomes, strict=True)):
            if outcome.text == -1:
                continue
            start = feed.start // self.case.spec.ratio
            for window in range(start, outcome.end // self.case.spec.ratio):
                page = outcome.pages[window // ROWS_PER_PAGE]
                if page == -1:
                    continue
                entry = first[b] + window - start
                same = torch.equal(bits(pooled[entry]), bits(self.truth.pooled[outcome.text, window]))
                assert same, f"slot {feed.slot}: pooled row of window {window} differs"
                seen[entry] = True
                where = self.engine._record_bytes([page * ROWS_PER_PAGE + window % ROWS_PER_PAGE])
                self.cache[where] = self.truth.records[outcome.text][window].to(self.cache.device)
        assert bool(pooled[~seen].isnan().all()), "a pooled row of no entry was written"
        wrong = (self.engine.cache.storage != self.cache).any(dim=1).nonzero().flatten().tolist()
        assert not wrong, f"cache pages {wrong} are not what they must be"

    def _check_state(self, call: Call, outcomes: list[Outcome], before: tuple[Tensor, Tensor, Tensor]) -> None:
        """What a slot holds of its sequence has the right bits, all that may be relied on is there, others are as before."""
        state, rows, tags = self.engine.state, bits(self.engine.state.rows), self.engine.state.positions
        done = {feed.slot: outcome for feed, outcome in zip(call.feeds, outcomes, strict=True) if outcome.text != -1}
        for slot in range(SLOTS):
            if slot not in done:
                same = torch.equal(rows[slot], before[0][slot]) and torch.equal(tags[slot], before[1][slot])
                assert same, f"slot {slot} is not of the call, and changed"
                continue
            held, outcome = self.engine.held(slot, done[slot].end), done[slot]
            for position, row in held.items():
                same = torch.equal(row, self.truth.rows[outcome.text][position])
                assert same, f"slot {slot}: the row of position {position} differs"
            for start in outcome.starts:
                missing = set(state.history_of(start)) - set(held)
                assert not missing, f"slot {slot} cannot go on at {start}: no rows of {sorted(missing)}"


class PagePlayer:
    """Plays the steps of a history over a `WindowState`; `WindowEngine` checks pools and cache byte for byte."""

    def __init__(self, case: Case, backend: Backend, max_new_tokens: int, truth: Truth) -> None:
        self.case, self.truth, self.calls = case, truth, 0
        self.engine = make_engine(case, backend, SLOTS, max_new_tokens, case.columns, case.limit)

    def play(self, step: Step, outcomes: list[Outcome]) -> None:
        match step:
            case Call():
                self.calls += 1
                self._call(step, outcomes)
            case End():
                self._take_back(step.slot)
            case Share():
                self.engine.share(step.source, step.target, step.end)

    def _call(self, call: Call, outcomes: list[Outcome]) -> None:
        ratio = self.case.spec.ratio
        tokens = new_tokens(self.case, call, self.calls).split([*(feed.count for feed in call.feeds), call.padding])
        batch = [(feed.slot, feed.start, tokens[b]) for b, feed in enumerate(call.feeds)]
        dropped = tuple(
            (b, window)
            for b, feed in enumerate(call.feeds)
            for window in range(feed.start // ratio, (feed.start + feed.count) // ratio)
            if window // ROWS_PER_PAGE == feed.hole
        )
        for _ in range(call.times):
            step = self.engine.step(batch, padding=call.padding, dropped=dropped)
            for (b, window), row in step.pooled.items():
                slot, text = call.feeds[b].slot, outcomes[b].text
                same = torch.equal(bits(row), bits(self.truth.pooled[text, window]))
                assert same, f"slot {slot}: pooled row of window {window} differs"
                record = self.engine.records(slot, window + 1)[window]
                assert torch.equal(record, self.truth.records[text][window]), f"slot {slot}: entry {window} differs"

    def _take_back(self, slot: int) -> None:
        """The pages of a sequence that nobody shares are free again, the last one given first, with what they hold."""
        for table, free in zip(self.engine.tables, self.engine.free, strict=True):
            pages = table[slot][table[slot] >= 0].tolist()
            table[slot] = -1
            free += [page for page in pages if not bool((table == page).any())]
        self.engine.given[slot] = 0


def new_tokens(case: Case, call: Call, number: int) -> Tensor:
    """kv_score of a history's call `number` (from 1): as the simulation draws it, NaN for padding."""
    found = []
    for place, feed in enumerate(call.feeds):
        rows = make_tokens(case.spec, feed.count, 1000 * number + place, case.dtype)
        found.append(torch.full_like(rows, torch.nan) if feed.slot == -1 else rows)
    return torch.cat([*found, torch.full((call.padding, 2 * case.spec.channels), torch.nan, dtype=case.dtype)])
