"""The state against the simulator of `reference.py`: what is held, what is refused, what is emitted, over whole histories."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.helpers import SPECS, Backend, Engine, Weights, make_tokens, norm_error, shape_of
from torch import Tensor

from kvfold import CompressorSpec
from kvfold.contract import pooled_bound
from kvfold.reference import Held, Simulator

STATE_SPECS = {
    "indexer": SPECS["indexer"],
    "rows-2": CompressorSpec(head_dim=128, ratio=2, has_ape=False),
    "rows-3-overlap": CompressorSpec(head_dim=128, ratio=3, overlap=True),
    "fold-16": CompressorSpec(head_dim=128, ratio=16),
    "fold-128": CompressorSpec(head_dim=128, ratio=128),
}
MAX_POSITION = 700

# What one slot does in a step, as (what, number, number). The numbers are read against the history so far.
ACTIONS = st.one_of(
    st.tuples(st.just("go on"), st.integers(0, 3), st.integers(1, 8)),  # rejected drafts, new tokens
    st.tuples(st.just("go on"), st.integers(0, 3), st.integers(9, 150)),
    st.tuples(st.just("back to the start of the last step"), st.just(0), st.integers(1, 150)),
    st.tuples(st.just("rewind"), st.integers(1, 40), st.integers(1, 20)),
    st.tuples(st.just("new owner"), st.just(0), st.integers(1, 150)),
    st.tuples(st.just("start anywhere"), st.integers(0, 300), st.integers(1, 20)),
    st.tuples(st.just("no tokens"), st.integers(0, 300), st.just(0)),
    st.tuples(st.just("absent"), st.just(0), st.just(0)),
)
SLOTS = 3
HISTORIES = st.tuples(
    st.sampled_from([1, 2, 4, 8]),  # max_new_tokens
    st.lists(st.tuples(st.tuples(*[ACTIONS] * SLOTS), st.integers(0, 2**16), st.booleans()), min_size=1, max_size=7),
)


class History:
    """Plays actions on a simulator: `length` is the tokens a slot's sequence has, `started` where its last step began."""

    def __init__(self, spec: CompressorSpec, max_new_tokens: int, weights: Weights) -> None:
        self.spec = spec
        self.simulator = Simulator(spec, SLOTS, max_new_tokens, weights.ape)
        self.length, self.started, self.fresh = [0] * SLOTS, [0] * SLOTS, 0

    def place(self, slot: int, action: tuple[str, int, int]) -> tuple[int, int] | None:
        """(start, number of tokens) of an action, None when the slot is not in the batch."""
        what, number, tokens = action
        if what == "absent":
            return None
        start = {
            "go on": max(self.length[slot] - number, 0),
            "rewind": max(self.length[slot] - number, 0),
            "back to the start of the last step": self.started[slot],
            "new owner": 0,
        }.get(what, number)
        longest = min(2 * self.spec.ratio + 32, MAX_POSITION - start)  # enough to outrun every ring
        return start, min(tokens, max(longest, 0))

    def tokens(self, n: int) -> Tensor:
        self.fresh += 1
        return make_tokens(self.spec, n, seed=self.fresh)

    def poison(self, slot: int) -> None:
        """The former owner leaves nothing but NaN in its rows."""
        memory = self.simulator.slots[slot]
        memory[:] = [held and Held(held.position, held.tokens * torch.nan) for held in memory]

    def step(self, slot: int, start: int, tokens: Tensor) -> dict[int, Tensor] | None:
        emitted = self.simulator.step(slot, start, tokens)
        if emitted is not None and len(tokens):
            self.started[slot], self.length[slot] = start, start + len(tokens)
        return emitted


