"""Entries and gradients of training against fp64 autograd of the reference, and against differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.helpers import Backend
from support.training_support import REAL, SPECS, Problem, off, run, same

from kvfold import reference
from kvfold.training import compress

# What fp32 sums and exponentials leave; and the rounding of a gradient to bf16, 2**-8 of each at most, half that as a norm.
EXACT, ROUNDED = 1e-6, 2e-3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
each_spec = pytest.mark.parametrize("name", SPECS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def check(problem: Problem, backend: Backend, pair: bool, bound: float = EXACT, **how: object) -> None:
    """One call with latents, unrounded, against fp64; and again, for the same bits."""
    how = {"out_dtype": torch.float32, "round_rows": False} | how
    got = run(problem, backend, pair, **how)
    entries, want = problem.exact(problem.incoming(7), problem.incoming(8))
    n = problem.windows
    assert off(got.entries[:n], entries) < bound
    assert not got.entries[n:].any() and not got.latent[n:].any()
    mine = got.gradients
    assert mine.value.dtype == problem.kv_score.dtype
    assert off(mine.value, want.value) < (bound if mine.value.dtype == torch.float32 else bound + ROUNDED)
    # A score of equal values has a gradient of 0 as well, which rounding may miss: where the value's is not 0, it is not asked.
    nothing = want.value == 0
    nothing[:, problem.spec.channels :] &= nothing[:, : problem.spec.channels] if problem.spec.gate else True
    assert not mine.value[nothing].any(), "a token of no window has a gradient"
    assert off(mine.norm_weight, want.norm_weight) < bound
    if want.ape is not None:
        assert off(mine.ape, want.ape) < bound
    assert same(got, run(problem, backend, pair, **how))


@each_spec
@each_dtype
def test_against_fp64(backend: Backend, name: str, dtype: torch.dtype) -> None:
    problem = Problem.make(SPECS[name], dtype)
    check(problem, backend, pair=problem.spec.gate and dtype == torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL, ids=lambda name: f"cuda-{name}")
@pytest.mark.parametrize("pair", [False, True])
@each_dtype
def test_real_shapes_against_fp64(name: str, pair: bool, dtype: torch.dtype) -> None:
    lengths = [300, 0, 129, 5, 128, 700]
    check(Problem.make(REAL[name], dtype, lengths), Backend("triton", torch.device("cuda", 0)), pair)


@pytest.mark.parametrize("name", ["csa", "hca"])
@pytest.mark.parametrize("kind", ["magnitude 80", "ties", "masked", "one live"])
def test_hard_scores(backend: Backend, name: str, kind: str) -> None:
    problem = Problem.make(SPECS[name])
    spec, draw = problem.spec, torch.Generator().manual_seed(3)
    score = problem.kv_score[: sum(problem.lengths), spec.channels :]
    bound = EXACT
    if kind == "magnitude 80":
        score.copy_(torch.rand(score.shape, generator=draw) * 160 - 80)
        # Score and ape are added in fp32: a weight is off by that rounding, and what it is a share of as well.
        bound += 2**-23 * float(score.abs().max() + problem.weights.ape.abs().max())
    elif kind == "ties":
        problem.weights = replace(problem.weights, ape=torch.zeros_like(problem.weights.ape))
        score.copy_(torch.randint(0, 2, score.shape, generator=draw).float())
    elif kind == "masked":
        score[torch.rand(score.shape, generator=draw) < 0.4] = -torch.inf
        score[:: spec.ratio] = 0.5  # none is masked in whole
    else:
        score[torch.arange(len(score)) % spec.ratio != 0] = -torch.inf
    check(problem, backend, pair=False, bound=bound)


@pytest.mark.parametrize("name", ["csa", "hca"])
def test_rounded_rows(backend: Backend, name: str) -> None:
    """Pooled rows are rounded to bf16 by default where kv_score is bf16, and the gradient passes."""
    problem = Problem.make(SPECS[name], torch.bfloat16)
    got = run(problem, backend, out_dtype=torch.float32)
    pooled = pooled_rows(problem)
    entries, want = problem.exact(problem.incoming(7), problem.incoming(8), pooled)
    assert off(got.entries[: problem.windows], entries) < EXACT
    assert off(got.gradients.value, want.value) < ROUNDED
    assert off(got.gradients.norm_weight, want.norm_weight) < EXACT
    plain = run(problem, backend, out_dtype=torch.float32, round_rows=False)
    assert off(plain.entries, got.entries) > 1e-4, "nothing was rounded"


def pooled_rows(problem: Problem) -> torch.Tensor:
    """By the plain formula in fp64, to fp32: within a rounding of what kernels round, which no row of these ties with."""
    spec, found = problem.spec, []
    for start, n in zip(problem.cu_seqlens.tolist(), problem.lengths, strict=False):
        found.append(reference.pooled(problem.kv_score[start : start + n], spec, problem.weights.ape))
    return torch.cat(found).float()


@each_spec
def test_gradcheck(name: str) -> None:
    spec = SPECS[name]
    problem = Problem.make(spec, torch.float64, [0, 2 * spec.ratio + 1, spec.ratio - 1, spec.ratio], spare=0)
    packing, w = problem.packing(torch.device("cpu")), problem.weights
    leaves = [x.double().requires_grad_() for x in (problem.kv_score, w.norm_weight, w.ape) if x is not None]

    def call(rows: torch.Tensor, weight: torch.Tensor, ape: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return compress(rows, packing, spec=spec, ape=ape, norm_weight=weight, rope=w.rope, latent=True)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_gradcheck_of_two_tensors() -> None:
    problem = Problem.make(SPECS["csa"], torch.float64, [9, 3, 4], spare=0)
    packing, w = problem.packing(torch.device("cpu")), problem.weights
    leaves = [x.contiguous().requires_grad_() for x in problem.kv_score.split(problem.spec.channels, dim=1)]

    def call(value: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
        exact = {"ape": w.ape.double(), "norm_weight": w.norm_weight.double(), "rope": w.rope}
        return compress((value, score), packing, spec=problem.spec, **exact)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("lengths", [[3, 0, 2], [0]], ids=["short", "empty"])
@pytest.mark.parametrize("name", ["csa", "hca"])
def test_an_empty_result_depends_on_every_input(backend: Backend, name: str, lengths: list[int]) -> None:
    """A distributed run would wait for the gradients that other ranks have."""
    problem = Problem.make(SPECS[name], lengths=lengths, spare=0)
    given = problem.given(backend)
    pair = [x.requires_grad_() for x in problem.tokens(backend.device, pair=True)]
    leaves = [*pair, given["ape"].requires_grad_(), given["norm_weight"].requires_grad_()]
    entries, latent = compress(tuple(pair), problem.packing(backend.device), **given, latent=True)
    assert entries.shape == (sum(lengths) // problem.spec.ratio, problem.spec.head_dim) and not entries.any()
    (entries.sum() + latent.sum()).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in leaves)


def test_sequences_shorter_than_a_window_need_no_rotations(backend: Backend) -> None:
    """Together they have the tokens of one."""
    problem = Problem.make(SPECS["csa"], lengths=[3, 3], spare=0)
    given = problem.given(backend) | {"rope": problem.weights.rope[:0].to(backend.device)}
    rows = problem.tokens(backend.device).requires_grad_()
    entries = compress(rows, problem.packing(backend.device), **given)
    entries.sum().backward()
    assert entries.shape == (1, 32) and not entries.any() and not rows.grad.any()


def test_gradients_have_the_dtype_of_their_input(backend: Backend) -> None:
    """norm_weight in bf16, which entries are made with as it is; and what needs no gradient gets none."""
    problem = Problem.make(SPECS["csa"], torch.bfloat16)
    given = problem.given(backend)
    given["norm_weight"] = given["norm_weight"].bfloat16().requires_grad_()
    rows = problem.tokens(backend.device).requires_grad_()
    entries = compress(rows, problem.packing(backend.device), **given)
    assert entries.dtype == torch.bfloat16
    entries.float().square().sum().backward()
    assert rows.grad.dtype == given["norm_weight"].grad.dtype == torch.bfloat16 and given["ape"].grad is None


@pytest.mark.parametrize("name", ["csa", "hca"])
@pytest.mark.parametrize("stride", [0, 1])
def test_rows_that_overlap(backend: Backend, name: str, stride: int) -> None:
    """Any row stride will do. Torch's own choice of strides for a gradient of fewer tokens than channels is columns here."""
    problem = Problem.make(SPECS[name], lengths=[2 * SPECS[name].ratio + 1], spare=0)
    width, found = problem.spec.kv_score_width, []
    rows = problem.kv_score.to(backend.device).as_strided((problem.lengths[0], width), (stride, 1))
    for leaf in (rows.detach().requires_grad_(), rows.contiguous().requires_grad_()):
        entries = compress(leaf, problem.packing(backend.device), **problem.given(backend))
        found.append(torch.autograd.grad(entries.square().sum(), leaf)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["csa", "hca"])
