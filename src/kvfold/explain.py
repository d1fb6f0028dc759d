"""What one step of one sequence reads, makes and keeps: found by taking the step with the library itself, not by its rules.

The step runs on the torch backend, on a compressor of the same ratio that is 16 channels wide (where rows go does not depend on
the width). Its tokens are NaN, so that the state rows which hold NaN afterwards are those that it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .arguments.checks import check_int
from .backend_torch.items import Items, StateRows
from .backend_torch.window import window_positions
from .compress import compress
from .plan import StepPlan
from .spec import CompressorSpec, check_spec
from .storage.cache import EntryCache
from .storage.fold_state import FoldState
from .storage.formats import RecordFormat, get_format
from .storage.pack import record_address, tail_address
from .storage.window_state import WindowState

MOST = 1 << 20  # V4's longest context; the narrow step over it takes a second


@dataclass(frozen=True)
class Span:
    """Bytes `[start, stop)` of page `page` of a sequence's block table; `buffer` is "page" or "scale page"."""

    what: str
    buffer: str
    page: int
    start: int
    stop: int


@dataclass(frozen=True)
class Entry:
    """An entry of the step.

    Attributes:
        window: its index in the sequence, and its row `row` of cache page `page` of the sequence's block table.
        lo: positions whose `lo` half it takes; empty without overlap. hi: those whose `hi` half, or whole row, it takes.
        position: what RoPE turns it by.
        spans: the bytes it is stored in, without a format none.
    """

    window: int
    page: int
    row: int
    lo: range
    hi: range
    position: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Row:
    """A state row: of a `FoldState` row `row` of the slot, of a `WindowState` row `row` of page `page` of the block tables."""

    position: int
    page: int | None
    row: int
    spare: bool = False


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        kind: "fold" or "rows" (`FoldState.kind`), or "window".
        ring, history: of the `FoldState`; 0 for a `WindowState`.
        reads, writes: state rows, by position.
        emptied: rows of the `FoldState` that hold nothing any more, and the positions they had.
        starts: positions, not above `start + new`, that the next step can start at; windows before them are not looked at.
        any_window: whether it can also start at the first position of any earlier window.
    """

    spec: CompressorSpec
    kind: str
    start: int
    new: int
    ring: int
    history: int
    entries: tuple[Entry, ...]
    reads: tuple[Row, ...]
    writes: tuple[Row, ...]
    emptied: tuple[Row, ...]
    starts: tuple[int, ...]
    any_window: bool


def explain(
    spec: CompressorSpec,
    start: int,
    new: int,
    *,
    max_new_tokens: int = 4,
    fmt: str | RecordFormat | None = None,
    rows_per_page: int = 64,
    state: str = "fold",
    page_size: int = 128,
) -> Explanation:
    """Explains a step of `new` tokens of a sequence that has `start` tokens, which came in one step.

    Args:
        max_new_tokens: `fold`: what the `FoldState` was allocated with.
        fmt: record format of the cache; None leaves out the bytes.
        rows_per_page: entries per page of the cache.
        state: "fold" for a `FoldState`, "window" for a `WindowState` of which every page is there.
        page_size: `window`: positions per page of the state.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_spec("spec", spec)
    check_int("start", start, 0, MOST)
    check_int("new", new, 1, MOST)
    check_int("max_new_tokens", max_new_tokens, 1, MOST)
    check_int("rows_per_page", rows_per_page, 1, MOST)
    check_int("page_size", page_size, 1, MOST)
    if state not in ("fold", "window"):
        raise ValueError(f"state must be 'fold' or 'window', got {state!r}")
    narrow = replace(spec, head_dim=16, rope_dim=0, hadamard=False)
    step = _FoldStep(narrow, max_new_tokens) if state == "fold" else _PagedStep(narrow, start + new, page_size)
    if start:
        step.take(0, start, 1.0, rows_per_page)
    reads = step.reads(start, new)
    before = step.contents()
    plan = step.take(start, new, torch.nan, rows_per_page)
    writes, emptied = step.changes(before)
    starts, any_window = step.starts(start, new)
    entries = _entries(spec, plan, None if fmt is None else get_format(fmt), rows_per_page)
    ring, history = (step.state.ring, step.state.history) if isinstance(step, _FoldStep) else (0, 0)
    kind = step.state.kind if isinstance(step, _FoldStep) else "window"
    return Explanation(spec, kind, start, new, ring, history, entries, reads, writes, emptied, starts, any_window)


