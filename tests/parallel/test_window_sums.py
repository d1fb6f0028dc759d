"""Sums over windows that are dealt to ranks have the bits of one process's: numbers of which no two orders of adding agree."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from support.parallel_support import SPECS, drawn_cuts

import kvfold
from kvfold.parallel import CutPacking, Shards
from kvfold.parallel.folds import CutFolds, folds_of
from kvfold.parallel.sums import runs_of, sent_of
from kvfold.training.table import Groups, groups_for

CPU = torch.device("cpu")


def added(values: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(())
    for value in values:
        total = total + value
    return total


def one_process(values: torch.Tensor, groups: Groups) -> list[torch.Tensor]:
    """The sums of blocks."""
    found = [added(values[g * groups.each : (g + 1) * groups.each]) for g in range(groups.count)]
    return [added(found[b * groups.of_a_block : (b + 1) * groups.of_a_block]) for b in range(groups.blocks)]


def parts_of(packing: CutPacking, rank: int, values: torch.Tensor) -> dict[bool, dict[int, torch.Tensor]]:
    """Of both calls of a rank, what each window adds."""
    calls: dict[bool, dict[int, torch.Tensor]] = {False: {}, True: {}}
    for block in packing.blocks(rank):
        for i in range(block.count):
            calls[block.seam][block.at + i] = values[block.first + i]
    assert {*calls[False]} == {*range(packing.inside_entries)} and {*calls[True]} == {*range(packing.seam_entries)}
    return calls


def shared_parts_of(packing: CutPacking, rank: int, values: torch.Tensor) -> dict[bool, dict[int, torch.Tensor]]:
    """The same where a window's tokens, a value each, are added by the ranks that have them."""
    calls, row, mine = {False: parts_of(packing, rank, values)[False], True: {}}, 0, {}
    for sequence, length in enumerate(packing.shards.lengths):
        for position in range(length // packing.ratio * packing.ratio):
            if any(s.sequence == sequence and s.start <= position < s.end for s in packing.shards.segments[rank]):
                mine.setdefault(row // packing.ratio, set()).add(row % packing.ratio)
            row += 1
    for share in folds(packing).shares(rank):
        here = torch.zeros_like(values[0])
        for place in mine[share.first]:
            here[place] = values[share.first, place]
        calls[True][share.at] = here
    return calls


def folds(packing: CutPacking) -> CutFolds | None:
    return folds_of(packing, SPECS["fold"], torch.float32)


def cut(packings: Sequence[CutPacking], values: torch.Tensor, groups: Groups, shared: bool) -> list[torch.Tensor]:
    """The same as `one_process`, by what each rank adds and sends."""
    sent, dealers = [], [folds(packing) if shared else packing for packing in packings]
    for rank, (packing, dealer) in enumerate(zip(packings, dealers, strict=True)):
        calls = (shared_parts_of if shared else parts_of)(packing, rank, values)
        runs, sums = runs_of(dealer.blocks(rank), dealer.shares(rank) if shared else (), groups)
        made, seen = [torch.zeros(()) for _ in sums], []
        for run in sorted(runs, key=lambda run: not run.seam):
            for window in range(run.first, run.behind):
                made[run.sum] = made[run.sum] + calls[run.seam][window]
                seen.append((run.seam, window))
        assert len(seen) == len({*seen}) == sum(map(len, calls.values())), "every window once"
        assert len({(run.seam, run.sum) for run in runs}) == len(runs), "no two runs of a call go on with one sum"
        assert dealer.dealt(groups).sums == len(sums) + 1
        sent.append([added([made[i] for i in row.sums]) for row in sent_of(sums, groups, packing.windows)])
    assert dealers[0].dealt(groups).rows == [len(rows) for rows in sent]
    found = []
    for items in dealers[0].dealt(groups).blocks:
        block = group = torch.zeros(())
        for rank, row, begins in items:
            block, group = (block + group, sent[rank][row]) if begins else (block, group + sent[rank][row])
        found.append(block + group)
    return found


@pytest.mark.parametrize(
    ("name", "shared"), [("fold", False), ("fold", True), ("overlap", False), ("rows", False), ("tokens", False)]
)
def test_drawn_cuts(name: str, shared: bool) -> None:
    spec, draw = SPECS[name], random.Random(3)
    for _ in range(60):
        ranks, layout = draw.randrange(1, 5), draw.choice(["contiguous", "zigzag"])
        lengths = [draw.choice((0, 1, spec.ratio * draw.randrange(9), draw.randrange(20 * spec.ratio))) for _ in range(3)]
        each = draw.random() < 0.3
        chunks = ranks * (2 if layout == "zigzag" else 1)
        cuts = None if each else drawn_cuts(draw, sum(lengths), chunks)
        shards = Shards.build(lengths, ranks, layout=layout, each=each, cuts=cuts)
        packings = [CutPacking(shards, rank, spec, CPU) for rank in range(ranks)]
        capacity, each_of = packings[0].capacity, draw.choice((1, 2, 3, 5, 8))
        count = max(-(-capacity // each_of), 1)
        groups = Groups(count, each_of, draw.choice((1, 2, 4, 8)))
        if shared and folds(packings[0]) is None:
            continue  # no window is cut
        shape = packings[0].windows, spec.ratio
        values = 10.0 ** torch.empty(shape).uniform_(-3, 3) * torch.randn(shape)
        want, got = one_process(values, groups), cut(packings, values, groups, shared)
        pairs = (torch.broadcast_tensors(*pair) for pair in zip(got, want, strict=True))  # of nothing there is one zero
        assert all(torch.equal(*pair) for pair in pairs), (lengths, shards.segments, groups)


@pytest.mark.parametrize("spec", [kvfold.V4_HCA, kvfold.V4_CSA], ids=["r128", "r4"])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_equal_parts_send_whole_blocks(spec: kvfold.CompressorSpec, layout: str) -> None:
    """So little is sent, and ranks have as many groups as their share of the tokens."""
    shards = Shards.build([1 << 18], 2, layout=layout)
    packing = CutPacking(shards, 0, spec, CPU)
    for groups in groups_for(spec.ratio > 8, spec, packing.capacity):
        dealt = packing.dealt(groups)
        assert sum(dealt.rows) == groups.blocks and dealt.sums == groups.count // 2 + 1
