"""TensorRT-LLM's compressor operators on kvfold: `python examples/tensorrt_llm_operators.py`, on a GPU or a CPU.

One layer of ratio 4 in TensorRT-LLM's terms, without TensorRT-LLM: prompts, then steps of four tokens. First by the operators,
as its `Compressor.forward` calls them, then by `compress_records`, which does all of that in one launch. Same bytes.
"""

import torch

import kvfold
from kvfold.integrations import tensorrt_llm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIM, ROPE_DIM, RATIO, CHANNELS = 512, 64, 4, 1024  # ratio 4 has overlap, so rows are of two halves
BATCH, LENGTH, PAGE, RECORDS, FP8 = 3, 96, 32, 8, 1  # requests, their longest, positions of a page, records of a block, type
COLUMNS = LENGTH // PAGE
torch.manual_seed(0)
torch.set_num_threads(1)  # on a CPU these tensors are too small to share
tokens = torch.randn(BATCH, LENGTH, 2 * CHANNELS, dtype=torch.bfloat16, device=DEVICE)  # stands for the projection
ape = torch.randn(RATIO, CHANNELS, device=DEVICE)
norm_weight = torch.ones(HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
cos_sin = kvfold.reference.rope_table(LENGTH, ROPE_DIM).to(DEVICE).view(LENGTH, 2, ROPE_DIM // 2)


def ints(values) -> torch.Tensor:
    return torch.tensor([*values], dtype=torch.int32, device=DEVICE)


class Buffers:
    """What TensorRT-LLM's cache manager has of a layer: pages of raw rows, blocks of records, and their tables."""

    def __init__(self) -> None:
        rows = torch.zeros(2, BATCH * COLUMNS, PAGE, CHANNELS, device=DEVICE)
        table = ints(range(BATCH * COLUMNS)).view(BATCH, COLUMNS)
        self.pools = tensorrt_llm.Pools(rows[0], rows[1], table, table.flip(0).contiguous(), PAGE)
        self.blocks = table  # 32 positions are 8 records, so a block goes with a page
        self.cache = torch.zeros(BATCH * COLUMNS, RECORDS * HEAD_DIM, dtype=torch.uint8, device=DEVICE)


def by_operators(at: Buffers, kv_score: torch.Tensor, start: list[int], new: int, prompt: bool) -> None:
    """A step in which each request brings `new` tokens. All of this but the operators is TensorRT-LLM's own metadata."""
    first, made = [x // RATIO for x in start], [(x + new) // RATIO - x // RATIO for x in start]
    places = -(-new // RATIO)  # reserved for each request
    kv_lens, cu_seq_lens = ints(x + new for x in start), ints(range(0, BATCH * new + 1, new))
    cu_kv_comp = ints(range(0, BATCH * places + 1, places))
    output = torch.empty(BATCH * places, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    pools, shape = (kv_score, ape, *at.pools[:4], output, kv_lens), (BATCH, PAGE, HEAD_DIM, RATIO)
    if prompt:
        torch.ops.trtllm.compressor_prefill_reduction(*pools, ints(start), cu_seq_lens, cu_kv_comp, *shape, places)
    else:
        torch.ops.trtllm.compressor_paged_kv_compress(*pools, cu_seq_lens, cu_kv_comp, *shape, new)
    positions = ints((f + i) * RATIO for f in first for i in range(places))
    mask = torch.tensor([i < count for count in made for i in range(places)], device=DEVICE)
    told = ints(made), cu_kv_comp, ints(first), at.blocks, mask
    finish = norm_weight, 1e-6, cos_sin, positions, HEAD_DIM - ROPE_DIM, ROPE_DIM
    torch.ops.trtllm.compressor_postprocess_scatter(output, None, *finish, at.cache, *told, RECORDS, FP8, False, None, None)


def by_one_call(at: Buffers, kv_score: torch.Tensor, start: list[int], new: int) -> None:
    """The same, without rows between pooling and records."""
    tensorrt_llm.compress_records(
        kv_score, at.pools, at.cache, ape=ape, norm_weight=norm_weight, norm_eps=1e-6, cos_sin_table=cos_sin,
        kv_lens=ints(x + new for x in start), cu_seq_lens=ints(range(0, BATCH * new + 1, new)), block_table=at.blocks,
        tokens_per_block=RECORDS, cache_scale_type=FP8, max_new_tokens=new,
    )  # fmt: skip


tensorrt_llm.register()  # beside TensorRT-LLM: import it first, and register(replace=True)
one, other = Buffers(), Buffers()
start, new = [0] * BATCH, 50
for step in range(8):
    kv_score = torch.cat([tokens[b, x : x + new] for b, x in enumerate(start)])
    by_operators(one, kv_score, start, new, prompt=step == 0)
    by_one_call(other, kv_score, start, new)
    # Of the four tokens of a later step 4, 3, ... are accepted: where a request goes on is all that says so.
    start, new = [x + (new if step == 0 else 4 - (step + b) % 4) for b, x in enumerate(start)], 4
assert torch.equal(one.cache, other.cache), "not the same records"
assert all(torch.equal(a, b) for a, b in zip(one.pools[:2], other.pools[:2], strict=True)), "not the same rows"
assert int(tensorrt_llm.errors(DEVICE)) == 0
print(f"{sum(x // RATIO for x in start)} records of {BATCH} requests on {DEVICE}: the same bytes by operators and by one call")
