"""One long sequence cut over several processes: each compresses its own tokens, and all get all entries, with the same bits.

Then all go on from the end of it by a step of a few tokens, and train on it: entries and gradients.

    torchrun --nproc-per-node 2 examples/context_parallel.py                       # CPUs, over gloo
    torchrun --nproc-per-node 2 examples/context_parallel.py --device cuda         # GPUs, over NCCL
    [--tokens 3001] [--layout zigzag]

Every process also does the same with the whole sequence alone, and compares the bytes. Without torchrun it is one process.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist

import kvfold
import kvfold.training
from kvfold.parallel import ContextParallel

ROWS_PER_PAGE = 64
NEXT = 8  # tokens of the step that goes on from the end
LAYERS = {  # of DeepSeek-V4, by ratio: what takes part in one exchange, and the records that it makes
    128: [(kvfold.V4_HCA, "fp8_ds_mla")],
    4: [(kvfold.V4_CSA, "fp8_ds_mla"), (kvfold.V4_INDEXER, "indexer_fp8_vllm")],
}


def make(tokens: int, ratio: int, device: torch.device) -> list[kvfold.Compressor]:
    """The compressors of a layer with kv_score of the whole sequence, random but the same in every process; empty caches."""
    tokens += NEXT
    draw, found = torch.Generator().manual_seed(0), []
    for spec, fmt in LAYERS[ratio]:
        kv_score = torch.randn(tokens, 2 * spec.channels, generator=draw).bfloat16().to(device)
        kept = torch.float32 if ratio == 128 else torch.bfloat16
        state = kvfold.FoldState.allocate(spec, 1, 8, device=device, dtype=kept)
        cache = kvfold.EntryCache.allocate(fmt, tokens // ratio // ROWS_PER_PAGE + 1, ROWS_PER_PAGE, spec, device=device)
        ape = torch.randn(ratio, spec.channels, generator=draw).to(device)
        rope = kvfold.reference.rope_table(tokens + 1, spec.rope_dim).to(device)
        weight = torch.ones(spec.head_dim, device=device)
        found.append(kvfold.Compressor(kv_score, state, cache, spec, ape, weight, rope))
    return found


def table_of(compressors: list[kvfold.Compressor]) -> torch.Tensor:
    """The pages of the one sequence."""
    cache = compressors[0].cache
    return torch.arange(cache.num_pages, dtype=torch.int32, device=cache.device)[None]


def cut(cp: ContextParallel, compressors: list[kvfold.Compressor], tokens: int) -> int:
    """The step, cut over all processes. Returns how many bytes this one sent to neighbours."""
    shards = cp.split([tokens])  # once per step: which tokens each process has
    table = table_of(compressors)
    plan = cp.plan(shards, compressors[0].spec, cache_block_table=table, rows_per_page=ROWS_PER_PAGE)  # once for all layers
    mine = shards.index(cp.rank).to(table.device)
    own = [c._replace(kv_score=c.kv_score[:tokens][mine]) for c in compressors]  # in a model the projection makes only these
    cp.compress(own, plan)
    cp.gather(own, plan)  # where attention wants all entries on every GPU
    assert int(plan.errors) == 0, "refused"
    return plan.bytes_sent(own)


def alone(compressors: list[kvfold.Compressor], start: int, end: int) -> None:
    """A step from one position to another in one process."""
    device = compressors[0].cache.device
    first, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([start], [0, end - start]))
    where = {"cache_block_table": table_of(compressors), "rows_per_page": ROWS_PER_PAGE}
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    plan = kvfold.StepPlan.build(compressors[0].spec.ratio, first, ends, end - start, state_slots=slot, **where)
    for kv_score, state, cache, spec, ape, norm_weight, rope, _ in compressors:
        weights = {"spec": spec, "ape": ape, "norm_weight": norm_weight, "rope": rope}
        kvfold.compress(kv_score[start:end], plan, state, cache, **weights)
    assert int(plan.errors) == 0, "refused"


def train(cp: ContextParallel, c: kvfold.Compressor, tokens: int) -> None:
    """Entries and gradients have the bits of one process."""
    shards, device = cp.split([tokens]), c.kv_score.device
    packing, mine = cp.packing(shards, c.spec, device=device), shards.index(cp.rank).to(device)
    whole = c.kv_score[:tokens].clone().requires_grad_()
    own = whole.detach()[mine].requires_grad_()
    ape, norm_weight = c.ape.clone().requires_grad_(), c.norm_weight.clone().requires_grad_()
    given = {"spec": c.spec, "ape": ape, "norm_weight": norm_weight, "rope": c.rope}
    ends = torch.tensor([0, tokens], device=device)
    single = kvfold.training.compress(whole, kvfold.training.Packing.build(ends, tokens, c.spec.ratio), **given)
    every = cp.all_entries(cp.entries(own, packing, **given), packing)
    assert torch.equal(every, single), "other entries than in one process"
    g = torch.linspace(-1, 1, every.numel(), device=device).view_as(every).to(every.dtype)
    want = torch.autograd.grad(single, [whole, ape, norm_weight], g)
    # As every process has the same gradients of all entries, of which `all_entries` takes the sum.
    got = torch.autograd.grad(every, [own, ape, norm_weight], g if cp.rank == 0 else torch.zeros_like(g))
    assert torch.equal(got[0], want[0][mine]), "other gradients of kv_score than in one process"
    assert all(map(torch.equal, got[1:], want[1:])), "other gradients of weights than in one process"


def run(cp: ContextParallel, tokens: int, device: torch.device) -> list[str]:
    """A line for each ratio; raises if any byte is another than in one process."""
    lines = []
    for ratio in LAYERS:
        together, single = make(tokens, ratio, device), make(tokens, ratio, device)
        sent = cut(cp, together, tokens)
        alone(single, 0, tokens)
        for each in (together, single):
            alone(each, tokens, tokens + NEXT)  # the state is that of one process, too
        for one, other in zip(together, single, strict=True):
            assert torch.equal(one.cache.storage, other.cache.storage), f"ratio {ratio}: other bytes than in one process"
        train(cp, single[0], tokens)
        lines.append(
            f"rank {cp.rank} of {cp.size}, {cp.layout}: ratio {ratio}, {tokens // ratio} entries, {sent} bytes to neighbours"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3001)
    parser.add_argument("--layout", choices=("contiguous", "zigzag"), default="contiguous")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:  # which torchrun sets
        where = {"backend": "nccl", "device_id": device} if args.device == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**where, timeout=timedelta(seconds=120))
    cp = ContextParallel(layout=args.layout)
    lines = run(cp, args.tokens, device)
    print("\n".join([*lines, f"rank {cp.rank}: all bytes are those of one process"]), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
