"""The fold: of a token into a state that is kept, and of rows that are loaded together. Every kernel calls these."""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from ... import contract

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
ROWS_AT_ONCE = tl.constexpr(contract.ROWS_AT_ONCE)


@triton.jit
def minus_zero():
    """-0, the value of a token that is not there; its score is -inf. By its bits: Triton 3.6 makes +0 of a constant -0.0."""
    return tl.full((), -(1 << 31), tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def fold_step(m, l, a, k, s):
    """Folds value `k` with score `s` (ape added) into `(m, l, a)`, elementwise in fp32.

    A token with `k = -0` and `s = -inf` changes no bit, not even the sign of a zero: unrolled loops mask with that.
    """
    d = s - m
    # exp2 is one instruction, which flushes denormals; exp is four, for weights too small to change a sum.
    e = tl.exp2(tl.abs(d) * -LOG2_E)
    rises = d > 0
    alpha = tl.where(rises, e, 1.0)
    beta = tl.where(rises, 1.0, e)
    return tl.maximum(m, s), tl.fma(l, alpha, beta), tl.fma(a, alpha, beta * k)


@triton.jit
def fold_group(m, l, a, ks, ss, COUNT: tl.constexpr, FIRST: tl.constexpr):
    """Folds COUNT rows of a group into `(m, l, a)` at once: 9 operations a row where `fold_step` takes 13.

    For rows that are always folded from the exact inputs, in the same groups. A row with `k = -0` and `s = -inf` changes no
    bit, so a group may be filled up with such. FIRST: into `empty_group()`, which saves scaling it.
    """
    top = tl.maximum(ss[0], LOWEST)
    for i in tl.static_range(1, COUNT):
        top = tl.maximum(top, ss[i])
    if not FIRST:
        top = tl.maximum(top, m)
        alpha = tl.exp2((m - top) * LOG2_E)
        l *= alpha
        a *= alpha
    for i in tl.static_range(COUNT):
        e = tl.exp2((ss[i] - top) * LOG2_E)
        if FIRST and i == 0:
            l = e
            a = e * ks[i]
        else:
            l += e
            a = tl.fma(e, ks[i], a)
    return top, l, a


@triton.jit
def empty_group(HEAD_DIM: tl.constexpr):
    """A group of no rows. Its `a` is -0: adding the first product to that gives the product, bit for bit."""
    m, l, _a = empty_fold(HEAD_DIM)
    return m, l, tl.full((HEAD_DIM,), minus_zero(), tl.float32)


@triton.jit
def quotient(a, l, FAST_DIVISION: tl.constexpr):
    """`a / l`. `l` is a sum of weights of which one is about 1, so the short division, which fails beyond 2**126, will do."""
    return libdevice.fast_dividef(a, l) if FAST_DIVISION else a / l


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
