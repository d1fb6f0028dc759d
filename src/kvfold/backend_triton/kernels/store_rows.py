"""`store`: the second stage alone, for pooled rows that somebody else made."""

import triton
import triton.language as tl

from .finish import aim_entry, emit, judge_slot
from .pdl import load_plan, wait_for_inputs


@triton.jit
def store_kernel(
    items, num_items, entry_slots, entry_capacity, errors,
    pooled, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """One program per work item whose window ends."""
    item = items + tl.program_id(0) * 8
    window = load_plan(item)
    entry = tl.where(tl.program_id(0) < load_plan(num_items), load_plan(item + 5), -1)
    cache_slot, weight, cos, sin = aim_entry(
        entry, window * RATIO, entry_slots, entry_capacity, norm_weight, rope, max_position, pages, HEAD_DIM, ROPE_DIM
    )  # fmt: skip
    wait_for_inputs(PDL)
    deliver, refused = judge_slot(
        entry, cache_slot, window * RATIO, entry_capacity, max_position, pages, cache_slots, ROPE_DIM
    )  # fmt: skip
    if deliver:
        y = tl.load(pooled + entry.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM)).to(tl.float32)
        emit(
            y, entry, cache_slot, weight, cos, sin,
            None, pages, page_stride, scales, scales_stride, rows_per_page, cache_scale,
            HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE,
            ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES, HARDWARE,
        )  # fmt: skip
    if refused:
        tl.atomic_add(errors, 1)
