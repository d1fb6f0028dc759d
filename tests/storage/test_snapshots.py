"""Snapshots of prefix-cache pages: taken however a sequence was cut, and restored as if the slot had seen all of it."""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple

import pytest
import torch
from conftest import BACKENDS
from support.helpers import SPECS, Backend, Engine, Weights, bits, call_restore, make_tokens
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, FoldState, Snapshots

FP32, BF16 = torch.float32, torch.bfloat16


class Case(NamedTuple):
    spec: CompressorSpec
    page_size: int
    length: int
    dtype: torch.dtype = FP32
    state_dtype: torch.dtype = FP32


CASES = {
    "hca-64": Case(SPECS["hca"], 64, 200),
    "hca-96": Case(SPECS["hca"], 96, 200, BF16),
    "hca-128": Case(SPECS["hca"], 128, 135),
    "csa-4": Case(SPECS["csa"], 4, 18),
    "csa-8": Case(SPECS["csa"], 8, 27, BF16, BF16),
    "csa-64": Case(SPECS["csa"], 64, 70, BF16, FP32),
    "indexer-4": Case(SPECS["indexer"], 4, 17, BF16, BF16),
    "fold-16 pages of 5": Case(CompressorSpec(head_dim=64, ratio=16), 5, 28),
    "fold-16 pages of 1": Case(CompressorSpec(head_dim=64, ratio=16, has_ape=False), 1, 18),
    "fold-12 pages of 18": Case(CompressorSpec(head_dim=64, ratio=12), 18, 80),
    "rows-3 overlap": Case(CompressorSpec(head_dim=64, ratio=3, overlap=True), 6, 20),
    "rows-1 overlap": Case(CompressorSpec(head_dim=64, ratio=1, overlap=True), 2, 8),
    "rows-9 overlap": Case(CompressorSpec(head_dim=64, ratio=9, overlap=True), 9, 29),
    "rows-2": Case(CompressorSpec(head_dim=64, ratio=2), 4, 13),
}
WAYS = ("once", "chunks", "decode", "drafts")


class Prefix:
    """A sequence and its one uninterrupted run, whose ring holds every position."""

    def __init__(self, backend: Backend, case: Case, max_new_tokens: int = 4) -> None:
        self.backend, self.case, self.spec = backend, case, case.spec
        self.weights, self.max_new_tokens = Weights.make(case.spec), max_new_tokens
        self.tokens = make_tokens(case.spec, case.length, seed=31, dtype=case.dtype)
        self.ends = list(range(case.page_size, case.length, case.page_size))
        whole = self.engine(1, case.length)
        whole.step([(0, 0, self.tokens)])
        self.whole, self.rows = whole, whole.held(0, case.length)

    def engine(self, num_slots: int, max_new_tokens: int | None = None) -> Engine:
        entries = self.case.length // self.spec.ratio + 4  # drafts reach behind the end
        return Engine(
            self.spec, self.backend, num_slots=num_slots, max_new_tokens=max_new_tokens or self.max_new_tokens,
            max_entries=entries, state_dtype=self.case.state_dtype, weights=self.weights,
        )  # fmt: skip

    def needed(self, end: int) -> list:
        """What `Engine.held` calls the rows of the snapshot of the page that ends at `end`."""
        return sorted(self.whole.needed(end))

    def snapshot(self, snapshots: Snapshots, page: int) -> dict[int, Tensor]:
        """The bits of the row of each position that a snapshot holds, in the shape of a state row."""
        rows = bits(snapshots.rows[page]).cpu().view(-1, *self.whole.state.rows.shape[2:])
        kept = {x: rows[i] for i, x in enumerate(snapshots.positions[page].tolist()) if x != -1}
        return kept if self.whole.state.kind == "fold" else {("lo", x): row for x, row in kept.items()}

    def check(self, snapshots: Snapshots, page: int, end: int) -> None:
        """A snapshot has the bits of the uninterrupted run."""
        found = self.snapshot(snapshots, page)
        assert sorted(found) == self.needed(end), f"page {page}, end {end}"
        for x, row in found.items():
            assert torch.equal(row, self.rows[x]), f"page {page}, end {end}: row of position {x}"


