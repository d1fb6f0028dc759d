"""`run` plays a history of `history_steps.py` on a backend, and checks all of state and cache after every step."""

from __future__ import annotations

import torch
from support.helpers import Backend, Engine, bits, make_tokens, norm_error
from support.history_steps import (
    CASES,
    ROWS_PER_PAGE,
    SLOTS,
    Call,
    Case,
    End,
    History,
    Hit,
    Move,
    Outcome,
    Share,
    Simulation,
    Taken,
    weights,
)
from support.window_support import WindowEngine
from torch import Tensor

import kvfold
from kvfold import reference
from kvfold.contract import pooled_bound

BOUNDS = (1, 4, 8, 1024)  # what plans are told of the longest step: it chooses a kernel, and there shall be few


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
                bound = pooled_bound(case.spec.window_rows)
                assert norm_error(got, want) <= bound, f"text {i} in one call is not what the reference says"


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
        if case.prefix:
            self.engine.make_snapshots(SLOTS * case.snapshots, case.prefix)

    def play(self, step: Call | End | Move | Hit, outcomes: list[Outcome] | Taken | None) -> None:
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
            case Hit():
                self._hit(step, outcomes)

    def _hit(self, hit: Hit, taken: Taken) -> None:
        engine, errors = self.engine, torch.zeros(1, dtype=torch.int32, device=self.engine.backend.device)
        before = engine.snapshot()
        arguments = [torch.tensor([x], dtype=torch.int32, device=errors.device) for x in (hit.target, taken.page, taken.start)]
        kvfold.restore(engine.state, engine.snapshots, *arguments, errors, backend=engine.backend.name)
        assert int(errors) == 0, f"{int(errors)} errors counted"
        engine.check_canaries()
        engine.check_untouched(before, [hit.target], [])
        self._check_rows(hit.target, Outcome(taken.text, taken.start, starts=(taken.start,)))

    def _call(self, call: Call, outcomes: list[Outcome]) -> None:
        engine, case, device = self.engine, self.case, self.engine.backend.device
        lengths = [feed.count for feed in call.feeds]
        tables = torch.full((len(call.feeds), case.columns), -1, dtype=torch.int32)
        for b, outcome in enumerate(outcomes):
            tables[b, : len(outcome.pages)] = torch.tensor(outcome.pages, dtype=torch.int32)
        ints = {"dtype": torch.int32, "device": device}
        pages = {}
        if case.prefix:
            table = torch.full((len(call.feeds), case.snapshots), -1, dtype=torch.int32)
            for b, outcome in enumerate(outcomes):
                table[b, : len(outcome.snapshots)] = torch.tensor(outcome.snapshots, dtype=torch.int32)
            pages = {"snapshot_table": table.to(device), "snapshot_page_size": case.prefix}
        plan = kvfold.StepPlan.build(
            case.spec.ratio,
            torch.tensor([feed.start for feed in call.feeds], **ints),
            torch.tensor([0, *lengths]).cumsum(0).int().to(device),
            min(bound for bound in BOUNDS if bound >= max(lengths)),
            state_slots=torch.tensor([feed.slot for feed in call.feeds], **ints),
            cache_block_table=tables.to(device),
            rows_per_page=ROWS_PER_PAGE,
            max_tokens=sum(lengths),
            **pages,
        )
        kv_score = new_tokens(case, call, self.calls).to(device)
        before, kept, after = engine.snapshot(), self._kept(), []
        for _ in range(call.times):
            plan.errors.zero_()
            pooled = torch.full((plan.entry_capacity, case.spec.head_dim), torch.nan, device=device)
            engine.compress(kv_score, plan, pooled)
            refused = sum(outcome.refused for outcome in outcomes)
            assert int(plan.errors) == refused, f"{int(plan.errors)} errors counted, not {refused}"
            engine.check_canaries()
            self._check_entries(call, outcomes, plan, pooled.cpu())
            self._check_state(call, outcomes, before)
            self._check_snapshots(outcomes, kept)
            after.append(engine.snapshot() + self._kept())
            assert all(map(torch.equal, after[-1], after[0])), "the same call again changed something"

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
        rows, tags = bits(self.engine.state.rows), self.engine.state.positions
        done = {feed.slot: outcome for feed, outcome in zip(call.feeds, outcomes, strict=True) if outcome.text != -1}
        for slot in range(SLOTS):
            if slot not in done:
                same = torch.equal(rows[slot], before[0][slot]) and torch.equal(tags[slot], before[1][slot])
                assert same, f"slot {slot} is not of the call, and changed"
                continue
            self._check_rows(slot, done[slot])

    def _check_rows(self, slot: int, outcome: Outcome) -> None:
        held = self.engine.held(slot, outcome.end)
        for position, row in held.items():
            same = torch.equal(row, self.truth.rows[outcome.text][position])
            assert same, f"slot {slot}: the row of position {position} differs"
        for start in outcome.starts:
            missing = self.engine.needed(start) - set(held)
            assert not missing, f"slot {slot} cannot go on at {start}: no rows of {sorted(missing)}"

    def _kept(self) -> tuple[Tensor, ...]:
        """Copies of the bits of the snapshots."""
        snapshots = self.engine.snapshots
        return (bits(snapshots.rows).clone(), snapshots.positions.clone()) if snapshots else ()

    def _check_snapshots(self, outcomes: list[Outcome], before: tuple[Tensor, ...]) -> None:
        """The snapshots of page ends in the call hold the bits of the rows that they are of; others are as before."""
        if not before:
            return
        rows, tags = self._kept()
        others = torch.ones(len(tags), dtype=torch.bool)
        for outcome in outcomes:
            others[list(outcome.snapshots)] = False
        others = others.to(tags.device)
        same = torch.equal(rows[others], before[0][others]) and torch.equal(tags[others], before[1][others])
        assert same, "a snapshot of a sequence that is not of the call changed"
        for outcome in outcomes:
            for k in range(outcome.seen // self.case.prefix, outcome.end // self.case.prefix):
                page, end = outcome.snapshots[k], (k + 1) * self.case.prefix
                for x, position in enumerate(self.engine.state.history_of(end)):
                    at = f"the snapshot of {end}, page {page}, position {position}"
                    assert int(tags[page, x]) == position, f"{at}: not there"
                    due = self.truth.rows[outcome.text]
                    want = due[position if position in due else ("lo", position)].reshape(-1)
                    assert torch.equal(rows[page, x].cpu(), want), f"{at}: differs"


class PagePlayer:
    """Plays the steps of a history over a `WindowState`; `WindowEngine` checks pools and cache byte for byte."""

    def __init__(self, case: Case, backend: Backend, max_new_tokens: int, truth: Truth) -> None:
        self.case, self.truth, self.calls = case, truth, 0
        self.engine = make_engine(case, backend, SLOTS, max_new_tokens, case.columns, case.limit)

    def play(self, step: Call | End | Share, outcomes: list[Outcome] | None) -> None:
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
