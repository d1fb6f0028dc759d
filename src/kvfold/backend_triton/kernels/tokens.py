"""Where the scores of a step's tokens are: behind the values of each row, or in a tensor of their own.

Of two tensors, a score is `apart` elements behind its value in the first row, and `skew` elements more with each row. So who
has the address of a value finds the score by a sum, and where rows hold both nothing is compiled in.
"""

import triton
import triton.language as tl

from ..args import Tokens
from .vectors import scalar


@triton.jit
def tokens_from(tokens, row):
    """The same tokens, counted from row `row` on for `gap`; `kv_score` points where it did."""
    apart = None if tokens.apart is None else gap(tokens, row, 0)
    return Tokens(tokens.kv_score, tokens.stride, tokens.count, tokens.ape, apart, tokens.skew)


@triton.jit
def gap(tokens, x, CHANNELS: tl.constexpr):
    """Elements from the value of token `x` to its score. CHANNELS: of a value."""
    return CHANNELS if tokens.apart is None else tokens.apart + scalar(x).to(tl.int64) * tokens.skew


@triton.jit
def gaps(tokens, x, CHANNELS: tl.constexpr):
    """`gap` of several tokens, for addresses `[len(x), channels]`."""
    return CHANNELS if tokens.apart is None else gap(tokens, x, CHANNELS)[:, None]


@triton.jit
def whole_row(at, tokens, x, CHANNELS: tl.constexpr):
    """Addresses of value and score of token `x`. at: what they are where the score stands behind the value."""
    if tokens.apart is not None:
        at += tl.where(tl.arange(0, 2 * CHANNELS) < CHANNELS, 0, gap(tokens, x, CHANNELS) - CHANNELS)
    return at
