"""The records that kvfold puts into SGLang's V4 caches, against SGLang's own readers and quantizers of its kernel tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.lib.sglang_world import Text, World, common, config, dsv41_kv_quant_reference, k_cache_reference, plugged

LENGTH = 600  # of request 1, on three pages


def world_of(layout: str = "v4", fp4: bool = False, **more: Any) -> World:
    """A prefill, and decode over the end of a window of each ratio."""
    with plugged("pools"), config(**more):
        world = World([4, 128], layout=layout, fp4=fp4)
        if fp4:
            replace_index_pool(world)
        world.backend.allocate(1, 700)
        steps = [(1, 0, LENGTH - 3)]
        world.run(world.backend.extend(steps), steps)
        for i in range(LENGTH - 3, LENGTH + 41):
            world.run(world.backend.decode([(1, i, 1)]), [(1, i, 1)])
    return world


def replace_index_pool(world: World) -> None:
    """The pool that SGLang makes where its fp4 indexer is switched on."""
    pool = world.backend.token_to_kv_pool
    old = pool.index_pools[4]
    pool.index_pools[4] = type(old)(old.size, old.page_size, old.dtype, 128, 1, "cpu", False, use_fp4_indexer=True)


def normed(text: Text, windows: range) -> torch.Tensor:
    """fp64 `[n, head_dim]`: pooled rows behind SGLang's norm."""
    c = text.compressor
    x = torch.stack([text.pooled(1, w) for w in windows])
    return x / (x.square().mean(1, keepdim=True) + c.norm.variance_epsilon).sqrt() * c.norm.weight.double()


def rotated(text: Text, x: torch.Tensor, windows: range) -> torch.Tensor:
    """SGLang's RoPE of the last 64 channels, by the position of the window's first token."""
    turned = (
        torch.view_as_complex(x[:, -64:].reshape(len(x), 32, 2))
        * text.compressor.freqs_cis[[w * text.compressor.ratio for w in windows]]
    )
    return torch.cat([x[:, :-64], torch.view_as_real(turned).flatten(1)], dim=1)


def finished(text: Text, windows: range) -> torch.Tensor:
    """fp32 `[n, head_dim]`: finished rows, in fp64 until the end; those of the indexer behind a Hadamard rotation."""
    x = rotated(text, normed(text, windows), windows)
    if text.compressor.rotate:
        for step in (1, 2, 4, 8, 16, 32, 64):
            low, high = x.view(len(x), -1, 2, step).unbind(2)
            x = torch.stack([low + high, low - high], dim=2).view(len(x), -1)
        x = x / 128**0.5
    return x.float()


