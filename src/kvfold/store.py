"""`store`: the second stage alone, for engines that pool in a launch of their own."""

from __future__ import annotations

import torch

from .backend_torch import store_torch
from .checks import check_switch, check_tensor, check_type, traced
from .compress import cache_places, check_epilogue, check_plan, choose_backend, plan_places
from .overlap import Place, check_apart, find_room
from .plan import StepPlan
from .records import EntryCache
from .spec import CompressorSpec


def store(
    rows: torch.Tensor,
    plan: StepPlan,
    cache: EntryCache,
    *,
    spec: CompressorSpec,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    backend: str | None = None,
    pdl: bool | None = None,
) -> None:
    """RMSNorm, RoPE, Hadamard, quantization and store of pooled rows, in one launch: what `compress` does after pooling.

    From fp32 rows that `compress(..., rows=rows)` made, the records have the same bytes as `compress` with the cache.

    Args:
        rows: bf16 or fp32 `[E, head_dim]`, row e is the pooled row of entry e of the plan. Rows of entries that do not
            exist are not read.
        plan: of this step; `plan.entry_slots` says where each entry goes, -1 skips it.
        cache: mutated: one record per entry.
        spec, norm_weight, rope, backend, pdl: as for `compress`.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then. An entry slot outside the cache, or an
            entry beyond the RoPE table, is skipped and counted in `plan.errors`.
    """
    check_type("rows", rows, torch.Tensor)
    if traced(rows):
        from . import ops

        ops.store(rows, plan, cache, spec, norm_weight, rope, backend, pdl)
    else:
        run_store(rows, plan, cache, spec, norm_weight, rope, backend, pdl)


def run_store(
    rows: torch.Tensor,
    plan: StepPlan,
    cache: EntryCache,
    spec: CompressorSpec,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    backend: str | None,
    pdl: bool | None,
) -> None:
    """`store` of real tensors: straight to the launch."""
    check_switch("pdl", pdl)
    chosen = check_store(rows, plan, cache, spec, norm_weight, rope, backend)
    if chosen == "torch":
        with torch.no_grad():
            store_torch(rows, plan, cache, spec, norm_weight, rope)
    else:
        from .kernels.launch import store_triton  # imports triton, which the torch backend does not need

        store_triton(rows, plan, cache, spec, norm_weight, rope, pdl)


def check_store(
    rows: torch.Tensor,
    plan: StepPlan,
    cache: EntryCache,
    spec: CompressorSpec,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    backend: str | None,
) -> str:
    """Checks the arguments of `store` and returns the backend to use."""
    check_type("rows", rows, torch.Tensor)
    chosen = choose_backend(backend, "rows", rows)
    check_type("spec", spec, CompressorSpec)
    check_type("plan", plan, StepPlan)
    check_type("cache", cache, EntryCache)
    check_plan(plan, spec, rows.device)
    check_tensor("rows", rows, (plan.entry_capacity, spec.head_dim), (torch.bfloat16, torch.float32), rows.device)
    check_epilogue(plan, cache, spec, norm_weight, rope, rows.device)
    _check_memory(rows, plan, cache, norm_weight, rope)
    return chosen


def _check_memory(
    rows: torch.Tensor, plan: StepPlan, cache: EntryCache, norm_weight: torch.Tensor, rope: torch.Tensor | None
) -> None:
    """Checks that nothing shares a byte with the pages; what is where it was in the call before is not compared again."""
    start = rows.data_ptr()
    known = plan.items.data_ptr(), norm_weight.data_ptr(), 0 if rope is None else rope.data_ptr()
    stored, low, high = cache._stored
    if stored == known and low <= start and start + rows.nbytes <= high:
        return
    places = [*cache_places(cache), *plan_places(plan), Place("norm_weight", norm_weight)]
    places += [] if rope is None else [Place("rope", rope)]
    bounds = check_apart(places)
    room = find_room(bounds, start, start + rows.nbytes)
    if room == (0, 0):
        check_apart([*places, Place("rows", rows)])
    cache._stored = known, *room
