"""What must not happen: absent sequences, stale rows, bad slots and padding leave no trace in anything else.

`Engine.step` checks on every call that only the batch's state slots and the step's cache slots changed, and the canaries.
"""

from __future__ import annotations

import pytest
import torch
from support.helpers import SPECS, Backend, Engine, Weights, make_tokens, shape_of
from torch import Tensor

import kvfold

names = pytest.mark.parametrize("name", SPECS)


def unchanged(engine: Engine, before: tuple[Tensor, Tensor, Tensor]) -> None:
    for what, was, now in zip(("state rows", "tags", "cache"), before, engine.snapshot(), strict=True):
        assert torch.equal(was, now), f"{what} changed"


def plan_of(
    engine: Engine, starts: list[int], lengths: list[int], slots: list[int], entry_slots: list[int] | None, **options
) -> kvfold.StepPlan:
    device = engine.backend.device
    if entry_slots is not None:
        options["entry_slots"] = torch.tensor(entry_slots, dtype=torch.int64, device=device)
    return kvfold.StepPlan.build(
        engine.spec.ratio,
        torch.tensor(starts, dtype=torch.int32, device=device),
        offsets(lengths).to(device),
        max([1, *lengths]),
        state_slots=torch.tensor(slots, dtype=torch.int32, device=device),
        **options,
    )


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)


@names
def test_an_empty_batch(backend: Backend, name: str) -> None:
    engine = Engine(shape_of(name, backend), backend, num_slots=2, max_new_tokens=1)
    engine.step([(0, 0, make_tokens(engine.spec, 3, seed=0))])
    before = engine.snapshot()
    assert engine.step([]).errors == 0
    assert engine.step([], padding=5).errors == 0
    unchanged(engine, before)


@names
def test_absent_sequences(backend: Backend, name: str) -> None:
    """No slot, or no tokens: nothing changes, nothing is refused, whatever else these sequences say."""
    spec = shape_of(name, backend)
    tokens = make_tokens(spec, 2 * spec.ratio, seed=1)
    engine = Engine(spec, backend, num_slots=2, max_new_tokens=1)
    engine.step([(0, 0, tokens[:5])])
    before = engine.snapshot()
    assert engine.step([(-1, 0, tokens)]).errors == 0
    assert engine.step([(-1, 999, tokens), (1, 77, tokens[:0]), (0, 0, tokens[:0])], padding=4).errors == 0
    assert engine.step([(0, 5, tokens[:0])]).errors == 0  # T = 0
    unchanged(engine, before)


@names
def test_absent_sequences_change_nothing_for_the_others(backend: Backend, name: str) -> None:
    spec = shape_of(name, backend)
    tokens, other = make_tokens(spec, 2 * spec.ratio + 1, seed=2), torch.full((spec.ratio, 2 * spec.channels), torch.nan)
    alone = Engine(spec, backend, num_slots=2, max_new_tokens=1)
    alone.step([(1, 0, tokens)])
    padded = Engine(spec, backend, num_slots=2, max_new_tokens=1)
    padded.step([(-1, 3, other), (0, 9, other[:0]), (1, 0, tokens), (-1, 0, other), (0, 0, other[:0])], padding=7)
    for a, b in zip(alone.snapshot(), padded.snapshot(), strict=True):
        assert torch.equal(a, b)


@names
def test_a_slot_full_of_nan_is_used_again(backend: Backend, name: str) -> None:
    """The former owner leaves NaN rows with every tag that could mislead; the next one starts at 0 and never sees them."""
    spec = shape_of(name, backend)
    tokens = make_tokens(spec, 2 * spec.ratio + 3, seed=3)
    fresh = Engine(spec, backend, num_slots=1, max_new_tokens=4)
    used = Engine(spec, backend, num_slots=1, max_new_tokens=4)
    used.step([(0, 0, torch.full((3 * spec.ratio + 1, 2 * spec.channels), torch.nan))])
    used.state.rows.fill_(torch.nan)
    for engine in (fresh, used):
        for start, end in ((0, spec.ratio - 1), (spec.ratio - 1, spec.ratio + 3), (spec.ratio + 3, len(tokens))):
            engine.step([(0, start, tokens[start:end])])
    assert torch.equal(fresh.records(0, 2), used.records(0, 2))
    assert not used.entries(0, 2).isnan().any()
    held = used.held(0, len(tokens))
    assert held.keys() == fresh.held(0, len(tokens)).keys()
    for position, row in fresh.held(0, len(tokens)).items():
        assert torch.equal(row, held[position])


