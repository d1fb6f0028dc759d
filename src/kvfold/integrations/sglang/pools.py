"""`FoldStatePool`: kvfold's state of one compressor as a pool that SGLang can hand out, move and send. Needs no SGLang."""

from __future__ import annotations

import math

import torch

from ...arguments.checks import check_int
from ...contract import INT32_MAX
from ...restore import restore
from ...spec import CompressorSpec
from ...storage.fold_state import FoldState
from ...storage.snapshots import Snapshots

BufInfos = tuple[list[int], list[int], list[int]]


class FoldStatePool:
    """State of `num_slots` requests for one compressor of one layer, and what prefix pages keep of it.

    A request's slot is its row of SGLang's request table, so it is allocated and freed with it and never cleared. Slots, and
    prefix pages, are rows of bytes: whoever copies a row moves all that it stands for, tags too. Rejected drafts need nothing.

    Attributes:
        state: the `FoldState` over `slot_rows`; a step of up to `max_new_tokens` can be taken back to any position in it.
        snapshots: the `Snapshots` over `page_rows`; None where the end of a page leaves nothing, as at ratio 128 and page 256.
        slot_rows: uint8 `[num_slots, bytes]`.
        page_rows: uint8 `[num_pages, bytes]`, or None.
    """

    def __init__(
        self,
        spec: CompressorSpec,
        num_slots: int,
        max_new_tokens: int = 1,
        *,
        num_pages: int = 0,
        page_size: int = 256,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty pool.

        Args:
            num_slots: requests, padding among them.
            max_new_tokens: drafts + 1.
            num_pages: pages of `page_size` positions that a prefix cache may hold.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_int("num_slots", num_slots, 0, INT32_MAX)
        check_int("num_pages", num_pages, 0, INT32_MAX)
        size = FoldState.page_bytes(spec, max_new_tokens)
        self.spec = spec
        self.slot_rows = torch.zeros(num_slots, size, dtype=torch.uint8, device=device)
        self.state = FoldState.over(self.slot_rows, spec, max_new_tokens, fresh=True)
        kept = Snapshots.allocate(spec, 0, page_size, device=device)
        self.page_rows, self.snapshots = None, None
        if kept.rows_per_page:
            self.page_rows, self.snapshots = _snapshots(kept, num_pages, self.slot_rows.device)

    def views(self, spec: CompressorSpec) -> tuple[FoldState, Snapshots | None]:
        """State and snapshots over the same bytes for a spec that differs in `norm_eps` alone, which no byte depends on."""
        kept, state = self.snapshots, FoldState.over(self.slot_rows, spec, self.state.max_new_tokens)
        return state, None if kept is None else Snapshots(spec, kept.rows, kept.positions, kept.page_size)

    def transfer_indices(self, slot: int, seq_len: int) -> list[int]:
        """The slot, if a request of `seq_len` tokens has state that its next step reads, else nothing."""
        return [slot] if self.state.history_of(seq_len) else []

    def buf_infos(self) -> BufInfos:
        """Address, bytes, and bytes of one slot, each in a list, of what `transfer_indices` counts rows of."""
        return _infos(self.slot_rows)

    def page_buf_infos(self) -> BufInfos:
        """The same of the prefix pages; empty lists where they keep nothing."""
        return ([], [], []) if self.page_rows is None else _infos(self.page_rows)

    def on_prefix_hit(self, slots: torch.Tensor, pages: torch.Tensor, start_pos: torch.Tensor, errors: torch.Tensor) -> None:
        """Makes slots ready to go on at the end of a shared page, without a host sync.

        Args:
            slots: int32 `[n]`, -1 for nothing to do.
            pages: int32 `[n]`, the page that ends at `start_pos[i]`.
            start_pos: int32 `[n]`, multiples of the page size.
            errors: int32 `[1]`, mutated: grows by one for each page whose snapshot is not of this position.
        """
        if self.snapshots is not None:
            restore(self.state, self.snapshots, slots, pages, start_pos, errors)

    def clear(self, slots: torch.Tensor) -> None:
        """Makes slots empty: a step that goes on there is refused. A request that starts at 0 does not need it."""
        self.state.forget(slots)


def _infos(rows: torch.Tensor) -> BufInfos:
    return [rows.data_ptr()], [rows.nbytes], [rows.stride(0)]


def _snapshots(kept: Snapshots, num_pages: int, device: torch.device) -> tuple[torch.Tensor, Snapshots]:
    """Snapshots whose rows and tags lie in one row of bytes for each page."""
    shape = kept.rows.shape[1:]
    of_rows, tags = math.prod(shape) * 4, kept.rows_per_page * 4
    pages = torch.zeros(num_pages, -(-(of_rows + tags) // 64) * 64, dtype=torch.uint8, device=device)
    positions = pages[:, of_rows : of_rows + tags].view(torch.int32)
    positions.fill_(-1)
    rows = pages[:, :of_rows].view(torch.float32).view(num_pages, *shape)
    return pages, Snapshots(kept.spec, rows, positions, kept.page_size)
