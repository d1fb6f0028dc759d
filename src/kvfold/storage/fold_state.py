"""`FoldState`: what a sequence must keep between steps, addressed by absolute position."""

from __future__ import annotations

import torch

from ..arguments.checks import (
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_memory,
    check_shape,
    check_tensor,
    usable_device,
)
from ..arguments.overlap import Place, check_apart
from ..contract import INT32_MAX
from ..spec import CompressorSpec, check_spec
from .remembered import RememberingState, check_made

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

    Attributes:
        rows: `fold`: fp32 `[num_slots, ring + history, 3, head_dim]`, the running maximum, sum of weights and weighted sum
            after the token; `rows`: fp32 or bf16 `[num_slots, ring + history, 2 * channels]`, the `kv_score` row as it came.
        positions: int32 `[num_slots, ring + history]`, the position that each row stands for, -1 for none.
        ring, history: position x lives in row `x % ring`, or in the spare row `ring + x % history` when its home was
            being read by the very step that wrote it.
        max_new_tokens: a step of up to this many tokens can be rewound to any position inside it.

    Copying `rows[slot]` and `positions[slot]` moves a sequence to another slot, state or machine.
    """

    kind: str
    ring: int
    history: int

    def __init__(self, spec: CompressorSpec, rows: torch.Tensor, positions: torch.Tensor, max_new_tokens: int) -> None:
        """Wraps existing tensors; see `allocate` for the usual way. `positions` must be -1 where a row holds nothing.

        Raises:
            TypeError, ValueError: naming the argument whose type, shape, dtype, device or stride is wrong, or which shares
                memory with the other.
        """
        self.spec, self.rows, self.positions, self.max_new_tokens = spec, rows, positions, max_new_tokens
        self._forget()
        self._validate()

    def _check(self) -> None:
        spec = self.spec
        check_spec("spec", spec)
        check_int("max_new_tokens", self.max_new_tokens, 1, 1 << 20)
        self.kind = state_kind(spec)
        self.ring, self.history = ring_and_history(spec, self.max_new_tokens)
        self._tensors = check_rows(spec, self.rows, self.positions, (self.ring + self.history, *_row_shape(spec)))
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
    ) -> FoldState:
        """An empty state.

        Args:
            num_slots: how many sequences it can hold.
            max_new_tokens: longest step that must be rewindable to any position inside it (drafts + 1). Longer steps
                are fine; they can be rewound to their start and to any of their last `max_new_tokens` positions.
            dtype: of the kept input rows, for specs that keep them (`kind == "rows"`): fp32 takes bf16 and fp32
                `kv_score`, both exactly; bf16 takes bf16 only, in half the memory. Fold rows are always fp32.
        """
        check_spec("spec", spec)
        check_int("num_slots", num_slots, 0, INT32_MAX)
        check_int("max_new_tokens", max_new_tokens, 1, 1 << 20)
        shape = num_slots, sum(ring_and_history(spec, max_new_tokens)), *_row_shape(spec)
        return cls(spec, *empty_rows(spec, shape, dtype, device), max_new_tokens)

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
        """Makes these slots empty: a step that needs a row of a former owner is refused then.

        No slot has to be forgotten before its next owner starts at position 0, or anywhere by `restore`. Forget it where an
        owner may start elsewhere by mistake: rows are known by their positions, and not by whose they are. Does not
        synchronize with the host, so it can be captured in a CUDA graph.

        Args:
            slots: int32 or int64 `[n]`, on the device of the state. Those outside of the state, -1 among them, are passed over.

        Raises:
            TypeError, ValueError: naming `slots`.
        """
        check_made("state", self, FoldState)
        check_memory("slots", slots)
        check_dtype("slots", slots, (torch.int32, torch.int64))
        check_shape("slots", slots, (None,))
        check_device("slots", slots, self.device)
        with torch.inference_mode():
            known = torch.where((slots >= 0) & (slots < self.num_slots), slots.long(), self.num_slots)
            gone = torch.zeros(self.num_slots + 1, dtype=torch.bool, device=self.device).index_fill_(0, known, True)
            self.positions.masked_fill_(gone[:-1, None], -1)

    def history_of(self, position: int) -> range:
        """The positions whose rows a step starting at `position` reads; what a prefix cache must keep to resume there."""
        check_made("state", self, FoldState)
        check_int("position", position, 0, INT32_MAX)
        return range(history_start(self.spec, position), position)


def _row_shape(spec: CompressorSpec) -> tuple[int, ...]:
    return (3, spec.head_dim) if state_kind(spec) == "fold" else (2 * spec.channels,)


def empty_rows(
    spec: CompressorSpec, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of slots or pages that hold nothing, `shape` in all, and their tags; `dtype` is that of input rows."""
    check_float("dtype", dtype)
    device = usable_device("device", device)
    dtype = torch.float32 if state_kind(spec) == "fold" else dtype
    return torch.zeros(shape, dtype=dtype, device=device), torch.full(shape[:2], -1, dtype=torch.int32, device=device)


def check_rows(
    spec: CompressorSpec, rows: torch.Tensor, positions: torch.Tensor, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the rows of slots or pages, each of this shape, and their tags; returns both."""
    dtypes = (torch.float32,) if state_kind(spec) == "fold" else (torch.float32, torch.bfloat16)
    device = getattr(rows, "device", None)
    check_tensor("rows", rows, (None, *shape), dtypes, device, fake=True)
    check_tensor("positions", positions, (rows.shape[0], shape[0]), (torch.int32,), device, fake=True)
    check_apart((Place("rows", rows, written=True), Place("positions", positions, written=True)))
    return rows, positions


def history_start(spec: CompressorSpec, position: int) -> int:
    """First position whose state row a step starting at `position` reads; `position` itself when it reads none."""
    if state_kind(spec) == "fold":
        return position - 1 if position % spec.ratio else position
    window = position // spec.ratio
    return max(window - int(spec.overlap), 0) * spec.ratio


def ring_and_history(spec: CompressorSpec, max_new_tokens: int) -> tuple[int, int]:
    if state_kind(spec) == "fold":
        return max_new_tokens + 1, 1
    history = 1 << (spec.window_rows - 1).bit_length()
    # A multiple of `history`, so that the rows of one history never share a spare row.
    return -(-(spec.window_rows - 1 + max_new_tokens) // history) * history, history
