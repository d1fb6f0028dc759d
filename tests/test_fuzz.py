"""Hostile use: whatever a caller passes, a call is refused with nothing written, or completes within the tensors given.

Drawn are good calls of which one to three arguments are spoiled; `pytest --hypothesis-profile=long` draws many more.
"""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS
from fuzz_support import BOTTOM, CALLS, KINDS, LONG_BOTTOM, LONG_TOP, TOP, TRANSFORMS, Case, Change, World, run
from helpers import Backend
from hypothesis import given, settings
from hypothesis import strategies as st

WORLDS = {
    (call, kind): World(kind, call, BACKENDS["torch"])
    for call in CALLS
    for kind in KINDS
    if kind != "window" or call not in ("many", "restore")
}
NUMBERS = [0, 1, -1, -2, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 40, 41, 100, 1 << 20, (1 << 30) - 1, 1 << 30, TOP - 1, TOP, BOTTOM]
LONG_NUMBERS = [*NUMBERS, 1 << 32, 1 << 40, LONG_TOP, LONG_BOTTOM]
FLOATS = [0.0, -0.0, 1e-40, -1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
# No number below makes a call allocate much: what a plan's bounds cost is a caller's business.
SCALARS = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    4,
    5,
    64,
    1 << 31,
    1 << 63,
    10**400,
    0.5,
    float("nan"),
    "",
    "4",
    [4],
    (),
    torch.tensor(4),
]


def _changes(world: World, name: str) -> st.SearchStrategy[Change]:
    value, ways = world.leaves[name], [st.tuples(st.just("be"), st.sampled_from(SCALARS))]
    if isinstance(value, torch.Tensor):
        others = [other for other in world.names() if isinstance(world.leaves[other], torch.Tensor) and other != name]
        ways += [st.tuples(st.sampled_from(sorted(TRANSFORMS))), st.tuples(st.just("alias"), st.sampled_from(others))]
    return st.one_of(ways).map(lambda way: Change(name, *way)) | (
        _numbers(world, name) if isinstance(value, torch.Tensor) else st.nothing()
    )


def _numbers(world: World, name: str) -> st.SearchStrategy[Change]:
    dtype = world.leaves[name].dtype
    numbers = FLOATS if dtype.is_floating_point else LONG_NUMBERS if dtype == torch.int64 else NUMBERS
    return st.tuples(st.integers(0, 63), st.sampled_from(numbers)).map(lambda what: Change(name, "set", what))


def _integers(world: World, name: str) -> bool:
    value = world.leaves[name]
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)


CHANGES = {key: st.one_of([_changes(world, name) for name in world.names()]) for key, world in WORLDS.items()}
# What no check on the host can see: positions, lengths, slots, pages and tags.
DATA = {
    key: st.one_of([_numbers(world, name) for name in world.names() if _integers(world, name)]) for key, world in WORLDS.items()
}


@st.composite
def cases(draw: st.DrawFn, calls: tuple[str, ...] = CALLS) -> Case:
    key = draw(st.sampled_from([key for key in WORLDS if key[0] in calls]))
    changes = draw(st.sampled_from([CHANGES, DATA]))[key]
    return Case(*key, tuple(draw(st.lists(changes, min_size=1, max_size=3))))


@pytest.mark.parametrize("key", WORLDS, ids="-".join)
def test_good_calls(backend: Backend, key: tuple[str, str]) -> None:
    """Unspoiled they are done, without errors."""
    if backend.slow and key[0] != "store":
        pytest.skip("on the interpreter tests/test_threads.py makes these calls")
    assert run(Case(*key, ()), backend) == "done"


def test_spoiled_calls(backend: Backend) -> None:
    """Ten times as many as the profile says, half as many on the interpreter."""
    calls = tuple(call for call in CALLS if not (backend.slow and call in ("check", "update", "read")))

    @settings(max_examples=settings().max_examples // 2 if backend.slow else 10 * settings().max_examples)
    @given(cases(calls))
    def check(case: Case) -> None:
        run(case, backend)

    check()
