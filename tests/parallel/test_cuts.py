"""A step cut over ranks has the bits of one process: entries, and what the next step reads; wherever it is cut."""

from __future__ import annotations

import random

import pytest
import torch
from support.parallel_support import SPECS, Step, World, check_steps, drawn_cuts, every_cut

from kvfold.parallel import Shards
from kvfold.parallel.schedule import Reads, schedule


@pytest.mark.parametrize("name", ["fold", "overlap", "rows", "wide overlap"])
def test_every_cut_in_two(world: World, name: str) -> None:
    total = 2 * SPECS[name].ratio + 2
    steps = [Step((name,), (total,), cuts=cuts) for cuts in every_cut(total, 2)]
    assert sum(world.run(2, check_steps, steps)) > len(steps) // 2, "carries were sent"


def test_every_cut_in_three(world: World) -> None:
    """Most chunks are shorter than the two windows that a carry is made of: it comes from two ranks."""
    steps = [Step(("overlap",), (9,), cuts=cuts) for cuts in every_cut(9, 3)]
    world.run(3, check_steps, steps)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_packed_sequences_cut_anywhere(world: World, layout: str, ranks: int) -> None:
    draw, steps = random.Random(ranks), []
    for name in ("fold", "overlap", "rows", "wide overlap"):
        for each in (False, True):
            lengths = tuple(draw.choice((0, 1, draw.randrange(8), draw.randrange(60))) for _ in range(4))
            start_pos = tuple(draw.randrange(25) for _ in lengths) if draw.random() < 0.5 else None
            cuts = None if each else drawn_cuts(draw, sum(lengths), ranks * (2 if layout == "zigzag" else 1))
            steps.append(Step((name,), lengths, start_pos, layout, each, cuts))
    world.run(ranks, check_steps, steps)


def test_long_sequences(world: World) -> None:
    draw = random.Random(0)
    steps = [Step(names, (2000,), layout=layout, cuts=drawn_cuts(draw, 2000, 8 if layout == "zigzag" else 4))
             for names in (("fold",), ("overlap", "indexer")) for layout in ("contiguous", "zigzag")]  # fmt: skip
    world.run(4, check_steps, steps)


def test_what_compressors_may_be(world: World) -> None:
    """Two in one message, other dtypes, records, two tensors of tokens, a state in bf16, one without a state."""
    bf16 = torch.bfloat16
    steps = [
        Step(("overlap", "indexer"), (37, 5), cuts=(0, 14, 42)),
        Step(("overlap", "indexer"), (37, 5), cuts=(0, 14, 42), dtype=bf16, two=True),
        Step(("fold",), (50,), cuts=(0, 23, 50), dtype=bf16, two=True, fmt="bf16"),
        Step(("indexer",), (37, 5), cuts=(0, 13, 42), dtype=bf16, fmt="mxfp4"),
        Step(("tokens",), (9, 4), cuts=(0, 5, 13)),
    ]
    world.run(2, check_steps, steps)


def test_kernels_are_cut_as_well(world: World) -> None:
    """The Triton backend, interpreted, by the same code."""
    steps = [Step(("fold",), (14,), cuts=(0, 3, 5, 14)), Step(("overlap", "indexer"), (13, 3), cuts=(0, 3, 9, 16))]
    world.run(3, check_steps, [step._replace(backend="triton") for step in steps])


def test_common_cuts_take_one_round() -> None:
    """All ranks send at once unless one is too short to have a carry of its own."""
    for ratio, overlap in ((128, False), (4, True)):
        for layout in ("contiguous", "zigzag"):
            for lengths in ((100_003,), (5000, 60_001, 1)):
                made = schedule(Shards.build(lengths, 4, layout=layout, each=len(lengths) == 1), Reads(ratio, overlap, True))
                assert made.rounds == 1
    assert schedule(Shards.build((1024,), 4), Reads(128, False, True)).rounds == 0, "cuts on windows of ratio 128 need nothing"
    assert schedule(Shards.build((20,), 4, cuts=(0, 8, 9, 10, 20)), Reads(128, False, True)).rounds == 3, "a chain"
    short = schedule(Shards.build((400,), 4, cuts=(0, 200, 201, 202, 400)), Reads(128, False, True))
    assert [(m.round, m.source, m.target) for m in short.messages] == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
