"""`Engine`: what a serving engine keeps for one compressor, and how it takes steps."""

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
from .told import PLAIN, Told

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
        absent: for each padding sequence its number of new tokens. They come last, and have no slot and no page.
        behind: padding rows of kv_score after the last sequence.
        loose: whether the plan has room for as many tokens as `bound` allows, and not only for those of the step.
    """

    bound: int
    parts: tuple[Part, ...]
    absent: tuple[int, ...] = ()
    behind: int = 0
    loose: bool = False

    @classmethod
    def of(cls, *parts: Sequence[int]) -> Step:
        """A step of parts `(sequence, start, new, kept)`, or `(sequence, start, new)` if all tokens are kept."""
        found = tuple(Part(*(*part, part[2])[:4]) for part in parts)
        return cls(max(part.new for part in found), found)


def prefill(lengths: Sequence[int]) -> list[Step]:
    """Sequences of these lengths, each of them whole, in one step."""
    return [Step.of(*((b, 0, n) for b, n in enumerate(lengths)))]


def chunks(lengths: Sequence[int]) -> list[Step]:
    """Each sequence in pieces of its own; one that is done stays in the batch without new tokens."""
    draw, at, found = random.Random(sum(lengths)), [0] * len(lengths), []
    while any(x < n for x, n in zip(at, lengths, strict=True)):
        sizes = [min(draw.randint(1, max(2, n // 3)), n - x) for x, n in zip(at, lengths, strict=True)]
        found.append(Step.of(*zip(range(len(at)), at, sizes, strict=True)))
        at = [x + n for x, n in zip(at, sizes, strict=True)]
    return found


def drafts(lengths: Sequence[int], new: int, first: int) -> list[Step]:
    """A prompt of `first` tokens, then steps of `new`, of which 0, 1, ..., `new` are accepted in turn; all if `new` is 1."""
    at = [min(first, n) for n in lengths]
    found, turn = prefill(at), 0
    while any(x < n for x, n in zip(at, lengths, strict=True)):
        sizes = [min(new, n - x) for x, n in zip(at, lengths, strict=True)]
        kept = [n if new == 1 else (turn + b) % (n + 1) for b, n in enumerate(sizes)]
        found.append(Step.of(*zip(range(len(at)), at, sizes, kept, strict=True)))
        at, turn = [x + k for x, k in zip(at, kept, strict=True)], turn + 1
    return found


class Engine:
    """Some sequences over one compressor's state and cache. `run` takes steps; `pooled` and `entries` hold the results.

    Args:
        tokens: for each sequence its kv_score rows `[length, spec.kv_score_width]`.
        weights: spec, ape, norm_weight and rope, as `compress` takes them.
        state: None for a spec without a gate.
        slots: for each sequence its slot in a `FoldState` or `MeanState`.
        kv, score: for each sequence its pages in a `WindowState`, instead of slots. freed: whether pages that a step does not
            read are -1 in its tables. ring: whether the pages are rings.
        pages: for each sequence its pages of the cache, -1 for none.
        entries: how plans say where entries go: "table", "slots", "tokens" (a slot for each token), or "none".
        told: how plans get everything else.
        snapshots, snapshot_pages: a pool of snapshots, and for each sequence its pages in it.
        rows: the dtype of pooled rows that calls ask for, or None. latent: whether calls ask for normed rows.
        beside: columns left and right of kv_score in a wider tensor. two: whether values and scores are two tensors.

    Attributes:
        pooled, latents: for each sequence `[windows, head_dim]`, the latest pooled and normed row of each window.
    """

    def __init__(
        self,
        tokens: Sequence[Tensor],
        weights: dict,
        state: FoldState | MeanState | WindowState | None,
        cache: EntryCache | None,
        *,
        pages: Pages,
        rows_per_page: int,
        slots: Sequence[int] = (),
        kv: Pages = (),
        score: Pages = (),
        freed: bool = False,
        ring: bool = False,
        entries: str = "table",
        told: Told = PLAIN,
        snapshots: Snapshots | None = None,
        snapshot_pages: Pages = (),
        rows: torch.dtype | None = torch.float32,
        latent: bool = False,
        beside: tuple[int, int] = (0, 0),
        two: bool = False,
        backend: str | None = None,
    ) -> None:
        self.tokens, self.weights, self.spec = tokens, weights, weights["spec"]
        self.state, self.cache, self.snapshots = state, cache, snapshots
        self.slots, self.kv, self.score, self.freed = list(slots), kv, score, freed
        self.pages, self.rows_per_page, self.addressing, self.snapshot_pages = pages, rows_per_page, entries, snapshot_pages
        self.rows, self.beside, self.backend, self.device = rows, beside, backend, tokens[0].device
        self.ring, self.told, self.latent, self.two = ring, told, latent, two
        self.pooled = [self._unwritten(n // self.spec.ratio) for n in self.lengths]
        self.latents = [self._unwritten(n // self.spec.ratio, torch.bfloat16) for n in self.lengths]

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
        ring: bool = False,
        told: Told = PLAIN,
        shuffled: bool = True,
        backend: str | None = None,
        **options: object,
    ) -> Engine:
        """Makes the engine with a state and a cache of its own, full of NaN.

        kind: "fold" for a `FoldState`; "mean" for a `MeanState`, over which no step may reject a token; "window" for a
            `WindowState` with pages of `page_size`. Ignored without a gate. dtype: of the state's rows.
        most: new tokens of the longest step of which some may be rejected.
        shuffled: whether slots and pages are in random order, and not counted from 0.
        """
        shuffle, spec, device, first = random.Random(3), weights["spec"], tokens[0].device, int(told.null == 0)

        def some(n: int, of: int) -> list[int]:
            return [first + x for x in (shuffle.sample(range(of), n) if shuffled else range(n))]

        def deal(counts: list[int]) -> list[list[int]]:
            free = iter(some(sum(counts), sum(counts)))
            return [[next(free) for _ in range(n)] for n in counts]

        lengths = [len(text) for text in tokens]
        options |= {"told": told, "ring": ring}
        count = first + len(lengths) + 1
        if not spec.gate:
            state: FoldState | MeanState | WindowState | None = None
        elif kind == "window":
            counts = [-(-(spec.window_rows - 1 + most if ring else n + most) // page_size) for n in lengths]
            state = make_pools(spec, first + sum(counts), page_size, dtype, device)
            options |= {"kv": deal(counts), "score": deal(counts)}
        else:
            state = make_means(spec, count, device) if kind == "mean" else make_state(spec, count, most, dtype, device)
            options["slots"] = some(len(lengths), len(lengths) + 1)
        pages = deal([-(-(n // spec.ratio + most) // rows_per_page) for n in lengths])
        cache = make_cache(fmt, spec, first + sum(map(len, pages)), rows_per_page, device)
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
        """Takes steps. wrong: make all tokens NaN, to act as a former owner of the slots and pages.

        Raises:
            AssertionError: something was refused, or a pooled row without an entry was written.
        """
        for step in map(Step._make, steps):
            _check_taken(self.take(step, wrong=wrong), step)

    def take(self, step: Step, *, wrong: bool = False) -> int:
        """Takes a step, and returns how many sequences or entries were refused. If any, `pooled` stays as it was."""
        (kv_score, plan, *rest), named = self.arguments(step, wrong)
        count = plan.entry_capacity if plan.cu_rows is None else self._places(step)[-1]
        out = {} if self.rows is None else {"rows": self._unwritten(count)}
        out |= {"latent": self._unwritten(count, torch.bfloat16)} if self.latent else {}
        self._call(kv_score, plan, *rest, **named, **out, backend=self.backend)
        refused = int(plan.errors)
        for name, kept in (("rows", self.pooled), ("latent", self.latents)):
            if name in out and not refused:
                self._keep(step, out[name], kept)
        return refused

    def arguments(self, step: Step, wrong: bool = False) -> tuple[tuple, dict]:
        """What `compress`, `check` and `dump` take for a step: by position, and by name."""
        args = self.kv_score(step, wrong), self.plan(step), self.state, self.cache
        return args, self.weights | {"snapshots": self.snapshots}

    def _call(self, *args: object, **named: object) -> None:
        compress(*args, **named)  # type: ignore[arg-type]

    def _keep(self, step: Step, out: Tensor, kept: list[Tensor]) -> None:
        ratio, of_none = self.spec.ratio, torch.ones(len(out), dtype=torch.bool, device=out.device)
        for first, (b, start, new, _) in zip(self._places(step), step.parts, strict=False):
            begin, end = start // ratio, (start + new) // ratio
            kept[b][begin:end] = out[first : first + end - begin]
            of_none[first : first + end - begin] = False
        if bool((out[of_none] != UNWRITTEN).any()):
            raise AssertionError("a row of no entry was written")

    def _places(self, step: Step) -> list[int]:
        """The place of the first entry of each sequence of a step, and the place after the last entry."""
        gap, at, ratio, found = max(self.told.reserved, 0), 0, self.spec.ratio, []
        for _, start, new, _ in step.parts:
            found.append(at + gap)
            at += gap + (start + new) // ratio - start // ratio
        return [*found, *[at] * (len(step.absent) + 1)]

    def hit(self, sequence: int, end: int, slot: int) -> None:
        """A prefix-cache hit: a sequence goes on in another slot, from its snapshot at position `end`, where a page ends."""
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
        for first, some in zip(self._places(prefill(self.lengths)[0]), pooled, strict=False):
            rows[first : first + len(some)] = some
        weights = {name: value for name, value in self.weights.items() if name != "ape"}
        store(rows, plan, self.cache, **weights, backend=self.backend)
        if int(plan.errors):
            raise AssertionError(f"{int(plan.errors)} entries were refused")

    def store_placed(self, pooled: Sequence[Tensor], also: Sequence[EntryCache] = (), *, norm: bool = True) -> None:
        """`store` without a plan, rows in reverse order. also: as for `store`. norm: whether the rows still need the norm."""
        ratio, rows = self.weights["spec"].ratio, [row for some in pooled for row in some]
        slots = [slot for some, kept in zip(self.entry_slots, pooled, strict=True) for slot in some[: len(kept)]]
        positions = [window * ratio for some in pooled for window in range(len(some))]
        places = {name: self._ints(values[::-1]) for name, values in (("slots", slots), ("positions", positions))}
        weights, errors = {name: value for name, value in self.weights.items() if name != "ape"}, self._ints([0])
        weights |= {} if norm else {"norm_weight": None}
        store(torch.stack(rows[::-1]), self.cache, **places, also=also, errors=errors, **weights, backend=self.backend)
        if int(errors):
            raise AssertionError(f"{int(errors)} rows were refused")

    def kv_score(self, step: Step, wrong: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The rows of a step: NaN for those that are not kept, for padding, and for all with `wrong`."""
        nan, rows = torch.full_like(self.tokens[0][:1], torch.nan), []
        for b, start, new, kept in step.parts:
            some = 0 if wrong else kept
            rows += [self.tokens[b][start : start + some], nan.repeat(new - some, 1)]
        kv_score = torch.cat([nan.repeat(self.told.before, 1), *rows, nan.repeat(sum(step.absent) + step.behind, 1)])
        if not self.two:
            return self._widened(kv_score, *self.beside)
        value, score = kv_score.split(self.spec.channels, dim=1)
        return self._widened(value, *self.beside), self._widened(score, sum(self.beside), 0)

    @staticmethod
    def _widened(x: Tensor, left: int, right: int) -> Tensor:
        wide = torch.nn.functional.pad(x, (left, right), value=torch.nan)
        return wide[:, left : left + x.shape[1]]

    def plan(self, step: Step) -> StepPlan:
        """The plan of a step."""
        ratio, parts, absent, told = self.spec.ratio, step.parts, step.absent, self.told
        lengths, options = [*(part[2] for part in parts), *absent], {}
        if isinstance(self.state, WindowState):
            options |= {"block_tables": (self._pages(self.kv, step), self._pages(self.score, step)), "ring": self.ring}
            options["page_size"] = self.state.page_size
            for table in options["block_tables"] if self.freed and not self.ring else ():
                for i, (_, start, _, _) in enumerate(parts):
                    needed = (start // ratio - int(self.spec.overlap)) * ratio // self.state.page_size
                    table[i, : max(needed, 0)] = told.null
        elif self.state is not None:
            slots = [*(self.slots[part[0]] for part in parts), *[told.null] * len(absent)]
            options |= {"state_slots": self._numbers(slots)} | ({"null_slot": 0} if told.null == 0 else {})
        ends = [told.before + n for n in (0, *accumulate(lengths))]
        options |= self._entries(step, ends)
        if told.null == 0 and ("block_tables" in options or "cache_block_table" in options):
            options["null_page"] = 0
        if told.reserved >= 0:
            places = self._places(step)
            options["cu_rows"] = self._numbers(places)
            options["max_rows"] = None if "entry_slots" in options else places[-1] + 2
        if self.snapshots is not None:
            options["snapshot_table"] = self._table(self.snapshot_pages, step)
            options["snapshot_page_size"] = self.snapshots.page_size
        starts = [*(part[1] for part in parts), *[7] * len(absent)]
        room, start = None if step.loose else sum(lengths), self._numbers(starts)
        if told.totals:
            start, options["seq_lens"] = None, self._numbers([a + n for a, n in zip(starts, lengths, strict=True)])
        return StepPlan.build(ratio, start, self._numbers(ends), step.bound, max_tokens=room, **options)

    def _entries(self, step: Step, ends: Sequence[int]) -> dict[str, object]:
        """What says where entries go. ends: offsets of each sequence's rows of kv_score."""
        if self.addressing == "none":
            return {}
        told, ratio, known = self.told, self.spec.ratio, self.entry_slots
        if self.addressing == "table":
            return {"cache_block_table": self._pages(self.pages, step), "rows_per_page": self.rows_per_page}
        slots = [known[b][start // ratio : (start + new) // ratio] for b, start, new, _ in step.parts]
        if self.addressing == "slots":
            places = self._places(step)
            found = [-1 if told.reserved < 0 else 0] * (places[-1] + 2)  # a place of no entry says nothing
            for first, some in zip(places, slots, strict=False):
                found[first : first + len(some)] = some
            exact = told.wide or told == PLAIN
            return {"entry_slots": torch.tensor(found, device=self.device) if exact else self._numbers(found)}
        found = [max(told.null, 0)] * (ends[-1] + step.behind)  # only that of a window's last token is read
        found[ends[len(step.parts)] :] = [told.null] * (len(found) - ends[len(step.parts)])
        for first, some, (_, start, _, _) in zip(ends, slots, step.parts, strict=False):
            for i, slot in enumerate(some):
                found[first + (start // ratio + i + 1) * ratio - 1 - start] = told.null if slot < 0 else slot
        return {"token_slots": self._numbers(found), "no_slot": told.null}

    def _pages(self, pages: Pages, step: Step) -> Tensor:
        """The engine's table of pages."""
        return self._numbers([[self.told.null if x < 0 else x for x in row] for row in self._rows(pages, step)])

    def _table(self, pages: Pages, step: Step) -> Tensor:
        """Pages of snapshots, which are told as they are."""
        return self._ints(self._rows(pages, step))

    @staticmethod
    def _rows(pages: Pages, step: Step) -> list[list[int]]:
        """Pages of the sequences of a step, -1 behind the last one of each."""
        rows = [*(pages[part[0]] for part in step.parts), *[()] * len(step.absent)]
        width = max(1, *map(len, rows))
        return [[*row, *[-1] * (width - len(row))] for row in rows]

    def _numbers(self, values: Sequence) -> Tensor:
        return self.told.numbers(values, self.device)

    def _ints(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def _unwritten(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.rows or torch.float32
        return torch.full((count, self.spec.head_dim), UNWRITTEN, dtype=dtype, device=self.device)


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
