"""`Spots`: where in a `FoldState` carries are put, and found again. Made once for a plan: moving them is few launches."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.host import on_device


class Spots(NamedTuple):
    """The homes of carries of n sequences, in any state with as many rows a slot.

    slots: int64 `[n]`. positions: int32 `[n]`, where steps go on. rows: int64 `[n, r]`, the row in its slot of each row of a
    carry; row_slots: those slots. places: int64 `[n, t]`, the tags in its slot, and place_slots; tags: int32, what they say
    then. all_tags: int32 `[n, P]`, what all tags of the slot say then. none: int32 `[n, 1]` of -1.

    What would follow from others is here as well, as indices of two shapes, or a number, would be one launch more each.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    row_slots: torch.Tensor
    rows: torch.Tensor
    place_slots: torch.Tensor
    places: torch.Tensor
    tags: torch.Tensor
    all_tags: torch.Tensor
    none: torch.Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> Spots:
        """Of spots on the CPU."""
        return Spots(*(on_device(x, device) for x in self))


def parts_of(spec: CompressorSpec, rows: int) -> list[tuple[str, int, int]]:
    """What the rows of a carry of input rows are, as far as it has any: of which, from where on, how many."""
    ratio, inner = spec.ratio, spec.ratio - 1
    parts = [("before", 0, ratio), ("lo", ratio, inner), ("hi", ratio + inner, inner)] if spec.overlap else [("hi", 0, inner)]
    return [part for part in parts if part[1] + part[2] <= rows]


def spots_of(state: FoldState, slots: torch.Tensor, positions: torch.Tensor, count: int) -> Spots:
    """Homes for carries of `count` rows each. slots, positions: integers `[n]`, on any one device."""
    slot, start, ratio = slots.long()[:, None], positions.long(), state.spec.ratio
    window, last, within = start // ratio, start - 1, start % ratio > 0
    # Of each part whether a step reads it, its place, what its tag says, and its first row.
    if state.kind == "fold":
        home = last % state.ring
        parts, found = [("row", 0, count)], {"row": (within, home, last, home)}
    else:
        lo, hi = state.places
        parts, home = parts_of(state.spec, count), window % hi
        found = {"hi": (within, lo + home, last, lo * ratio + home * max(ratio - 1, 1))}
        if lo:
            home, left = window % lo, (window - 1) % lo
            found |= {"lo": (within, home, last, home * ratio)}
            found |= {"before": (window > 0, left, window * ratio - 1, left * ratio)}
    if not parts:
        parts = [("hi", 0, 0)]
    some = [(found[name][0] & (n > 0), *found[name][1:]) for name, _, n in parts]
    reads, places, tags = (torch.stack([one[i] for one in some], dim=1) for i in range(3))
    rows = [found[name][3][:, None] + torch.arange(n, device=slot.device) for name, _, n in parts]
    # A part that no step reads says again what one says that is read, or that there is nothing.
    first = reads.int().argmax(1, keepdim=True)
    places = torch.where(reads, places, places.gather(1, first))
    tags = torch.where(reads, tags, torch.where(reads.any(1, keepdim=True), tags.gather(1, first), -1))
    tags, positions = tags.int(), positions.int()
    all_tags = tags.new_full((len(positions), state.positions.shape[1]), -1).scatter_(1, places, tags)
    at, none = torch.cat(rows, dim=1), torch.full_like(positions, -1)[:, None]
    row_slots, place_slots = (slot.expand_as(x).contiguous() for x in (at, places))
    return Spots(slot[:, 0], positions, row_slots, at, place_slots, places, tags, all_tags, none)


def take_at(state: FoldState, spots: Spots, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """Writes the carries at these spots, as `Carry` has them. It is for states in which nothing else can hold them."""
    into = rows.view(*spots.rows.shape, *state.rows.shape[2:])
    torch.ops.aten.index.Tensor_out(state.rows, [spots.row_slots, spots.rows], out=into)  # `copy_` would be one launch more
    same = state.positions[spots.place_slots, spots.places] == spots.tags
    held = same[:, 0] if same.shape[1] == 1 else same.all(1)
    torch.where(held, spots.positions, spots.none[:, 0], out=positions)


def put_at(state: FoldState, spots: Spots, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """`put_carry` at these spots, whose slots are all inside of the state."""
    state.rows[spots.row_slots, spots.rows] = rows.view(*spots.rows.shape, *state.rows.shape[2:])
    fits = (positions == spots.positions)[:, None]
    state.positions[spots.slots] = torch.where(fits, spots.all_tags, spots.none)


def pretend_at(state: FoldState, spots: Spots) -> None:
    """Puts carries of whatever rows are there: for steps of which nobody keeps what depends on these."""
    state.positions[spots.slots] = spots.all_tags
