"""Where a position's state row lives: the rules of DESIGN.md (State), for kernels.

`tags` points at the positions of one slot: `ring` homes, then `HISTORY` spare rows. Programs of one launch call these
at the same time; every predicate here depends only on tags that no program of the launch changes.
"""

import triton
import triton.language as tl


@triton.jit
def history_is_held(tags, h0, start, ring, HISTORY: tl.constexpr):
    """Whether each position of `[h0, start)` has its row."""
    x = start - 1 - tl.arange(0, HISTORY)
    wanted = x >= h0
    x = tl.maximum(x, 0)
    home = tl.load(tags + x % ring, mask=wanted, other=-1)
    spare = tl.load(tags + ring + x % HISTORY, mask=wanted, other=-1)
    missing = wanted & (home != x) & (spare != x)
    return tl.sum(missing.to(tl.int32), axis=0) == 0


@triton.jit
def find_row(tags, x, wanted, ring, HISTORY: tl.constexpr):
    """The row of a position that is held. Masked by `wanted` and not branched round, so that many can be in flight."""
    home = x % ring
    return tl.where(tl.load(tags + home, mask=wanted, other=x) == x, home, ring + x % HISTORY)


@triton.jit
def place_row(tags, x, h0, start, end, ring, HISTORY: tl.constexpr):
    """The row to write position `x` to: its home, or a spare row if this step reads what is there."""
    home = x % ring
    # A step of up to max_new_tokens cannot reach round to its own history, and need not look.
    there = tl.load(tags + home, mask=end - h0 > ring, other=-1)
    return tl.where((there >= h0) & (there < start), ring + x % HISTORY, home)


@triton.jit
def retire_rows(tags, h0, start, end, ring, HISTORY: tl.constexpr):
    """Frees spare rows of another timeline or out of the ring. One program per sequence, any time in the launch."""
    e = tl.arange(0, HISTORY)
    tag = tl.load(tags + ring + e)
    stale = (tag >= start) | ((tag < end - ring) & (tag < h0))
    # The only position of the history that shares spare row e. If it sits at home and the step comes round to it, a
    # program of this launch is writing spare row e now: hands off.
    x = start - 1 - (start - 1 - e + HISTORY) % HISTORY
    inside = (x >= h0) & (x >= 0)
    home = tl.load(tags + tl.maximum(x, 0) % ring, mask=inside, other=-1)
    target = inside & (home == x) & (x + ring < end)
    tl.store(tags + ring + e, tl.full((HISTORY,), -1, tl.int32), mask=stale & (target == 0))
