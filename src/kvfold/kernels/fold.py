"""The fold step: the one definition that every kernel calls."""

import triton
import triton.language as tl


@triton.jit
def fold_step(m, l, a, k, s):
    """Folds value `k` with score `s` (ape added) into `(m, l, a)`, elementwise in fp32.

    A token with `k = -0` and `s = -inf` changes no bit, not even the sign of a zero: unrolled loops mask with that.
    """
    d = s - m
    # Without the guard, -inf against an empty state is exp(nan).
    e = tl.where(s == float("-inf"), 0.0, tl.exp(-tl.abs(d)))
    rises = d > 0
    alpha = tl.where(rises, e, 1.0)
    beta = tl.where(rises, 1.0, e)
    return tl.maximum(m, s), tl.fma(l, alpha, beta), tl.fma(a, alpha, beta * k)


@triton.jit
def empty_fold(HEAD_DIM: tl.constexpr):
    m = tl.full((HEAD_DIM,), float("-inf"), tl.float32)
    l = tl.zeros((HEAD_DIM,), tl.float32)
    a = tl.zeros((HEAD_DIM,), tl.float32)
    return m, l, a


@triton.jit
def spread(flag, LENGTH: tl.constexpr):
    """A scalar flag as a `[LENGTH]` mask; Triton's interpreter does not take scalar masks for blocks."""
    return (tl.zeros((LENGTH,), tl.int32) + flag.to(tl.int32)) != 0
