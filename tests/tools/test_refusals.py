"""`check` says why: each thing that a step refuses, or has no right to ask for, by sequence and number."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.helpers import Backend
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, Snapshots, StepPlan
from kvfold.debug.check import Report, check
from kvfold.testing import make_cache, make_pools, make_state, make_tokens, make_weights

ROWS = CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8)
FOLD = CompressorSpec(head_dim=16, ratio=16, rope_dim=8)
SPECS = {"rows": ROWS, "fold": FOLD, "window": ROWS}
UNSTORED, UNKEPT = "so not all of its new rows are stored", "so only that of the page is not kept"


class Step:
    """Three sequences that begin with a window each and 2 tokens more: every number of it can be made wrong before `check`."""

    def __init__(self, kind: str, backend: Backend) -> None:
        self.kind, self.spec, self.backend, device = kind, SPECS[kind], backend, backend.device
        n = self.new = self.spec.ratio + 2
        self.start, self.ends, self.most, self.max_tokens = [0, 0, 0], [0, n, 2 * n, 3 * n], n, 3 * n
        self.slots, self.tables = [2, 0, 1], [[[0, 1], [2, 3], [4, 5]], [[5, 4], [3, 2], [1, 0]]]
        self.cache_table: list[list[int]] | None = [[0], [1], [2]]
        self.entry_slots: list[int] | None = None
        self.snapshot_table, self.kv_rows, self.rope_rows = [[-1], [-1], [-1]], 3 * n, 4096
        self.state: Any
        if kind == "window":
            self.state = make_pools(self.spec, 6, self.spec.ratio, torch.float32, device)
        else:
            self.state = make_state(self.spec, 3, n, torch.float32, device)
        self.cache = make_cache("fp32", self.spec, 3, 4, device)
        self.snapshots = None if kind == "window" else Snapshots.allocate(self.spec, 2, 4, device=device)

    def _ints(self, values: object, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.backend.device)

    def plan(self) -> StepPlan:
        where: dict[str, Any] = {"state_slots": self._ints(self.slots)}
        if self.kind == "window":
            tables = tuple(self._ints(table).view(3, -1) for table in self.tables)
            where = {"block_tables": tables, "page_size": self.spec.ratio}
        else:
            where |= {"snapshot_table": self._ints(self.snapshot_table).view(3, -1), "snapshot_page_size": 4}
        if self.entry_slots is not None:
            where["entry_slots"] = self._ints(self.entry_slots, torch.int64)
        elif self.cache_table is not None:
            where |= {"cache_block_table": self._ints(self.cache_table).view(3, -1), "rows_per_page": 4}
        return StepPlan.build(
            self.spec.ratio, self._ints(self.start), self._ints(self.ends), self.most, max_tokens=self.max_tokens, **where
        )

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        how = "normal", torch.Generator().manual_seed(3), torch.float32, self.backend.device
        named = make_weights(self.spec, self.rope_rows - 1, *how)
        (tokens,) = make_tokens(self.spec, [self.kv_rows], *how)
        return (tokens, self.plan(), self.state, self.cache), named | {"snapshots": self.snapshots}

    def check(self) -> Report:
        """The report, of which every count is that of the call itself."""
        args, named = self.arguments()
        report = check(*args, **named, backend=self.backend.name)
        kvfold.compress(*args, **named, backend=self.backend.name)
        assert report.errors == int(args[1].errors) == len(report.refusals), report
        assert not report.differences or report.undefined, report
        return report


def after(step: Step, by: int) -> None:
    """All sequences take the step, and begin the next one at its end plus `by`."""
    step.check()
    step.start = [step.new + by] * 3


# What: (a change of the step, a sentence of the report, by kind of state).
def negative_start(step: Step) -> str:
    step.start[1] = -3
    new = step.new
    return f"sequence 1 is refused: start_pos[1] is -3, below 0, or seq_lens[1] is {new - 3}, less than its {new} new tokens"


def too_long(step: Step) -> str:
    step.most = step.new - 1
    step.ends = [0, step.new - 2, 2 * step.new - 2, 3 * step.new - 3]
    return f"sequence 1 is refused: it has {step.new} new tokens, more than the plan's max_new_tokens={step.new - 1}"


def beyond_max_tokens(step: Step) -> str:
    step.max_tokens = 2 * step.new + 1
    rows = f"kv_score rows {2 * step.new} to {3 * step.new - 1}"
    return f"sequence 2 is refused: its new tokens are {rows}, beyond the plan's max_tokens={2 * step.new + 1}"


def goes_back(step: Step) -> str:
    step.ends[2] = step.new - 1
    step.most = 2 * step.new + 1
    return f"sequence 1 is refused: cu_seqlens goes back from {step.new} to {step.new - 1} at [2], which is -1 new tokens"


def below_the_first_token(step: Step) -> str:
    step.ends[:2] = [-2, 3]
    step.most = 2 * step.new
    return "sequence 0 is refused: cu_seqlens[0] is -2, below 0"


def beyond_2_to_the_30(step: Step) -> str:
    step.start[0] = (1 << 30) - 1
    return f"sequence 0 is refused: it ends at position {(1 << 30) + step.new - 1}, beyond 2**30"


def slot_below(step: Step) -> str:
    step.slots[0] = -2
    return "sequence 0 is refused: state_slots[0] is -2; slots count from 0, and -1 leaves a sequence out"


def slot_beyond(step: Step) -> str:
    step.slots[0] = 3
    return "sequence 0 is refused: its state slot is 3, and the state has 3 slots"


def cache_page_below(step: Step) -> str:
    step.cache_table = [[0], [-2], [2]]
    return "window 0 of sequence 1 is refused: cache_block_table[1, 0] is -2; pages count from 0, and -1 drops an entry"


def cache_page_beyond(step: Step) -> str:
    step.cache_table = [[0], [1], [3]]
    return "window 0 of sequence 2 is refused: cache_block_table[2, 0] is 3, and the cache has 3 pages"


def cache_table_short(step: Step) -> str:
    step.cache_table = [[], [], []]
    return "window 0 of sequence 2 is refused: cache_block_table has 0 columns, and its entry is in page 0"


def entry_slot_below(step: Step) -> str:
    step.entry_slots = [0, -7, 8]
    return "window 0 of sequence 1 is refused: entry_slots[1] is -7; cache slots count from 0, and -1 drops an entry"


def entry_slot_beyond(step: Step) -> str:
    step.entry_slots = [0, 12, 8]
    return "window 0 of sequence 1 is refused: entry_slots[1] is 12, and the cache has 12 slots"


def entry_beyond(step: Step) -> str:
    step.entry_slots = [0, 4]
    return "window 0 of sequence 2 is refused: it is entry 2 of the step, and the plan has room for 2 (entry_slots)"


def kv_score_short(step: Step) -> str:
    step.kv_rows -= 1
    return (
        f"sequence 2 is refused: its new tokens are kv_score rows {2 * step.new} to {3 * step.new - 1}, and kv_score has "
        f"{3 * step.new - 1} rows"
    )


def rope_short(step: Step) -> str:
    after(step, -1)
    step.rope_rows = step.spec.ratio
    return (
        f"window 1 of sequence 0 is refused: it begins at position {step.spec.ratio}, and rope has {step.spec.ratio} positions"
    )


def row_missing(step: Step) -> str:
    step.start[1], step.state.positions[0] = 3, -1
    what = "position 2" if step.kind == "fold" else "positions 0 to 2"
    return f"sequence 1 is refused: state slot 0 holds no row of {what}, which a start at 3 needs; it is empty"


def start_beyond(step: Step) -> str:
    after(step, 0)
    step.start[1] = start = 10 * step.spec.ratio + 1
    gone = f"position {start - 1}" if step.kind == "fold" else f"positions {start - 5} to {start - 1}"
    needs = f"state slot 0 holds no row of {gone}, which a start at {start} needs"
    return f"sequence 1 is refused: {needs}; its last one is of {step.new - 1}"


def start_too_early(step: Step) -> str:
    """Behind two long steps, of which the first one's start is no longer held."""
    long = 3 * step.spec.ratio + 1
    step.ends, step.max_tokens, step.kv_rows, step.most = [0, long, 2 * long, 3 * long], 3 * long, 3 * long, long
    step.entry_slots = [-1] * 12
    step.check()
    step.start = [long] * 3
    step.check()
    step.start[1] = start = step.spec.ratio + 1
    gone = f"position {start - 1}" if step.kind == "fold" else f"positions 0 to {start - 1}"
    needs = f"state slot 0 holds no row of {gone}, which a start at {start} needs"
    most = f"the state is made for max_new_tokens={step.new}"
    return f"sequence 1 is refused: {needs}; its last one is of {2 * long - 1}, and {most}"


