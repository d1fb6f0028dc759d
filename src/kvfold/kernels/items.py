"""The work items of a plan: what a program that takes them in turn reads of them."""

import triton
import triton.language as tl


@triton.jit
def load_item(items, index, there):
    """Window, start, end, token, slot, entry and sequence of a work item; no tokens and no entry where it is not there."""
    item = items + index * 8
    window = tl.load(item, mask=there, other=0, cache_modifier=".cg")
    start = tl.load(item + 1, mask=there, other=0, cache_modifier=".cg")
    end = tl.load(item + 2, mask=there, other=0, cache_modifier=".cg")
    token = tl.load(item + 3, mask=there, other=0, cache_modifier=".cg")
    slot = tl.load(item + 4, mask=there, other=0, cache_modifier=".cg").to(tl.int64)
    entry = tl.load(item + 5, mask=there, other=-1, cache_modifier=".cg")
    sequence = tl.load(item + 6, mask=there, other=0, cache_modifier=".cg")
    return window, start, end, token, slot, entry, sequence


@triton.jit
def item_after(item, items, index, programs, total, RATIO: tl.constexpr):
    """Item `index` of `total`, by its being `programs` behind `item`.

    The plan has the windows of a sequence one behind the other, so within one there is nothing to read: the 7 numbers of the
    next item need no registers while a window is folded, and nobody waits for them. 8 prompts of 64k in 552 instead of 567 us.
    """
    window, start, end, token, slot, entry, sequence = item
    after = window + programs
    if (after * RATIO < end) & (index < total):
        ends = after * RATIO + RATIO <= end
        found = (after, start, end, token, slot, tl.where(ends, entry + programs, -1), sequence)
    else:
        found = load_item(items, index, index < total)
    return found
