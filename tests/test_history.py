"""Whole histories of an engine: after every step all entries and all state are what one call for the whole text gives.

Drawn are sequences that arrive, go on in chunks and drafts, turn back, end, leave their slot to others or move to another
one, several of them and padding in a call, and calls that are repeated. `pytest --hypothesis-profile=long` draws many more.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import BACKENDS
from helpers import Backend
from history_support import CASES, SLOTS, Call, End, Feed, History, Move, Share, Simulation, Step, run
from hypothesis import HealthCheck, find, given, note, settings
from hypothesis import strategies as st

from kvfold import backend_torch, backend_window
from kvfold.state import history_start

MOST_STEPS = 7


@st.composite
def histories(draw: st.DrawFn, name: str) -> History:
    """A history of this case, drawn step by step along the simulation, which says what the next step can be."""
    simulation = Simulation(name, draw(st.sampled_from([1, 4, 8])))
    steps = []
    for _ in range(draw(st.integers(1, MOST_STEPS))):
        steps.append(draw(next_steps(simulation)))
        simulation.apply(steps[-1])
    return History(name, simulation.max_new_tokens, tuple(steps))


@st.composite
def next_steps(draw: st.DrawFn, simulation: Simulation) -> Step:
    living = [slot for slot, sequence in enumerate(simulation.slots) if sequence]
    empty = [slot for slot, sequence in enumerate(simulation.slots) if not sequence]
    what = draw(st.sampled_from(["call"] * 6 + ["end", "other slot"])) if living else "call"
    if what == "end":
        return End(draw(st.sampled_from(living)))
    if what == "other slot" and empty:
        source, target = draw(st.sampled_from(living)), draw(st.sampled_from(empty))
        if simulation.case.page_size == 0:
            return Move(source, target)
        return Share(source, target, draw(st.integers(0, simulation.slots[source].length)))
    return draw(calls(simulation))


@st.composite
def calls(draw: st.DrawFn, simulation: Simulation) -> Call:
    """Of every slot: a prefill or a chunk, a step of drafts, a turn back, wrong ones too, no new tokens, or nothing at all."""
    feeds = [feed for slot in range(SLOTS) if (feed := draw(st.none() | feeds_of(simulation, slot)))]
    if simulation.case.page_size == 0:
        absent = st.builds(Feed, st.just(-1), st.integers(0, 99), st.integers(0, 9))
        wrong = st.sampled_from([Feed(SLOTS, 0, 3), Feed(SLOTS, 5, simulation.case.spec.ratio)])
        feeds += draw(st.lists(absent, max_size=2)) + draw(st.lists(wrong, max_size=1))
    feeds = draw(st.permutations(feeds or [Feed(0, 0, 0)]))
    return Call(tuple(feeds), draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([0, 0, 3])))


@st.composite
def feeds_of(draw: st.DrawFn, simulation: Simulation, slot: int) -> Feed:
    sequence, case = simulation.slots[slot], simulation.case
    ratio, limit = case.spec.ratio, case.limit
    length, floor = (sequence.length, sequence.floor) if sequence else (0, 0)
    starts = [length]
    if sequence:
        relied = st.sampled_from(sequence.starts[::-1] or [0])
        # Anywhere: what may not be relied on is refused as a rule, but not at the start of a window of fold rows.
        starts = draw(st.sampled_from([st.just(length)] * 3 + [relied] * 3 + [st.integers(floor, length)]))
        starts = [draw(starts)]
    start = starts[0] if floor <= starts[0] < limit else floor
    drafts = st.integers(1, simulation.max_new_tokens)
    chunk = st.integers(1, limit - start)
    edges = st.sampled_from([n for n in (ratio - 1, ratio, ratio + 1, 2 * ratio + 1) if n <= limit - start] or [1])
    count = min(draw(st.one_of(drafts, drafts, edges, chunk, st.just(0))), limit - start)
    windows = range(start // ratio, (start + count) // ratio)
    hole = draw(st.sampled_from([None] * 4 + [windows[-1] // 2])) if windows else None
    return Feed(slot, start, count, hole)


def draws(check: Callable[[History], None], name: str, backend: Backend) -> None:
    """Checks histories of a case, as many as the profile says; an interpreter does an eighth of them."""
    examples = max(settings().max_examples // (8 if backend.slow else 1), 1)

    @settings(max_examples=examples)
    @given(histories(name))
    def run_all(history: History) -> None:
        check(history)

    run_all()


@pytest.mark.parametrize("name", CASES)
def test_histories(backend: Backend, name: str) -> None:
    label = next(label for label, known in BACKENDS.items() if known == backend)

    def check(history: History) -> None:
        note(f"\n{history.program(label)}")
        run(history, backend)

    draws(check, name, backend)
