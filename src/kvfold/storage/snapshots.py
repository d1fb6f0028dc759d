"""`Snapshots`: what a prefix cache keeps of a compressor's state, so that a sequence can resume at the end of any page."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..arguments.checks import check_contiguous, check_dtype, check_int, check_memory
from ..contract import INT32_MAX
from ..spec import CompressorSpec, check_spec
from .fold_state import check_rows, empty_rows, history_start, state_kind
from .remembered import Checked, check_made, dtype_name

MOST_PAGE = 1 << 30  # positions per page: the end of the page of any position then is an int32


class Snapshots(Checked):
    """The snapshots of one compressor of one layer, one for each page of an engine's prefix cache.

    Page k of a sequence has positions `[k * page_size, (k + 1) * page_size)`. Its snapshot is what a step that starts at the
    page's end reads from a `FoldState`. For fold rows that is the row of the last position, unless that ends a window. For
    input rows with overlap it is the lo rows of the last `ratio` positions, position x in row `x % ratio`. Otherwise nothing.

    Attributes:
        rows: fp32 `[num_pages, rows_per_page, 3 * head_dim]`, fold rows `(m, l, a)`, or `[num_pages, rows_per_page,
            2 * head_dim]`, lo rows in the dtype of the state. Mutated by `compress`.
        positions: int32 `[num_pages, rows_per_page]`, the position that each row stands for, -1 for none. Mutated with `rows`.
        page_size: positions per page.
        rows_per_page: 0 if no page has anything to keep, as with ratio 128 and pages of 128; then no step writes.

    Copying `rows[page]` and `positions[page]` moves a snapshot to another page, pool or machine.
    """

    rows_per_page: int

    def __init__(self, spec: CompressorSpec, rows: torch.Tensor, positions: torch.Tensor, page_size: int) -> None:
        """Wraps existing tensors; see `allocate` for the usual way. `positions` must be -1 where a row holds nothing.

        Each page's part is contiguous in `rows` and in `positions`; the stride from page to page is free.

        Raises:
            TypeError, ValueError: naming the argument whose type, shape, dtype, device or stride is wrong.
        """
        self.spec, self.rows, self.positions, self.page_size = spec, rows, positions, page_size
        self._validate()

    def _check(self) -> None:
        check_spec("spec", self.spec)
        shape = _shape(self.spec, self.page_size)
        self.rows_per_page = shape[0]
        self._tensors = check_rows(self.spec, self.rows, self.positions, shape, self.rows_per_page)

    @classmethod
    def allocate(
        cls,
        spec: CompressorSpec,
        num_pages: int,
        page_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Snapshots:
        """An empty pool.

        Args:
            num_pages: how many snapshots it can hold.
            page_size: positions per page, at most 2^30; where the state keeps input rows, a multiple of the ratio.
            dtype: that of the `FoldState`: fp32, or bf16 for specs that keep input rows.

        Raises:
            TypeError, ValueError: naming the argument; `UnsupportedError` for fold rows in bf16.
        """
        check_spec("spec", spec)
        check_int("num_pages", num_pages, 0, INT32_MAX)
        shape = _shape(spec, page_size)
        return cls(spec, *empty_rows(spec, num_pages, shape, shape[0], dtype, device), page_size)

    def _facts(self) -> Iterator[tuple[str, object]]:
        yield from (("ratio", self.spec.ratio), ("head_dim", self.spec.head_dim), ("num_pages", self.num_pages))
        yield from (("page_size", self.page_size), ("rows_per_page", self.rows_per_page))
        yield from (("bytes_per_page", self.bytes_per_page), ("dtype", dtype_name(self.rows)), ("device", self.device))

    @property
    def num_pages(self) -> int:
        return self.rows.shape[0]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def bytes_per_page(self) -> int:
        """Bytes that one snapshot occupies: its rows and their positions."""
        return self.rows_per_page * (self.rows.shape[2] * self.rows.element_size() + self.positions.element_size())

    def of(self, positions: torch.Tensor) -> torch.Tensor:
        """Whether each of `positions` (any integer dtype) has a row in the snapshot of its page: bool of the same shape.

        Raises:
            TypeError, ValueError: naming `positions`.
        """
        check_made("snapshots", self, Snapshots)
        check_memory("positions", positions)
        check_dtype("positions", positions, (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
        check_contiguous("positions", positions)
        ratio, positions = self.spec.ratio, positions.long()
        if self.rows_per_page == 0:
            return torch.zeros_like(positions, dtype=torch.bool)
        if state_kind(self.spec) == "fold":
            return ((positions + 1) % self.page_size == 0) & ((positions + 1) % ratio != 0)
        return (positions // ratio + 1) * ratio % self.page_size == 0


def _shape(spec: CompressorSpec, page_size: int) -> tuple[int, int]:
    """Rows per page, and elements per row."""
    check_int("page_size", page_size, 1, MOST_PAGE)
    if state_kind(spec) == "fold":
        return int(page_size % spec.ratio != 0), 3 * spec.head_dim
    if page_size % spec.ratio:
        raise ValueError(f"page_size must be a multiple of the ratio {spec.ratio} where input rows are kept, got {page_size}")
    return page_size - history_start(spec, page_size), 2 * spec.head_dim