def test_incoming_gradients_of_any_strides(backend: Backend, name: str) -> None:
    """As of a sum, which are one number seen many times, and as of a transposed result."""
    problem = Problem.make(SPECS[name])
    count, width = len(problem.kv_score) // problem.spec.ratio, problem.spec.head_dim
    one = torch.full((1, 1), 0.5, device=backend.device).expand(count, width)
    other = torch.randn(width, count, generator=torch.Generator().manual_seed(2)).to(backend.device).t()
    for incoming in ((one, other), (other, one)):
        found = []
        for given in (incoming, [g.contiguous() for g in incoming]):
            rows = problem.tokens(backend.device).clone().requires_grad_()
            results = compress(rows, problem.packing(backend.device), **problem.given(backend), latent=True)
            torch.autograd.backward(results, given)
            found.append(rows.grad)
        assert torch.equal(*found)


def test_a_loss_of_latents_alone(backend: Backend) -> None:
    """Or of entries alone: what has no gradient counts as zeros."""
    problem = Problem.make(SPECS["csa"])
    given, n = problem.given(backend), problem.windows
    found = []
    for used in (0, 1):
        rows = problem.tokens(backend.device).clone().requires_grad_()
        results = compress(rows, problem.packing(backend.device), **given, latent=True)
        g = problem.incoming().nan_to_num(0.0).to(results[0])
        results[used].backward(g)
        found.append(rows.grad)
        both = problem.tokens(backend.device).clone().requires_grad_()
        results = compress(both, problem.packing(backend.device), **given, latent=True)
        torch.autograd.backward(results, [g if i == used else torch.zeros_like(g) for i in (0, 1)])
        assert torch.equal(both.grad, rows.grad) and rows.grad[: n * 4].any()
    assert not torch.equal(*found)
