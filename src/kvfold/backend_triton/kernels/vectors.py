"""Vectors over COUNT small consecutive entries of one sequence: a single one gives a warp too little to do.

Values of their channels are flat, `[COUNT * LENGTH]`; a number of each entry is `[COUNT, 1]`, and addresses are
`[COUNT, LENGTH]`, by which a thread whose channels are of one entry reads and writes them at once. With COUNT 1 the shapes are
those of a single entry: `[LENGTH]`, a scalar, and `[LENGTH]`.
"""

import triton
import triton.language as tl


@triton.jit
def numbers(COUNT: tl.constexpr):
    """`0..COUNT - 1`, one for each entry."""
    return tl.arange(0, COUNT)[:, None]


@triton.jit
def span(LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """`0..LENGTH - 1`, for addresses and masks."""
    c = tl.arange(0, LENGTH)
    return c[None, :] if COUNT > 1 else c


@triton.jit
def channels(LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """`0..LENGTH - 1`, COUNT times, for values."""
    c = tl.arange(0, COUNT * LENGTH)
    return c % LENGTH if COUNT > 1 else c


@triton.jit
def abreast(x, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """Values, in the shape of addresses, to be stored."""
    return tl.reshape(x, (COUNT, LENGTH)) if COUNT > 1 else x


@triton.jit
def flat(x, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """Loaded values, or a number of each entry, in the flat shape of values."""
    return tl.reshape(tl.broadcast_to(x, (COUNT, LENGTH)), (COUNT * LENGTH,)) if COUNT > 1 else x


@triton.jit
def wherever(mask, wanted, COUNT: tl.constexpr):
    """`mask`, but of several entries only those that are `wanted`; a single one is."""
    return mask & wanted if COUNT > 1 else mask


@triton.jit
def scalar(x):
    """`x` as an int32 tensor, also where it is a Python number."""
    return tl.full((), 0, tl.int32) + x
