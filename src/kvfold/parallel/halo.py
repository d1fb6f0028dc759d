"""`CutPacking`: for training, which rows of kv_score cross ranks, and which windows each rank makes of what.

A rank makes the entries that end in its tokens. Most lie in its tokens whole, and are made from these as they are. Those that
begin further left, one or two of each segment, are made from a small tensor: rows that other ranks send, then the rank's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..spec import CompressorSpec
from ..storage.host import numbers_on, on_device
from ..training import Packing
from ..training.table import Groups
from .shards import Segment, Shards
from .sums import Block, Dealt, deal


class Rows(NamedTuple):
    """Rows of one tensor that are rows of another one, int64 `[n]` each; as `hi` and `lo` those of which that half counts."""

    at: torch.Tensor
    of: torch.Tensor


class Borrowed(NamedTuple):
    """Rows that one rank has and another needs, in the order of the message. rank: the other one. rows: of this rank's tokens
    where it lends, of its small tensor where it borrows. hi, lo: of which it uses that half, by number, and `rows`."""

    rank: int
    rows: torch.Tensor
    hi: Rows
    lo: Rows


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
        touches: whether the rank has windows at seams, or rows of other ranks' ones.
        entries: how many the rank makes: by segment, then by window.
        order: int64 `[entries]`, which row of seams' entries, then of those inside, is which entry; None if they are in order.
        windows: entries of all ranks. capacity: rows of entries that one process has room for.
        numbers: for each rank, int64, the numbers of its entries in the order of one process.
        last_start: the position of the last window's first token, to check a RoPE table by.
    """

    def __init__(self, shards: Shards, rank: int, spec: CompressorSpec, device: torch.device) -> None:
        if any(shards.start_pos):
            raise ValueError(f"shards must begin at the first tokens of their sequences, got start_pos={shards.start_pos}")
        self.shards, self.rank, self.ratio, self.overlap, self.device = shards, rank, spec.ratio, spec.overlap, device
        self.windows = shards.windows_before(self.ratio)[-1]
        self.capacity = sum(shards.lengths) // self.ratio
        self._dealt: dict[Groups, Dealt] = {}
        self.ways: dict = {}  # of `weights.ways_of`
        self.folds: tuple | None = None  # of `folds.folds_of`
        own, tokens = shards.segments[rank], shards.tokens(rank)
        seams = self.seams_of(rank)
        by_segment = {seam.segment: seam for seam in seams}
        pieces, rests, small, order = [], [], [], []
        self.seam_entries, self.inside_entries = sum(len(seam.windows) for seam in seams), 0
        for segment in own:
            seam = by_segment.get(segment)
            whole = self._whole(segment)
            if seam is not None:
                number = sum(map(len, small))
                order.append(torch.arange(number, number + len(seam.windows)))
                small.append(self._pieces(seam.windows, seam.base - seam.reach))
            number = self.seam_entries + self.inside_entries
            order.append(torch.arange(number, number + len(whole)))
            first = segment.row - segment.start
            pieces.append(self._pieces(whole, first))
            self.inside_entries += len(whole)
            # What no window inside writes the gradient of: all that is behind the last one.
            start = first + (whole[-1] + 1) * self.ratio if len(whole) else segment.row
            behind = range(start, segment.row + segment.end - segment.start, self.ratio)
            rests += [(at, -1, min(self.ratio, behind.stop - at), 0) for at in behind]
        self.entries = self.seam_entries + self.inside_entries
        self.inside = self._packing(tokens, pieces, rests)
        self.seams = self._packing(self._seam_rows(seams), small, []) if seams else None
        in_order = torch.cat([torch.arange(0), *order])
        self.order = None if torch.equal(in_order, torch.arange(self.entries)) else on_device(in_order, device)
        self.last_start = max(
            (w[-1] * self.ratio for w in (*map(self._whole, own), *(s.windows for s in seams)) if w), default=0
        )
        self._rows_at_seams(seams)
        self.lent = tuple(self._borrowed(other, rank) for other in range(shards.ranks) if other != rank)
        self.borrowed = tuple(self._borrowed(rank, other) for other in range(shards.ranks) if other != rank)
        self.touches = self.seams is not None or any(len(one.rows) for one in self.lent)
        self.numbers = tuple(self._numbers(other) for other in range(shards.ranks))

    def _reach(self, window: int) -> int:
        return max(window - self.overlap, 0) * self.ratio

    def _whole(self, segment: Segment) -> range:
        """The windows of a segment that take no row from its left."""
        owned = range(segment.start // self.ratio, segment.end // self.ratio)
        at_seam = sum(self._reach(w) < segment.start for w in owned[:2])
        return owned[at_seam:]

    def seams_of(self, rank: int) -> list[Seam]:
        found, base = [], 0
        for segment in self.shards.segments[rank]:
            owned, whole = range(segment.start // self.ratio, segment.end // self.ratio), self._whole(segment)
            windows = owned[: len(owned) - len(whole)]
            if len(windows):
                found.append(Seam(segment, windows, self._reach(windows[0]), base))
                base += windows.stop * self.ratio - found[-1].reach
        return found

    def blocks(self, rank: int) -> Iterator[Block]:
        """The windows of a rank, by segment: those at its seam, then those inside."""
        first, calls = self.shards.windows_before(self.ratio), {True: 0, False: 0}
        for segment in self.shards.segments[rank]:
            whole, owned = self._whole(segment), range(segment.start // self.ratio, segment.end // self.ratio)
            for seam, windows in ((True, range(owned.start, owned.stop - len(whole))), (False, whole)):
                if len(windows):
                    yield Block(seam, calls[seam], first[segment.sequence] + windows.start, len(windows))
                    calls[seam] += len(windows)

    def dealt(self, groups: Groups) -> Dealt:
        """How the sums of these groups are dealt to ranks; remembered."""
        if groups not in self._dealt:
            by_rank = [[*self.blocks(rank)] for rank in range(self.shards.ranks)]
            self._dealt[groups] = deal(by_rank, [[]] * len(by_rank), self.rank, groups, self.windows, self.device)
        return self._dealt[groups]

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
        self.own_hi, self.own_lo = (
            Rows(self._indices([at[i] for i in some]), self._indices([of[i] for i in some])) for some in (hi, lo)
        )

    def _borrowed(self, borrower: int, lender: int) -> Borrowed:
        """What one rank needs of another one; `rows` are those of this rank, which is one of the two."""
        rows, hi, lo = [], [], []
        for seam in self.seams_of(borrower):
            for segment in self._of(lender, seam.segment.sequence):
                for position in range(max(segment.start, seam.reach), min(segment.end, seam.segment.start)):
                    upper, lower = self._halves(seam, position)
                    hi += [len(rows)] * upper
                    lo += [len(rows)] * lower
                    lent = segment.row + position - segment.start
                    rows.append(lent if lender == self.rank else seam.base + position - seam.reach)
        other = borrower if lender == self.rank else lender
        halves = (Rows(self._indices(some), self._indices([rows[i] for i in some])) for some in (hi, lo))
        return Borrowed(other, self._indices(rows), *halves)

    def _of(self, rank: int, sequence: int) -> Iterator[Segment]:
        return (s for s in self.shards.segments[rank] if s.sequence == sequence)

    def _numbers(self, rank: int) -> torch.Tensor:
        first = self.shards.windows_before(self.ratio)
        found = [torch.arange(w.start, w.stop) + first[sequence] for sequence, w in self.shards.windows(rank, self.ratio)]
        return on_device(torch.cat([torch.arange(0), *found]), self.device)

    def _pieces(self, windows: range, first: int) -> torch.Tensor:
        """Of windows of one segment, as `Packing.pieces`. first: the row that position 0 would be."""
        window = torch.arange(windows.start, windows.stop)
        last = (window == windows.stop - 1).long()
        return torch.stack([first + window * self.ratio, window, last, torch.zeros_like(window)], dim=1)

    def _packing(self, tokens: int, pieces: list[torch.Tensor], rests: list[tuple]) -> Packing:
        windows, count = sum(map(len, pieces)), tokens // self.ratio + 1
        rests = rests + [(0, -1, 0, 0)] * (count - windows - len(rests))
        rows = [*pieces, torch.tensor(rests, dtype=torch.int64).reshape(-1, 4)]
        made = on_device(torch.cat(rows).int(), self.device)
        ends = numbers_on(self.device, [0, windows])
        # Its windows are anywhere in their sequences: `ContextParallel.entries` looks for their positions in the RoPE table.
        return Packing(tokens, self.ratio, 0, ends, made)

    def _indices(self, values: list[int]) -> torch.Tensor:
        return numbers_on(self.device, values, torch.int64)