@pytest.mark.parametrize("name", STATE_SPECS)
def test_histories(backend: Backend, name: str) -> None:
    """Arrivals, chunks, drafts, rewinds, handovers of slots, wrong starts and padding, in permuted batches."""
    spec = STATE_SPECS[name]
    weights = Weights.make(spec)

    @settings(
        max_examples=3 if backend.slow else 40,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(HISTORIES)
    def run(drawn: tuple[int, list]) -> None:
        max_new_tokens, steps = drawn
        history = History(spec, max_new_tokens, weights)
        engine = Engine(
            spec,
            backend,
            num_slots=SLOTS,
            max_new_tokens=max_new_tokens,
            max_entries=MAX_POSITION // spec.ratio,
            weights=weights,
        )
        for actions, order, padded in steps:
            play(history, engine, actions, order, padded)

    run()


def play(history: History, engine: Engine, actions: tuple, order: int, padded: bool) -> None:
    """One step on both; then tags, refusals and emitted entries are the simulator's."""
    batch = []
    for slot, action in enumerate(actions):
        if action[0] == "new owner":
            history.poison(slot)
            engine.state.rows[slot] = torch.nan
        placed = history.place(slot, action)
        if placed is not None:
            batch.append((slot, placed[0], history.tokens(placed[1])))
    if padded:
        batch.append((-1, 5, history.tokens(4)))
    batch = [batch[i] for i in torch.randperm(len(batch), generator=torch.Generator().manual_seed(order))]
    before, storage = history.simulator.errors, engine.cache.storage.clone()
    step = engine.step(batch, strict=False, padding=3 if padded else 0)

    ratio, untouched = history.spec.ratio, []
    for b, (slot, start, tokens) in enumerate(batch):
        emitted = history.step(slot, start, tokens)
        ended = range(start // ratio, (start + len(tokens)) // ratio) if slot != -1 else range(0)
        if emitted is None:
            untouched += [engine.cache_slot(slot, w) for w in ended]
            emitted = {}
        for window in ended:
            got = step.pooled[b, window]
            if window not in emitted:
                assert got.isnan().all(), f"slot {slot}: row of refused window {window} was written"
            else:
                same_pooled(got, emitted[window], pooled_bound(history.spec.window_rows), f"slot {slot}, window {window}")
    assert step.errors == history.simulator.errors - before
    for slot in range(SLOTS):
        assert engine.tags(slot) == history.simulator.tags(slot), f"tags of slot {slot}"
    where = engine._record_bytes(untouched)
    assert torch.equal(engine.cache.storage[where], storage[where]), "a refused entry was written"


def same_pooled(got: Tensor, want: Tensor, bound: float, what: str) -> None:
    """A pooled fp32 row is the fp64 one within the library's bound, and NaN where that is."""
    assert torch.equal(got.isnan(), want.isnan()), what
    if not want.isnan().any():
        assert norm_error(got[None], want[None]) <= bound, what


def positions_kept(simulator: Simulator) -> int:
    """Of how many of a step's last positions rows are kept, at most."""
    return simulator.ring if simulator.kind == "fold" else max(simulator.places) * simulator.spec.ratio


@pytest.mark.parametrize("max_new_tokens", [1, 3])
@pytest.mark.parametrize("name", STATE_SPECS)
def test_walks_of_long_and_short_steps(backend: Backend, name: str, max_new_tokens: int) -> None:
    """Steps that outrun the state, from every phase, one after another and rewound: what is read is not overwritten."""
    spec = STATE_SPECS[name]
    ring, rows = positions_kept(Simulator(spec, 0, max_new_tokens)), spec.ratio * (1 + spec.overlap)
    phases = [p for p in range(rows + 1) if p < 9 or p > rows - 3]
    walks = [
        # (tokens given up first, new tokens) of each step
        [(0, phase), (0, first), (back, second), (0, 1), (1, third)]
        for phase in phases
        for first in (ring - 1, ring, ring + 1, ring + rows)
        for second, back in ((1, 0), (ring + 1, 0), (2 * ring + 1, 0), (ring + 2, first), (2, first))
        for third in (2, ring + 1)
    ]
    walks = walks[:: 41 if backend.slow else 7]
    tokens = make_tokens(spec, rows + 8 * ring + 9 * rows, seed=5)
    simulator = Simulator(spec, len(walks), max_new_tokens, Weights.make(spec).ape)
    engine = Engine(spec, backend, num_slots=len(walks), max_new_tokens=max_new_tokens, max_entries=len(tokens))
    at = [0] * len(walks)
    for number in range(5):
        batch = []
        for slot, walk in enumerate(walks):
            back, new = walk[number]
            start = at[slot] - back
            batch.append((slot, start, tokens[start : start + new]))
            at[slot] = start + new
        before = simulator.errors
        errors = engine.step(batch, strict=False).errors
        for slot, start, new in batch:
            simulator.step(slot, start, new)
        assert errors == simulator.errors - before == 0
        for slot, walk in enumerate(walks):
            assert engine.tags(slot) == simulator.tags(slot), f"after step {number} of {walk}"


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(list(STATE_SPECS)), HISTORIES, st.data())
def test_what_the_state_rules_promise(name: str, drawn: tuple[int, list], data: st.DataObject) -> None:
    """Of the simulator itself: every tag before the end is of the current sequence, and what must be rewindable is."""
    max_new_tokens, steps = drawn
    spec = STATE_SPECS[name]
    history = History(spec, max_new_tokens, Weights.make(spec))
    simulator, true = history.simulator, [{} for _ in range(SLOTS)]  # slot -> position -> row of kv_score

    for actions, _, _ in steps:
        for slot, action in enumerate(actions):
            placed = history.place(slot, action)
            # A start beyond the sequence is the engine's mistake, and what it may find there is undefined.
            if placed is None or placed[0] > history.length[slot] or not placed[1]:
                continue
            start, tokens = placed[0], history.tokens(placed[1])
            held, end = simulator.can_start(slot, start), start + len(tokens)
            assert held or start not in rewindable(history, slot)
            tags = simulator.tags(slot)
            if history.step(slot, start, tokens) is None:
                assert not held and simulator.tags(slot) == tags
                continue
            true[slot].update(zip(range(start, end), tokens, strict=True))
            late = (end - 1) // spec.ratio * spec.ratio if simulator.kind == "rows" else end - max_new_tokens + 1
            for x in range(start, end + 1):  # anywhere in a short step; in a long one, to its start and in its last window
                if x == start or len(tokens) <= max_new_tokens or x >= late:
                    assert simulator.can_start(slot, x), f"step {start}..{end} cannot be rewound to {x}"
            for held in simulator.slots[slot]:
                for back, token in enumerate(reversed(held.tokens) if held is not None and held.position < end else ()):
                    assert torch.equal(token, true[slot][held.position - back])


@pytest.mark.parametrize("name", STATE_SPECS)
def test_a_state_goes_back_over_several_steps(name: str) -> None:
    """Fold rows made for n tokens, and input rows for n + 2 * ratio, hold what any of the last n positions needs."""
    spec = STATE_SPECS[name]
    for seed, n in enumerate((1, 2, 5, 9)):
        more = 0 if name.startswith("fold") else 2 * spec.ratio
        simulator = Simulator(spec, 1, n + more, Weights.make(spec).ape)
        draw, at, furthest = random.Random(seed), 0, 0
        for _ in range(60):
            new = draw.choice((1, draw.randint(1, n), draw.randint(1, 9 * spec.ratio)))
            assert simulator.step(0, at, torch.zeros(new, 2 * spec.channels)) is not None
            end = at + new
            furthest = max(furthest, end)
            starts = range(max(furthest - n, 0), end + 1)
            assert all(simulator.can_start(0, x) for x in starts), f"{at} to {end}, furthest {furthest}"
            at = draw.choice(starts)


def rewindable(history: History, slot: int) -> list[int]:
    """Where a sequence can always start next: its end, and where its last step began."""
    return [history.length[slot], history.started[slot]]


@pytest.mark.parametrize("name", [*SPECS, "fold-16"])
def test_a_long_step_can_be_replayed_and_rewound_to_its_start(backend: Backend, name: str) -> None:
    """Graph warm-up runs a step several times; the history it starts from must outlive it, however long it is."""
    spec = STATE_SPECS[name] if name in STATE_SPECS else shape_of(name, backend)
    start, length = spec.ratio + spec.ratio // 2, 2 * spec.ratio + 3
    tokens, other = make_tokens(spec, start + length, seed=1), make_tokens(spec, length, seed=2)
    engine = Engine(spec, backend, num_slots=2, max_new_tokens=2)
    assert length > engine.state.ring or engine.state.kind == "rows"

    engine.step([(1, 0, tokens[:start])])
    engine.step([(1, start, other)])  # another future, to be forgotten
    seen = []
    for _ in range(3):
        engine.step([(1, start, tokens[start:])])
        seen.append((engine.records(1, len(tokens) // spec.ratio), engine.tags(1), engine.held(1, len(tokens))))
    whole = Engine(spec, backend, num_slots=1, max_new_tokens=len(tokens))
    whole.step([(0, 0, tokens)])
    rows = whole.held(0, len(tokens))
    for records, tags, held in seen:
        assert torch.equal(records, whole.records(0, len(tokens) // spec.ratio))
        assert tags == seen[0][1]
        for position, row in held.items():
            assert torch.equal(row, rows[position]), f"row of position {position}"
    engine.step([(1, start, tokens[start:][:1])])  # and from its start, a short one again
    engine.step([(1, start + 1, tokens[start + 1 :])])
    assert torch.equal(engine.records(1, len(tokens) // spec.ratio), whole.records(0, len(tokens) // spec.ratio))


@pytest.mark.parametrize("name", SPECS)
def test_a_start_that_is_not_held_is_refused(backend: Backend, name: str) -> None:
    spec = shape_of(name, backend)
    length = 2 * spec.ratio + spec.ratio // 2
    tokens = make_tokens(spec, length + 2 * spec.ratio, seed=3)
    engine = Engine(spec, backend, num_slots=3, max_new_tokens=1)
    engine.step([(0, 0, tokens[:length])])
    engine.step([(2, 0, tokens[:1])])
    before = engine.snapshot()
    kept = positions_kept(Simulator(spec, 0, 1))
    beyond = length - kept - 1  # further back than is kept, not at a window's start
    beyond -= beyond % spec.ratio == 0
    wrong = [
        (1, length, tokens[: spec.ratio]),  # a slot that has nothing
        (0, length + 1, tokens[: spec.ratio]),  # a gap
        (2, length, tokens[: spec.ratio]),  # a slot of a shorter sequence
    ]
    if beyond > 0:
        wrong.append((0, beyond, tokens[: spec.ratio]))
    for sequence in wrong:
        assert engine.step([sequence], strict=False).errors == 1, sequence[:2]
        for was, now in zip(before, engine.snapshot(), strict=True):
            assert torch.equal(was, now), sequence[:2]
    # Beside a refused sequence the others go on.
    step = engine.step([(1, 7, tokens[:3]), (0, length, tokens[length:])], strict=False)
    assert step.errors == 1
    want = Weights.make(spec).entries(tokens, spec)
    assert norm_error(engine.entries(0, len(want)), want) < 1e-5


@pytest.mark.parametrize("name", STATE_SPECS)
def test_history_of_names_what_a_step_reads(backend: Backend, name: str) -> None:
    """A step is accepted with exactly the rows of `history_of` in place, and refused when the last of any window is missing."""
    spec = STATE_SPECS[name]
    tokens = make_tokens(spec, 4 * spec.ratio, seed=4)
    for start in {spec.ratio + 1, 2 * spec.ratio - 1, 2 * spec.ratio, 3 * spec.ratio - 1}:
        whole = Engine(spec, backend, num_slots=1, max_new_tokens=len(tokens))
        whole.step([(0, 0, tokens[:start])])
        needed, held = whole.state.history_of(start), whole.state.held()[0].tolist()
        assert needed == Simulator(spec, 1, 1).history_of(start)
        rows = [i for i, x in enumerate(held) if x in needed]
        tags = [i for i, x in enumerate(whole.tags(0)) if x in needed]
        if whole.state.kind == "rows":  # of the window before the lo rows alone, and the last one that is needed
            first = start - start % spec.ratio
            rows = [i for i, x in enumerate(held) if x in needed and (x >= first or i < whole.state.places[0] * spec.ratio)]
            tags = [i for i in tags if whole.tags(0)[i] >= first or i < whole.state.places[0]]
        kept = whole.state.rows[0, rows], whole.state.positions[0, tags]
        for missing in [None, *tags]:
            engine = Engine(spec, backend, num_slots=1, max_new_tokens=len(tokens))
            engine.state.rows[0, rows], engine.state.positions[0, tags] = kept
            if missing is not None:
                engine.state.positions[0, missing] -= 1
            errors = engine.step([(0, start, tokens[start : start + spec.ratio])], strict=False).errors
            assert errors == (missing is not None), f"start {start}, missing {missing}"
            if missing is None:
                whole.step([(0, start, tokens[start : start + spec.ratio])])
                done = (start + spec.ratio) // spec.ratio - 1
                assert torch.equal(engine.records(0, done + 1)[done], whole.records(0, done + 1)[done])