def steps_of(way: str, prefix: Prefix, rng: random.Random) -> list[tuple[int, Tensor]]:
    """(start, new tokens) of each step; what is not near the end of a page goes in chunks, as a token takes a while."""
    tokens, case = prefix.tokens, prefix.case
    if way == "once":
        return [(0, tokens)]
    wrong = make_tokens(case.spec, case.length + 8, seed=32, dtype=case.dtype)
    found, at = [], 0
    while at < case.length:
        near = any(-6 <= at - end < 2 for end in prefix.ends)
        ahead = min([end - 6 for end in prefix.ends if end - 6 > at], default=case.length)
        if way == "chunks":
            n = rng.choice((1, 2, 3, case.page_size, rng.randint(1, 2 * case.spec.ratio + 1)))
        else:
            n = 1 if near else max(ahead - at, 1)
        n = min(n, case.length - at)
        if way == "drafts" and near:
            n, drafts = rng.randint(0, min(2, case.length - at)), rng.randint(1, 2)
            found.append((at, torch.cat([tokens[at : at + n], wrong[at + n : at + n + drafts]])))
        else:
            found.append((at, tokens[at : at + n]))
        at += n
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_hit_at_every_page_end(backend: Backend, name: str) -> None:
    case, rng = CASES[name], random.Random(1)
    prefix = Prefix(backend, case)
    # The interpreter is slow: there each way of cutting is for a quarter of the cases.
    ways = WAYS[list(CASES).index(name) % len(WAYS) :][:1] if backend.slow else WAYS
    engine, pages = prefix.engine(len(ways)), len(prefix.ends) + 1  # drafts may reach one page further
    engine.make_snapshots(len(ways) * pages + 1, case.page_size)
    order = rng.sample(range(1, len(ways) * pages + 1), len(ways) * pages)  # nobody has snapshot 0
    tables = [order[i * pages : (i + 1) * pages] for i in range(len(ways))]
    for i, way in enumerate(ways):
        reached = 0
        for start, new in steps_of(way, prefix, rng):
            # Absent sequences have table rows that nobody looks at, and padding stands behind the tokens.
            batch = [(-1, case.page_size - 1, prefix.tokens[:1]), (i, start, new), (i - 1, case.page_size, new[:0])]
            engine.step(batch, padding=2, snapshot_table=[[-7] * pages, tables[i], [-7] * pages])
            reached = max(reached, start + len(new))
            kept = engine.snapshots.positions[tables[i]].flatten().tolist()
            assert max(kept, default=-1) < reached, "a row of a position that no step had"
        for end, page in zip(prefix.ends, tables[i], strict=False):
            prefix.check(engine.snapshots, page, end)
    assert not prefix.snapshot(engine.snapshots, 0) and engine.snapshots.rows[0].isnan().all()
    resume(prefix, engine.snapshots, tables[0])


