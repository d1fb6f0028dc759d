"""Snapshots of prefix-cache pages: what a step copies to them.

A step's programs get all that they need in one `Snap`, or None if no snapshots are taken; then none of this is compiled in.
"""

import triton
import triton.language as tl

from ..args import Snap
from .rows import as_kept
from .tokens import gap


@triton.jit
def snap_of(sequence, snap_table, snaps, plan):
    """Where the snapshots of sequence `sequence` go."""
    return Snap(snap_table, snap_table.pages + sequence.to(tl.int64) * snap_table.width, snaps, plan.errors)


@triton.jit
def find_snapshot(snap, k, ended):
    """The snapshot of page k of the sequence, -1 for none. A bad id is counted if the page has `ended` in this step."""
    found = tl.load(snap.row + k, mask=k < snap.table.width, other=-1, cache_modifier=".cg")  # as `pdl.load_plan`
    bad = (found < -1) | (found >= snap.snapshots.count)
    if bad & ended:
        tl.atomic_add(snap.errors, 1)
    return tl.where(bad, -1, found).to(tl.int64)


@triton.jit
def next_page_end(snap, x):
    """The first position from x on that is the last of its page."""
    return x if snap is None else x + snap.table.page_size - 1 - x % snap.table.page_size


@triton.jit
def snapshot_fold(m, l, a, x, due, stop, snap, SPEC: tl.constexpr):
    """Stores the fold row after new position x where x is `due`, the last of a page. Returns which one is due next.

    Nothing is stored where x ends a window: a step that starts after it reads nothing.
    """
    if snap is not None:
        page_size = snap.table.page_size
        if (x == due) & (x < stop) & (x % SPEC.RATIO != SPEC.RATIO - 1):
            page = find_snapshot(snap, x // page_size, x < stop)
            if page >= 0:
                row = snap.snapshots.rows + page * snap.snapshots.stride + tl.arange(0, SPEC.HEAD_DIM)
                tl.store(row, m)
                tl.store(row + SPEC.HEAD_DIM, l)
                tl.store(row + 2 * SPEC.HEAD_DIM, a)
                tl.store(snap.snapshots.tags + page * snap.snapshots.pitch, x)
        due = tl.where(x == due, due + page_size, due)
    return due


@triton.jit
def snapshot_rows(live, tokens, window, begin, stop, snap, SPEC: tl.constexpr):
    """Stores the lo rows of new positions `[begin, stop)` of a window if it is the last of a page."""
    if snap is not None:
        rows, tags, _, stride, pitch = snap.snapshots
        page_size = snap.table.page_size
        LENGTH: tl.constexpr = 2 * SPEC.HEAD_DIM
        ends = (window + 1) * SPEC.RATIO
        if ends % page_size == 0:
            page = find_snapshot(snap, ends // page_size - 1, stop == ends)
            if page >= 0:
                c = tl.arange(0, LENGTH)
                for n in range(0, stop - begin):
                    x = begin + n
                    row = x % SPEC.RATIO
                    apart = tl.where(c < SPEC.HEAD_DIM, 0, gap(tokens, x, SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)) - SPEC.HEAD_DIM)
                    value = tl.load(live + x.to(tl.int64) * tokens.stride + c + apart)
                    value = as_kept(value, rows.dtype.element_ty).to(rows.dtype.element_ty)
                    tl.store(rows + page * stride + row * LENGTH + c, value)
                    tl.store(tags + page * pitch + row, x)
