"""The torch backend of `restore`."""

from __future__ import annotations

import torch

from ..contract import MOST_POSITIONS
from ..storage.fold_state import FoldState
from ..storage.snapshots import Snapshots
from .items import history_starts


@torch.inference_mode()
def restore_torch(
    state: FoldState,
    snapshots: Snapshots,
    slots: torch.Tensor,
    pages: torch.Tensor,
    start: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """`restore` after its arguments were checked."""
    wanted = (slots != -1) & (start != 0)
    there = (slots >= 0) & (slots < state.num_slots)
    fine = there & (start > 0) & (start <= MOST_POSITIONS)
    fine &= start % snapshots.page_size == 0
    h0 = history_starts(state.spec, state.kind, start)
    reads = fine & (h0 < start)
    fine &= ~reads | ((pages >= 0) & (pages < snapshots.num_pages))
    for row in range(snapshots.rows_per_page):
        known = fine & reads
        fine[known] = snapshots.positions[pages[known], row] == h0[known] + row
    errors += (wanted & ~fine).sum().int()
    fine &= wanted
    state.positions[slots[wanted & there]] = -1
    for row in range(snapshots.rows_per_page):
        known = fine & reads
        slot, x = slots[known], h0[known] + row
        state.rows[slot, x % state.ring] = snapshots.rows[pages[known], row].view(-1, *state.rows.shape[2:])
        state.positions[slot, x % state.ring] = x.int()
