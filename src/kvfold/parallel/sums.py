"""Which rank adds what of the gradients of ape and norm_weight, so that they have the bits of one process.

One process adds them by groups of windows, blocks of groups, then all blocks (training/kernels/sums.py). A rank has some of the
windows. It adds up the groups that it has whole, and the blocks, as far as it has them from their first groups on. Of a group
that a cut is in it adds up the first windows, if it has these; of its other windows each goes to all ranks by itself, as sums
of floating point cannot be put in order afterwards. Then every rank has everything, and adds up the rest.

Of a window whose tokens are on several ranks (folds.py) each of them has the share of its own tokens in the gradient of ape,
and zeros for the others. Each share goes alone: the first token's begins the group, if the window does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from ..storage.host import numbers_on
from ..training.problem import Recipe, Runs
from ..training.table import Groups


class Block(NamedTuple):
    """Windows of a rank that follow each other, in one of its two calls.

    seam: which call. at: the number of the first one in the call. first: its number in one process.
    """

    seam: bool
    at: int
    first: int
    count: int


class Share(NamedTuple):
    """A rank's tokens of a window that is on several ranks, in its second call. at: the number there. first: in one process.
    begins: whether the window's first token is one of them."""

    at: int
    first: int
    begins: bool


class Run(NamedTuple):
    """Windows of a call, from one to before another, whose shares are added to a sum."""

    seam: bool
    first: int
    behind: int
    sum: int


class Sum(NamedTuple):
    """Of windows of a group, from `first` to before `behind`, numbered as in one process. begins: whether the group begins with
    it. shared: whether it is a `Share`."""

    group: int
    first: int
    behind: int
    begins: bool
    shared: bool = False


class Sent(NamedTuple):
    """A row of what a rank sends: of these sums, in order. begins: whether a group begins with it."""

    sums: list[int]
    group: int
    first: int
    begins: bool


class Dealt(NamedTuple):
    """For one of the two weights.

    sums: how many a rank has, the last of which stays zeros. inside, seams: runs of the two calls. send: how what it sends is
    made of its sums, in rows of units. rows: how many rows each rank sends. blocks: of each block, the rank, the row and
    whether it begins a group, of all that it is made of, in order.
    """

    sums: int
    inside: Runs
    seams: Runs
    send: list[list[int]]
    rows: list[int]
    blocks: list[list[tuple[int, int, bool]]]


def deal(
    by_rank: Sequence[Sequence[Block]],
    shares: Sequence[Sequence[Share]],
    rank: int,
    groups: Groups,
    windows: int,
    device: torch.device,
) -> Dealt:
    """windows: of all ranks."""
    added = [runs_of(*of, groups) for of in zip(by_rank, shares, strict=True)]
    runs, sums = added[rank]
    sent = [sent_of(theirs, groups, windows) for _, theirs in added]
    items = sorted(
        (row.first, row.group, not row.begins, other, number)
        for other, rows in enumerate(sent)
        for number, row in enumerate(rows)
    )
    made: list[list[tuple[int, int, bool]]] = [[] for _ in range(groups.blocks)]
    for _, group, goes_on, other, number in items:
        made[group // groups.of_a_block].append((other, number, not goes_on))
    calls = (_runs([run for run in runs if run.seam == seam], len(sums), device) for seam in (False, True))
    return Dealt(len(sums) + 1, *calls, [row.sums for row in sent[rank]], [len(rows) for rows in sent], made)


def runs_of(blocks: Iterable[Block], shares: Iterable[Share], groups: Groups) -> tuple[list[Run], list[Sum]]:
    """What a rank adds up by itself. Of a call no two runs have one sum; those at seams are added first."""
    runs: list[Run] = []
    sums: list[Sum] = []
    for block in blocks:
        done = 0
        while done < block.count:
            number, at = block.first + done, block.at + done
            group = number // groups.each
            count = min(block.count - done, (group + 1) * groups.each - number)
            last = sums[-1] if sums else None
            if number == group * groups.each:
                sums.append(Sum(group, number, number + count, True))
                runs.append(Run(block.seam, at, at + count, len(sums) - 1))
            elif (
                last is not None
                and last.behind == number
                and last.group == group
                and last.begins
                and (runs[-1].seam or not block.seam)
            ):
                sums[-1] = last._replace(behind=number + count)
                if runs[-1].seam == block.seam:
                    runs[-1] = runs[-1]._replace(behind=at + count)
                else:
                    runs.append(Run(block.seam, at, at + count, len(sums) - 1))
            else:
                for i in range(count):
                    sums.append(Sum(group, number + i, number + i + 1, False))
                    runs.append(Run(block.seam, at + i, at + i + 1, len(sums) - 1))
            done += count
    for at, first, begins in shares:
        group = first // groups.each
        runs.append(Run(True, at, at + 1, len(sums)))
        sums.append(Sum(group, first, first + 1, begins and first == group * groups.each, True))
    return runs, sums


def sent_of(sums: Iterable[Sum], groups: Groups, windows: int) -> list[Sent]:
    """The rows that a rank with these sums sends."""
    rows: list[Sent] = []
    open_ = -1  # the next group of the last row's block, if that began with the block and is whole so far
    for number, (group, first, behind, begins, shared) in enumerate(sums):
        whole = begins and not shared and behind == min(first + groups.each, windows)
        if whole and group == open_ and group % groups.of_a_block:
            rows[-1].sums.append(number)
        else:
            rows.append(Sent([number], group, first, begins))
        goes_on = whole and (group % groups.of_a_block == 0 or group == open_)
        open_ = group + 1 if goes_on else -1
    return rows


def _runs(runs: Sequence[Run], spare: int, device: torch.device) -> Runs:
    """A call without a window goes on with the spare sum."""
    rows = [(run.first, run.behind, run.sum, 0) for run in runs] or [(0, 0, spare, 0)]
    return Runs(numbers_on(device, rows), max(run[1] for run in rows), max(run[1] - run[0] for run in rows))


def recipe_of(rows: Sequence[Sequence[tuple[int, bool]]], device: torch.device) -> Recipe:
    """Of each row what it is made of: where, in units of `head_dim` numbers, and whether it begins a group."""
    items = [2 * at + begins for row in rows for at, begins in row]
    return Recipe(numbers_on(device, [0, *accumulate(map(len, rows))]), numbers_on(device, items))
