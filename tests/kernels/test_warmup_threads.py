"""`warmup` compiles in several threads what it loads in one: each kernel once, and what one failure leaves can be used."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from test_aot import python

import kvfold
from kvfold import V4_CSA
from kvfold.backend_triton import launcher as dispatch
from kvfold.backend_triton import prepare as preparing
from kvfold.backend_triton.build import Variant
from kvfold.backend_triton.keys import plan_key, window_key
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile import choices as selection
from kvfold.precompile.combinations import TARGETS

DEVICE, TARGET = torch.device("cuda", 0), TARGETS["sm_90"]
KEYS = [plan_key(ratio, 1, False, False) for ratio in (1, 2, 4, 8, 16, 32)]  # two kernels each, as none is a dependent


class Compiler:
    """Stands for Triton: which variants it was given, in which threads, and at most how many at once."""

    def __init__(self, during: Callable[[Variant], None]) -> None:
        self.during, self.given, self.threads, self.now, self.most = during, [], set(), 0, 0
        self.lock = threading.Lock()

    def __call__(self, variant: Variant, target: object = None) -> SimpleNamespace:
        with self.lock:
            self.given.append(variant)
            self.threads.add(threading.current_thread())
            self.now += 1
            self.most = max(self.most, self.now)
        assert target in (None, TARGET)
        try:
            self.during(variant)
        finally:
            with self.lock:
                self.now -= 1
        made = {"run": "run", "function": "function", "packed_metadata": "metadata", "src": None, "metadata": None}
        return SimpleNamespace(_init_handles=self.loaded, **made)

    @staticmethod
    def loaded() -> None:
        assert threading.current_thread() is threading.main_thread()


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compiler]:
    """Puts a `Compiler` in the place of Triton's, on a device that is taken to be there and has no kernels yet."""
    active = SimpleNamespace(get_current_target=lambda: TARGET, launcher_cls=lambda source, metadata: None)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(dispatch, "_count_multiprocessors", lambda index: 132)
    monkeypatch.setattr(dispatch, "KERNELS", {name: SimpleNamespace(constexprs=(3, 4)) for name in dispatch.KERNELS})
    monkeypatch.setattr(dispatch, "compilations", 0)
    monkeypatch.setattr(dispatch, "_launchers", {})
    monkeypatch.setattr(preparing, "THREADED", True)

    def put(during: Callable[[Variant], None] = lambda variant: time.sleep(0.01)) -> Compiler:
        compiler = Compiler(during)
        monkeypatch.setattr(Variant, "compile", lambda variant, target=None: compiler(variant, target))
        return compiler

    return put


def prepare(workers: int, keys: list[tuple] = KEYS, dependent: bool = False) -> int:
    return preparing.prepare(keys, DEVICE, lambda key: dependent, workers)


def built() -> list[tuple]:
    """What launchers have, all of it whole."""
    found = [one for launcher in dispatch._launchers.values() for one in launcher.built.values()]
    assert all(one[1:] == ("run", "function", "metadata", (None, None)) for one in found)
    return found


def test_several_threads(compiles: Callable[..., Compiler]) -> None:
    start = threading.Barrier(4)
    compiler = compiles(lambda variant: start.wait(60))  # goes on when there are four
    assert prepare(4, KEYS * 2) == 12 == dispatch.compilations == len(built()) == len(set(compiler.given))
    assert len(compiler.threads) == compiler.most == 4 and threading.main_thread() not in compiler.threads
    assert all(set(launcher.built) == {(True, False), (False, False)} for launcher in dispatch._launchers.values())
    assert prepare(4) == 0 and prepare(4, []) == 0 and len(compiler.given) == 12
    compiler.during = lambda variant: None
    assert prepare(4, KEYS[:3], dependent=True) == 6 and all(variant.pdl for variant in compiler.given[12:])


@pytest.mark.parametrize("threaded, workers", [(True, 1), (False, 4)])
def test_one_after_the_other(
    compiles: Callable[..., Compiler], monkeypatch: pytest.MonkeyPatch, threaded: bool, workers: int
) -> None:
    """Where that is asked for, and where Triton does no more: then nothing else is compiled beside it either."""
    monkeypatch.setattr(preparing, "THREADED", threaded)
    compiler = compiles()
    calls = threading.Thread(target=lambda: dispatch.Launcher(plan_key(64, 1, False, False), DEVICE).build(True, False))
    compiler.loaded = lambda: None  # by the call, in its thread
    calls.start()
    assert prepare(workers) == 12 == len(built())
    calls.join(60)
    assert len(compiler.given) == 13 and compiler.most <= 1 + threaded