def stored(world: World, text: Text) -> tuple[torch.Tensor, int, torch.Tensor, range]:
    pages, rows = world.cache_of(text)
    windows = range((LENGTH + 41) // text.compressor.ratio)
    return pages, rows, world.slots(text, 1, len(windows)), windows


@pytest.fixture(scope="module")
def v4() -> World:
    return world_of()


def test_main_records_as_sglang_reads_them(v4: World) -> None:
    """At most half a step of e4m3, 1/16 of the value or of the smallest of the group's 448th; rotated channels within bf16."""
    for text in v4.texts:
        if text.compressor.is_in_indexer:
            continue
        pages, rows, slots, windows = stored(v4, text)
        got = k_cache_reference.dequantize_k_cache_paged_ref(pages, slots, rows)[:, 0].float()
        exact = finished(text, windows)
        scale = 2.0 ** (exact[:, :448].view(-1, 7, 64).abs().amax(-1).clamp_min(1e-4) / 448).log2().ceil()
        step = torch.maximum(exact[:, :448].abs() / 16, scale.repeat_interleave(64, 1) * 2.0**-10)
        assert ((got[:, :448] - exact[:, :448]).abs() <= step * 1.07).all()  # rounded to bf16 before, 2^-8 of the value
        assert ((got[:, 448:] - exact[:, 448:]).abs() <= exact[:, 448:].abs() * 2.0**-8 + 1e-6).all()


def test_main_records_are_the_bytes_of_the_layout(v4: World) -> None:
    """SGLang's layout of values, rotated channels and scales; a rounding that goes the other way moves a byte by one."""
    for text in v4.texts:
        if text.compressor.is_in_indexer:
            continue
        pages, rows, slots, windows = stored(v4, text)
        x = finished(text, windows).bfloat16().float()
        groups = x[:, :448].view(-1, 7, 64)
        code = ((groups.abs().amax(-1).clamp_min(1e-4) / 448).log2().ceil() + 127).to(torch.uint8)
        values = (groups / 2.0 ** (code.float() - 127)[..., None]).flatten(1).to(torch.float8_e4m3fn)
        pack = k_cache_reference.NopeFp8RopeBf16Pack(
            k_nope_fp8=values, k_rope_bf16=x[:, 448:].bfloat16(), scale_k_nope_ue8m0=code
        )
        expected = torch.zeros_like(pages, dtype=torch.uint8)
        k_cache_reference.set_k_and_s_torch(expected, slots, pack, rows)
        assert_nearly_equal(pages.view(torch.uint8), expected)


def assert_nearly_equal(pages: torch.Tensor, expected: torch.Tensor) -> None:
    """All bytes of all pages but 1 in 1000 of those that are not 0."""
    used = (expected != 0).sum()
    assert used > 1000 and (pages != expected).sum() <= used / 1000


def test_index_keys_in_fp8(v4: World) -> None:
    text = next(text for text in v4.texts if text.compressor.is_in_indexer)
    pages, rows, slots, windows = stored(v4, text)
    exact = finished(text, windows)
    page, row = slots // rows, slots % rows
    scale = pages[page[:, None], rows * 128 + row[:, None] * 4 + torch.arange(4)].contiguous().view(torch.float32)
    amax = exact.abs().amax(1, keepdim=True).clamp_min(1e-4)
    torch.testing.assert_close(scale, amax / 448, rtol=1e-5, atol=0)
    got = pages[page[:, None], row[:, None] * 128 + torch.arange(128)].view(torch.float8_e4m3fn)
    different = (got.float() != (exact / scale).to(torch.float8_e4m3fn).float()).float().mean()
    assert different <= 1e-3


def test_index_keys_in_fp4() -> None:
    """SGLang's packer and store of its kernel tests: ties toward zero, page by page."""
    world = world_of(fp4=True)
    text = next(text for text in world.texts if text.compressor.is_in_indexer)
    pages, _, slots, windows = stored(world, text)
    packed, scales = common.quantize_fp4_indexer_ref(finished(text, windows))
    assert_nearly_equal(pages, common.store_fp4_index_cache_ref(packed, scales, slots, len(pages)))


@pytest.mark.parametrize("layout", ["v41", "v41_new"])
def test_main_records_of_v41_layouts(layout: str) -> None:
    """The fp8 layouts of V4.1, under layers of ratios 4 and 128: the normed row is rounded to bf16 before it is rotated."""
    world = world_of(layout)
    for text in world.texts:
        if text.compressor.is_in_indexer:
            continue
        pages, rows, slots, windows = stored(world, text)
        made = torch.zeros(len(pages) * rows, 512, dtype=torch.bfloat16)
        made[slots] = rotated(text, normed(text, windows).float().bfloat16().double(), windows).float().bfloat16()
        expected = dsv41_kv_quant_reference.quantize_k_cache_v41(made.view(len(pages), rows, 512))
        mine = pages.view(torch.uint8)
        if layout == "v41_new":
            mine = dsv41_kv_quant_reference.deinterleave_pages(mine, rows, 512, 16)
        for first, width in ((0, 512), (rows * 512, 16)):
            got, want = (x[:, first : first + rows * width].reshape(-1, width)[slots] for x in (mine, expected))
            assert (got != want).float().mean() <= 1e-3


def test_plain_fp8_records() -> None:
    """Those of TensorRT-LLM's attention in SGLang, which its own pool stores by torch."""
    world = world_of(dsv4_attn_backend="trtllm")
    pool = world.backend.token_to_kv_pool
    for text in world.texts:
        if text.compressor.is_in_indexer:
            continue
        pages, _, slots, windows = stored(world, text)
        mine = pages.view(torch.uint8).clone()
        pages.view(torch.uint8).zero_()
        pool.set_extra_key_buffer_fused(text.compressor.layer_id, slots, finished(text, windows).bfloat16())
        assert_nearly_equal(mine, pages.view(torch.uint8))
