"""Training calls under torch.compile, over fake tensors and with activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend
from support.training_support import SPECS, Problem
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from kvfold.training import Packing, compress, ops

CPU = Backend("torch", torch.device("cpu"))
PLACES = [CPU, pytest.param(Backend("triton", torch.device("cuda", 0)), marks=pytest.mark.gpu)]
each_place = pytest.mark.parametrize("place", PLACES, ids=["cpu", "cuda"])


def operands(problem: Problem, place: Backend, pair: bool, latent: bool, fmt: str) -> tuple:
    given, packing = problem.given(place), problem.packing(place.device)
    tokens = problem.tokens(place.device, pair)
    value, score = tokens if pair else (tokens, None)
    leaves = [
        x if x is None else x.detach().clone().requires_grad_() for x in (value, score, given["ape"], given["norm_weight"])
    ]
    value, score, ape, weight = leaves
    held = value, score, packing.pieces, ape, weight, given["rope"], None
    return *held, packing.tokens, packing.max_seqlen, problem.spec._text, None, None, fmt, latent, place.name


@each_place
@pytest.mark.parametrize(
    "name, pair, latent, fmt, dtype",
    [
        ("csa", False, True, "", torch.float32),
        ("hca", True, False, "", torch.float32),
        ("hca", False, True, "", torch.bfloat16),
        ("v41-r1", False, False, "", torch.float32),
        ("csa", False, False, "mxfp4", torch.float32),
    ],
)
def test_opcheck(place: Backend, name: str, pair: bool, latent: bool, fmt: str, dtype: torch.dtype) -> None:
    problem = Problem.make(SPECS[name], dtype, spare=0)
    found = torch.library.opcheck(ops.OPS.train_compress.default, operands(problem, place, pair, latent, fmt))
    assert len(found) == 4 and set(found.values()) == {"SUCCESS"}


def gradients(call, problem: Problem, place: Backend) -> list[torch.Tensor]:
    """Of a loss that needs both results, after `call(rows, ape, weight, rope, cu_seqlens)`."""
    given = problem.given(place)
    leaves = [problem.tokens(place.device), given["ape"], given["norm_weight"]]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    entries, latent = call(*leaves, given["rope"], problem.cu_seqlens.to(place.device))
    (entries.sin().sum() + latent.cos().sum()).backward()
    return [entries.detach(), *(x.grad for x in leaves)]


@each_place
@pytest.mark.parametrize("name", ["csa", "hca"])
def test_compiled_and_checkpointed_are_eager_to_the_bit(place: Backend, name: str) -> None:
    """The packing is built in the compiled code, too."""
    problem = Problem.make(SPECS[name], spare=0)

    def call(rows, ape, weight, rope, cu_seqlens):
        packing = Packing.build(cu_seqlens, rows.shape[0], problem.spec.ratio, max_seqlen=100)
        return compress(rows, packing, spec=problem.spec, ape=ape, norm_weight=weight, rope=rope, latent=True)

    want = gradients(call, problem, place)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for other in (compiled, lambda *args: checkpoint(call, *args, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(other, problem, place), want, strict=True))


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    problem = Problem.make(SPECS["hca"], torch.bfloat16, spare=0)
    given, packing = problem.given(CPU) | {"latent": True, "out_dtype": torch.float32}, problem.packing(CPU.device)
    real = compress(problem.kv_score, packing, **given)
    with FakeTensorMode() as mode:
        given = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        fake = Packing(
            packing.tokens, packing.ratio, packing.max_seqlen, *map(mode.from_tensor, (packing.cu_entries, packing.pieces))
        )
        found = compress(mode.from_tensor(problem.kv_score), fake, **given)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in real]


def test_a_format_of_ones_own_is_refused_when_traced() -> None:
    from dataclasses import replace

    from kvfold.storage.formats import FORMATS

    problem = Problem.make(SPECS["csa"], spare=0)
    packing, own = problem.packing(CPU.device), replace(FORMATS["bf16"], name="mine")
    given = problem.given(CPU) | {"fake_quant": own}
    assert compress(problem.kv_score, packing, **given).shape[1] == 32
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(ValueError, match="fake_quant must be a format of"):
        compress(mode.from_tensor(problem.kv_score), packing, **given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["csa", "hca"])
def test_in_a_cuda_graph(name: str) -> None:
    """Packing, forward and backward, of lengths that change between replays."""
    place = Backend("triton", torch.device("cuda", 0))
    problem = Problem.make(SPECS[name], spare=0)
    given, tokens = problem.given(place), problem.kv_score.shape[0]
    rows = problem.tokens(place.device).requires_grad_()
    cu_seqlens = problem.cu_seqlens.cuda()
    other = torch.tensor([0, 0, tokens // 2, tokens // 2, tokens, tokens, tokens, tokens]).int()

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        entries = compress(rows, Packing.build(cu_seqlens, tokens, problem.spec.ratio), **given)
        return entries, *torch.autograd.grad(entries.square().sum(), rows)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            recorded = step()
    for lengths in (problem.cu_seqlens, other):
        cu_seqlens.copy_(lengths)
        graph.replay()
        torch.cuda.synchronize()
        found = [x.clone() for x in recorded]
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))
