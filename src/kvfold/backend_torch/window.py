"""The torch backend of `compress` over a `WindowState`: any device, vectorized over work items, written to be read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

from ..spec import CompressorSpec
from ..storage.pack import to_bf16
from ..storage.step import Compressor, Outputs, PlanData
from ..storage.window_state import WindowState
from .finish import emit, slots_of
from .items import Items


@dataclass
class Pages:
    """A pool, the table of sequences' pages in it, whether that is a ring, and which page means none, besides -1."""

    pool: torch.Tensor
    table: torch.Tensor
    ring: bool = False
    null_page: int | None = None

    @classmethod
    def of(cls, state: WindowState, plan: PlanData) -> tuple[Pages, Pages]:
        """Those of values and of scores."""
        value, score = plan.block_tables
        return cls(state.kv, value, plan.ring, plan.null_page), cls(state.score, score, plan.ring, plan.null_page)

    def find(self, sequence: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The page of each position (not negative), -1 where there is none, and whether the table is wrong there."""
        width = self.table.shape[1]
        if width == 0:
            return torch.full_like(position, -1), torch.ones_like(position, dtype=torch.bool)
        column = position // self.pool.shape[1]
        if self.ring:
            column = column % width
        page = self.table[sequence, column.clamp(max=width - 1)].long()
        page = torch.where(page == self.null_page, -1, page) if self.null_page is not None else page
        wrong = (column >= width) | (page < -1) | (page >= self.pool.shape[0])
        return torch.where(wrong, -1, page), wrong


@torch.inference_mode()
def compress_window_torch(c: Compressor, plan: PlanData, out: Outputs) -> None:
    """`compress` over a `WindowState`, after its arguments were checked.

    An item counts once in `plan.errors` if its tables name an impossible page for a row to read or write; otherwise also if the
    entry is wanted and an old row of its window has no page. A new row that has no page is not kept.
    """
    c = c.joined()
    kv_score, state, spec = c.kv_score, c.state, c.spec
    items = Items.of(plan)
    usable = items.token + items.end - items.start <= kv_score.shape[0]
    plan.errors.add_((~usable & (items.window == items.start // spec.ratio)).sum().int())
    items = items[usable]
    if items.window.numel() == 0:
        return
    value, score = Pages.of(state, plan)
    ends = items.entry >= 0
    missing, bad = _check_old_rows(items, value, score, spec)
    missing, bad = ends & missing, ends & bad
    made = items[ends & ~missing & ~bad]
    pooled = _pool(made, c, value, score)  # all old rows are read before any is written
    bad |= _write(items, c, value, score, plan.ring_rows)
    wanted = (items.entry >= plan.room(*out)) | (slots_of(items, plan) >= 0)
    plan.errors.add_((bad | missing & wanted).sum().int())
    emit(pooled, made, plan, c, out)


def _new_rows(c: Compressor, token: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and score rows `[n, channels]` of `kv_score[token]`, which are at `position`, as the state keeps them."""
    k, s = c.kv_score[token].float().chunk(2, dim=1)
    if c.ape is not None:
        s = s + c.ape[position % c.spec.ratio]
    if c.state.dtype == torch.float32:
        return k, s
    return to_bf16(k), to_bf16(s)


def window_positions(items: Items, spec: CompressorSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions `[n, window_rows]` from which an entry is made, and which of them are old, so that pages must have them."""
    first = (items.window - int(spec.overlap)) * spec.ratio
    position = first[:, None] + torch.arange(spec.window_rows, device=first.device)
    return position, (position >= 0) & (position < items.start[:, None])


def _check_old_rows(items: Items, value: Pages, score: Pages, spec: CompressorSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each item's window has an old row without a page, and one for which a table is wrong."""
    position, old = window_positions(items, spec)
    missing = bad = torch.zeros_like(old)
    for pages in (value, score):
        page, wrong = pages.find(items.slot[:, None], position.clamp(min=0))
        missing, bad = missing | (page < 0), bad | wrong
    return (old & missing).any(1), (old & bad).any(1)


def _pool(items: Items, c: Compressor, value: Pages, score: Pages) -> torch.Tensor:
    """fp32 `[n, head_dim]`: the softmax-weighted means of windows whose old rows are all there.

    Maximum and sums run over the rows in position order, elementwise over items, so that no bit depends on the batch.
    """
    spec = c.spec
    if items.window.numel() == 0:
        return torch.zeros(0, spec.head_dim, dtype=torch.float32, device=items.window.device)
    position, old = window_positions(items, spec)
    values, scores = [], []
    for j in range(spec.window_rows):
        x, kept = position[:, j], old[:, j].nonzero()[:, 0]
        token = torch.where((x >= 0) & ~old[:, j], items.token + x - items.start, 0)
        k, s = (row.float() for row in _new_rows(c, token, x))
        for pages, row in ((value, k), (score, s)):
            page, _ = pages.find(items.slot[kept], x[kept])
            row[kept] = pages.pool[page, x[kept] % pages.pool.shape[1]].float()
        half = slice(0, spec.head_dim) if spec.overlap and j < spec.ratio else slice(-spec.head_dim, None)
        before_first = (x < 0)[:, None]  # window 0 has no window before it
        values.append(torch.where(before_first, -0.0, k[:, half]))
        scores.append(torch.where(before_first, -torch.inf, s[:, half]))
    top = reduce(torch.maximum, scores)
    weight, total = torch.zeros_like(top), torch.zeros_like(top)
    for k, s in zip(values, scores, strict=True):
        e = torch.exp(s - top)  # 0 where s is -inf, NaN where all of them are
        weight, total = weight + e, total + e * k
    return total / weight


def _write(items: Items, c: Compressor, value: Pages, score: Pages, ring: int) -> torch.Tensor:
    """Keeps the new rows of each item where they have a page; returns whether a table was wrong for one of them.

    ring: only so many last positions are kept; 0: all.
    """
    item, x = items.new_tokens(c.spec.ratio)
    if ring:
        last = x >= items.end[item] - ring
        item, x = item[last], x[last]
    kept = _new_rows(c, items.token[item] + x - items.start[item], x)
    bad = torch.zeros_like(items.window, dtype=torch.bool)
    for pages, row in zip((value, score), kept, strict=True):
        page, wrong = pages.find(items.slot[item], x)
        there = page >= 0
        pages.pool[page[there], x[there] % pages.pool.shape[1]] = row[there]
        bad[item[wrong]] = True
    return bad
