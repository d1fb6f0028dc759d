"""Calls inside of code that torch.compile traces: the graph is broken around them, and bits are those of eager code."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from support.parallel_support import SPECS, World

import kvfold
from kvfold.parallel import ContextParallel


def twice(group: dist.ProcessGroup, compiled: bool) -> tuple[torch.Tensor, ...]:
    """A step of a prompt and one of training, with operations around them."""
    spec, cp = SPECS["fold"], ContextParallel(group)
    draw = torch.Generator().manual_seed(0)
    rows, ape = torch.randn(30, 32, generator=draw), torch.randn(9, 16, generator=draw)
    shards = cp.split((30,), cuts=(0, 13, 30))
    own = rows[shards.index(cp.rank)]
    plan, packing = cp.plan(shards, spec, entry_slots=torch.arange(3)), cp.packing(shards, spec)
    state, cache = kvfold.FoldState.allocate(spec, 1, 4), kvfold.EntryCache.allocate("fp32", 1, 64, spec)
    weights = [ape, torch.ones(16), kvfold.reference.rope_table(30, 8)]
    leaves = [x.clone().requires_grad_() for x in (own, *weights[:2])]

    def prompt(x: torch.Tensor) -> torch.Tensor:
        layer = [(x * 2, state, cache, spec, *weights)]
        cp.compress(layer, plan)
        cp.gather(layer, plan)
        return x + 1

    def train(x: torch.Tensor, ape: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        entries = cp.entries(x * 2, packing, spec=spec, ape=ape, norm_weight=weight, rope=weights[2])
        return cp.all_entries(entries, packing).square().sum()

    if compiled:
        torch._dynamo.reset()
        prompt, train = (torch.compile(call, backend="eager") for call in (prompt, train))
    for _ in range(2):
        seen = prompt(own)
        loss = train(*leaves)
        gradients = torch.autograd.grad(loss, leaves)
    assert int(plan.errors) == 0
    return seen, cache.read(torch.arange(3)), loss.detach(), *gradients


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own of a break
def test_graphs_are_broken_around_calls(world: World) -> None:
    eager, compiled = (world.run(2, twice, way) for way in (False, True))
    for want, got in zip(eager, compiled, strict=True):
        assert all(map(torch.equal, want, got))


def test_a_whole_graph_is_refused() -> None:
    cp = ContextParallel()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"eager\.py"):
        torch.compile(lambda x: cp.split((3,)) and x + 1, backend="eager", fullgraph=True)(torch.ones(1))


def test_the_compiler_is_not_imported_for_eager_code() -> None:
    code = "import sys, kvfold.parallel as p; p.ContextParallel().split((3,)); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
