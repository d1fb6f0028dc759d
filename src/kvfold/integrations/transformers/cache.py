"""What a DeepSeek-V4 layer of a transformers cache carries when kvfold pools for it: state, entries, rewindable keys.

`LayerFold` is the attribute `kvfold` of a cache layer, `CacheFold` that of a cache, so a new cache object means new state,
and deleting the cache frees it. This file knows tensors and positions, not transformers' modules.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...compress import compress
from ...contract import UnsupportedError
from ...plan import StepPlan
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.fold_state import FoldState, state_kind

FIRST_CAPACITY = 64
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class CacheFold:
    """What kvfold keeps for a cache as a whole, which serves one thread at a time. Copies and pickles begin anew."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, torch.device], tuple[tuple, int, StepPlan]] = {}

    def __reduce__(self) -> tuple:
        return CacheFold, ()

    def plan(self, ratio: int, device: torch.device, batch: int, start: int, new: int, capacity: int) -> StepPlan:
        """Of a step of all sequences from `start` on, for compressors of one ratio and device; a page has `capacity` entries.

        A decode step differs from the one before only in its start, so it is an `update` in place.
        """
        key, ints = (batch, new, capacity), {"dtype": torch.int32, "device": device}
        known, before, plan = self._last.get((ratio, device), (None, start, None))
        if known != key:
            rows, ends = torch.arange(batch, **ints), torch.arange(batch + 1, **ints) * new
            plan = StepPlan.build(
                ratio, torch.full((batch,), start, **ints), ends, max(new, 1), state_slots=rows,
                cache_block_table=rows[:, None].contiguous(), rows_per_page=capacity,
            )  # fmt: skip
        elif before != start:
            plan.update(torch.full((batch,), start, **ints), plan.cu_seqlens)
        self._last[ratio, device] = key, start, plan
        return plan


