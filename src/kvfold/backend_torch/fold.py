"""The torch backend of `compress` over a `FoldState`: any device, vectorized over work items, to be read beside DESIGN.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..contract import ROWS_AT_ONCE
from ..spec import CompressorSpec
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor, PlanData
from .finish import emit
from .items import Items, StateRows, history_starts

LOG2_E = 1.4426950408889634
LOWEST = torch.finfo(torch.float32).min  # the maximum of no scores: finite, so that a score of -inf needs no guard

_EXP2 = [math.log(2) ** k / math.factorial(k) for k in range(10)]  # Taylor: 7e-12 off at most for |x| <= 1/2


def exp2(x: torch.Tensor) -> torch.Tensor:
    """2 ** x for x <= 0, fp32 to fp32, in operations of which IEEE fixes every bit.

    `torch.exp2` on a CPU gives the elements behind a thread's last full vector other last bits than the same elements
    elsewhere, and so an entry other bits in another batch.
    """
    x = x.double().clamp(min=-1000.0)
    whole = x.round()
    part = x - whole
    power = torch.full_like(part, _EXP2[-1])
    for coefficient in _EXP2[-2::-1]:
        power = power * part + coefficient
    # A NaN is one in `power` already, whatever integer is made of it here.
    return (power * ((whole.long() + 1023) << 52).view(torch.float64)).float()


def fold_step(
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor], k: torch.Tensor, s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Folds value `k` with score `s` (ape added) into `(m, l, a)`, which is kept; fp32, elementwise."""
    m, l, a = state
    d = s - m
    e = exp2(d.abs() * -LOG2_E)
    rises = d > 0
    alpha = torch.where(rises, e, 1.0)
    beta = torch.where(rises, 1.0, e)
    # Not `torch.maximum`, whose sign of a zero differs behind a thread's last full vector.
    return torch.where(rises, s, m), l * alpha + beta, a * alpha + beta * k


