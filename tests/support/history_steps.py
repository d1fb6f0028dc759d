"""Whole histories of a serving engine as plain data, and what each step of one must do; `history_support.run` plays them.

A history prints as Python. `History.program` makes it a program that replays it, which is how a failing one is reported.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from support.helpers import Weights, make_tokens
from torch import Tensor

from kvfold import CompressorSpec, reference

SLOTS = 3  # sequences that an engine has at most
ROWS_PER_PAGE = 2  # entries per page of the cache


class Case(NamedTuple):
    """A compressor, its dtypes and its cache.

    limit: tokens of the longest sequence. page_size: of a `WindowState`. prefix: positions per page of `Snapshots`, 0 for none.
    """

    spec: CompressorSpec
    limit: int
    fmt: str = "fp32"
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32
    page_size: int = 0
    prefix: int = 0

    @property
    def columns(self) -> int:
        """Cache pages of the longest sequence."""
        return -(-self.limit // (self.spec.ratio * ROWS_PER_PAGE))

    @property
    def snapshots(self) -> int:
        """Prefix pages of the longest sequence."""
        return -(-self.limit // self.prefix) if self.prefix else 0


_BF16 = torch.bfloat16
_CSA = CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=16, hadamard=True)
_SIXTEEN = CompressorSpec(head_dim=32, ratio=16, rope_dim=16)
_TWO = CompressorSpec(head_dim=16, ratio=2, rope_dim=4, has_ape=False, norm_eps=1e-20)  # as V4.1's
CASES = {
    "fold-16": Case(_SIXTEEN, 84, prefix=6),
    "fold-32-bf16": Case(CompressorSpec(head_dim=16, ratio=32, rope_dim=4, has_ape=False), 130, "fp8_tensor", _BF16, prefix=32),
    "fold-128": Case(CompressorSpec(head_dim=16, ratio=128, rope_dim=16), 290, "bf16"),
    "csa": Case(_CSA, 40, prefix=4),
    "csa-bf16-state": Case(_CSA, 40, "fp8_tensor", _BF16, _BF16, prefix=8),
    "csa-bf16-input": Case(CompressorSpec(head_dim=128, ratio=4, overlap=True), 40, "indexer_fp8_vllm", _BF16),
    "overlap-3": Case(CompressorSpec(head_dim=16, ratio=3, overlap=True, rope_dim=0), 36, prefix=6),
    "ratio-2": Case(_TWO, 28, prefix=4),
    "ratio-2-bf16-state": Case(_TWO, 28, "bf16", _BF16, _BF16),
    "rows-8": Case(CompressorSpec(head_dim=16, ratio=8, rope_dim=4), 60, "bf16"),
    "window-csa": Case(_CSA, 40, page_size=6),
    "window-csa-bf16-state": Case(_CSA, 40, "bf16", _BF16, _BF16, page_size=4),
    "window-16": Case(_SIXTEEN, 84, "bf16", state_dtype=_BF16, page_size=16),
    "window-ratio-2": Case(_TWO, 28, "bf16", _BF16, page_size=4),
    "window-ratio-2-across": Case(_TWO, 28, state_dtype=_BF16, page_size=5),
    "window-128": Case(CompressorSpec(head_dim=16, ratio=128, rope_dim=16), 290, dtype=_BF16, page_size=48),
}


def _short(step: tuple) -> str:
    """The Python that makes a step again, without the fields that have their default."""
    given = [f"{n}={v!r}" for n, v in step._asdict().items() if n not in step._field_defaults or v != step._field_defaults[n]]
    return f"{type(step).__name__}({', '.join(given)})"


class Feed(NamedTuple):
    """A place in a call's batch: `count` new tokens for the sequence of `slot`, whose first one is at position `start`.

    The first one of an empty slot is a sequence that arrives. A smaller `start` than the sequence has tokens rejects drafts.
    Slot -1 is padding. `hole`: the column of the sequence's table of cache pages that is -1 in this call.
    """

    slot: int
    start: int
    count: int
    hole: int | None = None
    __repr__ = _short


class Call(NamedTuple):
    """One call of `compress`, or the same one `times` over, with `padding` rows behind the last token."""

    feeds: tuple[Feed, ...]
    times: int = 1
    padding: int = 0
    __repr__ = _short


class End(NamedTuple):
    """A sequence ends: its cache pages and its slot, with whatever they hold, are for others."""

    slot: int
    __repr__ = _short


class Move(NamedTuple):
    """Preemption: state row and tags are copied to an empty slot, where the sequence goes on. `FoldState` only."""

    source: int
    target: int
    __repr__ = _short


class Share(NamedTuple):
    """A sequence arrives in an empty slot that shares the pages of the first `end` positions of another. `WindowState` only."""

    source: int
    target: int
    end: int
    __repr__ = _short


class Hit(NamedTuple):
    """A sequence arrives in an empty slot that begins with the first `pages` prefix pages of another, by a snapshot."""

    source: int
    target: int
    pages: int
    __repr__ = _short


Step = Call | End | Move | Share | Hit


@dataclass(frozen=True)
class History:
    """`steps` of an engine with `SLOTS` slots; `max_new_tokens` is the state's."""

    case: str
    max_new_tokens: int
    steps: tuple[Step, ...]

    def __repr__(self) -> str:
        steps = "".join(f"    {step!r},\n" for step in self.steps)
        return f"History({self.case!r}, {self.max_new_tokens}, (\n{steps}))"

    def program(self, backend: str = "torch") -> str:
        """Python that replays this history, for the directory of the tests. `backend`: a key of `conftest.BACKENDS`."""
        names = ", ".join(sorted({type(step).__name__ for step in self.steps} | {"Feed", "History"}))
        imports = f"import conftest\nfrom support.history_steps import {names}\nfrom support.history_support import run\n"
        return f"{imports}\nrun({self!r}, conftest.BACKENDS[{backend!r}])\n"


