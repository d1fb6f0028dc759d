"""Numbers of kv_score that are still in parts, as a projection leaves them for a short step: each is their sum.

Who reads a number adds it up, in the order of contract.py, so nobody has to wait for whoever makes its parts last.
"""

import triton
import triton.language as tl

from ... import contract
from .record import bf16_bits, bf16_value

CHUNKS = tl.constexpr(contract.CHUNKS_OF_HIDDEN)
PAIRS = tl.constexpr(contract.CHUNKS_OF_HIDDEN // 2)


@triton.jit
def rounded_to(x, KIND: tl.constexpr, ROUNDED: tl.constexpr, BF16_CONVERSION: tl.constexpr):
    """fp32 as it is stored in dtype KIND; ROUNDED: to the nearest bf16 first, where that is fp32."""
    if tl.bfloat16 == KIND:
        x = bf16_bits(x, BF16_CONVERSION).to(tl.bfloat16, bitcast=True)
    elif ROUNDED:
        x = bf16_value(bf16_bits(x, BF16_CONVERSION))
    return x


@triton.jit
def sum_parts(at, step, there, PARTS: tl.constexpr):
    """Numbers whose parts stand `step` elements apart from `at` on: a chunk each, or a pair of chunks. Past L1.

    A dependent launch may begin when its multiprocessor still holds what stood there before.
    """
    found = ()
    for i in tl.static_range(PARTS):
        found = found + (tl.load(at + i * step, mask=there, other=0.0, cache_modifier=".cg"),)
    EACH: tl.constexpr = PARTS // PAIRS
    total = found[0] + found[1] if EACH == 2 else found[0]
    total += 0.0  # as who sums all of hidden_dim begins with 0: no sum is -0
    for i in tl.static_range(1, PAIRS):
        total += found[2 * i] + found[2 * i + 1] if EACH == 2 else found[i]
    return total


@triton.jit
def load_new(at, tokens, there, other, HOW: tl.constexpr):
    """Numbers of new tokens, which stand at `at` or are sums of what does."""
    if HOW.PARTS == 0:
        x = tl.load(at, mask=there, other=other)
    else:
        x = sum_parts(at, tokens.part, there, HOW.PARTS)
        x = tl.where(there, rounded_to(x, tl.float32, HOW.ROUNDED, HOW.TARGET.BF16_CONVERSION), other)
    return x
