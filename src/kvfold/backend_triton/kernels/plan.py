"""`StepPlan.update` on a GPU: one launch, whatever the batch and the number of items."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ... import contract
from ..args import Metadata, Numbers
from .numbers import load_numbers, load_row_numbers, to_int32, where_set

SEQUENCES = 16  # per program
MOST_POSITIONS = tl.constexpr(contract.MOST_POSITIONS)
INT32_MAX = tl.constexpr(contract.INT32_MAX)
SCAN = 1024  # sequences before them that it counts at a time
NUM_WARPS = 4
TABLE, TOKENS, ENTRIES = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # what says where entries go: `Metadata.source`


class Given(NamedTuple):
    """What `update` is given of each of `batch` sequences, and the plan's bounds.

    first_row: of kv_score that the step has. metadata: of None in a plain plan.
    """

    lengths: Any
    cu_seqlens: Any
    first_row: Any
    state_slots: Any
    batch: Any
    max_new_tokens: Any
    max_tokens: Any
    metadata: Any


@triton.jit
def count_sequences(given, b, RATIO: tl.constexpr):
    """Windows touched, entries made and whether refused, for sequences `b`: the rules of `StepPlan.update`."""
    more = given.metadata
    inside = b < given.batch
    start = load_numbers(given.lengths, b, inside, 0).to(tl.int64)
    token = load_numbers(given.cu_seqlens, b, inside, 0).to(tl.int64)
    length = load_numbers(given.cu_seqlens, b + 1, inside, 0).to(tl.int64) - token
    slot = b  # with block tables a sequence is its own slot
    if more.source is None:
        if given.state_slots.at is not None:
            slot = load_numbers(given.state_slots, b, inside, -1)
    else:
        start -= length * more.totals
        kept = load_numbers(given.state_slots, b, where_set(inside, more.by_slot), -1)
        slot = tl.where(more.by_slot == 1, tl.where(kept == more.null_slot, -1, kept), b)
    end = start + length
    present = inside & (slot != -1) & (length != 0)
    wrong = (slot < -1) | (start < 0) | (length < 0) | (length > given.max_new_tokens) | (token < given.first_row)
    wrong = present & (wrong | (token - given.first_row + length > given.max_tokens) | (end > MOST_POSITIONS))
    if more.source is not None:
        wrong = wrong | (present & ((start > MOST_POSITIONS) | (token > INT32_MAX)))
        start, end, token, slot = to_int32(start), to_int32(end), to_int32(token), to_int32(slot)
    live = present & (wrong == 0)
    # Only live sequences have a start and an end that may be divided.
    first = tl.where(live, start, 0) // RATIO
    windows = tl.where(live, (tl.where(live, end, 1) - 1) // RATIO - first + 1, 0)
    entries = tl.where(live, tl.where(live, end, 0) // RATIO - first, 0)
    # Their sums stay below max_tokens / RATIO + 2 * batch.
    return windows.to(tl.int32), entries.to(tl.int32), wrong, start.to(tl.int32), end.to(tl.int32), token.to(tl.int32), slot


@triton.jit
def first_places(numbers, entries, b, batch, farthest, metadata, SEQUENCES: tl.constexpr):
    """The place of each sequence's first entry; where they do not fit, one that no output has.

    numbers: entries before. farthest: the largest place that a sequence before these begins at, which none goes back behind.
    """
    wanted = where_set(b < batch, metadata.reserved)
    place = load_numbers(metadata.cu_rows, b, wanted, 0)
    i = tl.arange(0, SEQUENCES)
    before = tl.max(tl.where(i[None, :] < i[:, None], place[None, :], 0), axis=1)
    behind = tl.minimum(load_numbers(metadata.cu_rows, b + 1, wanted, 0), MOST_POSITIONS)
    fits = (place >= numbers) & (place >= tl.maximum(before, farthest)) & (place <= MOST_POSITIONS)
    fits = fits & (place + entries <= behind)
    return tl.where(metadata.reserved == 1, tl.where(fits, place, MOST_POSITIONS), numbers).to(tl.int32)


@triton.jit
def find_slots(b, window, entry, last_token, made, table, table_width, rows_per_page, metadata):
    """Cache slots of the entries that are `made`, and which of them nobody has any for. last_token: rows of kv_score."""
    by_table = where_set(made, metadata.source == TABLE)
    by_token = where_set(made, metadata.source == TOKENS)
    column = window // rows_per_page
    page = load_row_numbers(table, b, column, by_table & (column < table_width), -1, "")
    page = tl.where(page == metadata.null_page, -1, page)
    of_page = tl.where(page >= 0, tl.minimum(page, INT32_MAX) * rows_per_page + window % rows_per_page, -1)
    index = tl.where(by_token, last_token, entry)
    listed = made & (by_table == 0) & (index < metadata.num_slots)
    slot = load_numbers(metadata.slots, index, listed, -1)
    slot = tl.where(by_token & ((slot < 0) | (slot == metadata.no_slot)), -1, slot)
    missing = (by_table & ((column >= table_width) | (page < -1))) | (by_token & (listed == 0))
    return tl.where(by_table, of_page, slot), missing


@triton.jit
def plan_kernel(
    lengths_at, lengths_step, cu_seqlens_at, cu_seqlens_step, state_slots_at, state_slots_step,
    batch, max_new_tokens, max_tokens,
    own_start_pos, own_cu_seqlens, cu_entries, items, num_items, errors, item_capacity, entry_items, entry_capacity,
    table_at, table_step, table_width, rows_per_page, entry_slots, num_chunks,
    totals, by_slot, null_slot, null_page, source, slots_at, slots_step, num_slots, no_slot, reserved, cu_rows_at, cu_rows_step,
    RATIO: tl.constexpr, SEQUENCES: tl.constexpr, WINDOWS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One program for SEQUENCES sequences and up to WINDOWS windows of each; of a long prompt there are more programs.

    Each counts what all sequences before its own have, which costs no more than a second launch (docs/notes/0010).
    """
    table = Numbers(table_at, table_step)
    metadata = Metadata(
        totals, by_slot, null_slot, null_page, source, Numbers(slots_at, slots_step), num_slots, no_slot, reserved,
        Numbers(cu_rows_at, cu_rows_step),
    )  # fmt: skip
    offsets = Numbers(cu_seqlens_at, cu_seqlens_step)
    first_row = tl.maximum(load_numbers(offsets, num_chunks * 0, num_chunks > 0, 0).to(tl.int64), 0)
    given = Given(
        Numbers(lengths_at, lengths_step), offsets, first_row, Numbers(state_slots_at, state_slots_step), batch, max_new_tokens,
        max_tokens, metadata,
    )  # fmt: skip
    chunk = tl.program_id(0) % num_chunks
    part = tl.program_id(0) // num_chunks
    b = chunk * SEQUENCES + tl.arange(0, SEQUENCES)
    windows, entries, wrong, start, end, token, slot = count_sequences(given, b, RATIO)
    inside = b < batch
    last = chunk == num_chunks - 1
    # Parts behind the longest sequence have nothing to do, but for the last chunk's, which clear what no entry has.
    if last | (part == 0) | (tl.max(windows, axis=0) > part * WINDOWS):
        windows_before = tl.full((), 0, tl.int32)
        entries_before = tl.full((), 0, tl.int32)
        farthest = tl.full((), 0, tl.int64)
        for base in range(0, chunk * SEQUENCES, SCAN):
            earlier = base + tl.arange(0, SCAN)
            earlier = tl.where(earlier < chunk * SEQUENCES, earlier, batch)
            w, e, _, _, _, _, _ = count_sequences(given, earlier, RATIO)
            windows_before += tl.sum(w, axis=0)
            entries_before += tl.sum(e, axis=0)
            if source is not None:
                places = load_numbers(metadata.cu_rows, earlier, where_set(earlier < batch, reserved), 0)
                farthest = tl.maximum(farthest, tl.max(places.to(tl.int64), axis=0))
        cu_windows = windows_before + tl.cumsum(windows, axis=0)
        ends = entries_before + tl.cumsum(entries, axis=0)
        if part == 0:
            tl.store(cu_entries + 1 + b, ends, mask=inside)
            tl.store(own_start_pos + b, start, mask=inside)
            tl.store(own_cu_seqlens + 1 + b, to_int32(load_numbers(given.cu_seqlens, b + 1, inside, 0)), mask=inside)
            refused = tl.sum(wrong.to(tl.int32), axis=0)
            if refused > 0:
                tl.atomic_add(errors, refused)
            if chunk == 0:
                tl.store(own_cu_seqlens + b, to_int32(load_numbers(given.cu_seqlens, b, inside, 0)), mask=b == 0)
            if last:
                tl.store(num_items, tl.minimum(windows_before + tl.sum(windows, axis=0), item_capacity))

        ordinal = part * WINDOWS + tl.arange(0, WINDOWS)[None, :]
        index = (cu_windows - windows)[:, None] + ordinal
        used = (ordinal < windows[:, None]) & (index < item_capacity)
        window = (tl.where(windows > 0, start, 0) // RATIO)[:, None] + ordinal
        complete = ordinal < entries[:, None]
        numbers = ends - entries
        entry = tl.where(complete, numbers[:, None] + ordinal, -1)
        numbered = used & complete & (entry < entry_capacity)
        tl.store(entry_items + entry, index, mask=numbered)
        if source is not None:
            places = first_places(numbers, entries, b, batch, farthest, metadata, SEQUENCES)
            entry = tl.where(complete, places[:, None] + ordinal, -1)
        item = items + index.to(tl.int64) * 8
        zero = tl.zeros((SEQUENCES, WINDOWS), tl.int32)
        tl.store(item, window, mask=used)
        tl.store(item + 1, start[:, None] + zero, mask=used)
        tl.store(item + 2, end[:, None] + zero, mask=used)
        tl.store(item + 3, token[:, None] + zero, mask=used)
        tl.store(item + 4, slot[:, None] + zero, mask=used)
        tl.store(item + 5, entry, mask=used)
        tl.store(item + 6, b[:, None] + zero, mask=used)
        made = used & complete & (entry < entry_capacity)
        if entry_slots is not None:
            if source is None:
                column = window // rows_per_page
                known = made & (column < table_width)
                page = tl.load(table.at + b[:, None].to(tl.int64) * table_width + column, mask=known, other=-1).to(tl.int64)
                cache_slot = tl.where(page >= 0, page * rows_per_page + window % rows_per_page, -1)
                missing = made & ((column >= table_width) | (page < -1))
            else:
                last_token = (token - start)[:, None] + window * RATIO + RATIO - 1
                made = where_set(made, source > 0)
                cache_slot, missing = find_slots(
                    b[:, None], window, entry, last_token, made, table, table_width, rows_per_page, metadata
                )
            tl.store(entry_slots + entry, cache_slot, mask=made)
            refused = tl.sum(tl.sum(missing.to(tl.int32), axis=1), axis=0)
            if refused > 0:
                tl.atomic_add(errors, refused)
        if last:
            parts = tl.num_programs(0) // num_chunks
            behind = entries_before + tl.sum(entries, axis=0)
            for base in range(0, tl.maximum(entry_capacity - behind, 0), parts * SCAN):
                spare = behind + base + part * SCAN + tl.arange(0, SCAN)
                tl.store(entry_items + spare, tl.full((SCAN,), -1, tl.int32), mask=spare < entry_capacity)
                if entry_slots is not None:
                    free = spare < entry_capacity
                    if source is not None:  # of reserved places it is not known here which are free
                        free = where_set(free, (source > 0) & (reserved == 0))
                    tl.store(entry_slots + spare, tl.full((SCAN,), -1, tl.int64), mask=free)
