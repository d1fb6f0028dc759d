"""kvfold inside Hugging Face transformers: `patch(model)` lets the compressors of a DeepSeek-V4 model pool with kvfold.

Only the pooling is replaced. A patched compressor runs transformers' own forward, but hands it a stand-in for the cache
layer. There transformers gives away the projected rows and asks for the entries so far; the stand-in folds the rows with
kvfold and answers with a view of preallocated storage. Projections, block bias and the indexer's top-k stay
transformers' own, whatever its version.

How close the result is. In fp32 both compute the same mean up to summation order. In bf16 (unit roundoff u = 2^-8)
transformers rounds the softmax weights, their products with the values, and the sum, each by at most u relative, so a pooled
channel is off by at most `3u * sum_j w_j |k_j|`, plus second order. With `kappa = ||sum_j w_j |k_j||| / ||sum_j w_j k_j||`
(both norms over the channels of a row; 1 without cancellation) that is `3 kappa u` of the row's norm. RMSNorm scales a row and
keeps relative error, to first order. Behind it transformers rounds the normed row, the cosines and the sines, and the rotated
row, kvfold only the last: 4u. Together, for a norm weight of one (otherwise times its largest over its root mean square):

    ||entry_kvfold - entry_transformers|| <= (3 kappa + 4) u ||entry||

If `position_bias` is bf16 too, which from_pretrained avoids, transformers also rounds the scores `s`, which changes weights by
up to a factor `exp(2u max|s|)`.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...contract import UnsupportedError
from . import gradients, weights
from .cache import CacheFold, CompressorFold, LayerFold
from .layers import Snapshot, cache_fold, check_layer, layer_fold, rewind_layer, v4

_MARK = "_kvfold"
# Where the compressors' and the model's forward take the cache; versions of transformers name it differently.
_CACHE = (3, "cache", "past_key_values")


def patch(model: nn.Module, *, backend: str | None = None, max_new_tokens: int = 8) -> None:
    """Makes every DeepSeek-V4 compressor and indexer inside `model` pool with kvfold, until `unpatch(model)`.

    Works with `model(...)` and `model.generate(...)`, greedy, sampling and beam search, with and without a cache. Threads may
    use one patched model at once, each with caches of its own. Patched models and their caches can be copied, pickled and
    saved. Weights are read at every call, so the model may be cast, moved, loaded, edited and offloaded as before; a
    changed `position_bias` holds for windows that begin later. A call that fails leaves the cache that it was given as it was.

    Limits, each refused with an `UnsupportedError`:

    - Padding. transformers does not support it here either: it pools it. Positions that betray padding are refused; padding
      hidden in `attention_mask` alone is pooled just as transformers would.
    - fp16 projections. bf16 and fp32 are supported.
    - Gradients. In train mode entries have them (`kvfold.training`), of whole sequences: a step from a filled cache whose
      compressors or inputs require any is refused. In eval mode compressors run detached: nothing behind their entries gets a
      gradient, and asking for the gradient of an input (`inputs_embeds`) is refused. With `torch.no_grad()` and in inference
      mode neither matters.
    - Static and quantized caches, rotary embeddings that change with the sequence length, and weights on the meta device that
      no hook loads when their module runs.

    Args:
        model: anything with `DeepseekV4HCACompressor` or `DeepseekV4CSACompressor` modules in it. It gets forward hooks;
            no method, class or tensor of it is changed.
        backend: as for `kvfold.compress`; None is Triton on a GPU and torch on a CPU.
        max_new_tokens: a step of up to this many tokens can be taken back to any position in it with `rewind`.

    Raises:
        ValueError: `model` has no such module, is patched already, or has a geometry that `CompressorSpec` refuses.
        UnsupportedError: a rotary embedding that changes with the sequence length.
    """
    modules = [m for m in model.modules() if isinstance(m, v4.DeepseekV4HCACompressor | v4.DeepseekV4CSACompressor)]
    if not modules:
        raise ValueError("model must contain DeepseekV4HCACompressor or DeepseekV4CSACompressor modules, found none")
    if any(_MARK in m.__dict__ for m in modules):
        raise ValueError("model is patched already; call unpatch(model) first")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be an int of at least 1, got {max_new_tokens!r}")
    for module in modules:  # all checks before the first change
        for part in weights.parts(module).values():
            weights.spec_of(part)
    hook = _CompressorHook(backend, max_new_tokens)
    for module in modules:
        # Handles stay with their hooks: unpickled, they keep later hooks of the process from taking their number.
        module.__dict__[_MARK] = (module.register_forward_pre_hook(hook, with_kwargs=True),)
    for module in model.modules():
        if isinstance(module, v4.DeepseekV4Model) and _MARK not in module.__dict__:
            before = module.register_forward_pre_hook(_before_step, with_kwargs=True)
            after = module.register_forward_hook(_after_step, with_kwargs=True, always_call=True)
            module.__dict__[_MARK] = before, after


def unpatch(model: nn.Module) -> None:
    """Removes from `model` what `patch` added, and nothing else. Caches that kvfold filled refuse further use.

    Raises:
        ValueError: `model` is not patched.
    """
    modules = [m for m in model.modules() if _MARK in m.__dict__]
    if not modules:
        raise ValueError("model is not patched")
    for module in modules:
        for handle in module.__dict__.pop(_MARK):
            handle.remove()


def entries(past_key_values: Any, layer_idx: int, name: str = "compressor") -> torch.Tensor:
    """The entries of a layer that a patched model has made so far.

    Args:
        past_key_values: the cache that the model was called with; layer_idx: which layer.
        name: `"compressor"`, or `"indexer"` in a CSA layer.

    Returns:
        `[batch, count, head_dim]`, a view of the storage. Nothing is mutated.

    Raises:
        ValueError: kvfold keeps nothing of that name for that layer.
    """
    fold = getattr(past_key_values.layers[layer_idx], "kvfold", None)
    if fold is None or name not in fold.folds:
        raise ValueError(f"layer {layer_idx} of this cache holds no kvfold entries named {name!r}")
    return fold.folds[name].entries()


def rewind(past_key_values: Any, length: int) -> None:
    """Takes the end of the last step back, as when drafts are rejected: the cache then holds `length` tokens.

    Reaches back to where the last step began, or to any position inside it if it had at most `patch(max_new_tokens=)` tokens
    and fewer than the sliding window. Entries and compressor state need no change for that; the sliding
    keys are put together from those before and after the step. Mutates `past_key_values`.

    Args:
        past_key_values: a cache filled by a patched model.
        length: tokens to keep; at most as many as it holds.

    Raises:
        ValueError: `length` is not an int from 0 to what the cache holds.
        UnsupportedError: further back than that, or a layer without a compressor whose keys transformers has dropped
            (call `activate_past_recording()` on such layers before the step).
    """
    held = past_key_values.get_seq_length()
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= held:
        raise ValueError(f"length must be an int from 0 to {held}, got {length!r}")
    folds = [getattr(layer, "kvfold", None) for layer in past_key_values.layers]
    for index, (layer, fold) in enumerate(zip(past_key_values.layers, folds, strict=True)):
        kept = fold is not None or layer.get_seq_length() < getattr(layer, "sliding_window", length + 1)
        if not kept and not getattr(layer, "record_past", False):
            raise UnsupportedError(f"a rewind of layer {index}, which has no compressor and does not record its past")
        if fold is not None:
            fold.keys_at(length, layer.sliding_window)  # all checks before the first change
    for layer, fold in zip(past_key_values.layers, folds, strict=True):
        if fold is None:
            layer.crop(length - layer.get_seq_length())
        else:
            rewind_layer(layer, length)


class _Step:
    """What the layers of a model's step share beside the cache. before: the cache as it was."""

    def __init__(self, before: Snapshot | None = None) -> None:
        self.before = before
        self.fold = CacheFold()  # for that of a cache, where there is none
        self.checked: weakref.ref | None = None  # the positions that the layers were found to be given
        self.asked = False  # whether a layer's input was asked if it wants a gradient


