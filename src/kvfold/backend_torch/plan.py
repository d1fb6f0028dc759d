"""The torch backend of `StepPlan.update`, which defines what the kernel must compute."""

from __future__ import annotations

import torch

from ..contract import MOST_POSITIONS
from ..storage.step import PlanData


@torch.inference_mode()
def update_torch(plan: PlanData, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """`StepPlan.update` after its arguments were checked, for a batch that is not empty."""
    plan.start_pos.copy_(start_pos)
    plan.cu_seqlens.copy_(cu_seqlens)
    ratio, device = plan.ratio, plan.start_pos.device
    start, offsets = plan.start_pos.long(), plan.cu_seqlens.long()
    token, length = offsets[:-1], offsets[1:] - offsets[:-1]
    end = start + length
    # With block tables a sequence is its own slot, which is never absent and never wrong.
    slots = torch.arange(plan.batch, device=device) if plan.state_slots is None else plan.state_slots
    absent = (slots == -1) | (length == 0)
    misplaced = (slots < -1) | (start < 0) | (end > MOST_POSITIONS) | (token < 0) | (token + length > plan.max_tokens)
    wrong = ~absent & (misplaced | (length < 0) | (length > plan.max_new_tokens))
    live = ~(absent | wrong)
    first = start.div(ratio, rounding_mode="floor")
    windows = torch.where(live, (end - 1).div(ratio, rounding_mode="floor") - first + 1, 0)
    entries = torch.where(live, end.div(ratio, rounding_mode="floor") - first, 0)
    plan.cu_entries[1:] = entries.cumsum(0)
    cu_items = windows.cumsum(0)
    plan.num_items.copy_(cu_items[-1:].clamp(max=plan.item_capacity))
    plan.errors.add_(wrong.sum().int())

    index = torch.arange(plan.item_capacity, device=device)
    sequence = torch.searchsorted(cu_items, index, right=True).clamp(max=plan.batch - 1)
    ordinal = index - (cu_items - windows)[sequence]
    window = first[sequence] + ordinal
    entry = torch.where((window + 1) * ratio <= end[sequence], plan.cu_entries.long()[sequence] + ordinal, -1)
    fields = (window, start[sequence], end[sequence], token[sequence], slots[sequence], entry, sequence)
    used = index < plan.num_items
    for column, values in enumerate(fields):
        # Kernels look at an item before they know that it counts.
        plan.items[:, column] = torch.where(used, values, 0).int()
    known = used & (entry >= 0) & (entry < plan.entry_capacity)
    found = torch.full((plan.entry_capacity + 1,), -1, dtype=torch.int32, device=device)  # its last is for the others
    found[torch.where(known, entry, plan.entry_capacity)] = index.int()
    plan.entry_items.copy_(found[:-1])
    if plan.cache_block_table is not None:
        _fill_entry_slots(plan, first, entries)


def _fill_entry_slots(plan: PlanData, first: torch.Tensor, entries: torch.Tensor) -> None:
    table, rows = plan.cache_block_table, plan.rows_per_page
    if table.shape[1] == 0:
        plan.entry_slots.fill_(-1)
        plan.errors.add_(plan.cu_entries[-1:])
        return
    ends = plan.cu_entries[1:].long()
    index = torch.arange(plan.entry_capacity, device=table.device)
    sequence = torch.searchsorted(ends, index, right=True)
    used = sequence < plan.batch
    sequence = sequence.clamp(max=plan.batch - 1)
    window = first[sequence] + index - (ends - entries)[sequence]
    column = window.div(rows, rounding_mode="floor")
    held = used & (column < table.shape[1])
    page = table[sequence, column.clamp(0, table.shape[1] - 1)].long()
    plan.entry_slots.copy_(torch.where(held & (page >= 0), page * rows + window % rows, -1))
    plan.errors.add_((used & ((column >= table.shape[1]) | (page < -1))).sum().int())
