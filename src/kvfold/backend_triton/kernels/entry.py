"""`compress`: the kernel of one compressor, and what it shares with that of two: a short step or a long one."""

import triton
import triton.language as tl

from .long_fold import prefill_fold
from .long_rows import prefill_rows
from .long_rows_narrow import prefill_abreast
from .short import count_overflow, decode_item


@triton.jit
def run_step(
    pid, programs, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    workspace, arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page,
    cache_slots, cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr,
    KIND: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, TOGETHER: tl.constexpr,
    SLICE: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """Program `pid` of the `programs` of one compressor.

    TOGETHER: 0 for a short step, a program for each work item; otherwise how many windows a program folds side by side.
    """
    if TOGETHER == 0:
        decode_item(
            pid, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
            kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
            rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots,
            cache_scale,
            PDL, HARDWARE, RATIO, KIND, OVERLAP, HISTORY, AHEAD, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS,
            ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES,
            TAIL_BYTES,
        )  # fmt: skip
        if pid == programs - 1:
            count_overflow(items, num_items, programs, errors, RATIO)
    elif KIND == "fold":
        prefill_fold(
            pid, programs, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
            kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
            workspace, arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride,
            rows_per_page, cache_slots, cache_scale,
            PDL, HARDWARE, RATIO, TOGETHER, HISTORY, AHEAD, SLICE, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS,
            ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES,
            TAIL_BYTES,
        )  # fmt: skip
    elif TOGETHER > 1 and snap_rows is None:
        prefill_abreast(
            pid, programs, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
            kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
            arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page,
            cache_slots, cache_scale,
            PDL, HARDWARE, RATIO, OVERLAP, HISTORY, AHEAD, TOGETHER, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS,
            ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES,
            TAIL_BYTES,
        )  # fmt: skip
    else:
        prefill_rows(
            pid, programs, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
            kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
            arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page,
            cache_slots, cache_scale,
            PDL, HARDWARE, RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS,
            ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES,
            TAIL_BYTES,
        )  # fmt: skip


@triton.jit
def step_kernel(
    items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    workspace, arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page,
    cache_slots, cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr,
    KIND: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, TOGETHER: tl.constexpr,
    SLICE: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """`compress` over a `FoldState`."""
    run_step(
        tl.program_id(0), tl.num_programs(0),
        items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
        kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
        workspace, arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page,
        cache_slots, cache_scale,
        PDL, HARDWARE, RATIO, KIND, OVERLAP, HISTORY, AHEAD, TOGETHER, SLICE, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD,
        ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO,
        ROW_BYTES, TAIL_BYTES,
    )  # fmt: skip
