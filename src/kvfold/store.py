"""`store`: the second stage alone, for engines that pool in a launch of their own."""

from __future__ import annotations

import torch

from .arguments.checks import check_switch, check_tensor, check_type, traced
from .arguments.overlap import NO_ROOM, Place, check_apart, find_room
from .backend_torch.fold import store_torch
from .compress import cache_places, check_epilogue, check_plan, choose_backend
from .plan import StepPlan, plan_places
from .spec import CompressorSpec, check_spec
from .storage.formats import EntryCache
from .storage.remembered import Layer, check_made


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
        with torch.inference_mode():
            store_torch(rows, plan, cache, spec, norm_weight, rope)
    else:
        from .backend_triton.launch import store_triton  # imports triton, which the torch backend does not need

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
    check_spec("spec", spec)
    check_made("plan", plan, StepPlan)
    check_made("cache", cache, EntryCache)
    tokens, weights = (spec, cache._token), (norm_weight, rope)
    layer = cache._layer
    if layer is None or not layer.same(tokens, weights):
        check_epilogue(cache, spec, norm_weight, rope, rows.device)
        layer = cache._layer = Layer(tokens, weights, _places(cache, norm_weight, rope))
    check_tensor("rows", rows, (plan.entry_capacity, spec.head_dim), (torch.bfloat16, torch.float32), cache.device)
    met = layer.met(plan)
    if met is None:
        check_plan(plan, spec, rows.device, cache)
        met = layer.meet(plan, lambda: [*_places(cache, norm_weight, rope), *plan_places(plan)])
    start = rows.data_ptr()
    end = start + rows.nbytes
    if start < met.rows[0] or end > met.rows[1]:
        met.rows = find_room(met.bounds, start, end)
        if met.rows == NO_ROOM:
            check_apart([*_places(cache, norm_weight, rope), *plan_places(plan), Place("rows", rows)])
    return chosen


def _places(cache: EntryCache, norm_weight: torch.Tensor, rope: torch.Tensor | None) -> list[Place]:
    weights = (("norm_weight", norm_weight), ("rope", rope))
    return [*cache_places(cache), *(Place(name, x) for name, x in weights if x is not None)]
