"""What one step of one sequence reads, makes and keeps: found by taking the step with the library itself, not by its rules.

The step runs on the torch backend, on a compressor of the same ratio that is 16 channels wide (where rows go does not depend on
the width). Its tokens are NaN, so that the state rows which hold NaN afterwards are those that it wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .arguments.checks import check_int
from .backend_torch.items import FoldRows, Items, StateRows, missing
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
    """A state row: of a `FoldState` row `row` of the slot, of a `WindowState` row `row` of page `page` of the block tables.

    spare: not where the position is at home. half: of an input row, "lo" or "hi"; "" for a whole one, and for fold rows.
    """

    position: int
    page: int | None
    row: int
    spare: bool = False
    half: str = ""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        kind: "fold" or "rows" (`FoldState.kind`), "window", or "none" for a spec without a gate.
        ring, places: of the `FoldState`; of a `WindowState` 0, but for the rows of a ring.
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
    places: tuple[int, int]
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
    ring: int = 0,
) -> Explanation:
    """Explains a step of `new` tokens of a sequence that has `start` tokens, which came in one step.

    Args:
        max_new_tokens: `fold`: what the `FoldState` was allocated with.
        fmt: record format of the cache; None leaves out the bytes.
        rows_per_page: entries per page of the cache.
        state: "fold" for a `FoldState`, "window" for a `WindowState` of which every page is there; a spec without a gate has
            neither.
        page_size: `window`: positions per page of the state.
        ring: `window`: pages of each sequence's ring, as of `StepPlan.build(ring=True)`; 0 for tables without rings.

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
    check_int("ring", ring, 0, MOST)
    if ring and (state != "window" or not spec.gate):
        raise ValueError(f"ring must be 0 without state='window', got {ring}")
    if ring and ring * page_size < spec.window_rows - 1:
        raise ValueError(f"ring must be of {spec.window_rows - 1} rows at least, got {ring} pages of {page_size}")
    narrow = replace(spec, head_dim=16, rope_dim=0, hadamard=False, has_ape=False)
    if not spec.gate:
        plan = _take(None, narrow, rows_per_page, start, new, torch.nan)
        found = dict.fromkeys(("reads", "writes", "emptied"), ()) | {"ring": 0, "places": (0, 0)}
        found |= {"kind": "none", "starts": tuple(range(start, start + new + 1)), "any_window": True}
    elif state == "fold":
        slot = FoldState.allocate(narrow, 1, max_new_tokens)
        take = partial(_take, slot, narrow, rows_per_page, state_slots=torch.zeros(1, dtype=torch.int32))
        plan, found = _over_a_slot(slot, start, new, take)
    else:
        table = torch.arange(ring or -(-(start + new) // page_size), dtype=torch.int32)[None]
        pages = WindowState.allocate(narrow, table.numel(), page_size)
        where = {"block_tables": (table, table.clone()), "page_size": page_size, "ring": ring > 0}
        take = partial(_take, pages, narrow, rows_per_page, **where)
        plan, found = _over_pages(pages, narrow, start, new, take)
        found |= _over_rings(pages, narrow, start, new, take, found) if ring else {}
    entries = _entries(spec, plan, None if fmt is None else get_format(fmt), rows_per_page)
    return Explanation(spec=spec, start=start, new=new, entries=entries, **found)


def _take(
    state: FoldState | WindowState | None,
    spec: CompressorSpec,
    rows_per_page: int,
    start: int,
    new: int,
    fill: float,
    **where: Any,
) -> StepPlan:
    """Takes a step of one sequence whose cache pages are numbered as its block table is.

    fill: what all of its tokens are; infinity for the position of each.
    """
    table = torch.arange(-(-(start + new) // (spec.ratio * rows_per_page)), dtype=torch.int32)[None]
    begin, ends = torch.tensor([start], dtype=torch.int32), torch.tensor([0, new], dtype=torch.int32)
    plan = StepPlan.build(spec.ratio, begin, ends, new, cache_block_table=table, rows_per_page=rows_per_page, **where)
    tokens = torch.full((1, spec.kv_score_width), fill, dtype=torch.float32).expand(new, -1)  # one row in memory
    if fill == torch.inf:
        tokens = torch.arange(start, start + new).float()[:, None].repeat(1, spec.kv_score_width)
    compress(tokens, plan, state, None, spec=spec, ape=None, norm_weight=None, rope=None, backend="torch")
    if int(plan.errors):
        raise RuntimeError(f"the step from {start} was refused")
    return plan


def _over_a_slot(state: FoldState, start: int, new: int, take: Callable[..., StepPlan]) -> tuple[StepPlan, dict[str, Any]]:
    """Takes the step over the only slot of `state`; its plan, and what `Explanation` says of the state."""
    end, ratio, (lo, hi) = start + new, state.spec.ratio, state.places

    def row(position: int, at: int) -> Row:
        if state.kind == "fold":
            return Row(position, None, at, at >= state.ring)
        upper = at >= lo * ratio
        place = (at - lo * ratio) // max(ratio - 1, 1) if upper else at // ratio
        half = ("hi" if upper else "lo") if lo else ""
        return Row(position, None, at, place != position // ratio % (hi if upper else lo), half)

    if start:
        take(0, start, 1.0)
    reads = tuple(row(*read) for read in _read_rows(state, start))
    before = state.held()[0].tolist()
    plan = take(start, new, torch.nan)
    tags, fresh = state.held()[0].tolist(), state.rows[0].isnan().flatten(1).any(1).tolist()
    writes = [row(tag, i) for i, tag in enumerate(tags) if fresh[i] and tag >= 0]
    emptied = [row(before[i], i) for i, tag in enumerate(tags) if tag < 0 <= before[i]]
    # Each position is asked for, by the rule that refuses a step; older ones than a slot has rows cannot be held.
    asked = sorted({0, *range(max(0, end - len(tags) - state.spec.window_rows), end + 1)})
    starts = tuple(p for p in asked if not missing(state, 0, p))
    return plan, {
        "kind": state.kind, "ring": state.ring, "places": state.places, "reads": reads,
        "writes": tuple(sorted(writes, key=lambda written: written.position)), "emptied": tuple(emptied),
        "starts": starts, "any_window": not state.history_of(state.spec.ratio),
    }  # fmt: skip


def _read_rows(state: FoldState, start: int) -> list[tuple[int, int]]:
    """Positions, and which row of the only slot of `state`, that a step from `start` reads."""
    slot, window = torch.tensor([0]), start // state.spec.ratio
    if state.kind == "fold":
        return [(x, int(FoldRows(state).find(slot, torch.tensor([x])))) for x in state.history_of(start)]
    held, found = StateRows(state), []
    _, history = held.history(slot, torch.tensor([start]))
    for places, of, place in zip((held.lo, held.lo, held.hi), (window - 1, window, window), history, strict=True):
        positions = range(of * state.spec.ratio, min(start, (of + 1) * state.spec.ratio)) if int(place) >= 0 else ()
        found += [(x, int(places.row(place, torch.tensor([x])))) for x in positions]
    return found


def _over_pages(
    state: WindowState, spec: CompressorSpec, start: int, new: int, take: Callable[..., StepPlan]
) -> tuple[StepPlan, dict[str, Any]]:
    """The same over pages that are all of one sequence, numbered as its block tables are: the next step can start anywhere."""
    state.kv.zero_()
    if start:
        take(0, start, 1.0)
    plan = take(start, new, torch.nan)
    items = Items.of(plan)
    position, old = window_positions(items[items.entry >= 0], spec)
    touched = {"reads": position[old].unique(), "writes": state.kv.isnan().any(2).flatten().nonzero()[:, 0]}
    rows = {name: tuple(Row(x, *divmod(x, state.page_size)) for x in found.tolist()) for name, found in touched.items()}
    anywhere = {"starts": tuple(range(start, start + new + 1)), "any_window": True}
    return plan, {"kind": "window", "ring": 0, "places": (0, 0), "emptied": (), **rows, **anywhere}


def _over_rings(
    state: WindowState, spec: CompressorSpec, start: int, new: int, take: Callable[..., StepPlan], found: dict[str, Any]
) -> dict[str, Any]:
    """What is otherwise where the pages are a ring: which positions its rows stand for, and so where a step can start."""
    rows = state.num_pages * state.page_size
    held = []
    state.kv.fill_(-1)
    for at, n in ((0, start), (start, new)):
        if n:
            take(at, n, torch.inf)
        held.append(state.kv[:, :, 0].flatten().long().tolist())
    before, after = held
    writes = [Row(after[x], *divmod(x, state.page_size)) for x in range(rows) if after[x] >= start]
    reads = [Row(r.position, *divmod(before.index(r.position), state.page_size)) for r in found["reads"]]
    known, end, ratio = set(after), start + new, spec.ratio
    starts = [p for p in range(start, end + 1) if known.issuperset(range(max(p // ratio - int(spec.overlap), 0) * ratio, p))]
    sort = {"key": lambda row: row.position}
    kept = {"reads": tuple(sorted(reads, **sort)), "writes": tuple(sorted(writes, **sort))}
    return {"ring": rows, "starts": tuple(starts), "any_window": not spec.overlap, **kept}


def _entries(spec: CompressorSpec, plan: StepPlan, fmt: RecordFormat | None, rows_per_page: int) -> tuple[Entry, ...]:
    items = Items.of(plan)
    made = items[items.entry >= 0]
    slots, found, cut = plan.entry_slots[made.entry], [], spec.window_rows - spec.ratio
    position, _ = window_positions(made, spec)
    cache = None
    if fmt is not None and len(slots):
        cache = EntryCache.allocate(fmt, int(slots.max()) // rows_per_page + 1, rows_per_page, spec, device="meta")
    for window, slot, positions in zip(made.window.tolist(), slots.tolist(), position.tolist(), strict=True):
        lo, hi = positions[:cut], positions[cut:]
        earlier = range(lo[0], lo[-1] + 1) if lo and lo[0] >= 0 else range(0)
        spans = () if cache is None else _spans(cache, slot)
        place = divmod(slot, rows_per_page)
        found.append(Entry(window, *place, earlier, range(hi[0], hi[-1] + 1), window * spec.ratio, spans))
    return tuple(found)


def _spans(cache: EntryCache, slot: int) -> tuple[Span, ...]:
    """The bytes of one record, in the order of `EntryCache.raw`."""
    fmt, spec, at = cache.format, cache.spec, torch.tensor([slot])
    (_, page, record), (_, _, tail) = record_address(cache, at), tail_address(cache, at)
    values, scales = fmt.values_bytes(spec), fmt.groups(spec) * fmt.scale_bytes
    side = "scale page" if fmt.separate else "page"
    fields = (
        ("values", "page", int(record), values),
        ("rotated", "page", int(record) + fmt.rotated_at(spec), fmt.rotated_bytes(spec)),
        ("scales", side, int(tail), scales),
        ("pad", side, int(tail) + scales, fmt.pad if fmt.pad_written else 0),
    )
    return tuple(Span(what, buffer, int(page), at, at + size) for what, buffer, at, size in fields if size)
