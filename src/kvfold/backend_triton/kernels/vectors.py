"""COUNT entries of one sequence in a row, side by side in one vector: what a warp would do for one small one, it does for all.

What is computed of their channels is flat, `[COUNT * LENGTH]`; what there is one of for each is `[COUNT, 1]`, and addresses are
`[COUNT, LENGTH]`, by which a thread whose channels are of one entry reads and writes them at once. With COUNT 1 these are all
what they were without: `[LENGTH]`, a scalar, and `[LENGTH]`.
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
    if COUNT > 1:
        c = c[None, :]
    return c


@triton.jit
def channels(LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """`0..LENGTH - 1`, COUNT times, for what is computed."""
    c = tl.arange(0, COUNT * LENGTH)
    if COUNT > 1:
        c = c % LENGTH
    return c


@triton.jit
def abreast(x, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """Computed values, as they are stored."""
    if COUNT > 1:
        x = tl.reshape(x, (COUNT, LENGTH))
    return x


@triton.jit
def flat(x, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """Loaded values, or what there is one of for each, as they are computed with."""
    if COUNT > 1:
        x = tl.reshape(tl.broadcast_to(x, (COUNT, LENGTH)), (COUNT * LENGTH,))
    return x


@triton.jit
def wherever(mask, wanted, COUNT: tl.constexpr):
    """`mask` of the entries that are `wanted`; of one, which is, `mask`."""
    if COUNT > 1:
        mask = mask & wanted
    return mask


@triton.jit
def scalar(x):
    """`x` as an int32 tensor, also where it is a number to Python."""
    return tl.full((), 0, tl.int32) + x
