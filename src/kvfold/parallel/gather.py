"""All ranks get all entries and states of a step: one all-gather of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..storage.step import Compressor
from .carry import Carry, put_carry, take_carry
from .message import ALIGNMENT, carries_in, message_bytes, padded
from .plan import ParallelPlan
from .records import read_records, record_bytes, write_records
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
        entries, ends, inside = _most(plan)
        errors, first, records = data[:4].view(torch.int32), ALIGNMENT, []
        for c in _with_cache(compressors):
            size = entries * record_bytes(c.cache)
            records.append(data[first : first + size].view(entries, record_bytes(c.cache)))
            first += padded(size)
        states = [c.state for c in _with_state(compressors)]
        return cls(errors, records, carries_in(data[first:], states, ends, inside))


def bundle_bytes(compressors: Sequence[Compressor], plan: ParallelPlan) -> int:
    """Bytes that each rank sends in a `gather`."""
    entries, ends, inside = _most(plan)
    records = sum(padded(entries * record_bytes(c.cache)) for c in _with_cache(compressors))
    return ALIGNMENT + records + message_bytes([c.state for c in _with_state(compressors)], ends, inside)


def gather(compressors: Sequence[Compressor], plan: ParallelPlan, transport: Transport) -> None:
    data = torch.zeros(bundle_bytes(compressors, plan), dtype=torch.uint8, device=plan.device)
    mine, own = Bundle.of(data, compressors, plan), plan.owned[plan.rank]
    mine.errors.copy_(plan.errors)
    for c, records in zip(_with_cache(compressors), mine.records, strict=True):
        read_records(c.cache, own.entries, records[: len(own.entries)])
    ends = len(own.ends.slots)
    for c, (rows, positions) in zip(_with_state(compressors), mine.carries, strict=True):
        take_carry(c.state, *own.ends, out=Carry(rows[:ends], positions[:ends]))
    for rank, theirs in enumerate(transport.gather(data, "entries and states")):
        if rank == plan.rank:
            continue
        bundle, owned = Bundle.of(theirs, compressors, plan), plan.owned[rank]
        plan.errors.copy_(torch.maximum(plan.errors, bundle.errors))
        for c, records in zip(_with_cache(compressors), bundle.records, strict=True):
            write_records(c.cache, owned.entries, records[: len(owned.entries)])
        ends = len(owned.ends.slots)
        for c, (rows, positions) in zip(_with_state(compressors), bundle.carries, strict=True):
            put_carry(c.state, *owned.ends, Carry(rows[:ends], positions[:ends]))


def _most(plan: ParallelPlan) -> tuple[int, int, bool]:
    """The most entries and ends of sequences that any rank has, and whether any sequence ends inside of a window."""
    ends = [start + n for start, n in zip(plan.shards.start_pos, plan.shards.lengths, strict=True) if n]
    inside = any(end % plan.ratio for end in ends)
    return max(len(o.entries) for o in plan.owned), max(len(o.ends.slots) for o in plan.owned), inside


def _with_cache(compressors: Sequence[Compressor]) -> list[Compressor]:
    return [c for c in compressors if c.cache is not None]


def _with_state(compressors: Sequence[Compressor]) -> list[Compressor]:
    return [c for c in compressors if c.state is not None]