def snapshot_beyond(step: Step) -> str:
    step.snapshot_table = [[-1], [2], [-1]]
    return f"window 0 of sequence 1 is refused: snapshot_table[1, 0] is 2, and there are 2 snapshots; {UNKEPT}"


def snapshot_below(step: Step) -> str:
    step.snapshot_table = [[-1], [-9], [-1]]
    return f"window 0 of sequence 1 is refused: snapshot_table[1, 0] is -9, and there are 2 snapshots; {UNKEPT}"


def block_page_beyond(step: Step) -> str:
    step.tables[1][1][0] = 6
    place = "block_tables[1][1, 0], the page with the scores of position 0,"
    return f"window 0 of sequence 1 is refused: {place} is 6, and the state has 6 pages of scores; {UNSTORED}"


def block_page_below(step: Step) -> str:
    step.tables[0][2][1] = -4
    place = "block_tables[0][2, 1], the page with the values of position 4,"
    return f"window 1 of sequence 2 is refused: {place} is -4; pages count from 0, and -1 is none; {UNSTORED}"


def block_table_short(step: Step) -> str:
    step.tables[0] = [row[:1] for row in step.tables[0]]
    return f"window 1 of sequence 2 is refused: block_tables[0] has 1 columns, and position 4 is in page 1; {UNSTORED}"


