"""Hostile use: whatever a caller passes, a call is refused with nothing written, or completes within the tensors given.

Drawn are good calls of which one to three arguments are spoiled; `pytest --hypothesis-profile=long` draws many more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fuzz_support import BOTTOM, CALLS, KINDS, LONG_BOTTOM, LONG_TOP, TOP, TRANSFORMS, Case, Change, World, run
from support.helpers import Backend

import kvfold
from kvfold.explain import explain

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
        pytest.skip("on the interpreter tests/calls/test_threads.py makes these calls")
    assert run(Case(*key, ()), backend) == "done"


def test_spoiled_calls(backend: Backend) -> None:
    """Ten times as many as the profile says, half as many on the interpreter."""
    calls = tuple(call for call in CALLS if not (backend.slow and call in ("check", "update", "read")))

    @settings(max_examples=settings().max_examples // 2 if backend.slow else 10 * settings().max_examples)
    @given(cases(calls))
    def check(case: Case) -> None:
        run(case, backend)

    check()


PLAIN = KINDS["rows"][0]
GOOD: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "spec": (kvfold.CompressorSpec, {"head_dim": 64, "ratio": 4, "overlap": True, "has_ape": True, "rope_dim": 16,
                                     "norm_eps": 1e-6, "hadamard": False}),
    "state": (kvfold.FoldState.allocate, {"spec": PLAIN, "num_slots": 2, "max_new_tokens": 4, "dtype": torch.float32}),
    "window": (kvfold.WindowState.allocate, {"spec": PLAIN, "num_pages": 2, "page_size": 4, "dtype": torch.bfloat16}),
    "cache": (kvfold.EntryCache.allocate, {"fmt": "mxfp4", "num_pages": 2, "rows_per_page": 4, "spec": PLAIN, "scale": 1.0}),
    "snapshots": (kvfold.Snapshots.allocate, {"spec": PLAIN, "num_pages": 2, "page_size": 8, "dtype": torch.float32}),
    "history": (kvfold.FoldState.allocate(PLAIN, 1, 1).history_of, {"position": 5}),
    "explain": (explain, {"spec": PLAIN, "start": 5, "new": 4, "max_new_tokens": 4, "fmt": "mxfp4", "rows_per_page": 4,
                          "state": "fold", "page_size": 4}),
    "warmup": (kvfold.warmup, {"specs": [PLAIN], "formats": ["mxfp4"], "dtypes": (torch.bfloat16,), "max_new_tokens": (1,),
                               "states": ("fold",), "state_dtypes": (torch.float32,), "norm_weight_dtypes": (torch.float32,),
                               "rows": (None,), "page_sizes": (4,), "many": (), "snapshots": (False,), "pdl": None,
                               "workers": None}),
}  # fmt: skip


@pytest.mark.parametrize("what", GOOD)
def test_numbers_and_names(what: str) -> None:
    """Constructors on the meta device, and functions without tensors: each argument in turn is each of `SCALARS`."""
    call, good = GOOD[what]
    if what in ("state", "window", "cache", "snapshots"):
        good = {**good, "device": "meta"}
    accepted = 0
    for name in good:
        for bad in SCALARS if name != "device" else ():
            try:
                call(**{**good, name: bad})
                accepted += 1
            except (TypeError, ValueError) as error:
                words = set(re.findall(r"\w+", str(error)))
                assert words & set(good), f"{name}={bad!r}: {type(error).__name__}: {error}"
            except RuntimeError as error:
                assert what == "warmup" and "warmup compiles for a GPU" in str(error)  # all its arguments were accepted
                accepted += 1
    assert accepted  # None, numbers within bounds
