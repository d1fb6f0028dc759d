"""DeepSeek-V4.1 in vLLM: its own compressors and builders with kvfold and without, over the same steps, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from engines import vllm_cpu  # noqa: F401
from engines.vllm_compare import check_same

from benchmarks.lib.vllm_world import BLOCK, Layer, Sizes, Step, World, make_config
from kvfold.integrations.vllm import refused, register, unregister

# Windows of 2 that are cut by chunks, by single tokens and by rejected drafts; rings of 8 rows that a chunk overruns; padding
# of requests and tokens; a hit that ends where a block does. A batch of nobody's has no latents to compare.
SIZES = Sizes()
STEPS = (
    Step.of((0, 0, 33), (1, 0, 9)),
    Step.of((0, 33, 20), (1, 9, 1), (2, 0, 5), requests=4, tokens=40),
    Step.of((0, 53, 4, 2), (1, 10, 4, 0), (2, 5, 4, 1), requests=4, tokens=16),
    Step.of((0, 55, 201), (1, 10, 1)),
)
DUMMY = (Step.of((0, 0, 4), (1, 0, 4), dummy=True),)
HIT = (Step.of((3, 256, 7), (0, 256, 4, 3)), Step.of((3, 263, 1), (0, 259, 4)))


@pytest.fixture(autouse=True)
def own_classes() -> Iterator[None]:
    yield
    unregister()


def run_few(backend: str | None) -> World:
    """A few steps over ratio 2. backend: of kvfold, None for vLLM's own classes."""
    if backend is not None:
        register(backend=backend)
    config = make_config(SIZES)
    world = World([Layer(SIZES, config, 2)], config, SIZES)
    world.run((Step.of((0, 0, 9), (1, 0, 2)), Step.of((0, 9, 4, 2), (1, 2, 4)), Step.of((0, 11, 1), (1, 6, 1))))
    return world


def run(record: int) -> World:
    config = make_config(SIZES)
    world = World([Layer(SIZES, config, 2, record=record), Layer(SIZES, config, 1, record=record)], config, SIZES)
    world.run(STEPS)
    world.latents, kept = [], world.latents
    world.run(DUMMY)
    world.latents = kept
    world.hit(3, 0, BLOCK)
    world.run(HIT)
    return world


@cache
def theirs(record: int) -> World:
    return run(record)


def check(found: World, wanted: World) -> None:
    assert refused() == 0
    for ours, its in zip(found.layers, wanted.layers, strict=True):
        assert type(ours.compressor) is not type(its.compressor)
        if ours.ratio > 1:
            check_same(ours.states, its.states, to_the_bit=True)
        check_same(ours.caches, its.caches, to_the_bit=False, of_bf16=ours.record == 584)
    ours, its = torch.cat(found.latents).float(), torch.cat(wanted.latents).float()
    # The last bit of bf16; where a window's two tokens cancel, 2^-21 of what they were, 4 roundings of numbers up to 2.
    assert bool(((ours - its).abs() <= its.abs() / 128 + 2.0**-21).all())
    assert int((ours != its).sum()) <= 1 + its.numel() // 10_000


@pytest.mark.parametrize("record", [584, 528, 288, 1024, 512])
def test_records(record: int) -> None:
    wanted = theirs(record)
    register()
    check(run(record), wanted)


def test_interpreted() -> None:
    """kvfold's own kernels, interpreted."""
    wanted = run_few(None)
    check(run_few("triton"), wanted)
