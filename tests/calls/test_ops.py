"""Operators and torch.compile: the schemas are true, and traced code leaves the same bits behind as eager calls."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import BACKENDS
from support.chain_support import Chain, same, script
from support.helpers import Backend
from support.ops_support import MAIN, MOST, NARROW, ON_BOTH, Layer, Recorder, lengths_of, through_operators
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import kvfold
from kvfold import EntryCache, FoldState, StepPlan
from kvfold.backend_triton import launch

CPU = BACKENDS["torch"]
OPERATORS = ("compress", "compress_window", "compress_many", "store", "update")  # of `Chain`; `restore`: test_ops_snapshots
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
INDUCTOR = [
    pytest.param(CPU, marks=NO_COMPILER, id="cpu"),
    pytest.param(BACKENDS["cuda"], marks=pytest.mark.gpu, id="cuda"),
]


@pytest.fixture(autouse=True)
def forget_compiled_code() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@ON_BOTH
def test_the_same_as_eager_calls(where: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run for real, the operators write what eager calls write; and each passes torch's own checks of an operator.

    Those are: it mutates what its schema says and nothing else, its fake call and autograd registration are in order, and
    a traced graph with sizes as variables gives what the operator gives.
    """
    chain, rounds = Chain(where), script(2, 21)
    through_operators(monkeypatch)
    with Recorder() as recorder:
        for steps in rounds:
            chain.load(steps)
            chain.launch()
    chain.check_errors()
    monkeypatch.undo()
    eager = Chain(where)
    for steps in rounds:
        eager.load(steps)
        eager.launch()
    same(chain.contents(), eager.contents())
    assert set(recorder.calls) == {f"kvfold::{name}" for name in OPERATORS}
    for operator, arguments in recorder.calls.values():
        opcheck(operator, arguments)


@ON_BOTH
def test_a_whole_step_in_one_graph(where: Backend) -> None:
    """Plan updates and every kind of call, 64 operators in a graph: compiled once, for any contents."""
    chain, eager, counter = Chain(where), Chain(where), CompileCounterWithBackend("aot_eager")
    step = torch.compile(chain.launch, backend=counter, fullgraph=True)
    for steps in script(3, 22):
        chain.load(steps)
        eager.load(steps)
        step()
        eager.launch()
    chain.check_errors()
    same(chain.contents(), eager.contents())
    assert counter.frame_count == 1


@pytest.mark.parametrize("where", INDUCTOR)
def test_a_layer_with_inductor(where: Backend) -> None:
    """From hidden states to caches; the eager layer takes the projections of the compiled one, so bits can be compared."""
    compiled, eager = Layer(where), Layer(where)
    step = torch.compile(compiled, fullgraph=True)
    start = [0, 0, 0]
    for seed, lengths in enumerate(([3, 4, 1], [2, 1, 4], [4, 4, 4])):
        new = lengths_of(where, start, lengths)
        scores = step(compiled.hidden(sum(lengths), seed), *compiled.plans(3), *new)
        eager.compress(scores, *eager.plans(3), *new)
        start = [at + n for at, n in zip(start, lengths, strict=True)]
    compiled.check_equal(eager)


def test_sizes_may_change() -> None:
    """Batch sizes and numbers of tokens become variables at the second compilation, and there is no third.

    Each size has plans of its own, with capacities of their own.
    """
    layer, eager, counter = Layer(CPU, slots=9), Layer(CPU, slots=9), CompileCounterWithBackend("aot_eager")
    step = torch.compile(layer, backend=counter, fullgraph=True)
    for batch in (3, 5, 2, 9, 4, 7, 6):
        lengths = [1 + (batch + i) % MOST for i in range(batch)]
        new, hidden = lengths_of(CPU, [0] * batch, lengths), layer.hidden(sum(lengths), seed=batch)
        eager.compress(step(hidden, *layer.plans(batch), *new), *eager.plans(batch), *new)
    layer.check_equal(eager)
    assert counter.frame_count <= 2


