"""kvfold in SGLang's V4.1 compressors against SGLang's own torch path, which it runs where it has no CUDA kernel.

Both see the same projections, pools and metadata. SGLang stores main entries by a CUDA kernel alone: in its place are the
quantizers of its own kernel tests. Index keys it stores by a Triton kernel, which is interpreted here (`make engines`).
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.lib.sglang_world import (
    REQUESTS,
    TEXT,
    Backend,
    ForwardMode,
    ceil_pow2,
    config,
    dsv41_sparse,
    plugged,
    rope_freqs,
)
from benchmarks.lib.sglang_world import dsv41_kv_quant_reference as quantize
from kvfold import UnsupportedError
from kvfold.integrations import sglang as plugin

DRAFTS = 3
RATIOS = [2, 2, 1]
SOURCES = [0, 2]  # layer 1 reads what layer 0 has


@pytest.fixture(autouse=True)
def nothing_refused() -> Any:
    before = plugin.errors()
    yield
    assert plugin.errors() == before


def make_layer(layer_id: int, freqs: torch.Tensor) -> Any:
    """SGLang's compressor and the part of its indexer that makes keys; projections are looked up."""
    draw, ratio = torch.Generator().manual_seed(layer_id), RATIOS[layer_id]
    compressor = dsv41_sparse.DeepseekV41Compressor(16, 512, ratio, 0.03, fused_compress=False)  # to be seen in records
    compressor.norm.weight.data.copy_(1 + 0.1 * torch.randn(512, generator=draw))
    compressor.project = (lambda x: x.chunk(2, dim=1)) if ratio == 2 else (lambda x: (x[:, :512].bfloat16(), None))
    indexer = dsv41_sparse.DeepseekV41Indexer.__new__(dsv41_sparse.DeepseekV41Indexer)
    nn.Module.__init__(indexer)
    indexer.owns_k, indexer.index_head_dim, indexer.rope_head_dim = True, 128, 64
    indexer.wk = indexer.forward_wk = Linear(torch.randn(128, 512, generator=draw).bfloat16() / 22)
    indexer.k_norm = dsv41_sparse.RMSNorm(128, 0.05)
    return SimpleNamespace(
        layer_id=layer_id, compress_ratio=ratio, compressor=compressor, indexer=indexer, freqs_cis=freqs, rope_head_dim=64
    )


class Linear(nn.Module):
    """A product whose rows do not depend on how many there are, as a CPU's BLAS has them."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ self.weight.double().T).to(torch.bfloat16)


class Engine:
    """One backend and the layers of its model, which `ours` says who compresses."""

    def __init__(self, layout: str, ours: bool, drafts: int = 0) -> None:
        self.plain = layout == "uniform_fp8"
        self.backend = Backend(RATIOS, drafts=drafts, layout="v4" if self.plain else layout, kv_source_layers=SOURCES)
        freqs = rope_freqs()
        self.layers, self.ours = [make_layer(layer, freqs) for layer in SOURCES], ours
        self.rows = torch.randn(REQUESTS + 1, TEXT, 1024, generator=torch.Generator().manual_seed(5))
        self.rows[0] = torch.nan
        if not ours and not self.plain:
            self.backend.token_to_kv_pool.set_extra_key_buffer_fused = self.store

    def step(self, mode: ForwardMode, *steps: tuple[int, int, int]) -> None:
        requests, start, new = (torch.tensor(x) for x in zip(*steps, strict=True))
        backend = self.backend
        verify, extend = mode.is_target_verify(), mode.is_extend_without_speculative()
        build = backend.extend if extend else backend.verify if verify else backend.decode
        backend.forward_metadata = build(list(steps))
        batch = SimpleNamespace(
            forward_mode=mode,
            batch_size=len(steps),
            req_pool_indices=requests,
            seq_lens=start if verify else start + new,
            extend_seq_lens=new,
            extend_seq_lens_cpu=new.tolist(),
            extend_start_loc=new.cumsum(0) - new,
            spec_info=SimpleNamespace(draft_token_num=DRAFTS),
        )
        req = requests.repeat_interleave(new)
        pos = torch.cat([torch.arange(s, s + n) for _, s, n in steps])
        x = torch.cat([self.rows[r, s : s + n] for r, s, n in steps])
        for layer in self.layers:
            if self.ours:
                backend._low_ratio_compress(layer, x, req, pos, batch)
            else:
                backend._low_ratio_compress_torch(layer, x, req, pos)

    def store(self, layer_id: int, loc: torch.Tensor, cache_k: torch.Tensor, freqs_cis: torch.Tensor | None = None) -> None:
        """In place of SGLang's CUDA kernel: its tests' quantizers, a page of one row for each entry."""
        pool = self.backend.token_to_kv_pool
        layout, rows, pages = pool.get_extra_key_layout(layer_id), pool.get_extra_key_page_size(layer_id), None
        if freqs_cis is not None:
            cache_k = dsv41_sparse.rope_tail(cache_k, freqs_cis, 64)
        encode = {"v4": quantize_v4, "v41": quantize.quantize_k_cache_v41, "v41_fp4": quantize.quantize_k_cache_v41_fp4}
        made = encode[layout.encoding.value](cache_k[:, None])
        pages = pool.get_extra_key_buffer(layer_id).view(torch.uint8)
        data, base, tail = layout.row_addressing(rows)
        for i, at in enumerate(loc.tolist()):
            page, row = pages[at // rows], at % rows
            page[row * data : row * data + layout.data_bytes] = made[i, : layout.data_bytes]
            at = base + row * tail
            page[at : at + layout.scale_bytes] = made[i, layout.data_bytes : layout.bytes_per_token]

    def bytes_of(self, layer: Any, request: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Records of the first entries, main ones and keys."""
        pool, ratio = self.backend.token_to_kv_pool, layer.compress_ratio
        slots = self.backend.req_to_token[request, ratio - 1 : count * ratio : ratio].long() // ratio
        rows, layout = pool.get_extra_key_page_size(layer.layer_id), pool.get_extra_key_layout(layer.layer_id)
        pages = pool.get_extra_key_buffer(layer.layer_id).view(torch.uint8)
        if self.plain:
            main = pages.view(-1, 512)[slots]
        else:
            main = fields(pages, rows, slots, layout.data_bytes, layout.scale_bytes, layout.row_addressing(rows))
        keys, size = pool.get_index_k_with_scale_buffer(layer.layer_id), pool.get_index_k_page_size(ratio)
        return main, fields(keys, size, slots, 64, 4, (64, size * 64, 4))


