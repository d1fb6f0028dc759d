"""DeepSeek-V4's compressors with kvfold's pooling: the classes that a patched model has, and how their calls are taken over.

A patched compressor runs transformers' own forward, but hands it a stand-in for the cache layer. There transformers gives away
the projected rows and asks for the entries so far; the stand-in folds the rows with kvfold and answers with a view of storage.
Projections and block bias stay transformers' own, whatever its version, and so does the indexer's top-k where it has a choice.
A hook does this and not the class, as tools like accelerate replace the forward of a module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...contract import UnsupportedError
from . import gradients, weights
from .cache import CompressorFold, LayerFold
from .layers import layer_fold, v4
from .planned import kept_on

MARK = "_kvfold"
# Where the compressors' and the model's forward take the cache; versions of transformers name it differently.
CACHE = (3, "cache", "past_key_values")


def argument(args: tuple, kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """An argument of a forward by its place or by the first of its names that was given; None if none was."""
    if len(args) > place:
        return args[place]
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return None


class CompressorHook:
    """Before a compressor's forward: gives it a stand-in for the cache. One for all compressors of a patched model."""

    def __init__(self, backend: str | None, max_new_tokens: int) -> None:
        self.backend = backend
        self.max_new_tokens = max_new_tokens

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        hidden_states = argument(args, kwargs, 0, "hidden_states")
        cache, layer_idx = argument(args, kwargs, *CACHE), argument(args, kwargs, 4, "layer_idx")
        if not isinstance(hidden_states, torch.Tensor) or layer_idx is None:
            return None  # the forward says better what is missing
        if hidden_states.device.type == "meta":
            raise weights.not_loaded(module, "the input")
        batch, new = hidden_states.shape[:2]
        if cache is None:
            fold, start = LayerFold(1), 0
        else:
            layer = cache.layers[layer_idx]
            fold = layer_fold(layer, self.max_new_tokens)
            # transformers counts the step's tokens before it calls the compressor
            start = layer.cumulative_length - new if layer.is_initialized else fold.length
        if start and module.training:
            weights.refuse_gradients(module, dict(module.named_parameters()) | {"hidden_states": hidden_states})
        fold.begin(batch, start, new)
        stand_in = _StandIn(cache, layer_idx, _PoolingLayer(module, self, fold, start, new, cache is not None))
        place, *names = CACHE
        if len(args) > place:
            return (*args[:place], stand_in, *args[place + 1 :]), kwargs
        changed = dict(kwargs)
        for name in names:
            if name in changed:
                changed[name] = stand_in
        return args, changed


class _StandIn:
    """What transformers' compressor sees as its cache: `layers[layer_idx]` is kvfold's, all else the cache's own."""

    def __init__(self, cache: Any, layer_idx: Any, layer: _PoolingLayer) -> None:
        self._cache = cache
        self.layers = {layer_idx: layer}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_cache"], name)


@dataclass(eq=False)
class _PoolingLayer:
    """What it sees as its cache layer: takes the rows, leaves transformers none to pool, and answers with entries."""

    module: nn.Module
    hook: CompressorHook
    fold: LayerFold
    start: int
    new: int
    cached: bool
    trained: dict[str, torch.Tensor] = field(default_factory=dict)  # entries that have gradients

    def store_compression_weights(self, name: str, kv: torch.Tensor, gate: torch.Tensor):
        part = self.module if name == "compressor" else self.module.indexer
        if gradients.wanted(part, kv, gate):
            if not self.start:
                with torch.no_grad():
                    rope = weights.rope_rows(part, 0, self.new, kv.device)
                self.trained[name] = gradients.entries(part, kv, gate, rope, self.hook.backend)
                if not self.cached:
                    return kv[:, :0], gate[:, :0], 0
            elif self.module.training:
                weights.refuse_gradients(part, {"kv_proj": kv, "gate_proj": gate, "position_bias": part.position_bias})
        if torch.compiler.is_compiling():
            with torch.no_grad():
                self._advance(name, part, kv, gate)
        elif torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            # What is kept must outlive an inference_mode block, in which tensors are made that nobody may write to later.
            with torch.inference_mode(False), torch.no_grad():
                self._advance(name, part, kv, gate)
        else:
            self._advance(name, part, kv, gate)
        return kv[:, :0], gate[:, :0], 0

    def _advance(self, name: str, part: Any, kv: torch.Tensor, gate: torch.Tensor) -> None:
        bias, weight, shape = weights.position_bias(part), weights.norm_weight(part, kv.device), weights.shape_of(part)
        start, end = self.start, self.start + self.new
        ends = torch.compiler.is_compiling() or start // shape.ratio < end // shape.ratio
        rope = weights.rope_rows(part, start, end, kv.device) if ends else None
        fold = self.fold.folds.get(name)
        if fold is None:
            entries = weights.entry_dtype(part, kv.dtype, kv.device)
            fold = CompressorFold(shape, kv, entries, self.fold.max_new_tokens, self.hook.backend)
        elif fold.made_of != (kv.dtype, weight.dtype) or fold.shape != shape:
            fold.adapt(shape, kv.dtype, weights.entry_dtype(part, kv.dtype, kv.device))
        fold.made_of = kv.dtype, weight.dtype
        fold.advance(kv, gate, self.start, (bias, weight, rope), part.kv_norm.variance_epsilon)
        self.fold.folds[name] = fold

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        if name in self.trained:
            return self.trained[name]
        return self.fold.folds[name].entries()


