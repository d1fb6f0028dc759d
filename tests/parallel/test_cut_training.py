"""Training with cut sequences: entries and gradients have the bits of one process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.parallel_support import SPECS, World, drawn_cuts, every_cut

import kvfold
from kvfold.parallel import ContextParallel, CutPacking, Shards
from kvfold.parallel.training import bytes_sent
from kvfold.training import Packing, compress


class Case(NamedTuple):
    name: str
    lengths: tuple[int, ...]
    layout: str = "contiguous"
    each: bool = False
    cuts: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    two: bool = False
    weights: str = "gather"
    fake_quant: str | None = None
    scale: float | None = None  # of the cache
    wild: bool = False  # the gradient of an entry has an infinity
    backend: str = "torch"


class Made(NamedTuple):
    entries: torch.Tensor
    tokens: torch.Tensor  # the gradient
    ape: torch.Tensor | None
    norm_weight: torch.Tensor


def inputs(case: Case) -> tuple[torch.Tensor, dict, torch.Tensor]:
    spec, draw, total = SPECS[case.name], torch.Generator().manual_seed(len(case.lengths)), sum(case.lengths)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    rows = torch.randn(total, spec.kv_score_width, generator=draw).to(case.dtype)
    ape = torch.randn(spec.ratio, spec.channels, generator=draw).to(wide).requires_grad_() if spec.has_ape else None
    weight = (1 + 0.2 * torch.randn(spec.head_dim, generator=draw)).to(wide).requires_grad_()
    rope = kvfold.reference.rope_table(max(case.lengths) + 1, spec.rope_dim)
    given = {"spec": spec, "ape": ape, "norm_weight": weight, "rope": rope}
    count = sum(n // spec.ratio for n in case.lengths)
    g = torch.randn(count, spec.head_dim, generator=draw).to(case.dtype)
    if case.wild:
        g[1, 3] = torch.inf
    return rows, given, g


def halves(rows: torch.Tensor, two: bool) -> tuple[list[torch.Tensor], object]:
    """Leaves, and what a call takes of them."""
    leaves = [x.contiguous().requires_grad_() for x in (rows.detach().clone().chunk(2, dim=1) if two else (rows.clone(),))]
    return leaves, tuple(leaves) if two else leaves[0]


def alone(case: Case) -> Made:
    rows, given, g = inputs(case)
    leaves, tokens = halves(rows, case.two)
    ends = torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], dtype=torch.int32)
    packing = Packing.build(ends, len(rows), given["spec"].ratio, max_seqlen=max(case.lengths))
    entries = compress(tokens, packing, **given, **quantized(case), backend=case.backend)[: len(g)]
    entries.backward(g)
    return Made(entries.detach(), torch.cat([x.grad for x in leaves], dim=1), _grad(given["ape"]), given["norm_weight"].grad)


def quantized(case: Case) -> dict:
    scale = None if case.scale is None else torch.tensor([case.scale])
    return {"fake_quant": case.fake_quant, "cache_scale": scale}


def _grad(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.grad


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def check_cases(group: dist.ProcessGroup, cases: Sequence[Case]) -> list[torch.Tensor]:
    """Each case against one process. Returns the gradients of norm_weight."""
    found = []
    for case in cases:
        try:
            found.append(_check(group, case))
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
    return found


def _check(group: dist.ProcessGroup, case: Case) -> torch.Tensor:
    want, cp = alone(case), ContextParallel(group, case.layout)
    rows, given, g = inputs(case)
    shards = cp.split(case.lengths, each=case.each, cuts=case.cuts)
    own = shards.index(cp.rank)
    packing = cp.packing(shards, given["spec"])
    numbers = packing.numbers[cp.rank]
    leaves, tokens = halves(rows[own], case.two)
    options = quantized(case) | {"weights": case.weights, "backend": case.backend}
    entries = cp.entries(tokens, packing, **given, **options)
    assert torch.equal(bits(entries), bits(want.entries[numbers])), "entries"
    together = cp.all_entries(entries, packing)
    assert torch.equal(bits(together), bits(want.entries)), "all entries"
    # Attention on each rank gives a part of the gradient: the last rank has it all, the others zeros.
    together.backward(g if cp.rank == cp.size - 1 else torch.zeros_like(g))
    got = torch.cat([x.grad for x in leaves], dim=1)
    assert torch.equal(bits(got), bits(want.tokens[own])), "gradient of kv_score"
    weight = given["norm_weight"].grad
    if case.weights == "own":  # as a trainer does
        weight = weight.clone()
        dist.all_reduce(weight, group=group)
    if case.weights == "gather":
        assert torch.equal(bits(weight), bits(want.norm_weight)), "bits of the gradient of norm_weight"
        assert want.ape is None or torch.equal(bits(given["ape"].grad), bits(want.ape)), "bits of the gradient of ape"
    if case.wild:
        assert want.ape.isinf().any()
        return weight
    assert (weight - want.norm_weight).norm() <= 1e-5 * want.norm_weight.norm() + 1e-7, "gradient of norm_weight"
    if want.ape is not None:
        ape = given["ape"].grad.clone()
        if case.weights == "own":
            dist.all_reduce(ape, group=group)
        assert (ape - want.ape).norm() <= 1e-5 * want.ape.norm() + 1e-7, "gradient of ape"
    return given["norm_weight"].grad


@pytest.mark.parametrize("name", ["fold", "overlap", "rows", "wide overlap"])
def test_every_cut_in_two(world: World, name: str) -> None:
    total = 2 * SPECS[name].ratio + 2
    world.run(2, check_cases, [Case(name, (total,), cuts=cuts) for cuts in every_cut(total, 2)])


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_packed_sequences_cut_anywhere(world: World, layout: str, ranks: int) -> None:
    draw, cases = random.Random(10 + ranks), []
    for name in ("fold", "overlap", "rows", "wide overlap"):
        for each in (False, True):
            lengths = tuple(draw.choice((0, 1, draw.randrange(8), draw.randrange(60))) for _ in range(4)) + (20,)
            cuts = None if each else drawn_cuts(draw, sum(lengths), ranks * (2 if layout == "zigzag" else 1))
            cases.append(Case(name, lengths, layout, each, cuts))
    found = world.run(ranks, check_cases, cases)
    for one in found[1:]:
        assert all(map(torch.equal, one, found[0])), "the same bits of gradients of weights on all ranks"


def test_groups_of_many_windows(world: World) -> None:
    """Cuts inside of groups and of blocks of them, also where kernels add."""
    draw, cases = random.Random(4), []
    for name, total in (("fold", 500), ("overlap", 2200)):
        for layout in ("contiguous", "zigzag"):
            cuts = [sorted(draw.randrange(total + 1) for _ in range(5 if layout == "zigzag" else 2))]
            cases += [Case(name, (total - 90, 90), layout, cuts=(0, *some, total)) for some in cuts]
    cases += [Case("wide overlap", (400,), each=True), Case("fold", (420,), "zigzag", cuts=(0, 61, 150, 155, 300, 400, 420))]
    cases += [case._replace(backend="triton") for case in cases if case.name == "fold"][:2]
    world.run(3, check_cases, cases)


def sent(spec: kvfold.CompressorSpec, cut: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that cross a cut, in a forward and in a backward."""
    shards = Shards.build((5 * spec.ratio,), 2, cuts=(0, cut, 5 * spec.ratio))
    left, right = (bytes_sent(CutPacking(shards, rank, spec, torch.device("cpu")), spec, dtype) for rank in range(2))
    assert left[1] == right[0] == 0, "forwards to the right, back to the left"
    return left[0], right[1]


