"""What a step refuses and what it may not ask for: the rules of DESIGN.md, Plan, walked on the host, in words and numbers.

`kvfold.check` calls this after the call has counted `plan.errors`; nothing here is on the path of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..backend_torch.items import Items, missing
from ..contract import MOST_POSITIONS
from ..plan import StepPlan
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor
from ..storage.window_state import WindowState


@dataclass(frozen=True)
class Refusal:
    """One sequence, or one window of it, that a step refuses or has no right to ask for.

    Attributes:
        window: -1 for a sequence that is refused as a whole.
        reason: what is wrong, with the tensor's name and the number in it.
        counted: whether it is one of `plan.errors`. If not, nobody refuses it and the results of the step are undefined.
        where: `"compressors[i]"`, of two that each count their own; else "".
        row: of a `store` without a plan, instead of sequence and window: which of its rows; else -1.
    """

    sequence: int
    window: int
    reason: str
    counted: bool = True
    where: str = ""
    row: int = -1

    def __str__(self) -> str:
        who = f"sequence {self.sequence}" if self.window < 0 else f"window {self.window} of sequence {self.sequence}"
        who = f"row {self.row}" if self.row >= 0 else who
        return f"{f'{self.where}: ' if self.where else ''}{who} is {'refused' if self.counted else 'undefined'}: {self.reason}"


def plan_refusals(plan: StepPlan) -> list[Refusal]:
    """What `StepPlan.update` counts, of the tensors that the plan was built from."""
    found, entry = [], 0
    for b, start, token, behind, reason in sequences(plan):
        if reason:
            found.append(Refusal(b, -1, reason))
            continue
        first, last = start // plan.ratio, (start + behind - token) // plan.ratio
        room = plan.entry_capacity - _first_place(plan, b, entry, last - first)
        windows = range(first, last)[: max(room, 0)]  # whose entries have a place
        if plan.cache_block_table is not None:
            found += _table_refusals(plan, b, windows)
        elif plan.token_slots is not None:
            for window in windows:
                row = token + (window + 1) * plan.ratio - 1 - start
                if row >= len(plan.token_slots):
                    reason = f"its last token is row {row} of kv_score, and token_slots has {len(plan.token_slots)}"
                    found.append(Refusal(b, window, reason))
        entry += last - first
    return found


def call_refusals(c: Compressor, plan: StepPlan, is_store: bool = False, room: int | None = None) -> list[Refusal]:
    """What `compress`, or `store` of a compressor without a state, counts of a plan as it is.

    room: places of entries that what it writes has, if not those of the plan.
    """
    items, found = Items.of(plan), []
    room = plan.entry_capacity if room is None else room
    if not is_store:
        found = list(_sequence_refusals(c, items))
    gone = torch.tensor([r.sequence for r in found], dtype=torch.int64, device=items.sequence.device)
    items = items[~torch.isin(items.sequence, gone)]
    if isinstance(c.state, WindowState):
        pages, made = _page_refusals(c, plan, items, room)
        found += pages
        items = items[torch.tensor(made, dtype=torch.bool, device=items.window.device)]
    if c.snapshots is not None:
        found += _snapshot_refusals(c.snapshots, plan, items)
    return [*found, *_entry_refusals(c, plan, items, room)]


def sequences(plan: StepPlan) -> Iterator[tuple[int, int, int, int, str]]:
    """Of those not absent: sequence, start, first row of kv_score and the one behind its last, and why it is refused."""
    offsets = plan.cu_seqlens.tolist()
    slots = [0] * plan.batch if plan.state_slots is None else plan.state_slots.tolist()
    first = max(offsets[0], 0)
    for b, (slot, start) in enumerate(zip(slots, plan.start_pos.tolist(), strict=True)):
        token, behind = offsets[b : b + 2]
        new, rows = behind - token, f"kv_score rows {token} to {behind - 1}"
        short = f"seq_lens[{b}] is {start + new}, less than its {new} new tokens"
        if slot in (-1, plan.null_slot) or new == 0:
            continue
        rules = (
            (slot < -1, f"state_slots[{b}] is {slot}; slots count from 0, and -1 leaves a sequence out"),
            (start < 0, f"start_pos[{b}] is {start}, below 0, or {short}"),
            (new < 0, f"cu_seqlens goes back from {token} to {behind} at [{b + 1}], which is {new} new tokens"),
            (new > plan.max_new_tokens, f"it has {new} new tokens, more than the plan's max_new_tokens={plan.max_new_tokens}"),
            (token < 0, f"cu_seqlens[{b}] is {token}, below 0"),
            (token < first, f"cu_seqlens[{b}] is {token}, below cu_seqlens[0], which is {first}"),
            (behind - first > plan.max_tokens, f"its new tokens are {rows}, beyond the plan's max_tokens={plan.max_tokens}"),
            (start + new > MOST_POSITIONS, f"it ends at position {start + new}, beyond 2**30"),
        )
        yield b, start, token, behind, next((reason for broken, reason in rules if broken), "")


def _first_place(plan: StepPlan, b: int, before: int, count: int) -> int:
    """The place of the first of a sequence's entries, with so many `before` them."""
    if plan.cu_rows is None:
        return before
    place, behind = plan.cu_rows[b : b + 2].tolist()
    return place if before <= place and place + count <= min(behind, MOST_POSITIONS) else MOST_POSITIONS


