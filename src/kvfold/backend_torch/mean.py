"""The torch backend of `compress` over a `MeanState`: any device, vectorized over work items, written to be read."""

from __future__ import annotations

import torch

from ..storage.step import Compressor, Outputs, PlanData
from .finish import emit
from .fold import LOWEST, fold_step, masked
from .items import Items


@torch.inference_mode()
def compress_mean_torch(c: Compressor, plan: PlanData, out: Outputs) -> None:
    """`compress` over a `MeanState`, after its arguments were checked: all rows are read before the first is written."""
    c = c.joined()
    kv_score, state, spec = c.kv_score, c.state, c.spec
    items, ratio = Items.of(plan), spec.ratio
    usable = (items.slot < state.num_slots) & (items.token + items.end - items.start <= kv_score.shape[0])
    plan.errors.add_(((items.window == items.start // ratio) & ~usable).sum().int())
    items = items[usable]
    if items.window.numel() == 0:
        return
    banks = state.rows if state.banks else state.rows[None]
    ape = torch.zeros(ratio, spec.channels, dtype=torch.float32, device=kv_score.device) if c.ape is None else c.ape
    position = torch.maximum(items.start, items.window * ratio)
    count = torch.minimum(items.end, (items.window + 1) * ratio) - position
    resumes = ((position == items.start) & (items.start % ratio != 0))[:, None]
    nothing = _to_mean(*torch.zeros(3, 1, spec.head_dim, dtype=torch.float32, device=kv_score.device))
    fold, kept = _from_mean(torch.where(resumes, banks[0][items.slot], nothing)), []
    for i in range(int(count.max())):
        live, x = i < count, position + i
        row = torch.where(live, items.token + x - items.start, 0)
        k, s = kv_score[row].float().split(spec.channels, dim=1)
        fold = fold_step(fold, *masked(live, k, s + ape[x % ratio]))
        wanted = live & (x % ratio != ratio - 1) & (state.banks > 0 or x == items.end - 1)
        item = wanted.nonzero()[:, 0]
        bank = x[item] - items.start[item] + 1 if state.banks else torch.zeros_like(item)
        kept.append((bank, items.slot[item], _to_mean(*(part[item] for part in fold))))
    for bank, slot, rows in kept:
        banks[bank, slot] = rows
    emit(fold[2] / fold[1], items, plan, c, out)


def _from_mean(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(m, l, a)` of rows of maximum, sum and mean; a cleared row has a maximum of -inf."""
    m, l, mean = rows.chunk(3, dim=1)
    return torch.where(m == -torch.inf, LOWEST, m), l, mean * l


def _to_mean(m: torch.Tensor, l: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    empty = l == 0
    return torch.cat((torch.where(empty, -torch.inf, m), l, torch.where(empty, 0.0, a / l)), dim=1)
