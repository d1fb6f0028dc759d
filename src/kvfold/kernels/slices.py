"""Pooled rows whose channels several programs share: the one that brings the last slice finishes the entry."""

import triton
import triton.language as tl


@triton.jit
def bring_slice(workspace, arrivals, y, entry, c0, complete, SLICES: tl.constexpr, SLICE: tl.constexpr):
    """Leaves a slice of a pooled row in the workspace; returns whether it was the last one of its entry."""
    last = complete
    if complete:
        tl.store(workspace + entry.to(tl.int64) * (SLICES * SLICE) + c0 + tl.arange(0, SLICE), y)
        tl.debug_barrier()  # all threads' channels before the arrival
        last = tl.atomic_add(arrivals + entry, 1, sem="acq_rel") == SLICES - 1
    return last


@triton.jit
def take_slices(workspace, arrivals, entry, HEAD_DIM: tl.constexpr):
    """The whole row, for the program that brought its last slice; the next call finds the count at zero."""
    tl.store(arrivals + entry, 0)
    # Past the L1 cache, which may hold what stood there before the others wrote.
    return tl.load(workspace + entry.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM), cache_modifier=".cg")
