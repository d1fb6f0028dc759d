"""`Shards`: which tokens of a packed batch each rank has. Host numbers alone: nothing here talks to another rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

from ..arguments.checks import check_int
from ..contract import MOST_POSITIONS

LAYOUTS = ("contiguous", "zigzag")


class Segment(NamedTuple):
    """Neighbouring tokens of one sequence on one rank.

    start, end: positions in the sequence, from `start` to before `end`. row: of the first one in the rank's own tokens.
    """

    rank: int
    sequence: int
    start: int
    end: int
    row: int


class Shards:
    """Which tokens each rank has of a step of packed sequences. Made by `build`.

    A rank's tokens are its segments, one after the other. A window, and so its entry, belongs to the rank that has its last
    token.

    Attributes:
        ranks: how many there are.
        lengths: new tokens of each sequence. start_pos: tokens that each had before the step.
        segments: for each rank its segments, in the order of its tokens. No segment is empty; a rank may have none.
    """

    ranks: int
    lengths: tuple[int, ...]
    start_pos: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]

    def __init__(self, lengths: Sequence[int], start_pos: Sequence[int], segments: Sequence[Sequence[Segment]]) -> None:
        self.ranks, self.lengths, self.start_pos = len(segments), tuple(lengths), tuple(start_pos)
        self.segments = tuple(map(tuple, segments))

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        ranks: int,
        *,
        layout: str = "contiguous",
        start_pos: Sequence[int] | None = None,
        each: bool = False,
        cuts: Sequence[int] | None = None,
    ) -> Shards:
        """Cuts a packed batch for `ranks` ranks.

        Args:
            lengths: new tokens of each sequence, on the host, in the order of the packed batch.
            ranks: how many ranks, n.
            layout: "contiguous": n chunks, rank i has chunk i. "zigzag": 2n chunks, rank i has chunks i and 2n - 1 - i, so that
                every rank has as much causal attention to do.
            start_pos: tokens that each sequence already has; default none.
            each: whether each sequence is cut into chunks by itself; a rank then has its chunks sequence by sequence. By
                default the batch as a whole is cut.
            cuts: where to cut, if not into equal chunks: offsets `[0, ..., all tokens]` in the packed batch, one more than
                there are chunks, not decreasing. Chunks may be empty, or shorter than a window. Not with `each`.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_int("ranks", ranks, 1, 1 << 16)
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        lengths = numbers_of("lengths", lengths)
        start_pos = [0] * len(lengths) if start_pos is None else numbers_of("start_pos", start_pos)
        if len(start_pos) != len(lengths):
            raise ValueError(f"start_pos must have {len(lengths)} numbers like lengths, got {len(start_pos)}")
        for start, length in zip(start_pos, lengths, strict=True):
            check_int("start_pos", start + length, 0, MOST_POSITIONS)
        chunks, total = ranks * (2 if layout == "zigzag" else 1), sum(lengths)
        order = [(i, 2 * ranks - 1 - i) if layout == "zigzag" else (i,) for i in range(ranks)]
        if not each:
            cuts = _even(0, total, chunks) if cuts is None else numbers_of("cuts", cuts)
            if len(cuts) != chunks + 1 or cuts[0] != 0 or cuts[-1] != total or any(a > b for a, b in _pairs(cuts)):
                raise ValueError(f"cuts must be {chunks + 1} numbers from 0 to {total} that do not decrease, got {cuts}")
            parts = [[(cuts[c], cuts[c + 1]) for c in chosen] for chosen in order]
        else:
            if cuts is not None:
                raise ValueError("cuts must be None with each=True, which cuts every sequence into equal parts")
            by_sequence = [_even(first, behind, chunks) for first, behind in _pairs([0, *accumulate(lengths)])]
            parts = [[(at[c], at[c + 1]) for at in by_sequence for c in chosen] for chosen in order]
        firsts = [0, *accumulate(lengths)]
        return cls(lengths, start_pos, [_segments(rank, own, firsts, start_pos) for rank, own in enumerate(parts)])

    def tokens(self, rank: int) -> int:
        """How many tokens a rank has."""
        return sum(segment.end - segment.start for segment in self.segments[rank])

    def windows(self, rank: int, ratio: int) -> list[tuple[int, range]]:
        """For each segment of a rank: its sequence, and the windows that it owns, which are those that end in it."""
        return [(s.sequence, range(s.start // ratio, s.end // ratio)) for s in self.segments[rank]]

    def windows_before(self, ratio: int) -> list[int]:
        """Whole windows of the sequences before each one, and at the end of all."""
        return [0, *accumulate(length // ratio for length in self.lengths)]

    def index(self, rank: int) -> torch.Tensor:
        """int64 `[tokens]`: which rows of the packed batch a rank has, in its own order."""
        first = [offset - start for offset, start in zip([0, *accumulate(self.lengths)], self.start_pos, strict=False)]
        parts = [torch.arange(s.start, s.end) + first[s.sequence] for s in self.segments[rank]]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def before(self) -> dict[Segment, Segment]:
        """For each segment the one that it continues, if that is part of this step."""
        ends = {(s.sequence, s.end): s for own in self.segments for s in own}
        found = {s: ends.get((s.sequence, s.start)) for own in self.segments for s in own}
        return {s: left for s, left in found.items() if left is not None}


def _segments(rank: int, parts: list[tuple[int, int]], firsts: list[int], start_pos: Sequence[int]) -> list[Segment]:
    """Of pieces of the packed batch, each from a row to before another one."""
    found: list[Segment] = []
    row = 0
    for begin, behind in parts:
        for sequence, (first, last) in enumerate(_pairs(firsts)):
            low, high = max(begin, first), min(behind, last)
            if low >= high:
                continue
            start = low - first + start_pos[sequence]
            end, left = start + high - low, found[-1] if found else None
            if left is not None and (left.sequence, left.end) == (sequence, start):  # as in the middle of a zigzag
                found[-1] = left._replace(end=end)
            else:
                found.append(Segment(rank, sequence, start, end, row))
            row += high - low
    return found


def _even(first: int, behind: int, chunks: int) -> list[int]:
    return [first + (behind - first) * i // chunks for i in range(chunks + 1)]


def _pairs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    return [*pairwise(numbers)]


def numbers_of(name: str, values: Sequence[int]) -> list[int]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of ints on the host, got {type(values).__name__}")
    for i, value in enumerate(values):
        check_int(f"{name}[{i}]", value, 0, MOST_POSITIONS)
    return [*values]
