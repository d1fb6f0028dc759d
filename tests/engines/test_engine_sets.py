"""The sets of prebuilt kernels for engines have what the plug-ins' calls ask for, in the engines' own classes."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import sglang_world
import test_sglang_v41
import test_vllm_v41
import torch
from engines import vllm_cpu  # noqa: F401
from sglang_world import World as SglangWorld
from sglang_world import config as sglang_config
from sglang_world import plugged
from test_sglang_v4 import DRAFTS, decode, extend, verify

from benchmarks.lib.vllm_world import Layer, Sizes, Step, World, make_config
from kvfold.backend_triton import launch
from kvfold.backend_triton.keys import Key, StepKey, StoreKey, WindowKey
from kvfold.integrations.vllm import register, unregister
from kvfold.precompile.asked import asked_of
from kvfold.precompile.sets import SETS
from kvfold.storage.formats import FORMATS

ON_CUDA = {"fp8_ds_mla_vllm_triton": "fp8_ds_mla"}  # what vLLM writes where it has no CUDA: what it writes there


def plain(key: Key) -> tuple:
    """Without the row of the table, which follows from sizes, and the norm weight's dtype, which is that of the checkpoint."""
    key = key._replace(config=None)
    if key.fmt is not None:
        key = key._replace(fmt=FORMATS[ON_CUDA.get(key.fmt.name, key.fmt.name)])
    if isinstance(key, StoreKey):
        return type(key), key._replace(norm_weight=key.norm_weight and torch.float32)
    return type(key), key._replace(types=key.types._replace(norm_weight=key.types.norm_weight and torch.float32))


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


def check(asked: set[Key], name: str) -> None:
    kinds = (StepKey, WindowKey, StoreKey)
    wanted = {plain(key) for key in asked if isinstance(key, kinds)}
    found = {plain(key) for keys, _ in asked_of(SETS[name]) for key in keys if isinstance(key, kinds)}
    assert wanted and wanted <= found


@pytest.mark.parametrize("state", ["window", "fold"])
def test_vllm(asked: set[Key], state: str) -> None:
    register(state, backend="triton")
    sizes = Sizes()
    for ratio, width, fp4 in ((4, 512, False), (4, 128, False), (4, 128, True), (128, 512, False)):
        config = make_config(sizes)
        world = World([Layer(sizes, config, ratio, width, fp4=fp4)], config, sizes)
        world.run((Step.of((0, 0, 9), (1, 0, 3)), Step.of((0, 9, 4, 3), (1, 3, 4, 1))))
    check(asked, "vllm" if state == "window" else "vllm-fold")
