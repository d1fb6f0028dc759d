"""`store`: the second stage alone, for pooled rows that somebody else made."""

import triton
import triton.language as tl

from ..args import Cache, Plan
from .finish import aim_entry, emit, judge_slot
from .pdl import load_plan, wait_for_inputs


@triton.jit
def store_kernel(
    items, num_items, entry_slots, entry_capacity, errors,
    pooled, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """One program per work item whose window ends."""
    plan = Plan(items, num_items, entry_slots, entry_capacity, errors)
    cache = Cache(
        None, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale
    )  # fmt: skip
    item = plan.items + tl.program_id(0) * 8
    window = load_plan(item)
    entry = tl.where(tl.program_id(0) < load_plan(plan.num_items), load_plan(item + 5), -1)
    cache_slot, weight, cos, sin = aim_entry(entry, window * SPEC.RATIO, plan, cache, SPEC)
    wait_for_inputs(HOW.PDL)
    deliver, refused = judge_slot(entry, cache_slot, window * SPEC.RATIO, plan.entry_capacity, cache, SPEC.ROPE_DIM)
    if deliver:
        y = tl.load(pooled + entry.to(tl.int64) * SPEC.HEAD_DIM + tl.arange(0, SPEC.HEAD_DIM)).to(tl.float32)
        emit(y, entry, cache_slot, weight, cos, sin, cache, SPEC, FMT, HOW.TARGET)
    if refused:
        tl.atomic_add(plan.errors, 1)
