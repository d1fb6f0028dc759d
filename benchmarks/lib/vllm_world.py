"""vLLM's own compressors, metadata builders and pages, and the steps of a scheduler over them: for tests and benchmarks.

It imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.models.deepseek_v4 import attention, compressor, sparse_mla
from vllm.models.deepseek_v41 import attention as attention_v41
from vllm.models.deepseek_v41 import compressor as compressor_v41
from vllm.models.deepseek_v41 import sparse_mla as sparse_mla_v41
from vllm.v1.attention.backends.mla import indexer
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheSpec, MLAAttentionSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.utils import AttentionGroup

from kvfold.testing.engine import Part

BLOCK = 256  # positions of a block of vLLM's caches
PAGE = 37440  # bytes: what vLLM gives V4's pages in the fp8_ds_mla layout
NONE, PAD = 0, -1


class Sizes(NamedTuple):
    """Of a scheduler: most requests and tokens of a step, longest text, drafts of a request."""

    requests: int = 5
    tokens: int = 420
    length: int = 1024
    drafts: int = 3
    device: str = "cpu"


def no_projection(*_: Any, **__: Any) -> torch.nn.Module:
    """`kv_score` is handed over, so no weights are made, which would ask for tensor parallel groups."""
    return torch.nn.Identity()


compressor.MergedColumnParallelLinear = compressor_v41.MergedColumnParallelLinear = no_projection


def make_config(sizes: Sizes) -> VllmConfig:
    """A configuration as far as compressors and their builders read one."""
    config = VllmConfig(device_config=DeviceConfig(device=sizes.device))
    config.kernel_config.enable_jit_warmup = False
    text = SimpleNamespace(qk_rope_head_dim=64, rms_norm_eps=1e-6, index_topk=512, model_type="deepseek_v4")
    config.model_config = SimpleNamespace(hf_config=text, hf_text_config=text, max_model_len=sizes.length, dtype=torch.bfloat16)
    config.scheduler_config.max_num_seqs, config.scheduler_config.max_num_batched_tokens = sizes.requests, sizes.tokens
    config.scheduler_config.async_scheduling = False
    config.attention_config.sparse_mla_prefill_workspace_factor = 1
    config.cache_config.cache_dtype, config.cache_config.block_size = "fp8_ds_mla", BLOCK
    speculative = SimpleNamespace(num_speculative_tokens=sizes.drafts, parallel_drafting=False, use_dspark=lambda: False)
    speculative.enable_adaptive_verification = False
    config.speculative_config = speculative if sizes.drafts else None
    return config


class Step(NamedTuple):
    """parts: in the order of the batch. requests, tokens: with padding. dummy: all slots and blocks are none's."""

    parts: tuple[Part, ...]
    requests: int = 0
    tokens: int = 0
    dummy: bool = False

    @classmethod
    def of(cls, *parts: Sequence[int], **padding: Any) -> Step:
        return cls(tuple(Part(*(*part, part[2])[:4]) for part in parts), **padding)


