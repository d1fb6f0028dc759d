"""From the arguments of a call to one backend, checked on the way. Nothing here is traced (ops.py)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch

from ..arguments.checks import check_eager, check_switch
from ..backend_torch.finish import store_placed_torch, store_torch
from ..backend_torch.fold import compress_torch
from ..backend_torch.mean import compress_mean_torch
from ..backend_torch.plan import update_torch
from ..backend_torch.project import product_torch
from ..backend_torch.restore import restore_torch
from ..backend_torch.window import compress_window_torch
from ..contract import INT32_MAX
from ..storage.fold_state import FoldState
from ..storage.mean_state import MeanState
from ..storage.snapshots import Snapshots
from ..storage.step import NO_OUTPUTS, Compressor, Hits, Lengths, Outputs, Placed, PlanData, Projection
from ..storage.window_state import WindowState
from .check_project import check_hidden, check_product, check_projected, with_room
from .checks import check_compress, check_many, check_placed, check_restore, check_store, check_update


@cache
def _triton_product() -> ModuleType:
    from ..backend_triton import launch_product

    return launch_product


@cache
def _triton() -> ModuleType:
    """Imported by its first call, as it imports triton, which the torch backend does not need."""
    from ..backend_triton import launch

    return launch


def run_compress(c: Compressor, plan: PlanData, out: Outputs, backend: str | None, pdl: bool | None) -> None:
    check_switch("pdl", pdl)
    _compress(check_compress(c, plan, out, backend), c, plan, out, pdl)


def _compress(chosen: str, c: Compressor, plan: PlanData, out: Outputs, pdl: bool | None) -> None:
    if plan.batch == 0:
        return
    paged = isinstance(c.state, WindowState)
    if chosen == "torch":
        mean = compress_mean_torch if isinstance(c.state, MeanState) else compress_torch
        (compress_window_torch if paged else mean)(c, plan, out)
    elif paged:
        _triton().compress_window_triton(c, plan, out, pdl)
    else:
        _triton().compress_triton(c, plan, out, pdl)


def run_many(compressors: Sequence[Compressor], plan: PlanData, backend: str | None, pdl: bool | None) -> None:
    check_switch("pdl", pdl)
    _compress_many(check_many(compressors, plan, backend), compressors, plan, pdl)


def _compress_many(chosen: str, compressors: Sequence[Compressor], plan: PlanData, pdl: bool | None) -> None:
    if plan.batch == 0:
        return
    if chosen == "torch":
        for c in compressors:
            compress_torch(c, plan, NO_OUTPUTS)
    elif len(compressors) == 1:
        _triton().compress_triton(compressors[0], plan, NO_OUTPUTS, pdl)
    else:
        _triton().compress_pair_triton((compressors[0], compressors[1]), plan, pdl)


def run_product(p: Projection, kv_scores: Sequence[torch.Tensor], backend: str | None, pdl: bool | None) -> None:
    """kv_score of each compressor alone, from hidden states."""
    check_switch("pdl", pdl)
    chosen = check_hidden(p, backend)
    check_product(p, kv_scores)
    _product(chosen, p, kv_scores, pdl is not False)


def _product(chosen: str, p: Projection, kv_scores: Sequence[torch.Tensor], pdl: bool) -> None:
    if p.hidden.shape[0] == 0:
        return
    if chosen == "torch":
        product_torch(p, kv_scores)
    else:
        _triton_product().product_triton(p, kv_scores, pdl)


def run_project(
    p: Projection, compressors: Sequence[Compressor], plan: PlanData, out: Outputs, backend: str | None, pdl: bool | None
) -> None:
    """`project_compress` of one, or `project_compress_many` where there are no outputs."""
    check_switch("pdl", pdl)
    chosen = check_hidden(p, backend)
    made = with_room(p, compressors)
    kv_scores = [c.kv_score for c in made]
    check_product(p, kv_scores)
    if len(made) == 1:
        check_compress(made[0], plan, out, backend)
    else:
        check_many(made, plan, backend)
    check_projected(p, compressors, plan, out)
    if chosen == "triton":
        dependent = _triton().use_pdl(pdl, plan, p.hidden.device)  # the first launch after an update is now this one
    else:
        dependent = False
    _product(chosen, p, kv_scores, dependent)
    if len(made) == 1:
        _compress(chosen, made[0], plan, out, pdl)
    else:
        _compress_many(chosen, made, plan, pdl)


def run_store(c: Compressor, plan: PlanData, backend: str | None, pdl: bool | None) -> None:
    """Of a compressor without a state, whose `kv_score` are the pooled rows."""
    check_switch("pdl", pdl)
    if check_store(c, plan, backend) == "torch":
        store_torch(c, plan)
    else:
        _triton().store_triton(c, plan, pdl)


def run_placed(p: Placed, backend: str | None, pdl: bool | None) -> None:
    """`store` without a plan."""
    check_switch("pdl", pdl)
    chosen = check_placed(p, backend)
    if p.rows.shape[0] == 0:
        return
    if chosen == "torch":
        store_placed_torch(p)
    else:
        _triton().store_placed_triton(p, pdl)


def run_restore(state: FoldState, snapshots: Snapshots, hits: Hits, backend: str | None) -> None:
    chosen = check_restore(state, snapshots, hits, backend)
    if hits.slots.shape[0] == 0:
        return
    if chosen == "torch":
        restore_torch(state, snapshots, hits)
    else:
        _triton().restore_triton(state, snapshots, hits)


def run_update(plan: PlanData, lengths: Lengths) -> None:
    check_update(plan, lengths)
    if plan.batch == 0:
        plan.cu_seqlens.copy_(lengths.cu_seqlens.clamp(-INT32_MAX - 1, INT32_MAX))
    elif plan.start_pos.is_cuda:
        plan.fresh = True
        _triton().update_on_gpu(plan, *lengths)
    else:
        check_eager(lengths.name)
        update_torch(plan, *lengths)
