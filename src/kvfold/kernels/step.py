"""The two step kernels, one for each kind of state. One program is one work item: one window of one sequence."""

import triton
import triton.language as tl

from .epilogue import emit
from .fold import empty_fold, fold_step, spread
from .slots import find_row, history_is_held, place_row, retire_rows

# Counts and capacities that change from step to step or from engine to engine: never part of the compile key.
COUNTS = ("num_tokens", "num_slots", "ring", "entry_capacity", "max_position", "rows_per_page", "cache_slots")


@triton.jit
def open_item(items, num_items, tags, num_slots, ring, num_tokens, errors, KIND: tl.constexpr, RATIO: tl.constexpr,
              OVERLAP: tl.constexpr, HISTORY: tl.constexpr):  # fmt: skip
    """Loads this program's item and judges its sequence: all items of a sequence come to the same verdict."""
    pid = tl.program_id(0)
    total = tl.load(num_items)
    # The grid is sized by the rows of kv_score. More items than that means sequences that end behind them.
    if pid == tl.num_programs(0) - 1:
        for i in range(pid + 1, total):
            item = items + i * 8
            if tl.load(item) == tl.load(item + 1) // RATIO:
                tl.atomic_add(errors, 1)
    here = pid < total
    item = items + pid * 8
    window = tl.load(item)
    start = tl.load(item + 1)
    end = tl.load(item + 2)
    token = tl.load(item + 3)
    slot = tl.load(item + 4).to(tl.int64)
    entry = tl.load(item + 5)
    first = window == start // RATIO
    if KIND == "fold":
        h0 = tl.where(start % RATIO == 0, start, start - 1)
    else:
        h0 = tl.maximum(start // RATIO - OVERLAP, 0) * RATIO
    usable = here & (slot < num_slots) & (token + end - start <= num_tokens)
    tags = tags + tl.where(usable, slot, 0) * (ring + HISTORY)
    go = usable
    if usable:
        go = history_is_held(tags, h0, start, ring, HISTORY)
    if here & first & (go == 0):
        tl.atomic_add(errors, 1)
    return go, first, window, start, end, token, slot, entry, h0, tags


@triton.jit(do_not_specialize=COUNTS)
def fold_kernel(
    kv_score, kv_stride, num_tokens, ape,
    items, num_items,
    state_rows, state_tags, num_slots, ring,
    rows, entry_slots, entry_capacity, norm_weight, rope, max_position,
    pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale, errors,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """State of fold rows: resume from the row before the step, fold the window's new tokens, store their rows."""
    go, first, window, start, end, token, slot, entry, h0, tags = open_item(
        items, num_items, state_tags, num_slots, ring, num_tokens, errors, "fold", RATIO, OVERLAP, HISTORY
    )
    if go:
        c = tl.arange(0, HEAD_DIM)
        state = state_rows + slot * (ring + HISTORY) * (3 * HEAD_DIM)
        position = tl.maximum(start, window * RATIO)
        stop = tl.minimum(end, (window + 1) * RATIO)
        m, l, a = empty_fold(HEAD_DIM)
        if first & (h0 < start):
            row = state + find_row(tags, start - 1, h0 < start, ring, HISTORY) * (3 * HEAD_DIM) + c
            m = tl.load(row)
            l = tl.load(row + HEAD_DIM)
            a = tl.load(row + 2 * HEAD_DIM)
        if first:
            retire_rows(tags, h0, start, end, ring, HISTORY)
        live_rows = kv_score + (token - start).to(tl.int64) * kv_stride + c
        for base in range(0, stop - position, AHEAD):
            # All loads of a stretch are issued before its first fold: one memory latency for AHEAD tokens, not AHEAD.
            # Addresses are formed token by token: hoisting them out of the stretch cost 5 us of 23 in a prefill of 8k.
            ks = ()
            ss = ()
            for i in tl.static_range(AHEAD):
                x = position + base + i
                live = spread(x < stop, HEAD_DIM)
                at = live_rows + x.to(tl.int64) * kv_stride
                k = tl.load(at, mask=live, other=-0.0).to(tl.float32)
                s = tl.load(at + HEAD_DIM, mask=live, other=float("-inf")).to(tl.float32)
                if ape is not None:
                    s += tl.load(ape + (x % RATIO) * HEAD_DIM + c, mask=live, other=0.0)
                ks = ks + (k,)
                ss = ss + (s,)
            for i in tl.static_range(AHEAD):
                m, l, a = fold_step(m, l, a, ks[i], ss[i])
                x = position + base + i
                if (x < stop) & (x >= end - ring):
                    place = place_row(tags, x, h0, start, end, ring, HISTORY)
                    row = state + place * (3 * HEAD_DIM) + c
                    tl.store(row, m)
                    tl.store(row + HEAD_DIM, l)
                    tl.store(row + 2 * HEAD_DIM, a)
                    tl.store(tags + place, x)
        if entry >= 0:
            emit(
                tl.div_rn(a, l), entry, window * RATIO, rows, entry_slots, entry_capacity, norm_weight, rope,
                max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale, errors,
                HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE,
                ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES,
            )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def rows_kernel(
    kv_score, kv_stride, num_tokens, ape,
    items, num_items,
    state_rows, state_tags, num_slots, ring,
    rows, entry_slots, entry_capacity, norm_weight, rope, max_position,
    pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale, errors,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """State of input rows: fold all rows of a window that ends here, old ones from the state; store the new ones."""
    go, first, window, start, end, token, slot, entry, h0, tags = open_item(
        items, num_items, state_tags, num_slots, ring, num_tokens, errors, "rows", RATIO, OVERLAP, HISTORY
    )
    CHANNELS: tl.constexpr = HEAD_DIM * (1 + OVERLAP)
    WINDOW_ROWS: tl.constexpr = RATIO * (1 + OVERLAP)
    if go:
        state = state_rows + slot * (ring + HISTORY) * (2 * CHANNELS)
        live_rows = kv_score + (token - start).to(tl.int64) * kv_stride
        if first:
            retire_rows(tags, h0, start, end, ring, HISTORY)
        if entry >= 0:
            m, l, a = empty_fold(HEAD_DIM)
            for base in range(0, WINDOW_ROWS, AHEAD):
                ks = ()
                ss = ()
                for i in tl.static_range(AHEAD):
                    x = (window - OVERLAP) * RATIO + base + i
                    j = x - (window - OVERLAP) * RATIO
                    # Overlap: the window before gives its lo half, this window its hi half.
                    half = tl.where(j < RATIO * OVERLAP, 0, CHANNELS - HEAD_DIM)
                    c = half + tl.arange(0, HEAD_DIM)
                    there = (x >= 0) & (j < WINDOW_ROWS)
                    kept = state + find_row(tags, x, there & (x < start), ring, HISTORY) * (2 * CHANNELS)
                    old = spread(there & (x < start), HEAD_DIM)
                    new = spread(there & (x >= start), HEAD_DIM)
                    at = live_rows + x.to(tl.int64) * kv_stride + c
                    k = tl.where(
                        old,
                        tl.load(kept + c, mask=old, other=0.0).to(tl.float32),
                        tl.load(at, mask=new, other=-0.0).to(tl.float32),
                    )
                    s = tl.where(
                        old,
                        tl.load(kept + CHANNELS + c, mask=old, other=0.0).to(tl.float32),
                        tl.load(at + CHANNELS, mask=new, other=float("-inf")).to(tl.float32),
                    )
                    if ape is not None:
                        s += tl.load(ape + (j % RATIO) * CHANNELS + c, mask=old | new, other=0.0)
                    ks = ks + (k,)
                    ss = ss + (s,)
                for i in tl.static_range(AHEAD):
                    m, l, a = fold_step(m, l, a, ks[i], ss[i])
            emit(
                tl.div_rn(a, l), entry, window * RATIO, rows, entry_slots, entry_capacity, norm_weight, rope,
                max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale, errors,
                HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE,
                ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES,
            )  # fmt: skip
        c = tl.arange(0, 2 * CHANNELS)
        oldest = tl.maximum(tl.maximum(start, window * RATIO), end - ring)
        for i in range(0, tl.minimum(end, (window + 1) * RATIO) - oldest):
            x = oldest + i
            place = place_row(tags, x, h0, start, end, ring, HISTORY)
            value = tl.load(live_rows + x.to(tl.int64) * kv_stride + c)
            tl.store(state + place * (2 * CHANNELS) + c, value.to(state_rows.dtype.element_ty))
            tl.store(tags + place, x)


@triton.jit(do_not_specialize=COUNTS)
def store_kernel(
    pooled, items, num_items, entry_slots, entry_capacity, norm_weight, rope, max_position,
    pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale, errors,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """The second stage alone: pooled rows that somebody else made, one program per work item whose window ends."""
    item = items + tl.program_id(0) * 8
    window = tl.load(item)
    entry = tl.load(item + 5)
    if (tl.program_id(0) < tl.load(num_items)) & (entry >= 0):
        y = tl.zeros((HEAD_DIM,), tl.float32)
        if entry < entry_capacity:
            y = tl.load(pooled + entry.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM)).to(tl.float32)
        emit(
            y, entry, window * RATIO, None, entry_slots, entry_capacity, norm_weight, rope,
            max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale, errors,
            HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE,
            ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES,
        )  # fmt: skip
