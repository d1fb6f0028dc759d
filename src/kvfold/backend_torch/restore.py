"""The torch backend of `restore`."""

from __future__ import annotations

import torch

from ..contract import MOST_POSITIONS
from ..storage.fold_state import FoldState
from ..storage.snapshots import Snapshots
from ..storage.step import Hits
from .items import history_starts


@torch.inference_mode()
def restore_torch(state: FoldState, snapshots: Snapshots, hits: Hits) -> None:
    """`restore` after its arguments were checked."""
    slots, pages, start, _ = (x.long() for x in hits)
    wanted = (slots != -1) & (start != 0)
    there = (slots >= 0) & (slots < state.num_slots)
    fine = there & (start > 0) & (start <= MOST_POSITIONS)
    fine &= start % snapshots.page_size == 0
    h0 = history_starts(state.spec, state.kind, start)
    reads = fine & (h0 < start)
    fine &= ~reads | ((pages >= 0) & (pages < snapshots.num_pages))
    known = fine & reads
    row = torch.arange(snapshots.rows_per_page, device=h0.device)
    position = h0[:, None] + row
    fine[known] = (snapshots.positions[pages[known]] == position[known]).all(1)
    hits.errors.add_((wanted & ~fine).sum().int())
    state.positions[slots[wanted & there]] = -1
    known = fine & reads & wanted
    slot, last = slots[known], start[known] - 1
    # One row, or the lo rows of one window, which are put into their home.
    home = last % state.ring if state.kind == "fold" else last // state.spec.ratio % max(state.places[0], 1)
    at = slot[:, None], home[:, None] * snapshots.rows_per_page + row
    state.rows[at] = snapshots.rows[pages[known]].view(*at[1].shape, *state.rows.shape[2:])
    state.positions[slot, home] = last.int()
