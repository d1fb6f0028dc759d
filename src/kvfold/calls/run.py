"""From the arguments of a call to one backend, checked on the way. Nothing here is traced (ops.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments.checks import check_eager, check_switch
from ..backend_torch.finish import store_torch
from ..backend_torch.fold import compress_torch
from ..backend_torch.plan import update_torch
from ..backend_torch.restore import restore_torch
from ..backend_torch.window import compress_window_torch
from ..storage.fold_state import FoldState
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor, PlanData
from .checks import check_compress, check_many, check_restore, check_store, check_update

# `backend_triton` is imported by its first call: it imports triton, which the torch backend does not need.


def run_compress(c: Compressor, plan: PlanData, rows: torch.Tensor | None, backend: str | None, pdl: bool | None) -> None:
    check_switch("pdl", pdl)
    chosen = check_compress(c, plan, rows, backend)
    if plan.batch == 0:
        return
    if chosen == "torch":
        _compress_torch(c, plan, rows)
    else:
        from ..backend_triton import launch

        run = launch.compress_triton if isinstance(c.state, FoldState) else launch.compress_window_triton
        run(c, plan, rows, pdl)


def run_many(compressors: Sequence[Compressor], plan: PlanData, backend: str | None, pdl: bool | None) -> None:
    check_switch("pdl", pdl)
    chosen = check_many(compressors, plan, backend)
    if plan.batch == 0:
        return
    if chosen == "torch":
        for c in compressors:
            _compress_torch(c, plan, None)
    else:
        from ..backend_triton import launch

        if len(compressors) == 1:
            launch.compress_triton(compressors[0], plan, None, pdl)
        else:
            launch.compress_pair_triton((compressors[0], compressors[1]), plan, pdl)


def _compress_torch(c: Compressor, plan: PlanData, rows: torch.Tensor | None) -> None:
    run = compress_torch if isinstance(c.state, FoldState) else compress_window_torch
    run(c, plan, rows)


def run_store(c: Compressor, plan: PlanData, backend: str | None, pdl: bool | None) -> None:
    """Of a compressor without a state, whose `kv_score` are the pooled rows."""
    check_switch("pdl", pdl)
    if check_store(c, plan, backend) == "torch":
        store_torch(c, plan)
    else:
        from ..backend_triton import launch

        launch.store_triton(c.kv_score, plan, c.cache, c.spec, c.norm_weight, c.rope, pdl)


def run_restore(
    state: FoldState,
    snapshots: Snapshots,
    slots: torch.Tensor,
    pages: torch.Tensor,
    start_pos: torch.Tensor,
    errors: torch.Tensor,
    backend: str | None,
) -> None:
    chosen = check_restore(state, snapshots, slots, pages, start_pos, errors, backend)
    if slots.shape[0] == 0:
        return
    if chosen == "torch":
        restore_torch(state, snapshots, slots.long(), pages.long(), start_pos.long(), errors)
    else:
        from ..backend_triton import launch

        launch.restore_triton(state, snapshots, slots, pages, start_pos, errors)


def run_update(plan: PlanData, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    check_update(plan, start_pos, cu_seqlens)
    if plan.batch == 0:
        plan.cu_seqlens.copy_(cu_seqlens)
    elif plan.start_pos.is_cuda:
        plan.fresh = True
        from ..backend_triton.launch import update_on_gpu

        update_on_gpu(plan, start_pos, cu_seqlens)
    else:
        check_eager("start_pos")
        update_torch(plan, start_pos, cu_seqlens)
