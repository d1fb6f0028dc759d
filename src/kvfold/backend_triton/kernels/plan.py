"""`StepPlan.update` on a GPU: one launch, whatever the batch and the number of items."""

import triton
import triton.language as tl

from ... import contract

SEQUENCES = 16  # per program
MOST_POSITIONS = tl.constexpr(contract.MOST_POSITIONS)
SCAN = 1024  # sequences before them that it counts at a time
NUM_WARPS = 4


@triton.jit
def count_sequences(start_pos, cu_seqlens, state_slots, b, batch, max_new_tokens, max_tokens, RATIO: tl.constexpr):
    """Windows touched, entries made and whether refused, for sequences `b`: the rules of `StepPlan.update`."""
    inside = b < batch
    start = tl.load(start_pos + b, mask=inside, other=0).to(tl.int64)
    token = tl.load(cu_seqlens + b, mask=inside, other=0).to(tl.int64)
    length = tl.load(cu_seqlens + b + 1, mask=inside, other=0).to(tl.int64) - token
    slot = b  # with block tables a sequence is its own slot
    if state_slots is not None:
        slot = tl.load(state_slots + b, mask=inside, other=-1)
    end = start + length
    present = inside & (slot != -1) & (length != 0)
    wrong = (slot < -1) | (start < 0) | (length < 0) | (length > max_new_tokens) | (token < 0)
    wrong = present & (wrong | (token + length > max_tokens) | (end > MOST_POSITIONS))
    live = present & (wrong == 0)
    # Only live sequences have a start and an end that may be divided.
    first = tl.where(live, start, 0) // RATIO
    windows = tl.where(live, (tl.where(live, end, 1) - 1) // RATIO - first + 1, 0)
    entries = tl.where(live, tl.where(live, end, 0) // RATIO - first, 0)
    # Their sums stay below max_tokens / RATIO + 2 * batch.
    return windows.to(tl.int32), entries.to(tl.int32), wrong, start.to(tl.int32), end.to(tl.int32), token.to(tl.int32), slot


@triton.jit
def plan_kernel(
    start_pos, cu_seqlens, state_slots, batch, max_new_tokens, max_tokens,
    own_start_pos, own_cu_seqlens, cu_entries, items, num_items, errors, item_capacity, entry_items, entry_capacity,
    table, table_width, rows_per_page, entry_slots, num_chunks,
    RATIO: tl.constexpr, SEQUENCES: tl.constexpr, WINDOWS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One program for SEQUENCES sequences and up to WINDOWS windows of each; of a long prompt there are more programs.

    Each counts what all sequences before its own have, which costs no more than a second launch (docs/notes/0010).
    """
    chunk = tl.program_id(0) % num_chunks
    part = tl.program_id(0) // num_chunks
    b = chunk * SEQUENCES + tl.arange(0, SEQUENCES)
    windows, entries, wrong, start, end, token, slot = count_sequences(
        start_pos, cu_seqlens, state_slots, b, batch, max_new_tokens, max_tokens, RATIO
    )
    inside = b < batch
    last = chunk == num_chunks - 1
    # Parts behind the longest sequence have nothing to do, but for the last chunk's, which clear what no entry has.
    if last | (part == 0) | (tl.max(windows, axis=0) > part * WINDOWS):
        windows_before = tl.full((), 0, tl.int32)
        entries_before = tl.full((), 0, tl.int32)
        for base in range(0, chunk * SEQUENCES, SCAN):
            earlier = base + tl.arange(0, SCAN)
            earlier = tl.where(earlier < chunk * SEQUENCES, earlier, batch)
            w, e, _, _, _, _, _ = count_sequences(
                start_pos, cu_seqlens, state_slots, earlier, batch, max_new_tokens, max_tokens, RATIO
            )
            windows_before += tl.sum(w, axis=0)
            entries_before += tl.sum(e, axis=0)
        cu_windows = windows_before + tl.cumsum(windows, axis=0)
        ends = entries_before + tl.cumsum(entries, axis=0)
        if part == 0:
            tl.store(cu_entries + 1 + b, ends, mask=inside)
            tl.store(own_start_pos + b, tl.load(start_pos + b, mask=inside, other=0), mask=inside)
            tl.store(own_cu_seqlens + 1 + b, tl.load(cu_seqlens + 1 + b, mask=inside, other=0), mask=inside)
            refused = tl.sum(wrong.to(tl.int32), axis=0)
            if refused > 0:
                tl.atomic_add(errors, refused)
            if chunk == 0:
                tl.store(own_cu_seqlens, tl.load(cu_seqlens))
            if last:
                tl.store(num_items, tl.minimum(windows_before + tl.sum(windows, axis=0), item_capacity))

        ordinal = part * WINDOWS + tl.arange(0, WINDOWS)[None, :]
        index = (cu_windows - windows)[:, None] + ordinal
        used = (ordinal < windows[:, None]) & (index < item_capacity)
        window = (tl.where(windows > 0, start, 0) // RATIO)[:, None] + ordinal
        complete = ordinal < entries[:, None]
        entry = tl.where(complete, (ends - entries)[:, None] + ordinal, -1)
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
        tl.store(entry_items + entry, index, mask=made)
        if table is not None:
            column = window // rows_per_page
            known = made & (column < table_width)
            page = tl.load(table + b[:, None].to(tl.int64) * table_width + column, mask=known, other=-1).to(tl.int64)
            cache_slot = tl.where(page >= 0, page * rows_per_page + window % rows_per_page, -1)
            tl.store(entry_slots + entry, cache_slot, mask=made)
            missing = made & ((column >= table_width) | (page < -1))
            refused = tl.sum(tl.sum(missing.to(tl.int32), axis=1), axis=0)
            if refused > 0:
                tl.atomic_add(errors, refused)
        if last:
            parts = tl.num_programs(0) // num_chunks
            behind = entries_before + tl.sum(entries, axis=0)
            for base in range(0, tl.maximum(entry_capacity - behind, 0), parts * SCAN):
                spare = behind + base + part * SCAN + tl.arange(0, SCAN)
                tl.store(entry_items + spare, tl.full((SCAN,), -1, tl.int32), mask=spare < entry_capacity)
                if table is not None:
                    tl.store(entry_slots + spare, tl.full((SCAN,), -1, tl.int64), mask=spare < entry_capacity)
