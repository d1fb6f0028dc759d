"""Pooled rows whose channels several programs share: the one that brings the last part finishes the entry."""

import triton
import triton.language as tl


@triton.jit
def leave_slice(workspace, y, entry, c0, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr):
    """Leaves channels `[c0, c0 + SLICE)` of a pooled row in the workspace."""
    tl.store(workspace + entry.to(tl.int64) * HEAD_DIM + c0 + tl.arange(0, SLICE), y)


@triton.jit
def arrive(arrivals, entry, complete, parts):
    """Says that a program has left all slices of its part of an entry; returns whether it was the last of `parts`."""
    last = complete
    if complete:
        tl.debug_barrier()  # all threads' channels before the arrival, or before they are taken
        if parts > 1:
            last = tl.atomic_add(arrivals + entry, 1, sem="acq_rel") == parts - 1
    return last


@triton.jit
def take_slices(workspace, arrivals, entry, HEAD_DIM: tl.constexpr):
    """The whole row, for the program that brought its last part; the next call finds the count at zero."""
    tl.store(arrivals + entry, 0)
    # Past the L1 cache, which may hold what stood there before the others wrote.
    return tl.load(workspace + entry.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM), cache_modifier=".cg")
