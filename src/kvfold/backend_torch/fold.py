"""The torch backend of `compress`: any device, vectorized over work items, written to be read beside DESIGN.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..backend_triton.table import ROWS_AT_ONCE
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.formats import EntryCache
from ..storage.pack import bf16_bits, pack_records
from ..storage.snapshots import Snapshots

if TYPE_CHECKING:
    from ..compress import Compressor

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


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension (a power of two) by pairing neighbours, so that the order never depends on a device."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def finish(
    y: torch.Tensor, spec: CompressorSpec, weight: torch.Tensor, table: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """RMSNorm, RoPE and Hadamard of pooled rows: fp32 `[n, head_dim]` and int64 `[n]` to fp32 `[n, head_dim]`, no rounding."""
    mean = tree_sum(y * y) * (1.0 / spec.head_dim)
    y = y * (1.0 / torch.sqrt(mean + spec.norm_eps))[:, None] * weight.float()
    if spec.rope_dim:
        assert table is not None
        cos, sin = table[positions].chunk(2, dim=1)
        x = y[:, -spec.rope_dim :]
        even, odd = x[:, 0::2], x[:, 1::2]
        rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(1)
        y = torch.cat((y[:, : spec.head_dim - spec.rope_dim], rotated), dim=1)
    if spec.hadamard:
        half = 1
        while half < spec.head_dim:
            low, high = y.view(-1, spec.head_dim // (2 * half), 2, half).unbind(2)
            y = torch.stack((low + high, low - high), dim=2).flatten(1)
            half *= 2
        y = y * spec.head_dim**-0.5
    return y


@dataclass
class Items:
    """The live rows of `plan.items`, as int64 columns."""

    window: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    token: torch.Tensor
    slot: torch.Tensor
    entry: torch.Tensor
    sequence: torch.Tensor

    @classmethod
    def of(cls, plan: StepPlan) -> Items:
        live = plan.items[: int(plan.num_items)].long()
        return cls(*live.unbind(1)[:7])

    def __getitem__(self, mask: torch.Tensor) -> Items:
        return Items(*(column[mask] for column in vars(self).values()))


class _Rows:
    """The rows and tags of a `FoldState`, flat, and the rules of DESIGN.md that say where a position's row is."""

    def __init__(self, state: FoldState) -> None:
        self.ring, self.history = state.ring, state.history
        self.per_slot = self.ring + self.history
        self.data = state.rows.view(-1, *state.rows.shape[2:])
        self.tags = state.positions.view(-1)

    def find(self, slot: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Flat row that holds `position`, or -1."""
        base = slot * self.per_slot
        home, spare = base + position % self.ring, base + self.ring + position % self.history
        found = torch.where(self.tags[spare] == position, spare, -1)
        return torch.where(self.tags[home] == position, home, found)

    def place(self, slot: torch.Tensor, position: torch.Tensor, h0: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Flat row to write `position` to in a step whose history is `[h0, start)`."""
        base = slot * self.per_slot
        home = base + position % self.ring
        read = (self.tags[home] >= h0) & (self.tags[home] < start)
        return torch.where(read, base + self.ring + position % self.history, home)

    def retire(self, slot: torch.Tensor, h0: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> None:
        """Frees spare rows that are of another timeline or out of the ring; one call per sequence, before new tags."""
        spare = (slot * self.per_slot + self.ring)[:, None] + torch.arange(self.history, device=slot.device)
        tags = self.tags[spare]
        stale = (tags >= start[:, None]) | ((tags < (end - self.ring)[:, None]) & (tags < h0[:, None]))
        self.tags[spare] = torch.where(stale, -1, tags)


def history_starts(spec: CompressorSpec, kind: str, start: torch.Tensor) -> torch.Tensor:
    """`state.history_start` for a tensor of positions."""
    if kind == "fold":
        return torch.where(start % spec.ratio == 0, start, start - 1)
    return (start // spec.ratio - int(spec.overlap)).clamp(min=0) * spec.ratio


def compress_torch(c: Compressor, plan: StepPlan, rows: torch.Tensor | None) -> None:
    """`compress` over a `FoldState`, after its arguments were checked."""
    kv_score, state, spec, ape, snapshots = c.kv_score, c.state, c.spec, c.ape, c.snapshots
    items = Items.of(plan)
    held = _Rows(state)
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
    if ape is None:
        ape = torch.zeros(spec.ratio, spec.channels, dtype=torch.float32, device=kv_score.device)
    fold = _fold_items if state.kind == "fold" else _fold_rows
    pooled, stores = fold(kv_score, items, h0, held, spec, ape, snapshots)
    if snapshots is not None:
        for store in stores:
            _store_snapshots(store, items, plan, snapshots)
    _store(stores, items, h0, held, spec)
    emit(pooled, items, plan, c.cache, spec, c.norm_weight, c.rope, rows)


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


def _fold_items(
    kv_score: torch.Tensor,
    items: Items,
    h0: torch.Tensor,
    held: _Rows,
    spec: CompressorSpec,
    ape: torch.Tensor,
    snapshots: Snapshots | None,
) -> tuple[torch.Tensor, list[_Store]]:
    """State of fold rows: resume from the row before the step, fold the new tokens of each window."""
    position = torch.maximum(items.start, items.window * spec.ratio)
    count = torch.minimum(items.end, (items.window + 1) * spec.ratio) - position
    state = _empty_fold(len(position), spec, kv_score.device)
    resumes = (position == items.start) & (h0 < items.start)
    if bool(resumes.any()):
        row = torch.where(resumes, held.find(items.slot, items.start - 1), 0)
        kept = held.data[row].unbind(1)
        state = tuple(torch.where(resumes[:, None], old, new) for old, new in zip(kept, state, strict=True))
    stores = []
    for i in range(int(count.max())):
        live, x = i < count, position + i
        row = torch.where(live, items.token + x - items.start, 0)
        k, s = kv_score[row].float().split(spec.channels, dim=1)
        state = fold_step(state, *_masked(live, k, s + ape[x % spec.ratio]))
        kept = (live & ((x >= items.end - held.ring) | _has_snapshot(snapshots, x))).nonzero()[:, 0]
        if kept.numel():
            # No step resumes from the end of a window: that row is not kept, only what stood there is gone.
            tag = torch.where(x[kept] % spec.ratio == spec.ratio - 1, -1, x[kept])
            stores.append(_Store(kept, x[kept], torch.stack([part[kept] for part in state], dim=1), tag))
    return state[2] / state[1], stores


def _fold_rows(
    kv_score: torch.Tensor,
    items: Items,
    h0: torch.Tensor,
    held: _Rows,
    spec: CompressorSpec,
    ape: torch.Tensor,
    snapshots: Snapshots | None,
) -> tuple[torch.Tensor, list[_Store]]:
    """State of input rows: fold all rows of each window that ends here, old ones from the state and new ones live."""
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
            bias = ape[x % spec.ratio]
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
        kept = (live & ((x >= items.end - held.ring) | _has_snapshot(snapshots, x))).nonzero()[:, 0]
        if kept.numel():
            row = (items.token + x - items.start)[kept]
            stores.append(_Store(kept, x[kept], kv_score[row].to(held.data.dtype), x[kept]))
    return pooled, stores


def _has_snapshot(snapshots: Snapshots | None, position: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(position, dtype=torch.bool) if snapshots is None else snapshots.of(position)


def _store_snapshots(store: _Store, items: Items, plan: StepPlan, snapshots: Snapshots) -> None:
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


def _store(stores: list[_Store], items: Items, h0: torch.Tensor, held: _Rows, spec: CompressorSpec) -> None:
    stores = [store[store.position >= items.end[store.item] - held.ring] for store in stores]
    places = [held.place(items.slot[store.item], store.position, h0[store.item], items.start[store.item]) for store in stores]
    first = items.window == items.start // spec.ratio
    held.retire(items.slot[first], h0[first], items.start[first], items.end[first])
    for store, place in zip(stores, places, strict=True):
        held.tags[place] = store.tag.int()
        held.data[place[store.tag >= 0]] = store.data[store.tag >= 0]


def emit(
    pooled: torch.Tensor,
    items: Items,
    plan: StepPlan,
    cache: EntryCache | None,
    spec: CompressorSpec,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    """Delivers the pooled rows of the items whose window ends: to `rows` and to the cache, either of which may be None."""
    entry, position = items.entry, items.window * spec.ratio
    wrong = entry >= plan.entry_capacity
    keep = (entry >= 0) & ~wrong
    slot = torch.zeros_like(entry)
    if plan.entry_slots is not None and plan.entry_capacity:
        slot = torch.where(keep, plan.entry_slots[torch.where(keep, entry, 0)], -1)
        keep &= slot != -1
    if cache is not None:
        bad = (slot < -1) | (slot >= cache.num_slots)
        if spec.rope_dim:
            assert rope is not None
            bad |= position >= rope.shape[0]
        wrong |= keep & bad
        keep &= ~bad
    plan.errors.add_(wrong.sum().int())
    kept = keep.nonzero()[:, 0]
    if kept.numel() == 0:
        return
    if rows is not None:
        values = pooled[kept]
        rows[entry[kept]] = bf16_bits(values).view(torch.bfloat16) if rows.dtype == torch.bfloat16 else values
    if cache is not None:
        assert norm_weight is not None
        y = pooled[kept].bfloat16().float() if cache.format.round_rows else pooled[kept]
        pack_records(cache, slot[kept], finish(y, spec, norm_weight, rope, position[kept]))


def store_torch(
    pooled: torch.Tensor,
    plan: StepPlan,
    cache: EntryCache,
    spec: CompressorSpec,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
) -> None:
    """`store` after its arguments were checked."""
    items = Items.of(plan)
    items = items[items.entry >= 0]
    rows = torch.zeros(len(items.entry), spec.head_dim, dtype=torch.float32, device=pooled.device)
    inside = items.entry < plan.entry_capacity
    rows[inside] = pooled[items.entry[inside]].float()
    emit(rows, items, plan, cache, spec, norm_weight, rope, None)
