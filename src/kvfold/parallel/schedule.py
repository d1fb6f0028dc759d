"""Which carries cross ranks, and in which round each can leave. Host numbers alone, the same on every rank.

A carry at position e is made of tokens from `reach` on: of the window that e is in, and with overlap of the one before. A
segment that has all of these can send at once, without waiting for its own left neighbour: round 0. One that is too short
passes on what came from its left, and sends a round later.
"""

from __future__ import annotations

from typing import NamedTuple

from .shards import Segment, Shards


class Message(NamedTuple):
    """Carries that go from one rank to another in one round: at the ends of `lefts`, for `rights`, which go on from there."""

    round: int
    source: int
    target: int
    lefts: tuple[Segment, ...]
    rights: tuple[Segment, ...]


class Schedule(NamedTuple):
    """All messages of a step. rounds: how many there are; 0 if nothing has to be sent."""

    messages: tuple[Message, ...]
    rounds: int

    def sent(self, rank: int, number: int) -> list[Message]:
        return [m for m in self.messages if m.source == rank and m.round == number]

    def received(self, rank: int, number: int) -> list[Message]:
        return [m for m in self.messages if m.target == rank and m.round == number]


def reads_history(position: int, ratio: int, overlap: bool) -> bool:
    """Whether a step that starts at `position` reads anything of the tokens before."""
    return position > 0 and (overlap or position % ratio > 0)


def reach(position: int, ratio: int, overlap: bool) -> int:
    """The first token that the carry at `position` depends on."""
    return max(position // ratio - overlap, 0) * ratio


def schedule(shards: Shards, ratio: int, overlap: bool) -> Schedule:
    """The messages of all compressors of this ratio and overlap."""
    before, round_of = shards.before(), {}
    for own in sorted((s for rank in shards.segments for s in rank), key=lambda s: (s.sequence, s.start)):
        left = before.get(own)
        waits = left is not None and reach(own.end, ratio, overlap) < own.start
        round_of[own] = round_of[left] + 1 if waits else 0
    pairs: dict[tuple[int, int, int], list[tuple[Segment, Segment]]] = {}
    for right, left in before.items():
        if reads_history(right.start, ratio, overlap):
            pairs.setdefault((round_of[left], left.rank, right.rank), []).append((left, right))
    messages = [Message(*key, *map(tuple, zip(*found, strict=True))) for key, found in sorted(pairs.items())]
    return Schedule(tuple(messages), max((m.round + 1 for m in messages), default=0))
