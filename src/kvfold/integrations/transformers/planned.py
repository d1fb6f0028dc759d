"""Steps over a plan, as on a GPU: what a thread keeps between them, so that a step is little more than its launches.

`kvfold.compress` checks an object when it first sees it. So plans, rotations by position and what wraps the tensors of a cache
live on from step to step. Tensors of a cache are held by views and found by themselves: when a cache goes, all of it goes.
"""

from __future__ import annotations

import threading
import weakref

import torch

from ...compress import compress
from ...plan import StepPlan
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.fold_state import FoldState, state_kind

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_MOST_PLANS = 16  # as many as a layer remembers
_EXACT, _LONG = 8, 4096  # tokens: short steps have kernels of their own; a plan for long ones is large
_LEAST_TABLE = 4096  # positions


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
    batch, new = kv.shape[:2]
    kept = _kept_on(kv.device)
    layer = kept.layer(rows, tags, entries, spec, most_of(spec, max_new_tokens))
    plan = kept.plan(spec.ratio, batch, start, new, entries.shape[1])
    table = kept.table(rope, start, start + new, spec)
    ape, settled = layer.weights(ape, norm_weight)
    # A kernel may be launched while the one before it still runs, and then reads these without waiting for it.
    pdl = None if settled and rope is None else False
    tokens = kv.flatten(0, 1), gate.flatten(0, 1)
    compress(
        tokens, plan, layer.state, layer.cache, spec=spec, ape=ape, norm_weight=norm_weight, rope=table, backend=backend, pdl=pdl
    )


class _Layer:
    """Rows, tags and entries of a compressor on one cache as `compress` takes them, and the weights of the last step."""

    def __init__(self, spec: CompressorSpec, rows: torch.Tensor, tags: torch.Tensor, most: int, kept: _Kept) -> None:
        places, place = kept.layers, id(rows)
        self.rows, self.tags = weakref.ref(rows, lambda _: places.pop(place, None)), weakref.ref(tags)
        self.spec, self.most = spec, most
        self.state = FoldState(spec, rows.detach(), tags.detach(), most)
        self.state._workspaces = kept.workspaces  # of all states: launches of a stream come one behind the other
        self.entries = self.ape_seen = self.norm_seen = _nothing
        self.own_ape: torch.Tensor | None = None

    def keep(self, entries: torch.Tensor) -> None:
        """Each entry is a page, so that no plan depends on how much room there is."""
        self.entries = weakref.ref(entries)
        self.cache = EntryCache(entries.detach().view(-1, entries.shape[-1]), FORMATS[entries.dtype], 1, self.spec)

    def weights(self, ape: torch.Tensor, norm_weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """ape in fp32, and whether both were there before this step: others may just have been written."""
        settled = self.ape_seen() is ape and self.norm_seen() is norm_weight
        if not settled:
            self.ape_seen, self.norm_seen = weakref.ref(ape), weakref.ref(norm_weight)
        if ape.dtype is torch.float32:
            return ape, settled
        if self.own_ape is None or self.own_ape.shape != ape.shape:
            with torch.inference_mode(False):
                self.own_ape = torch.empty(ape.shape, dtype=torch.float32, device=ape.device)
        return self.own_ape.copy_(ape), False


def _nothing() -> None:
    return None


class _Plan:
    """A plan, for which step it was made last, and how many entries of a sequence it has pages for."""

    __slots__ = ("at", "plan", "width")

    def __init__(self, plan: StepPlan, at: tuple[int, int], width: int) -> None:
        self.plan, self.at, self.width = plan, at, width


class _Kept:
    """What a thread keeps for one stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.layers: dict[int, _Layer] = {}  # by the id of their rows
        self.plans: dict[tuple, _Plan] = {}
        self.tables: dict[int, torch.Tensor] = {}
        self.workspaces: list = []
        self.lengths: tuple[torch.Tensor, torch.Tensor, tuple[int, int, int]] | None = None

    def layer(
        self, rows: torch.Tensor, tags: torch.Tensor, entries: torch.Tensor, spec: CompressorSpec, most: int
    ) -> _Layer:
        found = self.layers.get(id(rows))
        same = found is not None and found.rows() is rows and found.tags() is tags
        if not same or found.spec != spec or found.most != most:
            with torch.inference_mode(False):
                found = self.layers[id(rows)] = _Layer(spec, rows, tags, most, self)
        if found.entries() is not entries:
            with torch.inference_mode(False):
                found.keep(entries)
        return found

    def plan(self, ratio: int, batch: int, start: int, new: int, capacity: int) -> StepPlan:
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
            known.plan.update(*self._lengths(batch, start, new))
            known.at = at
        return known.plan

    def _build(self, key: tuple, at: tuple[int, int], capacity: int) -> _Plan:
        ratio, batch, bound, apart = key
        for old in [one for one in self.plans if one[2] > _LONG or len(self.plans) >= _MOST_PLANS]:
            del self.plans[old]
        width, ints = capacity if batch > 1 else 1 << capacity.bit_length(), {"dtype": torch.int32, "device": self.device}
        pages, rows = torch.arange(batch * width, **ints).view(batch, width), torch.arange(batch, **ints)
        lengths = self._lengths(batch, *at)
        plan = StepPlan.build(ratio, *lengths, bound, state_slots=rows, cache_block_table=pages, rows_per_page=1)
        known = self.plans[key] = _Plan(plan, at, width)
        return known

    def _lengths(self, batch: int, start: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`start_pos` and `cu_seqlens`, which the plans of a step share."""
        starts, ends, have = self.lengths or (None, None, (-1, -1, -1))
        if have != (batch, start, new):
            with torch.inference_mode(False):
                if have[0] != batch:
                    starts = torch.full((batch,), start, dtype=torch.int32, device=self.device)
                elif have[1] != start:
                    starts.fill_(start)
                if (have[0], have[2]) != (batch, new):
                    ends = torch.arange(batch + 1, dtype=torch.int32, device=self.device).mul_(new)
            self.lengths = starts, ends, (batch, start, new)
        return starts, ends

    def table(self, rope: torch.Tensor | None, start: int, end: int, spec: CompressorSpec) -> torch.Tensor:
        """A table by position with the rotations of this step's entries in it. Nobody reads its other rows."""
        table = self.tables.get(spec.rope_dim)
        if table is None or len(table) < end:
            with torch.inference_mode(False):
                room = max(_LEAST_TABLE, 1 << (end - 1).bit_length())
                table = self.tables[spec.rope_dim] = torch.empty(room, spec.rope_dim, device=self.device)
        if rope is not None:
            ratio = spec.ratio
            table[start // ratio * ratio : end // ratio * ratio : ratio] = rope
        return table


class _OfThread(threading.local):
    """By device and stream."""

    def __init__(self) -> None:
        self.streams: dict[tuple[torch.device, int], _Kept] = {}


_thread = _OfThread()


def _kept_on(device: torch.device) -> _Kept:
    place = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _thread.streams.get(place)
    if found is None:
        found = _thread.streams[place] = _Kept(device)
    return found
