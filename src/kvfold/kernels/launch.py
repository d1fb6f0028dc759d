"""From checked arguments to one kernel launch."""

from __future__ import annotations

import torch
from triton.runtime.jit import JITFunction

from ..plan import StepPlan
from ..records import EntryCache
from ..spec import CompressorSpec
from ..state import FoldState
from .configs import choose
from .step import fold_kernel, rows_kernel

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
    config = choose(state.kind, spec.head_dim, min(plan.max_new_tokens, spec.ratio))
    kernel = fold_kernel if state.kind == "fold" else rows_kernel
    ahead = config.ahead if state.kind == "fold" else min(config.ahead, spec.window_rows)
    fmt = cache.format if cache is not None else None
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
        plan.entry_slots,
        plan.entry_capacity,
        norm_weight if cache is not None else None,
        rope if cache is not None and spec.rope_dim else None,
        rope.shape[0] if rope is not None else 0,
        cache.pages if cache is not None else None,
        cache.pages.stride(0) if cache is not None else 0,
        cache.rows_per_page if cache is not None else 1,
        cache.num_slots if cache is not None else 0,
        plan.errors,
        RATIO=spec.ratio,
        OVERLAP=int(spec.overlap),
        HISTORY=state.history,
        AHEAD=ahead,
        HEAD_DIM=spec.head_dim,
        LOG2=spec.head_dim.bit_length() - 1,
        ROPE_DIM=spec.rope_dim,
        EPS=spec.norm_eps,
        HADAMARD=spec.hadamard,
        ELEMENT=fmt.element if fmt else None,
        GROUP=fmt.group if fmt else 0,
        FLOOR=fmt.scale_floor if fmt else 0.0,
        ROW_BYTES=fmt.row_bytes(spec) if fmt else 0,
        TAIL=fmt.tail if fmt else 0,
        num_warps=config.num_warps,
        # The bits must not depend on what the compiler fuses; the fused operations are written out.
        enable_fp_fusion=False,
    )