@names
def test_nan_in_one_sequence_stays_there(backend: Backend, name: str) -> None:
    spec = shape_of(name, backend)
    tokens, bad = make_tokens(spec, 2 * spec.ratio + 1, seed=4), make_tokens(spec, 2 * spec.ratio + 1, seed=5)
    bad[::2] = torch.nan
    bad[1::2] = torch.inf
    alone = Engine(spec, backend, num_slots=3, max_new_tokens=1)
    alone.step([(1, 0, tokens)])
    beside = Engine(spec, backend, num_slots=3, max_new_tokens=1)
    beside.step([(0, 0, bad), (1, 0, tokens), (2, 0, bad)])
    assert torch.equal(alone.records(1, 2), beside.records(1, 2))
    held = beside.held(1, len(tokens))
    for position, row in alone.held(1, len(tokens)).items():
        assert torch.equal(row, held[position])


@names
def test_dropped_and_impossible_entry_slots(backend: Backend, name: str) -> None:
    """-1 drops an entry in silence; a slot beyond the cache, or below -1, is counted. The state goes on in either case."""
    spec = shape_of(name, backend)
    tokens = make_tokens(spec, 3 * spec.ratio + 1, seed=6)
    whole = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=5)
    whole.step([(0, 0, tokens)])
    want = whole.records(0, 3)
    for second, errors in ((-1, 0), (5, 1), (2**40, 1), (-2, 1)):
        engine = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=5)
        before = engine.snapshot()
        plan = plan_of(engine, [0], [len(tokens)], [0], [0, second, 2])
        engine.compress(tokens.to(backend.device), plan)
        engine.check_canaries()
        engine.check_untouched(before, [0], [0, 2])
        assert int(plan.errors) == errors, second
        assert torch.equal(engine.records(0, 3)[[0, 2]], want[[0, 2]])
        assert engine.tags(0) == whole.tags(0)


@names
def test_impossible_sequences_are_counted_and_skipped(backend: Backend, name: str) -> None:
    spec = shape_of(name, backend)
    tokens = make_tokens(spec, 3 * spec.ratio, seed=7).to(backend.device)
    engine = Engine(spec, backend, num_slots=3, max_new_tokens=1)
    before = engine.snapshot()
    n = spec.ratio

    def refused(starts: list[int], slots: list[int], lengths: list[int], rows: Tensor = tokens) -> int:
        plan = plan_of(engine, starts, lengths, slots, [0, 1, 2])
        engine.compress(rows, plan)
        engine.check_canaries()
        return int(plan.errors)

    assert refused([0], [3], [n]) == 1  # a state slot beyond the state
    assert refused([0], [-2], [n]) == 1
    assert refused([0], [2**31 - 1], [n]) == 1
    assert refused([-1], [0], [n]) == 1  # a negative start
    assert refused([-(2**31)], [0], [n]) == 1
    assert refused([2**31 - 2], [0], [n]) == 1  # an end that is no int32
    assert refused([0], [0], [n], rows=tokens[: n - 1]) == 1  # tokens beyond kv_score
    assert refused([0, 0, -7], [3, -5, 1], [n, n, n]) == 3
    unchanged(engine, before)

    plan = plan_of(engine, [0, 0], [n, n], [0, 1], [0, 1])
    plan.update(plan.start_pos.clone(), torch.tensor([0, 2 * n, n], dtype=torch.int32, device=backend.device))
    engine.compress(tokens, plan)  # more than max_new_tokens, and a negative length
    assert int(plan.errors) == 2
    unchanged(engine, before)

    # One bad sequence among good ones: they do as if it were not there.
    alone = Engine(spec, backend, num_slots=3, max_new_tokens=1)
    alone.step([(0, 0, tokens[:n].cpu()), (2, 0, tokens[2 * n :].cpu())])
    assert refused([0, -3, 0], [0, 1, 2], [n, n, n]) == 1
    for slot in (0, 2):
        assert engine.tags(slot) == alone.tags(slot)
        assert torch.equal(engine.state.rows[slot].nan_to_num(7), alone.state.rows[slot].nan_to_num(7))
    assert engine.tags(1) == [-1] * len(engine.tags(1))


