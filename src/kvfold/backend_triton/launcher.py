"""Launching compiled kernels, in a few microseconds of host time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from . import prebuilt
from .build import INTERPRETED, KERNELS, Variant
from .keys import Key
from .table import MULTIPROCESSORS
from .variants import variant_of

compilations = 0  # how many kernels were built here, or loaded from a package
_launchers: dict[tuple[int | None, Key], Launcher] = {}
_PLAIN = (int, float, type(None))
_HOOKS = triton.knobs.runtime  # who listens to launches, such as Triton's profiler
# Calls compile in one thread at a time, so that no two compile the same. They interpret in one thread at a time, too: Triton's
# interpreter keeps the place in the grid in a global.
one_thread = threading.RLock()


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


def address(tensor: torch.Tensor | None) -> object:
    """A tensor for `pack` whose alignment does not matter."""
    return tensor if INTERPRETED or tensor is None else tensor.data_ptr()


def _hooked() -> bool:
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True))


class Launcher:
    """Launches the kernels of one key on one device, in four variants: aligned or not, dependent or not.

    A state or a plan keeps the launcher of its last call, as hashing a key takes long (docs/notes/0011).
    """

    __slots__ = ("built", "device", "key")

    def __init__(self, key: Key, device: torch.device) -> None:
        self.key, self.device = key, device
        self.built: dict[tuple[bool, bool], tuple] = {}

    def __call__(self, grid: int, values: Sequence[object], bits: int, pdl: bool = False) -> None:
        """Launches on the current stream of the device; `pdl`: as a dependent of the launch before.

        values: the kernel's run-time arguments in order, as `pack` makes them, None for what is left out. bits: all their
        addresses and all strides, or-ed.
        """
        if INTERPRETED:
            variant = variant_of(self.key, True, False)
            with one_thread:
                KERNELS[variant.kernel][(grid,)](*values, **dict(variant.constants))
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
        """Makes the kernel for the current device and loads it, which the capture of a CUDA graph may not do."""
        with one_thread:
            if (aligned, pdl) not in self.built:  # by another thread, since this one looked
                variant = variant_of(self.key, aligned, pdl, multiprocessors(self.device))
                self.load(variant, make(variant, triton.runtime.driver.active.get_current_target()))
            return self.built[aligned, pdl]

    def load(self, variant: Variant, compiled: CompiledKernel) -> bool:
        """Loads a compiled kernel on the current device and keeps it, unless one is there. Returns whether it did."""
        global compilations
        with one_thread:
            if (variant.aligned, variant.pdl) in self.built:
                return False
            compiled._init_handles()
            compilations += 1
            constants = (None,) * len(KERNELS[variant.kernel].constexprs)  # placeholders
            made = compiled, compiled.run, compiled.function, compiled.packed_metadata, constants
            self.built[variant.aligned, variant.pdl] = made
            return True


def make(variant: Variant, target: GPUTarget) -> CompiledKernel:
    """Takes the kernel from a package, or has Triton compile it."""
    return prebuilt.load(variant, target) or variant.compile(target)


def launcher_of(key: Key, device: torch.device) -> Launcher:
    """The one launcher of a key, which has all that a kernel depends on, as `variants.variant_of` takes it."""
    found = _launchers.get((device.index, key))
    if found is None:
        found = _launchers.setdefault((device.index, key), Launcher(key, device))  # one for all threads
    return found


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; for a CPU, where kernels are interpreted, a number that stands in."""
    return _count_multiprocessors(device.index or 0) if device.type == "cuda" else MULTIPROCESSORS


@cache
def _count_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def supports_pdl(device: torch.device) -> bool:
    return not INTERPRETED and device.type == "cuda" and _is_hopper(device.index or 0)


@cache
def _is_hopper(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
