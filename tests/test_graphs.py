"""CUDA graphs and `warmup`: what was recorded can be replayed for any other step, and nothing compiles after the warm-up."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch
from chain_support import AHEAD, BATCH, INDEXER, LAYERS, MAIN, MOST, NARROW, WIDE, Chain, same, script
from conftest import BACKENDS
from helpers import Weights, make_tokens

import kvfold
from kvfold import CompressorSpec, StepPlan
from kvfold.kernels import dispatch, launch
from kvfold.kernels.configs import UnsupportedError

GPU = BACKENDS["cuda"]


def warm_the_chain() -> int:
    """For all that `Chain` calls."""
    options = {"max_new_tokens": (MOST,), "states": ("fold", "window"), "rows": (None, torch.float32)}
    count = 0
    for layers in LAYERS.values():
        for _, some in layers:
            for spec, fmt in some:
                count += kvfold.warmup([spec], [fmt, None], **options)
    pairs = [tuple(some) for layers in LAYERS.values() for how, some in layers if how == "many"]
    return count + kvfold.warmup([], [], max_new_tokens=(MOST,), many=pairs)


@pytest.mark.gpu
def test_recorded_before_anything_ran() -> None:
    """After `warmup`, a graph can be recorded with fresh buffers: nothing is compiled, and scratch is made as it is needed.

    Its replays, and eager calls between them, do what eager calls alone do.
    """
    warm_the_chain()
    before, rounds = dispatch.compilations, script(24, 11)
    chain, graph = Chain(GPU), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain.launch()
    assert dispatch.compilations == before
    for i, steps in enumerate(rounds):
        chain.load(steps)
        if i % 3 == 0:
            chain.launch()
        else:
            graph.replay()
    chain.check_errors()
    eager = Chain(GPU)
    for steps in rounds:
        eager.load(steps)
        eager.launch()
    same(chain.contents(), eager.contents())
    assert dispatch.compilations == before


@pytest.mark.gpu
def test_fewer_live_sequences() -> None:
    """A graph for a full batch, replayed for steps of which only one sequence has tokens, or none."""
    full, few = script(4, 12), script(4, 13, live=1)
    chain, eager, graph = Chain(GPU), Chain(GPU), torch.cuda.CUDAGraph()
    rounds = [full[0]]
    chain.load(rounds[0])
    chain.launch()
    with torch.cuda.graph(graph):
        chain.launch()
    for kind in (few, script(2, 14, live=0)):
        for steps in kind:
            # A text of its own: every sequence starts anew.
            rounds.append([step._replace(start_pos=torch.zeros(BATCH, dtype=torch.int32)) for step in steps])
    for i, steps in enumerate(rounds):
        if i:
            chain.load(steps)
            graph.replay()
        eager.load(steps)
        eager.launch()
    chain.check_errors()
    same(chain.contents(), eager.contents())


@pytest.mark.gpu
def test_the_plan_outside_of_the_graph() -> None:
    """Only the calls are recorded; the plans are updated between replays, by ordinary launches."""
    rounds = script(10, 15)
    chain, eager, graph = Chain(GPU), Chain(GPU), torch.cuda.CUDAGraph()
    updates = chain.plans
    chain.load(rounds[0])
    chain.launch()
    with torch.cuda.graph(graph):
        for key, layers in chain.layers.items():
            for how, some in layers:
                for k in range(AHEAD):
                    chain.call(how, some, updates[key][k], k)
    for i, steps in enumerate(rounds):
        if i:
            chain.load(steps)
            for plans in updates.values():
                for k, plan in enumerate(plans):
                    plan.update(chain.starts[k], chain.ends[k])
            graph.replay()
        eager.load(steps)
        eager.launch()
    chain.check_errors()
    same(chain.contents(), eager.contents())


class Workload:
    """Random calls of everything: batch sizes, lengths, strides and alignments of all tensors, plan sizes, pages."""

    def __init__(self, seed: int, spec: CompressorSpec, fmt: str) -> None:
        self.rng, self.spec, self.fmt, self.device = random.Random(seed), spec, fmt, GPU.device
        self.weights = Weights.make(spec)

    def shifted(self, *shape: int, dtype: torch.dtype, fill: int = 0) -> torch.Tensor:
        """A contiguous tensor that may begin at any element of an allocation."""
        by, n = self.rng.choice((0, 0, 1, 3, 4, 8)), torch.Size(shape).numel()
        return torch.full((n + by,), fill, dtype=dtype, device=self.device)[by:].view(shape)

    def tokens(self, n: int) -> torch.Tensor:
        """`kv_score` as columns of something wider."""
        left, right = self.rng.choice((0, 8, 16, 24, 1)), self.rng.choice((0, 8, 16, 5))
        width = 2 * self.spec.channels
        wide = torch.zeros(n, left + width + right, dtype=torch.bfloat16, device=self.device)
        wide[:, left : left + width] = make_tokens(self.spec, n, seed=self.rng.randint(0, 99)).to(wide)
        return wide[:, left : left + width]

    def call(self, states: tuple[str, ...]) -> None:
        rng, spec = self.rng, self.spec
        batch, most = rng.choice((1, 2, 3, 17, 40)), rng.choice((1, 3, 4, 200))
        lengths = [rng.randint(0, most) for _ in range(batch)]
        ends = self.shifted(batch + 1, dtype=torch.int32)
        ends.copy_(torch.tensor([0, *lengths]).cumsum(0))
        page = rng.choice((spec.ratio, 2 * spec.ratio, 5, 48))
        kind = rng.choice(states)
        if kind == "fold":
            slots = self.shifted(batch, dtype=torch.int32)
            slots.copy_(torch.randperm(batch))
            where = {"state_slots": slots}
            state = kvfold.FoldState.allocate(spec, batch, rng.choice((1, 4, 9)), device=self.device)
        else:
            tables = tuple(self.shifted(batch, -(-most // page) + i, dtype=torch.int32) for i in (0, 1))
            where = {"block_tables": tables, "page_size": page}
            state = kvfold.WindowState.allocate(spec, 3, page, device=self.device)
        entries = rng.choice(("slots", "table"))
        if entries == "slots":
            where["entry_slots"] = self.shifted(sum(lengths) // spec.ratio + 1, dtype=torch.int64, fill=-1)
        else:
            where["cache_block_table"] = self.shifted(batch, -(-most // spec.ratio), dtype=torch.int32)
            where["rows_per_page"] = rng.choice((1, 64))
        # One page for all that has one, so what is written does not matter here; only what is compiled does.
        plan = StepPlan.build(spec.ratio, self.shifted(batch, dtype=torch.int32), ends, bound(most), **where)
        cache = kvfold.EntryCache.allocate(self.fmt, 4, 64, spec, device=self.device)
        rows = self.shifted(plan.entry_capacity, spec.head_dim, dtype=torch.float32) if rng.random() < 0.5 else None
        ape, norm, rope = (
            self.shifted(*x.shape, dtype=torch.float32).copy_(x)
            for x in (self.weights.ape, self.weights.norm_weight, self.weights.rope)
        )
        for _ in range(2):  # the second as a dependent, where there are such
            new = self.tokens(sum(lengths))
            kvfold.compress(
                new, plan, state, cache if rows is None or rng.random() < 0.7 else None,
                spec=spec, ape=ape, norm_weight=norm, rope=rope, rows=rows, pdl=rng.choice((None, False)),
            )  # fmt: skip
            if rows is not None:
                kvfold.store(rows, plan, cache, spec=spec, norm_weight=norm, rope=rope)
            if kind == "fold":
                kvfold.compress_many([(new, state, cache, spec, ape, norm, rope)], plan)
        plan.update(plan.start_pos, ends)


def bound(most: int) -> int:
    """The plan's bound, of those that `warmup` was told."""
    return next(n for n in (1, 4, 8, 200) if n >= most)


