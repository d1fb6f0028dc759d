"""The torch backend of `compress` over a `FoldState`: any device, vectorized over work items, to be read beside DESIGN.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..contract import ROWS_AT_ONCE
from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.pack import to_bf16
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor, Outputs, PlanData
from .finish import emit
from .items import FoldRows, Items, Places, StateRows, history_starts

LOG2_E = 1.4426950408889634
LOWEST = torch.finfo(torch.float32).min  # the maximum of no scores: finite, so that a score of -inf needs no guard

_LN_2 = math.log(2)
_IN_CACHE = 1 << 16  # elements that several operations in turn go over


def exp2(x: torch.Tensor) -> torch.Tensor:
    """2 ** x for x <= 0, fp32 to fp32: rounded once, from fp64.

    On a CPU, `torch.exp2` gives the elements after a thread's last full vector other last bits than the same elements
    elsewhere, and so an entry other bits in another batch. `torch.exp` does not.
    """
    return x.double().mul_(_LN_2).exp_().float()


State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (m, l, a)


def _weights(m: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether a score `s` is above the maximum before it, the factor for the sums before, and that for the token."""
    d = s - m
    rises = d > 0
    e = exp2(d.abs_().mul_(-LOG2_E))
    return rises, torch.where(rises, e, 1.0), torch.where(rises, 1.0, e)


def fold_step(state: State, k: torch.Tensor, s: torch.Tensor) -> State:
    """Folds value `k` with score `s` (ape added) into `(m, l, a)`, which is not changed; fp32, elementwise."""
    m, l, a = state
    rises, alpha, beta = _weights(m, s)
    # Not `torch.maximum`, whose sign of a zero differs behind a thread's last full vector.
    return torch.where(rises, s, m), l * alpha + beta, a * alpha + beta * k


