"""Two GPUs over NCCL have the bits of one: V4's compressors, with shards shorter than a window, so that carries go in a chain.

The same function runs over gloo on a CPU, where there is no second GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.parallel_support import World

import kvfold
from kvfold.parallel import ContextParallel, Shards, take_carry
from kvfold.training import Packing, compress

SECONDS = 240  # in which kernels are compiled, too
CUTS = (0, 130, 150, 190, 340)  # rank 0 has both ends: of ratio 128 a fold goes from it to rank 1, and from there back
SPECS = (kvfold.V4_HCA, kvfold.V4_CSA, kvfold.V4_INDEXER)


def check(cp: ContextParallel, device: torch.device) -> int:
    """How many rounds of messages ratio 128 took."""
    shards = cp.split((CUTS[-1],), cuts=CUTS)
    own = shards.index(cp.rank).to(device)
    for seed, spec in enumerate(SPECS):
        draw = torch.Generator().manual_seed(seed)
        sizes = (CUTS[-1], spec.kv_score_width), (spec.ratio, spec.channels), (spec.head_dim,)
        rows, ape, weight = (torch.randn(size, generator=draw).to(device) for size in sizes)
        rows, rope = rows.bfloat16(), kvfold.reference.rope_table(CUTS[-1], spec.rope_dim).to(device)
        check_prompt(cp, shards, rows, own, spec, (ape, weight, rope))
        check_training(cp, shards, rows, own, spec, (ape, weight, rope))
    return len(cp.plan(shards, kvfold.V4_HCA, device=device).rounds)


def check_prompt(
    cp: ContextParallel, shards: Shards, rows: torch.Tensor, own: torch.Tensor, spec: kvfold.CompressorSpec, weights: tuple
) -> None:
    device, tokens = rows.device, len(rows)
    dtype = torch.bfloat16 if spec.overlap else torch.float32
    states = [kvfold.FoldState.allocate(spec, 1, 4, dtype=dtype, device=device) for _ in range(2)]
    caches = [kvfold.EntryCache.allocate("bf16", 2, 64, spec, device=device) for _ in range(2)]
    table, zero = torch.tensor([[0, 1]], dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    where = {"cache_block_table": table, "rows_per_page": 64}
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    alone = kvfold.StepPlan.build(spec.ratio, zero, ends, tokens, state_slots=zero, **where)
    ape, weight, rope = weights
    kvfold.compress(rows, alone, states[0], caches[0], spec=spec, ape=ape, norm_weight=weight, rope=rope)
    plan = cp.plan(shards, spec, **where)
    layer = [(rows[own], states[1], caches[1], spec, *weights)]
    cp.compress(layer, plan)
    cp.gather(layer, plan)
    assert int(alone.errors) == int(plan.errors) == 0
    assert torch.equal(caches[0].storage, caches[1].storage), f"{spec}: records"
    end = torch.tensor([tokens], dtype=torch.int32, device=device)
    want, got = (take_carry(state, zero, end) for state in states)
    assert int(got.positions) == tokens, f"{spec}: the state holds the end"
    inside = tokens % spec.ratio  # how many rows of the window that the next step begins in are there
    kept = want.rows.shape[1] if not spec.overlap or inside else spec.ratio
    assert torch.equal(got.rows[:, :kept], want.rows[:, :kept]), f"{spec}: state"


def check_training(
    cp: ContextParallel, shards: Shards, rows: torch.Tensor, own: torch.Tensor, spec: kvfold.CompressorSpec, weights: tuple
) -> None:
    device, tokens = rows.device, len(rows)
    packing = Packing.build(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens, spec.ratio)
    cut = cp.packing(shards, spec, device=device)
    g = torch.randn(tokens // spec.ratio, spec.head_dim, generator=torch.Generator().manual_seed(9)).to(device).bfloat16()
    found = []
    for kv_score in (rows, rows[own]):
        leaves = [x.clone().requires_grad_() for x in (kv_score, *weights[:2])]
        given = {"spec": spec, "ape": leaves[1], "norm_weight": leaves[2], "rope": weights[2]}
        if kv_score is rows:
            entries = compress(leaves[0], packing, **given)[: len(g)]
            entries.backward(g)
        else:
            entries = cp.entries(leaves[0], cut, **given)
            entries.backward(g[cut.numbers[cp.rank]])
        found.append((entries.detach(), *(x.grad for x in leaves)))
    one, two = found
    assert torch.equal(two[0], one[0][cut.numbers[cp.rank]]), f"{spec}: entries"
    assert torch.equal(two[1], one[1][own]), f"{spec}: gradient of kv_score"
    assert torch.equal(two[2], one[2]) and torch.equal(two[3], one[3]), f"{spec}: gradients of ape and norm_weight"


def on_a_cpu(group: dist.ProcessGroup) -> int:
    return check(ContextParallel(group, "zigzag"), torch.device("cpu"))


def test_two_processes_over_gloo(world: World) -> None:
    assert world.run(2, on_a_cpu) == [2, 2]


def on_a_gpu(rank: int, store: str, pipe: Any) -> None:
    try:
        os.environ.pop("TRITON_INTERPRET", None)
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl",
            store=dist.FileStore(store, 2),
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=SECONDS),
            device_id=device,
        )
        rounds = check(ContextParallel(layout="zigzag"), device)
        torch.cuda.synchronize()
        pipe.send(("", rounds))
        pipe.poll(SECONDS)  # the other one may still read what this one has
    except Exception:
        pipe.send((traceback.format_exc(), 0))
    os._exit(0)  # what hangs in NCCL holds up nobody


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_over_nccl(tmp_path: Path) -> None:
    context, pipes, processes, found = multiprocessing.get_context("spawn"), [], [], {}
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=on_a_gpu, args=(rank, str(tmp_path / "store"), theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        while len(found) < 2:
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in found], SECONDS)
            assert ready, f"of 2 ranks only {sorted(found)} came back in {SECONDS} seconds"
            for pipe in ready:
                text, found[pipes.index(pipe)] = pipe.recv()
                assert not text, f"rank {pipes.index(pipe)}:\n{text}"
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.join(10)
            process.kill()
    assert found == {0: 2, 1: 2}
