"""`state="fold"`: SGLang's KV pool with `FoldStatePool`s in the place of its own state pools."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ...contract import UnsupportedError
from ...spec import V41_MAIN_R2, CompressorSpec
from .layer import spec_of
from .pools import BufInfos, FoldStatePool
from .source import POOLS


@functools.cache
def pool_class() -> type:
    """SGLang's `CompressStatePool`, whose buffer is what follows its pages: the prefix pages at ratio 4, else the slots."""
    from sglang.srt.mem_cache.deepseek_v4_compress_state import CompressStatePool, KVAndScore

    class FoldCompressStatePool(CompressStatePool):
        def __init__(self, fold: FoldStatePool, ratio: int, swa_page_size: int) -> None:
            rows = fold.slot_rows if fold.page_rows is None else fold.page_rows
            self.fold, self.ratio, self.swa_page_size = fold, ratio, swa_page_size
            self.ring_size = self.page_size = 1
            self.request_scoped = fold.page_rows is None
            self.online, self.online_mtp_state_slot_offset, self.online_mtp_max_draft_tokens = False, 0, 0
            self.kv_score_buffer = KVAndScore(rows.view(torch.float32))
            self.last_dim = self.kv_score_buffer.kv_score.shape[1]
            POOLS[rows.data_ptr()] = fold

        def transfer_indices(self, req_pool_idx: int, seq_len: int) -> np.ndarray:
            return np.array(self.fold.transfer_indices(req_pool_idx, seq_len), dtype=np.int32)

    return FoldCompressStatePool


def make_state_pool(pool: Any, ratio: int, *, head_dim: int, enable_memory_saver: bool) -> Any:
    """What `_make_compress_state_pool` is replaced by."""
    spec = spec_of(ratio, head_dim, head_dim == pool.indexer_head_dim, 1e-6)
    pages = pool.compressed_pool_configs[ratio].state_size // pool.get_ring_size(ratio) + 1 if ratio == 4 else 0
    return _make(pool, spec, pages, enable_memory_saver)


def make_pair_state_pool(pool: Any, enable_memory_saver: bool) -> Any:
    """What `_make_pair_state_pool` is replaced by: V4.1's ratio 2."""
    return _make(pool, V41_MAIN_R2, 0, enable_memory_saver)


def _make(pool: Any, spec: CompressorSpec, pages: int, enable_memory_saver: bool) -> Any:
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_spec

    if enable_memory_saver:
        raise UnsupportedError('enable_memory_saver must be off with state="fold": its regions are of SGLang\'s own pools')
    if envs.SGLANG_OPT_USE_ONLINE_COMPRESS.get():
        raise UnsupportedError('SGLANG_OPT_USE_ONLINE_COMPRESS must be off with state="fold", which has pools of its own')
    drafts = get_spec().speculative_num_draft_tokens if get_spec().speculative_algorithm is not None else 0
    most, page_size = max(drafts or 0, 1), pool.swa_page_size
    with torch.cuda.use_mem_pool(pool.custom_mem_pool) if pool.custom_mem_pool else nullcontext():  # of PD transfer
        fold = FoldStatePool(spec, pool.num_req_slots, most, num_pages=pages, page_size=page_size, device=pool.device)
    return pool_class()(fold, spec.ratio, pool.swa_page_size)


def _folds(pool: Any) -> list[FoldStatePool]:
    return [p.fold for p in (*pool.compress_state_pools, *pool.indexer_compress_state_pools) if p is not None]


def request_state_buf_infos(pool: Any) -> BufInfos:
    """What `get_request_state_buf_infos` is replaced by: the slots of all compressors, an item for each request."""
    infos = [fold.buf_infos() for fold in _folds(pool)]
    return tuple([x for info in infos for x in info[i]] for i in range(3))  # type: ignore[return-value]


def request_state_transfer_indices(pool: Any, req_pool_idx: int, seq_len: int) -> np.ndarray:
    """One list of slots for all of those buffers: the request's own, if any compressor needs it."""
    found = [fold.transfer_indices(req_pool_idx, seq_len) for fold in _folds(pool)]
    return np.array(max(found, key=len, default=[]), dtype=np.int32)


def clear_request_state(pool: Any, req_pool_idx: int) -> None:
    """What `clear_request_scoped_state` is replaced by: a request that goes on in this slot by mistake is refused."""
    for fold in _folds(pool):
        # Not torch.tensor: its copy from the host would wait for the GPU.
        fold.clear(torch.full((1,), req_pool_idx, dtype=torch.int64, device=fold.state.device))


def clear_drafts(pool: Any, *args: Any, **kwargs: Any) -> None:
    """What `clear_unaccepted_c128_draft_states` is replaced by: rejected drafts need nothing."""
