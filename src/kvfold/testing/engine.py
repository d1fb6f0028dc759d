"""`Engine`: what a serving engine keeps for one compressor, and the steps that it takes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..compress import compress, compress_many
from ..plan import StepPlan
from ..restore import restore
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.mean_state import MeanState
from ..storage.snapshots import Snapshots
from ..storage.window_state import WindowState
from ..store import store
from .data import make_cache, make_means, make_pools, make_state

UNWRITTEN = 7.0  # every value of `rows` before a call; no pooled row is the same in all channels
Pages = Sequence[Sequence[int]]


class Part(NamedTuple):
    """One sequence's part of a step: `new` tokens from position `start`. The engine then keeps the first `kept` of them."""

    sequence: int
    start: int
    new: int
    kept: int


class Step(NamedTuple):
    """One call.

    Attributes:
        bound: the plan's `max_new_tokens`.
        absent: numbers of new tokens of padding sequences, which come last and have no slot and no page.
        behind: padding rows of kv_score after the last sequence.
        loose: the plan has room for as many tokens as `bound` allows, and not just for those of the step.
    """

    bound: int
    parts: tuple[Part, ...]
    absent: tuple[int, ...] = ()
    behind: int = 0
    loose: bool = False

    @classmethod
    def of(cls, *parts: Sequence[int]) -> Step:
        """Of parts `(sequence, start, new, kept)`, or `(sequence, start, new)` of which all tokens are kept."""
        found = tuple(Part(*(*part, part[2])[:4]) for part in parts)
        return cls(max(part.new for part in found), found)


def prefill(lengths: Sequence[int]) -> list[Step]:
    """Sequences of these lengths, each of them whole, in one step."""
    return [Step.of(*((b, 0, n) for b, n in enumerate(lengths)))]