class _Kvfold:
    """What both compressors add to transformers' own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        switch_on(self, CompressorHook(**REGISTERED))

    def extra_repr(self) -> str:
        return "pooled by kvfold"


def _picks_all(indexer: Any, args: tuple, kwargs: dict[str, Any]) -> _PoolingLayer | None:
    """The layer, if there are no more entries than its indexer may pick: it picks all, and they need no scores."""
    cache, layer_idx = argument(args, kwargs, *CACHE), argument(args, kwargs, 4, "layer_idx")
    if not isinstance(cache, _StandIn):
        return None
    layer = cache.layers[layer_idx]
    return layer if (layer.start + layer.new) // indexer.compress_rate <= indexer.index_topk else None


class KvfoldIndexer(v4.DeepseekV4Indexer):
    """An indexer of a patched model."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer = _picks_all(self, args, kwargs)
        if layer is None:  # not by super(): who wrapped this method calls it behind unpatch() too
            return v4.DeepseekV4Indexer.forward(self, *args, **kwargs)
        hidden_states, position_ids = argument(args, kwargs, 0, "hidden_states"), argument(args, kwargs, 2, "position_ids")
        layer.store_compression_weights("indexer", self.kv_proj(hidden_states), self.gate_proj(hidden_states))
        count, ratio = (layer.start + layer.new) // self.compress_rate, self.compress_rate
        if torch.compiler.is_compiling():
            entry = torch.arange(count, device=hidden_states.device)
            ready = entry < ((position_ids + 1) // ratio)[..., None]
        else:
            entry, last = kept_on(hidden_states.device).windows(count, ratio)
            ready = position_ids[..., None] >= last
        return torch.where(ready, entry, -1).expand(hidden_states.shape[0], -1, -1)


class KvfoldHCACompressor(_Kvfold, v4.DeepseekV4HCACompressor):
    """An HCA compressor of a patched model."""


class KvfoldCSACompressor(_Kvfold, v4.DeepseekV4CSACompressor):
    """A CSA compressor of a patched model."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        layer = _picks_all(self.indexer, args, kwargs)
        if layer is None:
            return v4.DeepseekV4CSACompressor.forward(self, *args, **kwargs)
        hidden_states = argument(args, kwargs, 0, "hidden_states")
        rows = self.kv_proj(hidden_states), self.gate_proj(hidden_states)
        entries = layer.update_compressor_states("compressor", layer.store_compression_weights("compressor", *rows)[0])
        picked = self.indexer(*args, **kwargs)  # each entry in its own place, or -1
        return entries[:, None], torch.where(picked < 0, -torch.inf, 0.0).to(entries.dtype)[:, None]


CLASSES = {v4.DeepseekV4HCACompressor: KvfoldHCACompressor, v4.DeepseekV4CSACompressor: KvfoldCSACompressor}
OWN = {ours: theirs for theirs, ours in CLASSES.items()}
_WITH_INDEXERS = CLASSES | {v4.DeepseekV4Indexer: KvfoldIndexer}
REGISTERED: dict[str, Any] = {"backend": None, "max_new_tokens": 1}  # how `register` wants compressors to be made


def switch_on(module: nn.Module, hook: CompressorHook) -> None:
    """Makes a compressor pool with kvfold."""
    for one in weights.parts(module).values():
        one.__class__ = _WITH_INDEXERS.get(type(one), type(one))
    # Handles stay with their hooks: unpickled, they keep later hooks of the process from taking their number.
    module.__dict__[MARK] = (module.register_forward_pre_hook(hook, with_kwargs=True),)


def switch_off(module: nn.Module) -> None:
    """Undoes `switch_on`."""
    for handle in module.__dict__.pop(MARK):
        handle.remove()
    for one in weights.parts(module).values():
        one.__class__ = next((theirs for theirs, ours in _WITH_INDEXERS.items() if ours is type(one)), type(one))


def check_options(backend: str | None, max_new_tokens: int) -> None:
    """Refuses invalid options of `patch` and `register`."""
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend must be None, 'torch' or 'triton', got {backend!r}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}")


def refuse_gradient_of(embeds: Any, module: nn.Module, cache: Any) -> None:
    """Refuses the gradient of a model's input where entries that are kept already would need it."""
    filled = cache is not None and cache.get_seq_length()
    if filled and not module.training and torch.is_grad_enabled() and isinstance(embeds, torch.Tensor) and embeds.requires_grad:
        raise UnsupportedError(
            "gradients of inputs_embeds in a step from a filled cache: use whole sequences, torch.no_grad() or unpatch(model)"
        )
