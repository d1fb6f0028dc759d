"""A long step over input rows whose entries are small: each program takes several windows of a sequence in a row as one.

One window of the indexer keeps too few bytes under way to hide its own waits, and its transforms leave most of a warp idle.
"""

import triton
import triton.language as tl

from .finish import aim_slot, emit, judge_slot, load_finish
from .fold import empty_group, quotient
from .items import dealt_items, draw_item, item_after, load_item, next_index
from .long_rows import rows_item
from .pdl import load_plan, wait_for_inputs
from .rows import fold_part, keep_each, load_live
from .slots import check_tags, load_tags
from .vectors import numbers


@triton.jit
def go_abreast(
    item, entry_capacity, num_tokens, state_tags, num_slots, ring,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Whether the COUNT windows from `item` on are all one sequence's, end in this call, and are of live rows alone."""
    window, start, end, token, slot, entry, _sequence = item
    able = (window > start // RATIO) & ((window - OVERLAP) * RATIO >= start) & ((window + COUNT) * RATIO <= end)
    able = able & (entry >= 0) & (entry + COUNT <= entry_capacity) & (slot < num_slots) & (token + end - start <= num_tokens)
    h0 = tl.maximum(start // RATIO - OVERLAP, 0) * RATIO
    if able & (h0 < start):
        x, wanted, home, spare = load_tags(state_tags + slot * (ring + HISTORY), h0, start, ring, HISTORY)
        able, _moved = check_tags(x, wanted, home, spare)
    return able


@triton.jit
def rows_items(
    item, entry_slots, entry_capacity, errors, kv_score, kv_stride, ape, state_rows, state_tags, ring,
    rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    HARDWARE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """The COUNT windows from `item` on, which `go_abreast`."""
    CHANNELS: tl.constexpr = HEAD_DIM * (1 + OVERLAP)
    ROWS: tl.constexpr = RATIO * (1 + OVERLAP)
    window, start, end, token, slot, entry, _sequence = item
    i = numbers(COUNT)
    position = (window + i) * RATIO
    cache_slot = aim_slot(entry + i, entry_slots, entry_capacity)
    live = kv_score + (token - start).to(tl.int64) * kv_stride
    ks, ss = load_live(live, kv_stride, window, 0, ROWS, RATIO, OVERLAP, HEAD_DIM, HARDWARE, COUNT)
    m, l, a = empty_group(COUNT * HEAD_DIM)
    m, l, a = fold_part(m, l, a, ks, ss, ape, None, 0, True, RATIO, OVERLAP, ROWS, HEAD_DIM, COUNT)
    y = quotient(a, l, HARDWARE)
    weight, cos, sin = load_finish(position, norm_weight, rope, max_position, pages, HEAD_DIM, ROPE_DIM, COUNT)
    deliver, wrong = judge_slot(
        entry + i, cache_slot, position, entry_capacity, max_position, pages, cache_slots, ROPE_DIM
    )  # fmt: skip
    emit(
        y, entry, cache_slot, weight, cos, sin,
        rows, pages, page_stride, scales, scales_stride, rows_per_page, cache_scale,
        HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE,
        ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES, HARDWARE, COUNT, deliver,
    )  # fmt: skip
    refused = tl.sum(tl.reshape(wrong.to(tl.int32), (COUNT,)), axis=0)
    if refused > 0:
        tl.atomic_add(errors, refused)
    if (window + COUNT) * RATIO > end - ring:  # the last ones of a prompt
        tags = state_tags + slot * (ring + HISTORY)
        state = state_rows + slot * (ring + HISTORY) * (2 * CHANNELS)
        h0 = tl.maximum(start // RATIO - OVERLAP, 0) * RATIO
        oldest = tl.maximum(window * RATIO, end - ring)
        stop = (window + COUNT) * RATIO
        keep_each(live, kv_stride, state, tags, oldest, h0, start, stop, end, ring, HISTORY, CHANNELS, RATIO)


@triton.jit
def prefill_abreast(
    pid, programs, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots,
    cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr,
    AHEAD: tl.constexpr, COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """Program `pid` of `programs`, each of which takes COUNT items in a row at a time; without snapshots."""
    total = load_plan(num_items)
    wait_for_inputs(PDL)
    blocks = (total + COUNT - 1) // COUNT
    dealt = dealt_items(blocks, programs)
    index = pid
    item = load_item(items, pid * COUNT, pid < blocks)
    while index < blocks:
        after = index + programs
        drawn, ticket = draw_item(arrivals, after, dealt, blocks)
        if go_abreast(item, entry_capacity, num_tokens, state_tags, num_slots, ring, RATIO, OVERLAP, HISTORY, COUNT):
            rows_items(
                item, entry_slots, entry_capacity, errors, kv_score, kv_stride, ape, state_rows, state_tags, ring,
                rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots,
                cache_scale,
                HARDWARE, RATIO, OVERLAP, HISTORY, COUNT, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP,
                SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES,
            )  # fmt: skip
        else:
            single = item
            for number in range(index * COUNT, tl.minimum(index * COUNT + COUNT, total)):
                rows_item(
                    single, None, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
                    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags,
                    num_snaps, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page,
                    cache_slots, cache_scale,
                    False, HARDWARE, RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS,
                    ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO,
                    ROW_BYTES, TAIL_BYTES,
                )  # fmt: skip
                single = item_after(single, items, number + 1, 1, total, RATIO)
        after = next_index(arrivals, drawn, ticket, after, dealt, blocks, programs)
        item = item_after(item, items, after * COUNT, (after - index) * COUNT, total, RATIO)
        index = after
