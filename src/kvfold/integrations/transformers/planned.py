"""Steps over a plan, as on a GPU, and what a thread keeps between them so that a step is little more than its launches.

A step is `kvfold.compress`, which checks all that it is given. On a GPU it is checked for the first of its kind; another one is
the same launch over other tensors, which are all made here (`backend_triton/again.py`). Of a cache nothing is kept but weakly.
"""

from __future__ import annotations

import threading
import weakref
from functools import cache
from typing import Any

import torch

from ...arguments.checks import check_real_memory, check_tensor, makes_fakes
from ...compress import compress
from ...plan import StepPlan
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.fold_state import FoldState, state_kind
from ...storage.remembered import where
from ...storage.step import Compressor

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_MOST_PLANS = 32
_MOST_KINDS = 256  # of steps: each length of a long prompt is one
_EXACT, _LONG = 8, 4096  # tokens: short steps have kernels of their own; a plan for long ones is large
_LEAST_TABLE = 4096  # positions
_LEAST_NUMBERS = 512  # windows


def most_of(spec: CompressorSpec, max_new_tokens: int) -> int:
    """`FoldState.max_new_tokens`: a rewind may go back by so many tokens however many steps they came in."""
    return max_new_tokens + 2 * spec.ratio if state_kind(spec) == "rows" and max_new_tokens > 1 else max_new_tokens


def step_planned(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    rows: torch.Tensor,
    tags: torch.Tensor,
    entries: torch.Tensor,
    start: int,
    max_new_tokens: int,
    spec: CompressorSpec,
    backend: str | None,
) -> None:
    """`step.step`; ape: of any floating dtype; rope: a row for each entry of the step, None where there are none."""
    batch, new, _ = kv.shape
    kept, most = kept_on(kv.device), most_of(spec, max_new_tokens)
    planned = kept.plan(spec.ratio, batch, start, new, entries.shape[1])
    table = kept.table(rope, start, start + new, spec)
    ape, settled = kept.weights(rows, ape, norm_weight, spec)
    # A kernel may be launched while the one before it still runs, and then reads these without waiting for it.
    pdl = None if settled and rope is None else False
    plan, value, score = planned.plan, kv.flatten(0, 1), gate.flatten(0, 1)
    kind, again = None, None
    if (backend == "triton" or (backend is None and kv.is_cuda)) and _as_made(kv, gate, rows, entries, spec):
        windows, bucket = planned.windows(batch * new)
        kind = spec, most, plan.max_new_tokens, bucket, kv.dtype, norm_weight.dtype, rows.dtype, entries.dtype, batch > 1
        again = kept.again.get(kind)
    if again is not None:
        again(windows, plan, value, score, (ape, norm_weight, table), (rows, tags), entries, kept.scratch, pdl)
        return
    state = FoldState(spec, rows, tags, most)
    entry_cache = EntryCache(entries.view(-1, spec.head_dim), FORMATS[entries.dtype], 1, spec)
    weights = {"spec": spec, "ape": ape, "norm_weight": norm_weight, "rope": table}
    compress((value, score), plan, state, entry_cache, **weights, backend=backend, pdl=pdl)
    if kind is not None:
        if len(kept.again) >= _MOST_KINDS:
            kept.again.clear()
        kept.again[kind] = _triton().Again(Compressor((value, score), state, entry_cache, **weights), plan)
        kept.scratch = kept.scratch or _triton().Scratch(kv.device)


@cache
def _triton() -> Any:
    """Imported where it is needed, as it imports triton."""
    from ...backend_triton import again

    return again


def _as_made(kv: torch.Tensor, gate: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor, spec: CompressorSpec) -> bool:
    """Whether projections are such that a step need not be checked whole: `compress` says what is wrong with others."""
    for name, x in (("kv", kv), ("gate", gate)):
        check_real_memory(name, x)
        if x.shape[2] != spec.channels or not x.numel() or not x.is_contiguous():
            return False
    same = gate.dtype is kv.dtype and gate.shape == kv.shape and entries.is_contiguous() and rows.shape[0] == kv.shape[0]
    return same and gate.device == rows.device == entries.device == kv.device


class _Plan:
    """A plan, for which step it was made last, and how many entries of a sequence it has pages for."""

    __slots__ = ("at", "counted", "plan", "width")

    def __init__(self, plan: StepPlan, at: tuple[int, int], width: int) -> None:
        self.plan, self.at, self.width = plan, at, width
        self.counted = -1, 0, 0.0

    def windows(self, tokens: int) -> tuple[int, float]:
        """How many windows a call with so many tokens may touch, and their bucket."""
        if self.counted[0] != tokens:
            self.counted = tokens, *_triton().count(self.plan, tokens)
        return self.counted[1:]


class _Weights:
    """Weights of the last step over a cache, and a copy of the bias in fp32, where it is not that itself."""

    def __init__(self, gone: Any) -> None:
        self.gone = gone
        self.seen: tuple = (_nothing, _nothing)
        self.at: tuple = ()
        self.own: torch.Tensor | None = None


def _nothing() -> None:
    return None


