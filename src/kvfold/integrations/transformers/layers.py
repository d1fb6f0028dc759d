"""The cache layers of transformers that kvfold can pool for, and a cache as it was before a step that failed.

Importing this makes transformers build the DeepSeek-V4 layers of new caches of these classes. Until a patched model steps on
one it does nothing else than transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch

from ...contract import UnsupportedError
from .cache import LayerFold

try:
    from transformers.cache_utils import CacheLayerMixin
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
except ImportError as error:
    raise ImportError(
        "kvfold.integrations.transformers needs transformers 5.17 or newer: pip install 'kvfold[demo]'"
    ) from error


class _Layer(CacheLayerMixin):  # or Python would not let a layer of transformers' class become one of these
    """What both classes of layers have beside transformers' own. kvfold: None until a patched model has made a step on it."""

    kvfold: LayerFold | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        full, values = super().update(key_states, value_states, *args, **kwargs)
        if self.kvfold is not None:
            new = key_states.shape[-2]
            self.kvfold.keep_keys(full, new, self.cumulative_length - new, self.sliding_window)
        return full, values

    def store_compression_weights(self, *args: Any, **kwargs: Any) -> Any:
        if self.kvfold is not None:
            raise UnsupportedError("a cache filled by a kvfold-patched model in an unpatched one: start with a new cache")
        return super().store_compression_weights(*args, **kwargs)

    def reset(self) -> None:
        self.kvfold = None  # fit for a patched and for an unpatched model
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Like `rewind` of this layer; refuses what transformers refuse, and what is too far back for kvfold."""
        beyond = self.get_seq_length() >= self.sliding_window and not self.record_past
        if self.kvfold is None or tokens_to_remove >= 0 or beyond or not self.is_initialized:
            super().crop(tokens_to_remove)
        else:
            rewind_layer(self, max(self.get_seq_length() + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        chosen = self._rows().repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._select(chosen)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        rows = self._rows()
        chosen = rows[indices.to(rows.device) if isinstance(indices, torch.Tensor) else indices]
        super().batch_select_indices(indices)
        self._select(chosen)

    def _rows(self) -> torch.Tensor:
        """int64 `[batch]`: 0, 1, ..; empty before the first step."""
        return torch.arange(0) if self.keys is None else torch.arange(self.keys.shape[0], device=self.keys.device)

    def _select(self, chosen: torch.Tensor) -> None:
        if self.kvfold is not None:
            self.kvfold.select(chosen)


class KvfoldHCACache(_Layer, v4.DeepseekV4HCACache):
    """Of a layer with an HCA compressor."""


class KvfoldCSACache(_Layer, v4.DeepseekV4CSACache):
    """Of a layer with a CSA compressor and its indexer."""


_KVFOLD = {v4.DeepseekV4HCACache: KvfoldHCACache, v4.DeepseekV4CSACache: KvfoldCSACache}


def rewind_layer(layer: Any, length: int) -> None:
    """A layer that kvfold pools for back to `length` tokens."""
    layer.keys = layer.values = layer.kvfold.rewind(length, layer.keys, layer.sliding_window)
    layer.cumulative_length = length


def _ours(layer: Any) -> type | None:
    """The class here for a layer of transformers' own class, or of that of another copy of kvfold; None for others."""
    for theirs, ours in _KVFOLD.items():
        if type(layer) is theirs or (isinstance(layer, theirs) and type(layer).__name__ == ours.__name__):
            return ours
    return None


def check_layer(layer: Any) -> None:
    """Refuses cache layers that are not DeepSeek-V4's own, or that another copy of kvfold has filled."""
    if isinstance(layer, _Layer):
        return
    if _ours(layer) is None:
        raise UnsupportedError(
            f"a cache layer of type {type(layer).__name__}: DeepSeek-V4 needs its own dynamic cache layers, as made by"
            " DynamicCache(config=model.config); static and quantized caches are not supported"
        )
    if getattr(layer, "kvfold", None) is not None:
        raise UnsupportedError("a cache filled by another copy of kvfold: start with a new cache")


def layer_fold(layer: Any, max_new_tokens: int) -> LayerFold:
    """The `LayerFold` of a cache layer, attached to it at its first use."""
    if not isinstance(layer, _Layer):
        check_layer(layer)
        layer.__class__ = _ours(layer)  # a cache from before kvfold was imported, or of classes of another copy
    if layer.kvfold is None:
        layer.kvfold = LayerFold(max_new_tokens)
    return layer.kvfold


class Snapshot:
    """A cache as it is before a step. Holds references: a step replaces tensors, or writes behind the part that counts."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._layers = [(layer, type(layer), _copied(layer)) for layer in cache.layers]
        folds = [fold for layer in cache.layers if (fold := getattr(layer, "kvfold", None)) is not None]
        self._folds = [(fold, _copied(fold), [(one, _copied(one)) for one in fold.folds.values()]) for fold in folds]

    def restore(self) -> None:
        self._cache.layers[:] = [layer for layer, _, _ in self._layers]
        for layer, kind, kept in self._layers:
            layer.__class__ = kind
            layer.__dict__.clear()
            layer.__dict__.update(kept)
        for fold, kept, parts in self._folds:
            fold.__dict__.update(kept)
            for one, before in parts:
                written = one.written
                one.__dict__.update(before)
                if written > one.written:  # of its state only what the failed step started from is sure to be there
                    one.written = written
                    fold.step_start, fold.older = fold.length, None


def _copied(thing: Any) -> dict[str, Any]:
    """Its attributes, with copies of those that are dicts."""
    return {name: dict(x) if isinstance(x, dict) else x for name, x in thing.__dict__.items()}
