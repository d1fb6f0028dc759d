"""Bad input of training calls: an error that names the argument, before anything is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.helpers import Backend
from support.training_support import SPECS, Problem
from torch._subclasses import FakeTensor, FakeTensorMode

from kvfold.training import Packing, compress, compress_backward, compress_forward

CPU = Backend("torch", torch.device("cpu"))
BF16, FP64, FP8 = torch.bfloat16, torch.float64, torch.float8_e4m3fn


def rows(width: int = 128, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(12, width, dtype=dtype)


BAD = {
    "no tensor": ({"kv_score": [1.0]}, "kv_score must be a torch.Tensor"),
    "nothing in a tuple": ({"kv_score": ()}, "kv_score must be a tensor or two"),
    "three tensors": ({"kv_score": (rows(64),) * 3}, "kv_score must be a tensor or two"),
    "fp16": ({"kv_score": rows(dtype=torch.float16)}, "kv_score must be torch.bfloat16"),
    "narrow": ({"kv_score": rows(64)}, "kv_score must have shape"),
    "columns": ({"kv_score": torch.zeros(128, 12).t()}, "kv_score must be contiguous"),
    "two dtypes": ({"kv_score": (rows(64), rows(64, BF16))}, r"kv_score\[1\] must be torch.float32"),
    "two lengths": ({"kv_score": (rows(64), rows(64)[1:])}, r"kv_score\[1\] must have shape"),
    "sparse": ({"kv_score": rows().to_sparse()}, "kv_score must be a plain dense tensor"),
    "other tokens": ({"packing": Packing.build(torch.tensor([0, 8]), 8, 4)}, "packing must be for the 12 rows"),
    "other ratio": ({"packing": Packing.build(torch.tensor([0, 12]), 12, 2)}, "packing must be for spec.ratio=4"),
    "no packing": ({"packing": torch.tensor([0, 12])}, "packing must be a Packing"),
    "packing of nothing": ({"packing": object.__new__(Packing)}, "packing must be made by Packing.build"),
    "out of numbers": ({"out_dtype": np.zeros(4)}, "out_dtype must be one of"),
    "backend of numbers": ({"backend": np.zeros(4)}, "backend must be one of"),
    "no spec": ({"spec": "csa"}, "spec must be a CompressorSpec"),
    "no ape": ({"ape": None}, "ape must be given exactly"),
    "ape in bf16": ({"ape": torch.zeros(4, 64, dtype=BF16)}, "ape must be torch.float32"),
    "ape of another shape": ({"ape": torch.zeros(4, 32)}, "ape must have shape"),
    "no weight": ({"norm_weight": None}, "norm_weight must be a torch.Tensor"),
    "short weight": ({"norm_weight": torch.ones(16)}, "norm_weight must have shape"),
    "no rope": ({"rope": None}, "rope must be a torch.Tensor"),
    "short rope": ({"rope": torch.zeros(8, 16)}, "rope must have 9 rows"),
    "learned rope": ({"rope": torch.zeros(64, 16, requires_grad=True)}, "rope must not require a gradient"),
    "rounding": ({"round_rows": 1}, "round_rows must be a bool"),
    "latent": ({"latent": None}, "latent must be a bool"),
    "out in fp16": ({"out_dtype": torch.float16}, "out_dtype must be one of"),
    "format": ({"fake_quant": "fp7"}, "fake_quant must be one of"),
    "format by its dtype": ({"fake_quant": FP8}, "fake_quant must be the name of a record format, .* got dtype"),
    "format of other entries": ({"fake_quant": "fp8_ds_mla"}, "is defined for head_dim"),
    "scale without format": ({"cache_scale": torch.ones(1)}, "cache_scale must be None without fake_quant"),
    "scale for none": ({"fake_quant": "bf16", "cache_scale": torch.ones(1)}, "cache_scale must be None as format"),
    "scale": ({"fake_quant": "fp8_tensor", "cache_scale": torch.ones(2)}, "cache_scale must have shape"),
    "learned scale": (
        {"fake_quant": "fp8_tensor", "cache_scale": torch.ones(1, requires_grad=True)}, "cache_scale must not require",
    ),
    "backend": ({"backend": "cuda"}, "backend must be one of"),
    "fp64 records": (
        {"kv_score": rows(dtype=FP64), "ape": torch.zeros(4, 64).double(), "norm_weight": torch.ones(32).double(),
         "fake_quant": "bf16"}, "fake_quant must be None for kv_score of torch.float64",
    ),
    "fp64 kernels": ({"kv_score": rows(dtype=FP64), "backend": "triton"}, "kv_score must be torch.bfloat16 or torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("changed, message", BAD.values(), ids=BAD.keys())
def test_forward(changed: dict, message: str) -> None:
    problem = Problem.make(SPECS["csa"], lengths=[12], spare=0)
    arguments = problem.given(CPU) | {"kv_score": problem.kv_score, "packing": problem.packing(CPU.device)} | changed
    for call in (compress, compress_forward):
        with pytest.raises((TypeError, ValueError), match=message):
            call(arguments.pop("kv_score"), arguments.pop("packing"), **arguments)
        arguments = problem.given(CPU) | {"kv_score": problem.kv_score, "packing": problem.packing(CPU.device)} | changed


@pytest.mark.parametrize("changed, message", BAD.values(), ids=BAD.keys())
def test_behind_a_good_call(changed: dict, message: str) -> None:
    """What was right of a layer is not looked at again; what is other than then is."""
    problem = Problem.make(SPECS["csa"], lengths=[12], spare=0)
    good = problem.given(CPU) | {"kv_score": problem.kv_score, "packing": problem.packing(CPU.device)}
    compress(**good)
    with pytest.raises((TypeError, ValueError), match=message):
        compress(**good | changed)
    compress(**good)


@pytest.mark.parametrize("name", ["rope", "cache_scale"])
def test_what_is_learned_from_a_later_step_on(name: str) -> None:
    problem = Problem.make(SPECS["csa"], lengths=[12], spare=0)
    given = problem.given(CPU) | {"fake_quant": "fp8_tensor", "cache_scale": torch.ones(1)}
    compress(problem.kv_score, problem.packing(CPU.device), **given)
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
        compress(problem.kv_score, problem.packing(CPU.device), **given)


def test_a_packing_that_changed() -> None:
    problem = Problem.make(SPECS["csa"], lengths=[12], spare=0)
    given, packing = problem.given(CPU), problem.packing(CPU.device)
    compress(problem.kv_score, packing, **given)
    packing.tokens = 48
    with pytest.raises(ValueError, match="packing must have a piece for each of 12 entries"):
        compress(torch.zeros(48, 128), packing, **given)


def test_scores_at_half_an_element() -> None:
    """Kernels reach them from the values, in whole elements."""
    problem = Problem.make(SPECS["csa"], lengths=[12], spare=0)
    score = torch.frombuffer(bytearray(12 * 64 * 4 + 2), dtype=torch.float32, offset=2).view(12, 64)
    with pytest.raises(ValueError, match=r"kv_score\[1\] must begin at a multiple of its element size"):
        compress((rows(64), score), problem.packing(CPU.device), **problem.given(CPU))


def test_scores_without_a_gate() -> None:
    problem = Problem.make(SPECS["v41-r1"], lengths=[4], spare=0)
    with pytest.raises(ValueError, match="kv_score must be values alone"):
        compress((problem.kv_score,) * 2, problem.packing(CPU.device), **problem.given(CPU))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"d_entries": torch.zeros(2, 32)}, "d_entries must have shape"),
        ({"d_entries": torch.zeros(1, 32).expand(1 << 40, 32)}, "d_entries must have shape"),
        ({"d_entries": torch.zeros(3, 32, dtype=BF16)}, "d_entries must be torch.float32"),
        ({"d_latent": torch.zeros(3, 16)}, "d_latent must have shape"),
        ({"kept": torch.zeros(3, 3, 32)}, "kept must have shape"),
    ],
)
def test_backward(changed: dict, message: str) -> None:
    problem = Problem.make(SPECS["csa"], lengths=[12], spare=0)
    packing, given = problem.packing(CPU.device), problem.given(CPU)
    kept = compress_forward(problem.kv_score, packing, **given).kept
    arguments = given | {"kept": kept, "d_entries": torch.zeros(3, 32)} | changed
    with pytest.raises((TypeError, ValueError), match=message):
        compress_backward(arguments.pop("d_entries"), problem.kv_score, packing, arguments.pop("kept"), **arguments)


def test_fake_tensors_beside_real_ones() -> None:
    """Outside of their mode; a packing of fake offsets is fake in whole."""
    problem, mode = Problem.make(SPECS["csa"], lengths=[12], spare=0), FakeTensorMode()
    packing, given = problem.packing(CPU.device), problem.given(CPU)
    with pytest.raises(TypeError, match="packing must be a FakeTensor like kv_score"):
        compress(mode.from_tensor(problem.kv_score), packing, **given)
    fake = Packing.build(mode.from_tensor(problem.cu_seqlens), 12, 4)
    assert isinstance(fake.pieces, FakeTensor) and fake.pieces.shape == packing.pieces.shape
    with pytest.raises(TypeError, match=r"packing\.pieces must be a plain dense tensor"):
        compress(problem.kv_score, fake, **given)


def test_transforms_of_torch_func_are_refused() -> None:
    problem = Problem.make(SPECS["csa"], lengths=[12], spare=0)
    packing, given = problem.packing(CPU.device), problem.given(CPU)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return compress(x, packing, **given).sum()

    for transform, rows in ((torch.func.grad, problem.kv_score), (torch.func.vmap, problem.kv_score[None])):
        with pytest.raises(
            TypeError, match=r"kv_score must be a plain dense tensor, got one inside a transform of torch\.func"
        ):
            transform(loss)(rows)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_second_derivative_is_refused(how: str) -> None:
    """Also of the operator: it would be wrong by all that goes through the call."""
    problem = Problem.make(SPECS["csa"], lengths=[12], spare=0)
    rows, packing, given = problem.kv_score.requires_grad_(), problem.packing(CPU.device), problem.given(CPU)

    def call(x: torch.Tensor) -> torch.Tensor:
        return compress(x, packing, **given)

    entries = (call if how == "eager" else torch.compile(call, fullgraph=True, backend="eager"))(rows)
    (first,) = torch.autograd.grad(entries.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|it is differentiable once"):
        first.sum().backward()
