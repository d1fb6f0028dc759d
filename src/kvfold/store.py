"""`store`: the second stage alone, for engines that pool in a launch of their own."""

from __future__ import annotations

import torch

from . import ops
from .arguments.checks import check_type, traced
from .calls.run import run_store
from .plan import StepPlan
from .spec import CompressorSpec
from .storage.cache import EntryCache
from .storage.step import Compressor


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
    run = ops.store if traced(rows) else run_store
    run(Compressor(rows, None, cache, spec, None, norm_weight, rope), plan, backend, pdl)