def test_one_does_not_compile(compiles: Callable[..., Compiler]) -> None:
    """Its error comes, what was loaded stays, and what was not begun is left for the next time."""
    broken = variant_of(KEYS[1], False, False)

    def during(variant: Variant) -> None:
        if variant == broken:
            while not dispatch.compilations:
                time.sleep(0.001)
            raise RuntimeError("ptxas")
        time.sleep(0.5 if broken in compiler.given else 0.01)  # time to be heard

    compiler = compiles(during)
    with pytest.raises(RuntimeError, match="ptxas"):
        prepare(2)
    there = len(built())
    assert there == dispatch.compilations and 1 <= there < len(compiler.given) < 12
    assert compiler.now == 0  # nobody works on
    compiler.during = lambda variant: None
    assert prepare(2) == 12 - there and len(built()) == 12 == dispatch.compilations


def test_a_call_was_first(compiles: Callable[..., Compiler]) -> None:
    """What a call builds while `warmup` compiles it is the call's, and counted once."""
    launcher = dispatch.launcher_of(KEYS[2], DEVICE)
    called = []

    def during(variant: Variant) -> None:
        if variant == variant_of(KEYS[2], True, False) and not called:
            called.append(None)
            called.append(launcher.build(True, False))

    compiler = compiles(during)
    compiler.loaded = lambda: None
    assert prepare(3) == 11 and dispatch.compilations == 12 == len(built())
    assert launcher.built[True, False] is called[1] and len(compiler.given) == 13


def test_keys_of_one_kernel(compiles: Callable[..., Compiler]) -> None:
    """It is compiled once, and each launcher has it."""
    types = (torch.bfloat16, torch.float32, None, None, True)
    keys = [window_key(V4_CSA, None, bound, types, 1) for bound in (4, 200)]
    assert keys[0] != keys[1] and variant_of(keys[0], True, False) == variant_of(keys[1], True, False)
    compiler = compiles()
    assert prepare(4, keys, dependent=True) == 8 == len(built()) and len(compiler.given) == 4


def test_as_many_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((3, 3), (40, 16)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False)
        assert selection.check_workers(None) == workers
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert selection.check_workers(None) == 5 and selection.check_workers(256) == 256
    given = []
    monkeypatch.setattr(
        preparing, "prepare", lambda keys, device, dependent, workers, progress: given.append(workers) or len(given)
    )
    monkeypatch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda device, interpreted: DEVICE)
    assert [kvfold.warmup([], []), kvfold.warmup([], [], workers=7)] == [1, 2] and given == [5, 7]


REAL = """
import json, os, sys, threading
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import triton
from kvfold import V4_INDEXER
from kvfold.backend_triton import launcher as dispatch
from kvfold.backend_triton import prepare as preparing
from kvfold.precompile.combinations import TARGETS
from kvfold.backend_triton.build import Variant
from kvfold.backend_triton.keys import RestoreKey, plan_key

triton.runtime.driver = SimpleNamespace(
    active=SimpleNamespace(get_current_target=lambda: TARGETS["sm_90"], launcher_cls=lambda source, metadata: None)
)
torch.cuda.device = lambda device: nullcontext()
dispatch._count_multiprocessors = lambda index: 132
threads, compile = set(), Variant.compile
found = {}

def here(variant, target):
    threads.add(threading.get_ident())
    return compile(variant, target)

def load(launcher, variant, compiled):
    name = f"{variant.kernel} {variant.aligned}"
    found[name] = [compiled.asm["ptx"], compiled.asm["cubin"].hex()]
    return True

Variant.compile, dispatch.Launcher.load = here, load
keys = [plan_key(4, 1, False, False), RestoreKey(V4_INDEXER, torch.float32, 4)]
results = []
for workers in (2, 1):  # threads first, as Triton remembers what it read of the kernels
    os.environ["TRITON_CACHE_DIR"] = f"{sys.argv[1]}/{workers}"
    threads.clear()
    count = preparing.prepare(keys, torch.device("cuda", 0), lambda key: False, workers)
    results.append([count, len(threads), len(os.listdir(os.environ["TRITON_CACHE_DIR"])) > 0, dict(found)])
    found.clear()
print(json.dumps(results))
"""


@pytest.mark.skipif(not preparing.THREADED, reason="this Triton compiles in one thread")
def test_threads_compile_the_same(tmp_path: Path) -> None:
    """To the byte, each in a process and with a cache that have seen none of it."""
    (several, alone) = json.loads(python(tmp_path, REAL, tmp_path / "caches"))
    assert several[:3] == [4, 2, True] and alone[:3] == [4, 1, True]
    assert several[3] == alone[3] and len(alone[3]) == 4
    assert all(".target sm_90" in ptx and len(cubin) > 2000 for ptx, cubin in alone[3].values())
