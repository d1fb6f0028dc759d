"""What of a vLLM configuration kvfold takes, and what it refuses when the model is built."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext
from vllm.v1.attention.backend import CommonAttentionMetadata, max_decode_query_len

from ...contract import UnsupportedError
from ...precompile.warmup import warmup
from .plans import Batch, Limits, Recorded

_compiled: set[tuple] = set()


def check(config: Any, state: str) -> None:
    """Raises `UnsupportedError` naming the option of vLLM that does not go with kvfold."""
    parallel = config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            raise UnsupportedError(
                f"{name} must be 1 with kvfold, whose plans are of whole sequences, got {getattr(parallel, name)}"
            )
    if parallel.use_ubatching:
        raise UnsupportedError("enable_dbo and ubatch_size must be off with kvfold, whose plans are of whole steps")
    if state == "fold" and config.kv_transfer_config is not None:
        raise UnsupportedError(
            'kv_transfer_config must be None with state="fold": no connector has moved fold rows yet; take "window"'
        )


def limits(config: Any) -> Limits:
    scheduler = config.scheduler_config
    return Limits(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, max_decode_query_len(config))


def batch_of(common: CommonAttentionMetadata, block_table: torch.Tensor) -> Batch:
    lengths = common.query_start_loc[: common.num_reqs + 1], common.seq_lens[: common.num_reqs]
    return Batch(common.num_reqs, common.num_actual_tokens, common.max_query_len, *lengths, block_table[: common.num_reqs])


def recorded(context: ForwardContext, x: torch.Tensor) -> Recorded:
    """Whether a call on `x` is being recorded, and where."""
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return Recorded.NOT
    return Recorded.PIECE if context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE else Recorded.WHOLE


def compile_before(kv_score: torch.Tensor, backend: str | None, **what: Any) -> None:
    """`warmup` of the kernels of a compressor, once for all that are alike, so that nothing compiles while vLLM records."""
    key = (kv_score.device, kv_score.dtype, *what.values())
    if kv_score.is_cuda and backend != "torch" and key not in _compiled:
        warmup(dtypes=(kv_score.dtype,), pdl=False, device=kv_score.device, **what)
        _compiled.add(key)
