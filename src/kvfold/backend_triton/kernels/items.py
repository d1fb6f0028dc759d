"""The work items of a plan: which of them a program takes in turn, and what it reads of them.

The last fifth of a long step's items is not dealt out beforehand: a program that is done takes the next one, as programs that
share a multiprocessor do not advance alike (docs/notes/0024).
"""

import triton
import triton.language as tl

from ..args import Item
from .pdl import load_plan
from .slices import draw_ticket


@triton.jit
def load_number(at, there, other):
    """A number of a work item, past the L1 cache; `there` None: it is there."""
    return load_plan(at) if there is None else tl.load(at, mask=there, other=other, cache_modifier=".cg")


@triton.jit
def load_item(items, index, there=None):
    """A work item; one that is not `there` has no tokens and no entry."""
    item = items + index * 8
    window = load_number(item, there, 0)
    start = load_number(item + 1, there, 0)
    end = load_number(item + 2, there, 0)
    token = load_number(item + 3, there, 0)
    slot = load_number(item + 4, there, 0).to(tl.int64)
    entry = load_number(item + 5, there, -1)
    sequence = load_number(item + 6, there, 0)
    return Item(window, start, end, token, slot, entry, sequence)


@triton.jit
def item_after(item, items, index, programs, total, RATIO: tl.constexpr):
    """Item `index` of `total`, which is `programs` items after `item`.

    The plan has the windows of a sequence one after the other, so within a sequence there is nothing to read: no registers hold
    the next item while a window is folded, and nothing waits for it.
    """
    window, start, end, token, slot, entry, sequence = item
    after = window + programs
    if (after * RATIO < end) & (index < total):
        ends = after * RATIO + RATIO <= end
        found = Item(after, start, end, token, slot, tl.where(ends, entry + programs, -1), sequence)
    else:
        found = load_item(items, index, index < total)
    return found


@triton.jit
def dealt_items(total, programs):
    """How many of `total` items are dealt out, the same number to each program: at least one, although with few items it may
    not exist.
    """
    rounds = total // programs
    return tl.maximum(rounds - rounds // 5, 1) * programs


@triton.jit
def draw_item(arrivals, after, dealt, total):
    """Whether a program has to draw for its item `after`, and the ticket for it, which `next_index` reads."""
    drawn = (after >= dealt) & (dealt < total)
    return drawn, draw_ticket(arrivals, 0, drawn, 128)  # 2 warps at most, of 64 threads on AMD


@triton.jit
def next_index(arrivals, drawn, ticket, after, dealt, total, programs):
    """Item `after`, or the one that was drawn for it; `total` or more where there is none.

    Every program draws one ticket too many. The last of these puts the count back to 0, for the next call.
    """
    if drawn:
        number = tl.sum(ticket, axis=0)
        if number == total - dealt + programs - 1:
            tl.store(arrivals, 0)
        after = dealt + number
    return after


@triton.jit
def pause(cycles):
    """Returns so many cycles of a multiprocessor's clock later. NVIDIA only."""
    tl.inline_asm_elementwise(
        "{ .reg .u32 begin, now; .reg .pred early; mov.u32 begin, %clock; AGAIN: mov.u32 now, %clock;"
        " sub.u32 now, now, begin; setp.lt.u32 early, now, $1; @early bra AGAIN; mov.b32 $0, 0; }",
        "=r,r", [cycles], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