def test_pools_that_are_one_tensor() -> None:
    """Value and score rows side by side, both of them mutated."""

    def make() -> tuple[kvfold.WindowState, torch.Tensor]:
        pool = torch.zeros(2, 8, 2 * MAIN.channels)
        return kvfold.WindowState(pool[..., : MAIN.channels], pool[..., MAIN.channels :]), pool

    (state, pool), (other, other_pool) = make(), make()
    start, ends = lengths_of(CPU, [0, 0], [6, 4])
    table = torch.tensor([[1], [0]], dtype=torch.int32)
    plans = [StepPlan.build(4, start, ends, 6, block_tables=(table, table), page_size=8) for _ in range(2)]
    scores, weights = torch.randn(10, 2 * MAIN.channels), Layer(CPU).weights[MAIN]
    rows = [torch.zeros(plan.entry_capacity, MAIN.head_dim) for plan in plans]

    def call(state: kvfold.WindowState, plan: StepPlan, rows: torch.Tensor) -> None:
        kvfold.compress(scores, plan, state, None, spec=MAIN, **weights, rows=rows)

    torch.compile(call, backend="aot_eager", fullgraph=True)(state, plans[0], rows[0])
    call(other, plans[1], rows[1])
    assert torch.equal(pool, other_pool) and pool.any()
    assert torch.equal(rows[0], rows[1]) and rows[0].any()