def chunks(lengths: Sequence[int]) -> list[Step]:
    """Each sequence in pieces of its own; who is done waits, without tokens, for the others."""
    draw, at, found = random.Random(sum(lengths)), [0] * len(lengths), []
    while any(x < n for x, n in zip(at, lengths, strict=True)):
        sizes = [min(draw.randint(1, max(2, n // 3)), n - x) for x, n in zip(at, lengths, strict=True)]
        found.append(Step.of(*zip(range(len(at)), at, sizes, strict=True)))
        at = [x + n for x, n in zip(at, sizes, strict=True)]
    return found


def drafts(lengths: Sequence[int], new: int, first: int) -> list[Step]:
    """A prompt of `first` tokens, then steps of `new`, of which 0, 1, ..., `new` are accepted in turn; with `new` 1 all are."""
    at = [min(first, n) for n in lengths]
    found, turn = prefill(at), 0
    while any(x < n for x, n in zip(at, lengths, strict=True)):
        sizes = [min(new, n - x) for x, n in zip(at, lengths, strict=True)]
        kept = [n if new == 1 else (turn + b) % (n + 1) for b, n in enumerate(sizes)]
        found.append(Step.of(*zip(range(len(at)), at, sizes, kept, strict=True)))
        at, turn = [x + k for x, k in zip(at, kept, strict=True)], turn + 1
    return found


class Engine:
    """Some sequences over one compressor's state and cache. `run` takes steps; `pooled` and `entries` are what came of them.

    Args:
        tokens: kv_score rows `[length, 2 * channels]` of each sequence.
        weights: spec, ape, norm_weight and rope, as `compress` takes them.
        slots: the sequences' slots in a `FoldState`.
        kv, score: their pages of a `WindowState`, instead. freed: pages that a step does not read are -1 in its tables.
        pages: their pages of the cache, -1 for none. entries: how plans are told of them, "table", "slots" or "none".
        snapshots: and snapshot_pages, the sequences' pages of them.
        rows: the dtype of pooled rows; None for calls that do not ask for any.
        beside: columns left and right of kv_score in a wider tensor.

    Attributes:
        pooled: by sequence `[windows, head_dim]`, the last pooled row of each window.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        weights: dict,
        state: FoldState | MeanState | WindowState,
        cache: EntryCache | None,
        *,
        pages: Pages,
        rows_per_page: int,
        slots: Sequence[int] = (),
        kv: Pages = (),
        score: Pages = (),
        freed: bool = False,
        entries: str = "table",
        snapshots: Snapshots | None = None,
        snapshot_pages: Pages = (),
        rows: torch.dtype | None = torch.float32,
        beside: tuple[int, int] = (0, 0),
        backend: str | None = None,
    ) -> None:
        self.tokens, self.weights, self.spec = tokens, weights, weights["spec"]
        self.state, self.cache, self.snapshots = state, cache, snapshots
        self.slots, self.kv, self.score, self.freed = list(slots), kv, score, freed
        self.pages, self.rows_per_page, self.addressing, self.snapshot_pages = pages, rows_per_page, entries, snapshot_pages
        self.rows, self.beside, self.backend, self.device = rows, beside, backend, tokens[0].device
        self.pooled = [self._unwritten(n // self.spec.ratio) for n in self.lengths]

    @classmethod
    def make(
        cls,
        tokens: Sequence[Tensor],
        weights: dict,
        *,
        kind: str = "fold",
        fmt: str = "bf16",
        dtype: torch.dtype = torch.float32,
        most: int = 4,
        rows_per_page: int = 3,
        page_size: int = 8,
        shuffled: bool = True,
        backend: str | None = None,
        **options: object,
    ) -> Engine:
        """With state and cache of its own, full of NaN.

        kind: "fold" for a `FoldState`, "mean" for a `MeanState`, over which no step may reject a token, "window" for a
            `WindowState` of pages of `page_size`. dtype: of its rows.
        most: new tokens of the longest step of which some may be rejected.
        shuffled: slots and pages are, and not given out in order from 0.
        """
        shuffle, spec, device = random.Random(3), weights["spec"], tokens[0].device

        def some(n: int, of: int) -> list[int]:
            return shuffle.sample(range(of), n) if shuffled else list(range(n))

        def deal(counts: list[int]) -> list[list[int]]:
            free = iter(some(sum(counts), sum(counts)))
            return [[next(free) for _ in range(n)] for n in counts]

        lengths = [len(text) for text in tokens]
        if kind == "window":
            counts = [-(-(n + most) // page_size) for n in lengths]
            state: FoldState | MeanState | WindowState = make_pools(spec, sum(counts), page_size, dtype, device)
            options |= {"kv": deal(counts), "score": deal(counts)}
        else:
            count = len(lengths) + 1
            state = make_means(spec, count, device) if kind == "mean" else make_state(spec, count, most, dtype, device)
            options["slots"] = some(len(lengths), len(lengths) + 1)
        pages = deal([-(-(n // spec.ratio + most) // rows_per_page) for n in lengths])
        cache = make_cache(fmt, spec, sum(map(len, pages)), rows_per_page, device)
        return cls(tokens, weights, state, cache, pages=pages, rows_per_page=rows_per_page, backend=backend, **options)  # type: ignore[arg-type]

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.tokens]

    @property
    def entry_slots(self) -> list[list[int]]:
        """The cache slot of each window, by sequence; -1 where it has no page."""
        size, found = self.rows_per_page, []
        for pages, n in zip(self.pages, self.lengths, strict=True):
            at = [(pages[w // size], w % size) for w in range(n // self.spec.ratio)]
            found.append([-1 if page < 0 else page * size + row for page, row in at])
        return found

    def entries(self) -> list[Tensor]:
        """What the cache holds of each sequence: fp32 `[windows, head_dim]`, dequantized. Every window must have a page."""
        return [self.cache.read(torch.tensor(some, dtype=torch.int64, device=self.device)) for some in self.entry_slots]

    def run(self, steps: Sequence[Step], *, wrong: bool = False) -> None:
        """Takes steps. wrong: all tokens are NaN, as of a former owner of the slots and pages.

        Raises:
            AssertionError: something was refused, or a pooled row written that is of no entry.
        """
        for step in map(Step._make, steps):
            _check_taken(self.take(step, wrong=wrong), step)

    def take(self, step: Step, *, wrong: bool = False) -> int:
        """Takes a step, and returns how many sequences or entries were refused. If any, `pooled` stays as it was."""
        (kv_score, plan, *rest), named = self.arguments(step, wrong)
        out = None if self.rows is None else self._unwritten(plan.entry_capacity)
        compress(kv_score, plan, *rest, **named, rows=out, backend=self.backend)
        refused = int(plan.errors)
        if out is not None and not refused:
            self._keep(step, plan, out)
        return refused

    def arguments(self, step: Step, wrong: bool = False) -> tuple[tuple, dict]:
        """What `compress`, `check` and `dump` take for a step: by position, and by name."""
        args = self.kv_score(step, wrong), self.plan(step), self.state, self.cache
        return args, self.weights | {"snapshots": self.snapshots}

    def _keep(self, step: Step, plan: StepPlan, out: Tensor) -> None:
        first, ratio = plan.cu_entries.tolist(), self.spec.ratio
        for i, (b, start, new, _) in enumerate(step.parts):
            begin, end = start // ratio, (start + new) // ratio
            self.pooled[b][begin:end] = out[first[i] : first[i] + end - begin]
        if bool((out[first[len(step.parts)] :] != UNWRITTEN).any()):
            raise AssertionError("a row of no entry was written")

    def hit(self, sequence: int, end: int, slot: int) -> None:
        """A prefix hit: a sequence goes on in another slot, from its snapshot of position `end`, where a page ends."""
        errors = torch.zeros(1, dtype=torch.int32, device=self.device)
        page = self.snapshot_pages[sequence][end // self.snapshots.page_size - 1]
        restore(self.state, self.snapshots, *map(self._ints, ([slot], [page], [end])), errors, backend=self.backend)
        if int(errors):
            raise AssertionError("the snapshot was refused")
        self.slots[sequence] = slot

    def store(self, pooled: Sequence[Tensor]) -> None:
        """`kvfold.store` of the pooled rows of all windows, by sequence."""
        plan = self.plan(prefill(self.lengths)[0])
        rows = torch.full((plan.entry_capacity, self.spec.head_dim), torch.nan, dtype=pooled[0].dtype, device=self.device)
        rows[: sum(map(len, pooled))] = torch.cat(list(pooled))
        weights = {name: value for name, value in self.weights.items() if name != "ape"}
        store(rows, plan, self.cache, **weights, backend=self.backend)
        if int(plan.errors):
            raise AssertionError(f"{int(plan.errors)} entries were refused")

    def store_placed(self, pooled: Sequence[Tensor]) -> None:
        """The same without a plan, and the last sequence first."""
        ratio, rows = self.weights["spec"].ratio, [row for some in pooled for row in some]
        slots = [slot for some, kept in zip(self.entry_slots, pooled, strict=True) for slot in some[: len(kept)]]
        positions = [window * ratio for some in pooled for window in range(len(some))]
        places = {name: self._ints(values[::-1]) for name, values in (("slots", slots), ("positions", positions))}
        weights, errors = {name: value for name, value in self.weights.items() if name != "ape"}, self._ints([0])
        store(torch.stack(rows[::-1]), self.cache, **places, errors=errors, **weights, backend=self.backend)
        if int(errors):
            raise AssertionError(f"{int(errors)} rows were refused")

    def kv_score(self, step: Step, wrong: bool = False) -> Tensor:
        """The rows of a step: NaN for those that are not kept, for padding, and for all with `wrong`."""
        nan, rows = torch.full_like(self.tokens[0][:1], torch.nan), []
        for b, start, new, kept in step.parts:
            some = 0 if wrong else kept
            rows += [self.tokens[b][start : start + some], nan.repeat(new - some, 1)]
        kv_score = torch.cat([*rows, nan.repeat(sum(step.absent) + step.behind, 1)])
        left, right = self.beside
        wide = torch.nn.functional.pad(kv_score, (left, right), value=torch.nan)
        return wide[:, left : left + kv_score.shape[1]]

    def plan(self, step: Step) -> StepPlan:
        """The plan of a step."""
        ratio, parts, absent = self.spec.ratio, step.parts, step.absent
        lengths, options = [*(part[2] for part in parts), *absent], {}
        if isinstance(self.state, WindowState):
            options |= {"block_tables": (self._table(self.kv, step), self._table(self.score, step))}
            options["page_size"] = self.state.page_size
            for table in options["block_tables"] if self.freed else ():
                for i, (_, start, _, _) in enumerate(parts):
                    needed = (start // ratio - int(self.spec.overlap)) * ratio // self.state.page_size
                    table[i, : max(needed, 0)] = -1
        else:
            options["state_slots"] = self._ints([*(self.slots[part[0]] for part in parts), *[-1] * len(absent)])
        if self.addressing == "table":
            options |= {"cache_block_table": self._table(self.pages, step), "rows_per_page": self.rows_per_page}
        elif self.addressing == "slots":
            known = self.entry_slots
            slots = [slot for b, start, new, _ in parts for slot in known[b][start // ratio : (start + new) // ratio]]
            options["entry_slots"] = torch.tensor([*slots, -1, -1], dtype=torch.int64, device=self.device)
        if self.snapshots is not None:
            options["snapshot_table"] = self._table(self.snapshot_pages, step)
            options["snapshot_page_size"] = self.snapshots.page_size
        starts = [*(part[1] for part in parts), *[7] * len(absent)]
        room, ends = None if step.loose else sum(lengths), self._ints([0, *accumulate(lengths)])
        return StepPlan.build(ratio, self._ints(starts), ends, step.bound, max_tokens=room, **options)

    def _table(self, pages: Pages, step: Step) -> Tensor:
        """Pages of the sequences of a step, -1 behind the last one of each."""
        rows = [*(pages[part[0]] for part in step.parts), *[()] * len(step.absent)]
        width = max(1, *map(len, rows))
        return self._ints([[*row, *[-1] * (width - len(row))] for row in rows])

    def _ints(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _unwritten(self, count: int) -> Tensor:
        return torch.full((count, self.spec.head_dim), UNWRITTEN, dtype=self.rows or torch.float32, device=self.device)


def run_many(engines: Sequence[Engine], steps: Sequence[Step]) -> None:
    """Takes steps with one `compress_many` for several compressors, which share the first one's slots and pages."""
    for step in map(Step._make, steps):
        plan = engines[0].plan(step)
        compress_many(
            [(e.kv_score(step), e.state, e.cache, *e.weights.values()) for e in engines], plan, backend=engines[0].backend
        )
        _check_taken(int(plan.errors), step)


def _check_taken(refused: int, step: Step) -> None:
    if refused:
        raise AssertionError(f"{refused} sequences or entries were refused in {step}")
