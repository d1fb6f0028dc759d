"""What a DeepSeek-V4 layer of a transformers cache carries when kvfold pools for it: state, entries, rewindable keys.

`LayerFold` is the attribute `kvfold` of a cache layer, so a new cache object means new state, and deleting the cache frees it.
This file knows tensors and positions, not transformers' modules.
"""

from __future__ import annotations

import torch

from ...contract import UnsupportedError
from ...spec import CompressorSpec
from .planned import FORMATS
from .step import new_state, step
from .weights import Shape

_TRACED_ROOM = 512  # tokens
_ROOM = 32  # tokens
_ROOM_OF_A_PLAN = 16  # entries: another capacity is another plan


class CompressorFold:
    """State and entries of one compressor (main or indexer) in one cache layer.

    Attributes:
        shape, norm_eps: of the compressor.
        state: rows and tags, as `step.new_state` makes them; input rows are in their own dtype.
        storage: `[batch, capacity, head_dim]` in the dtype that the module's norm returns (fp32 or bf16).
        made_of: dtypes of the last step's projections and norm weight.
        length: tokens that it has seen.
        written: the furthest that `length` was, in this timeline or in one that was taken back.
        before: state and `written` before the last step, if that was too long for all of its history to be kept in `state`.
        max_new_tokens: how many tokens can be taken back.
    """

    def __init__(
        self, shape: Shape, like: torch.Tensor, entries: torch.dtype, max_new_tokens: int, backend: str | None
    ) -> None:
        """`like`: a projection `[batch, new, channels]`; entries: their dtype."""
        check_dtypes(like.dtype, entries)
        self.shape, self.norm_eps, self.max_new_tokens, self.backend = shape, 0.0, max_new_tokens, backend
        self.state = new_state(like, shape, max_new_tokens, backend)
        self.storage = like.new_empty(like.shape[0], 0, shape.head_dim, dtype=entries)
        self.length = self.written = 0
        self.made_of: tuple[torch.dtype, torch.dtype] | None = None
        self.before: tuple[tuple[torch.Tensor, torch.Tensor], int] | None = None

    @property
    def spec(self) -> CompressorSpec:
        return self.shape.spec(self.norm_eps)

    def adapt(self, shape: Shape, rows: torch.dtype, entries: torch.dtype) -> None:
        """Goes on with other dtypes. Tensors become fp32 where the new rows are, and keep every bit."""
        if shape != self.shape:
            raise UnsupportedError(f"a compressor that was {self.shape} and is {shape} on one cache: start with a new cache")
        check_dtypes(rows, entries)
        held, tags = self.state
        if held.dtype is not torch.float32 and rows is torch.float32:
            self.state = held.float(), tags
        if self.storage.dtype is not torch.float32 and entries is torch.float32:
            self.storage = self.storage.float()

    def advance(self, kv: torch.Tensor, gate: torch.Tensor, start: int, weights: tuple, norm_eps: float) -> None:
        """Folds `kv` and `gate` `[batch, new, channels]`, from position `start` on. weights: as `step` takes them."""
        check_seen(start, self.length)
        new = kv.shape[1]
        end = start + new
        self._reserve(end)
        self.norm_eps, before = norm_eps, None
        rows, tags = self.state
        if tags.shape[1] == 0 and new > self.max_new_tokens and start:
            before, self.state = (self.state, self.written), (rows.clone(), tags)
        self.before, self.written = before if self.max_new_tokens > 1 else None, max(self.written, end)
        step((kv, gate), weights, self.state, self.storage, start, self.max_new_tokens, self.shape, norm_eps, self.backend)
        self.length = end

    def rewind(self, length: int, step_start: int) -> None:
        """Back to `length`, which `LayerFold` has checked."""
        if self.before is not None and length == step_start:
            self.state, self.written = self.before
        self.length, self.before = length, None

    def entries(self) -> torch.Tensor:
        """`[batch, count, head_dim]`, a view of the storage: later steps write behind it, a rewind lets them write in it."""
        return self.storage[:, : self.length // self.shape.ratio]

    def select(self, indices: torch.Tensor) -> None:
        """Makes batch row i what batch row `indices[i]` was; `indices` may repeat rows or leave some out."""
        indices = indices.to(self.storage.device)
        self.storage = self.storage.index_select(0, indices)
        self.state, self.before = (
            _chosen(self.state, indices),
            self.before and (_chosen(self.before[0], indices), self.before[1]),
        )

    def _reserve(self, end: int) -> None:
        ratio, capacity = self.shape.ratio, self.storage.shape[1]
        if torch.compiler.is_compiling():  # all compressors of a model in one step, as such a step has a graph of its own
            if end <= capacity * ratio:
                return
            wanted = -(-end // _TRACED_ROOM) * _TRACED_ROOM // ratio + (_TRACED_ROOM % ratio > 0)
        else:  # a prompt has no more than it needs, and each entry is copied 64 times at most
            if capacity and end < (capacity + 1) * ratio:
                return
            least = _ROOM // ratio if self.state[1].shape[1] == 0 else _ROOM_OF_A_PLAN
            wanted = max(end // ratio, capacity + max(1, least, capacity // 64) if capacity else 1)
        old, self.storage = self.storage, self.storage.new_empty(self.storage.shape[0], wanted, self.shape.head_dim)
        if capacity:
            self.storage[:, :capacity] = old


def _chosen(state: tuple[torch.Tensor, torch.Tensor], indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, tags = state
    return rows.index_select(0, indices), tags.index_select(0, indices)


def check_dtypes(rows: torch.dtype, entries: torch.dtype) -> None:
    """Refuses dtypes of projections and of entries that kvfold does not take."""
    if rows not in FORMATS:
        raise UnsupportedError(f"projections of dtype {rows}: kvfold takes torch.float32 or torch.bfloat16")
    if entries not in FORMATS:
        raise UnsupportedError(f"entries of dtype {entries}: kvfold keeps torch.float32 or torch.bfloat16 entries")


def check_seen(start: int, seen: int) -> None:
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
        older: sliding keys right before those that the layer holds, as far as a rewind needs them. A view of the tensor of
            which the layer's keys are one too, so it costs no memory.
    """

    def __init__(self, max_new_tokens: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.folds: dict[str, CompressorFold] = {}
        self.length = self.step_start = 0
        self.older: torch.Tensor | None = None

    def begin(self, batch: int, start: int, new: int) -> None:
        """A step of `new` tokens begins at `start`. Where it raises, nothing is changed."""
        for fold in self.folds.values():
            if fold.storage.shape[0] != batch:
                raise UnsupportedError(f"a batch of {batch} on a cache of {fold.storage.shape[0]} sequences")
        check_seen(start, self.length)
        if start < self.length:
            self._check_rewind(start)
            self._rewind(start)
        self.step_start, self.length = start, start + new

    def keep_keys(self, full: torch.Tensor, new: int, start: int, window: int) -> None:
        """`full`: the sliding keys of a step from `start` on, those before it first, of which the last `window - 1` stay."""
        most = self.max_new_tokens
        if most == 1:
            return
        self.older = full[:, :, : 1 - window]
        if start == 0 and new > most:
            self.older = self.older[:, :, max(self.older.shape[2] - most, 0) :]

    def rewind(self, length: int, keys: torch.Tensor, window: int) -> torch.Tensor:
        """Back to `length` tokens. Returns the sliding keys `[batch, 1, <= window - 1, head_dim]` as they were then."""
        keys = self.keys_at(length, keys, window)
        self._rewind(length)
        return keys

    def keys_at(self, length: int, keys: torch.Tensor | None, window: int) -> torch.Tensor:
        """The keys that `rewind` would return; it raises what that would and changes nothing. keys: those of the layer."""
        self._check_rewind(length)
        first = max(length - window + 1, 0)
        if keys is None:
            raise UnsupportedError("a rewind of sliding keys before the layer has made a step")
        if length == 0:
            return keys[:, :, :0]
        held = self.length - keys.shape[2]
        if held > first:
            lacking = held - first
            if self.older is None or self.older.shape[2] < lacking:
                raise UnsupportedError(
                    f"a rewind from {self.length} to {length} tokens, of which the sliding keys are gone: kept are those that"
                    f" max_new_tokens={self.max_new_tokens}, an argument of patch(), asks for"
                )
            keys, held = torch.cat([self.older[:, :, -lacking:], keys], 2), first
        return keys[:, :, first - held : length - held]

    def select(self, indices: torch.Tensor) -> None:
        """Reorders, repeats or drops batch rows (beam search)."""
        # What is kept must outlive an inference_mode block, in which tensors are made that nobody may write to later.
        with torch.inference_mode(False), torch.no_grad():
            for fold in self.folds.values():
                fold.select(indices)
        if self.older is not None:
            self.older = self.older.index_select(0, indices.to(self.older.device))

    def _rewind(self, length: int) -> None:
        for fold in self.folds.values():
            fold.rewind(length, self.step_start)
        self.length = self.step_start = length
        self.older = None

    def _check_rewind(self, length: int) -> None:
        written = max((fold.written for fold in self.folds.values()), default=self.length)
        whole_step = length == self.step_start and self.max_new_tokens > 1
        if length == 0 or whole_step or (length > 0 and written - length <= self.max_new_tokens):
            return
        raise UnsupportedError(
            f"a rewind from {self.length} to {length} tokens: kvfold can go back by up to max_new_tokens="
            f"{self.max_new_tokens}, an argument of patch(), and, if that is more than 1, to the start of the last step, here"
            f" {self.step_start}"
        )
