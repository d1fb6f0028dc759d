"""Compiling what calls will need before they need it, in several threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from .build import Variant
from .keys import Key
from .launcher import Launcher, launcher_of, multiprocessors, one_thread
from .variants import variant_of

# Whether Triton compiles in several threads at once. Not for AMD: there two threads that begin together may end the process
# (facebookexperimental/triton, pull request 3586).
THREADED = torch.version.hip is None


def prepare(keys: Iterable[Key], device: torch.device, dependent: Callable[[Key], bool], workers: int) -> int:
    """Builds what calls may need for each key, aligned or not; as a dependent too where `dependent` says so of the key.

    They are compiled in `workers` threads, and loaded in this one as they come. When one does not compile, those that were
    loaded can be launched, and what was not begun is left. Returns how many were built here.
    """
    count = multiprocessors(device)
    wanted: dict[Variant, list[Launcher]] = {}  # some keys differ in what their kernels do not depend on
    for launcher in (launcher_of(key, device) for key in dict.fromkeys(keys)):
        for aligned, pdl in product((True, False), (False, True)[: 1 + dependent(launcher.key)]):
            if (aligned, pdl) not in launcher.built:
                wanted.setdefault(variant_of(launcher.key, aligned, pdl, count), []).append(launcher)
    if not wanted:
        return 0
    built = 0
    with torch.cuda.device(device), ThreadPoolExecutor(workers if THREADED else 1) as pool:
        target = triton.runtime.driver.active.get_current_target()  # of this thread's device, which others do not share
        jobs = {pool.submit(_compile, variant, target): variant for variant in wanted}
        try:
            for job in as_completed(jobs):
                built += sum(launcher.load(jobs[job], job.result()) for launcher in wanted[jobs[job]])
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt nobody waits for the rest
    return built


def _compile(variant: Variant, target: GPUTarget) -> CompiledKernel:
    with nullcontext() if THREADED else one_thread:
        return variant.compile(target)
