"""Snapshots of prefix-cache pages: what a step copies out, and the kernel that puts them into slots again.

A step's programs get all that they need in one `Snap`, or None if no snapshots are taken: then nothing of this is compiled in.
"""

import triton
import triton.language as tl

from ..args import Snap
from .fold import spread
from .plan import MOST_POSITIONS


@triton.jit
def snap_of(sequence, snap_table, snaps, plan):
    """Where the snapshots of sequence `sequence` go."""
    table = snap_table.pages + sequence.to(tl.int64) * snap_table.width
    return Snap(table, snap_table.width, snap_table.page_size, snaps.rows, snaps.tags, snaps.count, plan.errors)


@triton.jit
def find_snapshot(snap, k, ended):
    """The snapshot of page k of the sequence, -1 for none. A bad id is counted if the page has `ended` in this step."""
    table, width, _, _, _, num_snaps, errors = snap
    found = tl.load(table + k, mask=k < width, other=-1, cache_modifier=".cg")  # as `pdl.load_plan`
    bad = (found < -1) | (found >= num_snaps)
    if bad & ended:
        tl.atomic_add(errors, 1)
    return tl.where(bad, -1, found).to(tl.int64)


@triton.jit
def next_page_end(snap, x):
    """The first position from x on that is the last of its page."""
    due = x
    if snap is not None:
        _, _, page_size, _, _, _, _ = snap
        due = x + page_size - 1 - x % page_size
    return due


@triton.jit
def snapshot_fold(m, l, a, x, due, stop, snap, SPEC: tl.constexpr):
    """Stores the fold row after new position x where x is `due`, the last of a page. Returns which one is due next.

    Not where x ends a window: a step that starts there reads nothing.
    """
    if snap is not None:
        _, _, page_size, rows, tags, _, _ = snap
        if (x == due) & (x < stop) & (x % SPEC.RATIO != SPEC.RATIO - 1):
            page = find_snapshot(snap, x // page_size, x < stop)
            if page >= 0:
                row = rows + page * (3 * SPEC.HEAD_DIM) + tl.arange(0, SPEC.HEAD_DIM)
                tl.store(row, m)
                tl.store(row + SPEC.HEAD_DIM, l)
                tl.store(row + 2 * SPEC.HEAD_DIM, a)
                tl.store(tags + page, x)
        due = tl.where(x == due, due + page_size, due)
    return due


@triton.jit
def snapshot_rows(live, kv_stride, window, begin, stop, snap, RATIO: tl.constexpr, CHANNELS: tl.constexpr):
    """Stores the input rows of new positions `[begin, stop)` of a window if it is the last of a page."""
    if snap is not None:
        _, _, page_size, rows, tags, _, _ = snap
        ends = (window + 1) * RATIO
        if ends % page_size == 0:
            page = find_snapshot(snap, ends // page_size - 1, stop == ends)
            if page >= 0:
                c = tl.arange(0, 2 * CHANNELS)
                for n in range(0, stop - begin):
                    x = begin + n
                    row = page * RATIO + x % RATIO
                    value = tl.load(live + x.to(tl.int64) * kv_stride + c)
                    tl.store(rows + row * (2 * CHANNELS) + c, value.to(rows.dtype.element_ty))
                    tl.store(tags + row, x)


@triton.jit
def restore_kernel(
    state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps, snap_page_size,
    slots, snap_ids, start_pos, errors,
    KIND: tl.constexpr, RATIO: tl.constexpr, HISTORY: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`restore`: one program for each row of each snapshot; the first of them sets the slot's tags, to -1 if it is refused.

    ROWS: of a snapshot, each PARTS * PART elements. All programs of a snapshot come to the same verdict, as they judge by
    arguments and tags of the snapshot, which none of them writes. The slot's tags are written by one and read by none.
    """
    i = tl.program_id(0)
    r = tl.program_id(0) * 0
    if ROWS > 1:
        i = tl.program_id(0) // ROWS
        r = tl.program_id(0) % ROWS
    slot = tl.load(slots + i).to(tl.int64)
    start = tl.load(start_pos + i)
    wanted = (slot != -1) & (start != 0)
    there = (slot >= 0) & (slot < num_slots)
    fine = there & (start > 0) & (start <= MOST_POSITIONS) & (start % snap_page_size == 0)
    # A step that starts at the end of a window without overlap reads nothing.
    reads = start * 0
    if ROWS > 0:
        page = tl.load(snap_ids + i).to(tl.int64)
        reads = reads + ROWS
        if KIND == "fold":
            reads = tl.where(start % RATIO == 0, 0, reads)
        fine = fine & ((reads == 0) | ((page >= 0) & (page < num_snaps)))
        for base in range(0, ROWS, BLOCK):
            j = base + tl.arange(0, BLOCK)
            looked = (j < ROWS) & spread(fine & wanted & (reads > 0), BLOCK)
            tag = tl.load(snap_tags + page * ROWS + j, mask=looked, other=0)
            fine = fine & (tl.sum((looked & (tag != start - ROWS + j)).to(tl.int32), axis=0) == 0)
    reads = tl.where(fine, reads, 0)
    row = slot * (ring + HISTORY)
    if ROWS > 0:
        if wanted & (reads > 0):
            to = state_rows + (row + (start - ROWS + r) % ring) * (PARTS * PART) + tl.arange(0, PART)
            at = snap_rows + (page * ROWS + r) * (PARTS * PART) + tl.arange(0, PART)
            for p in tl.static_range(PARTS):
                tl.store(to + p * PART, tl.load(at + p * PART))
    if wanted & there & (r == 0):
        # Home h belongs to the last position before the start that lives there, and holds it if the step reads it.
        last = tl.maximum(start, 1) - 1
        for base in range(0, ring + HISTORY, BLOCK):
            home = base + tl.arange(0, BLOCK)
            back = (last % ring - home + ring) % ring
            tag = tl.where((home < ring) & (back < reads), last - back, -1)
            tl.store(state_tags + row + home, tag, mask=home < ring + HISTORY)
    if wanted & (fine == 0) & (r == 0):
        tl.atomic_add(errors, 1)