@dataclass
class Sequence:
    """A sequence: the text that it is now, how much of it is there, its pages of the cache and those of its snapshots."""

    text: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # where its next step may be relied on to start
    floor: int = 0  # it never turns back before this: earlier positions are shared, or were never in its state
    snapshots: list[int] = field(default_factory=list)


class Outcome(NamedTuple):
    """What a feed must do. `text` -1: nothing. `refused`: nothing, and it is counted."""

    text: int = -1
    end: int = 0
    refused: bool = False
    starts: tuple[int, ...] = ()
    pages: tuple[int, ...] = ()
    snapshots: tuple[int, ...] = ()
    seen: int = 0  # the sequence itself went through all positions from here on


class Taken(NamedTuple):
    """What a hit must do: the snapshot in `page` makes the rows of `text` before `start` those of the slot."""

    text: int
    start: int
    page: int


class Simulation:
    """What an engine knows: the tokens of each sequence, as `texts`, where it may start next, and its cache pages.

    A text only grows. Where a sequence turns back it gets a new one, so that all that ever was to be seen begins a text.
    Which starts beyond those that may be relied on are refused is `reference.Simulator`'s verdict.
    """

    def __init__(self, name: str, max_new_tokens: int) -> None:
        self.case, self.max_new_tokens = CASES[name], max_new_tokens
        self.texts: list[Tensor] = []
        self.slots: list[Sequence | None] = [None] * SLOTS
        self.verdict = reference.Simulator(self.case.spec, SLOTS, max_new_tokens, weights(self.case.spec).ape)
        self.free = list(range(SLOTS * self.case.columns))
        self.free_snapshots = list(range(SLOTS * self.case.snapshots))
        self.calls = 0

    def apply(self, step: Step) -> list[Outcome] | Taken | None:
        """Does a step; the outcome of each feed if it is a call, and what a hit takes."""
        match step:
            case Call():
                self.calls += 1
                return [self._feed(feed, 1000 * self.calls + place) for place, feed in enumerate(step.feeds)]
            case End():
                self.free += self.slots[step.slot].pages
                self.free_snapshots += self.slots[step.slot].snapshots
                self.slots[step.slot] = None
            case Move():
                self.slots[step.target], self.slots[step.source] = self.slots[step.source], None
                self.verdict.slots[step.target] = list(self.verdict.slots[step.source])
            case Share():
                source = self.slots[step.source]
                self.texts.append(self.texts[source.text][: step.end])
                shared = step.end // self.case.page_size * self.case.page_size
                source.floor = max(source.floor, shared)
                self.slots[step.target] = Sequence(len(self.texts) - 1, step.end, starts=[step.end], floor=shared)
                self._give_pages(self.slots[step.target], step.end)
            case Hit():
                return self._hit(step)
        return None

    def hits(self, slot: int) -> range:
        """Numbers of prefix pages that another sequence can take from this one: those that it has seen to their end itself."""
        sequence, page = self.slots[slot], self.case.prefix
        return range(sequence.floor // page + 1, sequence.length // page + 1) if page else range(0)

    def _hit(self, step: Hit) -> Taken:
        source, start = self.slots[step.source], step.pages * self.case.prefix
        self.texts.append(self.texts[source.text][:start])
        target = Sequence(len(self.texts) - 1, start, starts=[start], floor=start)
        self._give_pages(target, start)
        self.slots[step.target] = target
        memory, text, verdict = self.verdict.slots[step.target], self.texts[-1], self.verdict
        memory[:] = [None] * len(memory)
        if start - 1 in verdict.history_of(start):  # one row, or the lo rows of one window
            x, ratio = start - 1, self.case.spec.ratio
            home = x % verdict.ring if verdict.kind == "fold" else x // ratio % verdict.places[0]
            memory[home] = reference.Held(x, text[x - x % ratio : start].float())
        return Taken(target.text, start, source.snapshots[step.pages - 1])

    def tokens(self, feed: Feed, seed: int) -> Tensor:
        return make_tokens(self.case.spec, feed.count, seed, self.case.dtype)

    def _feed(self, feed: Feed, seed: int) -> Outcome:
        if feed.slot == -1 or feed.count == 0:
            return Outcome()
        end, new = feed.start + feed.count, self.tokens(feed, seed)
        if feed.start < 0 or feed.slot >= SLOTS:
            return Outcome(refused=True)
        sequence = self.slots[feed.slot] or Sequence(-1)
        accepted = self.case.page_size > 0 or self.verdict.step(feed.slot, feed.start, new.float()) is not None
        assert accepted or feed.start not in sequence.starts, f"{feed} may be relied on"
        self.slots[feed.slot] = sequence
        self._give_pages(sequence, end)
        pages = tuple(-1 if column == feed.hole else page for column, page in enumerate(sequence.pages))
        if not accepted:
            return Outcome(refused=True, pages=pages)
        old = self.texts[sequence.text] if sequence.length else new[:0]
        if not 0 < len(old) == feed.start:
            self.texts.append(old[:0])
            sequence.text = len(self.texts) - 1
        self.texts[sequence.text] = torch.cat([old[: feed.start], new])
        sequence.length = end
        # DESIGN.md, "What may be relied on".
        late = feed.start
        if feed.count > self.max_new_tokens:
            last = (end - 1) // self.case.spec.ratio * self.case.spec.ratio
            late = last if self.verdict.kind == "rows" and not self.case.page_size else end - self.max_new_tokens
        sequence.starts = [feed.start, *range(max(late, feed.start + 1), end + 1)]
        return Outcome(sequence.text, end, False, tuple(sequence.starts), pages, tuple(sequence.snapshots), sequence.floor)

    def _give_pages(self, sequence: Sequence, end: int) -> None:
        while len(sequence.pages) * ROWS_PER_PAGE < end // self.case.spec.ratio:
            sequence.pages.append(self.free.pop())
        while len(sequence.snapshots) < self.case.snapshots:
            sequence.snapshots.append(self.free_snapshots.pop())


@functools.cache
def weights(spec: CompressorSpec) -> Weights:
    return Weights.make(spec)