def _step(
    narrow: CompressorSpec, state: FoldState | WindowState, start: int, new: int, fill: float, plan: StepPlan
) -> StepPlan:
    """Takes the step, its tokens all `fill`."""
    rows = torch.full((1, 2 * narrow.channels), fill, dtype=torch.float32).expand(
        new, -1
    )  # one row in memory, however many tokens
    ape = torch.zeros(narrow.ratio, narrow.channels, dtype=torch.float32) if narrow.has_ape else None
    compress(rows, plan, state, None, spec=narrow, ape=ape, norm_weight=None, rope=None, backend="torch")
    if int(plan.errors):
        raise RuntimeError(f"the step from {start} was refused")
    return plan


def _plan(narrow: CompressorSpec, start: int, new: int, rows_per_page: int, **where: object) -> StepPlan:
    """The plan of one sequence whose cache pages are numbered as its block table is."""
    table = torch.arange(-(-(start + new) // (narrow.ratio * rows_per_page)), dtype=torch.int32)[None]
    ends = torch.tensor([0, new], dtype=torch.int32)
    return StepPlan.build(narrow.ratio, torch.tensor([start], dtype=torch.int32), ends, new, **where,
                          cache_block_table=table, rows_per_page=rows_per_page)  # type: ignore[arg-type]  # fmt: skip


class _FoldStep:
    """Steps over a `FoldState` of one slot."""

    def __init__(self, narrow: CompressorSpec, max_new_tokens: int) -> None:
        self.narrow, self.state = narrow, FoldState.allocate(narrow, 1, max_new_tokens)

    def take(self, start: int, new: int, fill: float, rows_per_page: int) -> StepPlan:
        plan = _plan(self.narrow, start, new, rows_per_page, state_slots=torch.zeros(1, dtype=torch.int32))
        return _step(self.narrow, self.state, start, new, fill, plan)

    def contents(self) -> list[int]:
        return self.state.positions[0].tolist()

    def _find(self, position: int) -> int:
        return int(StateRows(self.state).find(torch.tensor([0]), torch.tensor([position])))

    def _row(self, position: int, row: int) -> Row:
        return Row(position, None, row, row >= self.state.ring)

    def reads(self, start: int, new: int) -> tuple[Row, ...]:
        return tuple(self._row(x, self._find(x)) for x in self.state.history_of(start))

    def changes(self, before: list[int]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        new, tags = self.state.rows[0].isnan().flatten(1).any(1).tolist(), self.contents()
        written = [self._row(tags[i], i) for i in range(len(tags)) if new[i] and tags[i] >= 0]
        emptied = [self._row(before[i], i) for i in range(len(tags)) if tags[i] < 0 <= before[i]]
        return tuple(sorted(written, key=lambda row: row.position)), tuple(emptied)

    def starts(self, start: int, new: int) -> tuple[tuple[int, ...], bool]:
        """Each position is asked for, by the rule that refuses a step; older ones than a slot has rows cannot be held."""
        end, slot = start + new, self.state.ring + self.state.history
        oldest = max(0, end - slot - self.narrow.window_rows)
        held = [p for p in sorted({0, *range(oldest, end + 1)}) if all(self._find(x) >= 0 for x in self.state.history_of(p))]
        return tuple(held), len(self.state.history_of(self.narrow.ratio)) == 0


class _PagedStep:
    """Steps over a `WindowState` that has all pages of one sequence, numbered as its block tables are."""

    def __init__(self, narrow: CompressorSpec, length: int, page_size: int) -> None:
        pages = -(-length // page_size)
        self.narrow, self.state = narrow, WindowState.allocate(narrow, pages, page_size)
        self.state.kv.zero_()
        self.state.score.zero_()
        self.table = torch.arange(pages, dtype=torch.int32)[None]

    def _make_plan(self, start: int, new: int, rows_per_page: int) -> StepPlan:
        where = {"block_tables": (self.table, self.table.clone()), "page_size": self.state.page_size}
        return _plan(self.narrow, start, new, rows_per_page, **where)

    def take(self, start: int, new: int, fill: float, rows_per_page: int) -> StepPlan:
        return _step(self.narrow, self.state, start, new, fill, self._make_plan(start, new, rows_per_page))

    def contents(self) -> list[int]:
        return []

    def _row(self, position: int) -> Row:
        return Row(position, position // self.state.page_size, position % self.state.page_size)

    def reads(self, start: int, new: int) -> tuple[Row, ...]:
        items = Items.of(self._make_plan(start, new, 1))
        position, old = window_positions(items[items.entry >= 0], self.narrow)
        return tuple(self._row(x) for x in sorted(set(position[old].tolist())))

    def changes(self, before: list[int]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
        new = self.state.kv.isnan().any(2).nonzero().tolist()
        return tuple(Row(page * self.state.page_size + row, page, row) for page, row in new), ()

    def starts(self, start: int, new: int) -> tuple[tuple[int, ...], bool]:
        """All pages are there, so a step can start anywhere."""
        return tuple(range(start, start + new + 1)), True


def _entries(spec: CompressorSpec, plan: StepPlan, fmt: RecordFormat | None, rows_per_page: int) -> tuple[Entry, ...]:
    items = Items.of(plan)
    made = items[items.entry >= 0]
    assert plan.entry_slots is not None
    slots, found = plan.entry_slots[made.entry], []
    position, _ = window_positions(made, spec)
    cache = None
    if fmt is not None and len(slots):
        cache = EntryCache.allocate(fmt, int(slots.max()) // rows_per_page + 1, rows_per_page, spec, device="meta")
    for window, slot, positions in zip(made.window.tolist(), slots.tolist(), position.tolist(), strict=True):
        cut = spec.window_rows - spec.ratio
        lo, hi = positions[:cut], positions[cut:]
        earlier = range(lo[0], lo[-1] + 1) if lo and lo[0] >= 0 else range(0)
        spans = () if cache is None else _spans(cache, slot)
        place = slot // rows_per_page, slot % rows_per_page
        found.append(Entry(window, *place, earlier, range(hi[0], hi[-1] + 1), window * spec.ratio, spans))
    return tuple(found)


def _spans(cache: EntryCache, slot: int) -> tuple[Span, ...]:
    """The bytes of one record, in the order of `EntryCache.raw`."""
    fmt, spec, at = cache.format, cache.spec, torch.tensor([slot])
    (_, page, record), (_, _, tail) = record_address(cache, at), tail_address(cache, at)
    rotated = 2 * (spec.head_dim - fmt.quantized(spec))
    scales, number = fmt.groups(spec) * fmt.scale_bytes, int(page)
    fields = [("values", "page", int(record), fmt.row_bytes(spec) - rotated)]
    fields.append(("rotated", "page", int(record) + fmt.row_bytes(spec) - rotated, rotated))
    side = "scale page" if fmt.separate else "page"
    fields.append(("scales", side, int(tail), scales))
    fields.append(("pad", side, int(tail) + scales, fmt.pad if fmt.pad_written else 0))
    return tuple(Span(what, buffer, number, at, at + size) for what, buffer, at, size in fields if size)
