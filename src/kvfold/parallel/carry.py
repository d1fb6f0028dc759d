"""`Carry`: what a step needs of all tokens before it, as plain tensors to send; taken from a `FoldState` and put into one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..arguments.checks import check_dense, check_device, check_dtype, check_memory, check_shape
from ..backend_torch.items import FoldRows, StateRows
from ..storage.fold_state import FoldState, carry_shape
from ..storage.remembered import check_made
from .spots import parts_of, spots_of


class Carry(NamedTuple):
    """What steps of n sequences read that start at `positions`; `kvfold.carry_bytes` says how large one is.

    rows: `[n, r, width]`. From a `fold` state fp32 `[n, 1, 3 * head_dim]`: the row `(m, l, a)` of the position before. From a
        `rows` state, in its dtype, `[n, r, 2 * head_dim]`, value and score of half rows as they came. With overlap these are
        the `ratio` lo rows of the window before, then the lo rows and the hi rows of the window that the step starts in,
        `ratio - 1` each; without overlap the `ratio - 1` whole rows of that window. Of that window only rows before the
        position count. If every position starts a window, r may be `ratio` with overlap and 0 without.
    positions: int32 `[n]`: where the step starts; -1 if the state did not hold its history.
    """

    rows: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def empty(cls, state: FoldState, count: int, *, inside: bool = True) -> Carry:
        """Zeros of no position, for `count` sequences. inside: whether any may start inside of a window."""
        check_made("state", state, FoldState)
        shape = carry_shape(state.spec, None if inside else state.spec.ratio)
        positions = torch.full((count,), -1, dtype=torch.int32, device=state.device)
        return cls(torch.zeros(count, *shape, dtype=state.rows.dtype, device=state.device), positions)


def take_carry(state: FoldState, slots: torch.Tensor, positions: torch.Tensor, out: Carry | None = None) -> Carry:
    """What steps of these slots read that start at `positions`. Does not synchronize with the host.

    Args:
        slots: int32 or int64 `[n]`. A slot outside the state gives a carry of position -1.
        positions: int32 or int64 `[n]`. If a slot does not hold the history of its position, the carry's position is -1.
        out: mutated if given: the carry that is returned. Rows that no step reads are written too.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then.
    """
    check_made("state", state, FoldState)
    _check_numbers(state, slots, positions)
    out = Carry.empty(state, len(slots)) if out is None else out
    _check_carry("out", state, out, len(slots))
    if len(slots) and state.num_slots:
        with torch.inference_mode():
            _take(state, slots, positions, out)
    return out


def put_carry(state: FoldState, slots: torch.Tensor, positions: torch.Tensor, carry: Carry) -> None:
    """Puts carries into slots, so that steps can start at `positions`. As after `restore`, a slot then holds nothing else.

    A slot whose carry is of another position is emptied: a step that needs its history is refused, and counted in
    `plan.errors`. Does not synchronize with the host.

    Args:
        state: mutated: the rows and tags of the slots.
        slots: int32 or int64 `[n]`, all different. Slots outside the state are ignored.
        positions: int32 or int64 `[n]`.
        carry: of the spec and dtype of `state`.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then.
    """
    check_made("state", state, FoldState)
    _check_numbers(state, slots, positions)
    _check_carry("carry", state, carry, len(slots))
    if len(slots) and state.num_slots:
        with torch.inference_mode():
            _put(state, slots, positions, carry)


def redirect(there: torch.Tensor) -> torch.Tensor:
    """int64 `[n]`: i if `there[i]`, else the first index that is there (0 if none is): writing that again changes nothing."""
    return torch.where(there, torch.arange(len(there), device=there.device), there.int().argmax(0, keepdim=True))


def _take(state: FoldState, slots: torch.Tensor, positions: torch.Tensor, out: Carry) -> None:
    there = (slots >= 0) & (slots < state.num_slots) & (positions >= 0)
    slot, start = torch.where(there, slots, 0).long(), torch.where(there, positions, 0).long()
    begins, count = start % state.spec.ratio == 0, out.rows.shape[1]
    if state.kind == "fold":
        held = FoldRows(state)
        found = held.find(slot, start - 1)
        there &= begins | (found >= 0)
        if count:
            out.rows.copy_(held.data[found.clamp(min=0)].flatten(1)[:, None])
    else:
        held = StateRows(state)
        known, (before, lo, hi) = held.history(slot, start)
        there &= known
        places = {"before": (held.lo, before), "lo": (held.lo, lo), "hi": (held.hi, hi)}
        for name, first, n in parts_of(state.spec, count):
            of, place = places[name]
            at = torch.arange(n, device=slot.device)
            out.rows[:, first : first + n] = of.data[of.row(place.clamp(min=0)[:, None], at)]
    if count < carry_shape(state.spec)[0]:  # it has no room for what the inside of a window needs
        there &= begins
    out.positions.copy_(torch.where(there, start, -1))


def _put(state: FoldState, slots: torch.Tensor, positions: torch.Tensor, carry: Carry) -> None:
    inside = (slots >= 0) & (slots < state.num_slots)
    which = redirect(inside)
    inside, slots, positions = inside[which], torch.where(inside, slots, 0)[which], positions[which]
    found = spots_of(state, slots, positions, carry.rows.shape[1])
    # Where no slot is inside all that is written is what was there.
    state.positions[slots] = torch.where(inside[:, None], -1, state.positions[slots])
    fits = (inside & (carry.positions[which] == positions))[:, None]
    old = state.positions[found.place_slots, found.places]
    state.positions[found.place_slots, found.places] = torch.where(fits, found.tags, old)
    old = state.rows[found.row_slots, found.rows]
    new = carry.rows[which].reshape(old.shape)
    state.rows[found.row_slots, found.rows] = torch.where(inside.view(-1, *[1] * (old.dim() - 1)), new, old)


def _check_numbers(state: FoldState, slots: torch.Tensor, positions: torch.Tensor) -> None:
    for name, x in (("slots", slots), ("positions", positions)):
        check_memory(name, x)
        check_dtype(name, x, (torch.int32, torch.int64))
        check_shape(name, x, (None if name == "slots" else slots.shape[0],))
        check_device(name, x, state.device)


def _check_carry(name: str, state: FoldState, carry: Carry, count: int) -> None:
    if not isinstance(carry, tuple) or len(carry) != 2:
        raise TypeError(f"{name} must be a Carry, got {type(carry).__name__}")
    rows, positions = carry
    for part, x in ((f"{name}.rows", rows), (f"{name}.positions", positions)):
        check_memory(part, x)
        check_device(part, x, state.device)
    check_dtype(f"{name}.rows", rows, (state.rows.dtype,))
    check_dense(f"{name}.rows", rows, "carry")
    check_dtype(f"{name}.positions", positions, (torch.int32,))
    check_shape(f"{name}.positions", positions, (count,))
    most, width = carry_shape(state.spec)
    check_shape(f"{name}.rows", rows, (count, None, width))
    least = carry_shape(state.spec, state.spec.ratio)[0]
    if rows.shape[1] not in (least, most):
        raise ValueError(f"{name}.rows must have {most} rows each, or {least} at begins of windows, got {rows.shape[1]}")
