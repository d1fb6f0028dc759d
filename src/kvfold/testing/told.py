"""`Told`: in which form an engine gives a step's lengths, slots and pages to its plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Told(NamedTuple):
    """The form of the tensors that `StepPlan.build` gets.

    Attributes:
        totals: whether lengths are those after the step, `seq_lens`.
        wide: whether tensors are int64.
        apart: unused elements after each number, or after each row of a table.
        before: rows of kv_score before those of the first sequence.
        reserved: -1 for packed entries; else `cu_rows`, with so many free places before the entries of each sequence.
        null: the number that means no page and no slot: -1, or 0, which then belongs to nobody.
    """

    totals: bool = False
    wide: bool = False
    apart: int = 0
    before: int = 0
    reserved: int = -1
    null: int = -1

    def numbers(self, values: Sequence, device: torch.device | str) -> Tensor:
        """A tensor `[n]` or a table `[n, m]` of these values, as the engine keeps it."""
        x = torch.tensor(values, dtype=torch.int64 if self.wide else torch.int32, device=device)
        if not self.apart:
            return x
        inner = x.shape[1] if x.dim() == 2 else 1
        room = torch.full((len(x), inner + self.apart), 1 << 20, dtype=x.dtype, device=device)  # of the others
        room[:, :inner] = x.view(len(x), inner)
        return room[:, :inner] if x.dim() == 2 else room[:, 0]


PLAIN = Told()