def resume(prefix: Prefix, snapshots: Snapshots, pages: list[int]) -> None:
    """A slot for each page end, full of a former owner's NaN and tags; restored, they go on like the uninterrupted run."""
    case, ends = prefix.case, prefix.ends
    engine = prefix.engine(len(ends) + 2)
    slots = random.Random(2).sample(range(len(ends) + 2), len(ends) + 1)
    state = engine.state
    for slot, end in zip(slots, ends, strict=False):
        # What a slot holds of the same positions, at home and elsewhere, must not be taken for the new owner's.
        state.positions[slot] = end - 1
    before = engine.snapshot()
    ids = [page if len(prefix.needed(end)) else -1 for page, end in zip(pages, ends, strict=False)]
    call_restore(engine, snapshots, [*slots, -1], [*ids, -1, 0], [*ends, 0, 3])  # the last two have nothing to do
    engine.check_untouched(before, slots[:-1], [])
    for slot, end in zip(slots, ends, strict=False):
        want = [-1] * state.positions.shape[1]
        if prefix.needed(end):
            home = (end - 1) % state.ring if state.kind == "fold" else (end - 1) // case.spec.ratio % state.places[0]
            want[home] = end - 1
        assert engine.tags(slot) == want
    ratio, at = case.spec.ratio, dict(zip(slots, ends, strict=False))
    far = max(ratio + 2, 2 * ratio if ratio < 16 else 0)
    for most in (1, ratio // 2 + 1, far):
        batch = [(slot, start, prefix.tokens[start : start + most]) for slot, start in at.items() if start < case.length]
        engine.step(batch)
        for slot, start, new in batch:
            at[slot] = start + len(new)
            held = engine.held(slot, at[slot])
            assert engine.needed(at[slot]) <= set(held)
            for x, row in held.items():
                assert torch.equal(row, prefix.rows[x]), f"slot {slot} at {at[slot]}: row of position {x}"
    for slot, end in zip(slots, ends, strict=False):
        made = slice(end // ratio, at[slot] // ratio)
        ours, theirs = (one.records(i, made.stop)[made] for one, i in ((engine, slot), (prefix.whole, 0)))
        assert torch.equal(ours, theirs), f"entries behind {end}"


SMALL = {name: CASES[name] for name in ("indexer-4", "fold-16 pages of 5")}


def contents(engine: Engine) -> list[Tensor]:
    """Copies of all that calls write."""
    assert engine.snapshots is not None
    return [*engine.snapshot(), bits(engine.snapshots.rows).clone(), engine.snapshots.positions.clone()]


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SMALL, "hca-64", "csa-8"])
def test_in_a_graph(name: str) -> None:
    """Replayed with other slots, pages and starts, good and bad, a recorded `restore` does what eager calls do."""
    case, where = CASES[name], BACKENDS["cuda"]
    prefix, size = Prefix(where, case), case.page_size
    recorded, eager = prefix.engine(4), prefix.engine(4)
    for engine in (recorded, eager):
        engine.make_snapshots(4, size)
        engine.step([(0, 0, prefix.tokens)], snapshot_table=[[2, 1, *[-1] * len(prefix.ends)]])
    slots, pages, ends, errors = (torch.zeros(n, dtype=torch.int32, device=where.device) for n in (3, 3, 3, 1))
    rounds = [
        ([1, 2, 3], [2, -1, 1], [size, 0, 2 * size]), ([3, -1, 1], [2, 9, 2], [size, size, size]),
        ([2, 4, 1], [1, 2, 3], [2 * size, size, size]), ([-1, -1, -1], [0, 1, 2], [0, 0, 0]),
        ([1, 3, 2], [2, 2, 0], [2 * size, size + 1, size]),
    ]  # fmt: skip
    graph, counts = torch.cuda.CUDAGraph(), []
    slots.fill_(-1)
    call_restore(recorded, recorded.snapshots, [-1], [0], [0])  # compiled before
    with torch.cuda.graph(graph):
        kvfold.restore(recorded.state, recorded.snapshots, slots, pages, ends, errors)
    for one in rounds:
        for tensor, values in zip((slots, pages, ends), one, strict=True):
            tensor.copy_(torch.tensor(values))
        graph.replay()
        counts.append(call_restore(eager, eager.snapshots, *one))
        assert int(errors) == sum(counts)
        same(contents(recorded), contents(eager))
    assert len(prefix.ends) > 1 and sum(counts) > 2


@pytest.mark.parametrize("name", SMALL)
def test_pages_that_leave_none(backend: Backend, name: str) -> None:
    """-1 and what is beyond the table leave no snapshot; state and entries are those of a run that knows of none."""
    case = SMALL[name]
    prefix = Prefix(backend, case)
    engine, plain = prefix.engine(2), prefix.engine(2)
    engine.make_snapshots(4, case.page_size)
    cut = case.page_size + 2
    for start, stop in ((0, cut), (cut, case.length)):
        batch = [(1, start, prefix.tokens[start:stop]), (0, start, prefix.tokens[start:stop])]
        engine.step(batch, snapshot_table=[[-1, 2], [3, -1]])
        plain.step(batch)
    same(list(engine.snapshot()), list(plain.snapshot()))
    for page, end in ((2, 2 * case.page_size), (3, case.page_size)):
        prefix.check(engine.snapshots, page, end)
    assert not prefix.snapshot(engine.snapshots, 0) and not prefix.snapshot(engine.snapshots, 1)
    assert engine.snapshots.rows[:2].isnan().all()
    engine.step([(0, 0, prefix.tokens)], snapshot_table=[[]])  # a table without columns
    same(list(engine.snapshot())[2:], list(plain.snapshot())[2:])


