"""The rounds of a step: fold the last tokens alone, send what the next rank needs, and put what came where a step finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..compress import compress
from ..storage.fold_state import FoldState
from ..storage.step import Compressor
from .carry import Carry, put_carry, take_carry
from .message import carries_in, message_bytes
from .plan import ParallelPlan, Round, Sent, Spots
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


def exchange(parts: Sequence[Part], plan: ParallelPlan, transport: Transport, how: How) -> None:
    """All carries into the main scratch states of these compressors, which have a state each."""
    if len(plan.first.slots):
        for c, scratch in parts:
            carry = take_carry(c.state, plan.first_sequences, plan.first.positions)
            _put(scratch, plan.first, carry, plan.first_passes_on)
    for number, each in enumerate(plan.rounds):
        _fold_tails(parts, each, how)
        sent, received = _parcels(each.sent, parts), _parcels(each.received, parts)
        for one, (_, carries) in zip(each.sent, sent, strict=True):
            for part, carry in zip(parts, carries, strict=True):
                take_carry(part.scratch.tail, *one.spots, out=carry)
        transport.exchange(
            [Parcel(one.message.target, data) for one, (data, _) in zip(each.sent, sent, strict=True)],
            [Parcel(one.message.source, data) for one, (data, _) in zip(each.received, received, strict=True)],
            f"the carries of round {number}",
        )
        for one, (_, carries) in zip(each.received, received, strict=True):
            for part, carry in zip(parts, carries, strict=True):
                _put(part.scratch, one.spots, carry, one.passes_on)


def _put(scratch: Scratch, spots: Spots, carry: Carry, passes_on: bool) -> None:
    put_carry(scratch.main, *spots, carry)
    if passes_on:
        put_carry(scratch.tail, *spots, carry)


def _fold_tails(parts: Sequence[Part], each: Round, how: How) -> None:
    if each.tail is None:
        return
    step, rows, blank = each.tail
    for c, scratch in parts:
        if len(blank.slots):
            # The first entry of such a step would be wrong; nobody keeps it, and no carry depends on it.
            nothing = Carry.empty(scratch.tail, len(blank.slots), inside=False)
            put_carry(scratch.tail, *blank, nothing._replace(positions=blank.positions))
        given = c.kv_score
        tokens = tuple(x[rows] for x in given) if isinstance(given, tuple) else given[rows]
        compress(
            tokens,
            step,
            scratch.tail,
            None,
            spec=c.spec,
            ape=c.ape,
            norm_weight=None,
            rope=None,
            **how._asdict(),
        )


def _parcels(messages: Sequence[Sent], parts: Sequence[Part]) -> list[tuple[torch.Tensor, list[Carry]]]:
    """Of each message one buffer, and the carries of all compressors in it."""
    states, found = [part.scratch.tail for part in parts], []
    for one in messages:
        count = len(one.spots.slots)
        data = torch.zeros(message_bytes(states, count, one.inside), dtype=torch.uint8, device=states[0].device)
        found.append((data, carries_in(data, states, count, one.inside)))
    return found