class _Kept:
    """What a thread keeps for one stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.known: dict[int, _Weights] = {}  # by the id of the rows of a state
        self.plans: dict[tuple, _Plan] = {}
        self.again: dict[tuple, Any] = {}
        self.tables: dict[int, torch.Tensor] = {}
        self.lengths: tuple[Any, Any, tuple[int, int, int]] = None, None, (-1, -1, -1)
        self.numbers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of windows, by ratio
        self.scratch: Any = None  # of kernels

    def plan(self, ratio: int, batch: int, start: int, new: int, capacity: int) -> _Plan:
        """Of a step of all sequences from `start` on; batch row = state slot, entry w of row b is slot `b * capacity + w`.

        It is made for up to twice the tokens, so that most steps are an `update` in place.
        """
        bound = max(new, 1) if new <= _EXACT or new > _LONG else 1 << (new - 1).bit_length()
        key, at = (ratio, batch, bound, capacity if batch > 1 else 0), (start, new)
        known = self.plans.get(key)
        if known is None or known.width < capacity:
            with torch.inference_mode(False):
                known = self._build(key, at, capacity)
        elif known.at != at:
            lengths = self._lengths(batch, start, new)
            if self.device.type == "cpu":
                known.plan.update(*lengths)
            else:
                _triton().update(known.plan, *lengths)
            known.at = at
        return known

    def _build(self, key: tuple, at: tuple[int, int], capacity: int) -> _Plan:
        ratio, batch, bound, _ = key
        full = len(self.plans) >= _MOST_PLANS
        for old in [one for one in self.plans if full or one[2] > _LONG]:
            del self.plans[old]
        width, ints = capacity if batch > 1 else 1 << capacity.bit_length(), {"dtype": torch.int32, "device": self.device}
        pages, rows = torch.arange(batch * width, **ints).view(batch, width), torch.arange(batch, **ints)
        lengths = self._lengths(batch, *at)
        plan = StepPlan.build(ratio, *lengths, bound, state_slots=rows, cache_block_table=pages, rows_per_page=1)
        known = self.plans[key] = _Plan(plan, at, width)
        return known

    def _lengths(self, batch: int, start: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`start_pos` and `cu_seqlens`, which the plans of a step share."""
        starts, ends, have = self.lengths
        if have != (batch, start, new):
            if have[0] != batch:
                with torch.inference_mode(False):
                    starts = torch.full((batch,), start, dtype=torch.int32, device=self.device)
            elif have[1] != start:
                starts.fill_(start)
            if (have[0], have[2]) != (batch, new):
                with torch.inference_mode(False):
                    ends = torch.arange(batch + 1, dtype=torch.int32, device=self.device).mul_(new)
            self.lengths = starts, ends, (batch, start, new)
        return starts, ends

    def table(self, rope: torch.Tensor | None, start: int, end: int, spec: CompressorSpec) -> torch.Tensor:
        """A table by position with the rotations of this step's entries in it. Nobody reads its other rows."""
        table = self.tables.get(spec.rope_dim)
        if table is None or len(table) < end:
            with torch.inference_mode(False):
                room = max(_LEAST_TABLE, 1 << (end - 1).bit_length())
                table = self.tables[spec.rope_dim] = torch.empty(room, spec.rope_dim, dtype=torch.float32, device=self.device)
        if rope is not None:
            ratio = spec.ratio
            table[start // ratio * ratio : end // ratio * ratio : ratio] = rope
        return table

    def windows(self, count: int, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 `[count]` each: the numbers of the first windows, and the positions of their last tokens. Not to be written."""
        found = self.numbers.get(ratio)
        if found is None or len(found[0]) < count:
            with torch.inference_mode(False):
                number = torch.arange(max(_LEAST_NUMBERS, 1 << count.bit_length()), device=self.device)
                found = self.numbers[ratio] = number, number * ratio + (ratio - 1)
        return found[0][:count], found[1][:count]

    def weights(
        self, rows: torch.Tensor, ape: torch.Tensor, norm_weight: torch.Tensor, spec: CompressorSpec
    ) -> tuple[torch.Tensor, bool]:
        """ape in fp32, and whether both are those of the last step: others may just have been written."""
        place, known = id(rows), self.known
        found = known.get(place)
        if found is None or found.gone() is not rows:
            found = known[place] = _Weights(weakref.ref(rows, lambda _: known.pop(place, None)))
        at = where([ape, norm_weight]), ape.dtype, norm_weight.dtype
        settled = found.seen[0]() is ape and found.seen[1]() is norm_weight and found.at == at
        if not settled:
            found.at = ()  # until both are checked: a step that is refused leaves nothing to go on with
            check_tensor("norm_weight", norm_weight, (spec.head_dim,), tuple(FORMATS), self.device)
            found.own = None
        if ape.dtype is not torch.float32:
            if found.own is None:
                with torch.inference_mode(False):
                    found.own = torch.empty(ape.shape, dtype=torch.float32, device=ape.device)
            own = found.own.copy_(ape)
        else:
            own = ape
        if not settled:
            check_tensor("ape", own, (spec.ratio, spec.channels), (torch.float32,), self.device)
            found.seen, found.at = (weakref.ref(ape), weakref.ref(norm_weight)), at
        return own, settled and own is ape


class _OfThread(threading.local):
    """By device and stream."""

    def __init__(self) -> None:
        self.streams: dict[tuple[torch.device, int], _Kept] = {}


_thread = _OfThread()


def kept_on(device: torch.device) -> _Kept:
    if makes_fakes():
        return _Kept(device)
    place = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _thread.streams.get(place)
    if found is None:
        found = _thread.streams[place] = _Kept(device)
    return found