@pytest.mark.parametrize("name", SMALL)
def test_a_bad_id_is_counted_at_the_end_of_its_page(backend: Backend, name: str) -> None:
    case = SMALL[name]
    prefix, size = Prefix(backend, case), case.page_size
    engine, plain = prefix.engine(2), prefix.engine(2)
    engine.make_snapshots(2, size)
    before = contents(engine)[3:]
    for start, stop, wrong in ((0, 2 * size - 1, 2), (2 * size - 1, 2 * size + 1, 2), (2 * size + 1, 3 * size - 1, 0)):
        batch = [(slot, start, prefix.tokens[start:stop]) for slot in (0, 1)]
        assert engine.step(batch, strict=False, snapshot_table=[[-2, 2, 7], [2**31 - 1, -(2**31), -9]]).errors == wrong
        plain.step(batch)
    same(contents(engine)[3:], before)
    same(list(engine.snapshot()), list(plain.snapshot()))
    # What a refused sequence would have left is neither written nor counted.
    step = engine.step([(0, 3 * size + 7, prefix.tokens[: 2 * size])], strict=False, snapshot_table=[[-2] * 3 + [1] * 9])
    assert step.errors == 1
    same(contents(engine)[3:], before)


def test_a_bad_id_where_nothing_is_kept(backend: Backend) -> None:
    """Pages that end with a window and no overlap have no snapshot, and ids that nobody looks at."""
    for case in (Case(CompressorSpec(head_dim=64, ratio=16), 16, 40), CASES["rows-2"]):
        engine = Prefix(backend, case).engine(1)
        engine.make_snapshots(1, case.page_size)
        assert engine.snapshots.rows_per_page == engine.snapshots.bytes_per_page == 0
        engine.step([(0, 0, make_tokens(case.spec, case.length, seed=1))], snapshot_table=[[-5, 99, 3]])
        assert call_restore(engine, engine.snapshots, [0], [-77], [case.page_size]) == 0
        assert set(engine.tags(0)) == {-1}


@pytest.mark.parametrize("name", SMALL)
def test_restore_refuses_what_cannot_be(backend: Backend, name: str) -> None:
    """A refused slot forgets what it held and nothing else changes; one that cannot be changes nothing."""
    case = SMALL[name]
    prefix, size = Prefix(backend, case), case.page_size
    engine = prefix.engine(4)
    engine.make_snapshots(3, size)
    engine.step([(0, 0, prefix.tokens)], snapshot_table=[[2, 1]])
    engine.step([(1, 0, prefix.tokens[:3])], snapshot_table=[[-1]])
    before = contents(engine)
    held, gone = engine.state.positions[1].clone(), [x.clone() for x in before]
    gone[1][1] = -1
    for slot in (4, -2, 2**31 - 1, -(2**31)):
        assert call_restore(engine, engine.snapshots, [slot], [2], [size]) == 1, slot
        same(contents(engine), before)
    wrong = [
        (-1, size), (3, size), (-(2**31), size), (2**31 - 1, size),  # pages
        (2, size - 1), (2, size + 1), (2, -size), (2, -(2**31)), (2, 2**31 - size - 2**31 % size),  # starts
        (2, 2 * size), (1, size), (0, size),  # snapshots of another page, and of none
    ]  # fmt: skip
    for page, start in wrong:
        engine.state.positions[1] = held
        assert call_restore(engine, engine.snapshots, [1], [page], [start]) == 1, (page, start)
        same(contents(engine), gone)
    engine.state.positions[1] = held
    nothing = [(-1, 99, 7), (3, -5, 0), (-1, 2, size), (17, 2, 0), (1, 99, 0)]
    assert call_restore(engine, engine.snapshots, *map(list, zip(*nothing, strict=True))) == 0
    same(contents(engine), before)
    if engine.snapshots.rows_per_page > 1:  # one row of a snapshot is of another page: no program copies its own
        engine.snapshots.positions[1, -1] -= size
        assert call_restore(engine, engine.snapshots, [1], [1], [2 * size]) == 1
        engine.snapshots.positions[1, -1] += size
        same(contents(engine), gone)
    # Good ones beside bad ones are restored.
    batch = [(4, 2, size), (3, 1, 2 * size), (1, 1, size), (2, 2, size), (-1, 0, 3)]
    assert call_restore(engine, engine.snapshots, *map(list, zip(*batch, strict=True))) == 2
    for slot, end in ((3, 2 * size), (2, size)):
        assert set(engine.held(slot, end)) == set(prefix.needed(end))
        for x, row in engine.held(slot, end).items():
            assert torch.equal(row, prefix.rows[x])
    same([x[:2] for x in engine.snapshot()[:2]], [x[:2] for x in gone[:2]])
    assert call_restore(engine, engine.snapshots, [], [], []) == 0


