"""All ranks get all entries and states of a step: one all-gather of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..storage.fold_state import FoldState
from ..storage.step import Compressor
from .carry import Carry
from .message import ALIGNMENT, carries_in, message_bytes, padded
from .plan import ParallelPlan
from .records import read_records, record_bytes, write_records
from .spots import put_at, take_at
from .transport import Transport


class Bundle(NamedTuple):
    """What one rank gives, in views of one buffer. errors: int32 `[1]`. records: of each compressor with a cache, uint8
    `[entries, bytes]`. carries: of each with a state, at the ends of sequences. Both have room for as many as any rank has."""

    errors: torch.Tensor
    records: list[torch.Tensor]
    carries: list[Carry]

    @classmethod
    def of(cls, data: torch.Tensor, compressors: Sequence[Compressor], plan: ParallelPlan) -> Bundle:
        """Views of uint8 `[bundle_bytes]`."""
        entries, ends = _most(plan)
        errors, first, records = data[:4].view(torch.int32), ALIGNMENT, []
        for c in _with_cache(compressors):
            size = entries * record_bytes(c.cache)
            records.append(data[first : first + size].view(entries, record_bytes(c.cache)))
            first += padded(size)
        states = [c.state for c in _with_state(compressors)]
        return cls(errors, records, carries_in(data[first:], states, ends, plan.ends_inside))


def bundle_bytes(compressors: Sequence[Compressor], plan: ParallelPlan) -> int:
    """Bytes that each rank sends in a `gather`."""
    entries, ends = _most(plan)
    records = sum(padded(entries * record_bytes(c.cache)) for c in _with_cache(compressors))
    return ALIGNMENT + records + message_bytes([c.state for c in _with_state(compressors)], ends, plan.ends_inside)


@torch.inference_mode()
def gather(compressors: Sequence[Compressor], plan: ParallelPlan, transport: Transport) -> None:
    data = torch.zeros(bundle_bytes(compressors, plan), dtype=torch.uint8, device=plan.device)
    mine = Bundle.of(data, compressors, plan)
    mine.errors.copy_(plan.errors)
    for c, records in zip(_with_cache(compressors), mine.records, strict=True):
        read_records(c.cache, plan.entries[plan.rank], records[: len(plan.entries[plan.rank])])
    for c, (rows, positions) in zip(_with_state(compressors), mine.carries, strict=True):
        spots = plan.state_spots(c.state)[plan.rank]
        take_at(c.state, spots, rows[: len(spots)], positions[: len(spots)])
    for rank, theirs in enumerate(transport.gather(data, "entries and states")):
        if rank == plan.rank:
            continue
        bundle = Bundle.of(theirs, compressors, plan)
        plan.errors.copy_(torch.maximum(plan.errors, bundle.errors))
        for c, records in zip(_with_cache(compressors), bundle.records, strict=True):
            write_records(c.cache, plan.entries[rank], records[: len(plan.entries[rank])])
        for c, carry in zip(_with_state(compressors), bundle.carries, strict=True):
            put_ends(c.state, plan, rank, Carry(*(x[: len(plan.ends[rank].slots)] for x in carry)))


def put_ends(state: FoldState, plan: ParallelPlan, rank: int, carry: Carry) -> None:
    """The states of sequences that end on a rank, from their carries; of those without one nothing is left."""
    spots, over = plan.state_spots(state)[rank], plan.ends[rank].over
    if len(spots):
        put_at(state, spots, *carry)
    if len(over):
        state.positions.index_fill_(0, over, -1)


def _most(plan: ParallelPlan) -> tuple[int, int]:
    """The most entries, and carries at ends of sequences, that any rank has."""
    return max(map(len, plan.entries)), max(len(ends.slots) for ends in plan.ends)


def _with_cache(compressors: Sequence[Compressor]) -> list[Compressor]:
    return [c for c in compressors if c.cache is not None]


def _with_state(compressors: Sequence[Compressor]) -> list[Compressor]:
    return [c for c in compressors if c.state is not None]
