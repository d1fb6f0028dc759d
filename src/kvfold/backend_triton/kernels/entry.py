"""`compress`: the kernel of one compressor, and what it shares with that of two: a short step or a long one."""

import triton
import triton.language as tl

from ..args import Cache, Plan, Scratch, Snaps, SnapTable, State, Tokens
from .long_fold import long_fold_step
from .long_rows import long_rows_step
from .long_rows_narrow import narrow_rows_step
from .short import count_overflow, short_step


@triton.jit
def run_step(
    pid, programs, plan, snap_table, tokens, st, snaps, scratch, cache, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Program `pid` of the `programs` of one compressor.

    TOGETHER: 0 for a short step, a program for each work item; otherwise how many windows a program folds side by side.
    """
    if HOW.TOGETHER == 0:
        short_step(pid, plan, snap_table, tokens, st, snaps, cache, HOW, SPEC, FMT)
        if pid == programs - 1:
            count_overflow(plan, programs, SPEC.RATIO)
    elif SPEC.KIND == "fold":
        long_fold_step(pid, programs, plan, snap_table, tokens, st, snaps, scratch, cache, HOW, SPEC, FMT)
    elif HOW.TOGETHER > 1 and snaps.rows is None:
        narrow_rows_step(pid, programs, plan, snap_table, tokens, st, snaps, scratch.arrivals, cache, HOW, SPEC, FMT)
    else:
        long_rows_step(pid, programs, plan, snap_table, tokens, st, snaps, scratch.arrivals, cache, HOW, SPEC, FMT)


@triton.jit
def step_kernel(
    items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    workspace, arrivals, rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page,
    cache_slots, cache_scale,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """`compress` over a `FoldState`."""
    plan = Plan(items, num_items, entry_slots, entry_capacity, errors)
    snap_table = SnapTable(snap_table, snap_width, snap_page_size)
    tokens = Tokens(kv_score, kv_stride, num_tokens, ape)
    st = State(state_rows, state_tags, num_slots, ring)
    snaps = Snaps(snap_rows, snap_tags, num_snaps)
    scratch = Scratch(workspace, arrivals)
    cache = Cache(
        rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale
    )  # fmt: skip
    run_step(tl.program_id(0), tl.num_programs(0), plan, snap_table, tokens, st, snaps, scratch, cache, HOW, SPEC, FMT)
