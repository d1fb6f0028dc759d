"""Snapshots through operators: traced calls leave and restore the bits that eager ones do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.helpers import Backend, Weights, make_tokens
from support.ops_support import INDEXER, MAIN, NARROW, ON_BOTH, Recorder, through_operators
from torch import Tensor
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

import kvfold
from kvfold import FoldState, Snapshots, StepPlan

SPECS = (MAIN, INDEXER, NARROW)  # the first two in one call, with page ends that keep 4 rows; the third keeps one of 8
PAGE, PAGES, NEW = 8, 4, 8


@pytest.fixture(autouse=True)
def forget_compiled_code() -> None:
    torch._dynamo.reset()


class Prefixes(torch.nn.Module):
    """Slots 0 and 1 leave snapshots; slot 2 starts from one of slot 0, and slot 3 is refused one, in the same graph."""

    def __init__(self, where: Backend) -> None:
        super().__init__()
        device, ints = where.device, {"dtype": torch.int32, "device": where.device}
        self.where = where
        self.states = [FoldState.allocate(spec, 4, NEW, device=device) for spec in SPECS]
        self.snapshots = [Snapshots.allocate(spec, 2 * PAGES, PAGE, device=device) for spec in SPECS]
        self.caches = [kvfold.EntryCache.allocate("fp32", 4, 16, spec, device=device) for spec in SPECS]
        made = [Weights.make(spec, max_positions=64) for spec in SPECS]
        self.weights = [{"ape": w.ape, "norm_weight": w.norm_weight, "rope": w.rope} for w in made]
        self.weights = [{name: tensor.to(device) for name, tensor in w.items()} for w in self.weights]
        self.errors = torch.zeros(1, **ints)
        self.slots = torch.tensor([0, 1], **ints)
        self.table = torch.arange(2 * PAGES, **ints).view(2, PAGES)
        self.plans = [self.plan(ratio) for ratio in (4, 16)]

    def plan(self, ratio: int) -> StepPlan:
        ints = {"dtype": torch.int32, "device": self.where.device}
        pages = {"cache_block_table": self.slots[:, None].contiguous(), "rows_per_page": 16}
        snapshots = {"snapshot_table": self.table, "snapshot_page_size": PAGE}
        ends = torch.zeros(3, **ints)
        return StepPlan.build(ratio, torch.zeros(2, **ints), ends, NEW, state_slots=self.slots, **pages, **snapshots)

    def forward(self, scores: list[Tensor], start: Tensor, ends: Tensor, hits: tuple[Tensor, Tensor, Tensor]) -> None:
        for plan in self.plans:
            plan.update(start, ends)
        small, large = self.plans
        calls = [
            (*one, spec, *weights.values(), snapshots)
            for *one, spec, weights, snapshots in zip(
                scores, self.states, self.caches, SPECS, self.weights, self.snapshots, strict=True
            )
        ]
        kvfold.compress_many(calls[:2], small, backend=self.where.name)
        kv_score, state, cache, spec, ape, norm_weight, rope, snapshots = calls[2]
        kvfold.compress(
            kv_score, large, state, cache, spec=spec, ape=ape, norm_weight=norm_weight, rope=rope, snapshots=snapshots,
            backend=self.where.name,
        )  # fmt: skip
        for state, snapshots in zip(self.states, self.snapshots, strict=True):
            kvfold.restore(state, snapshots, *hits, self.errors, backend=self.where.name)

    def play(self, step, **options: object) -> None:
        """Two steps of both sequences, of 3 and 8 and then 7 and 8 tokens."""
        ints = {"dtype": torch.int32, "device": self.where.device}
        for seed, (start, lengths, end) in enumerate((((0, 0), (3, 8), 8), ((3, 8), (7, 8), 16))):
            n = sum(lengths)
            scores = [make_tokens(spec, n, seed).to(self.where.device) for spec in SPECS]
            ends = torch.tensor([0, lengths[0], n], **ints)
            hits = [torch.tensor(x, **ints) for x in ([2, 3], [PAGES + end // PAGE - 1, 2], [end, end])]
            step(scores, torch.tensor(start, **ints), ends, tuple(hits), **options)

    def contents(self) -> list[Tensor]:
        held = [x for thing in (*self.states, *self.snapshots) for x in (thing.rows, thing.positions)]
        return [x.clone() for x in (*held, *(c.storage for c in self.caches), self.errors, *(p.errors for p in self.plans))]

    def check_equal(self, other: Prefixes) -> None:
        for i, (x, y) in enumerate(zip(self.contents(), other.contents(), strict=True)):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), f"buffer {i} differs"

    def check_done(self) -> None:
        """Something was left, restored and refused. At 16 a step of ratio 16 reads nothing, so that no snapshot is asked."""
        assert int(self.errors) == 5 and not any(int(plan.errors) for plan in self.plans)
        for state, snapshots in zip(self.states, self.snapshots, strict=True):
            assert snapshots.positions[[0, PAGES]].eq(torch.tensor([*state.history_of(8)], device=state.device)).all()
            assert {x for x in state.held()[2].tolist() if x >= 0} == set(state.history_of(16))
            assert (state.positions[3] == -1).all()
        assert all(cache.storage[:2].any() for cache in self.caches)


@ON_BOTH
def test_operators_do_what_eager_calls_do(where: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """And pass torch's own checks: that they mutate what their schemas say, snapshots among it, and nothing else."""
    ours, eager = Prefixes(where), Prefixes(where)
    eager.play(eager)
    eager.check_done()
    through_operators(monkeypatch)
    with Recorder() as recorder:
        ours.play(ours)
    ours.check_equal(eager)
    for name in ("compress", "compress_many", "restore"):
        opcheck(*recorder.calls[f"kvfold::{name}"])


