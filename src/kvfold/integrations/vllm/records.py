"""Which record format a cache of vLLM is in."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.deep_gemm import mqa_logits_use_mx_scales

from ...spec import CompressorSpec
from ...storage.cache import EntryCache

V41 = {584: "fp8_ds_mla_v41", 528: "v41_mxfp8_interleaved_vllm", 288: "v41_nvfp4_interleaved_vllm"}


def v4_cache(layer: Any, spec: CompressorSpec, fp4: bool) -> EntryCache:
    """The cache of a V4 compressor. layer: vLLM's, whose `kv_cache` it is. fp4: of the indexer, in MXFP4."""
    blocks = layer.kv_cache
    if spec.head_dim == 128:
        fmt = "indexer_mxfp4" if fp4 else "indexer_fp8_vllm_sm100" if mqa_logits_use_mx_scales() else "indexer_fp8_vllm"
        return EntryCache.from_blocks(blocks, fmt, spec)
    if blocks.dtype == torch.uint8:
        # vLLM has two writers of these pages. They floor scales differently; on CUDA it takes the first.
        fmt = "fp8_ds_mla" if current_platform.is_cuda() else "fp8_ds_mla_vllm_triton"
        return EntryCache.from_blocks(blocks, fmt, spec)
    return _plain(layer, spec, "bf16", "fp8_tensor")


def v41_cache(layer: Any, spec: CompressorSpec) -> EntryCache:
    """The cache of a V4.1 compressor: `v4_cache`, of one that gives out its normed rows in bf16."""
    blocks = layer.kv_cache
    if blocks.dtype != torch.uint8:
        return _plain(layer, spec, "bf16_v41", "fp8_tensor_v41")
    return EntryCache.from_blocks(blocks, V41[blocks.shape[-1]], spec)


def _plain(layer: Any, spec: CompressorSpec, wide: str, narrow: str) -> EntryCache:
    if layer.kv_cache.dtype == torch.bfloat16:
        return EntryCache.from_blocks(layer.kv_cache, wide, spec)
    scale = getattr(layer, "_flashinfer_fp8_kv_scale", None)
    return EntryCache.from_blocks(layer.kv_cache, narrow, spec, scale=1.0 if scale is None else scale)
