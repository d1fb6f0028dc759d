"""A step cut over ranks has the bits of one process: entries, and what the next step reads; wherever it is cut."""

from __future__ import annotations

import random
from itertools import combinations_with_replacement

import pytest
import torch
from support.parallel_support import Step, World, check_steps

RATIOS = {"fold": 16, "overlap": 4, "rows": 3, "wide overlap": 16}


def every_cut(total: int, chunks: int) -> list[tuple[int, ...]]:
    return [(0, *inner, total) for inner in combinations_with_replacement(range(total + 1), chunks - 1)]


@pytest.mark.parametrize("name", RATIOS)
def test_every_cut_in_two(world: World, name: str) -> None:
    total = 2 * RATIOS[name] + 3
    steps = [Step((name,), (total,), cuts=cuts) for cuts in every_cut(total, 2)]
    assert sum(world.run(2, check_steps, steps)) > 0
