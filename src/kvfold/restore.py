"""`restore`: a prefix hit; snapshots become the state of slots."""

from __future__ import annotations

import torch

from .arguments.checks import check_tensor, check_type, traced
from .arguments.overlap import Place, check_apart
from .backend_torch.fold import history_starts
from .compress import check_snapshots, choose_backend
from .plan import MOST_POSITIONS
from .storage.fold_state import FoldState
from .storage.remembered import check_made
from .storage.snapshots import Snapshots


def restore(
    state: FoldState,
    snapshots: Snapshots,
    slots: torch.Tensor,
    pages: torch.Tensor,
    start_pos: torch.Tensor,
    errors: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Copies snapshot `pages[i]` into slot `slots[i]`, so that the slot's next step can start at `start_pos[i]`; one launch.

    `compress` from there gives the same bits as if the slot had seen the whole sequence. What else the slot held is forgotten:
    it need not be cleared before. Does not synchronize with the host.

    Args:
        state: mutated: the rows and tags of the slots.
        snapshots: of the same spec and dtype as `state`.
        slots: int32 `[n]`, no two the same; -1 for nothing to do.
        pages: int32 `[n]`, the snapshot of the page that ends at `start_pos[i]`. Not looked at where a step that starts there
            reads nothing, which is at the end of a window without overlap.
        start_pos: int32 `[n]`, multiples of `snapshots.page_size`; 0 for nothing to do.
        errors: int32 `[1]`, mutated: grows by one for each i that is refused: a slot, page or start that cannot be, or a
            snapshot that is not of this start. The slot has forgotten its former owner then, so that a step which needs a row
            of it is refused as well; a slot that cannot be leaves all slots as they were.
        backend: as for `compress`.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then.
    """
    check_type("state", state, FoldState)
    if traced(getattr(state, "rows", None)):
        from . import ops

        ops.restore(state, snapshots, slots, pages, start_pos, errors, backend)
    else:
        run_restore(state, snapshots, slots, pages, start_pos, errors, backend)


def run_restore(
    state: FoldState,
    snapshots: Snapshots,
    slots: torch.Tensor,
    pages: torch.Tensor,
    start_pos: torch.Tensor,
    errors: torch.Tensor,
    backend: str | None,
) -> None:
    """`restore` of real tensors: straight to the launch."""
    check_made("state", state, FoldState)
    chosen = choose_backend(backend, "state", state.rows)
    device = state.device
    check_snapshots(snapshots, state)
    check_tensor("slots", slots, (None,), (torch.int32,), device)
    check_tensor("pages", pages, tuple(slots.shape), (torch.int32,), device)
    check_tensor("start_pos", start_pos, tuple(slots.shape), (torch.int32,), device)
    check_tensor("errors", errors, (1,), (torch.int32,), device)
    written = (("state", state.rows), ("state", state.positions), ("errors", errors))
    read = (("snapshots", snapshots.rows), ("snapshots", snapshots.positions))
    read += (("slots", slots), ("pages", pages), ("start_pos", start_pos))
    check_apart([*(Place(name, x, written=True) for name, x in written), *(Place(name, x) for name, x in read)])
    if slots.shape[0] == 0:
        return
    if chosen == "torch":
        _restore_torch(state, snapshots, slots.long(), pages.long(), start_pos.long(), errors)
    else:
        from .backend_triton.launch import restore_triton  # imports triton, which the torch backend does not need

        restore_triton(state, snapshots, slots, pages, start_pos, errors)


@torch.inference_mode()
def _restore_torch(
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
