"""Pooled rows whose channels several programs share: the one that brings the last slice finishes the entry."""

import triton
import triton.language as tl


@triton.jit
def leave_slice(workspace, y, entry, c0, SLICES: tl.constexpr, SLICE: tl.constexpr):
    """Puts channels `[c0, c0 + SLICE)` of a pooled row into the workspace."""
    tl.store(workspace + entry.to(tl.int64) * (SLICES * SLICE) + c0 + tl.arange(0, SLICE), y)


@triton.jit
def bring_slices(arrivals, entry, count, SLICES: tl.constexpr):
    """Says that `count` slices, all that a program leaves of an entry, are there; returns whether they were the last ones."""
    tl.debug_barrier()  # all threads' channels before the arrival
    return tl.atomic_add(arrivals + entry, count, sem="acq_rel") == SLICES - count


@triton.jit
def take_slices(workspace, arrivals, entry, HEAD_DIM: tl.constexpr):
    """The whole row, for the program that brought its last slice; the next call finds the count at zero."""
    tl.store(arrivals + entry, 0)
    # Past the L1 cache, which may hold what stood there before the others wrote.
    return tl.load(workspace + entry.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM), cache_modifier=".cg")