def fields(
    pages: torch.Tensor, rows: int, slots: torch.Tensor, data: int, scale: int, where: tuple[int, int, int]
) -> torch.Tensor:
    page, row = slots[:, None] // rows, slots[:, None] % rows
    step, base, tail = where
    return torch.cat(
        (pages[page, row * step + torch.arange(data)], pages[page, base + row * tail + torch.arange(scale)]), dim=1
    )


def quantize_v4(k: torch.Tensor) -> torch.Tensor:
    """SGLang's V4 record of finished bf16 rows `[n, 1, 512]`: uint8 `[n, 584]`."""
    x = k[:, 0].float()
    groups = x[:, :448].view(-1, 7, 64)
    scale = ceil_pow2(groups.abs().amax(-1).clamp_min(1e-4) / 448)
    values = (groups / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    tail = torch.cat([(scale.log2() + 127).to(torch.uint8), torch.zeros(len(x), 1, dtype=torch.uint8)], dim=1)
    return torch.cat([values, x[:, 448:].bfloat16().contiguous().view(torch.uint8), tail], dim=1)


def compare(mine: Engine, theirs: Engine, ends: dict[int, int]) -> None:
    """Sums of squares are added in another order: a rounding to bf16 may go the other way, and with it a byte."""
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        for request, end in ends.items():
            for one, other in zip(
                mine.bytes_of(a, request, end // a.compress_ratio),
                theirs.bytes_of(b, request, end // a.compress_ratio),
                strict=True,
            ):
                different = (one != other).float().mean()
                assert different <= 1e-4, (a.compress_ratio, request, float(different))
                assert other.any(dim=1).all(), "an entry was not stored"


@pytest.mark.parametrize("state", ["pools", "fold"])
@pytest.mark.parametrize("layout", ["v4", "v41", "v41_new", "uniform_fp8"])
def test_chunks_and_decode(state: str, layout: str) -> None:
    theirs = theirs_of(layout)
    with plugged(state):
        mine = run_schedule(layout, ours=True)
    compare(mine, theirs, {1: 47, 2: 22})
    if state == "pools":  # what is pending, bit for bit
        a, b = (e.backend.token_to_kv_pool.get_attention_compress_states(0) for e in (mine, theirs))
        for request, end in ((1, 47), (2, 22)):
            at = request * a.ring_size + (end - 1) % a.ring_size
            assert torch.equal(a.kv_score_buffer.kv_score[at], b.kv_score_buffer.kv_score[at])


@functools.cache
def theirs_of(layout: str) -> Engine:
    return run_schedule(layout, ours=False)


def run_schedule(layout: str, *, ours: bool) -> Engine:
    with config(dsv4_attn_backend="trtllm" if layout == "uniform_fp8" else "auto"):
        engine = Engine(layout, ours)
        engine.backend.allocate(1, 64)
        engine.backend.allocate(2, 64)
        engine.step(ForwardMode.EXTEND, (1, 0, 21), (2, 0, 1))
        engine.step(ForwardMode.EXTEND, (2, 1, 14), (1, 21, 2))
        engine.step(ForwardMode.EXTEND, (1, 23, 17))
        for i in range(7):
            engine.step(ForwardMode.DECODE, (1, 40 + i, 1), (2, 15 + i, 1), (0, 0, 1))
    return engine


@pytest.mark.parametrize("state", ["pools", "fold"])
def test_verify_with_every_accepted_length(state: str) -> None:
    with config(DRAFTS):
        theirs = Engine("v4", False, DRAFTS)
        theirs.backend.allocate(1, 64)
        theirs.step(ForwardMode.EXTEND, (1, 0, 40))
    with plugged(state), config(DRAFTS):
        mine = Engine("v4", True, DRAFTS)
        mine.backend.allocate(1, 64)
        mine.step(ForwardMode.EXTEND, (1, 0, 10))
        at = 10
        for accepted in (1, 2, 3, 1, 1, 3, 2, 2, 3):
            right = mine.rows[1].clone()
            mine.rows[1, at + accepted : at + DRAFTS] = 7.0
            mine.step(ForwardMode.TARGET_VERIFY, (1, at, DRAFTS), (0, 0, DRAFTS))
            mine.rows[1] = right
            at += accepted
        compare(mine, theirs, {1: at})


def test_what_is_not_served_is_refused() -> None:
    with plugged("fold"), config():
        engine = Engine("v4", ours=True)
        with pytest.raises(UnsupportedError, match='state must be "pools"'):
            engine.backend._low_ratio_compress_torch(engine.layers[0], None, None, None)
        engine.backend.allocate(1, 64)
        build = engine.backend.extend

        def with_tail(steps: list[tuple[int, int, int]]) -> Any:
            made = build(steps)
            made.late_layer_tail = object()
            return made

        engine.backend.extend = with_tail
        with pytest.raises(UnsupportedError, match="encoder SWA replay"):
            engine.step(ForwardMode.EXTEND, (1, 0, 4))
