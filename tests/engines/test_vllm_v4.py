"""DeepSeek-V4 in vLLM: its own compressors and builders with kvfold and without, over the same steps, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, reduce

import pytest
import torch
from engines import vllm_cpu  # noqa: F401
from engines.vllm_compare import check_same
from vllm.config import set_current_vllm_config
from vllm.models.deepseek_v4 import compressor
from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec

from benchmarks.lib.vllm_world import BLOCK, Layer, Memory, Sizes, Step, World, make_config
from kvfold.integrations.vllm import UnsupportedError, refused, register, unregister

# Prompts whole and in chunks, beside decoding; 1 and 4 new tokens, of which drafts are rejected; padding of requests and
# tokens; a batch of nobody's. Then sequence 3 has the first 256 tokens of sequence 0 already.
BEFORE = (
    Step.of((0, 0, 150), (1, 0, 9)),
    Step.of((0, 150, 112), (1, 9, 1), (2, 0, 5), requests=4, tokens=120),
    Step.of((0, 262, 4, 2), (1, 10, 4, 0), (2, 5, 4, 1), requests=4, tokens=16),
    Step.of((0, 0, 4), (1, 0, 4), dummy=True),
    Step.of((1, 10, 1), (0, 264, 1), requests=3, tokens=3),
)
HIT = (
    Step.of((3, 256, 127), (0, 265, 117)),
    Step.of((3, 383, 4, 1), (0, 382, 4)),
    Step.of((0, 386, 1), (3, 384, 1)),
    Step.of((3, 385, 100), (1, 11, 120)),
)
SIZES = Sizes()
LAYERS = {
    "C4": ((4, 512, False), (4, 128, False)),
    "C4 mxfp4": ((4, 128, True),),
    "C128": ((128, 512, False),),
}


@pytest.fixture(autouse=True)
def own_classes() -> Iterator[None]:
    yield
    unregister()


def run(layers: str, *, cache_first: bool = False) -> World:
    config = make_config(SIZES)
    made = [Layer(SIZES, config, ratio, width, fp4=fp4, cache_first=cache_first) for ratio, width, fp4 in LAYERS[layers]]
    world = World(made, config, SIZES)
    world.run(BEFORE)
    world.hit(3, 0, BLOCK)
    world.run(HIT)
    return world


@cache
def theirs(layers: str) -> World:
    return run(layers)


def check(found: World, wanted: World) -> None:
    assert refused() == 0
    for ours, its in zip(found.layers, wanted.layers, strict=True):
        assert type(ours.compressor) is not type(its.compressor)
        check_same(ours.states, its.states, to_the_bit=True)
        check_same(ours.caches, its.caches, to_the_bit=ours.compressor.head_dim == 128)


@pytest.mark.parametrize("layers", LAYERS)
def test_window(layers: str) -> None:
    """state="window": vLLM's pages of raw rows hold the same bits, and so do its caches."""
    wanted = theirs(layers)
    register()
    check(run(layers), wanted)


def test_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan for any step, which graphs of a part of the model record, serves all steps with the same result."""
    wanted = theirs("C4 mxfp4")
    register()
    from kvfold.integrations.vllm import config, plans

    monkeypatch.setattr(config, "recorded", lambda context, x: plans.Recorded.PIECE)
    check(run("C4 mxfp4"), wanted)


def move(layer: Layer) -> None:
    """The pages of a layer in other memory, as vLLM makes its caches anew; what was there is no one's."""
    old, count = (layer.caches, layer.states), len(layer.caches.bytes)
    pool = torch.cat([memory.bytes for memory in old])
    for memory, name, own in zip(old, ("caches", "states"), (slice(count), slice(count, None)), strict=True):
        made = Memory(pool, own, memory.view.shape[1:], memory.view.dtype)
        made.before = memory.before
        memory.bytes.fill_(0xA5)
        setattr(layer, name, made)
    layer.compressor.state_cache.bind_kv_cache(layer.states.view[:, None])
    layer.config.compilation_config.static_forward_context[layer.name].kv_cache = layer.caches.view


def test_pages_in_other_memory() -> None:
    wanted = theirs("C4 mxfp4")
    register()
    config = make_config(SIZES)
    world = World([Layer(SIZES, config, 4, 128, fp4=True)], config, SIZES)
    world.run(BEFORE)
    move(world.layers[0])
    world.hit(3, 0, BLOCK)
    world.run(HIT)
    check(world, wanted)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("parallel_config.decode_context_parallel_size", 2, "decode_context_parallel_size must be 1"),
        ("parallel_config.prefill_context_parallel_size", 2, "prefill_context_parallel_size must be 1"),
        ("parallel_config.enable_dbo", True, "enable_dbo and ubatch_size must be off"),
        ("kv_transfer_config", "any", "kv_transfer_config must be None"),
    ],
)
def test_refused(path: str, value: object, named: str) -> None:
    """What a configuration asks for that kvfold does not do is said when the model is built."""
    register("fold")
    config = make_config(SIZES)
    *holders, name = path.split(".")
    object.__setattr__(reduce(getattr, holders, config), name, value)
    for ratio in (128, 2) if value != "any" else (128,):
        with pytest.raises(UnsupportedError, match=named):
            Layer(SIZES, config, ratio)