@pytest.mark.parametrize("name", SMALL)
def test_a_step_behind_a_refused_restore_is_refused(backend: Backend, name: str) -> None:
    """Also where the former owner had come to the same position, so that its rows would do."""
    case = SMALL[name]
    prefix, size = Prefix(backend, case), case.page_size
    engine = prefix.engine(2)
    engine.make_snapshots(2, size)
    for slot in (0, 1):
        engine.step([(slot, 0, prefix.tokens[:size])], snapshot_table=[[-1, slot]])  # neither page has a snapshot
    assert engine.needed(size) <= set(engine.held(0, size))
    assert call_restore(engine, engine.snapshots, [0], [0], [size]) == 1
    batch = [(slot, size, prefix.tokens[size : size + case.spec.ratio]) for slot in (0, 1)]
    before = engine.records(0, 3)
    step = engine.step(batch, strict=False, snapshot_table=[[-1], [-1]])
    assert step.errors == 1 and set(engine.tags(0)) == {-1} and torch.equal(engine.records(0, 3), before)
    assert size + case.spec.ratio - 1 in engine.state.held()[1] and engine.records(1, 2).any()


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_two_compressors_in_one_launch(backend: Backend, which: tuple[bool, bool]) -> None:
    """`compress_many` leaves the snapshots that one call for each leaves."""
    specs = (CompressorSpec(head_dim=128, ratio=4, overlap=True), SPECS["indexer"])
    n, device = 23, backend.device
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    ends, slots = torch.tensor([0, n], dtype=torch.int32, device=device), torch.arange(n // 4, device=device)
    table = torch.tensor([[2, -1, 0, 5]], dtype=torch.int32, device=device)
    plan = kvfold.StepPlan.build(
        4, zero, ends, n, state_slots=zero, entry_slots=slots, snapshot_table=table, snapshot_page_size=4
    )
    tokens = [make_tokens(spec, n, seed=i).to(device) for i, spec in enumerate(specs)]
    pairs = []
    for together in (True, False):
        engines = [Engine(spec, backend, num_slots=1, max_new_tokens=2) for spec in specs]
        for engine in engines:
            engine.make_snapshots(3, 4)
        calls = [
            (rows, e.state, e.cache, e.spec, e.ape, e.norm_weight, e.rope, *([e.snapshots] if wanted else []))
            for rows, e, wanted in zip(tokens, engines, which, strict=True)
        ]
        plan.errors.zero_()
        for one in [calls] if together else [[call] for call in calls]:
            kvfold.compress_many(one, plan, backend=backend.name)
        assert int(plan.errors) == sum(which)
        pairs.append(engines)
    for one, other, wanted in zip(*pairs, which, strict=True):
        one.check_canaries()
        same(contents(one), contents(other))
        assert sorted(set(one.snapshots.positions.flatten().tolist())) == ([-1, *range(4), *range(8, 12)] if wanted else [-1])


SPEC = SPECS["indexer"]


class Call:
    """Arguments of a good `compress` and a good `restore`, of which a test spoils one."""

    def __init__(self, backend: Backend) -> None:
        device = self.device = backend.device
        self.state = FoldState.allocate(SPEC, 2, 4, device=device)
        self.snapshots = Snapshots.allocate(SPEC, 3, 8, device=device)
        self.ints = {"dtype": torch.int32, "device": device}
        zero = torch.zeros(1, **self.ints)
        self.build: dict[str, Any] = {
            "state_slots": zero, "snapshot_table": torch.zeros(1, 2, **self.ints), "snapshot_page_size": 8,
        }  # fmt: skip
        self.restore: dict[str, Any] = {"slots": zero, "pages": zero, "start_pos": zero, "errors": zero.clone()}
        self.backend, self.start, self.ends = backend.name, zero, torch.tensor([0, 9], **self.ints)

    def compress(self) -> None:
        plan = kvfold.StepPlan.build(4, self.start, self.ends, 9, **self.build)
        kvfold.compress(
            make_tokens(SPEC, 9, seed=0).to(self.device), plan, self.state, None, spec=SPEC,
            ape=torch.zeros(4, 256, device=self.device), norm_weight=None, rope=None, snapshots=self.snapshots,
            backend=self.backend,
        )  # fmt: skip

    def restored(self) -> None:
        kvfold.restore(self.state, self.snapshots, **self.restore, backend=self.backend)


OTHER = CompressorSpec(head_dim=128, ratio=4, overlap=True)
SPOILED: dict[str, Any] = {
    "snapshots: type": lambda c: setattr(c, "snapshots", c.state),
    "snapshots: spec": lambda c: setattr(c, "snapshots", Snapshots.allocate(OTHER, 3, 8, device=c.device)),
    "snapshots: dtype": lambda c: setattr(c, "snapshots", Snapshots.allocate(SPEC, 3, 8, device=c.device, dtype=BF16)),
    "snapshots: device": lambda c: setattr(c, "snapshots", Snapshots.allocate(SPEC, 3, 8, device="meta")),
    "snapshot_page_size: other": lambda c: c.build.update(snapshot_page_size=4),
    "snapshot_page_size: missing": lambda c: c.build.update(snapshot_page_size=None),
    "snapshot_page_size: zero": lambda c: c.build.update(snapshot_page_size=0),
    "snapshot_page_size: type": lambda c: c.build.update(snapshot_page_size=8.0),
    "snapshot_page_size: alone": lambda c: c.build.update(snapshot_table=None),
    "snapshot_table: none": lambda c: c.build.update(snapshot_table=None, snapshot_page_size=None),
    "snapshot_table: shape": lambda c: c.build.update(snapshot_table=torch.zeros(2, 2, **c.ints)),
    "snapshot_table: dtype": lambda c: c.build.update(snapshot_table=torch.zeros(1, 2, dtype=torch.int64, device=c.device)),
    "snapshot_table: stride": lambda c: c.build.update(snapshot_table=torch.zeros(1, 4, **c.ints)[:, ::2]),
    "snapshot_table: pages": lambda c: c.build.update(
        state_slots=None, block_tables=(torch.zeros(1, 2, **c.ints),) * 2, page_size=8
    ),
    "state: type": lambda c: setattr(c, "state", None),
    "state: device": lambda c: setattr(c, "state", FoldState.allocate(SPEC, 2, 4, device="meta")),
    "slots: dtype": lambda c: c.restore.update(slots=c.start.long()),
    "slots: shape": lambda c: c.restore.update(slots=c.start[None]),
    "pages: shape": lambda c: c.restore.update(pages=torch.zeros(2, **c.ints)),
    "start_pos: device": lambda c: c.restore.update(start_pos=c.start.to("meta")),
    "errors: shape": lambda c: c.restore.update(errors=torch.zeros(2, **c.ints)),
    "errors: type": lambda c: c.restore.update(errors=0),
    "backend: name": lambda c: setattr(c, "backend", "cuda"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_mistakes_name_the_argument(backend: Backend, what: str) -> None:
    call, name = Call(backend), what.split(":")[0]
    call.compress()
    call.restored()
    SPOILED[what](call)
    runs = [call.restored] if name in call.restore else [call.compress, call.restored]
    for run in runs[:1] if name.startswith("snapshot_") else runs:
        with pytest.raises((TypeError, ValueError), match=rf"\b{re.escape(name)}\b"):
            run()


def test_mistakes_in_snapshots() -> None:
    """Of `allocate` and of the constructor."""
    fold, tags = CompressorSpec(head_dim=64, ratio=16), torch.full((2, 1), -1, dtype=torch.int32)
    for arguments, name in (
        ((SPEC, 2, 6), "page_size"), ((SPEC, 2, 2), "page_size"), ((CASES["rows-2"].spec, 2, 3), "page_size"),
        ((fold, 2, 0), "page_size"), ((fold, 2, 2**30 + 1), "page_size"), ((fold, 2, True), "page_size"),
        ((fold, -1, 8), "num_pages"), (("hca", 2, 8), "spec"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
            Snapshots.allocate(*arguments)
    for dtype in (torch.float16, BF16):  # fold rows are fp32, as in FoldState.allocate
        with pytest.raises(ValueError, match=r"^dtype\b"):
            Snapshots.allocate(fold, 2, 8, dtype=dtype)
    rows = torch.zeros(2, 1, 192)
    for bad_rows, bad_tags, name in (
        (rows.bfloat16(), tags, "rows"), (rows[:, :, 1:], tags, "rows"), (rows.transpose(0, 1), tags, "rows"),
        (torch.zeros(2, 1, 384)[:, :, ::2], tags, "rows"), (None, tags, "rows"),
        (rows, tags[:1], "positions"), (rows, tags.long(), "positions"), (rows, tags.to("meta"), "positions"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
            Snapshots(fold, bad_rows, bad_tags, 8)
    assert Snapshots(fold, rows, tags, 8).bytes_per_page == 3 * 64 * 4 + 4
