"""The gradients of ape and norm_weight of a cut batch: sums of a rank, what it sends of them, and all of them (sums.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..training.problem import How, Inputs, Recipe, Sums
from ..training.run import fold, total
from ..training.table import Groups, groups_for
from .folds import CutFolds
from .halo import CutPacking
from .sums import Dealt, recipe_of
from .transport import Transport

WEIGHTS = ("gather", "reduce", "own")


class Way(NamedTuple):
    """How the sums of one of the weights become its gradient. All places are in units of `head_dim` numbers.

    sums, sent: rows of this rank, and of what each rank sends. send, blocks: how they are made, and blocks of what was sent.
    """

    units: int
    sums: int
    sent: int
    send: Recipe
    blocks: Recipe
    count: int  # of blocks


class Weights:
    """Of one backward of a rank."""

    def __init__(self, x: Inputs, how: How, packing: CutPacking, folds: CutFolds | None) -> None:
        self._x, self._how, self._packing, self._ways = x, how, packing, ways_of(packing, how, folds)
        self._dealt = dealt_of(packing, folds, groups_for(how.keeps, how.spec, packing.capacity))
        self._wide = torch.float64 if how.backend == "torch" else torch.float32
        _, self._sums = self._rows([way.sums for way in self._ways], torch.zeros)

    def _rows(self, counts: list[int], new: Callable = torch.empty) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A new tensor of so many rows of ape, and of norm_weight; and these."""
        widths = [way.units * self._how.spec.head_dim for way in self._ways]
        sizes = [count * width for count, width in zip(counts, widths, strict=True)]
        data = new(sum(sizes), dtype=self._wide, device=self._x.value.device)
        return data, [part.view(*shape) for part, *shape in zip(data.split(sizes), counts, widths, strict=True)]

    def sums(self, seam: bool) -> Sums:
        """What the backward of windows at seams, or of those inside, goes on with."""
        runs = [dealt.seams if seam else dealt.inside for dealt in self._dealt]
        return Sums(self._sums[0] if self._how.spec.has_ape else None, self._sums[1], *runs)

    def gradients(self, transport: Transport, weights: str) -> tuple[torch.Tensor | None, torch.Tensor]:
        """weights: see `ContextParallel.entries`."""
        if weights != "gather":
            return self._rounded(transport if weights == "reduce" else None)
        how, ways = self._how, self._ways
        sent, rows = self._rows([way.sent for way in ways])
        for way, sums, out in zip(ways, self._sums, rows, strict=True):
            fold(self._x, how, sums, way.send, out[: len(way.send.rows) - 1])
        found = transport.gather(sent.view(torch.uint8), "gradients of weights").flatten().view(self._wide)
        _, blocks = self._rows([way.count for way in ways])
        for way, out in zip(ways, blocks, strict=True):
            fold(self._x, how, found, way.blocks, out)
        return total(self._x, how, self._packing.capacity, blocks[0] if how.spec.has_ape else None, blocks[1])

    def _rounded(self, transport: Transport | None) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Of this rank, or of all in whatever order."""
        spec, wide = self._how.spec, self._x.wide
        both = torch.cat([part.sum(0, dtype=torch.float64) for part in self._sums])
        if transport is not None:
            both = transport.reduce(both, "gradients of weights")
        ape, norm_weight = both.to(wide).split([len(both) - spec.head_dim, spec.head_dim])
        return ape.view(spec.ratio, spec.channels) if spec.has_ape else None, norm_weight


def dealt_of(packing: CutPacking, folds: CutFolds | None, groups: tuple[Groups, Groups]) -> list[Dealt]:
    """For ape and for norm_weight. folds: where windows at seams lie on several ranks, which share ape's gradient."""
    return [(folds or packing).dealt(groups[0]), packing.dealt(groups[1])]


def ways_of(packing: CutPacking, how: How, folds: CutFolds | None) -> list[Way]:
    """For ape and for norm_weight; remembered by the packing."""
    spec, groups = how.spec, groups_for(how.keeps, how.spec, packing.capacity)
    widths = spec.ratio * spec.channels // spec.head_dim if spec.has_ape else 0, 1
    key = groups, widths, folds is None
    if key in packing.ways:
        return packing.ways[key]
    dealt, device = dealt_of(packing, folds, groups), packing.device
    sent = [max(one.rows) for one in dealt]
    row = sum(rows * width for rows, width in zip(sent, widths, strict=True))  # units that a rank sends
    ways, first = [], 0
    for one, rows, width, group in zip(dealt, sent, widths, groups, strict=True):
        send = [[(at * width, True) for at in sums] for sums in one.send]
        blocks = [[(rank * row + first + at * width, begins) for rank, at, begins in block] for block in one.blocks]
        made = (recipe_of(some, device) for some in (send, blocks))
        ways.append(Way(width, one.sums, rows, *made, group.blocks))
        first += rows * width
    packing.ways[key] = ways
    return ways