def test_another_state_is_refused() -> None:
    register("fold")
    register("fold")
    with pytest.raises(ValueError, match="state must be 'fold'"):
        register("window")


def test_the_cache_builds_first() -> None:
    wanted = theirs("C128")
    register()
    check(run("C128", cache_first=True), wanted)


def test_fold() -> None:
    """state="fold": ratio 128 in one block for each request; the caches hold the same."""
    wanted = theirs("C128")
    register("fold")
    found = run("C128")
    assert refused() == 0
    check_same(found.layers[0].caches, wanted.layers[0].caches, to_the_bit=False)
    assert len(found.layers[0].states.bytes) == SIZES.requests  # blocks


def block_layouts() -> tuple[dict[str, int], list[KVCacheGroupSpec]]:
    """What a V4 of six layers asks vLLM for, in bytes of a page, and the groups that vLLM makes of that."""
    config = make_config(SIZES)
    config.cache_config.kv_cache_layout, config.scheduler_config.disable_hybrid_kv_cache_manager = "BLNHC", False
    register_all_kvcache_specs(config)
    mla = {"num_kv_heads": 1, "dtype": torch.uint8, "alignment": 576}
    wide = {"head_size": 512, "state_content_bytes": 584, "model_version": "deepseek_v4", **mla}
    specs: dict[str, KVCacheSpec] = {}
    with set_current_vllm_config(config):
        for i, ratio in enumerate((4, 128) * 3):
            specs[f"{i}.swa"] = SlidingWindowMLASpec(block_size=64, sliding_window=128, **wide)
            specs[f"{i}"] = MLAAttentionSpec(block_size=BLOCK, tokens_per_state=ratio, **wide)
            widths = {"state": 512, "indexer.state": 128} if ratio == 4 else {"state": 512}
            for name, width in widths.items():
                made = compressor.CompressorStateCache(width * (4 if ratio == 4 else 2), torch.float32, ratio, f"{i}.{name}")
                specs[f"{i}.{name}"] = made.get_kv_cache_spec(config)
            if ratio == 4:
                specs[f"{i}.indexer"] = MLAAttentionSpec(block_size=BLOCK, head_size=132, tokens_per_state=4, **mla)
    return {name: spec.page_size_bytes for name, spec in specs.items()}, get_kv_cache_groups(config, specs)


def test_fold_fits_into_blocks() -> None:
    """vLLM groups fold states as it does raw ones, in blocks that are no wider, one for each request."""
    _, wanted = block_layouts()
    register("fold")
    pages, found = block_layouts()
    assert pages["1.state"] == 37440
    assert [group.layer_names for group in found] == [group.layer_names for group in wanted]
    assert max(g.kv_cache_spec.page_size_bytes for g in found) == max(g.kv_cache_spec.page_size_bytes for g in wanted)
    (folded,) = [group.kv_cache_spec for group in found if "1.state" in group.layer_names]
    assert folded.max_memory_usage_bytes(make_config(SIZES)) == folded.page_size_bytes == 3 * 37440


@pytest.mark.parametrize(("ratio", "width", "state"), [(4, 128, "window"), (128, 512, "window"), (128, 512, "fold")])
def test_interpreted(ratio: int, width: int, state: str) -> None:
    """kvfold's own kernels, interpreted."""
    begin = ratio - 3  # so that the next step ends a window
    steps = (Step.of((0, 0, begin), (1, 0, 3)), Step.of((0, begin, 4, 3), (1, 3, 4, 1)), Step.of((0, begin + 3, 1), (1, 4, 1)))
    worlds = []
    for backend in (None, "triton"):
        if backend:
            register(state, backend=backend)
        config = make_config(SIZES)
        worlds.append(World([Layer(SIZES, config, ratio, width)], config, SIZES))
        worlds[-1].run(steps)
    if state == "window":
        check(worlds[1], worlds[0])
    assert refused() == 0
    check_same(worlds[1].layers[0].caches, worlds[0].layers[0].caches, to_the_bit=False, of_bf16=width == 512)


def test_fewer_drafts_than_a_step() -> None:
    """Without speculation a decode step has 1 token; a step of 4 is planned as any other."""
    steps = (Step.of((0, 0, 9)), Step.of((0, 9, 1)), Step.of((0, 10, 4)))
    worlds = []
    sizes = Sizes(drafts=0)
    for ours in (False, True):
        if ours:
            register()
        config = make_config(sizes)
        worlds.append(World([Layer(sizes, config, 4, 128)], config, sizes))
        worlds[-1].run(steps)
    check(worlds[1], worlds[0])