def block_page_missing(step: Step) -> str:
    after(step, -1)
    step.tables = [[row + row[:1] for row in table] for table in step.tables]
    for table in step.tables:
        for b in range(3):
            table[b][2] = -1
    step.tables[0][1][0] = -1
    place = "block_tables[0][1, 0], the page with the values of position 0,"
    return f"window 1 of sequence 1 is refused: {place} is -1, no page, and its entry needs it"


ANY = (
    negative_start, too_long, beyond_max_tokens, goes_back, below_the_first_token, beyond_2_to_the_30, cache_page_below,
    cache_page_beyond, cache_table_short, entry_slot_below, entry_slot_beyond, entry_beyond, kv_score_short, rope_short,
)  # fmt: skip
SLOTS = (slot_below, slot_beyond, row_missing, start_beyond, start_too_early)
REFUSED = {"window": (*ANY, block_page_beyond, block_page_below, block_table_short, block_page_missing)}
REFUSED |= {"rows": (*ANY, *SLOTS, snapshot_beyond, snapshot_below), "fold": (*ANY, *SLOTS, snapshot_beyond, snapshot_below)}


@pytest.mark.parametrize("kind, spoil", [(kind, spoil) for kind in REFUSED for spoil in REFUSED[kind]])
def test_every_refusal_is_explained(backend: Backend, kind: str, spoil) -> None:
    if backend.slow:
        pytest.skip("the interpreter takes the random steps below")
    step = Step(kind, backend)
    assert step.check().headline == "equal"
    if spoil in (snapshot_beyond, snapshot_below) and kind == "fold":
        step.start, step.state.positions[:] = [0, 0, 0], -1  # page 0 of 4 positions ends within the window
    sentence = spoil(step)
    report = step.check()
    assert sentence in report.notes, report
    assert not report.equal and not report and str(report).splitlines()[0].endswith(report.headline)
    assert report.headline.startswith("NOT COMPARABLE" if report.undefined else "REFUSED: "), report


