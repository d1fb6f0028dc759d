"""Work items and state rows as the torch backend reads them: columns, and the rules that say where a position's row is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import FoldState, history_start
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
    """Rows `[slots, rows per slot, ...]`, wherever slots lie, addressed by one number: `slot * rows per slot + row`."""

    def __init__(self, pool: torch.Tensor) -> None:
        self.pool = pool

    def __getitem__(self, number: torch.Tensor) -> torch.Tensor:
        return self.pool[self._place(number)]

    def __setitem__(self, number: torch.Tensor, rows: torch.Tensor) -> None:
        self.pool[self._place(number)] = rows

    def _place(self, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return number // self.pool.shape[1], number % self.pool.shape[1]


class FoldRows:
    """The fold rows and tags of a `FoldState`, flat, and the rules of DESIGN.md that say where a position's row is."""

    def __init__(self, state: FoldState) -> None:
        self.ring, self.per_slot = state.ring, state.ring + 1
        self.data, self.tags = Flat(state.rows), Flat(state.positions)

    def find(self, slot: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Flat row that holds `position`, or -1."""
        base = slot * self.per_slot
        home, spare = base + position % self.ring, base + self.ring
        found = torch.where(self.tags[spare] == position, spare, -1)
        return torch.where(self.tags[home] == position, home, found)

    def place(self, slot: torch.Tensor, position: torch.Tensor, h0: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Flat row to write `position` to in a step whose history is `[h0, start)`."""
        home = slot * self.per_slot + position % self.ring
        read = (self.tags[home] >= h0) & (self.tags[home] < start)
        return torch.where(read, slot * self.per_slot + self.ring, home)

    def retire(self, slot: torch.Tensor, h0: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> None:
        """Frees spare rows that are of another timeline or out of the ring; one call per sequence, before new tags."""
        spare = slot * self.per_slot + self.ring
        tags = self.tags[spare]
        stale = (tags >= start) | ((tags < end - self.ring) & (tags < h0))
        self.tags[spare] = torch.where(stale, -1, tags)


class Places:
    """The places of one kind of rows in a `FoldState` of input rows: lo rows, or hi and whole ones.

    A place is a number, flat over all slots; -1 is none. first_row, first_tag: those of the first place in a slot. kept: rows
    of a place.
    """

    def __init__(self, state: FoldState, hi: bool) -> None:
        self.ratio, lo = state.spec.ratio, state.places[0]
        self.per_slot, self.rows_per_slot = state.places[hi], state.rows.shape[1]
        self.half, self.first_tag, self.first_row = self.per_slot // 2, lo * hi, lo * self.ratio * hi
        self.kept = self.ratio - hi
        self.data, self.tags, self.tags_per_slot = Flat(state.rows), Flat(state.positions), state.positions.shape[1]

    def homes(self, slot: torch.Tensor, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A window's home, and its other place."""
        base, home = slot * self.per_slot, window % self.per_slot
        return base + home, base + (home + self.half) % self.per_slot

    def tag(self, place: torch.Tensor) -> torch.Tensor:
        """Where the tag of a place is in `tags`."""
        return place // self.per_slot * self.tags_per_slot + self.first_tag + place % self.per_slot

    def row(self, place: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Where the row of a position is in `data`, of a window that is in `place`."""
        first = place // self.per_slot * self.rows_per_slot + self.first_row
        return first + place % self.per_slot * max(self.kept, 1) + position % self.ratio

    def find(self, slot: torch.Tensor, window: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The place that holds a window's rows up to `position` at least, or -1."""
        found = torch.full_like(slot, -1)
        for place in self.homes(slot, window)[::-1]:
            last = self.tags[self.tag(place)]
            found = torch.where((last >= position) & (last < (window + 1) * self.ratio), place, found)
        return found

    def choose(self, slot: torch.Tensor, window: torch.Tensor, *history: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a window that begins in a step goes, and a place to empty, or -1. history: places that the step reads."""
        home, away = self.homes(slot, window)
        taken, spared = (sum((place == read).int() for read in history) > 0 for place in (home, away))
        return torch.where(taken, away, home), torch.where(taken | spared, -1, away)


class StateRows:
    """The input rows and tags of a `FoldState`, and the rules of DESIGN.md that say where those of a window are."""

    def __init__(self, state: FoldState) -> None:
        self.ratio, self.overlap = state.spec.ratio, state.spec.overlap
        self.hi = Places(state, True)
        self.lo = Places(state, False) if self.overlap else None
        self.dtype = state.rows.dtype

    def history(self, slot: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Whether a step from `start` finds all that it reads, and where: lo rows of the window before, lo and hi rows."""
        window, inside, none = start // self.ratio, start % self.ratio > 0, torch.full_like(slot, -1)
        found, held = [none, none, none], torch.ones_like(inside)
        wanted = [(self.hi, window, start - 1, inside)]
        if self.lo is not None:
            wanted = [(self.lo, window - 1, window * self.ratio - 1, window > 0), (self.lo, window, start - 1, inside), *wanted]
        for i, (places, of, last, reads) in enumerate(wanted, 3 - len(wanted)):
            found[i] = torch.where(reads, places.find(slot, of, last), -1)
            held &= ~reads | (found[i] >= 0)
        return held, found


def missing(state: FoldState, slot: int, start: int) -> list[int]:
    """Positions whose row, or half of it, a step from `start` reads but the slot lacks."""
    need = torch.arange(history_start(state.spec, start), start, device=state.device)
    slots = torch.full_like(need, slot)
    if state.kind == "fold":
        return need[FoldRows(state).find(slots, need) < 0].tolist()
    rows, window, last = StateRows(state), need // state.spec.ratio, need.new_tensor(start - 1)
    of_last = window == start // state.spec.ratio
    last = torch.where(of_last, last, (window + 1) * state.spec.ratio - 1)
    gone = of_last & (rows.hi.find(slots, window, last) < 0)
    if rows.lo is not None:
        gone |= rows.lo.find(slots, window, last) < 0
    return need[gone].tolist()


def history_starts(spec: CompressorSpec, kind: str, start: torch.Tensor) -> torch.Tensor:
    """`state.history_start` for a tensor of positions."""
    if kind == "fold":
        return torch.where(start % spec.ratio == 0, start, start - 1)
    return (start // spec.ratio - int(spec.overlap)).clamp(min=0) * spec.ratio
