"""`CutPacking`: for training, which rows of kv_score cross ranks, and which windows each rank makes of what.

A rank makes the entries that end in its tokens. Most lie in its tokens whole, and are made from these as they are. Those that
begin further left, one or two of each segment, are made from a small tensor: rows that other ranks send, then the rank's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..spec import CompressorSpec
from ..training import Packing
from .shards import Segment, Shards


class Rows(NamedTuple):
    """Rows of one tensor that are rows of another one, int64 `[n]` each; in `hi` and `lo` those of which a half counts."""

    at: torch.Tensor
    of: torch.Tensor


class Borrowed(NamedTuple):
    """Rows that one rank has and another needs, in the order of the message. rank: the other one. rows: of this rank's tokens
    where it lends, of its small tensor where it borrows. hi, lo: of which of them, by number, the borrower uses that half."""

    rank: int
    rows: torch.Tensor
    hi: torch.Tensor
    lo: torch.Tensor


class Seam(NamedTuple):
    """The windows of a segment that begin left of it, or take rows from there. reach: the first position that they take."""

    segment: Segment
    windows: range
    reach: int
    base: int  # the row of the small tensor that `reach` is


class CutPacking:
    """What `Packing` is for a whole batch, for one rank's tokens. Made by `ContextParallel.packing`.

    Attributes:
        shards, rank, ratio, overlap: what it is for.
        inside: of the windows that the rank's own tokens have whole.
        seams: of the windows of the small tensor; None where the rank has none.
        entries: how many the rank makes: by segment, then by window.
        order: int64 `[entries]`, which row of seams' entries, then of those inside, is which entry; None if they are in order.
        numbers: for each rank, int64, the numbers of its entries in the order of one process.
        last_start: the position of the last window's first token, to check a RoPE table by.
    """

    def __init__(self, shards: Shards, rank: int, spec: CompressorSpec, device: torch.device) -> None:
        if any(shards.start_pos):
            raise ValueError(f"shards must begin at the first tokens of their sequences, got start_pos={shards.start_pos}")
        self.shards, self.rank, self.ratio, self.overlap, self.device = shards, rank, spec.ratio, spec.overlap, device
        own, tokens = shards.segments[rank], shards.tokens(rank)
        seams = self._seams(rank)
        by_segment = {seam.segment: seam for seam in seams}
        pieces, rests, small, order = [], [], [], []
        seam_count = sum(len(seam.windows) for seam in seams)
        for segment in own:
            seam = by_segment.get(segment)
            whole = self._whole(segment)
            if seam is not None:
                order += range(len(small), len(small) + len(seam.windows))
                first = seam.base - seam.reach
                small += [(first + w * self.ratio, w, w == seam.windows[-1], 0) for w in seam.windows]
            order += range(seam_count + len(pieces), seam_count + len(pieces) + len(whole))
            first = segment.row - segment.start
            pieces += [(first + w * self.ratio, w, w == whole[-1], 0) for w in whole]
            # What no window inside writes the gradient of: all that is behind the last one.
            start = first + (whole[-1] + 1) * self.ratio if len(whole) else segment.row
            behind = range(start, segment.row + segment.end - segment.start, self.ratio)
            rests += [(at, -1, min(self.ratio, behind.stop - at), 0) for at in behind]
        self.entries, self.inside_entries, self.seam_entries = len(order), len(pieces), seam_count
        self.inside = self._packing(tokens, pieces, rests)
        self.seams = self._packing(self._seam_rows(seams), small, []) if seams else None
        self.order = None if order == [*range(len(order))] else self._indices(order)
        self.last_start = max((w * self.ratio for _, w, *_ in (*pieces, *small)), default=0)
        self._rows_at_seams(seams)
        self.lent = tuple(self._borrowed(other, rank) for other in range(shards.ranks) if other != rank)
        self.borrowed = tuple(self._borrowed(rank, other) for other in range(shards.ranks) if other != rank)
        self.numbers = tuple(self._numbers(other) for other in range(shards.ranks))

    def _reach(self, window: int) -> int:
        return max(window - self.overlap, 0) * self.ratio

    def _whole(self, segment: Segment) -> range:
        """The windows of a segment that take no row from its left."""
        owned = range(segment.start // self.ratio, segment.end // self.ratio)
        at_seam = sum(self._reach(w) < segment.start for w in owned[:2])
        return owned[at_seam:]

    def _seams(self, rank: int) -> list[Seam]:
        found, base = [], 0
        for segment in self.shards.segments[rank]:
            owned, whole = range(segment.start // self.ratio, segment.end // self.ratio), self._whole(segment)
            windows = owned[: len(owned) - len(whole)]
            if len(windows):
                found.append(Seam(segment, windows, self._reach(windows[0]), base))
                base += windows.stop * self.ratio - found[-1].reach
        return found

    def _seam_rows(self, seams: Sequence[Seam]) -> int:
        return sum(seam.windows.stop * self.ratio - seam.reach for seam in seams)

    def _halves(self, seam: Seam, position: int) -> tuple[bool, bool]:
        """Whether the windows of a seam take the hi half of a row, or the whole one without overlap; and the lo half."""
        window = position // self.ratio
        return window in seam.windows, self.overlap and window + 1 in seam.windows

    def _rows_at_seams(self, seams: Sequence[Seam]) -> None:
        """The rank's own rows in its small tensor, and which halves of them the windows there use."""
        at, of, hi, lo = [], [], [], []
        for seam in seams:
            for segment in self._of(self.rank, seam.segment.sequence):  # with zigzag its left may be here as well
                for position in range(max(segment.start, seam.reach), min(segment.end, seam.windows.stop * self.ratio)):
                    upper, lower = self._halves(seam, position)
                    hi += [len(at)] * upper
                    lo += [len(at)] * lower
                    at.append(seam.base + position - seam.reach)
                    of.append(segment.row + position - segment.start)
        self.own = Rows(self._indices(at), self._indices(of))
        self.own_hi, self.own_lo = self._indices(hi), self._indices(lo)

    def _borrowed(self, borrower: int, lender: int) -> Borrowed:
        """What one rank needs of another one; `rows` are those of this rank, which is one of the two."""
        rows, hi, lo = [], [], []
        for seam in self._seams(borrower):
            for segment in self._of(lender, seam.segment.sequence):
                for position in range(max(segment.start, seam.reach), min(segment.end, seam.segment.start)):
                    upper, lower = self._halves(seam, position)
                    hi += [len(rows)] * upper
                    lo += [len(rows)] * lower
                    lent = segment.row + position - segment.start
                    rows.append(lent if lender == self.rank else seam.base + position - seam.reach)
        other = borrower if lender == self.rank else lender
        return Borrowed(other, self._indices(rows), self._indices(hi), self._indices(lo))

    def _of(self, rank: int, sequence: int) -> Iterator[Segment]:
        return (s for s in self.shards.segments[rank] if s.sequence == sequence)

    def _numbers(self, rank: int) -> torch.Tensor:
        first, found = [0], []
        for length in self.shards.lengths:
            first.append(first[-1] + length // self.ratio)
        for sequence, windows in self.shards.windows(rank, self.ratio):
            found += [first[sequence] + w for w in windows]
        return self._indices(found)

    def _packing(self, tokens: int, pieces: list[tuple], rests: list[tuple]) -> Packing:
        count = tokens // self.ratio + 1
        rows = [*pieces, *rests]
        rows += [(0, -1, 0, 0)] * (count - len(rows))
        made = torch.tensor(rows, dtype=torch.int32).to(self.device)
        ends = torch.tensor([0, len(pieces)], dtype=torch.int32).to(self.device)
        # Its windows are anywhere in their sequences: `ContextParallel.entries` looks for their positions in the RoPE table.
        return Packing(tokens, self.ratio, 0, ends, made)

    def _indices(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device)