def fold_steps(state: State, k: torch.Tensor, s: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """m, and `[l, a]`, after each row of `k` and `s` `[.., rows, head_dim]`, as `fold_step` makes them, until the next."""
    m, l, a = state
    sums, at_once = torch.stack((l, a)), max(1, _IN_CACHE // max(m.numel(), 1))
    for ks, ss in zip(k.split(at_once, -2), s.split(at_once, -2), strict=True):
        before = torch.empty_like(ss)
        maxima = [*before.unbind(-2), torch.empty_like(m)]
        maxima[0].copy_(m)
        for score, m, into in zip(ss.unbind(-2), maxima, maxima[1:], strict=False):
            torch.where(score > m, score, m, out=into)
        _, alphas, betas = _weights(before, ss)
        added = torch.stack((betas, betas * ks))
        for m, alpha, new in zip(maxima[1:], alphas.unbind(-2), added.unbind(-2), strict=True):
            sums.mul_(alpha).add_(new)
            yield m, sums


def fold_group(state: State | None, ks: torch.Tensor, ss: torch.Tensor) -> State:
    """Folds rows with values `ks` and scores `ss` (ape added), `[.., rows, head_dim]`, into `(m, l, a)` at once; fp32.

    state: None before the first rows, for `(LOWEST, 0, -0)`: adding the first product to -0 gives that product.
    """
    # A NaN is a maximum here and none on a GPU; either way sum and entry are NaN.
    top = ss.amax(-2)
    top = top.clamp_(min=LOWEST) if state is None else torch.maximum(top, state[0])
    weights = exp2((ss - top.unsqueeze(-2)) * LOG2_E)
    first, *rows = torch.stack((weights, weights * ks)).unbind(-2)
    if state is not None:
        alpha = exp2((state[0] - top) * LOG2_E)
        first = torch.stack(state[1:]) * alpha + first
    for row in rows:
        first = first + row
    return top, *first.unbind(0)


@torch.inference_mode()
def compress_torch(c: Compressor, plan: PlanData, out: Outputs) -> None:
    """`compress` over a `FoldState` or without a state, after its arguments were checked."""
    c = c.joined()
    if c.state is not None and c.state.round_inputs:
        c = c._replace(kv_score=to_bf16(c.kv_score.float()))
    kv_score, state, spec = c.kv_score, c.state, c.spec
    if state is None:
        _compress_ungated(c, plan, out)
        return
    items = Items.of(plan)
    usable = (items.slot < state.num_slots) & (items.token + items.end - items.start <= kv_score.shape[0])
    slot = torch.where(usable, items.slot, 0)
    if state.num_slots:
        usable &= _can_start(state, slot, items.start)
    first = items.window == items.start // spec.ratio
    plan.errors.add_((first & ~usable).sum().int())
    items = items[usable]
    if items.window.numel() == 0:
        return
    if c.ape is None:
        c = c._replace(ape=torch.zeros(spec.ratio, spec.channels, dtype=torch.float32, device=kv_score.device))
    pooled = (_fold_items if state.kind == "fold" else _fold_rows)(c, items, plan)
    emit(pooled, items, plan, c, out)


def _can_start(state: FoldState, slot: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Whether the slots hold all that steps from `start` read."""
    if state.kind == "rows":
        return StateRows(state).history(slot, start)[0]
    return (start % state.spec.ratio == 0) | (FoldRows(state).find(slot, start - 1) >= 0)


def _compress_ungated(c: Compressor, plan: PlanData, out: Outputs) -> None:
    """A window is a token, whose values are the pooled row."""
    items = Items.of(plan)
    usable = items.token + items.end - items.start <= c.kv_score.shape[0]
    plan.errors.add_(((items.window == items.start) & ~usable).sum().int())
    items = items[usable]
    emit(c.kv_score[items.token + items.window - items.start].float(), items, plan, c, out)


class _Kept(NamedTuple):
    """Rows for the state, snapshots or both: `data[i]` for `position[i]` of the sequence of `item[i]`, tagged `tag[i]`."""

    item: torch.Tensor
    position: torch.Tensor
    data: torch.Tensor
    tag: torch.Tensor

    def where(self, mask: torch.Tensor) -> _Kept:
        return _Kept(*(column[mask] for column in self))


def masked(live: torch.Tensor, k: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A token that is not there: -inf weighs nothing, and adding -0 changes no bit, not even the sign of a zero."""
    return torch.where(live[:, None], k, -0.0), torch.where(live[:, None], s, -torch.inf)


def empty_fold(*shape: int, device: torch.device) -> State:
    """The state of no tokens; `shape` ends in head_dim."""
    zeros = torch.zeros(shape, dtype=torch.float32, device=device)
    return torch.full_like(zeros, LOWEST), zeros, zeros


def _fold_items(c: Compressor, items: Items, plan: PlanData) -> torch.Tensor:
    """State of fold rows: resume from the row before the step, fold the new tokens of each window, and keep rows."""
    kv_score, spec, held = c.kv_score, c.spec, FoldRows(c.state)
    position = torch.maximum(items.start, items.window * spec.ratio)
    count = torch.minimum(items.end, (items.window + 1) * spec.ratio) - position
    state = empty_fold(len(position), spec.head_dim, device=kv_score.device)
    resumes = (position == items.start) & (items.start % spec.ratio != 0)
    old = held.data[torch.where(resumes, held.find(items.slot, items.start - 1), 0)].unbind(1)
    state = tuple(torch.where(resumes[:, None], kept, new) for kept, new in zip(old, state, strict=True))
    found = []
    for i in range(int(count.max())):
        live, x = i < count, position + i
        row = torch.where(live, items.token + x - items.start, 0)
        k, s = kv_score[row].float().split(spec.channels, dim=1)
        state = fold_step(state, *masked(live, k, s + c.ape[x % spec.ratio]))
        item = (live & ((x >= items.end - held.ring) | _of_snapshots(c, x))).nonzero()[:, 0]
        x = x[item]
        # No step resumes from the end of a window: that row is not kept, only what stood there is gone.
        tag = torch.where(x % spec.ratio == spec.ratio - 1, -1, x)
        found.append(_Kept(item, x, torch.stack([part[item] for part in state], dim=1), tag))
    new = _Kept(*map(torch.cat, zip(*found, strict=True)))
    if c.snapshots is not None:
        _store_snapshots(new, items, plan, c.snapshots)
    _store(new, items, held, spec)
    return state[2] / state[1]


def _fold_rows(c: Compressor, items: Items, plan: PlanData) -> torch.Tensor:
    """State of input rows: fold all rows of each window that ends here, old ones from the state and new ones live."""
    kv_score, spec, held = c.kv_score, c.spec, StateRows(c.state)
    _, history = held.history(items.slot, items.start)
    pooled = torch.zeros(len(items.window), spec.head_dim, dtype=torch.float32, device=kv_score.device)
    ends = (items.entry >= 0).nonzero()[:, 0]
    if ends.numel():
        done, first = items[ends], (items.window == items.start // spec.ratio)[ends]
        before, lo, hi = (place[ends] for place in history)
        state, ks, ss = None, [], []
        for j in range(spec.window_rows):
            x = (done.window - int(spec.overlap)) * spec.ratio + j
            lower = spec.overlap and j < spec.ratio
            half = slice(0, spec.head_dim) if lower else slice(-spec.head_dim, None)
            places, place = (held.lo, torch.where(first, before, lo)) if lower else (held.hi, hi)
            old = (x < done.start) & (x >= 0)
            live = kv_score[torch.where(x < done.start, 0, done.token + x - done.start)].float()
            live = torch.cat([part[:, half] for part in live.split(spec.channels, dim=1)], dim=1)
            kept = places.data[torch.where(old, places.row(place, x), 0)].float()
            k, s = torch.where(old[:, None], kept, live).split(spec.head_dim, dim=1)
            k, s = masked(x >= 0, k, s + c.ape[x % spec.ratio][:, half])
            ks.append(k)
            ss.append(s)
        for j in range(0, spec.window_rows, ROWS_AT_ONCE):
            state = fold_group(state, *(torch.stack(rows[j : j + ROWS_AT_ONCE], -2) for rows in (ks, ss)))
        pooled[ends] = state[2] / state[1]
    item, x = items.new_tokens(spec.ratio)
    value, score = kv_score[items.token[item] + x - items.start[item]].to(held.dtype).split(spec.channels, dim=1)
    for places, half, read in (
        (held.lo, slice(0, spec.head_dim), history[:2]),
        (held.hi, slice(-spec.head_dim, None), history[2:]),
    ):
        if places is not None:
            new = _Kept(item, x, torch.cat([value[:, half], score[:, half]], dim=1), x)
            if c.snapshots is not None and places is held.lo:
                _store_snapshots(new.where(c.snapshots.of(x)), items, plan, c.snapshots)
            _store_half(new, items, places, read)
    return pooled


def _store_half(new: _Kept, items: Items, places: Places, history: list[torch.Tensor]) -> None:
    """Keeps lo rows, or hi or whole ones, of the window that continues the history and of the last windows of each step."""
    own = (items.window == items.start // places.ratio) & (items.start % places.ratio > 0)
    begun = ~own & (items.window > (items.end - 1) // places.ratio - places.half)
    place, empty = places.choose(items.slot, items.window, *history)
    place = torch.where(own, history[-1], place)
    places.tags[places.tag(empty[begun & (empty >= 0)])] = -1
    last = torch.minimum(items.end, (items.window + 1) * places.ratio) - 1
    places.tags[places.tag(place[own | begun])] = last[own | begun].int()
    new = new.where((own | begun)[new.item] & (new.position % places.ratio < places.kept))
    places.data[places.row(place[new.item], new.position)] = new.data


def _of_snapshots(c: Compressor, position: torch.Tensor) -> torch.Tensor:
    """Whether the snapshot of a page keeps the rows of new positions."""
    return torch.zeros_like(position, dtype=torch.bool) if c.snapshots is None else c.snapshots.of(position)


def _store_snapshots(new: _Kept, items: Items, plan: PlanData, snapshots: Snapshots) -> None:
    """Writes the rows that belong to the snapshot of a page, each where the plan's table says."""
    table, size = plan.snapshot_table, snapshots.page_size
    new = new.where(snapshots.of(new.position) & (new.position // size < table.shape[1]))
    target = table[items.sequence[new.item], new.position // size].long()
    wrong = (target < -1) | (target >= snapshots.num_pages)
    plan.errors.add_((wrong & ((new.position + 1) % size == 0)).sum().int())
    there = ~wrong & (target >= 0)
    new = new.where(there)
    at = target[there], new.position % plan.ratio % snapshots.rows_per_page
    snapshots.rows[at] = new.data.flatten(1)
    snapshots.positions[at] = new.position.int()


def _store(new: _Kept, items: Items, held: FoldRows, spec: CompressorSpec) -> None:
    h0 = history_starts(spec, "fold", items.start)
    new = new.where(new.position >= items.end[new.item] - held.ring)
    place = held.place(items.slot[new.item], new.position, h0[new.item], items.start[new.item])
    first = items.window == items.start // spec.ratio
    held.retire(items.slot[first], h0[first], items.start[first], items.end[first])
    held.tags[place] = new.tag.int()
    held.data[place[new.tag >= 0]] = new.data[new.tag >= 0]
