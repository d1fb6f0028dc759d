"""From checked arguments to one kernel launch."""

from __future__ import annotations

import torch
from triton.runtime.jit import JITFunction

from ..plan import StepPlan
from ..records import FORMATS, EntryCache, RecordFormat
from ..spec import CompressorSpec
from ..state import FoldState
from .configs import choose
from .step import fold_kernel, rows_kernel, store_kernel

INTERPRETED = not isinstance(fold_kernel, JITFunction)


def compress_triton(
    kv_score: torch.Tensor,
    plan: StepPlan,
    state: FoldState,
    cache: EntryCache | None,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    """`compress` after its arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    config = choose(state.kind, spec.head_dim, min(plan.max_new_tokens, spec.ratio))
    kernel = fold_kernel if state.kind == "fold" else rows_kernel
    # At least one program, to count sequences whose tokens an empty kv_score does not have.
    grid = (max(1, min(plan.item_capacity, plan.items_for(kv_score.shape[0]))),)
    kernel[grid](
        kv_score,
        kv_score.stride(0),
        kv_score.shape[0],
        ape,
        plan.items,
        plan.num_items,
        state.rows,
        state.positions,
        state.num_slots,
        state.ring,
        rows,
        *_epilogue_arguments(plan, cache, spec, norm_weight, rope),
        RATIO=spec.ratio,
        OVERLAP=int(spec.overlap),
        HISTORY=state.history,
        AHEAD=config.ahead if state.kind == "fold" else min(config.ahead, spec.window_rows),
        **epilogue_constants(cache.format if cache is not None else None, spec),
        num_warps=config.num_warps,
        # The bits must not depend on what the compiler fuses; the fused operations are written out.
        enable_fp_fusion=False,
    )


def store_triton(
    pooled: torch.Tensor,
    plan: StepPlan,
    cache: EntryCache,
    spec: CompressorSpec,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
) -> None:
    """`store` after its arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    store_kernel[(plan.item_capacity,)](
        pooled,
        plan.items,
        plan.num_items,
        *_epilogue_arguments(plan, cache, spec, norm_weight, rope),
        RATIO=spec.ratio,
        **epilogue_constants(cache.format, spec),
        num_warps=choose("store", spec.head_dim, 1).num_warps,
        enable_fp_fusion=False,
    )


def _epilogue_arguments(
    plan: StepPlan,
    cache: EntryCache | None,
    spec: CompressorSpec,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
) -> tuple[object, ...]:
    """From `entry_slots` to `errors`, as every kernel takes them."""
    if cache is None:
        return (plan.entry_slots, plan.entry_capacity, None, None, 0, None, 0, None, 0, 1, 0, 1.0, plan.errors)
    rotated = rope if spec.rope_dim else None
    return (
        plan.entry_slots,
        plan.entry_capacity,
        norm_weight,
        rotated,
        rotated.shape[0] if rotated is not None else 0,
        cache.pages,
        cache.pages.stride(0),
        cache.scale_pages,
        cache.scale_pages.stride(0) if cache.scale_pages is not None else 0,
        cache.rows_per_page,
        cache.num_slots,
        cache.scale,
        plan.errors,
    )


def epilogue_constants(fmt: RecordFormat | None, spec: CompressorSpec) -> dict[str, object]:
    """What the epilogue is compiled for."""
    # Without a cache nothing of a format is compiled in; any value serves, and one value means one kernel.
    fmt = fmt or FORMATS["bf16"]
    return {
        "HEAD_DIM": spec.head_dim,
        "LOG2": spec.head_dim.bit_length() - 1,
        "ROPE_DIM": spec.rope_dim,
        "EPS": spec.norm_eps,
        "HADAMARD": spec.hadamard,
        **fmt.constants(spec),
    }
