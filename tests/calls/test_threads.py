"""Host threads that use states, plans and caches of their own at once get the bits of one after the other."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from support.chain_support import Chain, same, script
from support.fuzz_support import World
from support.helpers import SPECS, Backend, Engine, make_tokens

from kvfold.backend_triton import launcher as dispatch

GPU = BACKENDS["cuda"]


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads change places a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def together(*works: Callable[[], Any]) -> list[Any]:
    """Their results, each from a thread of its own, which all begin at once."""
    start, found, failed = threading.Barrier(len(works)), [None] * len(works), []

    def run(i: int) -> None:
        try:
            start.wait(60)
            found[i] = works[i]()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a thread does not come to an end"
    if failed:
        raise failed[0]
    return found


def chain(backend: Backend, seed: int, rounds: int, *, stream: bool = False) -> list[torch.Tensor]:
    """What layers of every kind leave behind: both kinds of state, pairs, `store` and plans that are updated in place."""
    with torch.cuda.stream(torch.cuda.Stream(backend.device)) if stream else nullcontext():
        made = Chain(backend)
        for steps in script(rounds, seed):
            made.load(steps)
            made.launch()
        made.check_errors()
        return [tensor.cpu() for tensor in made.contents()]


@pytest.mark.parametrize(
    "backend, rounds", [(BACKENDS["torch"], 1), pytest.param(GPU, 100, marks=pytest.mark.gpu)], ids=["torch", "cuda"]
)
def test_two_threads(backend: Backend, rounds: int) -> None:
    """On a GPU on one stream, whose launches then come in any order, and on a stream for each."""
    want = [chain(backend, seed, rounds) for seed in (1, 2)]
    for stream in (False, True) if backend.device.type == "cuda" else (False,):
        found = together(*[partial(chain, backend, seed, rounds, stream=stream) for seed in (1, 2)])
        for i in (0, 1):
            same(found[i], want[i])


def small(backend: Backend, call: str, kind: str, times: int) -> tuple[int, bytes]:
    """Errors and everything in the memory of a small call, made again and again."""
    world = World(kind, call, backend)
    errors = sum(world.run() for _ in range(times))
    return errors, world.arena.cpu().numpy().tobytes()


@pytest.mark.parametrize("kind", ["rows", "fold", "window"])
def test_small_calls_in_two_threads(backend: Backend, kind: str) -> None:
    """Triton's interpreter is for one thread at a time: launches there wait for each other (backend_triton/launcher.py)."""
    calls = ("compress", "store") if kind == "window" else ("compress", "many", "store", "restore", "update")
    calls, times = (calls[:1], 1) if backend.slow else (calls, 8)
    for call in calls:
        want = small(backend, call, kind, times)
        for found in together(*[partial(small, backend, call, kind, times)] * 2):
            assert found == want


def test_one_thread_builds_what_both_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one key there is one launcher, and each of its kernels is compiled once, however many threads come at once."""
    compiled: list[tuple[bool, bool]] = []

    def compile_slowly(aligned: bool, pdl: bool) -> object:
        compiled.append((aligned, pdl))
        time.sleep(0.02)
        return SimpleNamespace(_init_handles=lambda: None, run=None, function=None, packed_metadata=None)

    def variant(key: tuple, aligned: bool, pdl: bool, multiprocessors: int) -> object:
        return SimpleNamespace(kernel="store", aligned=aligned, pdl=pdl)

    target = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: "a target")))
    monkeypatch.setattr(dispatch.triton, "runtime", target)
    monkeypatch.setattr(dispatch, "make", lambda one, target: compile_slowly(one.aligned, one.pdl))
    monkeypatch.setattr(dispatch, "variant_of", variant)
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(dispatch, "KERNELS", {"store": SimpleNamespace(constexprs=())})
    monkeypatch.setattr(dispatch, "compilations", 0)
    monkeypatch.setattr(dispatch, "_launchers", {})
    device = torch.device("cuda", 0)

    def first_use() -> dispatch.Launcher:
        found = dispatch.launcher_of(("a kernel of the test",), device)
        found.build(True, False)
        found.build(False, False)
        return found

    found = together(*[first_use] * 4)
    assert all(launcher is found[0] for launcher in found)
    assert sorted(compiled) == [(False, False), (True, False)] and dispatch.compilations == 2


@pytest.mark.gpu
def test_first_use_in_two_threads() -> None:
    """Nothing of this spec was compiled before: each kernel is, once, and both threads get the right bits."""
    tokens = {name: make_tokens(SPECS[name], 2 * SPECS[name].ratio + 1, seed=3) for name in ("csa", "hca")}

    def step(name: str, eps: float) -> list[torch.Tensor]:
        with torch.cuda.stream(torch.cuda.Stream(GPU.device)):
            engine = Engine(replace(SPECS[name], norm_eps=eps), GPU, num_slots=1, max_new_tokens=1)
            engine.step([(0, 0, tokens[name])])
            torch.cuda.synchronize()
            return [x.cpu() for x in engine.snapshot()]

    for name in tokens:
        before = dispatch.compilations
        want = step(name, 1.25e-6)
        alone, before = dispatch.compilations - before, dispatch.compilations
        first, second = together(*[partial(step, name, 1.5e-6)] * 2)
        assert dispatch.compilations - before <= alone  # what no spec matters for, such as the plan's, was there
        same(first, second)
        same(first[:2], want[:2])  # of the entries only the norm is another
        same(step(name, 1.5e-6), first)