def test_bytes_that_cross_are_those_of_v4() -> None:
    """As docs/parallel.md says: of ratio 128 a fold each way, of ratio 4 at most 7 rows; raw rows in fp64."""
    bf16, hca, csa = torch.bfloat16, kvfold.V4_HCA, kvfold.V4_CSA
    assert {sent(hca, cut, bf16) for cut in (257, 300, 383)} == {(6144, 6144)} and sent(hca, 256, bf16) == (0, 0)
    assert sent(hca, 383, torch.float64) == (127 * 8192, 127 * 8192)
    assert [sent(csa, cut, bf16) for cut in (8, 9, 10, 11)] == [(n * 4096, n * 4096) for n in (4, 5, 6, 7)]


def test_windows_over_many_ranks(world: World) -> None:
    """Shards shorter than a window: folds come in a chain, and one window has tokens of all ranks, and of a rank twice."""
    cases = [
        Case("fold", (30,), cuts=(0, 11, 13, 16, 30)),
        Case("fold", (30,), cuts=(0, 11, 13, 16, 30), wild=True),
        Case("fold", (30, 20), cuts=(0, 2, 4, 8, 50), weights="reduce"),
        Case("fold", (27, 20), cuts=(0, 9, 9, 10, 47)),
        Case("fold", (27, 20), "zigzag", cuts=(0, 10, 11, 12, 13, 14, 15, 16, 47)),
        Case("plain fold", (30,), cuts=(0, 11, 13, 16, 30), two=True, dtype=torch.bfloat16),
        Case("fold", (30,), cuts=(0, 11, 13, 16, 30), dtype=torch.float64, backend="torch"),
        Case("fold", (30,), "zigzag", cuts=(0, 1, 2, 3, 4, 5, 6, 7, 30), fake_quant="fp8_tensor", scale=0.25),
    ]
    kernels = [case._replace(backend="triton") for case in cases if case.dtype != torch.float64]
    world.run(4, check_cases, [*cases, *kernels[::2], kernels[-1]])


