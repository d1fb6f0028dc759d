"""`compress_records`: what TensorRT-LLM's `Compressor.forward` does after its projection, as a plan update and one launch."""

from __future__ import annotations

import torch

from ...arguments.checks import check_int
from ...compress import compress
from .kept import Lengths, bucket, cache_of, plan_of, state_of
from .pooling import Pools, check_rows, first_rows, pooling_spec, tables_of
from .postprocess import format_of, rows_of_table


def compress_records(
    kv_score: torch.Tensor,
    pools: Pools,
    kv_cache: torch.Tensor,
    *,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_eps: float,
    cos_sin_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    tokens_per_block: int,
    cache_scale_type: int = 0,
    rotate_activation: bool = False,
    max_new_tokens: int | None = None,
    scale: float | torch.Tensor = 1.0,
    kv_cache_scale: torch.Tensor | None = None,
) -> None:
    """Stores the rows of all new tokens, of prompts, chunks and generation at once, and the records of all windows that end.

    The bytes are those of the operators, one after the other: rows are rounded to bf16 between pooling and norm, as there.

    Args:
        kv_score: bf16 or fp32 `[T, 2 * channels]`, the projection of the step's tokens.
        pools: the state of the layer: its two pools, mutated, their block tables and their page size.
        kv_cache: mutated: contiguous blocks of `tokens_per_block` records of `cache_scale_type`, as of the operator.
        ape: fp32 `[ratio, channels]`. norm_weight: bf16 or fp32 `[head_dim]`.
        cos_sin_table: fp32 `[max_pos, 2, rope_dim / 2]`.
        kv_lens: int32 `[B]`, tokens of each request with the new ones. cu_seq_lens: int32 `[B + 1]`.
        block_table: int32 `[B, width]`, blocks of `kv_cache`; -1 drops what would go there.
        max_new_tokens: most new tokens of one request, if known: 1 to 4 in generation, which has kernels of its own.
        scale: for type 1 the number that values are divided by, or fp32 `[1]` on the device; for type 4 the global factor.
        kv_cache_scale: for type 4 blocks of scales, mutated.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    batch, tokens = kv_lens.shape[0], kv_score.shape[0]
    if batch == 0 or tokens == 0:
        return
    check_int("tokens_per_block", tokens_per_block, 1, 1 << 20)
    check_int("page_size", pools.page_size, 1, 1 << 24)
    if max_new_tokens is not None:
        check_int("max_new_tokens", max_new_tokens, 1, 1 << 24)
    rope_dim = cos_sin_table.shape[-1] * (2 if cos_sin_table.dim() == 3 else 1)
    rope = rows_of_table(cos_sin_table, rope_dim, kv_score.device)
    spec = pooling_spec(norm_weight.shape[0], ape.shape[0], rope_dim, norm_eps, rotate_activation)
    cache = cache_of(kv_cache, format_of(torch.bfloat16, cache_scale_type), tokens_per_block, spec, kv_cache_scale, scale)
    state = state_of(pools.paged_kv, pools.paged_score, pools.page_size, spec.channels)
    lengths = Lengths("seq_lens", kv_lens, first_rows("cu_seq_lens", cu_seq_lens, batch + 1, kv_score.device))
    most = bucket(tokens) if max_new_tokens is None else max_new_tokens
    tables = tables_of(pools, batch)
    check_rows("block_table", block_table, batch)
    places = {"cache_block_table": block_table[:batch], "rows_per_page": tokens_per_block, "max_tokens": bucket(tokens)}
    plan = plan_of(spec, lengths, most, tables, pools.page_size, **places)
    compress(kv_score, plan, state, cache, spec=spec, ape=ape, norm_weight=norm_weight, rope=rope)
