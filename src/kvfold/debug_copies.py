"""A call of `compress` on copies of what it writes, which kernels cannot tell from the originals."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from .compress import Compressor, compress
from .debug_compare import UNWRITTEN
from .plan import StepPlan
from .records import EntryCache
from .state import FoldState
from .window_state import WindowState

_PLAN_TENSORS = (
    "start_pos", "cu_seqlens", "state_slots", "cache_block_table", "entry_slots", "cu_entries", "items", "num_items",
    "entry_items", "errors",
)  # fmt: skip


@dataclass
class Result:
    state: FoldState | WindowState
    cache: EntryCache | None
    rows: torch.Tensor | None
    errors: int


def run_on_copies(c: Compressor, plan: StepPlan, rows: torch.dtype | None, backend: str) -> Result:
    """The call on copies; rows of entries that are not made keep `UNWRITTEN`."""
    plan, state, cache = _copy_plan(plan), _copy_state(c.state), _copy_cache(c.cache)
    before, out = int(plan.errors), None
    if rows is not None:
        whole = torch.full((plan.entry_capacity, c.spec.head_dim), UNWRITTEN, dtype=torch.int32, device=c.kv_score.device)
        out = (whole << 16).view(rows) if rows == torch.float32 else whole.short().view(rows)
    weights = {"spec": c.spec, "ape": c.ape, "norm_weight": c.norm_weight, "rope": c.rope}
    compress(c.kv_score, plan, state, cache, **weights, rows=out, backend=backend)
    return Result(state, cache, out, int(plan.errors) - before)


def _copy_plan(plan: StepPlan) -> StepPlan:
    new = copy.copy(plan)
    for name in _PLAN_TENSORS:
        tensor = getattr(plan, name)
        setattr(new, name, None if tensor is None else tensor.clone())
    new.block_tables = None if plan.block_tables is None else tuple(table.clone() for table in plan.block_tables)
    new._launcher, new.fresh = None, True
    return new


def _copy_state(state: FoldState | WindowState) -> FoldState | WindowState:
    if isinstance(state, FoldState):
        return FoldState(state.spec, _twin(state.rows), _twin(state.positions), state.max_new_tokens)
    return WindowState(_twin(state.kv), _twin(state.score))


def _copy_cache(cache: EntryCache | None) -> EntryCache | None:
    if cache is None:
        return None
    scales = None if cache.scale_pages is None else _twin(cache.scale_pages)
    return EntryCache(_twin(cache.pages), cache.format, cache.rows_per_page, cache.spec, scales=scales, scale=cache.scale)


def _twin(x: torch.Tensor) -> torch.Tensor:
    """A copy of which address and strides are what kernels are chosen by; gaps between pages shrink."""
    if x.numel() == 0:
        return x.clone()
    (outer, *inner), address = x.stride(), x.data_ptr() % 16
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape[1:], inner, strict=True))
    outer = span + (outer - span) % 16 if outer >= span else outer
    size = (span + (x.shape[0] - 1) * outer) * x.element_size()
    flat = torch.zeros(size + 16, dtype=torch.uint8, device=x.device)
    return flat[address : address + size].view(x.dtype).as_strided(x.shape, (outer, *inner)).copy_(x)
