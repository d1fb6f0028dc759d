"""Compiling kernels: one function, for launches, for `warmup` and for ahead-of-time builds, so that all three build the same.

Triton's own just-in-time dispatch is not used on a GPU: it specializes on the values of integers, and is slow to read 40
arguments (docs/notes/0065). Here every argument has a fixed type, and what a kernel may be specialized on is in `Variant`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import zip_longest

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from .args import LOOSE, STRIDE, Schedule, Target
from .kernels import entry, plan, project, restore, weights, window
from .table import MULTIPROCESSORS

KERNELS = {
    "step": entry.step_kernel,
    "pair": entry.pair_kernel,
    "window": window.window_kernel,
    "store": entry.store_kernel,
    "plan": plan.plan_kernel,
    "restore": restore.restore_kernel,
    "project": project.project_kernel,
    "project_add": project.add_kernel,
    "dequantize": weights.dequantize_kernel,
}
INTERPRETED = not isinstance(entry.step_kernel, JITFunction)


def facts_of(target: GPUTarget) -> Target:
    """The facts of this GPU that kernels choose by."""
    nvidia = target.backend == "cuda"
    return Target(
        BF16_CONVERSION=nvidia,
        E4M3_CONVERSION=nvidia and target.arch >= 89,
        FAST_DIVISION=nvidia,
        COHERENT_STORES=nvidia,
        INLINE_PTX=nvidia,
        THREADS_PER_WARP=target.warp_size,
        BF16_PRODUCTS=True,
        SHARED_BYTES=_shared_bytes(target) - 2048,  # for what a kernel has besides its tiles
    )


def _shared_bytes(target: GPUTarget) -> int:
    """Shared memory that a program may have, by the vendors' tables."""
    if target.backend == "cuda":
        large = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
        return large.get(target.arch, 99) << 10
    return (160 if target.arch == "gfx950" else 64) << 10


@dataclass(frozen=True)
class Variant:
    """One of `KERNELS`, with all that it is compiled for.

    arguments: the type of each run-time argument in order, as in args.py; None for those that this variant leaves out.
    constants: compile-time arguments by name. registers: bound on registers per thread, 0 for none. aligned: whether every
    pointer and stride is a multiple of 16 (bytes, elements), so that accesses are 16 bytes wide.
    """

    kernel: str
    arguments: tuple[str | None, ...]
    constants: tuple[tuple[str, object], ...]
    num_warps: int
    registers: int = 0
    aligned: bool = True
    pdl: bool = False
    multiprocessors: int = MULTIPROCESSORS

    def compile(self, target: GPUTarget | None = None) -> CompiledKernel:
        """Compiles it for `target`, or for the current device."""
        target = target or triton.runtime.driver.active.get_current_target()
        return triton.compile(self.source_for(target), target=target, options=self.options_for(target))

    def source_for(self, target: GPUTarget) -> ASTSource:
        kernel = KERNELS[self.kernel]
        constants = {name: wrapped(value) for name, value in self.constants_for(target).items()}
        signature = {name: kind or "constexpr" for name, kind in zip_longest(kernel.arg_names, self.arguments)}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if self.aligned and (kind == STRIDE or kind.startswith("*"))
        }
        signature = {name: "i64" if kind == STRIDE else kind.removeprefix(LOOSE) for name, kind in signature.items()}
        return ASTSource(kernel, signature, constants, aligned)

    def options_for(self, target: GPUTarget) -> dict[str, object]:
        """Options of the compiler. The bits must not depend on what it fuses, so fused operations are written out."""
        options: dict[str, object] = {"num_warps": self.num_warps, "enable_fp_fusion": False, "launch_pdl": self.pdl}
        if self.registers and target.backend == "cuda":
            options["maxnreg"] = self.registers
        return options

    def constants_for(self, target: GPUTarget) -> dict[str, object]:
        """Compile-time arguments, with facts of the launch and of the GPU; None for arguments that are left out."""
        names = zip(KERNELS[self.kernel].arg_names, self.arguments, strict=False)  # the constants stand behind
        constants = {name: None for name, kind in names if kind is None} | dict(self.constants)
        for name, value in constants.items():
            if isinstance(value, Schedule):
                constants[name] = replace(value, PDL=self.pdl, MULTIPROCESSORS=self.multiprocessors, TARGET=facts_of(target))
        if "ALIGNED" in constants:
            constants["ALIGNED"] = self.aligned
        return constants


def wrapped(value):
    """A constant as Triton takes it: the fields of a dataclass are constants, too."""
    if not is_dataclass(value):
        return value
    return type(value)(**{field.name: tl.constexpr(wrapped(getattr(value, field.name))) for field in fields(value)})
