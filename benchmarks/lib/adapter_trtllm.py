"""A step over tensors as TensorRT-LLM passes them to its compressors, of a model of any layers: pools, metadata and caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from kvfold import reference
from kvfold.integrations import tensorrt_llm
from kvfold.integrations.tensorrt_llm import Pools, compress_records
from kvfold.integrations.tensorrt_llm.pooling import paged_kv_compress
from kvfold.integrations.tensorrt_llm.postprocess import postprocess_scatter

PAGE, RECORDS = 128, 32  # positions of a page, records of a block
MAIN, INDEXER = 1, 2  # `cache_scale_type`: fp8, and fp8 with a scale for 128 values, whose codes are given out too


class Metadata:
    """What the compressors of one ratio are told of a step: lengths, places of entries, and which places have one."""

    def __init__(self, ratio: int, starts: Sequence[int], new: int, device: str) -> None:
        self.new, self.batch = new, len(starts)

        def ints(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        places = -(-new // ratio)  # of each request, as TensorRT-LLM reserves them
        first = [start // ratio for start in starts]
        made = [(start + new) // ratio - at for start, at in zip(starts, first, strict=True)]
        self.kv_lens, self.first, self.made = ints([start + new for start in starts]), ints(first), ints(made)
        self.cu_seq, self.cu_comp = (ints([0, *accumulate([n] * self.batch)]) for n in (new, places))
        self.positions = ints([(at + i) * ratio for at in first for i in range(places)])
        self.mask = torch.tensor([i < n for n in made for i in range(places)], device=device)
        self.rows = places * self.batch
        pages = -(-(max(starts) + new) // PAGE)
        self.table = torch.randperm(pages * self.batch, generator=torch.Generator().manual_seed(ratio))
        self.table = self.table.to(device, torch.int32).view(self.batch, pages)
        blocks = -(-(max(starts) + new) // ratio // RECORDS) or 1
        self.blocks = ints(range(blocks * self.batch)).view(self.batch, blocks)


class Compressor:
    """One of them: its weights, pools of raw rows in fp32, blocks of records, and kv_score of the step in bf16."""

    def __init__(self, told: Metadata, ratio: int, head_dim: int, rope: torch.Tensor) -> None:
        device, channels = told.kv_lens.device, head_dim * (1 + (ratio == 4))
        self.told, self.ratio, self.head_dim, self.rope = told, ratio, head_dim, rope
        self.indexer = head_dim == 128
        self.kind = INDEXER if self.indexer else MAIN
        kv, score = (torch.randn(told.table.numel(), PAGE, channels, device=device) for _ in range(2))
        self.pools = Pools(kv, score, told.table, told.table, PAGE)
        self.kv_score = torch.randn(told.batch * told.new, 2 * channels, device=device).bfloat16()
        self.ape = torch.randn(ratio, channels, device=device)
        self.weight = torch.ones(head_dim, dtype=torch.bfloat16, device=device)
        self.output = torch.empty(told.rows, head_dim, dtype=torch.bfloat16, device=device)
        size = head_dim + 4 * self.indexer
        self.cache = torch.zeros(told.blocks.numel(), RECORDS * size, dtype=torch.uint8, device=device)
        self.out: dict[str, torch.Tensor] = {}
        if self.indexer:
            self.out["quant_output"] = torch.empty(told.rows, 128, dtype=torch.float8_e4m3fn, device=device)
            self.out["scale_output"] = torch.empty(told.rows, 1, device=device)

    def operators(self) -> None:
        """`Compressor.forward` behind its projection, as TensorRT-LLM has it."""
        told, pools = self.told, self.pools
        paged_kv_compress(
            self.kv_score, self.ape, pools.paged_kv, pools.paged_score, told.table, told.table, self.output, told.kv_lens,
            told.cu_seq, told.cu_comp, batch_size=told.batch, page_size=PAGE, head_dim=self.head_dim,
            compress_ratio=self.ratio, next_n=told.new,
        )  # fmt: skip
        postprocess_scatter(
            self.output, None, self.weight, 1e-6, self.rope, told.positions, self.head_dim - 64, 64, self.cache, told.made,
            told.cu_comp, told.first, told.blocks, compressed_mask=told.mask, tokens_per_block=RECORDS,
            cache_scale_type=self.kind, rotate_activation=self.indexer, **self.out,
        )  # fmt: skip

    def records(self) -> None:
        """The call in place of both, but of an indexer's compressor, whose rows are read behind it."""
        if self.indexer:
            self.operators()
            return
        told = self.told
        compress_records(
            self.kv_score, self.pools, self.cache, ape=self.ape, norm_weight=self.weight, norm_eps=1e-6,
            cos_sin_table=self.rope, kv_lens=told.kv_lens, cu_seq_lens=told.cu_seq, block_table=told.blocks,
            tokens_per_block=RECORDS, cache_scale_type=self.kind, max_new_tokens=told.new,
        )  # fmt: skip


def step_of(layers: Sequence[int], starts: Sequence[int], new: int, variant: str, device: str) -> Callable[[], None]:
    """All compressors of a step, main and indexer where the ratio is 4. variant: "operators" or "records"."""
    told = {ratio: Metadata(ratio, starts, new, device) for ratio in sorted(set(layers))}
    rope = reference.rope_table(max(starts) + new, 64).to(device).view(-1, 2, 32)
    made = [Compressor(told[ratio], ratio, dim, rope) for ratio in layers for dim in ((512, 128) if ratio == 4 else (512,))]
    calls = [getattr(one, variant) for one in made]

    def step() -> None:
        tensorrt_llm.step()
        for call in calls:
            call()

    return step
