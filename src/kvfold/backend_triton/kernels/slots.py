"""Where a position's state row lives: the rules of DESIGN.md (State), for kernels.

A slot has `ring` homes, then HISTORY spare rows, and a tag for each: the position whose row it holds. Programs of one launch
call these at the same time; every predicate here depends only on tags that no program of the launch changes.
"""

import triton
import triton.language as tl

from ..args import History, Sequence
from .fold import spread


@triton.jit
def sequence_of(st, slot, start, end, SPEC: tl.constexpr, c0=0):
    """The state of the sequence that has slot `slot` of `st`; its rows from channel `c0` on."""
    rows = st.rows + slot * st.stride + c0
    tags = st.tags + slot * st.pitch
    return Sequence(rows, tags, st.ring, first_read(start, SPEC), start, end)


@triton.jit
def first_read(start, SPEC: tl.constexpr):
    """The first position before `start` whose row a step from `start` on reads; `start` where it reads none."""
    if SPEC.KIND == "fold":
        h0 = tl.where(start % SPEC.RATIO == 0, start, start - 1)
    else:
        h0 = tl.maximum(start // SPEC.RATIO - SPEC.OVERLAP, 0) * SPEC.RATIO
    return h0


@triton.jit
def tag_addresses(seq, last, SPEC: tl.constexpr):
    """The last HISTORY positions before the step, which of them it reads, and where the tags of their homes and spare rows are.

    Each spare row belongs to exactly one of these positions, so these are all of them. last: the home of the last position
    before the step, or of any if there is none.
    """
    x = seq.start - 1 - tl.arange(0, SPEC.HISTORY)
    place = last - tl.arange(0, SPEC.HISTORY)  # the ring is at least as long as the history
    wanted = x >= seq.h0
    homes = seq.tags + tl.where(place < 0, place + seq.ring, place)
    return x, wanted, homes, seq.tags + seq.ring + (x + SPEC.HISTORY) % SPEC.HISTORY


@triton.jit
def load_history(seq, SPEC: tl.constexpr):
    """What the tags say of the last HISTORY positions before the step."""
    last = tl.maximum(seq.start - 1, 0) % seq.ring
    x, wanted, home, spare = tag_addresses(seq, last, SPEC)
    return History(x, wanted, tl.load(home, mask=wanted, other=-1), tl.load(spare))


@triton.jit
def check_history(history):
    """Whether every wanted position has its row, and whether any has it but not at home."""
    away = history.wanted & (history.home != history.positions)
    # One reduction for both counts.
    found = tl.sum(away.to(tl.int32) + (away & (history.spare != history.positions)).to(tl.int32) * 65536, axis=0)
    return found < 65536, found > 0


@triton.jit
def place_row(seq, x, SPEC: tl.constexpr):
    """The row to write position `x` to: its home, or a spare row if this step reads what is there.

    It reads no tag that the launch writes, so it can be called for many rows before the first is stored: a load behind each
    store would cost a memory latency for every row.
    """
    return place_at(seq, x, x % seq.ring, SPEC)


@triton.jit
def place_at(seq, x, home, SPEC: tl.constexpr):
    """`place_row` where the home `x % ring` is known: of many rows, one division is enough, and the next home follows."""
    # A step of up to max_new_tokens cannot reach round to its own history, and need not look.
    tag = tl.load(seq.tags + home, mask=seq.end - seq.h0 > seq.ring, other=-1)
    return tl.where((tag >= seq.h0) & (tag < seq.start), seq.ring + x % SPEC.HISTORY, home)


@triton.jit
def places_from(seq, x0, SPEC: tl.constexpr, COUNT: tl.constexpr):
    """`place_row` of each of COUNT positions from `x0` on."""
    places = ()
    home = x0 % seq.ring
    for i in tl.static_range(COUNT):
        places = places + (place_at(seq, x0 + i, home, SPEC),)
        home = tl.where(home + 1 == seq.ring, 0, home + 1)
    return places


@triton.jit
def retire_rows(seq, history, SPEC: tl.constexpr):
    """Frees spare rows of another timeline or out of the ring. One program per sequence, any time in the launch."""
    x, wanted, home, spare = history
    stale = (spare >= seq.start) | ((spare >= 0) & (spare < seq.end - seq.ring) & (spare < seq.h0))
    # If x sits at home and the step comes round to it, a program of this launch is writing the spare row now: hands off.
    target = wanted & (home == x) & (x + seq.ring < seq.end)
    free = tl.full((SPEC.HISTORY,), -1, tl.int32)
    tl.store(seq.tags + seq.ring + (x + SPEC.HISTORY) % SPEC.HISTORY, free, mask=stale & (target == 0))


@triton.jit
def keep_fold(m, l, a, x, place, wanted, seq, SPEC: tl.constexpr, SLICE: tl.constexpr):
    """Stores the fold row after position `x` where it is `wanted`, SLICE channels of it from where `seq.rows` points.

    By masks and not by branches, between which nothing of two tokens can overlap. `place`: of `place_row`, looked up before.
    """
    # No step resumes from the end of a window: that row is not kept, only what stood there is gone.
    kept = wanted & (x % SPEC.RATIO != SPEC.RATIO - 1)
    row = seq.rows + place * (3 * SPEC.HEAD_DIM) + tl.arange(0, SLICE)
    there = spread(kept, SLICE)
    tl.store(row, m, mask=there)
    tl.store(row + SPEC.HEAD_DIM, l, mask=there)
    tl.store(row + 2 * SPEC.HEAD_DIM, a, mask=there)
    tl.store(seq.tags + place, tl.where(kept, x, -1), mask=wanted)