class Memory:
    """The blocks of a state or a cache in a pool of both, as vLLM has them.

    Attributes:
        view: all blocks of the pool, as this one sees them. bytes: of its own blocks.
        before: on a CPU, what these were in the beginning.
    """

    def __init__(self, pool: torch.Tensor, own: slice, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.bytes, inside = pool[own], pool.view(dtype)
        self.before = self.bytes.clone() if pool.device.type == "cpu" else None
        self.view = inside.as_strided((len(pool), *shape), (inside.stride(0), shape[1], 1))


class Layer:
    """One compressor of vLLM with its two metadata builders, as vLLM's runner makes them, and pages of its own.

    Args:
        ratio: 4 and 128 are V4's, 1 and 2 V4.1's. head_dim: 512, or 128 of V4's indexer.
        fp4: the indexer's cache in MXFP4.
        record: bytes of V4.1's: 584, 528 or 288, or of plain rows, 1024 in bf16 and 512 in e4m3.
        cache_first: the cache's builder builds before the state's.
    """

    def __init__(
        self,
        sizes: Sizes,
        config: VllmConfig,
        ratio: int,
        head_dim: int = 512,
        *,
        fp4: bool = False,
        record: int = 584,
        cache_first: bool = False,
        name: str = "layer",
    ) -> None:
        self.sizes, self.groups = sizes, list[AttentionGroup]()
        self.config, self.ratio, self.cache_first, self.record = config, ratio, cache_first, record
        self.name, device = f"{name}.{ratio}.{head_dim}.{record}", torch.device(sizes.device)
        named = {"vllm_config": config, "compress_ratio": ratio, "hidden_size": 64, "head_dim": head_dim, "rotate": True}
        named |= {"prefix": f"{self.name}.compressor", "k_cache_prefix": self.name}
        with set_current_vllm_config(config), device:  # where vLLM's loader makes its modules
            if ratio > 2:
                self.compressor = attention.DeepseekCompressor(**named, use_fp4_cache=fp4)
            else:
                self.compressor = attention_v41.DeepseekCompressor(**named)
        draw = torch.Generator().manual_seed(ratio + head_dim)
        if ratio > 2:
            self.compressor.ape.data.copy_(torch.randn(self.compressor.ape.shape, generator=draw))
            self.record = 584 if head_dim == 512 else 68 if fp4 else 132
        self.compressor.norm.weight.data.copy_(1 + torch.randn(head_dim, generator=draw) / 8)
        spec = MLAAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=self.record, dtype=torch.uint8, tokens_per_state=ratio
        )
        backend = (sparse_mla if ratio > 2 else sparse_mla_v41).DeepseekV4FlashMLABackend
        self._add(indexer.DeepseekV4IndexerBackend if head_dim == 128 else backend, self.name, spec)
        self.cache_table = torch.zeros(sizes.requests, sizes.length // BLOCK, dtype=torch.int32, device=device)
        self.cache_blocks = Blocks(sizes.requests, sizes.length // BLOCK)
        rows, caches = BLOCK // ratio, 1 + sizes.requests * sizes.length // BLOCK  # with block 0, which is none's
        states = 0 if self.compressor.state_cache is None else self._make_state(device, caches)
        draw = torch.Generator(device).manual_seed(ratio)
        apart = max(PAGE, -(-rows * self.record // 576) * 576)
        pool = torch.randint(0, 256, (caches + states, apart), dtype=torch.uint8, generator=draw, device=device)
        dtype = {1024: torch.bfloat16, 512: torch.float8_e4m3fn}.get(self.record, torch.uint8)
        self.caches = Memory(pool, slice(caches), (rows, self.record // dtype.itemsize), dtype)
        if states:
            self.states = Memory(pool, slice(caches, None), self.state_shape, torch.float32)
            self.compressor.state_cache.bind_kv_cache(self.states.view[:, None])
        layer = SimpleNamespace(kv_cache=self.caches.view, _flashinfer_fp8_kv_scale=torch.tensor([0.375], device=device))
        config.compilation_config.static_forward_context[self.name] = layer
        self.kv_width = head_dim * (1, 2, 4)[(ratio > 1) + (ratio == 4)]

    def _add(self, backend: Any, name: str, spec: KVCacheSpec) -> None:
        """A group of one layer, in the order in which vLLM builds their metadata."""
        group = AttentionGroup(backend, [name], spec, 0)
        group.create_metadata_builders(self.config, torch.device(self.sizes.device), spec.block_size)
        self.groups.insert(len(self.groups) * self.cache_first, group)

    def _make_state(self, device: torch.device, first: int) -> int:
        """All of the state but its memory, whose blocks are those from `first` on; and how many these are."""
        state = self.compressor.state_cache
        spec: KVCacheSpec = state.get_kv_cache_spec(self.config)
        self._add(state.get_attn_backend(), state.prefix, spec)
        self.state_size, self.window = spec.block_size, getattr(spec, "sliding_window", self.sizes.length)
        self.one_block = isinstance(spec, CircularBufferSpec)
        per_sequence = 1 if self.one_block else -(-self.sizes.length // self.state_size)
        requests = self.sizes.requests
        self.state_table = torch.zeros(requests, per_sequence, dtype=torch.int32, device=device)
        self.state_blocks = Blocks(requests, per_sequence, first)
        self.state_shape = (self.state_size, spec.head_size)
        return requests * per_sequence

    def tables(self, step: Step, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The table of blocks of a step and the slots of its tokens, of each of `groups`."""
        state_slots, cache_slots = self._fill(step, tokens)
        found = [(self.cache_table, cache_slots)]
        if self.compressor.state_cache is not None:
            found.insert(self.cache_first, (self.state_table, state_slots))
        return found

    def _fill(self, step: Step, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the batch's rows of both tables; the slot of each token in the state and in the (token's) cache."""
        slots = torch.full((2, tokens), PAD, dtype=torch.int64, device=self.sizes.device)
        parts = () if step.dummy else step.parts
        self.cache_table.zero_()
        self._fill_one(parts, self.cache_table, slots[1], self.cache_blocks, BLOCK)
        if self.compressor.state_cache is not None:
            self.state_table.zero_()
            self._fill_one(parts, self.state_table, slots[0], self.state_blocks, self.state_size)
            for row, part in enumerate(parts):
                gone = max(part.start - self.window + 1, 0) // self.state_size
                self.state_table[row, : 0 if self.one_block else gone] = NONE
        return slots[0], slots[1]

    def _fill_one(self, parts: Sequence[Part], table: torch.Tensor, slots: torch.Tensor, blocks: Blocks, size: int) -> None:
        at = 0
        for row, part in enumerate(parts):
            mine = torch.tensor(blocks.of(part.sequence), device=table.device)
            table[row, : len(mine)] = mine
            if table.shape[1] > 1:  # vLLM has no slots of rings
                positions = torch.arange(part.start, part.start + part.new, device=table.device)
                slots[at : at + part.new] = mine[positions // size] * size + positions % size
            at += part.new


class Blocks:
    """The blocks of each sequence, in an order of no meaning; `share` gives one sequence those of another's begin."""

    def __init__(self, requests: int, per_sequence: int, first: int = 1) -> None:
        order = torch.randperm(requests * per_sequence, generator=torch.Generator().manual_seed(per_sequence)) + first
        self._of = order.view(requests, per_sequence).tolist()

    def of(self, sequence: int) -> list[int]:
        return self._of[sequence]

    def share(self, sequence: int, other: int, count: int) -> None:
        self._of[sequence][:count] = self._of[other][:count]


class World:
    """Layers under one scheduler, whose sequences have the same tokens in every world.

    Attributes:
        latents: the normed rows that V4.1's compressors gave, of the windows that ended.
    """

    def __init__(self, layers: Sequence[Layer], config: VllmConfig, sizes: Sizes) -> None:
        self.layers, self.config, self.sizes, self.latents = layers, config, sizes, []
        self.ends = torch.zeros(sizes.requests + 1, dtype=torch.int32, device=sizes.device)
        self.lengths = torch.zeros(sizes.requests, dtype=torch.int32, device=sizes.device)
        angle = torch.arange(sizes.length)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
        self.rotary = SimpleNamespace(cos_sin_cache=torch.cat([angle.cos(), angle.sin()], dim=1).to(sizes.device))
        draw = torch.Generator().manual_seed(7)
        shape, widths = (sizes.requests, sizes.length), {layer.kv_width for layer in layers}
        self.texts = {width: torch.randn(*shape, width, generator=draw).to(sizes.device) for width in sorted(widths)}

    def hit(self, sequence: int, other: int, length: int) -> None:
        """A prefix hit: the first `length` tokens of a sequence are another's, blocks and all."""
        for text in self.texts.values():
            text[sequence, :length] = text[other, :length]
        for layer in self.layers:
            layer.cache_blocks.share(sequence, other, length // BLOCK)
            if layer.compressor.state_cache is not None and not layer.one_block:
                layer.state_blocks.share(sequence, other, length // layer.state_size)

    @torch.inference_mode()  # as vLLM runs a step
    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            metadata, positions = self.prepare(step)
            positions = torch.nn.functional.pad(positions, (0, 3), value=1)  # rows may go on behind the step's tokens
            self.forward(metadata, [self.kv_score(step, layer.kv_width, len(positions)) for layer in self.layers], positions)

    def prepare(self, step: Step) -> tuple[dict[str, Any], torch.Tensor]:
        """A step's metadata, by the name of a layer, and its positions."""
        device = self.sizes.device
        new = [part.new for part in step.parts]
        total, requests = sum(new), max(step.requests, len(new))
        tokens = max(step.tokens, total)
        ends = torch.tensor([0, *new]).cumsum(0)
        self.ends[: len(ends)], self.ends[len(ends) :] = ends.to(device), total
        self.lengths.zero_()
        seq_lens = [part.new if step.dummy else part.start + part.new for part in step.parts]
        self.lengths[: len(new)] = torch.tensor(seq_lens, device=device)
        positions = torch.zeros(tokens, dtype=torch.int64, device=device)
        if not step.dummy:
            every = [torch.arange(part.start, part.start + part.new) for part in step.parts]
            positions[:total] = torch.cat(every).to(device)
        groups = [group for layer in self.layers for group in layer.groups]
        tables, slots = zip(*(pair for layer in self.layers for pair in layer.tables(step, tokens)), strict=True)
        metadata = build_attn_metadata(
            attn_groups=[[group] for group in groups],
            num_reqs=requests,
            num_tokens=tokens,
            query_start_loc_gpu=self.ends[: requests + 1],
            query_start_loc_cpu=self.ends[: requests + 1].cpu().clone(),
            max_query_len=max(new),
            seq_lens=self.lengths,
            max_seq_len=self.sizes.length,
            block_tables=[table[:requests] for table in tables],
            slot_mappings=slots,
            kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
            seq_lens_cpu_upper_bound=self.lengths.cpu().clone(),
            positions=positions,
        )
        return metadata, positions

    def forward(self, metadata: dict[str, Any], kv_scores: Sequence[torch.Tensor], positions: torch.Tensor) -> None:
        """All layers, one after the other."""
        with set_forward_context(metadata, self.config, num_tokens=len(positions)):
            for layer, kv_score in zip(self.layers, kv_scores, strict=True):
                if layer.ratio > 2:
                    layer.compressor(kv_score, positions, self.rotary)
                    continue
                latent = layer.compressor(kv_score, positions)
                layer.compressor.insert_cache(latent, positions, self.rotary)
                ends = (positions % layer.ratio == layer.ratio - 1).nonzero()[:, 0]
                self.latents.append(latent[ends[ends < int(self.ends[-1])]])

    def kv_score(self, step: Step, width: int, tokens: int) -> torch.Tensor:
        """The rows of a step: of rejected drafts others than those that come later, of padding any."""
        rows = torch.full((tokens, width), 3.0, device=self.sizes.device)
        at = 0
        for part in step.parts:
            text = self.texts[width][part.sequence, part.start : part.start + part.new]
            rows[at : at + part.new] = text
            rows[at + part.kept : at + part.new] = text[part.kept :] * -2 + 1
            at += part.new
        return rows
