"""Compiling what calls will need before they need it, in several threads."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from . import prebuilt
from .build import Variant
from .keys import Key
from .launcher import Launcher, launcher_of, make, multiprocessors, one_thread
from .variants import variant_of

_locks: defaultdict[tuple, threading.Lock] = defaultdict(threading.Lock)
# Whether Triton compiles in several threads at once. Not for AMD: there two threads that begin together may end the process
# (facebookexperimental/triton, pull request 3586).
THREADED = torch.version.hip is None
# What a kernel takes one core to compile, by Triton 3.6: averages over the set v4, or where it has none over those measured, of
# benchmarks/results/compile.jsonl (held by tests/kernels/test_expected.py).
SECONDS = {
    "plan": 0.8, "step": 2.6, "pair": 18.2, "window": 4.6, "store": 0.3, "restore": 0.1, "project": 0.8,
    "train_forward": 1.1, "train_finish": 0.3, "train_spread": 0.5, "train_sum": 0.4, "train_again": 1.9,
}  # fmt: skip
# Of that is Python, which threads do one after the other: on the host of an H200, by `warmup v4`, cold, in first_call.jsonl.
IN_TURN = 0.7


def ways(dependent: bool) -> list[tuple[bool, bool]]:
    """The ways to launch: aligned or not, and dependent as well as ordinary where calls may be dependents."""
    return [*product((True, False), (False, True)[: 1 + dependent])]


def prepare(
    keys: Iterable[Key],
    device: torch.device,
    dependent: Callable[[Key], bool],
    workers: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Builds what calls may need for each key, in all `ways`; `dependent` says of a key whether its calls may be dependents.

    Kernels are made in `workers` threads, and loaded in this one as they come. When one does not compile, those that were
    loaded can be launched, and the rest is not started. Returns how many were built here, or came from packages.
    """
    count = multiprocessors(device)
    missing: dict[Variant, list[Launcher]] = {}  # some keys differ in what their kernels do not depend on
    for launcher in (launcher_of(key, device) for key in dict.fromkeys(keys)):
        for aligned, pdl in ways(dependent(launcher.key)):
            if (aligned, pdl) not in launcher.built:
                missing.setdefault(variant_of(launcher.key, aligned, pdl, count), []).append(launcher)
    if not missing:
        return 0
    built, done, tell = 0, 0, progress or (lambda done, total, words: None)
    with torch.cuda.device(device), ThreadPoolExecutor(workers if THREADED else 1) as pool:
        target = triton.runtime.driver.active.get_current_target()  # of this thread's device, which others do not share
        tell(0, len(missing), expected(missing, target, workers if THREADED else 1))
        jobs = {pool.submit(_make, variant, target): variant for variant in _apart(missing)}
        try:
            for job in as_completed(jobs):
                variant = jobs[job]
                built += sum(launcher.load(variant, job.result()) for launcher in missing[variant])
                done += 1
                tell(done, len(missing), variant.kernel)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt nobody waits for the rest
    return built


def expected(variants: Collection[Variant], target: GPUTarget, workers: int) -> str:
    """How many kernels are prebuilt, and about how long the others take."""
    others = [SECONDS.get(variant.kernel, 1.0) for variant in variants if not prebuilt.covers(variant, target)]
    words = f"{len(variants)} kernels, {len(variants) - len(others)} of them prebuilt"
    if not others:
        return words
    seconds = max(sum(others) / workers, max(others), IN_TURN * len(others))
    return f"{words}; the others take about {max(round(seconds), 1)} s of {workers} cores if Triton's cache has none of them"


def _apart(variants: Iterable[Variant]) -> list[Variant]:
    """Puts kernels with the same arguments far apart: Triton up to 3.6 compiles the host's code once for each kind of
    arguments, and a thread that needs what another one compiles waits.
    """
    before: Counter[object] = Counter()

    def turn(variant: Variant) -> int:
        before[arguments := _kinds(variant)] += 1
        return before[arguments]

    return sorted(variants, key=turn)


def _kinds(variant: Variant) -> tuple:
    return variant.kernel, tuple(kind if kind is None or "*" not in kind else "*" for kind in variant.arguments)


def _make(variant: Variant, target: GPUTarget) -> CompiledKernel:
    with nullcontext() if THREADED else one_thread:
        compiled = make(variant, target)
        with _locks[_kinds(variant)]:  # the host's code, for the loading thread to find in Triton's cache
            triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)
        return compiled
