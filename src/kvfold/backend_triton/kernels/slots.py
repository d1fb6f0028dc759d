"""Where a position's fold row lives: the rules of DESIGN.md (State), for kernels.

A slot has `ring` homes, then a spare row, and a tag for each: the position whose row it holds. Programs of one launch call
these at the same time; every predicate here depends only on tags that no program of the launch changes.
"""

import triton
import triton.language as tl

from ..args import History, Sequence
from .fold import spread
from .memory import store_blocks


@triton.jit
def sequence_of(st, slot, start, end, SPEC: tl.constexpr, c0=0):
    """The state of the sequence that has slot `slot` of `st`; its rows from channel `c0` on."""
    rows = st.rows + slot * st.stride + c0
    tags = st.tags + slot * st.pitch
    # By the item, which has tokens: else what follows from the ring takes registers all through a loop over items.
    ring = st.ring if SPEC.KIND == "fold" else tl.where(start < end, st.ring, 1)
    return Sequence(rows, tags, ring, first_read(start, SPEC), start, end)


@triton.jit
def first_read(start, SPEC: tl.constexpr):
    """The first position before `start` whose row a step from `start` reads; `start` if it reads none."""
    if SPEC.KIND == "fold":
        h0 = tl.where(start % SPEC.RATIO == 0, start, start - 1)
    else:
        h0 = tl.maximum(start // SPEC.RATIO - SPEC.OVERLAP, 0) * SPEC.RATIO
    return h0


@triton.jit
def last_home(seq):
    """The home of the last position before the step, or of any if there is none."""
    return tl.maximum(seq.start - 1, 0) % seq.ring


@triton.jit
def load_history(seq, last):
    """What the tags say of the last position before the step. last: what `last_home` gave."""
    return History(tl.load(seq.tags + last), tl.load(seq.tags + seq.ring))


@triton.jit
def check_history(history, seq):
    """Whether the row that the step reads, if any, is there, and whether it is the spare one."""
    wanted = seq.h0 < seq.start
    moved = wanted & (history.home != seq.start - 1)
    return (moved == 0) | (history.spare == seq.start - 1), moved


@triton.jit
def place_at(seq, home):
    """The row to write the position with this home to: the home, or the spare row if this step reads what is there.

    It reads no tag that the launch writes, so it can be called for many rows before the first is stored. A load after each
    store would cost a memory latency for every row.
    """
    # A step of up to max_new_tokens cannot reach round to its own history, and need not look.
    tag = tl.load(seq.tags + home, mask=seq.end - seq.h0 > seq.ring, other=-1)
    return tl.where((tag >= seq.h0) & (tag < seq.start), seq.ring, home)


@triton.jit
def places_from(seq, x0, COUNT: tl.constexpr):
    """`place_at` of each of COUNT positions from `x0` on: one division is enough, and the next home follows."""
    places = ()
    home = x0 % seq.ring
    for _i in tl.static_range(COUNT):
        places = places + (place_at(seq, home),)
        home = tl.where(home + 1 == seq.ring, 0, home + 1)
    return places


@triton.jit
def retire_row(seq, history):
    """Frees a spare row of another timeline or out of the ring. Called by one program per sequence, at any time."""
    spare = history.spare
    stale = (spare >= seq.start) | ((spare >= 0) & (spare < seq.end - seq.ring) & (spare < seq.h0))
    # If the history sits at home and the step comes round to it, a program of this launch writes the spare row now: hands off.
    last = seq.start - 1
    target = (seq.h0 < seq.start) & (history.home == last) & (last + seq.ring < seq.end)
    tl.store(seq.tags + seq.ring, -1, mask=stale & (target == 0))


@triton.jit
def keep_fold(m, l, a, x, place, wanted, seq, SPEC: tl.constexpr, SLICE: tl.constexpr):
    """Stores the fold row after position `x` where it is `wanted`, SLICE channels of it from where `seq.rows` points.

    By masks, as the work of two tokens cannot overlap across branches. `place`: what `place_at` gave before.
    """
    # No step resumes from the end of a window: that row is not kept, only what stood there is gone.
    kept = wanted & (x % SPEC.RATIO != SPEC.RATIO - 1)
    row = seq.rows + place * (3 * SPEC.HEAD_DIM) + tl.arange(0, SLICE)
    there = spread(kept, SLICE)
    store_blocks((row, row + SPEC.HEAD_DIM, row + 2 * SPEC.HEAD_DIM), (m, l, a), there)
    tl.store(seq.tags + place, tl.where(kept, x, -1), mask=wanted)
