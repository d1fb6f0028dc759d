"""The torch backend of `StepPlan.update`, which defines what the kernel must compute."""

from __future__ import annotations

import torch

from ..contract import INT32_MAX, MOST_POSITIONS
from ..storage.step import PlanData

INT32_MIN = -INT32_MAX - 1


@torch.inference_mode()
def update_torch(plan: PlanData, given: torch.Tensor, cu_seqlens: torch.Tensor, totals: bool = False) -> None:
    """`StepPlan.update` after its arguments were checked, for a batch that is not empty. given, totals: as in `Lengths`."""
    ratio, device = plan.ratio, plan.start_pos.device
    start, offsets = given.long(), cu_seqlens.long()
    token, length = offsets[:-1], offsets[1:] - offsets[:-1]
    start = start - length if totals else start
    plan.start_pos.copy_(start.clamp(INT32_MIN, INT32_MAX))
    plan.cu_seqlens.copy_(offsets.clamp(INT32_MIN, INT32_MAX))
    # With block tables a sequence is its own slot, which is never absent and never wrong.
    slots = torch.arange(plan.batch, device=device) if plan.state_slots is None else plan.state_slots.long()
    if plan.null_slot is not None:
        slots = torch.where(slots == plan.null_slot, -1, slots)
    absent, first_row = (slots == -1) | (length == 0), offsets[:1].clamp(min=0)
    wrong = (slots < -1) | (start < 0) | (start > MOST_POSITIONS) | (start + length > MOST_POSITIONS)
    wrong |= (length < 0) | (length > plan.max_new_tokens)
    wrong |= (token < first_row) | (token < 0) | (token > INT32_MAX) | (token - first_row + length > plan.max_tokens)
    wrong &= ~absent
    live = ~(absent | wrong)
    first = start.div(ratio, rounding_mode="floor")
    end = start + length
    windows = torch.where(live, (end - 1).div(ratio, rounding_mode="floor") - first + 1, 0)
    entries = torch.where(live, end.div(ratio, rounding_mode="floor") - first, 0)
    plan.cu_entries[1:] = entries.cumsum(0)
    cu_items = windows.cumsum(0)
    plan.num_items.copy_(cu_items[-1:].clamp(max=plan.item_capacity))
    plan.errors.add_(wrong.sum().int())

    index = torch.arange(plan.item_capacity, device=device)
    used = index < plan.num_items
    sequence = torch.searchsorted(cu_items, index, right=True).clamp(max=plan.batch - 1)
    ordinal = index - (cu_items - windows)[sequence]
    window = first[sequence] + ordinal
    ends = used & ((window + 1) * ratio <= end[sequence])
    number = plan.cu_entries.long()[sequence] + ordinal  # of an entry, in order
    entry = torch.where(ends, _first_places(plan)[sequence] + ordinal, -1)
    state_slot = slots[sequence].clamp(max=INT32_MAX)
    fields = (window, start[sequence], end[sequence], token[sequence], state_slot, entry, sequence)
    for column, values in enumerate(fields):
        # Kernels look at an item before they know that it counts.
        plan.items[:, column] = torch.where(used, values, 0).int()
    numbered = ends & (number < plan.entry_capacity)
    found = torch.full((plan.entry_capacity + 1,), -1, dtype=torch.int32, device=device)  # its last is for the others
    found[torch.where(numbered, number, plan.entry_capacity)] = index.int()
    plan.entry_items.copy_(found[:-1])
    if plan.fills_slots:
        made = ends & (entry < plan.entry_capacity)
        last_token = token[sequence] + (window + 1) * ratio - 1 - start[sequence]
        _fill_entry_slots(plan, *(x[made] for x in (sequence, window, last_token, entry)))


def _first_places(plan: PlanData) -> torch.Tensor:
    """The place of each sequence's first entry; where its entries do not fit, one that no output has, so that calls refuse
    them.
    """
    numbers = plan.cu_entries.long()
    if plan.cu_rows is None:
        return numbers[:-1]
    rows = plan.cu_rows.long()
    first, behind = rows[:-1], rows[1:].clamp(max=MOST_POSITIONS)
    fits = (first >= numbers[:-1]) & (first <= MOST_POSITIONS) & (first + numbers[1:] - numbers[:-1] <= behind)
    fits &= first == first.clamp(min=0).cummax(0).values  # none goes back behind one before it
    return torch.where(fits, first, MOST_POSITIONS)


def _fill_entry_slots(
    plan: PlanData, sequence: torch.Tensor, window: torch.Tensor, last_token: torch.Tensor, entry: torch.Tensor
) -> None:
    """Writes the cache slots of these entries, and counts those that have none."""
    table, rows = plan.cache_block_table, plan.rows_per_page
    if table is not None:
        column = window.div(rows, rounding_mode="floor")
        page, known = _look_up(table, sequence, column)
        page = torch.where(page == plan.null_page, -1, page) if plan.null_page is not None else page
        wrong = ~known | (page < -1)
        slot = torch.where(wrong | (page < 0), -1, page.clamp(max=INT32_MAX) * rows + window % rows)
    elif plan.token_slots is not None:
        slot, known = _look_up(plan.token_slots[None], torch.zeros_like(last_token), last_token)
        slot, wrong = torch.where((slot < 0) | (slot == plan.no_slot), -1, slot), ~known
    else:
        slot, wrong = plan.slots_given.long()[entry], torch.zeros_like(entry, dtype=torch.bool)
    if not plan.reserved:
        plan.entry_slots.fill_(-1)
    plan.entry_slots[entry] = slot
    plan.errors.add_(wrong.sum().int())


def _look_up(table: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a table says, -1 beyond its last column, and whether there is such a column."""
    known = column < table.shape[1]
    if not table.shape[1]:
        return torch.full_like(column, -1), known
    return torch.where(known, table[row, torch.where(known, column, 0)].long(), -1), known
