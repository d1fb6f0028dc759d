"""A long step over input rows of a `FoldState`: programs that fit the device, each of which takes work items in turn.

A window is short, and all warps decode the item and finish the entry, so fewer warps are faster.
"""

import triton
import triton.language as tl

from .finish import aim_slot, load_finish
from .items import dealt_items, draw_item, item_after, load_item, next_index, pause
from .long_fold import deliver_entry
from .pdl import load_plan, wait_for_inputs
from .prefetch import prefetch_item
from .rows import keep_each, load_biases, pool_window
from .slots import check_tags, load_tags, retire_rows
from .snapshot import snapshot_rows


@triton.jit
def rows_item(
    item, biases, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    LIVE: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr,
    AHEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """One work item. LIVE: whether windows all of whose rows are live are many, and have instructions of their own."""
    CHANNELS: tl.constexpr = HEAD_DIM * (1 + OVERLAP)
    SAME: tl.constexpr = state_rows.dtype.element_ty == kv_score.dtype.element_ty
    window, start, end, token, slot, entry, sequence = item
    first = window == start // RATIO
    held = (slot < num_slots) & (token + end - start <= num_tokens)
    tags = state_tags + slot * (ring + HISTORY)
    state = state_rows + slot * (ring + HISTORY) * (2 * CHANNELS)
    live = kv_score + (token - start).to(tl.int64) * kv_stride
    h0 = tl.maximum(start // RATIO - OVERLAP, 0) * RATIO
    if held & (h0 < start):
        x, wanted, home, spare = load_tags(tags, h0, start, ring, HISTORY)
        held, _moved = check_tags(x, wanted, home, spare)
    if first & (held == 0):
        tl.atomic_add(errors, 1)
    if held:
        if entry >= 0:
            # Under way while the window is folded, which has no registers to spare for the rest of `aim_entry`.
            cache_slot = aim_slot(entry, entry_slots, entry_capacity)
            if not LIVE or (window - OVERLAP) * RATIO < start:
                y = pool_window(
                    live, kv_stride, ape, biases, state, tags, window, start, ring, None, "find", SAME,
                    RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM, HARDWARE,
                )  # fmt: skip
            else:
                y = pool_window(
                    live, kv_stride, ape, biases, state, tags, window, start, ring, None, "live", SAME,
                    RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM, HARDWARE,
                )  # fmt: skip
            weight, cos, sin = load_finish(window * RATIO, norm_weight, rope, max_position, pages, HEAD_DIM, ROPE_DIM)
            deliver_entry(
                y, entry, window * RATIO, (cache_slot, weight, cos, sin), None, 0, None, None, entry_capacity, errors,
                rows, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
                HARDWARE, HEAD_DIM, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR,
                FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES,
            )  # fmt: skip
        begin = tl.maximum(start, window * RATIO)
        stop = tl.minimum(end, window * RATIO + RATIO)
        oldest = tl.maximum(begin, end - ring)
        if oldest < stop:
            # All that a window of ratio 4 has: its program is the last one of a prompt. With snapshots, 4 would spill.
            KEPT: tl.constexpr = 4 if snap_rows is None else 2
            keep_each(live, kv_stride, state, tags, oldest, h0, start, stop, end, ring, HISTORY, CHANNELS, KEPT)
        if snap_rows is not None:
            table = snap_table + sequence.to(tl.int64) * snap_width
            snap = (table, snap_width, snap_page_size, snap_rows, snap_tags, num_snaps, errors)
            snapshot_rows(live, kv_stride, window, begin, stop, snap, RATIO, CHANNELS)
        if first:
            x, wanted, home, spare = load_tags(tags, h0, start, ring, HISTORY)
            retire_rows(tags, x, wanted, home, spare, h0, start, end, ring, HISTORY)


@triton.jit
def prefill_rows(
    pid, programs, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots,
    cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr,
    AHEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """Program `pid` of `programs`."""
    # Where not all rows of a window are under way at once there are registers for the next item: sequences of a window or two,
    # beside a prompt, then find theirs there.
    ITEM_AHEAD: tl.constexpr = AHEAD < RATIO * (1 + OVERLAP)
    total = load_plan(num_items)
    biases = None
    # Wider, they would take 64 registers of 128, and are read from the L1 cache for each window instead.
    if AHEAD >= RATIO * (1 + OVERLAP) and HEAD_DIM <= 256:
        biases = load_biases(ape, 0, total > 0, RATIO, OVERLAP, AHEAD, HEAD_DIM)
    item = load_item(items, pid, pid < total)
    if PDL and ITEM_AHEAD:
        # 1k and 2k tokens in 4.5 and 5.6 us, and without it in 5.2 and 6.2, as these leave half of an H200 to the next launch.
        # Of more windows only programs that begin last, when the launch before reads no more: 4k and 8k 7.9 and 13.7 instead of
        # 8.6 and 14.1. All of them, beside what is still read: 9.6 and 15.7.
        if (total <= 594) | (pid >= 924):
            prefetch_item(item, pid < total, 0, kv_score, kv_stride, num_tokens, RATIO, OVERLAP, HEAD_DIM, HEAD_DIM)
    wait_for_inputs(PDL)
    if HARDWARE and ITEM_AHEAD:
        # Where programs have two windows, half of those of a multiprocessor begin 1.8 us later: else all wait for memory at the
        # same time, and then memory for all. 5k, 8k and 9k tokens in 9.2, 11.7 and 15.8 instead of 9.9, 12.8 and 16.8 us; with
        # 1.2 or 2.5 us a third or two thirds of that. Not where the first window has old rows to look for.
        window, start, _end, _token, _slot, entry, _sequence = item
        twice = (total > programs) & (total <= 2 * programs)
        if twice & (entry >= 0) & ((window - OVERLAP) * RATIO >= start):
            pause(pid // 132 % 2 * 3600)
    dealt = dealt_items(total, programs)
    index = pid
    while index < total:
        after = index + programs
        if ITEM_AHEAD:
            next_item = load_item(items, after, after < total)
        if arrivals is not None:
            drawn, ticket = draw_item(arrivals, after, dealt, total)
        rows_item(
            item, biases, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
            kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
            rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots,
            cache_scale,
            True, HARDWARE, RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP,
            SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES,
        )  # fmt: skip
        if arrivals is not None:
            after = next_index(arrivals, drawn, ticket, after, dealt, total, programs)
        if ITEM_AHEAD:
            item = next_item
        else:
            item = item_after(item, items, after, after - index, total, RATIO)
        index = after
