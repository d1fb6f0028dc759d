"""`ScaledWeight`: a projection's weight as FP8 codes and scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..contract import SCALE_BLOCK


class ScaledWeight(NamedTuple):
    """A projection's weight in FP8, as checkpoints have it: e4m3 codes, and a scale for each block of 128 x 128 of them.

    `project_compress` takes it wherever it takes a bf16 weight. Its numbers are `bf16(fp32(code) * scale)`: one product in
    fp32, rounded to the nearest bf16, ties to even. So each result has the bits of the call with `dequantized()`.

    Attributes:
        codes: `torch.float8_e4m3fn [rows, hidden_dim]`, contiguous: a checkpoint's `weight`. 0x7F and 0xFF are NaN.
        scales: fp32 `[ceil(rows / 128), ceil(hidden_dim / 128)]`, contiguous: a checkpoint's `weight_scale_inv` or `scale`.
            Convert e8m0 by `scale.float()` once, at load. Any fp32 values.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """The weight's numbers: bf16 `[rows, hidden_dim]`, a new tensor."""
        return (self.codes.float() * of_each(self.scales, *self.codes.shape)).bfloat16()

    def split(self, rows: Sequence[int]) -> tuple[ScaledWeight, ...]:
        """Views of `rows[0]` rows, then `rows[1]`, and so on.

        Raises:
            ValueError: if a part other than the last is not a multiple of 128 rows, which would cut a block; or if the parts
                do not add up to all rows.
        """
        if sum(rows) != len(self.codes) or any(count % SCALE_BLOCK for count in rows[:-1]):
            raise ValueError(
                f"rows must be {len(self.codes)} in all, and multiples of {SCALE_BLOCK} but for the last, got {list(rows)}"
            )
        blocks = [blocks_of(count) for count in rows]
        return tuple(map(ScaledWeight, self.codes.split(list(rows)), self.scales.split(blocks)))


Weight = torch.Tensor | ScaledWeight


def of_each(scales: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """The scale of each number of a weight `[rows, width]`."""
    return scales.repeat_interleave(SCALE_BLOCK, 0)[:rows].repeat_interleave(SCALE_BLOCK, 1)[:, :width]


def blocks_of(count: int) -> int:
    """Blocks of 128 that so many rows or numbers begin."""
    return -(-count // SCALE_BLOCK)


def tensors_of(name: str, weight: Weight) -> tuple[tuple[str, torch.Tensor], ...]:
    """The tensors of a weight, with the names that errors have for them."""
    if isinstance(weight, ScaledWeight):
        return (f"{name}.codes", weight.codes), (f"{name}.scales", weight.scales)
    return ((name, weight),)