def shared_state_slot(step: Step) -> str:
    step.slots = [2, 0, 2]
    return "sequence 2 is undefined: state slot 2 is also that of sequence 0"


def shared_cache_page(step: Step) -> str:
    step.cache_table = [[0], [1], [0]]
    return "window 0 of sequence 2 is undefined: cache slot 0 is also that of window 0 of sequence 0"


def shared_entry_slot(step: Step) -> str:
    step.entry_slots = [0, 5, 5]
    return "window 0 of sequence 2 is undefined: cache slot 5 is also that of window 0 of sequence 1"


def shared_snapshot(step: Step) -> str:
    step.snapshot_table = [[1], [-1], [1]]
    return "window 0 of sequence 2 is undefined: row 1 of the snapshots is also that of page 0 of sequence 0"


def shared_tokens(step: Step) -> str:
    step.slots[1], step.ends = -1, [0, step.new, 2, step.new + 2]
    rows = f"rows 2 to {step.new - 1}"
    return f"sequence 2 is undefined: its tokens, kv_score {rows}, are also those of sequence 0: cu_seqlens goes back"


def shared_block_page(step: Step) -> str:
    step.tables[0][1][0] = step.tables[0][0][0]
    place = "row 0 of page 0 of state.kv"
    return f"window 0 of sequence 0 is undefined: {place} is that of its position 0 and of position 0 of sequence 1"


def written_while_read(step: Step) -> str:
    after(step, -1)
    step.tables = [[row + [3 * [5, 3, 1][b] % 2 - 1] for b, row in enumerate(table)] for table in step.tables]
    for table in step.tables:
        for b in range(3):
            table[b][2] = -1
    step.tables[1][2][1] = step.tables[1][0][0]  # it writes where sequence 0 reads
    place = f"row 1 of page {step.tables[1][0][0]} of state.score"
    return f"window 1 of sequence 2 is undefined: {place} is that of its position 5 and of position 1 of sequence 0"


UNDEFINED = {
    "rows": (shared_state_slot, shared_cache_page, shared_entry_slot, shared_snapshot, shared_tokens),
    "fold": (shared_state_slot, shared_cache_page, shared_entry_slot, shared_snapshot, shared_tokens),
    "window": (shared_cache_page, shared_entry_slot, shared_block_page, written_while_read),
}


@pytest.mark.parametrize("kind, spoil", [(kind, spoil) for kind in UNDEFINED for spoil in UNDEFINED[kind]])
def test_what_two_write_is_named(backend: Backend, kind: str, spoil) -> None:
    if backend.slow:
        pytest.skip("found on the host, before the call")
    step = Step(kind, backend)
    step.check()
    sentence = spoil(step)
    report = step.check()
    assert sentence in report.notes, report
    assert report.headline == "NOT COMPARABLE" and not report.equal


def test_windows_that_a_plan_leaves_out() -> None:
    """Tokens that overlap end more windows than `max_tokens` can; the plan drops the last, and counts nothing."""
    step = Step("rows", Backend("torch", torch.device("cpu")))
    step.slots, step.ends, step.most, step.max_tokens, step.kv_rows = [0, -1, 1], [0, 40, 0, 40], 40, 40, 40
    step.snapshots, step.cache_table, step.entry_slots = None, None, None
    plan = step.plan()
    assert int(plan.num_items) == plan.item_capacity == 16
    args, named = step.arguments()
    report = check(args[0], plan, args[2], **{k: v for k, v in named.items() if k != "snapshots"})
    assert report.headline == "NOT COMPARABLE"
    assert (
        "window 6 of sequence 2 is undefined: the step touches 20 windows by then, and the plan has room for 16: all from "
        "here on are left out"
    ) in report.notes