def _table_refusals(plan: StepPlan, b: int, windows: range) -> Iterator[Refusal]:
    """Entries for which a plan finds no page in `cache_block_table`."""
    row = plan.cache_block_table[b].tolist()
    for window in windows:
        column = window // plan.rows_per_page
        if column >= len(row):
            columns = "column" if len(row) == 1 else "columns"
            yield Refusal(b, window, f"cache_block_table has {len(row)} {columns}, and its entry is in page {column}")
        elif (page := row[column]) < -1:
            yield Refusal(b, window, f"cache_block_table[{b}, {column}] is {page}; pages count from 0, and -1 drops an entry")


def heads(items: Items) -> list[tuple[int, int, int, int, int]]:
    """Sequence, slot, start, end and first row of kv_score of each sequence that has work items."""
    columns = (items.sequence, items.slot, items.start, items.end, items.token)
    return torch.stack(columns, dim=1).unique(dim=0).tolist()


def _sequence_refusals(c: Compressor, items: Items) -> Iterator[Refusal]:
    have, state = len(c.value), c.state
    for b, slot, start, end, token in heads(items):
        behind = token + end - start
        if isinstance(state, FoldState) and slot >= state.num_slots:
            yield Refusal(b, -1, f"its state slot is {slot}, and the state has {state.num_slots} slots")
        elif behind > have:
            yield Refusal(b, -1, f"its new tokens are kv_score rows {token} to {behind - 1}, and kv_score has {have} rows")
        elif isinstance(state, FoldState):
            gone = missing(state, slot, start)
            if gone:
                which = f"position {gone[0]}" if len(gone) == 1 else f"positions {gone[0]} to {gone[-1]}"
                holds = _what_it_holds(state, slot, start)
                yield Refusal(b, -1, f"state slot {slot} holds no row of {which}, which a start at {start} needs; {holds}")


def _what_it_holds(state: FoldState, slot: int, start: int) -> str:
    last = int(state.positions[slot].max())
    if last < start:
        return f"its last one is of {last}" if last >= 0 else "it is empty"
    return f"its last one is of {last}, and the state is made for max_new_tokens={state.max_new_tokens}"


def _page_refusals(c: Compressor, plan: StepPlan, items: Items, room: int) -> tuple[list[Refusal], list[bool]]:
    """Windows whose block tables are wrong, and for each item whether all rows of its window are found."""
    found, made, ratio = [], [], plan.ratio
    tables = [
        table.cpu() if plan.null_page is None else table.cpu().masked_fill(table.cpu() == plan.null_page, -1)
        for table in plan.block_tables
    ]
    slots = None if plan.entry_slots is None or not plan.entry_capacity else plan.entry_slots.tolist()
    columns = (items.window, items.start, items.end, items.entry, items.sequence)
    for window, start, end, entry, b in torch.stack(columns, dim=1).tolist():
        old = range(max(window - int(c.spec.overlap), 0) * ratio, min(start, (window + 1) * ratio)) if entry >= 0 else range(0)
        new = range(max(start, window * ratio), min(end, (window + 1) * ratio))
        if plan.ring:  # earlier ones are not kept
            new = range(max(new.start, end - plan.ring_rows), new.stop)
        missing, unread = _page_reasons(c.state, tables, b, old, plan.ring)
        _, unwritten = _page_reasons(c.state, tables, b, new, plan.ring)
        wanted = entry >= room or slots is None or slots[entry] >= 0
        unwritten = unwritten and f"{unwritten}; so not all of its new rows are stored"
        reason = unread or unwritten or (missing if wanted else "")
        if reason:
            found.append(Refusal(b, window, reason))
        made.append(not missing and not unread)
    return found, made


