"""`compressor_paged_kv_compress` and `compressor_prefill_reduction`: a plan update and a `compress` over a `WindowState`."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ...arguments.checks import check_int, check_tensor
from ...compress import compress
from ...spec import CompressorSpec
from .kept import Lengths, bucket, plan_of, state_of

MOST_NEW = 8  # tokens of a request in a generation step, as TensorRT-LLM has it
_FLOATS = (torch.bfloat16, torch.float32)
_INT32 = (torch.int32,)


class Pools(NamedTuple):
    """Raw rows of tokens in pages, and where those of each request are; arguments of both operators."""

    paged_kv: torch.Tensor
    paged_score: torch.Tensor
    block_table_kv: torch.Tensor
    block_table_score: torch.Tensor
    page_size: int


def paged_kv_compress(
    kv_score: torch.Tensor,
    ape: torch.Tensor,
    paged_kv: torch.Tensor,
    paged_score: torch.Tensor,
    block_table_kv: torch.Tensor,
    block_table_score: torch.Tensor,
    output: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    cu_kv_comp: torch.Tensor,
    batch_size: int,
    page_size: int,
    head_dim: int,
    compress_ratio: int,
    next_n: int,
    new_tokens_per_seq: torch.Tensor | None = None,
) -> None:
    """Generation: stores the rows of up to `next_n` new tokens of each request, and pools the windows that they end.

    Args:
        kv_score: bf16 or fp32 `[T, 2 * channels]`. paged_kv, paged_score: mutated, fp32 or bf16 pages of `page_size` rows.
        output: mutated, bf16 or fp32 `[n, head_dim]`: entry i of request b is row `cu_kv_comp[b] + i`; others stay as they are.
        kv_lens: int32 `[B]`, tokens of each request with the new ones. cu_seq_lens, cu_kv_comp: int32 `[B + 1]`.
        new_tokens_per_seq: only its type is checked: request b brings rows `[cu_seq_lens[b], cu_seq_lens[b + 1])`, whose number
            it must be.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_int("next_n", next_n, 1, MOST_NEW)
    check_int("batch_size", batch_size, 0, 1 << 24)
    check_int("compress_ratio", compress_ratio, 1, 4096)
    if new_tokens_per_seq is not None:
        check_tensor("new_tokens_per_seq", new_tokens_per_seq, (None,), _INT32, kv_score.device)
    places = batch_size * -(-next_n // compress_ratio)
    most = output.shape[0] if output.shape[0] == places else bucket(output.shape[0])
    pools = Pools(paged_kv, paged_score, block_table_kv, block_table_score, page_size)
    given = "seq_lens", first_rows("kv_lens", kv_lens, batch_size, kv_score.device), cu_seq_lens
    _pool(kv_score, ape, pools, output, given, cu_kv_comp, (batch_size, head_dim, compress_ratio, next_n, most))


def prefill_reduction(
    kv_score: torch.Tensor,
    ape: torch.Tensor,
    paged_kv: torch.Tensor,
    paged_score: torch.Tensor,
    block_table_kv: torch.Tensor,
    block_table_score: torch.Tensor,
    output: torch.Tensor,
    kv_lens: torch.Tensor,
    start_pos: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    cu_kv_comp: torch.Tensor,
    batch_size: int,
    page_size: int,
    head_dim: int,
    compress_ratio: int,
    max_outputs: int,
) -> None:
    """Context: the same for prompts and their chunks, of any length. Request b had `start_pos[b]` tokens before.

    `kv_lens` follows from that and `cu_seq_lens`, and is not read; `max_outputs`, most entries of a request, is not needed.
    """
    check_int("batch_size", batch_size, 0, 1 << 24)
    pools = Pools(paged_kv, paged_score, block_table_kv, block_table_score, page_size)
    most = bucket(kv_score.shape[0]), bucket(output.shape[0])
    given = "start_pos", first_rows("start_pos", start_pos, batch_size, kv_score.device), cu_seq_lens
    _pool(kv_score, ape, pools, output, given, cu_kv_comp, (batch_size, head_dim, compress_ratio, *most))


def _pool(
    kv_score: torch.Tensor,
    ape: torch.Tensor,
    pools: Pools,
    output: torch.Tensor,
    given: tuple[str, torch.Tensor, torch.Tensor],
    cu_kv_comp: torch.Tensor,
    shape: tuple[int, int, int, int, int],
) -> None:
    """given: as `Lengths`. shape: the batch, head_dim, the ratio, most new tokens of a request, and most places of entries."""
    batch, head_dim, ratio, most_new, most_rows = shape
    if batch == 0 or kv_score.shape[0] == 0:
        return
    check_int("page_size", pools.page_size, 1, 1 << 24)
    spec, device = pooling_spec(head_dim, ratio), kv_score.device
    state = state_of(pools.paged_kv, pools.paged_score, pools.page_size, spec.channels)
    check_tensor("output", output, (None, head_dim), _FLOATS, device)
    lengths = Lengths(*given[:2], first_rows("cu_seq_lens", given[2], batch + 1, device))
    tables = tables_of(pools, batch)
    places = {
        "cu_rows": first_rows("cu_kv_comp", cu_kv_comp, batch + 1, device),
        "max_rows": most_rows,
        "max_tokens": bucket(kv_score.shape[0]),
    }
    plan = plan_of(spec, lengths, most_new, tables, pools.page_size, **places)
    rows = output if output.shape[0] else None
    compress(kv_score, plan, state, None, spec=spec, ape=ape, norm_weight=None, rope=None, rows=rows)


def first_rows(name: str, x: torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    """Of an int32 `[n]` the first `count`."""
    check_tensor(name, x, (None,), _INT32, device)
    check_rows(name, x, count)
    return x[:count]


def tables_of(pools: Pools, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of both block tables that belong to the requests."""
    check_rows("block_table_kv", pools.block_table_kv, batch)
    check_rows("block_table_score", pools.block_table_score, batch)
    return pools.block_table_kv[:batch], pools.block_table_score[:batch]


def check_rows(name: str, x: torch.Tensor, least: int) -> None:
    if x.dim() == 0 or x.shape[0] < least:
        raise ValueError(f"{name} must have {least} rows or more, got {list(x.shape)}")


@lru_cache(maxsize=64)
def pooling_spec(
    head_dim: int, ratio: int, rope_dim: int = 0, norm_eps: float = 1e-6, hadamard: bool = False
) -> CompressorSpec:
    """TensorRT-LLM's compressors: windows overlap at ratio 4, and there always is an ape, even if it is all zeros."""
    return CompressorSpec(head_dim, ratio, overlap=ratio == 4, rope_dim=rope_dim, norm_eps=norm_eps, hadamard=hadamard)
