"""`FoldState`: what a sequence must keep between steps, addressed by absolute position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from ..arguments.checks import (
    address_of,
    check_dense,
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_memory,
    check_shape,
    usable_device,
)
from ..arguments.overlap import Place, check_apart
from ..contract import INT32_MAX, MOST_POSITIONS, UnsupportedError
from ..spec import CompressorSpec, check_spec
from .remembered import RememberingState, check_made, dtype_name, row_bytes

# Up to this ratio the input rows of a window are kept instead of fold rows: at ratio 8 a bf16 window is 8 rows of
# 4 bytes per channel against one fold row of 12, and a step reads the rows it needs in one go.
MOST_RATIO_OF_ROWS = 8


def state_kind(spec: CompressorSpec) -> str:
    """`"rows"` when the state of `spec` keeps input rows, `"fold"` when it keeps fold rows (DESIGN.md, State)."""
    if not spec.gate:
        raise ValueError("spec must have a gate to have a state: of the single token of a window without one nothing is kept")
    return "rows" if spec.overlap or spec.ratio <= MOST_RATIO_OF_ROWS else "fold"


class FoldState(RememberingState):
    """State of up to `num_slots` sequences for one compressor of one layer.

    There are two kinds (`kind`). `"fold"` keeps fold rows: the running maximum, sum of weights and weighted sum after a token.
    `"rows"` keeps input rows: `kv_score` as it came. Slots may lie any distance apart, in tensors of their own (`allocate`) or
    in an engine's pages (`over`).

    Attributes:
        rows: `fold`: fp32 `[num_slots, ring + 1, 3, head_dim]`, the three numbers of a fold row for each channel; the last row
            is spare. `rows`: fp32 or bf16 `[num_slots, half rows, 2 * head_dim]`, value and score of half a `kv_score` row.
            First come places of `ratio` lo rows each (with overlap), then places of `ratio - 1` hi or whole rows (at ratio 1
            of one unused row).
        positions: int32, the tags. `fold`: `[num_slots, ring + 1]`, the position that each row stands for, -1 for none.
            `rows`: `[num_slots, places]`: a place holds the rows of one window, from its first position to this one. `held`
            says it row by row.
        ring: `fold`: position x lives in row `x % ring`, its home; or in the spare row, if the step that wrote it was reading
            its home. `rows`: how many windows the longest rewindable step can begin.
        places: `rows`: how many places there are for lo rows, and for hi or whole rows. Window w lives in place `w % n` of n;
            or n // 2 further, if the step that wrote it was reading that place. `fold`: (0, 0).
        max_new_tokens: a step of up to this many tokens can be rewound to any position inside it.
        round_inputs: whether the state accepts fp32 `kv_score` and rounds it to the bf16 that it keeps; without it a bf16
            state accepts bf16 alone.
        pages: uint8 `[num_slots, ...]`, the engine's pages (`over`) of which `rows` and `positions` are views, else None.

    Copying `rows[slot]` and `positions[slot]` moves a sequence to another slot, state or machine.
    """

    kind: str
    ring: int
    places: tuple[int, int]
    pages: torch.Tensor | None = None

    def __init__(
        self,
        spec: CompressorSpec,
        rows: torch.Tensor,
        positions: torch.Tensor,
        max_new_tokens: int,
        round_inputs: bool = False,
    ) -> None:
        """Wraps existing tensors; see `allocate` for the usual way. `positions` must be -1 where a row holds nothing.

        Each slot is contiguous in `rows` and in `positions`; the stride from slot to slot is free.

        Raises:
            TypeError, ValueError: naming the argument whose type, shape, dtype, device or stride is wrong, or which shares
                memory with the other.
        """
        self.spec, self.rows, self.positions, self.max_new_tokens = spec, rows, positions, max_new_tokens
        self.round_inputs = round_inputs
        self._forget()
        self._validate()

    def _check(self) -> None:
        spec = self.spec
        check_spec("spec", spec)
        check_int("max_new_tokens", self.max_new_tokens, 1, 1 << 20)
        self.kind = state_kind(spec)
        self.ring = ring_of(spec, self.max_new_tokens)
        self.places = places_of(spec, self.ring)
        self._tensors = check_rows(spec, self.rows, self.positions, *_shapes(spec, self.max_new_tokens))
        _check_rounding(self.round_inputs, self.rows.dtype)
        self._forget_calls()

    @classmethod
    def allocate(
        cls,
        spec: CompressorSpec,
        num_slots: int,
        max_new_tokens: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        round_inputs: bool = False,
    ) -> FoldState:
        """An empty state.

        Args:
            num_slots: how many sequences it can hold.
            max_new_tokens: longest step that must be rewindable to any position inside it (drafts + 1), at most 2**20, and such
                that a slot has fewer than 2**31 numbers. Longer steps are allowed. They can be rewound to their start and, over
                fold rows, to any of their last `max_new_tokens` positions, or, over input rows, to any position of their last
                window. With n over fold rows, or `n + 2 * ratio` over input rows, the last n positions of a sequence can be
                taken back, however many steps they came in and however long these were. They count from the furthest position
                that it reached, rejected ones too.
            dtype: of the kept input rows, for specs that keep them (`kind == "rows"`). fp32 accepts bf16 and fp32
                `kv_score`, both exactly; bf16 accepts bf16 only, in half the memory. Fold rows are always fp32.
            round_inputs: with bf16: accept fp32 `kv_score` as well, and round values and scores to bf16 before anything else,
                whether they are kept or used at once. So results are those of `kv_score.bfloat16()`, to the bit, however the
                sequence is cut. How far that may be from fp32: docs/numerics.md.

        Raises:
            TypeError, ValueError: naming the argument; `UnsupportedError` for fold rows in bf16.
        """
        _check_rounding(round_inputs, dtype)
        return cls(spec, *empty_slots(spec, num_slots, max_new_tokens, dtype, device), max_new_tokens, round_inputs)

    @classmethod
    def over(
        cls,
        pages: torch.Tensor,
        spec: CompressorSpec,
        max_new_tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        round_inputs: bool = False,
        fresh: bool = False,
    ) -> FoldState:
        """A state inside an engine's pages: slot s is page s, with its rows at the start and its tags after them.

        A page that held anything else must be emptied before its first owner's first step. Either `fresh=True` sets the tags
        of all pages to -1, or `forget(slots)` those of the pages that a sequence is given; a CUDA graph can capture that. The
        rows need nothing, even if they hold NaN. Later owners of a slot need nothing, as in any state.

        Only the engine's tables say which page belongs to whom. So a call accepts other states and caches over the same pages.

        Args:
            pages: mutated; `[num_slots, ...]` of any dtype. Each page is contiguous, has at least `page_bytes` bytes and starts
                at a multiple of 4 bytes; pages may lie any distance apart. At multiples of 64 bytes accesses are 16 bytes
                wide, which is faster.
            max_new_tokens, dtype, round_inputs: as for `allocate`.
            fresh: whether to set all tags to -1 here; nothing else is written.

        Raises:
            TypeError, ValueError: naming the argument, before anything is written; `UnsupportedError` for fold rows in bf16.
        """
        check_memory("pages", pages, fake=True)
        need, (shape, places, of_rows) = cls.page_bytes(spec, max_new_tokens, dtype), _slot(spec, max_new_tokens, dtype)
        if not isinstance(fresh, bool):
            raise TypeError(f"fresh must be a bool, got {type(fresh).__name__}")
        if pages.dim() < 2:
            raise ValueError(f"pages must have a page dimension and one more, got shape {list(pages.shape)}")
        check_dense("pages", pages, "page")
        count, item = pages.shape[0], pages.element_size()
        if count == 0:
            return cls.allocate(spec, 0, max_new_tokens, dtype=dtype, device=pages.device, round_inputs=round_inputs)
        have = pages[0].numel()
        if have * item < need:
            raise ValueError(f"pages must have at least {need} bytes each, got {have * item}")
        begins = address_of(pages), pages.storage_offset() * item, pages.stride(0) * item * (count > 1)
        if any(at % 4 for at in begins):
            raise ValueError("pages must start at multiples of 4 bytes, of memory and of their storage")
        stride = pages.stride(0) if count > 1 else need // item  # of one page a stride says nothing
        flat = pages.detach().as_strided((count, have), (stride, 1)).view(torch.uint8)
        tags = flat[:, of_rows : of_rows + 4 * places].view(torch.int32)
        state = cls(spec, flat[:, :of_rows].view(dtype).view(count, *shape), tags, max_new_tokens, round_inputs)
        object.__setattr__(state, "pages", flat)  # which changes nothing that was checked
        if fresh:
            tags.fill_(-1)
        return state

    @staticmethod
    def page_bytes(spec: CompressorSpec, max_new_tokens: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that a page must have for `over`, a multiple of 64. The arguments are those of `allocate`."""
        _, tags, of_rows = _slot(spec, max_new_tokens, dtype)
        return -(-(of_rows + 4 * tags) // 64) * 64

    def __reduce_ex__(self, protocol: int) -> tuple | str:
        """In pages, copies and pickles are rebuilt, as rows and tags must be views of their own pages."""
        if self.pages is None:
            return super().__reduce_ex__(protocol)
        how = {"dtype": self.rows.dtype, "round_inputs": self.round_inputs}
        return _over_again, (how, self.pages, self.spec, self.max_new_tokens)

    def _facts(self) -> Iterator[tuple[str, object]]:
        yield from (("kind", self.kind), ("ratio", self.spec.ratio), ("head_dim", self.spec.head_dim))
        yield from (("num_slots", self.num_slots), ("bytes_per_slot", row_bytes(self.rows, self.positions)))
        yield from (("dtype", dtype_name(self.rows)), ("device", self.device), ("max_new_tokens", self.max_new_tokens))
        if self.round_inputs:
            yield "round_inputs", True
        if self.pages is not None:
            yield "pages", f"{list(self.pages.shape)} bytes"

    @property
    def num_slots(self) -> int:
        return self.rows.shape[0]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one sequence occupies: its rows and their positions."""
        return self.rows[:1].nbytes + self.positions[:1].nbytes

    def forget(self, slots: torch.Tensor) -> None:
        """Empties these slots: a step that needs a row of a former owner is then refused.

        That is not needed before an owner starts at position 0, or after `restore`. It is needed if an owner might start
        elsewhere by mistake, since rows are identified by position and not by owner; and for an engine's page (`over`) that
        held something else. Writes only the tags of these slots. Does not synchronize with the host, so a CUDA graph can
        capture it.

        Args:
            slots: int32 or int64 `[n]`, on the device of the state. Slots outside the state, such as -1, are ignored.

        Raises:
            TypeError, ValueError: naming `slots`.
        """
        check_made("state", self, FoldState)
        check_memory("slots", slots)
        check_dtype("slots", slots, (torch.int32, torch.int64))
        check_shape("slots", slots, (None,))
        check_device("slots", slots, self.device)
        if slots.shape[0] == 0 or self.num_slots == 0:
            return
        with torch.inference_mode():
            inside = (slots >= 0) & (slots < self.num_slots)
            first = inside.int().argmax(0, keepdim=True)  # one that is inside, if any is, in the place of those that are not
            slots = torch.where(inside, slots, torch.where(inside[first], slots[first], 0)).long()
            tags = torch.where(inside[first], -1, self.positions[slots[first]])
            self.positions.index_put_((slots,), tags.expand(len(slots), -1))

    def history_of(self, position: int) -> range:
        """The positions whose rows a step starting at `position` reads; what a prefix cache must keep to resume there."""
        check_made("state", self, FoldState)
        check_int("position", position, 0, INT32_MAX)
        return range(history_start(self.spec, position), position)

    def held(self) -> torch.Tensor:
        """int32 `[num_slots, rows of a slot]`: the position that each row stands for, -1 for none."""
        check_made("state", self, FoldState)
        if self.kind == "fold":
            return self.positions.clone()
        found, ratio, (lo, _) = [], self.spec.ratio, self.places
        for last, kept in ((self.positions[:, :lo, None], ratio), (self.positions[:, lo:, None], ratio - 1)):
            place = torch.arange(max(kept, 1), dtype=torch.int32, device=self.device)
            position = last.div(ratio, rounding_mode="floor") * ratio + place
            there = (last >= 0) & (position <= last) & (place < kept)
            found.append(torch.where(there, position, -1).flatten(1))
        return torch.cat(found, 1)


def _over_again(how: dict[str, Any], *given: Any) -> FoldState:
    return FoldState.over(*given, **how)


def _check_rounding(round_inputs: object, dtype: torch.dtype) -> None:
    if not isinstance(round_inputs, bool):
        raise TypeError(f"round_inputs must be a bool, got {type(round_inputs).__name__}")
    if round_inputs and dtype is not torch.bfloat16:
        raise ValueError(f"round_inputs must be False for rows in {dtype}, which keep what comes")


def _shapes(spec: CompressorSpec, max_new_tokens: int) -> tuple[tuple[int, ...], int]:
    """The shape of a slot's rows, and how many tags it has."""
    ring = ring_of(spec, max_new_tokens)
    if state_kind(spec) == "fold":
        shape, tags = (ring + 1, 3, spec.head_dim), ring + 1
    else:
        lo, hi = places_of(spec, ring)
        shape, tags = (lo * spec.ratio + hi * max(spec.ratio - 1, 1), 2 * spec.head_dim), lo + hi
    if math.prod(shape) > INT32_MAX:  # kernels find a row of a slot in 32 bits
        raise ValueError(
            f"max_new_tokens must leave a slot below 2**31 numbers, got {max_new_tokens}, which takes {math.prod(shape)} of "
            f"{spec}; longer steps are fine over a smaller state"
        )
    return shape, tags


def _slot(spec: CompressorSpec, max_new_tokens: int, dtype: torch.dtype) -> tuple[tuple[int, ...], int, int]:
    """The shape of a slot's rows, how many tags it has, and the bytes of the rows."""
    check_spec("spec", spec)
    check_int("max_new_tokens", max_new_tokens, 1, 1 << 20)
    check_kept(spec, dtype)
    shape, tags = _shapes(spec, max_new_tokens)
    return shape, tags, math.prod(shape) * dtype.itemsize


def check_kept(spec: CompressorSpec, dtype: object) -> None:
    """Checks the dtype that rows are to be kept in."""
    check_float("dtype", dtype)
    if dtype is not torch.float32 and state_kind(spec) == "fold":
        raise UnsupportedError(
            f"dtype must be torch.float32 for {spec}, whose state is fold rows, got {dtype}; there is bf16 for input rows, "
            f"which are kept with overlap or a ratio up to {MOST_RATIO_OF_ROWS}, and for the raw rows of a WindowState"
        )


def empty_slots(
    spec: CompressorSpec, num_slots: int, max_new_tokens: int, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`FoldState.rows` and `positions` of slots that hold nothing; the arguments are those of `FoldState.allocate`."""
    shape, tags, _ = _slot(spec, max_new_tokens, dtype)
    check_int("num_slots", num_slots, 0, INT32_MAX)
    return empty_rows(spec, num_slots, shape, tags, dtype, device)


def empty_rows(
    spec: CompressorSpec, count: int, shape: tuple[int, ...], tags: int, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `count` slots or pages that hold nothing, of each `shape`, and its tags; `dtype` is that of input rows."""
    check_kept(spec, dtype)
    device = usable_device("device", device)
    rows = torch.zeros(count, *shape, dtype=dtype, device=device)
    return rows, torch.full((count, tags), -1, dtype=torch.int32, device=device)


def check_rows(
    spec: CompressorSpec, rows: torch.Tensor, positions: torch.Tensor, shape: tuple[int, ...], tags: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the rows of slots or pages, each of this shape, and their tags, so many each; returns both."""
    dtypes = (torch.float32,) if state_kind(spec) == "fold" else (torch.float32, torch.bfloat16)
    count = None
    for name, x, accepted, inner in (("rows", rows, dtypes, shape), ("positions", positions, (torch.int32,), (tags,))):
        check_memory(name, x, fake=True)
        check_dtype(name, x, accepted)
        check_shape(name, x, (count, *inner))
        check_device(name, x, rows.device)
        check_dense(name, x, "slot")
        count = x.shape[0]
    if positions.shape[0] > 1 and positions.stride(0) > INT32_MAX:
        raise ValueError(f"positions must have slots less than 2**31 elements apart, got {positions.stride(0)}")
    check_apart((Place("rows", rows, written=True), Place("positions", positions, written=True)))
    return rows, positions


def history_start(spec: CompressorSpec, position: int) -> int:
    """First position whose state row a step starting at `position` reads; `position` itself when it reads none."""
    if state_kind(spec) == "fold":
        return position - 1 if position % spec.ratio else position
    window = position // spec.ratio
    return max(window - int(spec.overlap), 0) * spec.ratio


def carry_shape(spec: CompressorSpec, position: int | None = None) -> tuple[int, int]:
    """Rows, and numbers in each, of what a step that starts at `position` reads; without a position the most that any reads."""
    kind, ratio, inside = state_kind(spec), spec.ratio, position is None or position % spec.ratio > 0
    if kind == "fold":
        return int(inside), 3 * spec.head_dim
    own = (ratio - 1) * inside  # of the window that the step begins in
    return (ratio + 2 * own if position != 0 else 0) if spec.overlap else own, 2 * spec.head_dim


def carry_bytes(spec: CompressorSpec, position: int | None = None, *, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of what a step that starts at `position` needs of all tokens before it (`kvfold.parallel.Carry`).

    It is what a GPU sends to the one that goes on with a sequence: V4's ratio 128 needs 6 KB, or nothing where `position`
    begins a window.

    Args:
        spec: the compressor. Without a gate it needs nothing.
        position: of the first token of the step; None for the most that any needs.
        dtype: that of the `FoldState`: bf16 or fp32 for input rows, fp32 for fold rows.

    Raises:
        TypeError, ValueError: naming the argument; `UnsupportedError` for fold rows in bf16.
    """
    check_spec("spec", spec)
    if position is not None:
        check_int("position", position, 0, MOST_POSITIONS)
    if not spec.gate:
        return 0
    check_kept(spec, dtype)
    return math.prod(carry_shape(spec, position)) * dtype.itemsize


def ring_of(spec: CompressorSpec, max_new_tokens: int) -> int:
    """`FoldState.ring`."""
    return max_new_tokens + 1 if state_kind(spec) == "fold" else -(-max_new_tokens // spec.ratio)


def places_of(spec: CompressorSpec, ring: int) -> tuple[int, int]:
    """`FoldState.places`: two for each of the windows of which a step reads rows, or which it can begin, whichever are more."""
    if state_kind(spec) == "fold":
        return 0, 0
    return 2 * max(ring, 2) * spec.overlap, 2 * ring
