"""Work items and state rows as the torch backend reads them: columns, and the rules that say where a position's row is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.step import PlanData


@dataclass
class Items:
    """The live rows of `plan.items`, as int64 columns."""

    window: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    token: torch.Tensor
    slot: torch.Tensor
    entry: torch.Tensor
    sequence: torch.Tensor

    @classmethod
    def of(cls, plan: PlanData) -> Items:
        live = plan.items[: int(plan.num_items)].long()
        return cls(*live.unbind(1)[:7])

    def new_tokens(self, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The item of each new token, and its position."""
        position = self.window[:, None] * ratio + torch.arange(ratio, device=self.window.device)
        item, place = ((position >= self.start[:, None]) & (position < self.end[:, None])).nonzero(as_tuple=True)
        return item, position[item, place]

    def __getitem__(self, mask: torch.Tensor) -> Items:
        return Items(*(column[mask] for column in vars(self).values()))


class Flat:
    """Rows `[slots, rows per slot, ...]`, wherever the slots lie, by one number: `slot * rows per slot + row`."""

    def __init__(self, pool: torch.Tensor) -> None:
        self.pool = pool

    def __getitem__(self, number: torch.Tensor) -> torch.Tensor:
        return self.pool[self._place(number)]

    def __setitem__(self, number: torch.Tensor, rows: torch.Tensor) -> None:
        self.pool[self._place(number)] = rows

    def _place(self, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return number // self.pool.shape[1], number % self.pool.shape[1]


class StateRows:
    """The rows and tags of a `FoldState`, flat, and the rules of DESIGN.md that say where a position's row is."""

    def __init__(self, state: FoldState) -> None:
        self.ring, self.history = state.ring, state.history
        self.per_slot = self.ring + self.history
        self.data, self.tags = Flat(state.rows), Flat(state.positions)

    def find(self, slot: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Flat row that holds `position`, or -1."""
        base = slot * self.per_slot
        home, spare = base + position % self.ring, base + self.ring + position % self.history
        found = torch.where(self.tags[spare] == position, spare, -1)
        return torch.where(self.tags[home] == position, home, found)

    def place(self, slot: torch.Tensor, position: torch.Tensor, h0: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Flat row to write `position` to in a step whose history is `[h0, start)`."""
        base = slot * self.per_slot
        home = base + position % self.ring
        read = (self.tags[home] >= h0) & (self.tags[home] < start)
        return torch.where(read, base + self.ring + position % self.history, home)

    def retire(self, slot: torch.Tensor, h0: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> None:
        """Frees spare rows that are of another timeline or out of the ring; one call per sequence, before new tags."""
        spare = (slot * self.per_slot + self.ring)[:, None] + torch.arange(self.history, device=slot.device)
        tags = self.tags[spare]
        stale = (tags >= start[:, None]) | ((tags < (end - self.ring)[:, None]) & (tags < h0[:, None]))
        self.tags[spare] = torch.where(stale, -1, tags)


def history_starts(spec: CompressorSpec, kind: str, start: torch.Tensor) -> torch.Tensor:
    """`state.history_start` for a tensor of positions."""
    if kind == "fold":
        return torch.where(start % spec.ratio == 0, start, start - 1)
    return (start // spec.ratio - int(spec.overlap)).clamp(min=0) * spec.ratio
