"""A cache layer of transformers that kvfold pools for, and a cache as it was before a step that failed."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...contract import UnsupportedError
from .cache import CacheFold, LayerFold

try:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
except ImportError as error:
    raise ImportError(
        "kvfold.integrations.transformers needs transformers 5.17 or newer: pip install 'kvfold[demo]'"
    ) from error


@functools.cache
def folded(layer_class: type) -> type:
    """The subclass of a cache layer's class for layers that kvfold pools for; they keep a `LayerFold` as `kvfold`.

    Made for any class, as a layer can only change to a class whose one base is its own.
    """

    class FoldedLayer(layer_class):
        _layer_type = None  # transformers makes the layers of new caches of the class that last claimed their type

        def store_compression_weights(self, *args: Any, **kwargs: Any) -> None:
            raise UnsupportedError("a cache filled by a kvfold-patched model in an unpatched one: start with a new cache")

        def reset(self) -> None:
            # The layer becomes what it was before kvfold, fit for a patched and for an unpatched model.
            self.__class__ = layer_class
            del self.kvfold
            self.reset()

        def crop(self, tokens_to_remove: int) -> None:
            """Like `rewind` of this layer; refuses what transformers refuses, and what is too far back for kvfold."""
            beyond = self.get_seq_length() >= self.sliding_window and not self.record_past
            if tokens_to_remove >= 0 or beyond or not self.is_initialized:
                super().crop(tokens_to_remove)
            else:
                rewind_layer(self, max(self.get_seq_length() + tokens_to_remove, 0))

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.kvfold.select(beam_idx, self.keys)

        def batch_repeat_interleave(self, repeats: int) -> None:
            chosen = self.kvfold.batch_rows().repeat_interleave(repeats)
            super().batch_repeat_interleave(repeats)
            self.kvfold.select(chosen, self.keys)

        def batch_select_indices(self, indices: torch.Tensor) -> None:
            rows = self.kvfold.batch_rows()
            chosen = rows[indices.to(rows.device) if isinstance(indices, torch.Tensor) else indices]
            super().batch_select_indices(indices)
            self.kvfold.select(chosen, self.keys)

        def __reduce__(self) -> tuple:
            """Copies and pickles name the layer's own class: this one has no module to be found in."""
            return _new, (layer_class,), self.__dict__

    FoldedLayer._layer_type = layer_class._layer_type
    FoldedLayer.__name__ = FoldedLayer.__qualname__ = f"Kvfold{layer_class.__name__}"
    return FoldedLayer


def _new(layer_class: type) -> Any:
    made = folded(layer_class)
    return made.__new__(made)


def rewind_layer(layer: Any, length: int) -> None:
    """A layer that kvfold pools for back to `length` tokens."""
    layer.keys = layer.values = layer.kvfold.rewind(length, layer.sliding_window)
    layer.cumulative_length = length


def check_layer(layer: Any) -> None:
    """Refuses cache layers that are not DeepSeek-V4's own."""
    if not isinstance(layer, v4.DeepseekV4HCACache):
        raise UnsupportedError(
            f"a cache layer of type {type(layer).__name__}: DeepSeek-V4 needs its own dynamic cache layers, as made by"
            " DynamicCache(config=model.config); static and quantized caches are not supported"
        )


def layer_fold(layer: Any, max_new_tokens: int) -> LayerFold:
    """The `LayerFold` of a cache layer, attached to it at its first use."""
    if not hasattr(layer, "kvfold"):
        check_layer(layer)
        layer.kvfold = LayerFold(max_new_tokens)
        layer.__class__ = folded(type(layer))
    return layer.kvfold


def cache_fold(cache: Any) -> CacheFold:
    """What kvfold keeps for a cache as a whole, attached to it at its first use."""
    if not hasattr(cache, "kvfold"):
        cache.kvfold = CacheFold()
    return cache.kvfold


class Snapshot:
    """A cache as it is before a step. Holds references: a step replaces tensors, or writes behind the part that counts."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._layers = [(layer, type(layer), _copied(layer)) for layer in cache.layers]
        folds = [layer.kvfold for layer in cache.layers if hasattr(layer, "kvfold")]
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
                    fold.step_start, fold.keys_before, fold.rewound = fold.length, None, True


def _copied(thing: Any) -> dict[str, Any]:
    """Its attributes, with copies of those that are dicts."""
    return {name: dict(x) if isinstance(x, dict) else x for name, x in thing.__dict__.items()}
