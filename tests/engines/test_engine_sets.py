"""The sets of prebuilt kernels for engines have what the plug-ins' calls ask for, in the engines' own classes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import test_sglang_v41 as test_sglang_v41_module
import test_vllm_v41 as test_vllm_v41_module
import torch
from engines import vllm_cpu  # noqa: F401
from test_sglang_v4 import DRAFTS, decode, extend, verify

from benchmarks.lib import sglang_world
from benchmarks.lib.sglang_world import ForwardMode, plugged
from benchmarks.lib.sglang_world import World as SglangWorld
from benchmarks.lib.sglang_world import config as sglang_config
from benchmarks.lib.vllm_world import Layer, Sizes, Step, World, make_config
from kvfold.backend_triton import launch
from kvfold.backend_triton.keys import Key, StepKey, StoreKey, WindowKey
from kvfold.backend_triton.variants import variant_of
from kvfold.integrations.sglang import low_ratio
from kvfold.integrations.vllm import config, register, unregister
from kvfold.precompile.asked import asked_of
from kvfold.precompile.sets import SETS
from kvfold.storage.formats import FORMATS

FP32 = torch.float32
ON_CUDA = {"fp8_ds_mla_vllm_triton": "fp8_ds_mla"}  # what vLLM writes where it has no CUDA: what it writes there


def plain(key: Key) -> object:
    """Without the row of the table, which follows from sizes; what is a checkpoint's, the norm's epsilon and dtype; and pooled
    rows, which a world of these tests asks for. Of `store` the kernel, which knows no ratio."""
    key = key._replace(spec=replace(key.spec, norm_eps=1e-6))
    if isinstance(key, StoreKey):
        return variant_of(key._replace(norm_weight=key.norm_weight and FP32), True, False)
    if key.fmt is not None:
        key = key._replace(fmt=FORMATS[ON_CUDA.get(key.fmt.name, key.fmt.name)])
    types = key.types._replace(rows=None, norm_weight=key.types.norm_weight and FP32)
    return type(key), key._replace(config=None, types=types)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Key]]:
    found: set[Key] = set()
    real = launch.launcher_of

    def launcher_of(key: Key, device: torch.device) -> object:
        found.add(key)
        return real(key, device)

    monkeypatch.setattr(launch, "launcher_of", launcher_of)
    yield found
    unregister()


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the plug-in of vLLM compiles when caches are first used."""
    found: list[dict] = []

    def compile_before(kv_score: torch.Tensor, backend: str | None, **what: object) -> None:
        found.append({"dtypes": (kv_score.dtype,), "pdl": False} | what)

    monkeypatch.setattr(config, "compile_before", compile_before)
    return found


def check(asked: set[Key], calls: Iterable[dict]) -> None:
    kinds = (StepKey, WindowKey, StoreKey)
    wanted = {plain(key) for key in asked if isinstance(key, kinds)}
    found = {plain(key) for keys, _ in asked_of(calls) for key in keys if isinstance(key, kinds)}
    assert wanted and wanted <= found


@pytest.mark.parametrize("state", ["window", "fold"])
def test_vllm(asked: set[Key], described: list[dict], state: str) -> None:
    register(state, backend="triton")
    sizes = Sizes()
    for ratio, width, fp4 in ((4, 512, False), (4, 128, False), (4, 128, True), (128, 512, False)):
        of_vllm = make_config(sizes)
        world = World([Layer(sizes, of_vllm, ratio, width, fp4=fp4)], of_vllm, sizes)
        world.run((Step.of((0, 0, 9), (1, 0, 3)), Step.of((0, 9, 4, 3), (1, 3, 4, 1))))
    check(asked, SETS["vllm" if state == "window" else "vllm-fold"])
    check(asked, described)


def test_vllm_v41(asked: set[Key], described: list[dict]) -> None:
    test_vllm_v41_module.run_few("triton")
    sizes = Sizes()
    of_vllm = make_config(sizes)
    world = World([Layer(sizes, of_vllm, 1, record=584)], of_vllm, sizes)
    world.run((Step.of((0, 0, 9), (1, 0, 3)),))
    check(asked, SETS["vllm-v41"])
    check(asked, described)


@pytest.mark.parametrize("state", ["pools", "fold"])
def test_sglang(asked: set[Key], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_world, "compress", functools.partial(sglang_world.compress, backend="triton"))
    with plugged(state), sglang_config(DRAFTS):
        world = SglangWorld([4, 128], drafts=DRAFTS)
        world.backend.allocate(1, 40)
        extend(world, (1, 0, 6))
        verify(world, (1, 6))
        decode(world, (1, 9))
    check(asked, SETS["sglang" if state == "pools" else "sglang-fold"])


@pytest.mark.parametrize("state", ["pools", "fold"])
def test_sglang_v41(asked: set[Key], state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compress", "store"):
        monkeypatch.setattr(low_ratio, name, functools.partial(getattr(low_ratio, name), backend="triton"))
    with plugged(state), sglang_config():
        engine = test_sglang_v41_module.Engine("v4", ours=True)
        engine.backend.allocate(1, 20)
        engine.step(ForwardMode.EXTEND, (1, 0, 9))
        engine.step(ForwardMode.DECODE, (1, 9, 1))
    check(asked, SETS["sglang-v41" if state == "pools" else "sglang-v41-fold"])
