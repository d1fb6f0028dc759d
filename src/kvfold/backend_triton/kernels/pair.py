"""`compress_many`: two compressors over the same tokens, the main one and the indexer of a ratio-4 layer, in one launch."""

import triton
import triton.language as tl

from .entry import run_step


@triton.jit
def pair_kernel(
    items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score_0, kv_stride_0, num_tokens_0, ape_0, state_rows_0, state_tags_0, num_slots_0, ring_0, snap_rows_0, snap_tags_0,
    num_snaps_0, arrivals_0, rows_0, norm_weight_0, rope_0, max_position_0, pages_0, page_stride_0, scales_0,
    scales_stride_0, rows_per_page_0, cache_slots_0, cache_scale_0,
    kv_score_1, kv_stride_1, num_tokens_1, ape_1, state_rows_1, state_tags_1, num_slots_1, ring_1, snap_rows_1, snap_tags_1,
    num_snaps_1, arrivals_1, rows_1, norm_weight_1, rope_1, max_position_1, pages_1, page_stride_1, scales_1,
    scales_stride_1, rows_per_page_1, cache_slots_1, cache_scale_1,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr,
    KIND_0: tl.constexpr, OVERLAP_0: tl.constexpr, HISTORY_0: tl.constexpr, AHEAD_0: tl.constexpr, TOGETHER_0: tl.constexpr,
    HEAD_DIM_0: tl.constexpr, LOG2_0: tl.constexpr, ROPE_DIM_0: tl.constexpr, EPS_0: tl.constexpr, HADAMARD_0: tl.constexpr,
    ROUND_ROWS_0: tl.constexpr, ELEMENT_0: tl.constexpr, GROUP_0: tl.constexpr, SCALE_0: tl.constexpr, FLOOR_0: tl.constexpr,
    FLOOR_ON_SCALE_0: tl.constexpr, DIVIDE_0: tl.constexpr, ROTATED_BF16_0: tl.constexpr, PAD_0: tl.constexpr, ROUND_VALUES_0:
    tl.constexpr, TIES_TO_ZERO_0: tl.constexpr, ROW_BYTES_0: tl.constexpr, TAIL_BYTES_0: tl.constexpr,
    KIND_1: tl.constexpr, OVERLAP_1: tl.constexpr, HISTORY_1: tl.constexpr, AHEAD_1: tl.constexpr, TOGETHER_1: tl.constexpr,
    HEAD_DIM_1: tl.constexpr, LOG2_1: tl.constexpr, ROPE_DIM_1: tl.constexpr, EPS_1: tl.constexpr, HADAMARD_1: tl.constexpr,
    ROUND_ROWS_1: tl.constexpr, ELEMENT_1: tl.constexpr, GROUP_1: tl.constexpr, SCALE_1: tl.constexpr, FLOOR_1: tl.constexpr,
    FLOOR_ON_SCALE_1: tl.constexpr, DIVIDE_1: tl.constexpr, ROTATED_BF16_1: tl.constexpr, PAD_1: tl.constexpr, ROUND_VALUES_1:
    tl.constexpr, TIES_TO_ZERO_1: tl.constexpr, ROW_BYTES_1: tl.constexpr, TAIL_BYTES_1: tl.constexpr,
):  # fmt: skip
    """The first half of the programs is the first compressor's, the other half the second's.

    Those of a long step's first half are about as many as fit at once, and the others follow as they end: 8 prompts of 64k at
    ratio 4 take 704 us. Both beside each other on every multiprocessor, who is done helping the other, took 792; a window of
    each in turn 825; all programs first the one, then the other, 711, and 101 instead of 96 us for one prompt.
    """
    half = tl.num_programs(0) // 2
    pid = tl.program_id(0)
    if pid < half:
        run_step(
            pid, half, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
            kv_score_0, kv_stride_0, num_tokens_0, ape_0, state_rows_0, state_tags_0, num_slots_0, ring_0,
            snap_rows_0, snap_tags_0, num_snaps_0, None, arrivals_0, rows_0, norm_weight_0, rope_0,
            max_position_0, pages_0, page_stride_0, scales_0, scales_stride_0, rows_per_page_0, cache_slots_0, cache_scale_0,
            PDL, HARDWARE, RATIO,
            KIND_0, OVERLAP_0, HISTORY_0, AHEAD_0, TOGETHER_0, HEAD_DIM_0, HEAD_DIM_0, LOG2_0, ROPE_DIM_0, EPS_0,
            HADAMARD_0, ROUND_ROWS_0, ELEMENT_0, GROUP_0, SCALE_0, FLOOR_0, FLOOR_ON_SCALE_0, DIVIDE_0, ROTATED_BF16_0, PAD_0,
            ROUND_VALUES_0, TIES_TO_ZERO_0, ROW_BYTES_0, TAIL_BYTES_0,
        )  # fmt: skip
    else:
        run_step(
            pid - half, half, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
            kv_score_1, kv_stride_1, num_tokens_1, ape_1, state_rows_1, state_tags_1, num_slots_1, ring_1,
            snap_rows_1, snap_tags_1, num_snaps_1, None, arrivals_1, rows_1, norm_weight_1, rope_1,
            max_position_1, pages_1, page_stride_1, scales_1, scales_stride_1, rows_per_page_1, cache_slots_1, cache_scale_1,
            PDL, HARDWARE, RATIO,
            KIND_1, OVERLAP_1, HISTORY_1, AHEAD_1, TOGETHER_1, HEAD_DIM_1, HEAD_DIM_1, LOG2_1, ROPE_DIM_1, EPS_1,
            HADAMARD_1, ROUND_ROWS_1, ELEMENT_1, GROUP_1, SCALE_1, FLOOR_1, FLOOR_ON_SCALE_1, DIVIDE_1, ROTATED_BF16_1, PAD_1,
            ROUND_VALUES_1, TIES_TO_ZERO_1, ROW_BYTES_1, TAIL_BYTES_1,
        )  # fmt: skip