_thread = threading.local()  # `step`: what a model makes in this thread, None between two


@torch.compiler.disable
def _before_step(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a model's forward: what can be refused is refused now, and the cache is remembered as it is."""
    embeds = _argument(args, kwargs, 4, "inputs_embeds")
    if not module.training and torch.is_grad_enabled() and isinstance(embeds, torch.Tensor) and embeds.requires_grad:
        raise UnsupportedError(
            "gradients through the compressor to inputs_embeds in eval mode: use model.train(), torch.no_grad() or unpatch"
        )
    cache = _argument(args, kwargs, *_CACHE)
    if cache is not None:
        for layer, decoder in zip(cache.layers, module.layers, strict=False):
            if getattr(decoder.self_attn, "compressor", None) is not None:
                check_layer(layer)
    _thread.step = _Step(None if cache is None else Snapshot(cache))


@torch.compiler.disable
def _after_step(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """After a model's forward, or after it failed: then there is no output."""
    step, _thread.step = getattr(_thread, "step", None), None
    if output is None and step is not None and step.before is not None:
        step.before.restore()


def _argument(args: tuple, kwargs: dict[str, Any], place: int, *names: str) -> Any:
    """An argument of a forward by its place or by the first of its names that was given; None if none was."""
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), None)


class _CompressorHook:
    """Before a compressor's forward: gives it a stand-in for the cache. One for all compressors of a patched model."""

    def __init__(self, backend: str | None, max_new_tokens: int) -> None:
        self.backend = backend
        self.max_new_tokens = max_new_tokens
        self.tables = weights.RopeTables()

    def __reduce__(self) -> tuple:
        return _CompressorHook, (self.backend, self.max_new_tokens)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        hidden_states, position_ids = _argument(args, kwargs, 0, "hidden_states"), _argument(args, kwargs, 2, "position_ids")
        cache, layer_idx = _argument(args, kwargs, *_CACHE), _argument(args, kwargs, 4, "layer_idx")
        if not isinstance(hidden_states, torch.Tensor) or not isinstance(position_ids, torch.Tensor) or layer_idx is None:
            return None  # the forward says better what is missing
        if hidden_states.device.type == "meta":
            raise weights.not_loaded(module, "the input")
        batch, new = hidden_states.shape[:2]
        step = getattr(_thread, "step", None) or _Step()  # a compressor may be called by itself
        if cache is None:
            fold, shared, start, keys = LayerFold(1), step.fold, 0, None
        else:
            layer = cache.layers[layer_idx]
            fold, shared = layer_fold(layer, self.max_new_tokens), cache_fold(cache)
            # transformers counts the step's tokens before it calls the compressor
            start = layer.cumulative_length - new if layer.is_initialized else fold.length
            keys = layer.keys
        weights.check_gradients(module, hidden_states, not step.asked, start)
        if new > 1 or start == 0:
            _check_positions(position_ids, start, new, step)
        fold.begin(batch, start, new, keys)
        step.asked = True
        stand_in = _StandIn(cache, layer_idx, _PoolingLayer(module, self, fold, shared, start, new, cache is not None))
        place, *names = _CACHE
        if len(args) > place:
            return (*args[:place], stand_in, *args[place + 1 :]), kwargs
        return args, kwargs | {next(name for name in names if name in kwargs): stand_in}


