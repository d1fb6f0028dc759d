"""The fold step: the one definition that every kernel calls."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def fold_step(m, l, a, k, s):
    """Folds value `k` with score `s` (ape added) into `(m, l, a)`, elementwise in fp32.

    A token with `k = -0` and `s = -inf` changes no bit, not even the sign of a zero: unrolled loops mask with that.
    """
    d = s - m
    # exp2 is one instruction that flushes what is below 2**-126; exp is four, for denormal weights that no sum can see.
    e = tl.exp2(tl.abs(d) * -LOG2_E)
    rises = d > 0
    alpha = tl.where(rises, e, 1.0)
    beta = tl.where(rises, 1.0, e)
    return tl.maximum(m, s), tl.fma(l, alpha, beta), tl.fma(a, alpha, beta * k)


@triton.jit
def widen(x):
    """fp32 of bf16 or fp32. By integers, as the compiler then takes each of the two in a register with one instruction."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def empty_fold(HEAD_DIM: tl.constexpr):
    # The lowest finite number and not -inf: a score of -inf then needs no guard against -inf - -inf.
    m = tl.full((HEAD_DIM,), LOWEST, tl.float32)
    l = tl.zeros((HEAD_DIM,), tl.float32)
    a = tl.zeros((HEAD_DIM,), tl.float32)
    return m, l, a


@triton.jit
def spread(flag, LENGTH: tl.constexpr):
    """A scalar flag as a `[LENGTH]` mask; Triton's interpreter does not take scalar masks for blocks."""
    return (tl.zeros((LENGTH,), tl.int32) + flag.to(tl.int32)) != 0
