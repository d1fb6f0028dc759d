"""Compiling kernels: one function, for dispatch, for `warmup` and for ahead-of-time builds, so that all three build the same.

Triton's own just-in-time dispatch is not used on a GPU: it specializes on the values of integers, and reading 40 arguments
costs it 50 us per call. Here every argument has a fixed type, and what a kernel may be specialized on is in `Variant`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from .args import How, Target
from .kernels import entry as step
from .kernels import pair, plan, snapshot, store_rows, window

KERNELS = {
    "step": step.step_kernel,
    "pair": pair.pair_kernel,
    "window": window.window_kernel,
    "store": store_rows.store_kernel,
    "plan": plan.plan_kernel,
    "restore": snapshot.restore_kernel,
}

# The type of each argument that is no constant, by name. Strides and row counts of pools are 64-bit.
TYPES = {
    "kv_score": "*bf16", "kv_stride": "i64", "num_tokens": "i32", "ape": "*fp32", "items": "*i32", "num_items": "*i32",
    "state_rows": "*fp32", "state_tags": "*i32", "num_slots": "i32", "ring": "i32", "rows": "*fp32", "pooled": "*fp32",
    "entry_slots": "*i64", "entry_capacity": "i32", "norm_weight": "*fp32", "rope": "*fp32", "max_position": "i32",
    "pages": "*u8", "page_stride": "i64", "scales": "*u8", "scales_stride": "i64", "rows_per_page": "i32",
    "cache_slots": "i64", "cache_scale": "fp32", "errors": "*i32",
    "start_pos": "*i32", "cu_seqlens": "*i32", "state_slots": "*i32", "batch": "i32", "max_new_tokens": "i32",
    "max_tokens": "i32", "own_start_pos": "*i32", "own_cu_seqlens": "*i32", "cu_entries": "*i32", "item_capacity": "i32",
    "entry_items": "*i32", "table": "*i32", "table_width": "i32", "num_chunks": "i32",
    "kv_pool": "*fp32", "kv_page_stride": "i64", "kv_row_stride": "i64", "kv_pages": "i32", "kv_table": "*i32",
    "kv_width": "i32",
    "score_pool": "*fp32", "score_page_stride": "i64", "score_row_stride": "i64", "score_pages": "i32", "score_table": "*i32",
    "score_width": "i32", "page_size": "i32", "workspace": "*i64", "arrivals": "*i32",
    "snap_table": "*i32", "snap_width": "i32", "snap_page_size": "i32", "snap_rows": "*fp32", "snap_tags": "*i32",
    "num_snaps": "i32", "snap_ids": "*i32", "slots": "*i32",
}  # fmt: skip
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def facts_of(target: GPUTarget) -> Target:
    """What kernels for this GPU are built by."""
    nvidia = target.backend == "cuda"
    facts = Target(
        BF16_CONVERSION=nvidia,
        E4M3_CONVERSION=nvidia and target.arch >= 89,
        FAST_DIVISION=nvidia,
        COHERENT_STORES=nvidia,
        INLINE_PTX=nvidia,
        THREADS_PER_WARP=target.warp_size,
    )
    return Target(*map(tl.constexpr, astuple(facts)))


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled.

    Attributes:
        kernel: a key of `KERNELS`.
        constants: compile-time arguments by name; None for pointers that this variant leaves out.
        pointers: the types of pointers that are not as in `TYPES`, by name.
        aligned: whether every pointer and stride is a multiple of 16 (bytes, elements), so that accesses are 16 bytes wide.
        pdl: launched as a dependent of the launch before it.
        registers: bound on registers per thread, 0 for none.
    """

    kernel: str
    constants: tuple[tuple[str, object], ...]
    num_warps: int
    pointers: tuple[tuple[str, str], ...] = field(default=())
    aligned: bool = True
    pdl: bool = False
    registers: int = 0

    def compile(self, target: GPUTarget | None = None) -> CompiledKernel:
        """For `target`, or for the current device."""
        kernel, constants = KERNELS[self.kernel], dict(self.constants)
        types = dict(self.pointers)
        target = target or triton.runtime.driver.active.get_current_target()
        facts = tl.constexpr(facts_of(target))
        for name, value in constants.items():
            if isinstance(value, How):
                constants[name] = replace(value, PDL=tl.constexpr(self.pdl), TARGET=facts)
        if "ALIGNED" in kernel.arg_names:
            constants["ALIGNED"] = self.aligned
        # The two compressors of a pair have the same arguments, told apart by their ends.
        plain = {name: name.removesuffix("_0").removesuffix("_1") for name in kernel.arg_names}
        signature = {
            name: "constexpr" if name in constants else types.get(name, TYPES.get(plain[name])) for name in kernel.arg_names
        }
        aligned = [["tt.divisibility", 16]]
        attributes = {
            (i,): aligned
            for i, (name, kind) in enumerate(signature.items())
            if self.aligned and (kind.startswith("*") or (name not in constants and plain[name].endswith("_stride")))
            if (self.kernel, name) != ("window", "kv_stride")  # see `pool_slice`
        }
        # The bits must not depend on what the compiler fuses; the fused operations are written out.
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False, "launch_pdl": self.pdl}
        if self.registers and target.backend == "cuda":
            options["maxnreg"] = self.registers
        return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


INTERPRETED = not isinstance(step.step_kernel, JITFunction)
