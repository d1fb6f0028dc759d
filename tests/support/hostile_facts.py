"""What two arguments of a call both say, and what must be the same: a call that was made although they differ is a fault."""

from __future__ import annotations

from typing import Any

from support.hostile_world import COMPRESSOR
from torch import Tensor

from kvfold import EntryCache, FoldState, Snapshots, StepPlan, WindowState


def disagreement(function: str, given: dict[str, Any]) -> str | None:
    """The first two that differ, in words; None where all agree."""
    if function in ("training.compress", "training.compress, two", "compress_backward"):
        packing, rows, spec = given["packing"], given["kv_score"], given["spec"]
        facts = ("ratio of packing", packing.ratio, spec.ratio), ("tokens of packing", packing.tokens, rows.shape[0])
        return next((f"{what}: {one} and {other}" for what, one, other in facts if one != other), None)
    if function == "compress_many" and given["compressors"] is not None:
        return None  # others than those that are here
    prefixes = ("0.", "1.") if function == "compress_many" else ("",)
    for prefix in prefixes:
        parts = {name: given.get(prefix + name) for name in (*COMPRESSOR, "rows", "latent")}
        for what, one, other in _facts(parts, given.get("plan")):
            if one != other:
                return f"{prefix}{what}: {one} and {other}"
    return None


def _facts(parts: dict[str, Any], plan: Any) -> list[tuple[str, Any, Any]]:
    state, cache, snapshots, spec = (parts[name] for name in ("state", "cache", "snapshots", "spec"))
    found: list[tuple[str, Any, Any]] = []
    objects = {"state": (state, FoldState), "cache": (cache, EntryCache), "snapshots": (snapshots, Snapshots)}
    there = {name: thing for name, (thing, kind) in objects.items() if isinstance(thing, kind)}
    if spec is not None:
        found += [(f"spec of {name}", thing.spec, spec) for name, thing in there.items()]
    if isinstance(state, FoldState) and isinstance(snapshots, Snapshots):
        found += [("spec of state and snapshots", state.spec, snapshots.spec)]
        found += [("dtype of state and snapshots", state.rows.dtype, snapshots.rows.dtype)]
    if isinstance(plan, StepPlan):
        found += _of_plan(plan, parts, spec)
    tensors = [x for x in parts.values() if isinstance(x, Tensor)]
    tensors += [
        x for thing in there.values() for x in (getattr(thing, "rows", None), getattr(thing, "pages", None)) if x is not None
    ]
    found += [("device", x.device, tensors[0].device) for x in tensors]
    return found


def _of_plan(plan: StepPlan, parts: dict[str, Any], spec: Any) -> list[tuple[str, Any, Any]]:
    state, cache, snapshots = (parts[name] for name in ("state", "cache", "snapshots"))
    found: list[tuple[str, Any, Any]] = []
    if spec is not None:
        found += [("ratio of plan", plan.ratio, spec.ratio)]
    if isinstance(cache, EntryCache) and plan.cache_block_table is not None:
        found += [("rows_per_page of plan and cache", plan.rows_per_page, cache.rows_per_page)]
    if isinstance(state, WindowState):
        found += [("page_size of plan and state", plan.page_size, state.page_size)]
        found += [("channels of state", state.channels, spec.channels)]
    if isinstance(state, FoldState):
        found += [("whether plan has state slots", plan.state_slots is not None, True)]
    if isinstance(snapshots, Snapshots):
        found += [("page size of plan and snapshots", plan.snapshot_page_size, snapshots.page_size)]
    for name in ("rows", "latent"):
        if isinstance(parts[name], Tensor) and spec is not None:
            found += [(f"shape of {name}", tuple(parts[name].shape), (plan.entry_capacity, spec.head_dim))]
    return found
