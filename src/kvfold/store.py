"""`store`: what `compress` does after the pooling, for engines that pool in a launch of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch

from . import ops
from .arguments.checks import check_type, traced
from .calls.run import run_placed, run_store
from .contract import UnsupportedError
from .plan import StepPlan
from .spec import CompressorSpec
from .storage.cache import EntryCache
from .storage.step import Compressor, Placed


@overload
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
) -> None: ...


@overload
def store(
    rows: torch.Tensor,
    cache: EntryCache,
    *,
    slots: torch.Tensor,
    positions: torch.Tensor | None,
    spec: CompressorSpec,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    also: Sequence[EntryCache] = (),
    errors: torch.Tensor | None = None,
    backend: str | None = None,
    pdl: bool | None = None,
) -> None: ...


def store(
    rows: torch.Tensor,
    plan: StepPlan | EntryCache | None = None,
    cache: EntryCache | None = None,
    *,
    spec: CompressorSpec,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    slots: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    also: Sequence[EntryCache] = (),
    errors: torch.Tensor | None = None,
    backend: str | None = None,
    pdl: bool | None = None,
) -> None:
    """RMSNorm, RoPE, Hadamard, quantization and store of pooled rows, in one launch: what `compress` does after pooling.

    There are two forms. `store(rows, plan, cache, ...)` stores the entries of a plan. `store(rows, cache, slots=...,
    positions=..., ...)` stores rows whose slots the caller knows, in any order and of any sequences. Both give the same bytes
    for the same row, slot and position. From the fp32 rows of `compress(..., rows=rows)` they make the bytes that `compress`
    with the cache makes.

    Args:
        rows: bf16 or fp32. With a plan: `[E, head_dim]`, row e is the pooled row of entry e; rows without an entry are not
            read. Without a plan: `[n, head_dim]`, the last dimension contiguous, the row stride free.
        plan: the plan of this step; `plan.entry_slots` says where each entry goes, -1 skips it. In the second form the cache
            stands here.
        cache: mutated: one record per entry or row.
        slots: int32 or int64 `[n]`, the cache slot of each row, all different. A negative slot skips its row, which is not
            read.
        positions: int32 or int64 `[n]`, the position by which RoPE rotates each row: that of its window's first token. May be
            None, and is not read, if the spec has no RoPE.
        norm_weight: as for `compress`. Without a plan, None leaves out the norm, for rows that are normed already.
        also: without a plan: one more cache, of any format, whose records of the same rows go to the same slots; mutated.
        errors: without a plan: int32 `[1]`, mutated: grows by one for each row that either cache refuses, for a slot beyond
            the cache or a position outside the RoPE table. Refused rows are skipped with or without it.
        spec, rope, backend, pdl: as for `compress`. Without a plan the kernel reads slots, positions and rows after its wait,
            so the launch before may have made them.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then. With a plan, an entry slot outside the cache,
            or an entry beyond the RoPE table, is skipped and counted in `plan.errors`.
    """
    check_type("rows", rows, torch.Tensor)
    if isinstance(plan, EntryCache) or (plan is None and slots is not None):
        if isinstance(plan, EntryCache):
            if cache is not None:
                raise TypeError("plan must be a StepPlan where cache stands behind it, got an EntryCache")
            cache = plan
        placed = Placed(rows, slots, positions, (cache, *other_caches(also)), spec, norm_weight, rope, errors)
        (ops.store_placed if traced(rows) else run_placed)(placed, backend, pdl)
        return
    for name, value in (("slots", slots), ("positions", positions), ("also", also or None), ("errors", errors)):
        if value is not None:
            raise TypeError(f"{name} must be left out with a plan, got {type(value).__name__}")
    run = ops.store if traced(rows) else run_store
    run(Compressor(rows, None, cache, spec, None, norm_weight, rope), plan, backend, pdl)


def other_caches(also: Sequence[EntryCache]) -> Sequence[EntryCache]:
    """The caches of `also`, of which there is one at most."""
    if not isinstance(also, (tuple, list)):
        raise TypeError(f"also must be a tuple or a list of caches, got {type(also).__name__}")
    if len(also) > 1:
        raise UnsupportedError(f"also must hold one cache at most, as a launch stores into two in all, got {len(also)}")
    return also
