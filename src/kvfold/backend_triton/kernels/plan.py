"""`StepPlan.update` on a GPU: one launch, whatever the batch and the number of items."""

from __future__ import annotations

import triton
import triton.language as tl

from ..args import Metadata, Numbers
from .numbers import load_numbers, to_int32
from .plan_items import MOST_POSITIONS, Given, Written, store_items
from .plan_metadata import plan_engine

SCAN = 1024  # sequences before them that it counts at a time
NUM_WARPS = 4


@triton.jit
def count_sequences(given, b, RATIO: tl.constexpr):
    """Windows touched, entries made, and whether refused, for sequences `b`: the rules of `StepPlan.update`."""
    inside = b < given.batch
    start = load_numbers(given.lengths, b, inside, 0).to(tl.int64)
    token = load_numbers(given.cu_seqlens, b, inside, 0).to(tl.int64)
    length = load_numbers(given.cu_seqlens, b + 1, inside, 0).to(tl.int64) - token
    slot = b  # with block tables a sequence is its own slot
    if given.state_slots.at is not None:
        slot = load_numbers(given.state_slots, b, inside, -1)
    end = start + length
    present = inside & (slot != -1) & (length != 0)
    wrong = (slot < -1) | (start < 0) | (length < 0) | (length > given.max_new_tokens) | (token < given.first_row)
    wrong = present & (wrong | (token - given.first_row + length > given.max_tokens) | (end > MOST_POSITIONS))
    live = present & (wrong == 0)
    # Only live sequences have a start and an end that may be divided.
    first = tl.where(live, start, 0) // RATIO
    windows = tl.where(live, (tl.where(live, end, 1) - 1) // RATIO - first + 1, 0)
    entries = tl.where(live, tl.where(live, end, 0) // RATIO - first, 0)
    # Their sums stay below max_tokens / RATIO + 2 * batch.
    return windows.to(tl.int32), entries.to(tl.int32), wrong, start.to(tl.int32), end.to(tl.int32), token.to(tl.int32), slot


@triton.jit
def plan_plain(
    given, own, table, table_width, rows_per_page, chunk, num_chunks, part, b,
    RATIO: tl.constexpr, SEQUENCES: tl.constexpr, WINDOWS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """The plan without metadata: it reads contiguous int32 only."""
    batch = given.batch
    windows, entries, wrong, start, end, token, slot = count_sequences(given, b, RATIO)
    inside = b < batch
    last = chunk == num_chunks - 1
    # Parts behind the longest sequence have nothing to do, but for the last chunk's, which clear what no entry has.
    if last | (part == 0) | (tl.max(windows, axis=0) > part * WINDOWS):
        windows_before = tl.full((), 0, tl.int32)
        entries_before = tl.full((), 0, tl.int32)
        for base in range(0, chunk * SEQUENCES, SCAN):
            earlier = base + tl.arange(0, SCAN)
            earlier = tl.where(earlier < chunk * SEQUENCES, earlier, batch)
            w, e, _, _, _, _, _ = count_sequences(given, earlier, RATIO)
            windows_before += tl.sum(w, axis=0)
            entries_before += tl.sum(e, axis=0)
        cu_windows = windows_before + tl.cumsum(windows, axis=0)
        ends = entries_before + tl.cumsum(entries, axis=0)
        if part == 0:
            tl.store(own.cu_entries + 1 + b, ends, mask=inside)
            tl.store(own.start_pos + b, start, mask=inside)
            tl.store(own.cu_seqlens + 1 + b, to_int32(load_numbers(given.cu_seqlens, b + 1, inside, 0)), mask=inside)
            refused = tl.sum(wrong.to(tl.int32), axis=0)
            if refused > 0:
                tl.atomic_add(own.errors, refused)
            if chunk == 0:
                tl.store(own.cu_seqlens + b, to_int32(load_numbers(given.cu_seqlens, b, inside, 0)), mask=b == 0)
            if last:
                tl.store(own.num_items, tl.minimum(windows_before + tl.sum(windows, axis=0), own.item_capacity))

        ordinal = part * WINDOWS + tl.arange(0, WINDOWS)[None, :]
        index = (cu_windows - windows)[:, None] + ordinal
        used = (ordinal < windows[:, None]) & (index < own.item_capacity)
        window = (tl.where(windows > 0, start, 0) // RATIO)[:, None] + ordinal
        complete = ordinal < entries[:, None]
        numbers = ends - entries
        entry = tl.where(complete, numbers[:, None] + ordinal, -1)
        numbered = used & complete & (entry < own.entry_capacity)
        tl.store(own.entry_items + entry, index, mask=numbered)
        store_items(own.items, index, used, window, start, end, token, slot, entry, b)
        made = used & complete & (entry < own.entry_capacity)
        if own.entry_slots is not None:
            column = window // rows_per_page
            known = made & (column < table_width)
            page = tl.load(table.at + b[:, None].to(tl.int64) * table_width + column, mask=known, other=-1).to(tl.int64)
            cache_slot = tl.where(page >= 0, page * rows_per_page + window % rows_per_page, -1)
            missing = made & ((column >= table_width) | (page < -1))
            tl.store(own.entry_slots + entry, cache_slot, mask=made)
            refused = tl.sum(tl.sum(missing.to(tl.int32), axis=1), axis=0)
            if refused > 0:
                tl.atomic_add(own.errors, refused)
        if last:
            parts = tl.num_programs(0) // num_chunks
            behind = entries_before + tl.sum(entries, axis=0)
            for base in range(0, tl.maximum(own.entry_capacity - behind, 0), parts * SCAN):
                spare = behind + base + part * SCAN + tl.arange(0, SCAN)
                tl.store(own.entry_items + spare, tl.full((SCAN,), -1, tl.int32), mask=spare < own.entry_capacity)
                if own.entry_slots is not None:
                    tl.store(own.entry_slots + spare, tl.full((SCAN,), -1, tl.int64), mask=spare < own.entry_capacity)


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
    own = Written(
        own_start_pos, own_cu_seqlens, cu_entries, items, num_items, errors, item_capacity, entry_items, entry_capacity,
        entry_slots,
    )  # fmt: skip
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
    if source is None:
        plan_plain(given, own, table, table_width, rows_per_page, chunk, num_chunks, part, b, RATIO, SEQUENCES, WINDOWS, SCAN)
    else:
        plan_engine(given, own, table, table_width, rows_per_page, chunk, num_chunks, part, b, RATIO, SEQUENCES, WINDOWS, SCAN)