class CompressorFold:
    """State and entries of one compressor (main or indexer) in one cache layer; batch row = state slot = page.

    Attributes:
        state: the `FoldState`; its input rows are in their own dtype.
        storage: `[batch, capacity, head_dim]` in the dtype that the module's norm returns (fp32 or bf16).
        cache: `storage` as a cache of one page per sequence, made at the first step after it changed.
        length: tokens that it has seen.
        written: the furthest that `length` was, in this timeline or in one that was taken back.
        made_of: dtypes of the last step's rows and norm weight.
        max_new_tokens: how many tokens can be taken back.
    """

    def __init__(self, spec: CompressorSpec, batch: int, max_new_tokens: int, like: torch.Tensor) -> None:
        """`like`: a `kv_score` tensor, for device and dtype."""
        check_dtypes(like.dtype, like.dtype)
        self.spec, self.max_new_tokens = spec, max_new_tokens
        kept = like.dtype if state_kind(spec) == "rows" else torch.float32
        # A rewind may go back by so many tokens however many steps they came in, so the state holds more than of one step.
        most = max_new_tokens + 2 * spec.ratio if state_kind(spec) == "rows" else max_new_tokens
        self.state = FoldState.allocate(spec, batch, most, device=like.device, dtype=kept)
        self.storage = torch.empty(batch, 0, spec.head_dim, device=like.device, dtype=torch.bfloat16)
        self.cache: EntryCache | None = None
        self.length = self.written = 0
        self.made_of: tuple[torch.dtype, torch.dtype] | None = None

    def adapt(self, spec: CompressorSpec, rows: torch.dtype, entries: torch.dtype) -> None:
        """Goes on with another spec or other dtypes. Tensors become fp32 where the new rows are, and keep every bit."""
        if replace(self.spec, norm_eps=spec.norm_eps) != spec:
            raise UnsupportedError(f"a compressor that was {self.spec} and is {spec} on one cache: start with a new cache")
        check_dtypes(rows, entries)
        state = self.state
        kept = state.rows
        if state.kind == "rows":
            kept = kept.to(torch.promote_types(kept.dtype, rows))
        if kept is not state.rows or spec != self.spec:
            self.state = FoldState(spec, kept, state.positions, state.max_new_tokens)
        self.storage = self.storage.to(torch.promote_types(self.storage.dtype, entries))
        self.spec = spec

    def advance(self, kv_score: torch.Tensor, start: int, new: int, shared: CacheFold, check: bool, **weights: Any) -> None:
        """Folds `kv_score` `[batch * new, 2 * channels]`, sequence-major, at positions `start .. start + new - 1`.

        `check` reads the plan's error counter, which waits for the device. weights, and the backend: as `compress` takes them.
        """
        _check_seen(start, self.length)
        end = start + new
        self._reserve(end // self.spec.ratio)
        batch, capacity = self.storage.shape[:2]
        plan = shared.plan(self.spec.ratio, self.storage.device, batch, start, new, capacity)
        if check:
            plan.errors.zero_()
        if self.cache is None or self.cache.storage is not self.storage or self.cache.spec is not self.spec:
            self.cache = EntryCache(self.storage, _FORMATS[self.storage.dtype], capacity, self.spec)
        self.written = max(self.written, end)
        compress(kv_score, plan, self.state, self.cache, spec=self.spec, **weights)
        if check and (refused := int(plan.errors)):
            raise RuntimeError(
                f"kvfold refused {refused} of {batch} sequences: its state cannot continue from position {start}. Rewind"
                f" further than {self.max_new_tokens} tokens? See max_new_tokens of patch()"
            )
        self.length = end

    def entries(self) -> torch.Tensor:
        """`[batch, count, head_dim]`, a view of the storage: later steps write behind it, a rewind lets them write in it."""
        return self.storage[:, : self.length // self.spec.ratio]

    def select(self, indices: torch.Tensor) -> None:
        """Makes batch row i what batch row `indices[i]` was; `indices` may repeat rows or leave some out."""
        indices = indices.to(self.storage.device)
        self.storage = self.storage.index_select(0, indices)
        old = self.state
        rows, positions = old.rows.index_select(0, indices), old.positions.index_select(0, indices)
        self.state = FoldState(self.spec, rows, positions, old.max_new_tokens)

    def _reserve(self, count: int) -> None:
        # Doubling: over a whole generation, at most one more copy per entry, however long it gets.
        wanted, capacity = max(FIRST_CAPACITY, 1 << (count - 1).bit_length()), self.storage.shape[1]
        if count > capacity or not capacity:
            self.storage = torch.nn.functional.pad(self.storage, (0, 0, 0, wanted - capacity))


def check_dtypes(rows: torch.dtype, entries: torch.dtype) -> None:
    """Refuses dtypes of projections and of entries that kvfold does not take."""
    if rows not in _FORMATS:
        raise UnsupportedError(f"projections of dtype {rows}: kvfold takes torch.float32 or torch.bfloat16")
    if entries not in _FORMATS:
        raise UnsupportedError(f"entries of dtype {entries}: kvfold keeps torch.float32 or torch.bfloat16 entries")


def _check_seen(start: int, seen: int) -> None:
    if start > seen:
        raise UnsupportedError(
            f"a cache that already holds {start} tokens of which kvfold saw {seen}: patch() the model before"
            " its first step on a cache, and start with a new cache"
        )


class LayerFold:
    """All that kvfold keeps for one layer of one cache.

    Attributes:
        folds: by transformers' names, `"compressor"` and, in CSA layers, `"indexer"`.
        length: tokens that the layer has seen.
        step_start: where its last step began.
        rewound: tokens were taken back since the last step that was checked.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.folds: dict[str, CompressorFold] = {}
        self.length = self.step_start = 0
        self.rewound = False
        # The sliding keys before and after the last step. References, not copies: transformers never writes into them.
        self.keys_before: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None

    def begin(self, batch: int, start: int, new: int, keys: torch.Tensor | None) -> None:
        """A step of `new` tokens begins at `start`; `keys`: the sliding keys after it. Where it raises, nothing is changed."""
        for fold in self.folds.values():
            if fold.storage.shape[0] != batch:
                raise UnsupportedError(f"a batch of {batch} on a cache of {fold.storage.shape[0]} sequences")
        _check_seen(start, self.length)
        if start < self.length:
            self._check_rewind(start)
            self.rewound = True
            self.keys = None
        self.step_start, self.length = start, start + new
        self.keys_before, self.keys = self.keys, keys

    def rewind(self, length: int, window: int) -> torch.Tensor:
        """Back to `length` tokens. Returns the sliding keys `[batch, 1, <= window - 1, head_dim]` as they were then."""
        keys = self.keys_at(length, window)
        self.rewound |= length != self.length
        self.length = self.step_start = length
        for fold in self.folds.values():
            fold.length = length
        self.keys_before, self.keys = None, keys
        return keys

    def select(self, indices: torch.Tensor, keys: torch.Tensor | None) -> None:
        """Reorders, repeats or drops batch rows (beam search); `keys` are the layer's keys after the same was done to them."""
        # What is kept must outlive an inference_mode block, in which tensors are made that nobody may write to later.
        with torch.inference_mode(False), torch.no_grad():
            for fold in self.folds.values():
                fold.select(indices)
        if self.keys_before is not None:
            self.keys_before = self.keys_before.index_select(0, indices.to(self.keys_before.device))
        self.keys = keys

    def batch_rows(self) -> torch.Tensor:
        """int64 `[batch]`: 0, 1, .. on the device of the layer's entries; empty before its first step."""
        first = next((fold.storage for fold in self.folds.values()), self.keys)
        return torch.arange(0) if first is None else torch.arange(first.shape[0], device=first.device)

    def _check_rewind(self, length: int) -> None:
        written = max((fold.written for fold in self.folds.values()), default=self.length)
        if length == self.step_start or (length >= 0 and written - length <= self.max_new_tokens):
            return
        raise UnsupportedError(
            f"a rewind from {self.length} to {length} tokens: kvfold can go back to {self.step_start}, where the last step"
            f" began, or by up to max_new_tokens={self.max_new_tokens}, an argument of patch()"
        )

    def keys_at(self, length: int, window: int) -> torch.Tensor:
        """The keys that `rewind` would return; it raises what that would and changes nothing."""
        self._check_rewind(length)
        first = max(length - window + 1, 0)
        if self.keys is None:
            raise UnsupportedError("a rewind of sliding keys before the layer has made a step")
        if length == 0:
            return self.keys[:, :, :0]
        held = self.length - self.keys.shape[2]
        if held <= first:
            return self.keys[:, :, first - held : length - held]
        before = self.keys_before
        if before is None or length < self.step_start or (held > self.step_start and length > self.step_start):
            raise UnsupportedError(
                f"a rewind from {self.length} to {length} tokens: of the sliding-window keys only those of the last step and"
                f" the window before it are kept; the last step began at {self.step_start}"
            )
        held_before = self.step_start - before.shape[2]
        older = before[:, :, first - held_before :]
        if length == self.step_start:
            return older
        return torch.cat([older, self.keys[:, :, self.step_start - held : length - held]], dim=2)
