"""`restore`: on a prefix-cache hit, snapshots become the state of slots."""

from __future__ import annotations

import torch

from . import ops
from .arguments.checks import check_type, traced
from .calls.run import run_restore
from .storage.fold_state import FoldState
from .storage.snapshots import Snapshots
from .storage.step import Hits


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

    `compress` from there gives the same bits as if the slot had seen the whole sequence. Whatever else the slot held is gone,
    so it need not be cleared first. Does not synchronize with the host.

    Args:
        state: mutated: the rows and tags of the slots.
        snapshots: of the same spec and dtype as `state`.
        slots: int32 `[n]`, no two the same; -1 for nothing to do.
        pages: int32 `[n]`, the snapshot of the page that ends at `start_pos[i]`. Not read if a step that starts there reads
            no state, as at the end of a window without overlap.
        start_pos: int32 `[n]`, multiples of `snapshots.page_size`; 0 for nothing to do.
        errors: int32 `[1]`, mutated: grows by one for each i that is refused: an impossible slot, page or start, or a snapshot
            that was taken at another position. The slot is emptied then, so a step that needs its history is refused too. An
            impossible slot leaves all slots as they were.
        backend: as for `compress`.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then.
    """
    check_type("state", state, FoldState)
    run = ops.restore if traced(getattr(state, "rows", None)) else run_restore
    run(state, snapshots, Hits(slots, pages, start_pos, errors), backend)