def _check_positions(position_ids: torch.Tensor, start: int, new: int, step: _Step) -> None:
    """Refuses positions that do not continue the sequence: padding, packed sequences. Looks at every prefill."""
    if step.checked is not None and step.checked() is position_ids:
        return  # the layers of a step share one tensor
    expected = torch.arange(start, start + new, device=position_ids.device)
    if position_ids.shape[-1] != new or not bool((position_ids == expected).all()):
        raise UnsupportedError(
            f"position_ids other than {start}..{start + new - 1} in every row: DeepSeek-V4's compressor in transformers"
            " knows neither padding nor packed sequences; batch sequences of equal length"
        )
    step.checked = weakref.ref(position_ids)


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
    hook: _CompressorHook
    fold: LayerFold
    shared: CacheFold
    start: int
    new: int
    cached: bool
    trained: dict[str, torch.Tensor] = field(default_factory=dict)  # entries that have gradients

    @torch.compiler.disable
    def store_compression_weights(self, name: str, kv: torch.Tensor, gate: torch.Tensor):
        part, device = weights.parts(self.module)[name], kv.device
        if gradients.wanted(part, kv, gate):
            if self.start:
                weights.refuse_gradients(part, {"kv_proj": kv, "gate_proj": gate, "position_bias": part.position_bias})
            with torch.no_grad():
                rope = self.hook.tables.get(part, self.new, device, look=True)
            self.trained[name] = gradients.entries(part, kv, gate, rope, self.hook.backend)
            if not self.cached:
                return kv[:, :0], gate[:, :0], 0
        # What is kept must outlive an inference_mode block, in which tensors are made that nobody may write to later.
        with torch.inference_mode(False), torch.no_grad():
            ape, weight, spec = weights.position_bias(part), weights.norm_weight(part, device), weights.spec_of(part)
            fold = self.fold.folds.get(name)
            if fold is None:
                fold = CompressorFold(spec, kv.shape[0], self.fold.max_new_tokens, kv)
            if fold.made_of != (kv.dtype, weight.dtype) or fold.spec != spec:
                fold.adapt(spec, kv.dtype, weights.entry_dtype(part, kv.dtype, device))
                fold.made_of = kv.dtype, weight.dtype
            self.fold.folds[name] = fold
            # A CPU tells at once; elsewhere ask where waiting costs little (prefill) or an error is possible (rewind).
            look = self.new > 1 or self.fold.rewound
            rope = self.hook.tables.get(part, self.start + self.new, device, look)
            rows, check = torch.cat([kv, gate], dim=-1).flatten(0, 1), look or device.type == "cpu"
            options = {"ape": ape, "norm_weight": weight, "rope": rope, "backend": self.hook.backend}
            fold.advance(rows, self.start, self.new, self.shared, check, **options)
        return kv[:, :0], gate[:, :0], 0

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        if name in self.trained and not self.cached:
            return self.trained[name]
        if all(fold.length == self.fold.length for fold in self.fold.folds.values()):
            self.fold.rewound = False
        return self.trained.get(name, self.fold.folds[name].entries())