@ON_BOTH
def test_a_step_and_a_hit_in_one_graph(where: Backend) -> None:
    compiled, eager, counter = Prefixes(where), Prefixes(where), CompileCounterWithBackend("aot_eager")
    eager.play(eager)
    kvfold.ops.mark_static(*compiled.snapshots)
    compiled.play(torch.compile(compiled, backend=counter, fullgraph=True))
    compiled.check_done()
    compiled.check_equal(eager)
    assert counter.frame_count <= 2


def test_schemas_say_what_is_mutated() -> None:
    def mutated(name: str) -> set[str]:
        schema = getattr(torch.ops.kvfold, name).default._schema
        return {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}

    assert {"snapshot_rows", "snapshot_positions", "state_rows", "positions"} < mutated("compress")
    assert {"snapshot_rows_0", "snapshot_rows_1", "snapshot_positions_0", "snapshot_positions_1"} < mutated("compress_many")
    assert mutated("restore") == {"state_rows", "positions", "errors"}


def test_fake_restore_does_nothing() -> None:
    made, ints = Prefixes(Backend("torch", torch.device("cpu"))), torch.zeros(1, dtype=torch.int32)
    state, snapshots = made.states[0], made.snapshots[0]
    before = made.contents()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = FoldState(MAIN, mode.from_tensor(state.rows), mode.from_tensor(state.positions), NEW)
        kvfold.restore(fake, snapshots, ints, ints, ints + 8, made.errors)
    assert all(torch.equal(x, y) for x, y in zip(before, made.contents(), strict=True))


def test_mistakes_are_named() -> None:
    """By the operator, or while it is traced, for what an operator cannot see."""
    made, zero = Prefixes(Backend("torch", torch.device("cpu"))), torch.zeros(2, dtype=torch.int32)
    scores, before = [make_tokens(spec, 0, 0) for spec in SPECS], made.contents()
    restore = torch.compile(kvfold.restore, backend="aot_eager", fullgraph=True)
    for bad, message in (
        (Snapshots.allocate(NARROW, 8, 4), "plan must have a snapshot_table with snapshot_page_size=4"),
        (Snapshots.allocate(replace(NARROW, norm_eps=1e-5), 8, PAGE), "snapshots must be for"),
        (made.states[2], "snapshots must be a Snapshots"),
    ):
        made.snapshots[2] = bad
        torch._dynamo.reset()
        with pytest.raises((TypeError, ValueError, Unsupported), match=message):
            torch.compile(made, backend="aot_eager", fullgraph=True)(scores, zero, zero.new_zeros(3), (zero, zero, zero))
        if bad.spec == NARROW and isinstance(bad, Snapshots):  # `restore` has no plan whose pages could be others
            bad, message = made.snapshots[0], "snapshots must be for"
        with pytest.raises((TypeError, ValueError, Unsupported), match=message):
            restore(made.states[2], bad, zero, zero, zero, made.errors)
    with pytest.raises(ValueError, match=r"^pages must have shape"):
        restore(made.states[0], made.snapshots[0], zero, zero[:1], zero, made.errors)
    assert all(torch.equal(x, y) for x, y in zip(before[:10], made.contents()[:10], strict=True))