def fold_group(
    state: tuple[torch.Tensor, torch.Tensor, torch.Tensor], ks: list[torch.Tensor], ss: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Folds rows with values `ks` and scores `ss` (ape added) into `(m, l, a)` at once; fp32, elementwise."""
    m, l, a = state
    top = m
    for s in ss:
        top = torch.where(s > top, s, top)  # a NaN is no maximum, as on a GPU
    alpha = exp2((m - top) * LOG2_E)
    l, a = l * alpha, a * alpha
    for k, s in zip(ks, ss, strict=True):
        e = exp2((s - top) * LOG2_E)
        l, a = l + e, a + e * k
    return top, l, a


@torch.inference_mode()
def compress_torch(c: Compressor, plan: PlanData, rows: torch.Tensor | None) -> None:
    """`compress` over a `FoldState`, after its arguments were checked."""
    kv_score, state, spec = c.kv_score, c.state, c.spec
    items, held = Items.of(plan), StateRows(state)
    h0 = history_starts(spec, state.kind, items.start)
    usable = (items.slot < state.num_slots) & (items.token + items.end - items.start <= kv_score.shape[0])
    slot = torch.where(usable, items.slot, 0)
    if state.num_slots:
        for back in range(1, held.history + 1):
            position = items.start - back
            usable &= (position < h0) | (held.find(slot, position) >= 0)
    first = items.window == items.start // spec.ratio
    plan.errors.add_((first & ~usable).sum().int())
    items, h0 = items[usable], h0[usable]
    if items.window.numel() == 0:
        return
    if c.ape is None:
        c = c._replace(ape=torch.zeros(spec.ratio, spec.channels, dtype=torch.float32, device=kv_score.device))
    pooled, stores = (_fold_items if state.kind == "fold" else _fold_rows)(c, items, held)
    if c.snapshots is not None:
        for store in stores:
            _store_snapshots(store, items, plan, c.snapshots)
    _store(stores, items, h0, held, spec)
    emit(pooled, items, plan, c, rows)


@dataclass
class _Store:
    """Rows for the state, snapshots or both: `data[i]` for `position[i]` of the sequence of `item[i]`, tagged `tag[i]`."""

    item: torch.Tensor
    position: torch.Tensor
    data: torch.Tensor
    tag: torch.Tensor

    def __getitem__(self, mask: torch.Tensor) -> _Store:
        return _Store(*(column[mask] for column in vars(self).values()))


def _masked(live: torch.Tensor, k: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token that is not there: -inf weighs nothing, and adding -0 changes no bit, not even the sign of a zero."""
    return torch.where(live[:, None], k, -0.0), torch.where(live[:, None], s, -torch.inf)


def _empty_fold(n: int, spec: CompressorSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    zeros = torch.zeros(n, spec.head_dim, dtype=torch.float32, device=device)
    return torch.full_like(zeros, LOWEST), zeros, zeros


def _fold_items(c: Compressor, items: Items, held: StateRows) -> tuple[torch.Tensor, list[_Store]]:
    """State of fold rows: resume from the row before the step, fold the new tokens of each window."""
    kv_score, spec = c.kv_score, c.spec
    position = torch.maximum(items.start, items.window * spec.ratio)
    count = torch.minimum(items.end, (items.window + 1) * spec.ratio) - position
    state = _empty_fold(len(position), spec, kv_score.device)
    resumes = (position == items.start) & (items.start % spec.ratio != 0)
    if bool(resumes.any()):
        row = torch.where(resumes, held.find(items.slot, items.start - 1), 0)
        kept = held.data[row].unbind(1)
        state = tuple(torch.where(resumes[:, None], old, new) for old, new in zip(kept, state, strict=True))
    stores = []
    for i in range(int(count.max())):
        live, x = i < count, position + i
        row = torch.where(live, items.token + x - items.start, 0)
        k, s = kv_score[row].float().split(spec.channels, dim=1)
        state = fold_step(state, *_masked(live, k, s + c.ape[x % spec.ratio]))
        kept = (live & ((x >= items.end - held.ring) | _has_snapshot(c.snapshots, x))).nonzero()[:, 0]
        if kept.numel():
            # No step resumes from the end of a window: that row is not kept, only what stood there is gone.
            tag = torch.where(x[kept] % spec.ratio == spec.ratio - 1, -1, x[kept])
            stores.append(_Store(kept, x[kept], torch.stack([part[kept] for part in state], dim=1), tag))
    return state[2] / state[1], stores


def _fold_rows(c: Compressor, items: Items, held: StateRows) -> tuple[torch.Tensor, list[_Store]]:
    """State of input rows: fold all rows of each window that ends here, old ones from the state and new ones live."""
    kv_score, spec = c.kv_score, c.spec
    pooled = torch.zeros(len(items.window), spec.head_dim, dtype=torch.float32, device=kv_score.device)
    ends = (items.entry >= 0).nonzero()[:, 0]
    if ends.numel():
        done = items[ends]
        m, l, zeros = _empty_fold(len(ends), spec, kv_score.device)
        state = m, l, -zeros  # -0: the first product is then what it is without a sum
        ks: list[torch.Tensor] = []
        ss: list[torch.Tensor] = []
        for j in range(spec.window_rows):
            x = (done.window - int(spec.overlap)) * spec.ratio + j
            half = slice(0, spec.head_dim) if spec.overlap and j < spec.ratio else slice(-spec.head_dim, None)
            old = x < done.start
            live = kv_score[torch.where(old, 0, done.token + x - done.start)].float()
            kept = held.data[held.find(done.slot, x).clamp(min=0)].float()
            k, s = torch.where(old[:, None], kept, live).split(spec.channels, dim=1)
            bias = c.ape[x % spec.ratio]
            k, s = _masked(x >= 0, k[:, half], s[:, half] + bias[:, half])
            ks.append(k)
            ss.append(s)
            if len(ks) == ROWS_AT_ONCE or j == spec.window_rows - 1:
                state = fold_group(state, ks, ss)
                ks, ss = [], []
        pooled[ends] = state[2] / state[1]
    stores = []
    for j in range(spec.ratio):
        x = items.window * spec.ratio + j
        live = (x >= items.start) & (x < items.end)
        kept = (live & ((x >= items.end - held.ring) | _has_snapshot(c.snapshots, x))).nonzero()[:, 0]
        if kept.numel():
            row = (items.token + x - items.start)[kept]
            stores.append(_Store(kept, x[kept], kv_score[row].to(held.data.dtype), x[kept]))
    return pooled, stores


def _has_snapshot(snapshots: Snapshots | None, position: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(position, dtype=torch.bool) if snapshots is None else snapshots.of(position)


def _store_snapshots(store: _Store, items: Items, plan: PlanData, snapshots: Snapshots) -> None:
    """Writes those of the rows that belong to the snapshot of a page, each where the plan's table says."""
    table, size, ratio = plan.snapshot_table, snapshots.page_size, plan.ratio
    assert table is not None
    page = store.position // size
    kept = (snapshots.of(store.position) & (page < table.shape[1])).nonzero()[:, 0]
    item, position, page = store.item[kept], store.position[kept], page[kept]
    target = table[items.sequence[item], page].long()
    wrong = (target < -1) | (target >= snapshots.num_pages)
    plan.errors.add_((wrong & ((position + 1) % size == 0)).sum().int())
    inside = ~wrong & (target >= 0)
    at = target[inside], position[inside] % ratio % snapshots.rows_per_page
    snapshots.rows[at] = store.data[kept][inside].flatten(1)
    snapshots.positions[at] = position[inside].int()


def _store(stores: list[_Store], items: Items, h0: torch.Tensor, held: StateRows, spec: CompressorSpec) -> None:
    stores = [store[store.position >= items.end[store.item] - held.ring] for store in stores]
    places = [held.place(items.slot[store.item], store.position, h0[store.item], items.start[store.item]) for store in stores]
    first = items.window == items.start // spec.ratio
    held.retire(items.slot[first], h0[first], items.start[first], items.end[first])
    for store, place in zip(stores, places, strict=True):
        held.tags[place] = store.tag.int()
        held.data[place[store.tag >= 0]] = store.data[store.tag >= 0]
