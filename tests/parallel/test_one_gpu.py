"""Ranks in one process (`benchmarks/lib/ranks.py`) have the bits of the whole, on a GPU too: with shards shorter than a window,
so that folds and carries go in a chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import kvfold
from benchmarks.lib.ranks import Mail, close, ranks_of, settle
from benchmarks.run import parallel, parallel_alone
from kvfold.parallel import ContextParallel, Shards
from kvfold.training import Packing, compress

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CUTS = {
    (2, "zigzag"): (0, 130, 150, 190, 340),
    (3, "contiguous"): (0, 150, 190, 340),
    (4, "contiguous"): (0, 1, 131, 133, 340),
}


def gradients(ranks: list[tuple[ContextParallel, Mail]], device: torch.device, spec: kvfold.CompressorSpec) -> None:
    cuts = CUTS[len(ranks), ranks[0][0].layout]
    tokens, draw = cuts[-1], torch.Generator().manual_seed(3)
    sizes = (tokens, spec.kv_score_width), (spec.ratio, spec.channels), (spec.head_dim,), (tokens // spec.ratio, spec.head_dim)
    rows, ape, weight, g = (torch.randn(size, generator=draw).to(device) for size in sizes)
    rows, g, rope = rows.bfloat16(), g.bfloat16(), kvfold.reference.rope_table(tokens, spec.rope_dim).to(device)
    shards = Shards.build([tokens], len(ranks), layout=ranks[0][0].layout, cuts=cuts)

    def step_of(given: torch.Tensor, of: torch.Tensor, call: Callable, begin: Callable) -> Callable[[], list[torch.Tensor]]:
        leaves = [x.clone().requires_grad_() for x in (given, ape, weight)]

        def step() -> list[torch.Tensor]:
            begin()
            entries = call(leaves[0], spec=spec, ape=leaves[1], norm_weight=leaves[2], rope=rope).mul_(1)  # may be written to
            return [entries.detach(), *torch.autograd.grad(entries, leaves, of)]

        return step

    whole = Packing.build(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens, spec.ratio)
    one = step_of(rows, g, lambda x, **k: compress(x, whole, **k)[: len(g)], lambda: None)()
    steps, parts = [], []
    for cp, mail in ranks:
        own, packing = shards.index(mail.rank).to(device), cp.packing(shards, spec, device=device)
        made = packing.numbers[mail.rank]
        parts.append((own, made))
        call = lambda x, cp=cp, packing=packing, **k: cp.entries(x, packing, **k)  # noqa: E731
        steps.append(step_of(rows[own], g[made], call, mail.begin))
    settle(ranks, steps)
    for (own, made), step in zip(parts, steps, strict=True):
        wanted = one[0][made], one[1][own], *one[2:]
        for what, found, want in zip(("entries", "kv_score", "ape", "norm_weight"), step(), wanted, strict=True):
            assert torch.equal(found, want), f"{spec}: {what}"


@pytest.mark.parametrize(
    ("device", "ranks", "layout"),
    [("cpu", 2, "zigzag"), *(pytest.param("cuda", *how, marks=pytest.mark.gpu) for how in CUTS)],  # on a CPU others do it
)
def test_gradients_of_short_shards(device: str, ranks: int, layout: str) -> None:
    for spec in (kvfold.V4_HCA, kvfold.V4_CSA):
        gradients(ranks_of(ranks, layout), torch.device(device), spec)


@pytest.mark.parametrize("device", DEVICES)
def test_what_ranks_have_to_do_is_timed(device: str) -> None:
    """The benchmark compares all bits itself."""
    timer = parallel.Timer(torch.device(device), 1, graph=True)
    for case, sent in ((parallel.CASES[1], 6160), (parallel.CASES[5], 25632)):
        (row,) = parallel_alone.measure(case, 512, (2,), ("contiguous",), timer)
        assert row["case"] == f"{case.name} s512" and row["bytes"] == sent and row["messages"] == 1
    (row,) = parallel_alone.measure_training(parallel.CASES[1], 256, (2,), ("contiguous",), timer)
    assert row["case"] == "train r128 inside s256" and row["bytes"] == 6144 and row["messages"] == 2
    assert row["part_us"] == max(row["parts"]) > 0 and row["gathered"] > 0


def test_a_closed_box_takes_no_more_letters() -> None:
    ranks = ranks_of(2, "contiguous")
    (_, left), (_, right) = ranks
    numbers = torch.arange(4)
    assert left.gather(numbers, "numbers").tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert right.gather(numbers + 4, "numbers").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    close(ranks)
    left.begin()
    assert left.gather(numbers * 0, "numbers").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert left.gathered == 32
