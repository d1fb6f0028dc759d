"""Which kernels `warmup` prepares for training: those that a forward and a backward ask for, without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from conftest import BACKENDS
from support.training_support import Problem

import kvfold
from kvfold import CompressorSpec
from kvfold.backend_triton import prepare as preparing
from kvfold.backend_triton.keys import PlanKey
from kvfold.storage.formats import FORMATS
from kvfold.training import Packing, compress, launch
from kvfold.training.variants import TrainingKey

FP32, BF16 = torch.float32, torch.bfloat16
LONG, SHORT = CompressorSpec(512, 128), CompressorSpec(128, 4, overlap=True, hadamard=True)
UNGATED = CompressorSpec(128, 1, has_ape=False, gate=False)
BACKEND = BACKENDS["cuda" if torch.cuda.is_available() else "interpreter"]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What is prepared, and whether as a dependent too."""
    found: dict = {}
    monkeypatch.setattr(
        preparing, "prepare", lambda keys, gpu, dependent, *_: found.update({k: dependent(k) for k in keys}) or 1
    )
    monkeypatch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda *_: torch.device("cuda", 0))
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[set]:
    """What calls launch, instead of launching it."""
    found: set = set()
    monkeypatch.setattr(launch, "launcher_of", lambda key, device: found.add(key) or (lambda *arguments: None))
    launch.launches_of.cache_clear()
    yield found
    launch.launches_of.cache_clear()


def step(spec: CompressorSpec, tokens: int, dtype: torch.dtype, pair: bool, norm: torch.dtype, **how: object) -> None:
    """Forward and backward of one sequence."""
    problem = Problem.make(spec, dtype, [tokens], spare=0)
    given = problem.given(BACKEND) | how
    given["norm_weight"] = given["norm_weight"].to(norm)
    rows = problem.tokens(BACKEND.device, pair)
    leaves = list(rows) if pair else [rows]
    leaves = [x.contiguous().requires_grad_() for x in leaves]
    packing = Packing.build(torch.tensor([0, tokens], device=BACKEND.device), tokens, spec.ratio)
    results = compress(tuple(leaves) if pair else leaves[0], packing, **given)
    loss = sum(x.float().nan_to_num(0.0).sum() for x in (results if isinstance(results, tuple) else [results]))
    torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("spec", [LONG, SHORT, UNGATED], ids=["long", "short", "ungated"])
def test_warmup_prepares_what_a_step_asks_for(prepared: dict, asked: set, spec: CompressorSpec) -> None:
    """All of it, and nothing else."""
    sizes, ways = (300, 4), (False, True)  # one whose windows several programs share, if they are long, and one without any
    kvfold.warmup(
        [spec], [None, "fp8_tensor"], dtypes=(FP32, BF16), norm_weight_dtypes=(FP32, BF16, None), max_new_tokens=(), apart=ways,
        latents=ways, training=sizes, round_rows=(None, False), out_dtypes=(None, FP32), pdl=False,
    )  # fmt: skip
    choices = product(sizes, (FP32, BF16), ways if spec.gate else (False,), (FP32, BF16), ways, (None, False), (None, FP32))
    for tokens, dtype, pair, norm, latent, rounds, out in choices:
        for fmt in (None, "fp8_tensor"):
            how = {"latent": latent, "round_rows": rounds, "out_dtype": out, "fake_quant": fmt}
            step(spec, tokens, dtype, pair, norm, **how)
    keys = {key for key in prepared if isinstance(key, TrainingKey)}
    assert asked == keys
    kernels = {LONG: {"forward", "entries", "read", "finish", "spread", "sum"}}.get(spec, {"forward", "read", "again", "sum"})
    assert {key.config.kernel for key in asked} == kernels


def test_what_is_prepared_besides(prepared: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """No training kernels unless asked for, and with `max_new_tokens=()` none of serving but plans; always as dependents."""
    from kvfold.backend_triton import launcher

    monkeypatch.setattr(launcher, "supports_pdl", lambda device: True)
    kvfold.warmup([SHORT], [None])
    assert not any(isinstance(key, TrainingKey) for key in prepared)
    prepared.clear()
    kvfold.warmup([SHORT], [None], max_new_tokens=(), training=(8192,), pdl=False)
    assert {type(key) for key in prepared} == {TrainingKey, PlanKey}
    assert all(dependent == isinstance(key, TrainingKey) for key, dependent in prepared.items())


@pytest.mark.parametrize(
    "name, wrong",
    [("training", 8192), ("training", (-1,)), ("training", (True,)), ("training", ("8k",)), ("round_rows", (1,)),
     ("round_rows", True), ("out_dtypes", (torch.float16,)), ("out_dtypes", FP32)],
)  # fmt: skip
def test_mistakes(prepared: dict, name: str, wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
        kvfold.warmup([SHORT], [None], **{name: wrong})
    assert not prepared


@pytest.mark.gpu
def test_a_first_step_compiles_nothing() -> None:
    from kvfold.backend_triton import launcher

    kvfold.warmup([LONG, SHORT], [None, "fp8_tensor"], max_new_tokens=(), training=(300,), apart=(False, True))
    before = launcher.compilations
    for spec, pair, fmt in product((LONG, SHORT), (False, True), (None, "fp8_tensor")):
        step(spec, 300, BF16, pair, FP32, fake_quant=fmt)
    assert launcher.compilations == before and FORMATS["fp8_tensor"].takes_scale
