"""`WindowEngine`: an engine with paged raw state, which checks every step byte for byte against the rules of `WindowState`."""

from __future__ import annotations

import dataclasses
import random
from typing import NamedTuple

import torch
from support.helpers import Backend, Engine, Step, Weights, bits
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, reference
from kvfold.contract import MOST_POSITIONS

VALUE, SCORE = 0, 1
NO_PAGE, WRONG_PAGE = "no page", "wrong page"


class Change(NamedTuple):
    """What a step must do: rows to write, as (pool, page, row, sequence of the batch, its token), entries made, errors."""

    rows: list[tuple[int, int, int, int, int]]
    made: set[tuple[int, int]]
    errors: int


class WindowEngine(Engine):
    """Pools of raw rows full of NaN, between canary bytes, with a shuffled free list of pages for each pool.

    `tables[pool][sequence, column]` are the block tables on the host, -1 where a sequence has no page; a step gives the
    sequences the pages that they lack. Every step checks that the rows it writes are those of their definition, that all
    other bytes of pools and cache are unchanged, that exactly the right entries were made, and the errors counted.
    """

    state: kvfold.WindowState

    def __init__(
        self,
        spec: CompressorSpec,
        backend: Backend,
        *,
        num_sequences: int,
        length: int,
        page_size: int,
        state_dtype: torch.dtype = torch.float32,
        fmt: str = "fp32",
        weights: Weights | None = None,
        one_pool: bool = False,
        seed: int = 0,
    ) -> None:
        """`length`: positions of the longest sequence. `one_pool`: value and score rows side by side, as vLLM has them."""
        self.page_size, self.one_pool = page_size, one_pool
        self.columns = -(-length // page_size)
        self.scratch: list[int] = []  # pages of which the contents do not matter
        super().__init__(
            spec,
            backend,
            num_slots=num_sequences,
            max_new_tokens=0,
            max_entries=max(1, length // spec.ratio),
            fmt=fmt,
            state_dtype=state_dtype,
            weights=weights,
        )
        rng = random.Random(seed)
        self.free = [rng.sample(range(pages), pages) for pages in (self.state.num_pages, self.state.num_score_pages)]
        # The tables are not equally wide, as an engine's need not be.
        self.tables = [torch.full((num_sequences, self.columns + i), -1, dtype=torch.int32) for i in (VALUE, SCORE)]
        self.given = [0] * num_sequences

    def _make_state(self, num_slots: int, max_new_tokens: int, dtype: torch.dtype) -> kvfold.WindowState:
        pages, c = num_slots * self.columns + 2, self.spec.channels
        if self.one_pool:
            pool = self._allocate("the pool", (pages, self.page_size, 2 * c), dtype)
            kv, score = pool[..., :c], pool[..., c:]
        else:
            kv = self._allocate("state.kv", (pages, self.page_size, c), dtype)
            score = self._allocate("state.score", (pages + 3, self.page_size, c), dtype)
        kv.fill_(torch.nan)
        score.fill_(torch.nan)
        return kvfold.WindowState(kv, score)

    @property
    def pools(self) -> tuple[Tensor, Tensor]:
        return self.state.kv, self.state.score

    def give(self, sequence: int, end: int) -> None:
        """Pages for the positions before `end`; those that it was given before are not looked at."""
        columns = min(-(-end // self.page_size), self.columns)
        for column in range(self.given[sequence], columns):
            for table, free in zip(self.tables, self.free, strict=True):
                table[sequence, column] = free.pop()
        self.given[sequence] = max(self.given[sequence], columns)

    def put(self, sequence: int, tokens: Tensor, start: int = 0) -> None:
        """Writes the rows of these tokens as a step would have done."""
        self.give(sequence, start + len(tokens))
        position = torch.arange(start, start + len(tokens))
        for pool, table, rows in zip(self.pools, self.tables, self.stored(tokens, position), strict=True):
            page = table[sequence, position // self.page_size].long()
            pool[page.to(pool.device), (position % self.page_size).to(pool.device)] = rows.to(pool.device)

    def retire(self, sequence: int, before: int) -> None:
        """Takes back the pages of which all positions are before `before`, as an engine with a sliding window does."""
        for column in range(before // self.page_size):
            for table, free in zip(self.tables, self.free, strict=True):
                if table[sequence, column] >= 0:
                    free.insert(0, int(table[sequence, column]))
                    table[sequence, column] = -1

    def share(self, source: int, target: int, end: int) -> None:
        """`target` begins with the first `end` positions of `source`: the same pages, and a copy of one that is partly used."""
        whole = end // self.page_size
        for table in self.tables:
            table[target, :whole] = table[source, :whole]
        self.given[target] = whole
        self.give(target, end)
        for pool, table in zip(self.pools, self.tables, strict=True):
            if end % self.page_size:
                pool[int(table[target, whole])] = pool[int(table[source, whole])]

    def stored(self, tokens: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that the state must keep, on the CPU: values, and scores with their bias, rounded to the state's dtype."""
        k, s = tokens.float().split(self.spec.channels, dim=1)
        if self.weights.ape is not None:
            s = s + self.weights.ape[position % self.spec.ratio]
        if self.state.dtype == torch.float32:
            return k, s
        nan = torch.tensor(0x7FC0, dtype=torch.int16).view(torch.bfloat16)
        return torch.where(k.isnan(), nan, k.bfloat16()), torch.where(s.isnan(), nan, s.bfloat16())

    def reference(self, tokens: Tensor) -> Tensor:
        """fp64 pooled rows of a sequence of which all rows were rounded as stored: without a bias, which they hold."""
        k, s = self.stored(tokens, torch.arange(len(tokens)))
        return reference.pooled(torch.cat([k, s], dim=1).float(), dataclasses.replace(self.spec, has_ape=False), None)

    def predict(self, batch: list[tuple[int, int, Tensor]], dropped: tuple[tuple[int, int], ...] = ()) -> Change:
        """The rules of `WindowState`, position by position; `dropped` are the entries with a slot of -1."""
        ratio, rows, made, errors = self.spec.ratio, [], set(), 0
        for b, (sequence, start, tokens) in enumerate(batch):
            end = start + len(tokens)
            if len(tokens) == 0 or start < 0 or end > MOST_POSITIONS:
                errors += len(tokens) > 0
                continue
            for window in range(start // ratio, (end - 1) // ratio + 1):
                found = []
                for x in range(max(start, window * ratio), min(end, (window + 1) * ratio)):
                    for pool in (VALUE, SCORE):
                        page = self._page(pool, sequence, x)
                        if isinstance(page, int):
                            rows.append((pool, page, x % self.page_size, b, x - start))
                        else:
                            found.append(page)
                bad, missing = WRONG_PAGE in found, False
                if (window + 1) * ratio <= end:
                    oldest = max(window - self.spec.overlap, 0) * ratio
                    old = [self._page(pool, sequence, x) for x in range(oldest, start) for pool in (VALUE, SCORE)]
                    bad |= WRONG_PAGE in old
                    missing = NO_PAGE in old
                    if WRONG_PAGE not in old and not missing:
                        made.add((b, window))
                errors += bad or (missing and (b, window) not in dropped)
        return Change(rows, made, errors)

    def _page(self, pool: int, sequence: int, position: int) -> int | str:
        table, column = self.tables[pool], position // self.page_size
        page = int(table[sequence, column]) if column < table.shape[1] else -2
        if page == -1:
            return NO_PAGE
        return page if 0 <= page < len(self.pools[pool]) else WRONG_PAGE

    def step(  # type: ignore[override]
        self,
        batch: list[tuple[int, int, Tensor]],
        *,
        strict: bool = True,
        padding: int = 0,
        dropped: tuple[tuple[int, int], ...] = (),
    ) -> Step:
        """One call of `compress` for (sequence, start position, new kv_score rows).

        `dropped`: entries (place in the batch, window) whose slot is -1. The other arguments are as for `Engine.step`.
        """
        ratio, device = self.spec.ratio, self.backend.device
        for sequence, start, new in batch:
            self.give(sequence, start + len(new))
        tokens = [new for _, _, new in batch]
        dtype = tokens[0].dtype if tokens else torch.float32
        padded = torch.cat([*tokens, torch.full((padding, 2 * self.spec.channels), torch.nan, dtype=dtype)])
        owners = [
            (b, window)
            for b, (_, start, new) in enumerate(batch)
            if len(new) and 0 <= start <= MOST_POSITIONS - len(new)
            for window in range(start // ratio, (start + len(new)) // ratio)
        ]
        targets = [-1 if owner in dropped else self.cache_slot(batch[owner[0]][0], owner[1]) for owner in owners]
        order = [sequence for sequence, _, _ in batch]
        plan = kvfold.StepPlan.build(
            ratio,
            torch.tensor([start for _, start, _ in batch], dtype=torch.int32, device=device),
            torch.tensor([0, *torch.tensor([len(new) for new in tokens], dtype=torch.int64).cumsum(0).tolist()])
            .int()
            .to(device),
            max([1, *map(len, tokens)]),
            block_tables=(self.tables[VALUE][order].to(device), self.tables[SCORE][order].to(device)),
            page_size=self.page_size,
            entry_slots=torch.tensor(targets, dtype=torch.int64, device=device),
        )
        pooled = torch.full((len(targets), self.spec.head_dim), 777.0, device=device)
        change = self.predict(batch, dropped)
        made = [owner in change.made and owner not in dropped for owner in owners]
        before = self.snapshot()
        self.compress(padded.to(device), plan, rows=pooled)
        self.check_canaries()
        self.check_change(before, batch, change, [slot for slot, done in zip(targets, made, strict=True) if done])
        written = (pooled != 777.0).any(dim=1).tolist()
        assert written == made, f"rows {written} were written, not {made}"
        errors = int(plan.errors)
        assert errors == change.errors, f"{errors} errors counted, not {change.errors}"
        assert errors == 0 or not strict, f"{errors} refused"
        return Step(plan, errors, {owner: pooled[i].cpu() for i, owner in enumerate(owners) if made[i]})

    def snapshot(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the bits of both pools and of the cache."""
        return tuple(tensor.clone() for tensor in self.live())

    def live(self) -> tuple[Tensor, Tensor, Tensor]:
        """The bits of both pools and of the cache, where they are."""
        return bits(self.state.kv), bits(self.state.score), self.cache.storage

    def check_change(
        self, before: tuple[Tensor, Tensor, Tensor], batch: list[tuple[int, int, Tensor]], change: Change, targets: list[int]
    ) -> None:
        """Since a snapshot, the rows of `change` became what they must be, these cache slots changed, and nothing else did."""
        now = self.live()
        for pool, name in ((VALUE, "value"), (SCORE, "score")):
            for b, (_, start, tokens) in enumerate(batch):
                rows = [(page, row, token) for which, page, row, owner, token in change.rows if (which, owner) == (pool, b)]
                if rows:
                    page, row, token = torch.tensor(rows).unbind(1)
                    rows = self.stored(tokens, torch.arange(start, start + len(tokens)))[pool][token].to(now[pool].device)
                    where = page.to(rows.device), row.to(rows.device)
                    # Which NaN an fp32 sum is differs between devices.
                    same = rows.isnan() & self.pools[pool][where].isnan() & (rows.dtype == torch.float32)
                    before[pool][where] = torch.where(same, now[pool][where], bits(rows))
            before[pool][self.scratch] = now[pool][self.scratch]
            if not torch.equal(before[pool], now[pool]):
                differing = (before[pool] != now[pool]).any(dim=2).nonzero().tolist()
                raise AssertionError(f"rows (page, row) {differing} of the {name} pool are not what they must be")
        page, byte = self._record_bytes(targets)
        before[2][page, byte] = now[2][page, byte]
        assert torch.equal(before[2], now[2]), "cache bytes of another entry changed"


def run(engine: WindowEngine, sequence: int, tokens: Tensor, steps: list[int], start: int = 0) -> dict[int, Tensor]:
    """Gives a sequence these tokens, so many in each step; the pooled row of each window that ended."""
    pooled, at = {}, start
    for n in steps:
        step = engine.step([(sequence, at, tokens[at : at + n])])
        pooled.update({window: row for (_, window), row in step.pooled.items()})
        at += n
    assert at == len(tokens)
    return pooled


def cut(length: int, n: int) -> list[int]:
    """Steps of n tokens, the last one shorter if need be."""
    return [min(n, length - at) for at in range(0, length, n)]