def test_another_page_size_may_be_another_kernel(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator remembers which kernel its last call launched: one for pages of whole windows is none for any others."""
    start, ends = lengths_of(backend, [0, 0], [12, 9])
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=backend.device)
    scores = torch.randn(21, 2 * MAIN.channels, generator=torch.Generator().manual_seed(0)).to(backend.device)
    weights = Layer(backend).weights[MAIN]

    def call(page_size: int) -> list[torch.Tensor]:
        kv, score = torch.zeros(2, 5, page_size, MAIN.channels, device=backend.device)
        plan = StepPlan.build(4, start, ends, 12, block_tables=(table, table), page_size=page_size)
        rows = torch.zeros(plan.entry_capacity, MAIN.head_dim, device=backend.device)
        state = kvfold.WindowState(kv, score)
        kvfold.compress(scores, plan, state, None, spec=MAIN, **weights, rows=rows, backend=backend.name)
        assert int(plan.errors) == 0 and rows.any() and kv.any()
        return [kv, score, rows]

    eager = [call(page_size) for page_size in (8, 6)]
    through_operators(monkeypatch)
    for page_size, expected in zip((8, 6), eager, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(call(page_size), expected, strict=True)), page_size


def test_results_are_seen_by_the_graph() -> None:
    """What follows a call in the same graph reads what the call wrote, and what precedes it is read by the call."""
    layer = Layer(CPU)
    cache, plan = layer.caches[MAIN], layer.plans(1)[0]
    start, ends = lengths_of(CPU, [0], [4])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def call(scores: torch.Tensor) -> torch.Tensor:
        plan.update(start, ends)
        layer.states[MAIN].positions.fill_(-1)
        kvfold.compress(scores * 2, plan, layer.states[MAIN], cache, spec=MAIN, **layer.weights[MAIN])
        return cache.storage.clone()

    seen = call(torch.ones(4, 2 * MAIN.channels))
    assert seen.any() and torch.equal(seen, cache.storage)
    assert layer.states[MAIN].positions[0].max() == 3


def test_fake_tensors_do_nothing() -> None:
    layer = Layer(CPU)
    plan, before = layer.plans(1)[0], layer.contents()
    with FakeTensorMode(allow_non_fake_inputs=True):
        scores = torch.zeros(4, 2 * MAIN.channels)
        kvfold.compress(scores, plan, layer.states[MAIN], layer.caches[MAIN], spec=MAIN, **layer.weights[MAIN])
    assert all(torch.equal(x, y) for x, y in zip(before, layer.contents(), strict=True))


def test_wrong_arguments_are_named() -> None:
    """By the operator when it runs, or while it is traced, for what an operator cannot see."""
    layer = Layer(CPU)
    plan, state, cache, weights = layer.plans(1)[0], layer.states[MAIN], layer.caches[MAIN], layer.weights[MAIN]
    compress = torch.compile(kvfold.compress, backend="aot_eager", fullgraph=True)
    scores = torch.zeros(4, 2 * MAIN.channels)
    before = layer.contents()
    with pytest.raises(TypeError, match=r"^kv_score must be torch\.bfloat16 or torch\.float32"):
        compress(scores.double(), plan, state, cache, spec=MAIN, **weights)
    with pytest.raises(ValueError, match=r"^ape must have shape \[4, 32\]"):
        compress(scores, plan, state, cache, spec=MAIN, **weights | {"ape": torch.zeros(3, 32)})
    traced = {
        "state must be for": {"state": FoldState.allocate(replace(MAIN, norm_eps=1e-5), 1, 1)},
        "cache must be for": {"cache": EntryCache.allocate("bf16", 1, 1, replace(MAIN, norm_eps=1e-5))},
        "cache must have a format": {
            "cache": EntryCache.allocate(replace(kvfold.storage.formats.FORMATS["bf16"], page_align=64), 1, 1, MAIN)
        },
        "state must be a FoldState": {"state": None},
    }
    for message, bad in traced.items():
        arguments = {"state": state, "cache": cache, "spec": MAIN, **weights, **bad}
        with pytest.raises(Exception, match=message):
            compress(scores, plan, **arguments)
    assert all(torch.equal(x, y) for x, y in zip(before, layer.contents(), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_the_first_call_after_an_update_is_no_dependent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager or not, and whatever the operator was given: a plan that it does not know may have been updated just now."""
    seen = []

    def use_pdl(wanted: bool | None, plan: StepPlan, device: torch.device) -> bool:
        seen.append(plan.fresh)
        plan.fresh = False
        return False

    monkeypatch.setattr(launch, "use_pdl", use_pdl)
    layer = Layer(CPU)
    plan, state, cache = layer.plans(1)[1], layer.states[NARROW], layer.caches[NARROW]
    scores = torch.zeros(1, 2 * NARROW.channels)
    through_operators(monkeypatch)

    def compress() -> None:
        kvfold.compress(scores, plan, state, cache, spec=NARROW, **layer.weights[NARROW], backend="triton")

    plan.update(*lengths_of(CPU, [0], [1]))
    compress()
    compress()
    plan.update(*lengths_of(CPU, [0], [1]))
    assert plan.fresh
    compress()
    compress()
    assert seen == [True, False, True, False]
    plan.items = plan.items.clone()
    compress()
    assert seen[-1] and int(plan.errors) == 0


def test_mark_static_marks_all_that_is_mutated() -> None:
    """Of the graph's inputs, as what follows `aot_autograd` sees them: what CUDA graphs need to know."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._guards import TracingContext

    seen = []

    def compiler(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        meta = TracingContext.get().fw_metadata
        mutated = {i for i, info in enumerate(meta.input_info) if info.mutates_data}
        seen.append((len(mutated), len(mutated - set(meta.static_input_indices))))
        return graph

    for marked in (False, True):
        torch._dynamo.reset()
        layer = Layer(CPU)
        plans = layer.plans(2)
        if marked:
            kvfold.ops.mark_static(*plans, *layer.states.values(), *layer.caches.values(), layer.rows)
        step = torch.compile(layer, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
        with torch.no_grad():
            step(layer.hidden(5, 0), *plans, *lengths_of(CPU, [0, 0], [2, 3]))
    (mutated, left), (mutated_too, none) = seen
    # What hangs on a module is known to stay; the 8 buffers of each of the two plans, which are arguments, are not.
    assert mutated == mutated_too > left == 16 and none == 0
    with pytest.raises(TypeError, match=r"^things\[\d\] must be a state"):
        kvfold.ops.mark_static(MAIN)


@pytest.mark.gpu
def test_cuda_graphs_of_compiled_code() -> None:
    """`mode="reduce-overhead"` records the calls and replays them for other steps; nothing is left out."""
    where = BACKENDS["cuda"]
    compiled, eager = Layer(where), Layer(where)
    plans, own = compiled.plans(3), eager.plans(3)
    kvfold.ops.mark_static(*plans, *compiled.states.values(), *compiled.caches.values(), compiled.rows)
    step = torch.compile(compiled, mode="reduce-overhead", fullgraph=True)
    start, hidden = [0, 0, 0], torch.zeros(3 * MOST, compiled.width, device=where.device)
    at, ends = lengths_of(where, start, start)
    with torch.no_grad():
        for seed, lengths in enumerate(([3, 4, 1], [2, 1, 4], [4, 4, 4], [1, 1, 1], [4, 3, 2])):
            for old, new in zip((at, ends), lengths_of(where, start, lengths), strict=True):
                old.copy_(new)
            hidden[: sum(lengths)] = compiled.hidden(sum(lengths), seed)
            torch.compiler.cudagraph_mark_step_begin()
            scores = [score.clone() for score in step(hidden, *plans, at, ends)]
            eager.compress(scores, *own, at, ends)
            start = [a + n for a, n in zip(start, lengths, strict=True)]
    compiled.check_equal(eager)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
