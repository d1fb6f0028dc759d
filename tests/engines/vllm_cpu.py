"""What vLLM's kernels need to run interpreted on a CPU. Imported before any of its classes is made."""

from __future__ import annotations

import triton
import triton.language as tl
from vllm.models.deepseek_v4.common.ops import fused_compress_quant_cache, fused_indexer_q
from vllm.models.deepseek_v41.common.ops import fused_compress_quant_cache as fused_v41
from vllm.platforms import current_platform

# Without binaries vLLM knows of no platform, and asks it these.
type(current_platform).device_type, type(current_platform).num_compute_units = "cpu", lambda *_: 1


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


for module in (fused_compress_quant_cache, fused_indexer_q, fused_v41):
    module._fp32x2_to_fp4x2 = e2m1_pair  # vLLM's is an instruction of a GPU
