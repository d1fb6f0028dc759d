"""SGLang's calls of a V4 compressor, as calls of kvfold. Arguments are SGLang's own."""

from __future__ import annotations

from typing import Any

import torch

from ...contract import UnsupportedError
from .layer import Layer, layer_of, make_layer, run, spec_of
from .records import index_format, main_format
from .source import source_of
from .step import Step


def compress_all_in_one(
    backend: Any,
    *,
    kv_score_buffer: torch.Tensor,
    kv_score_input: torch.Tensor,
    ape: torch.Tensor,
    head_dim: int,
    norm: Any,
    freqs_cis_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    is_indexer: bool,
    rotate: bool,
    compress_ratio: int,
    page_size: int,
    out_loc: torch.Tensor,
    use_fp4_indexer: bool = False,
    kv_layout: Any = "v4",
    **rest: Any,
) -> None:
    """What `CompressorBackendMixin._forward_compress_all_in_one` is replaced by.

    Raises:
        UnsupportedError: for SGLang's caches of ROCm alone, which the rest of the arguments are for.
    """
    addresses = (kv_score_buffer.data_ptr(), kv_cache.data_ptr(), ape.data_ptr(), freqs_cis_cache.data_ptr())

    def make() -> Layer:
        for name, value in rest.items():
            if value is not None and value is not False:
                raise UnsupportedError(f"{name} must be unset: that cache is none of kvfold's")
        layout = getattr(kv_layout, "value", kv_layout)
        pool = backend.token_to_kv_pool
        return make_layer(
            source_of(pool, compress_ratio),
            spec_of(compress_ratio, head_dim, is_indexer, norm.variance_epsilon),
            index_format(use_fp4_indexer, compress_ratio) if is_indexer else main_format(layout, compress_ratio),
            buffer=kv_score_buffer,
            ape=ape,
            freqs=freqs_cis_cache,
            kv_cache=kv_cache,
            page_size=page_size,
            banks=pool.online_mtp_max_draft_tokens if compress_ratio == 128 else 0,
            made_of=addresses,
        )

    step: Step = getattr(backend.forward_metadata, f"c{compress_ratio}_compress_metadata")
    if out_loc is not step.out_loc and out_loc.data_ptr() != step.out_loc.data_ptr():
        raise UnsupportedError("out_loc must be the slots that SGLang's metadata has, got others: hisparse must be off")
    run(layer_of(norm, addresses, make), step, kv_score_input, norm.weight)


def compress_uniform_fp8(
    backend: Any, *, token_to_kv_pool: Any, kv_score_input: torch.Tensor, state_pool: Any, compressor: Any, layer_id: int
) -> None:
    """What `forward_compress_uniform_fp8` is replaced by: caches of plain e4m3 rows, for TensorRT-LLM's attention."""
    ratio = compressor.ratio
    compress_all_in_one(
        backend,
        kv_score_buffer=state_pool.kv_score_buffer.kv_score,
        kv_score_input=kv_score_input,
        ape=compressor.ape,
        head_dim=compressor.head_dim,
        norm=compressor.norm,
        freqs_cis_cache=compressor.freqs_cis,
        kv_cache=token_to_kv_pool.get_extra_key_buffer(layer_id),
        is_indexer=False,
        rotate=False,
        compress_ratio=ratio,
        page_size=token_to_kv_pool.get_extra_key_page_size(layer_id),
        out_loc=getattr(backend.forward_metadata.core_metadata, f"c{ratio}_out_loc"),
        kv_layout="uniform_fp8",
    )


def bind_metadata(_: Any, metadata: Any, *args: Any, **kwargs: Any) -> None:
    """An AFTER hook of `DSV4Metadata.__init__`: the steps get their cache slots, and are planned."""
    for ratio in (4, 128):
        step = getattr(metadata, f"c{ratio}_compress_metadata", None)
        if step is not None:
            step.bind(getattr(metadata.core_attn_metadata, f"c{ratio}_out_loc"))