@names
def test_more_entries_than_slots_for_them(backend: Backend, name: str) -> None:
    """`entry_slots` shorter than the step's entries: those beyond it are counted, the others are written."""
    spec = shape_of(name, backend)
    tokens = make_tokens(spec, 3 * spec.ratio, seed=8)
    whole = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=3)
    whole.step([(0, 0, tokens)])
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=3)
    before = engine.snapshot()
    plan = plan_of(engine, [0], [len(tokens)], [0], [0])
    engine.compress(tokens.to(backend.device), plan)
    engine.check_canaries()
    engine.check_untouched(before, [0], [0])
    assert int(plan.errors) == 2
    assert torch.equal(engine.records(0, 1), whole.records(0, 1))
    assert engine.tags(0) == whole.tags(0)


@names
def test_a_position_beyond_the_rope_table(backend: Backend, name: str) -> None:
    spec = shape_of(name, backend)
    tokens = make_tokens(spec, 3 * spec.ratio, seed=9)
    weights = Weights.make(spec, max_positions=2 * spec.ratio)  # windows 0 and 1 have their first token in it
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=3, weights=weights)
    before = engine.snapshot()
    plan = plan_of(engine, [0], [len(tokens)], [0], [0, 1, 2])
    engine.compress(tokens.to(backend.device), plan)
    engine.check_canaries()
    engine.check_untouched(before, [0], [0, 1])
    assert int(plan.errors) == 1
    full = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=3, weights=Weights.make(spec))
    full.step([(0, 0, tokens)])
    assert torch.equal(engine.records(0, 2), full.records(0, 2))


