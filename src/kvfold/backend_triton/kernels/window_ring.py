"""Raw rows in rings: which program stores a new row in the place of an old one that this launch still reads.

A ring of `ring` rows keeps the last positions of a sequence, so a longer step stores only those, each in a place of its own.
Such a place may hold an old row from which the first window of the step, or with overlap one of the first two, is pooled. Then
the program that pools that window stores the new row, after it has read the old one; all others are stored as usual. With
overlap this is decided for each half of a row, as one window reads it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .fold import spread
from .tokens import gap
from .window_rows import find_pages, store_rounded


class Readers(NamedTuple):
    """Whether the first window of a sequence's step, and the one after it, are pooled in this launch and hold up new rows."""

    first: Any
    behind: Any


@triton.jit
def readers_of(index, item, total, launch, SPEC: tl.constexpr):
    """The `Readers` in the step of work item `index`, of `total`."""
    POOLS: tl.constexpr = (launch.output.norm_weight is not None) or (launch.output.rows is not None)
    window = item.start // SPEC.RATIO
    head = index - (item.window - window)  # the items of a sequence stand one behind the other
    long = item.end - tl.maximum(window - SPEC.OVERLAP, 0) * SPEC.RATIO > launch.pools.ring
    entry = launch.plan.items + head.to(tl.int64) * 8 + 5
    first = tl.load(entry, mask=long & POOLS, other=-1, cache_modifier=".cg")
    more = long & ((window + 1) * SPEC.RATIO < item.end) & (head + 1 < total)
    behind = tl.load(entry + 8, mask=more & POOLS, other=-1, cache_modifier=".cg")
    capacity = launch.plan.entry_capacity
    return Readers((first >= 0) & (first < capacity), (behind >= 0) & (behind < capacity))


@triton.jit
def left_to_readers(x, c, item, readers, ring, SPEC: tl.constexpr, CHANNELS: tl.constexpr):
    """Which of the channels `c` of new position `x` are stored by `Readers`."""
    old = item.start - ring + (x - item.start) % ring  # the position whose row may be there
    own = item.start // SPEC.RATIO * SPEC.RATIO
    left = spread(readers.first & (old >= own), CHANNELS)
    if SPEC.OVERLAP:  # the lo half of a row is read by the window behind its own
        before = readers.first & (old >= tl.maximum(own - SPEC.RATIO, 0)) & (old < own)
        lo = spread(before | (readers.behind & (old >= own)), CHANNELS)
        left = tl.where(c < SPEC.HEAD_DIM, lo, left)
    return left


@triton.jit
def holds_up(item, launch, SPEC: tl.constexpr):
    """Whether an entry is one of the `Readers`, with new rows to store."""
    oldest = tl.maximum(item.window - SPEC.OVERLAP, 0) * SPEC.RATIO
    made = (item.entry >= 0) & (item.entry < launch.plan.entry_capacity)
    return made & (oldest < item.start) & (item.end - oldest > launch.pools.ring)


@triton.jit
def store_held_up(item, c0, launch, SPEC: tl.constexpr, tiling):
    """Stores SLICE channels of the new rows that are left to the entry of an item; its old rows have been read."""
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    pools = launch.pools
    tokens = launch.tokens
    tl.debug_barrier()  # all threads have read
    for half in tl.static_range(1 + SPEC.OVERLAP):
        x0 = (item.window - SPEC.OVERLAP + half) * SPEC.RATIO
        c = half * SPEC.HEAD_DIM + c0 + tl.arange(0, tiling.SLICE)
        for old in range(tl.maximum(x0, 0), tl.minimum(x0 + SPEC.RATIO, item.start)):
            x = item.end - 1 - (item.end - 1 - old) % pools.ring
            if x >= item.start:
                token = item.token + x - item.start
                at = tokens.kv_score + token.to(tl.int64) * tokens.stride + c
                k = tl.load(at).to(tl.float32)
                s = tl.load(at + gap(tokens, token, CHANNELS)).to(tl.float32)
                if tokens.ape is not None:
                    s += tl.load(tokens.ape + (x % SPEC.RATIO) * CHANNELS + c)
                row = (x % pools.page_size).to(tl.int64)
                page, _, bad = find_pages(pools, pools.kv, item.sequence, x, x >= item.start)
                there = spread((bad == 0) & (page >= 0), tiling.SLICE)
                store_rounded(pools.kv.rows, page * pools.kv.page_stride + row * pools.kv.row_stride + c, k, there)
                page, _, bad = find_pages(pools, pools.score, item.sequence, x, x >= item.start)
                there = spread((bad == 0) & (page >= 0), tiling.SLICE)
                store_rounded(pools.score.rows, page * pools.score.page_stride + row * pools.score.row_stride + c, s, there)
