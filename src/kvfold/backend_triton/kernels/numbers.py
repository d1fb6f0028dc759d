"""An engine's int32 or int64 numbers, at any stride, which one kernel reads as 32-bit words."""

import triton
import triton.language as tl


@triton.jit
def where_set(mask, flag):
    """`mask` if the number `flag` is 1, and false if it is 0. Not by `&`: the interpreter makes an integer of a mask and a
    scalar.
    """
    return mask.to(tl.int32) * flag.to(tl.int32) != 0


@triton.jit
def load_words(words, step, mask, other, CACHE: tl.constexpr):
    """int64: numbers that begin at `words`, int64 where `step` is odd (`args.Numbers`); `other` where `mask` is not set."""
    low = tl.load(words, mask=mask, other=0, cache_modifier=CACHE)
    high = tl.load(words + 1, mask=where_set(mask, step % 2), other=0, cache_modifier=CACHE)
    number = tl.where(step % 2 == 1, (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF), low.to(tl.int64))
    return tl.where(mask, number, other)


@triton.jit
def load_numbers(numbers, i, mask, other):
    """Numbers `i`: int64, or int32 where they are contiguous int32."""
    if numbers.step is None:
        number = tl.load(numbers.at + i, mask=mask, other=other)
    else:
        words = numbers.at.to(tl.pointer_type(tl.int32)) + i.to(tl.int64) * (numbers.step // 2)
        number = load_words(words, numbers.step, mask, other, "")
    return number


@triton.jit
def load_row_numbers(numbers, row, column, mask, other, CACHE: tl.constexpr):
    """int64: numbers of a table whose rows are as far apart as `numbers.step` says and whose columns are contiguous."""
    step = numbers.step
    at = row.to(tl.int64) * (step // 2) + column.to(tl.int64) * (1 + step % 2)
    return load_words(numbers.at.to(tl.pointer_type(tl.int32)) + at, step, mask, other, CACHE)


@triton.jit
def to_int32(x):
    """The nearest int32."""
    return tl.minimum(tl.maximum(x, -(2**31)), 2**31 - 1).to(tl.int32)
