"""`compress_many`: two compressors over the same tokens, the main one and the indexer of a ratio-4 layer, in one launch."""

import triton
import triton.language as tl

from ..args import Cache, Plan, Scratch, Snaps, SnapTable, State, Tokens
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
    HOW_0: tl.constexpr, SPEC_0: tl.constexpr, FMT_0: tl.constexpr, HOW_1: tl.constexpr, SPEC_1: tl.constexpr,
    FMT_1: tl.constexpr,
):  # fmt: skip
    plan = Plan(items, num_items, entry_slots, entry_capacity, errors)
    snap_table = SnapTable(snap_table, snap_width, snap_page_size)
    half = tl.num_programs(0) // 2
    pid = tl.program_id(0)
    if pid < half:
        run_step(
            pid, half, plan, snap_table, Tokens(kv_score_0, kv_stride_0, num_tokens_0, ape_0),
            State(state_rows_0, state_tags_0, num_slots_0, ring_0), Snaps(snap_rows_0, snap_tags_0, num_snaps_0),
            Scratch(None, arrivals_0),
            Cache(rows_0, norm_weight_0, rope_0, max_position_0, pages_0, page_stride_0, scales_0, scales_stride_0,
                  rows_per_page_0, cache_slots_0, cache_scale_0),
            HOW_0, SPEC_0, FMT_0,
        )  # fmt: skip
    else:
        run_step(
            pid - half, half, plan, snap_table, Tokens(kv_score_1, kv_stride_1, num_tokens_1, ape_1),
            State(state_rows_1, state_tags_1, num_slots_1, ring_1), Snaps(snap_rows_1, snap_tags_1, num_snaps_1),
            Scratch(None, arrivals_1),
            Cache(rows_1, norm_weight_1, rope_1, max_position_1, pages_1, page_stride_1, scales_1, scales_stride_1,
                  rows_per_page_1, cache_slots_1, cache_scale_1),
            HOW_1, SPEC_1, FMT_1,
        )  # fmt: skip
