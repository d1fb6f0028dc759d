"""CUDA graphs and `warmup`: what was recorded can be replayed for any other step, and nothing compiles after the warm-up."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from conftest import BACKENDS
from support.chain_support import AHEAD, BATCH, INDEXER, LAYERS, MAIN, MOST, NARROW, PAGE, WIDE, Chain, same, script

import kvfold
from kvfold import CompressorSpec, StepPlan
from kvfold.backend_triton import launch
from kvfold.backend_triton import launcher as dispatch
from kvfold.backend_triton import prepare as preparing
from kvfold.backend_triton.keys import PairKey, PlanKey, StepKey, StoreKey, WindowKey
from kvfold.backend_triton.launch import update_on_gpu
from kvfold.backend_triton.table import UnsupportedError

GPU = BACKENDS["cuda"]


def warm_the_chain() -> int:
    """For all that `Chain` calls, and for little else, as whoever warms it compiles all of it."""
    count = 0
    for (_, kind), layers in LAYERS.items():
        options = {"max_new_tokens": (MOST,), "states": (kind,), "page_sizes": (PAGE,)}
        for how, some in layers:
            if how == "many":
                count += kvfold.warmup([], [], max_new_tokens=(MOST,), many=[tuple(some)])
                continue
            for spec, fmt in some:
                if how == "compress":
                    count += kvfold.warmup([spec], [fmt], **options)
                else:
                    count += kvfold.warmup([spec], [None], rows=(torch.float32,), **options)
                    count += kvfold.warmup([spec], [fmt], rows=(torch.float32,), states=())  # `store` alone
    return count


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


class Warmed(NamedTuple):
    """What a run of `Workload` is warmed for, and draws from: few kernels each, and together all that calls differ in."""

    spec: CompressorSpec
    kind: str
    formats: tuple[str | None, ...]
    rows: tuple[torch.dtype | None, ...]
    pages: tuple[int, ...] | None = None  # of a WindowState
    pdl: bool | None = None
    bounds: tuple[int, ...] = (1, 4, 8, 200)

    def warm(self) -> int:
        return kvfold.warmup(
            [self.spec], self.formats,
            max_new_tokens=self.bounds, states=(self.kind,), rows=self.rows, page_sizes=self.pages, pdl=self.pdl,
        )  # fmt: skip


FP32, SEEDS = torch.float32, 300
WARMED = {
    "wide fold": Warmed(WIDE, "fold", ("fp8_ds_mla",), (None,)),
    "wide window": Warmed(WIDE, "window", (None,), (FP32,), (128, 256, 5, 48)),
    "main fold": Warmed(MAIN, "fold", ("fp8_ds_mla",), (None, FP32)),
    "main window": Warmed(MAIN, "window", ("fp8_ds_mla",), (None,), (4, 8, 5, 48)),
    "indexer fold": Warmed(INDEXER, "fold", ("indexer_mxfp4", None), (None, FP32), pdl=False),
    "indexer window": Warmed(INDEXER, "window", ("indexer_mxfp4", None), (FP32,), (4, 8, 48)),
    "narrow fold": Warmed(NARROW, "fold", ("bf16", None), (None, FP32), pdl=False, bounds=(1, 200)),
    "narrow window": Warmed(NARROW, "window", ("bf16", None), (None,), (128, 256, 5, 48), pdl=False),
}


class Workload:
    """Random calls of all that was warmed: batch sizes, lengths, strides and alignments of all tensors, plan sizes, pages."""

    def __init__(self, seed: int, warmed: Warmed, device: torch.device) -> None:
        self.rng, self.warmed, self.device = random.Random(seed), warmed, device
        self.aligned = self.rng.random() < 0.5  # drawn one by one, all of them seldom are

    def shifted(self, *shape: int, dtype: torch.dtype, fill: int = 0) -> torch.Tensor:
        """A contiguous tensor that may begin at any element of an allocation."""
        by, n = self.rng.choice((0, 8) if self.aligned else (0, 0, 1, 3, 4, 8)), torch.Size(shape).numel()
        return torch.full((n + by,), fill, dtype=dtype, device=self.device)[by:].view(shape)

    def tokens(self, n: int) -> torch.Tensor:
        """`kv_score` as columns of something wider."""
        left = self.rng.choice((0, 16) if self.aligned else (0, 8, 16, 24, 1))
        right = self.rng.choice((0, 16) if self.aligned else (0, 8, 16, 5))
        width = 2 * self.warmed.spec.channels
        wide = torch.empty(n, left + width + right, dtype=torch.bfloat16, device=self.device)
        return wide[:, left : left + width]

    def plan(self, lengths: list[int], bound: int, where: dict[str, object], slots: str) -> StepPlan:
        """`slots`: how it knows where entries go."""
        ratio, batch = self.warmed.spec.ratio, len(lengths)
        ends = self.shifted(batch + 1, dtype=torch.int32)
        ends.copy_(torch.tensor([0, *lengths]).cumsum(0))
        if slots == "slots":
            where["entry_slots"] = self.shifted(sum(lengths) // ratio + 1, dtype=torch.int64, fill=-1)
        elif slots == "table":
            where["cache_block_table"] = self.shifted(batch, -(-bound // ratio), dtype=torch.int32)
            where["rows_per_page"] = 64  # as the caches below
        return StepPlan.build(ratio, self.shifted(batch, dtype=torch.int32), ends, bound, **where)

    def call(self) -> None:
        rng, (spec, kind, formats, rows_of, pages, _, bounds) = self.rng, self.warmed
        # Up to as many windows as tell all kernels of the table apart, which long steps have.
        batch, bound = rng.choice((1, 2, 3, 17, 40, 60, 90, 300)), rng.choice((*bounds, bounds[-1]))
        lengths = [rng.randint(0, bound) for _ in range(batch)]
        if kind == "fold":
            slots = self.shifted(batch, dtype=torch.int32)
            slots.copy_(torch.randperm(batch))
            where: dict[str, object] = {"state_slots": slots}
            state = kvfold.FoldState.allocate(spec, batch, rng.choice((1, 4, 9)), device=self.device)
        else:
            page = rng.choice(pages)
            tables = tuple(self.shifted(batch, -(-bound // page) + i, dtype=torch.int32) for i in (0, 1))
            where = {"block_tables": tables, "page_size": page}
            state = kvfold.WindowState.allocate(spec, 3, page, device=self.device)
        # One page for all that has one, so what is written does not matter here; only what is compiled does.
        cached, stored = rng.choice(formats), formats[0]
        plan = self.plan(lengths, bound, where, rng.choice(("slots", "table") if cached else ("slots", "table", "none")))
        cache, target = (
            kvfold.EntryCache.allocate(fmt, 4, 64, spec, device=self.device) if fmt is not None else None
            for fmt in (cached, stored)
        )
        dtype = rng.choice(rows_of)
        rows = None if dtype is None else self.shifted(plan.entry_capacity, spec.head_dim, dtype=dtype)
        ape = self.shifted(spec.ratio, spec.channels, dtype=FP32)
        norm, rope = self.shifted(spec.head_dim, dtype=FP32), self.shifted(512, spec.rope_dim, dtype=FP32)
        for _ in range(2):  # the second as dependents, where there are such
            pdl = rng.choice((self.warmed.pdl, False))
            new = self.tokens(sum(lengths))
            kvfold.compress(
                new, plan, state, cache,
                spec=spec, ape=ape, norm_weight=norm, rope=rope, rows=rows, backend="triton", pdl=pdl,
            )  # fmt: skip
            if rows is not None and target is not None and plan.entry_slots is not None:
                kvfold.store(rows, plan, target, spec=spec, norm_weight=norm, rope=rope, backend="triton", pdl=pdl)
            if kind == "fold" and None in rows_of:
                kvfold.compress_many([(new, state, cache, spec, ape, norm, rope)], plan, backend="triton", pdl=pdl)
        plan.update(plan.start_pos, plan.cu_seqlens)


@pytest.mark.gpu
@pytest.mark.parametrize("what", WARMED)
def test_nothing_compiles_after_warmup(what: str) -> None:
    warmed = WARMED[what]
    warmed.warm()
    assert warmed.warm() == 0
    before = dispatch.compilations
    for seed in range(SEEDS):
        Workload(seed, warmed, GPU.device).call()
    assert dispatch.compilations == before
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_nothing_compiles_for_a_chain() -> None:
    warm_the_chain()
    before, chain = dispatch.compilations, Chain(GPU)
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


Calls = set[tuple[tuple, bool, bool]]  # keys, each with whether it is launched as a dependent, and with aligned arguments


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Without a GPU: what `warmup` would compile."""
    found: Calls = set()

    def prepare(keys: Iterable[tuple], device: torch.device, dependent: Callable[[tuple], bool], *more: object) -> int:
        before = len(found)
        found.update((key, *how) for key in keys for how in product((False, True)[: 1 + dependent(key)], (True, False)))
        return len(found) - before

    monkeypatch.setattr(preparing, "prepare", prepare)
    # Its module has the name of the function, which hides it.
    monkeypatch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda device, interpreted: torch.device("cuda", 0))
    for module in (dispatch, launch):
        monkeypatch.setattr(module, "supports_pdl", lambda device: True)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Without a GPU: what calls would launch; they launch nothing. Plans are updated by a kernel, as on a GPU."""
    found: Calls = set()

    def launcher_of(key: tuple, device: torch.device) -> Callable[..., None]:
        return lambda grid, values, bits, pdl=False: found.add((key, pdl, bits & 15 == 0))

    def update(plan: StepPlan, *lengths: object) -> None:
        plan.fresh = True
        update_on_gpu(plan, *lengths)

    for module in (dispatch, launch):
        monkeypatch.setattr(module, "launcher_of", launcher_of)
    monkeypatch.setattr("kvfold.calls.run.update_torch", update)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)  # so that addresses count
    return found


def test_the_keys_are_those_of_launches(prepared: Calls, asked: Calls) -> None:
    """What `warmup` would prepare holds all that a chain launches."""
    warm_the_chain()
    backend = BACKENDS["cuda" if torch.cuda.is_available() else "interpreter"]
    Chain(backend).launch()
    assert {type(key) for key, *_ in asked} == {StepKey, PairKey, WindowKey, StoreKey, PlanKey}
    assert asked <= prepared
    with pytest.raises(UnsupportedError, match="power of two"):
        kvfold.warmup([CompressorSpec(head_dim=64, ratio=3)], [None], states=("window",))
    assert kvfold.warmup([CompressorSpec(head_dim=64, ratio=3)], [None], states=("fold",)) > 0


@pytest.mark.parametrize("what", WARMED)
def test_workloads_launch_what_was_warmed(what: str, prepared: Calls, asked: Calls) -> None:
    """And all of it, so that nothing is compiled in vain: but for plans, as this ratio's are not as long as they may be."""
    assert 0 < WARMED[what].warm() <= 60  # which a test on a GPU compiles
    for seed in range(SEEDS):
        Workload(seed, WARMED[what], torch.device("cuda" if torch.cuda.is_available() else "cpu")).call()
    assert asked <= prepared
    assert {type(key) for key, *_ in prepared - asked} <= {PlanKey}
