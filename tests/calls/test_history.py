"""Whole histories of an engine: after every step all entries and all state are what one call for the whole text gives.

Drawn are sequences that arrive, go on in chunks and drafts, turn back, end, leave their slot to others or move to another
one, or share a prefix, several of them and padding in a call, and calls that are repeated; `pytest
--hypothesis-profile=long` draws many more.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import BACKENDS
from hypothesis import Phase, find, given, note, settings
from hypothesis import strategies as st
from support.helpers import Backend
from support.history_steps import CASES, ROWS_PER_PAGE, SLOTS, Call, End, Feed, History, Hit, Move, Share, Simulation, Step
from support.history_support import run

from kvfold import Snapshots, StepPlan
from kvfold.backend_torch import fold as backend_torch

ON_THE_INTERPRETER = (
    "fold-16",
    "csa-bf16-state",
    "ratio-2",
    "window-csa",
    "window-ratio-2",
)  # it takes milliseconds for a token: the others if told so


@st.composite
def histories(draw: st.DrawFn, name: str, most_steps: int = 12) -> History:
    """A history of this case, drawn step by step along the simulation, which says what the next step can be."""
    simulation = Simulation(name, draw(st.sampled_from([1, 4, 8])))
    steps = []
    for _ in range(draw(st.sampled_from([n for n in (1, 2, 4, 4, 8, 8, 12, 12) if n <= most_steps]))):
        steps.append(draw(next_steps(simulation)))
        simulation.apply(steps[-1])
    return History(name, simulation.max_new_tokens, tuple(steps))


@st.composite
def next_steps(draw: st.DrawFn, simulation: Simulation) -> Step:
    living = [slot for slot, sequence in enumerate(simulation.slots) if sequence]
    empty = [slot for slot in range(SLOTS) if slot not in living]
    what = draw(st.sampled_from(["call"] * 5 + ["end", "other slot", "other slot"])) if living else "call"
    if what == "end" or (what == "other slot" and not empty):
        return End(draw(st.sampled_from(living)))
    if what == "other slot":
        source, target = draw(st.sampled_from(living)), draw(st.sampled_from(empty))
        hits = simulation.hits(source)
        if hits and draw(st.booleans()):
            return Hit(source, target, draw(st.sampled_from(hits)))
        if simulation.case.page_size == 0:
            return Move(source, target)
        return Share(source, target, draw(st.integers(0, simulation.slots[source].length)))
    return draw(calls(simulation))


@st.composite
def calls(draw: st.DrawFn, simulation: Simulation) -> Call:
    """Some of the slots, padding, and seldom a slot that is beyond the state; in any order, and perhaps several times."""
    slots = draw(st.sets(st.integers(0, SLOTS - 1), min_size=1))
    feeds = [draw(feeds_of(simulation, slot)) for slot in sorted(slots)]
    if simulation.case.page_size == 0:
        padding = st.tuples(st.integers(0, 99), st.integers(0, 9)).map(lambda drawn: Feed(-1, *drawn))
        feeds += draw(st.sampled_from([0, 0, 1, 2]).flatmap(lambda n: st.lists(padding, min_size=n, max_size=n)))
        feeds += draw(st.sampled_from([[]] * 7 + [[Feed(SLOTS, 5, 9)]]))
    return Call(tuple(draw(st.permutations(feeds))), draw(st.sampled_from([1, 1, 1, 2, 3])), draw(st.sampled_from([0, 0, 3])))


@st.composite
def feeds_of(draw: st.DrawFn, simulation: Simulation, slot: int) -> Feed:
    """An arrival, a chunk of any length, drafts after any number of rejected ones, a turn back, or no new tokens."""
    sequence, case = simulation.slots[slot], simulation.case
    ratio, limit, start, floor = case.spec.ratio, case.limit, 0, 0
    if sequence:
        start, floor = sequence.length, sequence.floor
        match draw(st.sampled_from(["go on"] * 4 + ["what may be relied on"] * 3 + ["anywhere"])):
            case "what may be relied on" if sequence.starts:
                start = max(draw(st.sampled_from(sequence.starts[::-1])), floor)
            case "anywhere":  # what may not be relied on is mostly refused
                start = draw(st.integers(floor, start))
    if start >= limit:
        start = floor
    drafts, chunk = st.integers(1, simulation.max_new_tokens), st.integers(1, limit - start)
    edges = st.sampled_from([ratio - 1, ratio, ratio + 1, 2 * ratio + 1])
    kinds = [drafts] * 6 + [chunk] * 3 + [edges] * 2 + [st.just(0)]
    count = min(draw(draw(st.sampled_from(kinds))), limit - start)
    if start == 0 and draw(st.booleans()):
        count = draw(chunk)
    windows = range(start // ratio, (start + count) // ratio)
    hole = draw(st.sampled_from([None] * 7 + [windows[-1] // ROWS_PER_PAGE])) if windows else None
    return Feed(slot, start, count, hole)


@pytest.mark.parametrize("name", CASES)
def test_histories(backend: Backend, name: str, pytestconfig: pytest.Config) -> None:
    """As many as the profile says; the interpreter does an eighth of them, and short ones."""
    if backend.slow and name not in ON_THE_INTERPRETER and pytestconfig.getoption("--hypothesis-profile") != "long":
        pytest.skip(f"the interpreter does {', '.join(ON_THE_INTERPRETER)}; all with --hypothesis-profile=long")
    label = next(label for label, known in BACKENDS.items() if known == backend)

    @settings(max_examples=settings().max_examples // (8 if backend.slow else 1))
    @given(histories(name, 4 if backend.slow else 12))
    def check(history: History) -> None:
        note(f"\n{history.program(label)}")
        run(history, backend)

    check()


def forget_to_retire(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend_torch.FoldRows, "retire", lambda *_: None)


def forget_spare_rows(patch: pytest.MonkeyPatch) -> None:
    """What a step reads is overwritten by it: the step cannot be repeated."""
    patch.setattr(backend_torch.FoldRows, "place", lambda self, slot, x, h0, start: slot * self.per_slot + x % self.ring)
    choose = backend_torch.Places.choose
    nothing = torch.tensor(-1)
    patch.setattr(backend_torch.Places, "choose", lambda self, slot, window, *_: choose(self, slot, window, nothing))


def forget_to_empty(patch: pytest.MonkeyPatch) -> None:
    """The other place of a window that begins keeps what it had."""
    choose = backend_torch.Places.choose

    def spared(self, slot, window, *history):
        place, empty = choose(self, slot, window, *history)
        return place, torch.full_like(empty, -1)

    patch.setattr(backend_torch.Places, "choose", spared)


def forget_the_check(patch: pytest.MonkeyPatch) -> None:
    """A step of which a history row is missing takes what it finds."""
    for rows in (backend_torch.FoldRows, backend_torch.Places):
        patch.setattr(rows, "find", lambda self, *given, find=rows.find: find(self, *given).clamp(min=0))


def forget_the_window_before(patch: pytest.MonkeyPatch) -> None:
    """With overlap too the history of a step is said to begin with its own window."""
    history = backend_torch.StateRows.history

    def without(self, slot, start):
        _, (before, lo, hi) = history(self, slot, start)
        return (start % self.ratio == 0) | ((lo >= 0) & (hi >= 0)), [before.clamp(min=0), lo, hi]

    patch.setattr(backend_torch.StateRows, "history", without)


def forget_snapshots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Snapshots, "of", lambda _, positions: positions != positions)


def one_table_for_both_pools(patch: pytest.MonkeyPatch) -> None:
    tables = StepPlan.build.__func__

    def build(cls: type[StepPlan], *args, block_tables=None, **options) -> StepPlan:
        value, score = block_tables
        score = score.clone()
        score[:, : value.shape[1]] = value
        return tables(cls, *args, block_tables=(value, score), **options)

    patch.setattr(StepPlan, "build", classmethod(build))


BROKEN = [
    ("fold-16", forget_to_retire),
    ("fold-16", forget_spare_rows),
    ("csa", forget_spare_rows),
    ("csa", forget_to_empty),
    ("fold-16", forget_the_check),
    ("csa", forget_the_check),
    ("overlap-3", forget_the_window_before),
    ("csa-bf16-state", forget_snapshots),
    ("window-csa", one_table_for_both_pools),
]


@pytest.mark.parametrize("name, forget", BROKEN, ids=[f"{name}-{forget.__name__}" for name, forget in BROKEN])
def test_a_forgotten_rule_is_found(name: str, forget: Callable[[pytest.MonkeyPatch], None]) -> None:
    """A torch backend that lacks one rule fails, and the history that shows it is a program that shows it again."""

    def fails(history: History) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            forget(patch)
            try:
                run(history, BACKENDS["torch"])
            except AssertionError:
                return True
        return False

    found = find(histories(name), fails, settings=settings(max_examples=1000, phases=[Phase.generate]))
    exec(found.program(), {})
    with pytest.MonkeyPatch.context() as patch:
        forget(patch)
        with pytest.raises(AssertionError, match=r"^step "):
            exec(found.program(), {})
