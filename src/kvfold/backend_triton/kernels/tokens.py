"""Where the scores of a step's tokens are: after the values in each row, or in a tensor of their own.

With two tensors, a score is `apart` elements after its value in the first row, and `skew` elements more with each row. So the
address of a value gives that of the score by a sum; where rows hold both, none of this is compiled in.
"""

import triton
import triton.language as tl

from .vectors import scalar


@triton.jit
def apart_from(tokens, row):
    """`apart` of the same tokens counted from row `row` on; any number where rows hold both.

    It does not return `Tokens`: no function may return a tuple with None in it (Triton 3.6).
    """
    return 0 if tokens.skew is None else gap(tokens, row, 0)


@triton.jit
def gap_of(apart, skew, x, CHANNELS: tl.constexpr):
    """`gap` of tokens that are counted from another row than `Tokens` are."""
    return CHANNELS if skew is None else apart + scalar(x).to(tl.int64) * skew


@triton.jit
def gap(tokens, x, CHANNELS: tl.constexpr):
    """Elements from the value of token `x` to its score. CHANNELS: of a value."""
    return gap_of(tokens.apart, tokens.skew, x, CHANNELS)


@triton.jit
def gaps(tokens, x, CHANNELS: tl.constexpr):
    """`gap` of several tokens, for addresses `[len(x), channels]`."""
    return CHANNELS if tokens.skew is None else gap(tokens, x, CHANNELS)[:, None]


@triton.jit
def whole_row(at, tokens, x, CHANNELS: tl.constexpr):
    """Addresses of value and score of token `x`. at: what they are if the score follows the value."""
    if tokens.skew is not None:
        at += tl.where(tl.arange(0, 2 * CHANNELS) < CHANNELS, 0, gap(tokens, x, CHANNELS) - CHANNELS)
    return at
