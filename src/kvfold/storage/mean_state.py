"""`MeanState`: SGLang's online pool, one row of maximum, sum and mean for each sequence, used in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..arguments.checks import check_dense, check_float, check_int, check_memory, check_shape, usable_device
from ..contract import INT32_MAX, UnsupportedError
from ..spec import CompressorSpec, check_spec
from .fold_state import MOST_RATIO_OF_ROWS, state_kind
from .remembered import RememberingState, dtype_name

MOST_BANKS = 8  # the longest step that a kernel for short steps takes


class MeanState(RememberingState):
    """The rows that SGLang's online compression keeps, one for each sequence, in its own pool.

    The row of a sequence of n tokens sums up its open window, positions `[n - n % ratio, n)`: per channel the largest score,
    the sum of weights relative to it, and the weighted mean. If n is a multiple of `ratio` there is no open window. Then the
    row is neither read nor written, so a slot needs no clearing between owners. A cleared row (-inf, 0, 0) means no tokens.

    The row does not say how long the sequence is. **A step must start where the last one ended.** A step that starts elsewhere
    inside a window cannot be detected, and makes a wrong entry. So a sequence can be rewound only to the start of a window, and
    a prefix cannot be shared inside one. Nor may a step run twice: not as a warm-up, except over slots that belong to nobody,
    and not by replaying a CUDA graph without new tokens. `FoldState` has none of these limits.

    Banks are for drafts. A step over banks reads the row and does not change it. The row after k new tokens goes to bank k,
    unless that length is a multiple of `ratio`. Such a step can run again. It accepts nothing: before the next step the engine
    copies, over the row, the bank of as many tokens as it accepted. Two states over one pool, with banks and without, serve
    both kinds of steps: `MeanState(spec, pool)` and `MeanState(spec, pool[0])`.

    Entries are within `contract.pooled_bound` of the exact ones, plus a little for each step that goes on inside a window
    (docs/numerics.md). The same cuts of a sequence give the same bits; other cuts do not.

    Attributes:
        rows: fp32 `[num_slots, 3 * head_dim]`, or `[1 + banks, num_slots, 3 * head_dim]`. Mutated by `compress`.
        banks: how many there are, 0 without; also the most new tokens of a step then.
    """

    kind = "mean"
    banks: int

    def __init__(self, spec: CompressorSpec, rows: torch.Tensor) -> None:
        """Wraps an engine's pool; nothing is written.

        Args:
            spec: without overlap and of a ratio above 8: a spec for which a `FoldState` keeps fold rows (`V4_HCA`).
            rows: as above. Each row is contiguous. Slots may lie any distance apart, and banks a whole number of slots. So a
                pool of `(1 + banks) * num_slots` rows becomes `pool.view(1 + banks, num_slots, -1)`.

        Raises:
            TypeError, ValueError: naming the argument; `UnsupportedError` for other specs, and for rows in bf16.
        """
        self.spec, self.rows = spec, rows
        self._forget()
        self._validate()

    def _check(self) -> None:
        spec, rows = self.spec, self.rows
        check_spec("spec", spec)
        if state_kind(spec) != "fold":
            more = f"no overlap and a ratio above {MOST_RATIO_OF_ROWS}"
            raise UnsupportedError(f"spec must have {more} for rows of maximum, sum and mean, got {spec}")
        check_memory("rows", rows, fake=True)
        check_float("rows.dtype", rows.dtype)
        if rows.dtype is not torch.float32:
            why = "whose errors would add up with every token of a window"
            raise UnsupportedError(f"rows must be torch.float32, got {rows.dtype}, {why}")
        if rows.dim() == 3:
            check_shape("rows", rows, (None, None, 3 * spec.head_dim))
            if not 2 <= rows.shape[0] <= 1 + MOST_BANKS:
                raise ValueError(f"rows must have from 1 to {MOST_BANKS} banks behind the first, got {rows.shape[0] - 1}")
        else:
            check_shape("rows", rows, (None, 3 * spec.head_dim))
        self.banks = rows.shape[0] - 1 if rows.dim() == 3 else 0
        check_dense("rows", rows[0] if self.banks else rows, "slot")
        if self.banks and self.num_slots:
            self._check_banks()
        self._tensors = (rows,)
        self._forget_calls()

    def _check_banks(self) -> None:
        step, bank = self.rows.stride(1), self.rows.stride(0)
        if self.num_slots > 1 and (bank % step or bank < self.num_slots * step):
            raise ValueError(f"rows must have banks a whole number of slots apart, and all of them, got strides {(bank, step)}")
        if bank < self.rows.shape[2] or self.bank_step * self.banks > INT32_MAX:
            raise ValueError(f"rows must have banks that do not overlap, less than 2**31 slots apart, got a stride of {bank}")

    @classmethod
    def allocate(
        cls, spec: CompressorSpec, num_slots: int, banks: int = 0, *, device: torch.device | str | None = None
    ) -> MeanState:
        """Rows of no tokens, all cleared, for tests and comparisons; an engine has its own."""
        check_spec("spec", spec)
        check_int("num_slots", num_slots, 0, INT32_MAX)
        check_int("banks", banks, 0, MOST_BANKS)
        shape = (num_slots, 3 * spec.head_dim)
        rows = torch.zeros((1 + banks, *shape) if banks else shape, dtype=torch.float32, device=usable_device("device", device))
        rows[..., : spec.head_dim] = -torch.inf
        return cls(spec, rows)

    def _facts(self) -> Iterator[tuple[str, object]]:
        yield from (("ratio", self.spec.ratio), ("head_dim", self.spec.head_dim), ("num_slots", self.num_slots))
        yield from (("banks", self.banks), ("bytes_per_slot", self.bytes_per_slot))
        yield from (("dtype", dtype_name(self.rows)), ("device", self.device))

    @property
    def num_slots(self) -> int:
        return self.rows.shape[-2]

    @property
    def row_stride(self) -> int:
        """Elements from slot to slot. For a single slot torch's stride may be anything, so its banks count as slots."""
        if self.num_slots > 1:
            return self.rows.stride(-2)
        return self.rows.stride(0) if self.banks else 0

    @property
    def bank_step(self) -> int:
        """Slots from bank to bank."""
        return self.rows.stride(0) // max(self.row_stride, 1) if self.banks else 0

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def bytes_per_slot(self) -> int:
        """Bytes that one sequence occupies, with its banks."""
        return (1 + self.banks) * 3 * self.spec.head_dim * 4
