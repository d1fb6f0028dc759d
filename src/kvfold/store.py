"""`store`: the second stage alone, for engines that pool in a launch of their own."""

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

    Two forms: `store(rows, plan, cache, ...)` for the entries of a plan, and `store(rows, cache, slots=..., positions=...,
    ...)` for rows whose places the caller knows, in any order and of any sequences. Both give the same bytes for the same row,
    place and position. From fp32 rows that `compress(..., rows=rows)` made, they are the bytes of `compress` with the cache.

    Args:
        rows: bf16 or fp32. With a plan `[E, head_dim]`, row e is the pooled row of entry e; rows of entries that do not exist
            are not read. Without, `[n, head_dim]`, the last dimension contiguous, the row stride free.
        plan: of this step; `plan.entry_slots` says where each entry goes, -1 skips it. Without a plan the cache stands here.
        cache: mutated: one record per entry or row.
        slots: int32 or int64 `[n]`, the cache slot of each row; negative skips it, and the row is not read. No two of a call
            are the same.
        positions: int32 or int64 `[n]`, the position that RoPE turns a row by: that of its window's first token. None, or not
            read, where the spec has no RoPE.
        norm_weight: as for `compress`. Without a plan None leaves out the norm, as for rows that have had theirs.
        also: without a plan: one more cache, of any format, whose records of the same rows go to the same slots; mutated.
        errors: without a plan: int32 `[1]`, mutated: grows by one for each row that is refused by either cache: a slot beyond
            it, or a position below 0 or beyond the RoPE table. Default: refused rows are skipped all the same.
        spec, rope, backend, pdl: as for `compress`. Without a plan the kernel reads slots, positions and rows behind its wait:
            the launch before may have made them.

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
