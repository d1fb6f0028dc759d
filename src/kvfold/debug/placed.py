"""What `check` finds of a `store` without a plan: its rows one by one, in each of its caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from .call import Call
from .compare import Difference
from .records import record_differences
from .refusals import Refusal


def examine_placed(call: Call, got: Call) -> tuple[list[Difference], int, list[Refusal], list[Refusal], int]:
    """What differs, how many rows were stored, what is refused and undefined, and how many refusals torch counts.

    got: the call as it was made on copies.
    """
    found, want, p = [], call.on_copies(None, "torch"), call.placed
    refusals = list(_refusals(call))
    kept = torch.ones(len(p.rows), dtype=torch.bool, device=call.device) & (p.slots >= 0)
    kept[[r.row for r in refusals]] = False
    stored = int(kept.sum())
    for i, (c, mine, theirs) in enumerate(zip(call.compressors, got.compressors, want.compressors, strict=True)):
        name = f"{_name(i)}, " if len(call.compressors) > 1 else ""
        # A row that the other cache is too small for is refused, and stored here all the same.
        here = ((p.slots >= 0) & (p.slots < c.cache.num_slots) & _turned(call)).nonzero()[:, 0]
        slots = p.slots[here].long()

        def owner(j: int, here: Tensor = here, slots: Tensor = slots, name: str = name) -> tuple[int, int, str]:
            return -1, -1, f"{name}row {int(here[j])}, slot {int(slots[j])}"

        positions = slots if p.positions is None else p.positions[here].long()
        differences = record_differences(c, mine.cache, theirs.cache, p.rows[here].float(), slots, positions, owner)
        found += [d if d.where.startswith(name) else replace(d, where=name + d.where) for d in differences]
    return found, stored, refusals, list(_undefined(p.slots)), int(want.errors)


def _name(i: int) -> str:
    return "cache" if i == 0 else f"also[{i - 1}]"


def _turned(call: Call) -> Tensor:
    """Whether there is a rotation for the position of each row."""
    p = call.placed
    if not p.spec.rope_dim:
        return torch.ones_like(p.slots, dtype=torch.bool)
    return (p.positions >= 0) & (p.positions < len(p.rope))


def _refusals(call: Call) -> Iterator[Refusal]:
    """One for each row that is refused, by the rules of `store`."""
    p = call.placed
    sizes = [cache.num_slots for cache in p.caches]
    turned, slots = _turned(call), p.slots
    for row in ((slots >= 0) & (~turned | (slots >= min(sizes)))).nonzero()[:, 0].tolist():
        slot = int(slots[row])
        if not turned[row]:
            position = int(p.positions[row])
            why = "below 0" if position < 0 else f"and rope has {len(p.rope)} positions"
            yield Refusal(-1, -1, f"positions[{row}] is {position}, {why}", row=row)
        else:
            i = next(i for i, size in enumerate(sizes) if slot >= size)
            yield Refusal(-1, -1, f"slots[{row}] is {slot}, and {_name(i)} has {sizes[i]} slots", row=row)


def _undefined(slots: Tensor) -> Iterator[Refusal]:
    """All rows of a slot but the first."""
    first: dict[int, int] = {}
    for row, slot in enumerate(slots.tolist()):
        other = first.setdefault(slot, row)
        if slot >= 0 and other != row:
            yield Refusal(-1, -1, f"cache slot {slot} is also that of row {other}", counted=False, row=row)
