"""The rounds of a step: fold the last tokens alone, send what the next rank needs, and put what came where a step finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..compress import compress
from ..storage.fold_state import FoldState
from ..storage.step import Compressor
from .carry import Carry, take_carry
from .message import carries_in, message_bytes
from .plan import ParallelPlan, Round
from .spots import Spots, pretend_at, put_at, take_at
from .transport import Parcel, Transport


class Scratch(NamedTuple):
    """States with a slot for each segment of a rank. tail: of the tokens folded first. main: of all of them."""

    tail: FoldState
    main: FoldState

    @classmethod
    def like(cls, state: FoldState, count: int) -> Scratch:
        how = {"dtype": state.rows.dtype, "device": state.device, "round_inputs": state.round_inputs}
        return cls(*(FoldState.allocate(state.spec, count, 1, **how) for _ in range(2)))


class Part(NamedTuple):
    """A compressor, and its scratch."""

    c: Compressor
    scratch: Scratch


class How(NamedTuple):
    """Options of `compress`."""

    backend: str | None
    pdl: bool | None


def exchange(parts: Sequence[Part], plan: ParallelPlan, transport: Transport, how: How) -> list[Carry]:
    """All carries into the main scratch states of these compressors, which have a state each.

    Returns of each compressor the carries at the ends of sequences that end here, as `plan.ends` has them.
    """
    if plan.first:
        for c, scratch in parts:
            carry = take_carry(c.state, plan.first_slots, plan.first_spots.positions)
            _put(scratch, plan.first_spots, carry, plan.first_passes_on)
    states, count = [part.scratch.tail for part in parts], len(plan.ends[plan.rank].slots)
    ends = carries_in(_buffer(states, count, plan.ends_inside), states, count, plan.ends_inside)
    for number, each in enumerate(plan.rounds):
        _fold_tails(parts, each, how)
        if len(each.ends.spots):
            for state, (rows, positions) in zip(states, ends, strict=True):
                take_at(state, each.ends.spots, rows[each.ends.among], positions[each.ends.among])
        sent, received = ([(one, _buffer(states, len(one.spots), one.inside)) for one in some] for some in each[2:])
        for one, data in sent:
            for state, carry in zip(states, carries_in(data, states, len(one.spots), one.inside), strict=True):
                take_at(state, one.spots, *carry)
        transport.exchange(
            [Parcel(one.message.target, data) for one, data in sent],
            [Parcel(one.message.source, data) for one, data in received],
            f"the carries of round {number}",
        )
        for one, data in received:
            for part, carry in zip(parts, carries_in(data, states, len(one.spots), one.inside), strict=True):
                _put(part.scratch, one.spots, carry, one.passes_on)
    return ends


def _put(scratch: Scratch, spots: Spots, carry: Carry, passes_on: bool) -> None:
    put_at(scratch.main, spots, *carry)
    if passes_on:
        put_at(scratch.tail, spots, *carry)


def _fold_tails(parts: Sequence[Part], each: Round, how: How) -> None:
    if each.tail is None:
        return
    step, rows, pretended = each.tail
    for c, scratch in parts:
        if len(pretended):
            pretend_at(scratch.tail, pretended)
        given = c.kv_score
        tokens = tuple(x[rows] for x in given) if isinstance(given, tuple) else given[rows]
        weights = {"spec": c.spec, "ape": c.ape, "norm_weight": None, "rope": None}
        compress(tokens, step, scratch.tail, None, **weights, **how._asdict())


def _buffer(states: Sequence[FoldState], count: int, inside: bool) -> torch.Tensor:
    return torch.zeros(message_bytes(states, count, inside), dtype=torch.uint8, device=states[0].device)
