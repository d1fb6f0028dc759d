"""Launching compiled kernels, in few microseconds of host time."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from .build import INTERPRETED, KERNELS
from .pdl import AVAILABLE
from .variants import variant_of

# Compiled kernels, and placeholders for their constants, by (device, aligned, pdl, key of the call).
_compiled: dict[tuple[int, bool, bool, tuple], tuple] = {}
compilations = 0  # how many were built here


def launch(
    key: tuple[Hashable, ...],
    device: torch.device,
    grid: int,
    values: tuple[object, ...],
    strides: int = 0,
    pdl: bool = False,
) -> None:
    """Launches on the current stream of `device`.

    Args:
        key: what the kernel depends on, all but `aligned` and `pdl`, as `variants.variant_of` takes it.
        values: the kernel's run-time arguments in order, tensors among them, None for what is left out.
        strides: all its strides, or-ed.
        pdl: as a dependent of the launch before.
    """
    if INTERPRETED:
        made = variant_of(key, True, False)
        constants = {**dict(made.constants), "PDL": False, "HARDWARE": False, "ALIGNED": False}
        kernel = KERNELS[made.kernel]
        named = kernel.arg_names[len(values) :]
        kernel[(grid,)](*values, **{name: value for name, value in constants.items() if name in named})
        return
    index = device.index
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(key, device, grid, values, strides, pdl)
        return
    arguments, bits = [], strides
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()  # the launcher asks the driver about every tensor, but takes an address as it is
            bits |= value
        arguments.append(value)
    whole = (index, bits & 15 == 0, pdl, key)
    kernel = _compiled.get(whole)
    if kernel is None:
        kernel = _build(whole)
    kernel[0][(grid, 1, 1)](*arguments, *kernel[1])


def prepare(key: tuple[Hashable, ...], device: torch.device, pdl: bool) -> int:
    """Builds what `launch` may need for a key, aligned or not; with `pdl` as a dependent too. Returns how many it built."""
    before = compilations
    with torch.cuda.device(device):
        for aligned in (True, False):
            for dependent in (False, True)[: 1 + pdl]:
                whole = (device.index, aligned, dependent, key)
                if whole not in _compiled:
                    _build(whole)
    return compilations - before


def _build(whole: tuple[int, bool, bool, tuple]) -> tuple:
    """Compiles for the current device and loads the kernel, which the capture of a CUDA graph may not do."""
    global compilations
    _, aligned, pdl, key = whole
    variant = variant_of(key, aligned, pdl)
    compiled = variant.compile()
    compiled._init_handles()
    compilations += 1
    made = _compiled[whole] = (compiled, (None,) * len(KERNELS[variant.kernel].constexprs))
    return made


def supports_pdl(device: torch.device) -> bool:
    return AVAILABLE and not INTERPRETED and device.type == "cuda" and _is_hopper(device.index or 0)


_hopper: dict[int, bool] = {}


def _is_hopper(index: int) -> bool:
    if index not in _hopper:
        _hopper[index] = torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
    return _hopper[index]
