"""`Told`: how an engine's plans are told of a step, where its numbers are not as kvfold would have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Told(NamedTuple):
    """The numbers that `StepPlan.build` gets.

    Attributes:
        totals: lengths are those after the step, `seq_lens`.
        wide: numbers are int64.
        apart: so many elements from one number, or row of a table, to the next, beyond what they take.
        before: rows of kv_score before those of the first sequence.
        reserved: -1 for entries one behind the other; else so many free places before those of each sequence, by `cu_rows`.
        null: what stands for no page and no slot: -1, or 0, which is then nobody's.
    """

    totals: bool = False
    wide: bool = False
    apart: int = 0
    before: int = 0
    reserved: int = -1
    null: int = -1

    def numbers(self, values: Sequence, device: torch.device | str) -> Tensor:
        """Numbers `[n]` or a table `[n, m]`, as the engine keeps them."""
        x = torch.tensor(values, dtype=torch.int64 if self.wide else torch.int32, device=device)
        if not self.apart:
            return x
        inner = x.shape[1] if x.dim() == 2 else 1
        room = torch.full((len(x), inner + self.apart), 1 << 20, dtype=x.dtype, device=device)  # of the others
        room[:, :inner] = x.view(len(x), inner)
        return room[:, :inner] if x.dim() == 2 else room[:, 0]


PLAIN = Told()