@pytest.mark.gpu
def test_nothing_compiles_after_warmup() -> None:
    cases = [(WIDE, "fp8_ds_mla"), (MAIN, "fp8_ds_mla"), (INDEXER, "indexer_mxfp4"), (NARROW, "bf16")]
    states = ("fold", "window")
    options = {"max_new_tokens": (1, 4, 8, 200), "states": states, "rows": (None, torch.float32)}
    for spec, fmt in cases:
        kvfold.warmup([spec], [fmt, None], **options)
        assert kvfold.warmup([spec], [fmt, None], **options) == 0
        before = dispatch.compilations
        for seed in range(40):
            Workload(seed, spec, fmt).call(states)
        assert dispatch.compilations == before
    warm_the_chain()
    before = dispatch.compilations
    chain = Chain(GPU)
    for steps in script(3, 16):
        chain.load(steps)
        chain.launch()
    assert dispatch.compilations == before
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_warmup_counts_what_it_compiled() -> None:
    spec = CompressorSpec(head_dim=16, ratio=2, rope_dim=8, norm_eps=3e-6)  # which no other test uses
    before = dispatch.compilations
    count = kvfold.warmup([spec], ["bf16"], max_new_tokens=(2,), pdl=False)
    assert count == dispatch.compilations - before
    assert 2 <= count <= 2 + 8  # one step aligned and not, and up to four plans likewise
    more = kvfold.warmup([spec], ["bf16"], max_new_tokens=(2,), device=torch.cuda.current_device())
    assert more == int(dispatch.supports_pdl(GPU.device)) * 2
    assert kvfold.warmup([spec], ["bf16"], max_new_tokens=(1, 2), device="cuda") >= 0
    assert kvfold.warmup([], []) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_warmup_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        kvfold.warmup([MAIN], ["fp8_ds_mla"])
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="GPU"):
        kvfold.warmup([MAIN], ["fp8_ds_mla"])


