"""`StepPlan.update` on a GPU: one launch, whatever the batch and the number of items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

    from ..plan import StepPlan

BLOCK = 64  # items per program
CHUNK = 64  # sequences that it looks at together


@triton.jit
def count_sequences(start_pos, cu_seqlens, state_slots, b, batch, max_new_tokens, max_tokens, RATIO: tl.constexpr):
    """Windows touched, entries made and whether refused, for sequences `b`: the rules of `StepPlan.update`."""
    inside = b < batch
    start = tl.load(start_pos + b, mask=inside, other=0).to(tl.int64)
    token = tl.load(cu_seqlens + b, mask=inside, other=0).to(tl.int64)
    length = tl.load(cu_seqlens + b + 1, mask=inside, other=0).to(tl.int64) - token
    slot = tl.load(state_slots + b, mask=inside, other=-1)
    end = start + length
    present = inside & (slot != -1) & (length != 0)
    wrong = (slot < -1) | (start < 0) | (length < 0) | (length > max_new_tokens) | (token < 0)
    wrong = present & (wrong | (token + length > max_tokens) | (end > 2147483647))
    live = present & (wrong == 0)
    # Only live sequences have a start and an end that may be divided.
    first = tl.where(live, start, 0) // RATIO
    windows = tl.where(live, (tl.where(live, end, 1) - 1) // RATIO - first + 1, 0)
    entries = tl.where(live, tl.where(live, end, 0) // RATIO - first, 0)
    # Their sums stay below max_tokens / RATIO + 2 * batch.
    return windows.to(tl.int32), entries.to(tl.int32), wrong


COUNTS = ("batch", "max_new_tokens", "max_tokens", "item_capacity", "entry_capacity", "table_width", "rows_per_page")


@triton.jit(do_not_specialize=COUNTS)
def plan_kernel(
    start_pos, cu_seqlens, state_slots, batch, max_new_tokens, max_tokens,
    own_start_pos, own_cu_seqlens, cu_entries, items, num_items, errors, item_capacity, entry_capacity,
    table, table_width, rows_per_page, entry_slots,
    RATIO: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK items. Each counts through all sequences, which is cheaper than a second launch."""
    pid = tl.program_id(0)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros((BLOCK,), tl.int32)
    windows_before = tl.zeros((BLOCK,), tl.int32)
    entries_before = tl.zeros((BLOCK,), tl.int32)
    all_windows = tl.full((), 0, tl.int32)
    all_entries = tl.full((), 0, tl.int32)
    for base in range(0, batch, CHUNK):
        b = base + tl.arange(0, CHUNK)
        windows, entries, wrong = count_sequences(
            start_pos, cu_seqlens, state_slots, b, batch, max_new_tokens, max_tokens, RATIO
        )
        cu_windows = all_windows + tl.cumsum(windows, axis=0)
        passed = (cu_windows[None, :] <= index[:, None]) & (b < batch)[None, :]
        sequence += tl.sum(passed.to(tl.int32), axis=1)
        windows_before += tl.sum(tl.where(passed, windows[None, :], 0), axis=1)
        entries_before += tl.sum(tl.where(passed, entries[None, :], 0), axis=1)
        if pid == 0:
            inside = b < batch
            tl.store(cu_entries + 1 + b, all_entries + tl.cumsum(entries, axis=0), mask=inside)
            tl.store(own_start_pos + b, tl.load(start_pos + b, mask=inside, other=0), mask=inside)
            tl.store(own_cu_seqlens + 1 + b, tl.load(cu_seqlens + 1 + b, mask=inside, other=0), mask=inside)
            refused = tl.sum(wrong.to(tl.int32), axis=0)
            if refused > 0:
                tl.atomic_add(errors, refused)
        all_windows += tl.sum(windows, axis=0)
        all_entries += tl.sum(entries, axis=0)
    if pid == 0:
        tl.store(own_cu_seqlens, tl.load(cu_seqlens))
        tl.store(num_items, tl.minimum(all_windows, item_capacity))
    used = (index < all_windows) & (index < item_capacity)
    start = tl.load(start_pos + sequence, mask=used, other=0)
    token = tl.load(cu_seqlens + sequence, mask=used, other=0)
    end = start + tl.load(cu_seqlens + sequence + 1, mask=used, other=0) - token
    slot = tl.load(state_slots + sequence, mask=used, other=-1)
    ordinal = index - windows_before
    window = start // RATIO + ordinal
    ends = (window.to(tl.int64) + 1) * RATIO <= end
    entry = tl.where(ends, entries_before + ordinal, -1)
    item = items + index.to(tl.int64) * 8
    tl.store(item, window, mask=used)
    tl.store(item + 1, start, mask=used)
    tl.store(item + 2, end, mask=used)
    tl.store(item + 3, token, mask=used)
    tl.store(item + 4, slot, mask=used)
    tl.store(item + 5, entry, mask=used)
    tl.store(item + 6, sequence, mask=used)
    if table is not None:
        column = window // rows_per_page
        made = used & ends & (entry < entry_capacity)
        known = made & (column < table_width)
        page = tl.load(table + sequence.to(tl.int64) * table_width + column, mask=known, other=-1).to(tl.int64)
        cache_slot = tl.where(page >= 0, page * rows_per_page + window % rows_per_page, -1)
        tl.store(entry_slots + entry, cache_slot, mask=made)
        tl.store(entry_slots + index, tl.full((BLOCK,), -1, tl.int64), mask=(index >= all_entries) & (index < entry_capacity))
        refused = tl.sum((made & ((column >= table_width) | (page < -1))).to(tl.int32), axis=0)
        if refused > 0:
            tl.atomic_add(errors, refused)


def update_on_gpu(plan: StepPlan, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """`StepPlan.update` after its arguments were checked, for a batch that is not empty."""
    table = plan.cache_block_table
    plan_kernel[(max(1, triton.cdiv(plan.item_capacity, BLOCK)),)](
        start_pos,
        cu_seqlens,
        plan.state_slots,
        plan.batch,
        plan.max_new_tokens,
        plan.max_tokens,
        plan.start_pos,
        plan.cu_seqlens,
        plan.cu_entries,
        plan.items,
        plan.num_items,
        plan.errors,
        plan.item_capacity,
        plan.entry_capacity,
        table,
        table.shape[1] if table is not None else 0,
        plan.rows_per_page or 1,
        plan.entry_slots if table is not None else None,
        RATIO=plan.ratio,
        BLOCK=BLOCK,
        CHUNK=CHUNK,
        num_warps=4,
    )
