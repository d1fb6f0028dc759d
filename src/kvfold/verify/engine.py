"""Seeded sequences in an engine in miniature, stepped by any schedule: what `verify` runs and compares."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..compress import compress
from ..debug.check import Report, check
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.step import Compressor
from ..storage.window_state import WindowState
from .case import make_cache, make_pools, make_state, make_weights

ROWS_PER_PAGE, PAGE_SIZE = 3, 8  # entries per page of the cache; positions per page of raw rows


class Part(NamedTuple):
    """One sequence's part of a step: `new` tokens from position `start`, of which the engine then keeps `kept`."""

    start: int
    new: int
    kept: int


Schedule = list[list[Part]]


def prefill(batch: int, length: int) -> Schedule:
    """Everything in one step."""
    return [[Part(0, length, length)] * batch]


def chunks(batch: int, length: int) -> Schedule:
    """Each sequence in pieces of its own; the short of them wait without tokens for the others."""
    draw, at, found = random.Random(batch * length), [0] * batch, []
    while min(at) < length:
        sizes = [min(draw.randint(1, max(2, length // 3)), length - x) for x in at]
        found.append([Part(x, n, n) for x, n in zip(at, sizes, strict=True)])
        at = [x + n for x, n in zip(at, sizes, strict=True)]
    return found


def drafts(batch: int, length: int, new: int, first: int) -> Schedule:
    """A prompt of `first` tokens, then steps of `new`, of which 0, 1, ..., `new` are accepted in turn. `new` 1: all of them."""
    found, at, turn = prefill(batch, first), [first] * batch, 0
    while min(at) < length:
        sizes = [min(new, length - x) for x in at]
        kept = [n if new == 1 else (turn + b) % (n + 1) for b, n in enumerate(sizes)]
        found.append([Part(x, n, k) for x, n, k in zip(at, sizes, kept, strict=True)])
        at, turn = [x + k for x, k in zip(at, kept, strict=True)], turn + 1
    return found


@dataclass
class Streams:
    """The tokens of some sequences and a compressor's weights.

    Attributes:
        tokens: `[batch, length, 2 * channels]`, bf16 or fp32.
        weights: spec, ape, norm_weight and rope, as `compress` takes them.
    """

    spec: CompressorSpec
    tokens: Tensor
    weights: dict

    @classmethod
    def make(cls, spec: CompressorSpec, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Streams:
        """The same on every machine: drawn on the CPU from fixed seeds."""
        draw = torch.Generator().manual_seed(7)
        tokens = torch.randn(batch, length, 2 * spec.channels, generator=draw).to(device, dtype)
        return cls(spec, tokens, make_weights(spec, length, "normal", draw, torch.float32, device))

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def windows(self) -> int:
        return self.length // self.spec.ratio


class Engine:
    """State, cache and tables of all sequences of some streams; state rows start as NaN.

    Attributes:
        pooled: fp32 `[batch, windows, head_dim]`, the last pooled row that each window got, NaN before.
        cache: page `cache_table[b, w // ROWS_PER_PAGE]` has entry w of sequence b.
    """

    def __init__(
        self, streams: Streams, *, kind: str, backend: str, dtype: torch.dtype = torch.float32, fmt: str = "bf16", most: int = 4
    ) -> None:
        """kind: `"fold"` for a `FoldState`, `"window"` for a `WindowState`. most: longest step with rejected tokens."""
        self.streams, self.backend = streams, backend
        spec, batch, device = streams.spec, streams.batch, streams.tokens.device
        shuffle = torch.Generator().manual_seed(3)
        ints = {"dtype": torch.int32, "device": device}
        self.state: FoldState | WindowState
        if kind == "fold":
            self.state = make_state(spec, batch + 1, most, dtype, device)
            self.slots = torch.randperm(batch + 1, generator=shuffle)[:batch].to(**ints)
        else:
            columns = -(-(streams.length + most) // PAGE_SIZE)
            self.state = make_pools(spec, batch * columns, PAGE_SIZE, dtype, device)
            orders = (torch.randperm(batch * columns, generator=shuffle) for _ in range(2))
            self.tables = tuple(order.view(batch, columns).to(**ints) for order in orders)
        pages = -(-(streams.windows + most) // ROWS_PER_PAGE)
        self.cache = make_cache(fmt, spec, batch * pages, ROWS_PER_PAGE, device)
        self.cache_table = torch.randperm(batch * pages, generator=shuffle).view(batch, pages).to(**ints)
        self.pooled = torch.full((batch, streams.windows, spec.head_dim), torch.nan, device=device)

    def run(self, schedule: Schedule, *, bound: int | None = None, padding: bool = False, wrong: bool = False) -> None:
        """All steps. bound: the plans' `max_new_tokens` after the first step. The others: see `plan` and `rows`."""
        for i, parts in enumerate(schedule):
            plan = self.plan(parts, bound if i else None, padding)
            out = torch.full((plan.entry_capacity, self.streams.spec.head_dim), torch.nan, device=self.pooled.device)
            compress(self.rows(parts, padding, wrong), plan, self.state, self.cache, **self.streams.weights, rows=out,
                     backend=self.backend)  # fmt: skip
            if int(plan.errors):
                raise RuntimeError(f"step {i} of {len(schedule)}: {int(plan.errors)} sequences or entries were refused")
            items = plan.items[: int(plan.num_items)].long()
            made = items[(items[:, 5] >= 0) & (items[:, 6] < self.streams.batch) & (items[:, 0] < self.streams.windows)]
            self.pooled[made[:, 6], made[:, 0]] = out[made[:, 5]]

    def check(self, parts: list[Part], bound: int | None = None) -> Report:
        """`kvfold.check` of the step, which is not taken; all history is known."""
        known = [self.streams.tokens[b, : part.start] for b, part in enumerate(parts)]
        return check(self.rows(parts), self.plan(parts, bound), self.state, self.cache, **self.streams.weights,
                     backend=self.backend, full_history=known)  # fmt: skip

    def rows(self, parts: list[Part], padding: bool = False, wrong: bool = False) -> Tensor:
        """kv_score: the streams' tokens where they are kept; NaN for rejected ones, in padding, and for all with `wrong`."""
        found = []
        for b, (start, new, kept) in enumerate(parts):
            rows = torch.full_like(self.streams.tokens[0, :1], torch.nan).repeat(new, 1)
            if not wrong:
                rows[:kept] = self.streams.tokens[b, start : start + kept]
            found.append(rows)
        if padding:
            found.append(torch.full_like(self.streams.tokens[0, :1], torch.nan).repeat(2 + 5, 1))
        return torch.cat(found)

    def plan(self, parts: list[Part], bound: int | None = None, padding: bool = False) -> StepPlan:
        """The step's plan. padding: behind it an absent sequence of two tokens and one of none, as in graphs."""
        device = self.pooled.device
        starts, lengths = [p.start for p in parts], [p.new for p in parts]
        cache_table, missing = self.cache_table, torch.full_like(self.cache_table[:1], -1)
        if padding:
            starts, lengths = [*starts, 3, 1], [*lengths, 2, 0]
            cache_table = torch.cat((cache_table, missing, missing))
        where: dict = {"cache_block_table": cache_table, "rows_per_page": ROWS_PER_PAGE}
        if isinstance(self.state, FoldState):
            none = torch.full((len(starts) - len(parts),), -1, dtype=torch.int32, device=device)
            where["state_slots"] = torch.cat((self.slots, none))
        else:
            nowhere = torch.full_like(self.tables[0][:1], -1).repeat(len(starts) - len(parts), 1)
            where["block_tables"] = tuple(torch.cat((table, nowhere)) for table in self.tables)
            where["page_size"] = PAGE_SIZE
        ends = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        return StepPlan.build(
            self.streams.spec.ratio, torch.tensor(starts, dtype=torch.int32, device=device), ends, bound or max(lengths),
            max_tokens=sum(lengths), **where,
        )  # fmt: skip

    def compressor(self, parts: list[Part]) -> Compressor:
        """This engine's part of `compress_many`."""
        return Compressor(self.rows(parts), self.state, self.cache, **self.streams.weights)

    @property
    def entry_slots(self) -> list[list[int]]:
        """The cache slot of each entry, by sequence."""
        window = torch.arange(self.streams.windows, device=self.pooled.device)
        return (self.cache_table[:, window // ROWS_PER_PAGE] * ROWS_PER_PAGE + window % ROWS_PER_PAGE).tolist()
