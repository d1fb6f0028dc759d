"""Launching compiled kernels, in few microseconds of host time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from .build import INTERPRETED, KERNELS, Variant
from .kernels.pdl import AVAILABLE
from .variants import variant_of

compilations = 0  # how many kernels were built here
_launchers: dict[tuple[int | None, tuple], Launcher] = {}
_PLAIN = (int, float, type(None))
# Who listens to launches, such as Triton's profiler; before Triton 3.4 hooks were attributes of the class.
_HOOKS = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel
# What calls compile is for one thread at a time, so that none compiles what another is at; and so is interpreting: Triton's
# interpreter keeps the place in the grid in a global.
_one_thread = threading.RLock()
# Whether Triton compiles in several threads at once: since it has a mode for that (3.5) it locks what it knows of functions.
# Not for AMD: there two threads that begin together may end the process (facebookexperimental/triton, pull request 3586).
# 11 kernels for long steps took two cores 56.8 s in one thread, 33.6 in two (Triton 3.6): only its Python part takes turns.
THREADED = hasattr(triton.runtime, "_async_compile") and torch.version.hip is None


def pack(*values: object) -> tuple[tuple[object, ...], int]:
    """Run-time arguments of a kernel as a launch takes them, and their addresses or-ed.

    The launcher asks the driver about every tensor, but takes an address as it is.
    """
    if INTERPRETED:
        return values, 0
    found, bits = [], 0
    for value in values:
        if value.__class__ not in _PLAIN:
            value = value.data_ptr()  # type: ignore[attr-defined]
            bits |= value
        found.append(value)
    return tuple(found), bits


def _hooked() -> bool:
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))


class Launcher:
    """Launches the kernels of one key on one device: the same calls in the four variants of aligned and dependent.

    A state or a plan keeps the launcher of its last call, as to hash a key takes 8 us of host time.
    """

    __slots__ = ("built", "device", "key")

    def __init__(self, key: tuple[Hashable, ...], device: torch.device) -> None:
        self.key, self.device = key, device
        self.built: dict[tuple[bool, bool], tuple] = {}

    def __call__(self, grid: int, values: tuple[object, ...], bits: int, pdl: bool = False) -> None:
        """Launches on the current stream of the device.

        Args:
            values: the kernel's run-time arguments in order, tensors as `pack` makes them, None for what is left out.
            bits: all their addresses and all strides, or-ed.
            pdl: as a dependent of the launch before.
        """
        if INTERPRETED:
            self._interpret(grid, values)
            return
        index = torch._C._cuda_getDevice()
        if self.device.index != index:
            with torch.cuda.device(self.device):
                self(grid, values, bits, pdl)
            return
        aligned = bits & 15 == 0
        built = self.built.get((aligned, pdl)) or self.build(aligned, pdl)
        compiled, run, function, metadata, constants = built
        if _hooked():
            compiled[grid, 1, 1](*values, *constants)
        else:  # what that does where nobody listens
            stream = torch._C._cuda_getCurrentRawStream(index)
            run(grid, 1, 1, stream, function, metadata, None, None, None, *values, *constants)

    def build(self, aligned: bool, pdl: bool) -> tuple:
        """Compiles for the current device and loads the kernel, which the capture of a CUDA graph may not do."""
        with _one_thread:
            if (aligned, pdl) not in self.built:  # by another thread, since this one looked
                variant = variant_of(self.key, aligned, pdl)
                self.load(variant, variant.compile())
            return self.built[aligned, pdl]

    def load(self, variant: Variant, compiled: CompiledKernel) -> bool:
        """Loads a compiled kernel on the current device and keeps it, unless one is there. Returns whether it did."""
        global compilations
        with _one_thread:
            if (variant.aligned, variant.pdl) in self.built:
                return False
            compiled._init_handles()
            compilations += 1
            constants = (None,) * len(KERNELS[variant.kernel].constexprs)  # placeholders
            made = compiled, compiled.run, compiled.function, compiled.packed_metadata, constants
            self.built[variant.aligned, variant.pdl] = made
            return True

    def _interpret(self, grid: int, values: tuple[object, ...]) -> None:
        made = variant_of(self.key, True, False)
        constants = {**dict(made.constants), "ALIGNED": False}
        kernel = KERNELS[made.kernel]
        named = kernel.arg_names[len(values) :]
        with _one_thread:
            kernel[(grid,)](*values, **{name: value for name, value in constants.items() if name in named})


def launcher_of(key: tuple[Hashable, ...], device: torch.device) -> Launcher:
    """The one launcher of a key, which names what a kernel depends on as `variants.variant_of` takes it."""
    found = _launchers.get((device.index, key))
    if found is None:
        found = _launchers.setdefault((device.index, key), Launcher(key, device))  # one for all threads
    return found


def prepare(
    keys: Iterable[tuple[Hashable, ...]], device: torch.device, dependent: Callable[[tuple], bool], workers: int
) -> int:
    """Builds what calls may need for each key, aligned or not; as a dependent too where `dependent` says so of the key.

    They are compiled in `workers` threads, and loaded in this one as they come. When one does not compile, those that were
    loaded can be launched, and what was not begun is left. Returns how many were built here.
    """
    wanted: dict[Variant, list[Launcher]] = {}  # some keys differ in what their kernels do not depend on
    for launcher in (launcher_of(key, device) for key in dict.fromkeys(keys)):
        for aligned, pdl in product((True, False), (False, True)[: 1 + dependent(launcher.key)]):
            if (aligned, pdl) not in launcher.built:
                wanted.setdefault(variant_of(launcher.key, aligned, pdl), []).append(launcher)
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
    alone: AbstractContextManager = nullcontext() if THREADED else _one_thread
    with alone:
        return variant.compile(target)


def supports_pdl(device: torch.device) -> bool:
    return AVAILABLE and not INTERPRETED and device.type == "cuda" and _is_hopper(device.index or 0)


_hopper: dict[int, bool] = {}


def _is_hopper(index: int) -> bool:
    if index not in _hopper:
        _hopper[index] = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
    return _hopper[index]