@names
def test_block_tables(backend: Backend, name: str) -> None:
    """Entry w of a sequence is row w % N of page table[b, w // N]; -1 drops it, a page that is not there is counted."""
    spec = shape_of(name, backend)
    tokens = make_tokens(spec, 5 * spec.ratio, seed=10)
    n, pages = 2, 6
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=n * pages, rows_per_page=n)
    engine.step([(0, 0, tokens)])
    want = engine.records(0, 5)

    def run(table: list[int]) -> tuple[int, dict[int, Tensor]]:
        other = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=n * pages, rows_per_page=n)
        before = other.snapshot()
        pages_of = torch.tensor([table], dtype=torch.int32, device=backend.device)
        plan = plan_of(other, [0], [len(tokens)], [0], None, cache_block_table=pages_of, rows_per_page=n)
        other.compress(tokens.to(backend.device), plan)
        other.check_canaries()
        targets = {w: table[w // n] * n + w % n for w in range(5) if w // n < len(table) and 0 <= table[w // n] < pages}
        other.check_untouched(before, [0], list(targets.values()))
        assert int(plan.cu_entries[-1]) == 5
        records = other.records(0, n * pages)
        for window, slot in targets.items():
            assert torch.equal(records[slot], want[window]), f"entry {window} in slot {slot}"
        return int(plan.errors), targets

    assert run([5, 2, 0]) == (0, {0: 10, 1: 11, 2: 4, 3: 5, 4: 0})
    assert run([5, -1, 0])[0] == 0
    assert run([5, 6, 0])[0] == 2  # a page beyond the pool, with two entries
    assert run([5, -7, 0])[0] == 2
    assert run([5])[0] == 3  # a table that is too short, for three entries


@names
def test_update_in_place_is_a_new_plan(backend: Backend, name: str) -> None:
    """`update` reads the caller's slot tensors again, keeps every address, and equals a plan built for that step."""
    spec = shape_of(name, backend)
    r = spec.ratio
    texts = [make_tokens(spec, 2 * r + 2, seed=11 + i) for i in range(3)]
    steps = [  # (starts, lengths, state slots)
        ([0, 0, 0], [r + 1, 2, r - 1], [0, 1, 2]),
        ([2, r + 1, r - 1], [r, r + 1, 1], [1, 0, 2]),
        ([r + 2, 0, r], [r, 0, 3], [1, -1, 2]),
    ]
    fresh = Engine(spec, backend, num_slots=3, max_new_tokens=1, max_entries=3)
    updated = Engine(spec, backend, num_slots=3, max_new_tokens=1, max_entries=3)
    slots = torch.zeros(3, dtype=torch.int32, device=backend.device)
    entry_slots = torch.full((9,), -1, dtype=torch.int64, device=backend.device)
    plan, addresses = None, None
    for starts, lengths, owners in steps:
        batch = [
            (slot, start, texts[max(slot, 0)][start : start + length])
            for slot, start, length in zip(owners, starts, lengths, strict=True)
        ]
        fresh.step(batch)
        targets = [
            updated.cache_slot(slot, w)
            for slot, start, new in batch
            if slot != -1
            for w in range(start // r, (start + len(new)) // r)
        ]
        slots.copy_(torch.tensor(owners))
        entry_slots.fill_(-1)
        entry_slots[: len(targets)] = torch.tensor(targets, dtype=torch.int64)
        start_pos = torch.tensor(starts, dtype=torch.int32, device=backend.device)
        cu = offsets(lengths).to(backend.device)
        if plan is None:
            plan = kvfold.StepPlan.build(r, start_pos, cu, 2 * r + 2, state_slots=slots, entry_slots=entry_slots)
        else:
            plan.update(start_pos, cu)
        tensors = [x.data_ptr() for x in vars(plan).values() if isinstance(x, Tensor)]
        assert addresses in (None, tensors)
        addresses = tensors
        updated.compress(torch.cat([new for _, _, new in batch]).to(backend.device), plan)
        updated.check_canaries()
        assert int(plan.errors) == 0
        for a, b in zip(fresh.snapshot(), updated.snapshot(), strict=True):
            assert torch.equal(a, b)


@names
def test_pooled_rows_without_a_cache(backend: Backend, name: str) -> None:
    """`cache=None` leaves out all after the pooling; the rows and the state are the same."""
    spec = shape_of(name, backend)
    tokens = make_tokens(spec, 2 * spec.ratio + 1, seed=14)
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1)
    step = engine.step([(0, 0, tokens)])
    other = Engine(spec, backend, num_slots=1, max_new_tokens=1)
    plan = plan_of(other, [0], [len(tokens)], [0], [0, 1])
    pooled = torch.zeros(2, spec.head_dim, device=backend.device)
    kvfold.compress(
        tokens.to(backend.device), plan, other.state, None,
        spec=spec, ape=other.ape, norm_weight=None, rope=None, rows=pooled, backend=backend.name,
    )  # fmt: skip
    assert torch.equal(pooled.cpu(), torch.stack([step.pooled[0, 0], step.pooled[0, 1]]))
    assert torch.equal(engine.snapshot()[0], other.snapshot()[0])
    assert torch.equal(engine.snapshot()[1], other.snapshot()[1])


@names
def test_the_inputs_are_not_written(backend: Backend, name: str) -> None:
    spec = shape_of(name, backend)
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1)
    tokens = make_tokens(spec, 2 * spec.ratio + 1, seed=15).to(backend.device)
    plan = plan_of(engine, [0], [len(tokens)], [0], [0, 1])
    inputs = [tokens, engine.ape, engine.norm_weight, engine.rope, plan.items, plan.entry_slots, plan.cu_entries]
    before = [x.clone() for x in inputs]
    engine.compress(tokens, plan)
    for was, now in zip(before, inputs, strict=True):
        assert torch.equal(was, now)
