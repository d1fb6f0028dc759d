"""Which carries cross ranks, and in which round each can leave. Host numbers alone, the same on every rank.

A carry at position e is made of tokens from `reach` on: of the window that e is in, and with overlap of the one before. A
segment that has all of these can send at once, without waiting for its own left neighbour: round 0. One that is too short
passes on what came from its left, and sends a round later.
"""

from __future__ import annotations

from typing import NamedTuple

from ..spec import CompressorSpec
from .shards import Segment, Shards


class Reads(NamedTuple):
    """What steps of a compressor read of the tokens before them, as far as a schedule asks."""

    ratio: int
    overlap: bool
    gate: bool

    @classmethod
    def of(cls, spec: CompressorSpec) -> Reads:
        return cls(spec.ratio, spec.overlap, spec.gate)

    def anything(self, position: int) -> bool:
        """Whether a step that starts at `position` reads anything of the tokens before."""
        return self.gate and position > 0 and (self.overlap or position % self.ratio > 0)

    def reach(self, position: int) -> int:
        """The first token that the carry at `position` depends on."""
        return max(position // self.ratio - self.overlap, 0) * self.ratio


class Message(NamedTuple):
    """Carries that go from one rank to another in one round: at the ends of `lefts`, for `rights`, which go on from there."""

    round: int
    source: int
    target: int
    lefts: tuple[Segment, ...]
    rights: tuple[Segment, ...]


class Schedule(NamedTuple):
    """All messages of a step.

    messages: by round, source and target. rounds: how many rounds they take; 0 if nothing has to be sent. ready: of each
    segment the first round in which its own carry, at its end, can be known.
    """

    messages: tuple[Message, ...]
    rounds: int
    ready: dict[Segment, int]


def schedule(shards: Shards, reads: Reads) -> Schedule:
    """The messages of all compressors that read this."""
    before, ready = shards.before(), {}
    for own in sorted((s for rank in shards.segments for s in rank), key=lambda s: (s.sequence, s.start)):
        left = before.get(own)
        waits = left is not None and reads.reach(own.end) < own.start
        ready[own] = ready[left] + 1 if waits else 0
    pairs: dict[tuple[int, int, int], list[tuple[Segment, Segment]]] = {}
    for right, left in before.items():
        if reads.anything(right.start):
            pairs.setdefault((ready[left], left.rank, right.rank), []).append((left, right))
    messages = [Message(*key, *map(tuple, zip(*found, strict=True))) for key, found in sorted(pairs.items())]
    return Schedule(tuple(messages), max((m.round + 1 for m in messages), default=0), ready)