BAD = {
    "specs": {"specs": ["csa"]},
    "formats": {"formats": ["fp7"]},
    "formats of no spec": {"formats": ["indexer_mxfp4"]},
    "formats as one": {"formats": "fp8_ds_mla"},
    "dtypes": {"dtypes": (torch.float16,)},
    "dtypes as one": {"dtypes": torch.bfloat16},
    "max_new_tokens": {"max_new_tokens": (1, 0)},
    "states": {"states": ("rows",)},
    "state_dtypes": {"state_dtypes": (None,)},
    "norm_weight_dtypes": {"norm_weight_dtypes": (torch.float64,)},
    "rows": {"rows": (torch.float16,)},
    "page_sizes": {"page_sizes": (0,)},
    "workers": {"workers": 0},
    "workers: too many": {"workers": 257},
    "workers as a switch": {"workers": True},
    "many": {"many": [(MAIN, INDEXER)]},
    "many: a format": {"many": [((MAIN, "fp8_ds_mla"), (INDEXER, "fp8_ds_mla"))]},
    "many: ratios": {"many": [((MAIN, "fp8_ds_mla"), (NARROW, "bf16"))]},
}


@pytest.mark.parametrize("what", BAD)
def test_warmup_names_what_is_wrong(what: str) -> None:
    """Before it looks for a GPU."""
    arguments = {"specs": [MAIN], "formats": ["fp8_ds_mla"], **BAD[what]}
    with pytest.raises((TypeError, ValueError), match=rf"^{what.split()[0].rstrip(':')}\b"):
        kvfold.warmup(arguments.pop("specs"), arguments.pop("formats"), **arguments)


def test_the_keys_are_those_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what `warmup` would prepare holds every key that the interpreter's launches of a chain ask for."""
    prepared, asked = set(), set()
    monkeypatch.setattr(dispatch, "prepare", lambda keys, device, dependent, workers: prepared.update(keys) or 1)
    # Its module has the name of the function, which hides it.
    monkeypatch.setattr(sys.modules["kvfold.warmup"], "_gpu", lambda device, interpreted: torch.device("cuda", 0))
    monkeypatch.setattr(dispatch, "supports_pdl", lambda device: True)
    warm_the_chain()

    def launcher_of(key: tuple, device: torch.device) -> Callable[..., None]:
        asked.add(key)
        return lambda *arguments: None

    monkeypatch.setattr(launch, "launcher_of", launcher_of)
    monkeypatch.setattr(dispatch, "launcher_of", launcher_of)
    backend = BACKENDS["interpreter" if not torch.cuda.is_available() else "cuda"]
    chain = Chain(backend, pdl=False)
    chain.launch()
    if backend.device.type == "cpu":
        from kvfold.kernels.plan import update_on_gpu

        for plans in chain.plans.values():
            update_on_gpu(plans[0], plans[0].start_pos, plans[0].cu_seqlens)
    assert {key[0] for key in asked} == {"step", "pair", "window", "store", "plan"}
    assert asked <= prepared
    with pytest.raises(UnsupportedError, match="power of two"):
        kvfold.warmup([CompressorSpec(head_dim=64, ratio=3)], [None], states=("window",))
    assert kvfold.warmup([CompressorSpec(head_dim=64, ratio=3)], [None], states=("fold",)) > 0
