"""Launching compiled kernels, in few microseconds of host time."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
import triton
from triton.compiler import CompiledKernel

from .build import INTERPRETED, KERNELS
from .pdl import AVAILABLE
from .variants import variant_of

compilations = 0  # how many kernels were built here
_launchers: dict[tuple[int | None, tuple], Launcher] = {}
_PLAIN = (int, float, type(None))
# Who listens to launches, such as Triton's profiler; before Triton 3.4 hooks were attributes of the class.
_HOOKS = triton.knobs.runtime if hasattr(triton, "knobs") else CompiledKernel
# Compiling is for one thread at a time, and so is interpreting: Triton's interpreter keeps the place in the grid in a global.
_one_thread = threading.RLock()


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
        global compilations
        with _one_thread:
            if (aligned, pdl) in self.built:  # by another thread, since this one looked
                return self.built[aligned, pdl]
            variant = variant_of(self.key, aligned, pdl)
            compiled = variant.compile()
            compiled._init_handles()
            compilations += 1
            constants = (None,) * len(KERNELS[variant.kernel].constexprs)  # placeholders
            made = compiled, compiled.run, compiled.function, compiled.packed_metadata, constants
            self.built[aligned, pdl] = made
            return made

    def _interpret(self, grid: int, values: tuple[object, ...]) -> None:
        made = variant_of(self.key, True, False)
        constants = {**dict(made.constants), "PDL": False, "HARDWARE": False, "ALIGNED": False}
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


def prepare(key: tuple[Hashable, ...], device: torch.device, pdl: bool) -> int:
    """Builds what a call may need for a key, aligned or not; with `pdl` as a dependent too. Returns how many it built."""
    launcher, built = launcher_of(key, device), 0
    with torch.cuda.device(device), _one_thread:
        for aligned in (True, False):
            for dependent in (False, True)[: 1 + pdl]:
                if (aligned, dependent) not in launcher.built:
                    launcher.build(aligned, dependent)
                    built += 1
    return built


def supports_pdl(device: torch.device) -> bool:
    return AVAILABLE and not INTERPRETED and device.type == "cuda" and _is_hopper(device.index or 0)


_hopper: dict[int, bool] = {}


def _is_hopper(index: int) -> bool:
    if index not in _hopper:
        _hopper[index] = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
    return _hopper[index]
