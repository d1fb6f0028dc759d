"""`WindowState`: paged raw rows as serving engines keep them, one value row and one score row per position."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..arguments.checks import check_device, check_dtype, check_float, check_int, check_memory, check_shape, usable_device
from ..arguments.overlap import Place, check_apart
from ..contract import INT32_MAX
from ..spec import CompressorSpec, check_spec
from .fold_state import state_kind
from .remembered import RememberingState, dtype_name

_DTYPES = (torch.float32, torch.bfloat16)


class WindowState(RememberingState):
    """The raw rows of many sequences for one compressor of one layer, in an engine's pages.

    Position p of sequence b is row `p % page_size` of page `kv_table[b, p // page_size]` of `kv`, and of page
    `score_table[b, p // page_size]` of `score`; the tables are the plan's. Stored are the value row `K` and the score row with
    its bias, `S + ape[p % ratio]` added in fp32, both rounded to the dtype of the state.

    A row is kept until it is overwritten. So drafts are rejected by calling again with a smaller `start_pos`, and a prefix is
    shared by sharing its pages. A call reads only what calls wrote: old contents do not matter, not even NaN. There are no
    tags: only the engine knows whether the row of an earlier position is still there, and -1 in its tables means "no page".
    The pages of an `EntryCache` may be in the same allocation. Only the engine's tables say which page is whose, so shared
    bytes are accepted there, unlike between any two other tensors of a call.

    The bits of an entry do not depend on how its sequence was cut, nor on batch, order, table, page size, strides or alignment.
    They do depend on the dtype of the rows. A channel whose largest score in a window is beyond 2**30 in magnitude may be NaN.

    Attributes:
        kv, score: fp32 or bf16 `[pages, page_size, channels]`, each with its own number of pages. Mutated by `compress`.
        page_size, channels: positions per page, and width of a row.
    """

    def __init__(self, kv: torch.Tensor, score: torch.Tensor) -> None:
        """Wraps an engine's pools, which may be slices of one: `WindowState(pool[..., :c], pool[..., c:])`.

        Args:
            kv, score: the pools. The last dimension is contiguous, page and row strides are free; no two rows overlap.

        Raises:
            TypeError, ValueError: naming the argument whose type, shape, dtype, device or stride is wrong.
        """
        self.kv, self.score = kv, score
        self._forget()
        self._validate()

    def _check(self) -> None:
        kv, score = self.kv, self.score
        check_memory("kv", kv, fake=True)
        check_memory("score", score, fake=True)
        check_dtype("kv", kv, _DTYPES)
        check_dtype("score", score, (kv.dtype,))
        check_shape("kv", kv, (None, None, None))
        for what, size in (("page size", kv.shape[1]), ("channels", kv.shape[2])):
            if size < 1:
                raise ValueError(f"kv must have at least one row per page and one channel, got {what} {size}")
        check_shape("score", score, (None, *kv.shape[1:]))
        check_device("score", score, kv.device)
        _check_strides("kv", kv)
        _check_strides("score", score)
        check_apart((Place("score", score, written=True), Place("kv", kv, written=True)))
        self._tensors = (kv, score)
        self._forget_calls()

    @classmethod
    def allocate(
        cls,
        spec: CompressorSpec,
        num_pages: int,
        page_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> WindowState:
        """Two pools of `num_pages` pages each, uninitialized: nothing is read before it is written.

        Args:
            page_size: positions per page, at least 1; no relation to the ratio is needed.
            dtype: of the rows: fp32, or bf16 in half the memory, which rounds values and biased scores when they are stored.
        """
        check_spec("spec", spec)
        state_kind(spec)  # raises where it has no state
        check_int("num_pages", num_pages, 0, INT32_MAX)
        check_int("page_size", page_size, 1, INT32_MAX)
        check_float("dtype", dtype)
        device = usable_device("device", device)
        shape = (num_pages, page_size, spec.channels)
        return cls(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))

    def _facts(self) -> Iterator[tuple[str, object]]:
        yield from (("num_pages", self.num_pages), ("num_score_pages", self.num_score_pages), ("page_size", self.page_size))
        yield from (("channels", self.channels), ("bytes_per_position", 2 * self.channels * self.kv.element_size()))
        yield from (("dtype", dtype_name(self.kv)), ("device", self.device))

    @property
    def num_pages(self) -> int:
        """Pages of the value pool."""
        return self.kv.shape[0]

    @property
    def num_score_pages(self) -> int:
        return self.score.shape[0]

    @property
    def page_size(self) -> int:
        return self.kv.shape[1]

    @property
    def channels(self) -> int:
        return self.kv.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.kv.dtype

    @property
    def device(self) -> torch.device:
        return self.kv.device


def _check_strides(name: str, pool: torch.Tensor) -> None:
    """Channels side by side, rows and pages anywhere but on top of one another."""
    if pool.numel() == 0:
        return
    if pool.shape[2] > 1 and pool.stride(2) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tuple(pool.stride())}")
    # Ordered by stride, each dimension must step over all that the smaller ones span.
    span = pool.shape[2]
    for stride, size in sorted((pool.stride(d), pool.shape[d]) for d in (0, 1) if pool.shape[d] > 1):
        if stride < span:
            raise ValueError(f"{name} must have rows that do not overlap, got strides {tuple(pool.stride())}")
        span = stride * (size - 1) + span
    if pool.stride(1) * (pool.shape[1] - 1) + pool.shape[2] > 1 << 31:
        raise ValueError(f"{name} must have pages that span less than 2**31 elements, got strides {tuple(pool.stride())}")