def test_a_store_and_a_pair_are_explained(backend: Backend) -> None:
    step = Step("rows", backend)
    step.cache_table = [[0], [7], [2]]
    args, named = step.arguments()
    plan, weights = args[1], {name: named[name] for name in ("spec", "norm_weight", "rope")}
    pooled = torch.randn(plan.entry_capacity, 16, device=backend.device)
    report = check(pooled, plan, step.cache, **weights, backend=backend.name)
    reason = "window 0 of sequence 1 is refused: cache_block_table[1, 0] is 7, and the cache has 3 pages"
    assert report.notes == (reason,) and report.headline == "REFUSED: 1 window" and report.errors == 1
    other = Step("rows", backend)
    pair = [(*x.arguments()[0][0:1], x.state, x.cache, ROWS, *(named[n] for n in ("ape", "norm_weight", "rope")))
            for x in (step, other)]  # fmt: skip
    step.state.positions.fill_(-1)
    step.slots[2], step.start = 9, [0, 6, 0]
    plan = step.plan()
    report = check(pair, plan, backend=backend.name)
    kvfold.compress_many(pair, plan, backend=backend.name)
    assert report.errors == int(plan.errors) == len(report.refusals) == 4
    assert report.headline == "REFUSED: 2 of 3 sequences"
    assert "compressors[1]: sequence 2 is refused: its state slot is 9, and the state has 3 slots" in report.notes


def test_padding_alone_is_no_comparison(backend: Backend) -> None:
    step = Step("rows", backend)
    step.slots = [-1, -1, -1]
    report = step.check()
    assert report.headline == "nothing compared" and not report.equal and report.first is None
    step.slots, step.ends = [0, 1, 2], [0, 3, 3, 3]  # no window ends, and the state is compared
    report = step.check()
    assert report.headline == "equal" and (report.entries, report.sequences) == (0, 1)


def test_what_nobody_takes_is_counted_alike(backend: Backend) -> None:
    """Entries beyond the capacity, of a call without a cache or rows: the torch backend took them for nobody's."""
    step = Step("rows", backend)
    step.entry_slots, step.cache = [0], None
    report = step.check()
    assert report.headline == "REFUSED: 2 windows", report


def test_a_count_that_no_rule_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step("rows", Backend("torch", torch.device("cpu")))
    step.slots[0] = 5
    monkeypatch.setattr("kvfold.debug.check.call_refusals", lambda *args, **named: [])
    args, named = step.arguments()
    report = check(*args, **named)
    assert report.headline == "REFUSED: 1 unexplained"
    assert report.notes == ("1 more refused, for reasons that the rules of the plan do not explain",)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("seed", range(20))
def test_every_count_of_any_step_is_explained(backend: Backend, kind: str, seed: int) -> None:
    """Numbers at random, most of them wrong: as many refusals as `plan.errors`, whatever meets what."""
    if backend.slow and seed > 0:
        pytest.skip("slow")
    rng = random.Random(seed)
    step = Step(kind, backend)
    step.check()
    wild = (-(1 << 31), -2, -1, 0, 1, 2, 3, 5, 6, 7, 11, 12, 40, (1 << 30) - 4, (1 << 31) - 1)

    def spoil(values: list) -> None:
        for i in range(len(values)):
            if isinstance(values[i], list):
                spoil(values[i])
            elif rng.random() < 0.2:
                values[i] = rng.choice(wild)

    step.start = [rng.randint(0, step.new) for _ in range(3)]
    width = rng.randint(0, 4)
    step.tables = [[[rng.randint(0, 5) for _ in range(width)] for _ in range(3)] for _ in range(2)]
    step.cache_table = [[rng.randint(0, 2) for _ in range(width)] for _ in range(3)]
    step.snapshot_table = [[rng.randint(-1, 1) for _ in range(3)] for _ in range(3)]
    step.max_tokens, step.most, step.rope_rows = rng.randint(5, 60), rng.randint(3, 30), rng.choice((4, 16, 4096))
    step.kv_rows = rng.randint(0, 60)
    if rng.random() < 0.4:
        step.entry_slots = [rng.randint(0, 11) for _ in range(rng.randint(0, 8))]
        spoil(step.entry_slots)
    for numbers in (step.start, step.ends, step.slots, step.tables, step.cache_table, step.snapshot_table):
        spoil(numbers)
    step.check()
