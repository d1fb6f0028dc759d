"""The kernels of `compress`, `compress_many` and `store`: from flat parameters, named by args.py, to one program's work."""

import triton
import triton.language as tl

from ..args import Compressor, Output, Places, Plan, Scratch, Snapshots, SnapshotTable, State, Tokens
from .finish import emit, entry_address, load_finish, slot_valid
from .items import load_item
from .long_fold import long_fold_step
from .long_rows import long_rows_step
from .long_rows_narrow import narrow_rows_step
from .mean import long_mean_step, short_mean_step
from .pdl import load_plan, wait_for_inputs
from .short import count_overflow, short_step, ungated_step


@triton.jit
def run_step(pid, programs, plan, snap_table, one, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Program `pid` of the `programs` of one compressor.

    TOGETHER: 0 for a short step, a program for each work item; otherwise how many windows a program folds side by side.
    """
    if HOW.TOGETHER == 0:
        if SPEC.KIND == "":
            ungated_step(pid, plan, one.tokens, one.output, HOW, SPEC, FMT)
        elif SPEC.KIND == "mean":
            short_mean_step(pid, plan, one, HOW, SPEC, FMT)
        else:
            short_step(pid, plan, snap_table, one, HOW, SPEC, FMT)
        if pid == programs - 1:
            count_overflow(plan, programs, SPEC.RATIO)
    elif SPEC.KIND == "fold":
        long_fold_step(pid, programs, plan, snap_table, one, HOW, SPEC, FMT)
    elif SPEC.KIND == "mean":
        long_mean_step(pid, programs, plan, one, HOW, SPEC, FMT)
    elif HOW.TOGETHER > 1 and one.snapshots.rows is None:
        narrow_rows_step(pid, programs, plan, snap_table, one, HOW, SPEC, FMT)
    else:
        long_rows_step(pid, programs, plan, snap_table, one, HOW, SPEC, FMT)


@triton.jit
def step_kernel(
    plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors,
    snap_table_pages, snap_table_width, snap_table_page_size,
    tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew,
    state_rows, state_tags, state_num_slots, state_ring, state_stride, state_pitch,
    snapshots_rows, snapshots_tags, snapshots_count, snapshots_stride, snapshots_pitch,
    scratch_workspace, scratch_arrivals,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """`compress` over a `FoldState` or a `MeanState`, or without a state."""
    plan = Plan(plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors)
    snap_table = SnapshotTable(snap_table_pages, snap_table_width, snap_table_page_size)
    one = Compressor(
        Tokens(tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew),
        State(state_rows, state_tags, state_num_slots, state_ring, state_stride, state_pitch),
        Snapshots(snapshots_rows, snapshots_tags, snapshots_count, snapshots_stride, snapshots_pitch),
        Scratch(scratch_workspace, scratch_arrivals),
        Output(
            output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
            output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
        ),
    )  # fmt: skip
    run_step(tl.program_id(0), tl.num_programs(0), plan, snap_table, one, HOW, SPEC, FMT)


@triton.jit
def pair_kernel(
    plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors,
    snap_table_pages, snap_table_width, snap_table_page_size,
    first_tokens_kv_score, first_tokens_stride, first_tokens_count, first_tokens_ape, first_tokens_apart, first_tokens_skew,
    first_state_rows, first_state_tags, first_state_num_slots, first_state_ring, first_state_stride, first_state_pitch,
    first_snapshots_rows, first_snapshots_tags, first_snapshots_count, first_snapshots_stride, first_snapshots_pitch,
    first_scratch_workspace, first_scratch_arrivals,
    first_output_rows, first_output_latent, first_output_norm_weight, first_output_rope, first_output_max_position,
    first_output_pages, first_output_page_stride, first_output_scales, first_output_scales_stride, first_output_rows_per_page,
    first_output_num_slots, first_output_scale,
    second_tokens_kv_score, second_tokens_stride, second_tokens_count, second_tokens_ape, second_tokens_apart,
    second_tokens_skew,
    second_state_rows, second_state_tags, second_state_num_slots, second_state_ring, second_state_stride,
    second_state_pitch,
    second_snapshots_rows, second_snapshots_tags, second_snapshots_count, second_snapshots_stride, second_snapshots_pitch,
    second_scratch_workspace, second_scratch_arrivals,
    second_output_rows, second_output_latent, second_output_norm_weight, second_output_rope, second_output_max_position,
    second_output_pages, second_output_page_stride, second_output_scales, second_output_scales_stride,
    second_output_rows_per_page, second_output_num_slots, second_output_scale,
    HOW_0: tl.constexpr, SPEC_0: tl.constexpr, FMT_0: tl.constexpr, HOW_1: tl.constexpr, SPEC_1: tl.constexpr,
    FMT_1: tl.constexpr,
):  # fmt: skip
    """`compress_many`: the first half of the programs is of one compressor, the second of the other."""
    plan = Plan(plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors)
    snap_table = SnapshotTable(snap_table_pages, snap_table_width, snap_table_page_size)
    first = Compressor(
        Tokens(
            first_tokens_kv_score, first_tokens_stride, first_tokens_count, first_tokens_ape, first_tokens_apart,
            first_tokens_skew,
        ),
        State(
            first_state_rows, first_state_tags, first_state_num_slots, first_state_ring, first_state_stride, first_state_pitch,
        ),
        Snapshots(
            first_snapshots_rows, first_snapshots_tags, first_snapshots_count, first_snapshots_stride, first_snapshots_pitch,
        ),
        Scratch(first_scratch_workspace, first_scratch_arrivals),
        Output(
            first_output_rows, first_output_latent, first_output_norm_weight, first_output_rope, first_output_max_position,
            first_output_pages, first_output_page_stride, first_output_scales, first_output_scales_stride,
            first_output_rows_per_page, first_output_num_slots, first_output_scale,
        ),
    )  # fmt: skip
    second = Compressor(
        Tokens(
            second_tokens_kv_score, second_tokens_stride, second_tokens_count, second_tokens_ape, second_tokens_apart,
            second_tokens_skew,
        ),
        State(
            second_state_rows, second_state_tags, second_state_num_slots, second_state_ring, second_state_stride,
            second_state_pitch,
        ),
        Snapshots(
            second_snapshots_rows, second_snapshots_tags, second_snapshots_count, second_snapshots_stride,
            second_snapshots_pitch,
        ),
        Scratch(second_scratch_workspace, second_scratch_arrivals),
        Output(
            second_output_rows, second_output_latent, second_output_norm_weight, second_output_rope,
            second_output_max_position, second_output_pages, second_output_page_stride, second_output_scales,
            second_output_scales_stride, second_output_rows_per_page, second_output_num_slots, second_output_scale,
        ),
    )  # fmt: skip
    half = tl.num_programs(0) // 2
    pid = tl.program_id(0)
    if pid < half:
        run_step(pid, half, plan, snap_table, first, HOW_0, SPEC_0, FMT_0)
    else:
        run_step(pid - half, half, plan, snap_table, second, HOW_1, SPEC_1, FMT_1)


@triton.jit
def store_kernel(
    plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors,
    places_slots, places_positions,
    pooled, pooled_stride,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    also_rows, also_latent, also_norm_weight, also_rope, also_max_position, also_pages, also_page_stride, also_scales,
    also_scales_stride, also_rows_per_page, also_num_slots, also_scale,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr, ALSO: tl.constexpr,
):  # fmt: skip
    """`store`, for rows that were pooled elsewhere: a program for each work item or, without a plan, for each row."""
    plan = Plan(plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors)
    output = Output(
        output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
        output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    also = Output(
        also_rows, also_latent, also_norm_weight, also_rope, also_max_position, also_pages, also_page_stride, also_scales,
        also_scales_stride, also_rows_per_page, also_num_slots, also_scale,
    )  # fmt: skip
    if places_slots is None:
        store_entry(plan, pooled, output, HOW, SPEC, FMT)
    else:
        places = Places(places_slots, places_positions)
        store_placed(places, plan.errors, pooled, pooled_stride, output, also, HOW, SPEC, FMT, ALSO)


@triton.jit
def store_entry(plan, pooled, output, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Stores the entry of a work item whose window ends."""
    pid = tl.program_id(0)
    item = load_item(plan.items, pid)
    position = item.window * SPEC.RATIO
    entry = tl.where(pid < load_plan(plan.num_items), item.entry, -1)
    cache_slot, weight, cos, sin = entry_address(entry, position, plan, output, SPEC)
    wait_for_inputs(HOW.PDL)
    deliver, refused = slot_valid(entry, cache_slot, position, plan.entry_capacity, output, SPEC.ROPE_DIM)
    if deliver:
        y = tl.load(pooled + entry.to(tl.int64) * SPEC.HEAD_DIM + tl.arange(0, SPEC.HEAD_DIM)).to(tl.float32)
        emit(y, entry, cache_slot, weight, cos, sin, output, SPEC, FMT, HOW.TARGET)
    if refused:
        tl.atomic_add(plan.errors, 1)


@triton.jit
def store_placed(
    places, errors, pooled, stride, output, also, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr, ALSO: tl.constexpr
):
    """Stores a row at its slot of one cache or two."""
    wait_for_inputs(HOW.PDL)  # slots and positions may be of the launch before
    pid = tl.program_id(0).to(tl.int64)
    slot = tl.load(places.slots + pid).to(tl.int64)
    wanted = slot >= 0
    position = slot
    known = wanted
    if SPEC.ROPE_DIM > 0:
        position = tl.load(places.positions + pid).to(tl.int64)
        known = wanted & (position >= 0) & (position < output.max_position)
    here = known & (slot < output.num_slots)
    fine = here
    either = here
    if also.pages is not None:
        there = known & (slot < also.num_slots)
        fine = here & there
        either = here | there
    if either:
        y = tl.load(pooled + pid * stride + tl.arange(0, SPEC.HEAD_DIM)).to(tl.float32)
        weight, cos, sin = load_finish(position, output, SPEC)
        if also.pages is None:
            emit(y, pid, slot, weight, cos, sin, output, SPEC, FMT, HOW.TARGET)
        else:
            if here:
                emit(y, pid, slot, weight, cos, sin, output, SPEC, FMT, HOW.TARGET)
            if there:
                emit(y, pid, slot, weight, cos, sin, also, SPEC, ALSO, HOW.TARGET)
    if errors is not None:
        if wanted & (fine == 0) & (errors.to(tl.int64, bitcast=True) != 0):  # the caller may have none
            tl.atomic_add(errors, 1)