def test_what_else_is_taken(world: World) -> None:
    bf16 = torch.bfloat16
    world.run(2, check_cases, [
        Case("overlap", (21, 9), cuts=(0, 14, 30), dtype=bf16),
        Case("fold", (40, 9), cuts=(0, 13, 49), dtype=bf16, two=True),
        Case("indexer", (21, 9), cuts=(0, 14, 30), two=True, weights="reduce"),
        Case("fold", (40, 9), cuts=(0, 40, 49), weights="own"),
        Case("indexer", (21, 9), cuts=(0, 13, 30), dtype=bf16, fake_quant="mxfp4"),
        Case("tokens", (5, 4), cuts=(0, 3, 9)),
        Case("overlap", (3, 2), cuts=(0, 2, 5)),
    ])  # fmt: skip


def test_kernels_are_cut_as_well(world: World) -> None:
    """These write gradients into memory that is not zero before: every half of every row must be written by somebody."""
    cases = [
        Case("fold", (23,), cuts=(0, 4, 23)),
        Case("fold", (23, 3), "zigzag", cuts=(0, 2, 5, 14, 26)),
        Case("overlap", (14, 5), cuts=(0, 9, 19), two=True),
        Case("overlap", (14, 5, 9), "zigzag", cuts=(0, 2, 3, 16, 28)),
        Case("rows", (10, 5), "zigzag", each=True),
        Case("wide overlap", (30, 12), cuts=(0, 13, 42)),
        Case("tokens", (5, 4), cuts=(0, 3, 9)),
    ]
    world.run(2, check_kernels, [case._replace(backend="triton") for case in cases])


def check_kernels(group: dist.ProcessGroup, cases: Sequence[Case]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        empty = torch.empty

        def filled(*shape, **how) -> torch.Tensor:
            made = empty(*shape, **how)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        patch.setattr(torch, "empty", filled)
        check_cases(group, cases)


def test_wrong_arguments_are_named() -> None:
    cp, spec = ContextParallel(), SPECS["overlap"]
    shards = cp.split((9,))
    packing = cp.packing(shards, spec)
    good = {"spec": spec, "ape": torch.zeros(4, 32), "norm_weight": torch.ones(16), "rope": torch.ones(9, 8)}
    rows = torch.zeros(9, 64)
    calls = {
        "shards": lambda: cp.packing(Shards.build((9,), 1, start_pos=(4,)), spec),
        "packing": lambda: cp.entries(rows, shards, **good),
        "spec": lambda: cp.entries(rows, packing, **good | {"spec": SPECS["fold"]}),
        r"packing(?= must be for the 8 rows of kv_score)": lambda: cp.entries(rows[:8], packing, **good),
        "ape": lambda: cp.entries(rows, packing, **good | {"ape": torch.zeros(3, 32)}),
        "rope": lambda: cp.entries(rows, packing, **good | {"rope": torch.ones(4, 8)}),
        "weights": lambda: cp.entries(rows, packing, **good, weights="mean"),
        "entries": lambda: cp.all_entries(rows, packing),
    }
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must"):
            call()
    assert cp.entries(rows, packing, **good).shape == (2, 16)
