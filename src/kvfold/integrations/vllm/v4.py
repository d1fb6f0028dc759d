"""DeepSeek-V4: the compressor, the metadata builder and the state that vLLM gets instead of its own.

vLLM projects, and hands `kv_score` to `Compressor.forward`, of main and indexer on two streams. Each has a plan of its own,
updated on the main stream before the step and only read in it, so neither waits for the other. As calls are on other streams
than updates, `pdl` is off.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4 import compressor as theirs
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheSpec

from ...compress import compress
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.fold_state import FoldState
from ...storage.window_state import WindowState
from . import config, records
from .hooks import COMPRESSORS, Compressed, Group
from .plans import StateIn

options: dict[str, Any] = {"state": "window", "backend": None}  # of `register`
FOLDED = 128  # the ratio whose states are fold rows with state="fold"
ALIGNMENT = 576  # of vLLM's pages


class Compressor(theirs.DeepseekCompressor):
    """vLLM's compressor, whose `forward` is one call of kvfold: state, pooling, norm, RoPE, record and store."""

    def __init__(self, vllm_config: Any, compress_ratio: int, *args: Any, **named: Any) -> None:
        config.check(vllm_config, options["state"])
        super().__init__(vllm_config, compress_ratio, *args, **named)
        shape = {"head_dim": self.head_dim, "rope_dim": self.rope_head_dim, "norm_eps": self.rms_norm_eps}
        self._spec = CompressorSpec(ratio=compress_ratio, overlap=self.overlap, **shape)
        self._limits, self._backend = config.limits(vllm_config), options["backend"]
        self._pool: torch.Tensor | None = None
        self._blocks: torch.Tensor | None = None
        COMPRESSORS[self.state_cache.prefix] = Compressed(compress_ratio, self.k_cache_prefix)

    def forward(self, kv_score: torch.Tensor, positions: torch.Tensor, rotary_emb: Any) -> None:
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict):  # vLLM measures its memory
            return
        plans = context.attn_metadata[self.state_cache.prefix].kvfold_group.plans_of(self.k_cache_prefix)
        plan = plans.choose(config.recorded(context, kv_score))
        layer = self._static_forward_context[self.k_cache_prefix]
        if self._pool is not self.state_cache.kv_cache or self._blocks is not layer.kv_cache:
            self._wrap(layer, kv_score)
        compress(
            kv_score,
            plan,
            self._state,
            self._cache,
            spec=self._spec,
            ape=self.ape,
            norm_weight=self.norm.weight,
            rope=rotary_emb.cos_sin_cache,
            backend=self._backend,
            pdl=False,
        )

    def _wrap(self, layer: Any, kv_score: torch.Tensor) -> None:
        """Wraps vLLM's tensors when its caches are new, and compiles all that calls over them need before any is recorded."""
        pool, blocks = self.state_cache.kv_cache, layer.kv_cache
        self._state: FoldState | WindowState
        if isinstance(self.state_cache, FoldStateCache) and self.state_cache.folds:
            self._state = FoldState.over(pool.flatten(1), self._spec, self._limits.decode)
        else:
            half = self._spec.channels
            self._state = WindowState(pool[..., :half], pool[..., half:])
        self._cache: EntryCache = records.v4_cache(layer, self._spec, self.use_fp4_cache)
        self._pool, self._blocks = pool, blocks
        window = isinstance(self._state, WindowState)
        config.compile_before(
            kv_score,
            self._backend,
            specs=(self._spec,),
            formats=(self._cache.format.name,),
            max_new_tokens=(self._limits.decode, self._limits.tokens),
            states=("window" if window else "fold",),
            norm_weight_dtypes=(self.norm.weight.dtype,),
            page_sizes=(self._state.page_size,) if window else None,
            plans=("engine",),
        )


class MetadataBuilder(theirs.CompressorMetadataBuilder):
    """vLLM's, which then updates plans: of requests in pages of raw rows."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._group = Group(self.layer_names, config.limits(self.vllm_config), StateIn("pages", self.block_size))

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        self._group.states_built(config.batch_of(common_attn_metadata, metadata.block_table))
        metadata.kvfold_group = self._group
        return metadata


class FoldMetadata(NamedTuple):
    """What a step's metadata is for fold rows."""

    kvfold_group: Group


class FoldMetadataBuilder(AttentionMetadataBuilder[FoldMetadata]):
    """Updates plans of requests in fold rows: each request's block is its slot."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._group = Group(layer_names, config.limits(vllm_config), StateIn("slots", 1))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FoldMetadata:
        self._group.states_built(config.batch_of(common_attn_metadata, common_attn_metadata.block_table_tensor))
        return FoldMetadata(self._group)


class FoldBackend(theirs.CompressorBackend):
    @staticmethod
    def get_name() -> str:
        return "KvfoldCompressorBackend"

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @staticmethod
    def get_builder_cls() -> type[FoldMetadataBuilder]:
        return FoldMetadataBuilder


class FoldStateCache(theirs.CompressorStateCache):
    """A state whose ratio-128 layers ask vLLM for one block for each request, large enough for kvfold's fold rows.

    vLLM shares none of these blocks between requests, and needs not: its prefix hits end where a window of 128 does, which it
    checks itself, and there a step reads no state. So a request reads only rows that it wrote, and a block that was another's,
    or a cache's, needs no clearing.
    """

    def __init__(self, state_dim: int, dtype: torch.dtype, compress_ratio: int, prefix: str) -> None:
        super().__init__(state_dim, dtype, compress_ratio, prefix)
        self.folds = compress_ratio == FOLDED
        self._head_dim = state_dim // 2

    def get_kv_cache_spec(self, vllm_config: Any) -> KVCacheSpec:
        if not self.folds:
            return super().get_kv_cache_spec(vllm_config)
        spec = CompressorSpec(head_dim=self._head_dim, ratio=FOLDED)
        size = -(-FoldState.page_bytes(spec, config.limits(vllm_config).decode) // ALIGNMENT) * ALIGNMENT
        # In vLLM's words a ring of 8 rows of fp32; it never looks inside.
        return CircularBufferSpec(
            block_size=8, num_kv_heads=1, head_size=size // 32, head_size_v=0, dtype=torch.float32, max_tp_shards=1
        )

    def get_attn_backend(self) -> type[AttentionBackend]:
        return FoldBackend if self.folds else super().get_attn_backend()
