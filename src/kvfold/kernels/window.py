"""A step over `WindowState`: writes the raw rows of new tokens, and pools every window that ends, in parallel.

Two kinds of programs in one launch. Writers take work items in turn and store their new rows. The others take slices of
entries (`pool_slice`): old rows come from the pages, new ones live, so nobody waits for a writer. Where several programs share
an entry, the one that brings the last slice to the workspace finishes it; which one that is changes no bit.
"""

import triton
import triton.language as tl

from .epilogue import aim_entry, emit, judge_slot
from .fold import spread
from .pdl import load_plan, wait_for_inputs
from .record import bf16_bits
from .slices import bring_slice, take_slices
from .window_rows import find_pages, pool_slice


@triton.jit
def store_rounded(pool, at, x, mask):
    if pool.dtype.element_ty == tl.bfloat16:
        tl.store(pool.to(tl.pointer_type(tl.int16)) + at, bf16_bits(x), mask=mask)
    else:
        tl.store(pool + at, x, mask=mask)


@triton.jit
def write_rows(
    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
    begin, stop, start, token, sequence,
    RATIO: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores the rows of new positions `[begin, stop)`; returns how many have a bad page."""
    c = tl.arange(0, CHANNELS)
    if ALIGNED:
        kv_stride = (kv_stride // 16) * 16  # says that it is a multiple, which the signature does not: see `pool_slice`
    refused = tl.zeros((), tl.int32)
    for base in range(0, stop - begin, AHEAD):
        # Loads first, of rows and of pages; a load behind a store would wait for the load that the store waits for.
        ks = ()
        ss = ()
        places = ()
        for i in tl.static_range(AHEAD):
            x = begin + base + i
            there = spread(x < stop, CHANNELS)
            at = kv_score + (token + x - start).to(tl.int64) * kv_stride + c
            k = tl.load(at, mask=there, other=0.0).to(tl.float32)
            s = tl.load(at + CHANNELS, mask=there, other=0.0).to(tl.float32)
            if ape is not None:
                s += tl.load(ape + (x % RATIO) * CHANNELS + c, mask=there, other=0.0)
            kv_page, _, kv_bad = find_pages(kv_table, kv_width, kv_pages, sequence, x, x < stop, page_size)
            score_page, _, score_bad = find_pages(
                score_table, score_width, score_pages, sequence, x, x < stop, page_size
            )  # fmt: skip
            refused += (kv_bad | score_bad).to(tl.int32)
            ks = ks + (k,)
            ss = ss + (s,)
            places = places + (
                (kv_page, (x < stop) & (kv_bad == 0) & (kv_page >= 0), score_page,
                 (x < stop) & (score_bad == 0) & (score_page >= 0)),
            )  # fmt: skip
        for i in tl.static_range(AHEAD):
            kv_page, kv_kept, score_page, score_kept = places[i]
            row = ((begin + base + i) % page_size).to(tl.int64)
            at = kv_page * kv_page_stride + row * kv_row_stride + c
            store_rounded(kv_pool, at, ks[i], spread(kv_kept, CHANNELS))
            at = score_page * score_page_stride + row * score_row_stride + c
            store_rounded(score_pool, at, ss[i], spread(score_kept, CHANNELS))
    return refused


@triton.jit
def check_window(
    kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size, window, start, sequence,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many old rows of a window have no page, and how many a bad one."""
    missing = tl.zeros((), tl.int32)
    bad = tl.zeros((), tl.int32)
    for j0 in range(0, RATIO * (1 + OVERLAP), TILE):
        j = j0 + tl.arange(0, TILE)
        x = (window - OVERLAP) * RATIO + j
        wanted = (x >= 0) & (x < start) & (j < RATIO * (1 + OVERLAP))
        x = tl.maximum(x, 0)
        _, kv_missing, kv_bad = find_pages(kv_table, kv_width, kv_pages, sequence, x, wanted, page_size)
        _, score_missing, score_bad = find_pages(score_table, score_width, score_pages, sequence, x, wanted, page_size)
        missing += tl.sum((kv_missing | score_missing).to(tl.int32), axis=0)
        bad += tl.sum((kv_bad | score_bad).to(tl.int32), axis=0)
    return missing, bad


@triton.jit
def find_homes(
    table, width, num_pages, page_size, window, start, sequence, there, RATIO: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Pages of the window before and of this one, where each has its rows on one page, and whether one that is needed is not
    there."""
    x = window * RATIO
    this, missing, bad = find_pages(table, width, num_pages, sequence, x, there & (start > x), page_size)
    lost = missing | bad
    before = this
    if OVERLAP:
        x = tl.maximum(window - 1, 0) * RATIO
        wanted = there & (window > 0) & (start > x)
        before, missing, bad = find_pages(table, width, num_pages, sequence, x, wanted, page_size)
        lost = lost | missing | bad
    return before, this, lost


@triton.jit
def load_unit(
    items, entry_items, entry_slots, unit, num_units,
    kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, SLICES: tl.constexpr, ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """What a slice of an entry must know before it can load its rows: nothing that a kernel in flight writes."""
    there = unit < num_units
    index = tl.load(entry_items + unit // SLICES, mask=there, other=0, cache_modifier=".cg")
    slot = (unit // SLICES).to(tl.int64)
    if entry_slots is not None:
        slot = tl.load(entry_slots + unit // SLICES, mask=there, other=-1, cache_modifier=".cg")
    window, start, end, token, entry, sequence = load_item(items, index, there)
    homes = ()
    if ONE_PAGE:
        kv = find_homes(kv_table, kv_width, kv_pages, page_size, window, start, sequence, there, RATIO, OVERLAP)
        score = find_homes(score_table, score_width, score_pages, page_size, window, start, sequence, there, RATIO, OVERLAP)
        homes = kv + score
    return window, start, end, token, entry, sequence, slot, homes


@triton.jit
def load_item(items, index, there):
    item = items + index * 8
    window = tl.load(item, mask=there, other=0, cache_modifier=".cg")
    start = tl.load(item + 1, mask=there, other=0, cache_modifier=".cg")
    end = tl.load(item + 2, mask=there, other=0, cache_modifier=".cg")
    token = tl.load(item + 3, mask=there, other=0, cache_modifier=".cg")
    entry = tl.load(item + 5, mask=there, other=-1, cache_modifier=".cg")
    sequence = tl.load(item + 6, mask=there, other=0, cache_modifier=".cg")
    return window, start, end, token, entry, sequence


@triton.jit
def window_kernel(
    items, num_items, entry_slots, entry_capacity, errors, entry_items, cu_entries, batch,
    kv_score, kv_stride, num_tokens, ape,
    kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
    workspace, arrivals, num_writers,
    rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, SLICE: tl.constexpr, AHEAD: tl.constexpr, ONE_PAGE: tl.constexpr, ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    total = load_plan(num_items)
    num_entries = tl.minimum(load_plan(cu_entries + batch), entry_capacity)
    SLICES: tl.constexpr = HEAD_DIM // SLICE
    # The first item is read before the wait: the plan and what it was built from are older than the launch before this one.
    if pid < num_writers:
        index = pid
        window, start, end, token, entry, sequence = load_item(items, index, index < total)
        wait_for_inputs(PDL)
        while index < total:
            if token + end - start <= num_tokens:
                begin = tl.maximum(start, window * RATIO)
                stop = begin + tl.minimum(end - begin, RATIO - begin % RATIO)
                refused = write_rows(
                    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
                    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
                    begin, stop, start, token, sequence, RATIO, HEAD_DIM * (1 + OVERLAP), AHEAD, ALIGNED,
                )  # fmt: skip
                count = (refused > 0).to(tl.int32)
                if entry >= 0:
                    missing, bad = check_window(
                        kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size,
                        window, start, sequence, RATIO, OVERLAP, TILE,
                    )  # fmt: skip
                    slot = tl.where(entry < entry_capacity, entry, -1).to(tl.int64)
                    if entry_slots is not None:
                        slot = tl.load(entry_slots + entry, mask=entry < entry_capacity, other=-1, cache_modifier=".cg")
                    deliver, wrong = judge_slot(
                        entry, slot, window * RATIO, entry_capacity, max_position, pages, cache_slots, ROPE_DIM
                    )  # fmt: skip
                    wanted = (entry >= entry_capacity) | (slot != -1)
                    if bad > 0:
                        count = bad * 0 + 1
                    elif missing > 0:
                        count = tl.maximum(count, wanted.to(tl.int32))
                    else:
                        count += wrong.to(tl.int32)
                if count > 0:
                    tl.atomic_add(errors, count)
            else:
                if window == start // RATIO:
                    tl.atomic_add(errors, 1)
            index += num_writers
            window, start, end, token, entry, sequence = load_item(items, index, index < total)
    else:
        unit = pid - num_writers
        num_units = num_entries * SLICES
        window, start, end, token, entry, sequence, slot, homes = load_unit(
            items, entry_items, entry_slots, unit, num_units,
            kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size,
            RATIO, OVERLAP, SLICES, ONE_PAGE,
        )  # fmt: skip
        wait_for_inputs(PDL)
        while unit < num_units:
            c0 = (unit % SLICES) * SLICE
            deliver, refused = judge_slot(
                entry, slot, window * RATIO, entry_capacity, max_position, pages, cache_slots, ROPE_DIM
            )  # fmt: skip
            if deliver & (token + end - start <= num_tokens):
                y, absent = pool_slice(
                    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
                    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
                    window, start, token, sequence, c0, homes,
                    RATIO, OVERLAP, TILE, LANES, SLICE, HEAD_DIM, ONE_PAGE, ALIGNED,
                )  # fmt: skip
                # Every slice sees the same rows, so either all of them bring theirs or none.
                finish = absent == 0
                if SLICES > 1:
                    finish = bring_slice(workspace, arrivals, y, entry, c0, finish, SLICES, SLICE)
                if finish:
                    _slot, weight, cos, sin = aim_entry(
                        entry, window * RATIO, None, entry_capacity, norm_weight, rope, max_position, pages,
                        HEAD_DIM, ROPE_DIM,
                    )  # fmt: skip
                    if SLICES > 1:
                        whole = take_slices(workspace, arrivals, entry, HEAD_DIM)
                    else:
                        whole = y
                    emit(
                        whole, entry, slot, weight, cos, sin,
                        rows, pages, page_stride, scales, scales_stride, rows_per_page, cache_scale,
                        HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE,
                        DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES, HARDWARE,
                    )  # fmt: skip
            # Not before the work on this unit: that cost 150 of 1,300 instructions, and other programs hide the latency.
            unit += tl.num_programs(0) - num_writers
            window, start, end, token, entry, sequence, slot, homes = load_unit(
                items, entry_items, entry_slots, unit, num_units,
                kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size,
                RATIO, OVERLAP, SLICES, ONE_PAGE,
            )  # fmt: skip
