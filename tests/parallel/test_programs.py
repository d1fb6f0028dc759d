"""The example and the benchmark of several GPUs run over gloo, small."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.parallel_support import World

from benchmarks.run import parallel
from kvfold.parallel import ContextParallel
from kvfold.parallel.transport import Transport

ROOT = Path(__file__).parents[2]


def example(group: dist.ProcessGroup, layout: str, tokens: int) -> list[str]:
    found = importlib.util.spec_from_file_location("context_parallel", ROOT / "examples" / "context_parallel.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module.run(ContextParallel(group, layout), tokens, torch.device("cpu"))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_the_example_finds_the_same_bytes(world: World, layout: str) -> None:
    found = world.run(2, example, layout, 530)
    assert [line.startswith(f"rank {rank} of 2, {layout}") for rank, lines in enumerate(found) for line in lines] == [True] * 4
    sent = [int(line.split()[-4]) for lines in found for line in lines]
    # Contiguous: cut at 265, from rank 0 to rank 1 alone. Zigzag: at 132, 265 and 397, of which rank 1 has both sides of 265.
    assert (sent[2:] == [0, 0]) == (layout == "contiguous") and sent[0] == 6144 + 16


def row(group: dist.ProcessGroup, layout: str, name: str) -> dict:
    case = next(case for case in parallel.CASES if case.name == name)
    timer = parallel.Timer(torch.device("cpu"), 1, False)
    return parallel.measure(ContextParallel(group, layout), Transport(group, None), case, 768, timer)


@pytest.mark.parametrize(("name", "layout", "sent"), [
    ("r128", "contiguous", 0),
    ("r128 inside", "contiguous", 6144 + 16),
    ("r4 many", "contiguous", 8192 + 2048 + 32),
    ("r4 many inside", "zigzag", 20480 + 5120 + 32),
])  # fmt: skip
def test_the_benchmark_measures(world: World, name: str, layout: str, sent: int) -> None:
    rows = world.run(2, row, layout, name)
    assert rows[0] == rows[1], "every rank has the row of all"
    assert rows[0]["bytes"] == sent and rows[0]["case"] == f"{name} s768" and rows[0]["variant"] == f"2 {layout}"
    assert all(rows[0][key] > 0 for key in ("one_us", "cut_us", "handover_us", "gather_us", "share"))
    assert rows[0]["exchange_us"] >= 0


def test_cases_are_those_of_the_documents() -> None:
    assert [case.name for case in parallel.CASES if not case.inside] == ["r128", "r4", "r4 many"]
    assert parallel.parse([]).tokens == 1 << 20
