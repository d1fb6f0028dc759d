"""`restore`: puts snapshots of prefix-cache pages into slots."""

import triton
import triton.language as tl

from ... import contract
from .fold import spread
from .vectors import scalar

MOST_POSITIONS = tl.constexpr(contract.MOST_POSITIONS)


@triton.jit
def restore_kernel(
    state_rows, state_tags, state_num_slots, state_ring, state_stride, state_pitch,
    snapshots_rows, snapshots_tags, snapshots_count, snapshots_stride, snapshots_pitch,
    page_size, slots, pages, start_pos, errors,
    KIND: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each row of each snapshot; the first of them sets the slot's tags, to -1 if it is refused.

    ROWS: rows of a snapshot, each of PARTS * PART elements. All programs of a snapshot agree on whether it is refused, as they
    look at arguments and at tags of the snapshot, which none of them writes. The slot's tags are written by one and read by
    none.
    """
    i = tl.program_id(0) // ROWS if ROWS > 1 else tl.program_id(0)
    r = tl.program_id(0) % ROWS if ROWS > 1 else scalar(0)
    slot = tl.load(slots + i).to(tl.int64)
    start = tl.load(start_pos + i)
    wanted = (slot != -1) & (start != 0)
    there = (slot >= 0) & (slot < state_num_slots)
    fine = there & (start > 0) & (start <= MOST_POSITIONS) & (start % page_size == 0)
    # A step that starts at the end of a window without overlap reads nothing.
    reads = scalar(0)
    if ROWS > 0:
        page = tl.load(pages + i).to(tl.int64)
        reads = reads + ROWS
        if KIND == "fold":
            reads = tl.where(start % RATIO == 0, 0, reads)
        fine = fine & ((reads == 0) | ((page >= 0) & (page < snapshots_count)))
        for base in range(0, ROWS, BLOCK):
            j = base + tl.arange(0, BLOCK)
            looked = (j < ROWS) & spread(fine & wanted & (reads > 0), BLOCK)
            tag = tl.load(snapshots_tags + page * snapshots_pitch + j, mask=looked, other=0)
            fine = fine & (tl.sum((looked & (tag != start - ROWS + j)).to(tl.int32), axis=0) == 0)
    reads = tl.where(fine, reads, 0)
    tags = state_tags + slot * state_pitch
    # What the step reads is one row, or the lo rows of one window, which are put into their home.
    last = tl.maximum(start, 1) - 1
    if KIND == "fold":
        places = state_ring + 1
        home = last % state_ring
    else:
        half = tl.maximum(state_ring, 2)
        places = 2 * half * OVERLAP + 2 * state_ring
        home = last // RATIO % (2 * half)
    if ROWS > 0:
        if wanted & (reads > 0):
            to = state_rows + slot * state_stride + (home * ROWS + r) * (PARTS * PART) + tl.arange(0, PART)
            at = snapshots_rows + page * snapshots_stride + r * (PARTS * PART) + tl.arange(0, PART)
            for p in tl.static_range(PARTS):
                tl.store(to + p * PART, tl.load(at + p * PART))
    if wanted & there & (r == 0):
        for base in range(0, places, BLOCK):
            place = base + tl.arange(0, BLOCK)
            tag = tl.where((place == home) & (reads > 0), last, -1)
            tl.store(tags + place, tag, mask=place < places)
    if wanted & (fine == 0) & (r == 0):
        tl.atomic_add(errors, 1)