def _page_reasons(state: WindowState, tables: list[torch.Tensor], b: int, positions: range, ring: bool) -> tuple[str, str]:
    """Why rows of positions are not found: where there is no page, and where a table is wrong; "" for neither."""
    missing = wrong = ""
    if not positions:
        return missing, wrong
    size = state.page_size
    first, last = positions[0] // size, positions[-1] // size
    for i, (table, pages, what) in enumerate(zip(tables, (len(state.kv), len(state.score)), ("values", "scores"), strict=True)):
        width = table.shape[1]
        row = table[b].tolist()
        for column in range(first, last + 1 if ring else min(last + 1, width)):
            at = column % width if ring else column
            page = row[at]
            name = f"block_tables[{i}][{b}, {at}], the page with the {what} of position {max(positions[0], column * size)},"
            if page == -1:
                missing = missing or f"{name} is -1, no page, and its entry needs it"
            elif page < -1:
                wrong = wrong or f"{name} is {page}; pages count from 0, and -1 is none"
            elif page >= pages:
                wrong = wrong or f"{name} is {page}, and the state has {pages} pages of {what}"
        if last >= width and not ring:
            position = max(positions[0], max(first, width) * size)
            wrong = wrong or f"block_tables[{i}] has {width} columns, and position {position} is in page {position // size}"
    return missing, wrong


def _snapshot_refusals(snapshots: Snapshots, plan: StepPlan, items: Items) -> Iterator[Refusal]:
    for b, _, start, end, _ in heads(items):
        for k, page in snapshot_pages(snapshots, plan, b, start, end):
            ends = (k + 1) * snapshots.page_size
            if ends <= end and not -1 <= page < snapshots.num_pages:
                there = f"there are {snapshots.num_pages} snapshots; so only that of the page is not kept"
                reason = f"snapshot_table[{b}, {k}] is {page}, and {there}"
                yield Refusal(b, (ends - 1) // plan.ratio, reason)


def snapshot_pages(snapshots: Snapshots, plan: StepPlan, b: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Pages of which a step over `[start, end)` has rows to keep, and what the table says of each."""
    size = snapshots.page_size
    pages = range(start // size, (end - 1) // size + 1)
    row = plan.snapshot_table[b, pages.start : pages.stop].tolist()
    last = torch.tensor([(k + 1) * size - 1 for k in pages], dtype=torch.int64)
    for k, page, kept in zip(pages, row, snapshots.of(last).tolist(), strict=False):  # the table may be shorter
        if kept and (k + 1) * size - snapshots.rows_per_page < end:
            yield k, page


def _entry_refusals(c: Compressor, plan: StepPlan, items: Items, room: int) -> Iterator[Refusal]:
    spec, short = c.spec, room < plan.entry_capacity
    slots = None if c.cache is None or plan.entry_slots is None else plan.entry_slots.tolist()
    for window, entry, b in torch.stack((items.window, items.entry, items.sequence), dim=1).tolist():
        if entry >= MOST_POSITIONS and plan.reserved:
            yield Refusal(
                b, window, f"cu_rows[{b}] and the next have no room for all entries of the sequence behind those before"
            )
        elif entry >= room:
            have = f"rows has {room} places" if short else f"the plan has room for {room} (entry_slots)"
            yield Refusal(b, window, f"it is entry {entry} of the step, and {have}")
        elif entry >= 0 and slots is not None and slots[entry] != -1:
            if not 0 <= slots[entry] < c.cache.num_slots:
                yield Refusal(b, window, _slot_reason(c.cache, plan, b, window, entry, slots[entry]))
            elif spec.rope_dim and c.rope is not None and window * spec.ratio >= len(c.rope):
                yield Refusal(b, window, f"it begins at position {window * spec.ratio}, and rope has {len(c.rope)} positions")


def _slot_reason(cache: EntryCache, plan: StepPlan, b: int, window: int, entry: int, slot: int) -> str:
    if plan.cache_block_table is not None and plan.rows_per_page:
        page, column = slot // plan.rows_per_page, window // plan.rows_per_page
        return f"cache_block_table[{b}, {column}] is {page}, and the cache has {cache.num_pages} pages"
    if plan.token_slots is not None:
        return f"the slot of its last token in token_slots is {slot}, and the cache has {cache.num_slots} slots"
    if slot < -1:
        return f"entry_slots[{entry}] is {slot}; cache slots count from 0, and -1 drops an entry"
    return f"entry_slots[{entry}] is {slot}, and the cache has {cache.num_slots} slots"
