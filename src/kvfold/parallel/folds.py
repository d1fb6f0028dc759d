"""`CutFolds`: for training over fold rows, the windows that lie on several ranks, which hand on a fold instead of raw rows.

The rank that has a window's last token makes its entry. In the forward it goes on from the fold of the tokens before, as
`ContextParallel.compress` does. In the backward it sends what the gradient of any token of the window is made of, besides the
token: the largest score, the pooled row and the gradient of that. Each rank then makes the gradients of its own tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.host import numbers_on
from ..training import Packing
from ..training.problem import Runs
from ..training.table import Groups
from .halo import CutPacking, Rows
from .schedule import Reads, schedule
from .shards import Segment
from .sums import Block, Dealt, Share, deal


class Window(NamedTuple):
    """A window whose tokens are on several ranks. owner: the segment that has the last one."""

    sequence: int
    window: int
    owner: Segment


class Heads(NamedTuple):
    """The rank's tokens of the windows that it owns, the first ones of their segments.

    pieces: as `training.run.finish` has them. before: int64, which rows of `CutFolds.rows` the folds of the tokens before are.
    """

    pieces: torch.Tensor
    before: torch.Tensor


class Sent(NamedTuple):
    """Fold rows that go to a rank, or come from it: from one to before another of `CutFolds.rows`."""

    rank: int
    first: int
    behind: int


class Round(NamedTuple):
    """What a rank does in one round of the forward. tails: of `training.run.fold_tails`, None without any; rows from `first` on
    are theirs, which are sent then."""

    tails: torch.Tensor | None
    first: int
    sent: list[Sent]
    received: list[Sent]


class Passed(NamedTuple):
    """Windows that another rank has tokens of as well. rank: it. which: int64, of those that this rank owns, for it; or None
    where it owns them. count: how many they are."""

    rank: int
    which: torch.Tensor | None
    count: int


class CutFolds:
    """One rank's part. Made by `folds_of`.

    Attributes:
        rows: how many folds the rank makes and gets. rounds: in which it does so.
        heads: None where the rank owns no such window.
        packing: of a small tensor, `ratio` rows for each window that the rank has tokens of: those that it owns, in the order
            of `CutPacking.seams`, then those of each other rank, by rank. None where there are none.
        own: the rank's tokens in the small tensor.
        to, from_: what goes to ranks that have tokens of its windows, and comes from ranks that own windows of its tokens.
    """

    def __init__(self, packing: CutPacking, spec: CompressorSpec) -> None:
        self._cut, self._dealt = packing, {}
        shards, rank, device = packing.shards, packing.rank, packing.device
        owned = [self._owned(other) for other in range(shards.ranks)]
        self._windows = [self._parts(owned, other) for other in range(shards.ranks)]
        mine = self._windows[rank]
        self._carries(spec)
        self.heads = self._heads(owned[rank]) if owned[rank] else None
        at, of = [], []
        for number, window in enumerate(mine):
            for segment, first, behind in self._tokens(window, rank):
                at += range(number * spec.ratio + first % spec.ratio, number * spec.ratio + (behind - 1) % spec.ratio + 1)
                of += range(segment.row + first - segment.start, segment.row + behind - segment.start)
        self.own = Rows(*(numbers_on(device, some, torch.int64) for some in (at, of)))
        others = sorted({*range(len(mine) * spec.ratio)} - {*at})
        self._others, self._others_in = numbers_on(device, others, torch.int64), None
        self.packing = self._packing(mine) if mine else None
        self.to, self.from_ = [], []
        for other in range(shards.ranks):
            which = [i for i, window in enumerate(owned[rank]) if other != rank and self._tokens(window, other)]
            if which:
                self.to.append(Passed(other, numbers_on(device, which, torch.int64), len(which)))
            count = sum(window.owner.rank == other for window in mine) if other != rank else 0
            if count:
                self.from_.append(Passed(other, None, count))

    def _carries(self, spec: CompressorSpec) -> None:
        """The rounds of the forward, and where in `rows` what is."""
        cut, made = self._cut, schedule(self._cut.shards, Reads.of(spec))
        self.rows, self.rounds, self._before = 0, [], {}
        for number in range(made.rounds):
            messages = []
            for m in (m for m in made.messages if m.round == number):
                pairs = [pair for pair in zip(m.lefts, m.rights, strict=True) if self._ends(pair[1])]
                messages += [(m.source, m.target, pairs)] * bool(pairs)
            first, sent, received = self.rows, [], []
            tails = [self._tail(left) for source, _, pairs in messages if source == cut.rank for left, _ in pairs]
            for source, target, pairs in messages:
                if source == cut.rank:
                    sent.append(self._next(target, len(pairs)))
            for source, target, pairs in messages:
                if target == cut.rank:
                    self._before |= {right: self.rows + i for i, (_, right) in enumerate(pairs)}
                    received.append(self._next(source, len(pairs)))
            folded = numbers_on(cut.device, tails) if tails else None
            self.rounds.append(Round(folded, first, sent, received))

    def _next(self, rank: int, count: int) -> Sent:
        """The next so many rows, for a rank or of it."""
        self.rows += count
        return Sent(rank, self.rows - count, self.rows)

    def _ends(self, segment: Segment) -> bool:
        """Whether the window that a segment begins in is a whole one."""
        return (segment.start // self._cut.ratio + 1) * self._cut.ratio <= self._cut.shards.lengths[segment.sequence]

    def _tail(self, segment: Segment) -> tuple[int, int, int, int]:
        """As `problem.TAIL_FIELDS`: a segment's last tokens, which begin a window, or with the segment in one."""
        ratio = self._cut.ratio
        start = max(segment.end // ratio * ratio, segment.start)
        before = self._before[segment] if start % ratio else -1
        return segment.row + start - segment.start, before, start % ratio, (segment.end - 1) % ratio + 1

    def bytes_sent(self, spec: CompressorSpec) -> tuple[int, int]:
        """In a forward, and in its backward."""
        forward = sum(one.behind - one.first for each in self.rounds for one in each.sent)
        return tuple(count * 3 * spec.head_dim * 4 for count in (forward, sum(one.count for one in self.to)))

    def dealt(self, groups: Groups) -> Dealt:
        """How the sums for ape are dealt to ranks; remembered."""
        if groups not in self._dealt:
            cut = self._cut
            blocks, shares = ([of(rank) for rank in range(cut.shards.ranks)] for of in (self.blocks, self.shares))
            self._dealt[groups] = deal(blocks, shares, cut.rank, groups, cut.windows, cut.device)
        return self._dealt[groups]

    def others_in(self, runs: Runs) -> torch.Tensor:
        """int64: which rows of ape's sums, `ratio` of each sum, are of tokens in the small tensor that are elsewhere.

        Remembered, for the last `runs`: those of the small tensor's windows.
        """
        if self._others_in is None or self._others_in[0] is not runs.rows:
            ratio, others = self._cut.ratio, self._others
            shares = runs.rows[:, 2].long()[others // ratio]
            self._others_in = runs.rows, shares * ratio + others % ratio
        return self._others_in[1]

    def blocks(self, rank: int) -> list[Block]:
        """The windows that a rank has whole."""
        return [block for block in self._cut.blocks(rank) if not block.seam]

    def shares(self, rank: int) -> list[Share]:
        """Its tokens of the others, as they are in its small tensor."""
        ratio = self._cut.ratio
        first = self._cut.shards.windows_before(ratio)
        return [
            Share(i, first[one.sequence] + one.window, self._tokens(one, rank)[0][1] % ratio == 0)
            for i, one in enumerate(self._windows[rank])
        ]

    def _owned(self, rank: int) -> list[Window]:
        return [Window(seam.segment.sequence, w, seam.segment) for seam in self._cut.seams_of(rank) for w in seam.windows]

    def _parts(self, owned: list[list[Window]], rank: int) -> list[Window]:
        """Of which a rank has tokens: its own first."""
        others = [w for other, windows in enumerate(owned) if other != rank for w in windows if self._tokens(w, rank)]
        return owned[rank] + others

    def _tokens(self, window: Window, rank: int) -> list[tuple[Segment, int, int]]:
        """A rank's tokens of a window: segments, and in each from which position to before which."""
        first = window.window * self._cut.ratio
        found = []
        for s in self._cut.shards.segments[rank]:
            low, high = max(s.start, first), min(s.end, first + self._cut.ratio)
            if s.sequence == window.sequence and low < high:
                found.append((s, low, high))
        return sorted(found, key=lambda one: one[1])

    def _heads(self, owned: list[Window]) -> Heads:
        cut = self._cut
        pieces = [(w.owner.row, w.window, 1, w.owner.start % cut.ratio) for w in owned]
        before = [self._before[window.owner] for window in owned]
        made = numbers_on(cut.device, pieces)
        return Heads(made, numbers_on(cut.device, before, torch.int64))

    def _packing(self, windows: list[Window]) -> Packing:
        ratio, device = self._cut.ratio, self._cut.device
        pieces = [(i * ratio, window.window, 1, 0) for i, window in enumerate(windows)] + [(0, -1, 0, 0)]
        ends = numbers_on(device, [0, len(windows)])
        made = numbers_on(device, pieces)
        return Packing(len(windows) * ratio, ratio, 0, ends, made)


def folds_of(packing: CutPacking, spec: CompressorSpec, dtype: torch.dtype) -> CutFolds | None:
    """Remembered by the packing. None where ranks send raw rows: without fold rows, in fp64, and where no window is cut.

    dtype: of kv_score.
    """
    if not spec.gate or state_kind(spec) != "fold" or dtype == torch.float64:
        return None
    if packing.folds is None:
        cut = any(packing.seams_of(rank) for rank in range(packing.shards.ranks))
        packing.folds = (CutFolds(packing, spec) if cut else None,)
    return packing.folds[0]
