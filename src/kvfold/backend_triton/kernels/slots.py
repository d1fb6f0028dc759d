"""Where a position's state row lives: the rules of DESIGN.md (State), for kernels.

`tags` points at the positions of one slot: `ring` homes, then `HISTORY` spare rows. Programs of one launch call these
at the same time; every predicate here depends only on tags that no program of the launch changes.
"""

import triton
import triton.language as tl

from .fold import spread


@triton.jit
def aim_tags(tags, h0, start, last, ring, HISTORY: tl.constexpr):
    """The last HISTORY positions before the step, which of them it reads, and where the tags of their homes and spare rows are.

    Each spare row belongs to exactly one of these positions, so these are all of them. last: the home of the last position
    before the step, or of any if there is none.
    """
    x = start - 1 - tl.arange(0, HISTORY)
    place = last - tl.arange(0, HISTORY)  # the ring is at least as long as the history
    return x, x >= h0, tags + tl.where(place < 0, place + ring, place), tags + ring + (x + HISTORY) % HISTORY


@triton.jit
def load_tags(tags, h0, start, ring, HISTORY: tl.constexpr):
    """The positions of `aim_tags`, which of them the step reads, and the tags of their homes and spare rows."""
    last = tl.maximum(start - 1, 0) % ring
    x, wanted, home, spare = aim_tags(tags, h0, start, last, ring, HISTORY)
    return x, wanted, tl.load(home, mask=wanted, other=-1), tl.load(spare)


@triton.jit
def check_tags(x, wanted, home, spare):
    """Of what `load_tags` returned: whether every wanted position has its row, and whether any has it but not at home."""
    away = wanted & (home != x)
    # One reduction for both counts.
    found = tl.sum(away.to(tl.int32) + (away & (spare != x)).to(tl.int32) * 65536, axis=0)
    return found < 65536, found > 0


@triton.jit
def place_row(tags, x, h0, start, end, ring, HISTORY: tl.constexpr):
    """The row to write position `x` to: its home, or a spare row if this step reads what is there.

    What it reads is no tag that the launch writes, so that it may be asked for many rows before the first is stored: each
    store would otherwise wait for a load of its own, a memory latency for every row at the end of a prompt.
    """
    return place_at(tags, x, x % ring, h0, start, end, ring, HISTORY)


@triton.jit
def place_at(tags, x, home, h0, start, end, ring, HISTORY: tl.constexpr):
    """`place_row` where the home `x % ring` is known: of many rows, one division is enough, and the next home follows."""
    # A step of up to max_new_tokens cannot reach round to its own history, and need not look.
    there = tl.load(tags + home, mask=end - h0 > ring, other=-1)
    return tl.where((there >= h0) & (there < start), ring + x % HISTORY, home)


@triton.jit
def places_from(tags, x0, h0, start, end, ring, HISTORY: tl.constexpr, COUNT: tl.constexpr):
    """`place_row` of each of COUNT positions from `x0` on."""
    places = ()
    home = x0 % ring
    for i in tl.static_range(COUNT):
        places = places + (place_at(tags, x0 + i, home, h0, start, end, ring, HISTORY),)
        home = tl.where(home + 1 == ring, 0, home + 1)
    return places


@triton.jit
def retire_rows(tags, x, wanted, home, spare, h0, start, end, ring, HISTORY: tl.constexpr):
    """Frees spare rows of another timeline or out of the ring. One program per sequence, any time in the launch.

    Takes what `load_tags` returned.
    """
    stale = (spare >= start) | ((spare >= 0) & (spare < end - ring) & (spare < h0))
    # If x sits at home and the step comes round to it, a program of this launch is writing the spare row now: hands off.
    target = wanted & (home == x) & (x + ring < end)
    free = tl.full((HISTORY,), -1, tl.int32)
    tl.store(tags + ring + (x + HISTORY) % HISTORY, free, mask=stale & (target == 0))


@triton.jit
def keep_fold(m, l, a, x, place, wanted, state, tags, SPEC: tl.constexpr, SLICE: tl.constexpr):
    """Stores the fold row after position `x` where it is `wanted`, SLICE channels of it from where `state` points.

    By masks and not by branches, between which nothing of two tokens can overlap. `place`: of `place_row`, looked up before.
    """
    # No step resumes from the end of a window: that row is not kept, only what stood there is gone.
    kept = wanted & (x % SPEC.RATIO != SPEC.RATIO - 1)
    row = state + place * (3 * SPEC.HEAD_DIM) + tl.arange(0, SLICE)
    there = spread(kept, SLICE)
    tl.store(row, m, mask=there)
    tl.store(row + SPEC.HEAD_DIM, l, mask=there)
    tl.store(row + 2 * SPEC.HEAD_DIM, a, mask=there)
    tl.store(tags + place, tl.where(kept, x, -1), mask=wanted)
