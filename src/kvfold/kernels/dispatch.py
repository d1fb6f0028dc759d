"""Launching compiled kernels, in few microseconds of host time."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch

from .build import INTERPRETED, KERNELS
from .pdl import AVAILABLE
from .variants import variant_of

compilations = 0  # how many kernels were built here
_launchers: dict[tuple[int | None, tuple], Launcher] = {}
_PLAIN = (int, float, type(None))
# Compiling is for one thread at a time, and so is interpreting: Triton's interpreter keeps the place in the grid in a global.
_one_thread = threading.RLock()


class Launcher:
    """Launches the kernels of one key on one device: the same calls in the four variants of aligned and dependent.

    A state or a plan keeps the launcher of its last call, as to hash a key takes 8 us of host time.
    """

    __slots__ = ("built", "device", "key")

    def __init__(self, key: tuple[Hashable, ...], device: torch.device) -> None:
        self.key, self.device = key, device
        self.built: dict[tuple[bool, bool], tuple] = {}

    def __call__(self, grid: int, values: tuple[object, ...], strides: int = 0, pdl: bool = False) -> None:
        """Launches on the current stream of the device.

        Args:
            values: the kernel's run-time arguments in order, tensors among them, None for what is left out.
            strides: all its strides, or-ed.
            pdl: as a dependent of the launch before.
        """
        if INTERPRETED:
            self._interpret(grid, values)
            return
        if self.device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(self.device):
                self(grid, values, strides, pdl)
            return
        arguments, bits = [], strides
        for value in values:
            if value.__class__ not in _PLAIN:
                value = value.data_ptr()  # the launcher asks the driver about every tensor, but takes an address as it is
                bits |= value
            arguments.append(value)
        kernel = self.built.get((bits & 15 == 0, pdl)) or self.build(bits & 15 == 0, pdl)
        kernel[0][(grid, 1, 1)](*arguments, *kernel[1])

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
            # The compiled kernel, and placeholders for its constants.
            made = self.built[aligned, pdl] = (compiled, (None,) * len(KERNELS[variant.kernel].constexprs))
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
