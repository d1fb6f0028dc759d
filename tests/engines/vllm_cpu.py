"""What vLLM's kernels need to run interpreted on a CPU. Imported before any of its classes is made."""

from __future__ import annotations

import importlib

import triton
import triton.language as tl

from benchmarks.lib.vllm_platform import take_no_platform

KERNELS = (
    "v4.common.ops.fused_compress_quant_cache",
    "v4.common.ops.fused_indexer_q",
    "v41.common.ops.fused_compress_quant_cache",
)


@triton.jit
def e2m1(x):
    """The code of the nearest e2m1 number, ties to even."""
    at = tl.abs(x)
    up = (at > 0.25).to(tl.uint8) + (at >= 0.75).to(tl.uint8) + (at > 1.25).to(tl.uint8) + (at >= 1.75).to(tl.uint8)
    up += (at > 2.5).to(tl.uint8) + (at >= 3.5).to(tl.uint8) + (at > 5.0).to(tl.uint8)
    return up | ((x < 0).to(tl.uint8) << 3)


@triton.jit
def e2m1_pair(low, high):
    return e2m1(low) | (e2m1(high) << 4)


take_no_platform("cpu")
for name in KERNELS:
    importlib.import_module(f"vllm.models.deepseek_{name}")._fp32x2_to_fp4x2 = e2m1_pair  # vLLM's is an instruction of a GPU
