"""DeepSeek-V4.1: the compressor and the metadata builder that vLLM gets instead of its own.

vLLM makes two steps of a layer: `forward` gives each window's normed row, of which the index key is made, and `insert_cache`
stores the record. Both stay two steps: `compress` without a cache, and `store`. At ratio 1 there is nothing to pool, and the
norm stays vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v41 import compressor as theirs
from vllm.v1.attention.backend import CommonAttentionMetadata

from ...compress import compress
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.window_state import WindowState
from ...store import store
from . import config, records, v4
from .plans import Plans, StateIn


class Compressor(theirs.DeepseekCompressor):
    """vLLM's compressor over its ring of raw rows."""

    def __init__(self, vllm_config: Any, compress_ratio: int, *args: Any, **named: Any) -> None:
        config.check(vllm_config, "window")
        super().__init__(vllm_config, compress_ratio, *args, **named)
        self._spec = CompressorSpec(
            head_dim=self.head_dim,
            ratio=compress_ratio,
            has_ape=False,
            rope_dim=self.rope_head_dim,
            norm_eps=self.rms_norm_eps,
            gate=self.has_gate,
        )
        self._backend, self._limits = v4.options["backend"], config.limits(vllm_config)
        self._pool: torch.Tensor | None = None
        self._blocks: torch.Tensor | None = None

    def forward(self, kv_score: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        if self.state_cache is None:
            return super().forward(kv_score, positions)
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # vLLM measures its memory
            return None
        metadata = context.attn_metadata[self.state_cache.prefix]
        plan = metadata.kvfold_plans.choose(config.recorded(context, kv_score))
        if self._pool is not self.state_cache.kv_cache:
            self._pool, half = self.state_cache.kv_cache, self._spec.channels
            self._state = WindowState(self._pool[..., :half], self._pool[..., half:])
            config.compile_before(
                kv_score,
                self._backend,
                specs=(self._spec,),
                formats=(None,),
                max_new_tokens=(self._limits.decode, self._limits.tokens),
                states=("window",),
                norm_weight_dtypes=(self.norm.weight.dtype,),
                latents=(True,),
                page_sizes=(self._state.page_size,),
                plans=("engine", "ring"),
            )
        latent = torch.empty(plan.entry_capacity, self.head_dim, dtype=torch.bfloat16, device=kv_score.device)
        compress(
            kv_score,
            plan,
            self._state,
            None,
            spec=self._spec,
            ape=None,
            norm_weight=self.norm.weight,
            rope=None,
            latent=latent,
            backend=self._backend,
            pdl=False,
        )
        # vLLM reads a window's row at its last token, and no other row.
        return latent.index_select(0, metadata.kvfold_entries[: kv_score.shape[0]])

    def insert_cache(self, latent: torch.Tensor | None, positions: torch.Tensor, rotary_emb: Any) -> None:
        if latent is None:
            return
        metadata = get_forward_context().attn_metadata
        slots = metadata[self.k_cache_prefix].slot_mapping
        starts = positions if self.state_cache is None else metadata[self.state_cache.prefix].kvfold_starts
        layer = self._static_forward_context[self.k_cache_prefix]
        if self._blocks is not layer.kv_cache:
            self._blocks = layer.kv_cache
            self._cache: EntryCache = records.v41_cache(layer, self._spec)
            config.compile_before(
                latent,
                self._backend,
                specs=(self._spec,),
                formats=(self._cache.format.name,),
                max_new_tokens=(),
                norm_weight_dtypes=(None,),
                rows=(latent.dtype,),
                states=(),
                plans=(),
                slot_dtypes=(slots.dtype,),
                position_dtypes=(positions.dtype,),
            )
        store(
            latent[: len(slots)],
            self._cache,
            slots=slots,
            positions=starts[: len(slots)],
            spec=self._spec,
            norm_weight=None,
            rope=rotary_emb.cos_sin_cache,
            backend=self._backend,
            pdl=False,
        )


class MetadataBuilder(theirs.CompressorMetadataBuilder):
    """vLLM's, which then updates a plan, and says of each token which entry it ends and where its window begins."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        limits = config.limits(self.vllm_config)
        self._plans = Plans(2, limits, StateIn("rings", self.capacity), None)
        self._order = torch.arange(limits.tokens, device=self.device)
        self._starts, self._ends, self._entries = (torch.zeros_like(self._order) for _ in range(3))

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        common, count = common_attn_metadata, common_attn_metadata.num_actual_tokens
        self._plans.update(config.batch_of(common, common.block_table_tensor))
        positions, starts, ends = common.positions[:count], self._starts[:count], self._ends[:count]
        torch.bitwise_and(positions, 1, out=ends)
        torch.sub(positions, ends, out=starts)
        ends.mul_(self._order[:count] < common.query_start_loc[common.num_reqs])  # padding ends none
        self._ends[count:].zero_()
        torch.cumsum(self._ends, 0, out=self._entries)  # of all: a recorded call reads behind the step's tokens, too
        self._entries.sub_(1).clamp_(min=0)
        metadata.kvfold_plans, metadata.kvfold_entries, metadata.kvfold_starts = self._plans, self._entries, self._starts
        return metadata
