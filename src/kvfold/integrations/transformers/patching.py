"""kvfold inside Hugging Face transformers: `patch(model)` and `register()` let DeepSeek-V4's compressors pool with kvfold.

How close the result is. In fp32 both compute the same mean up to summation order. In bf16 (unit roundoff u = 2^-8) transformers
rounds the softmax weights, their products with the values, and the sum, each by at most u relative, so a pooled channel is off
by at most `3u * sum_j w_j |k_j|`, plus second order. With `kappa = ||sum_j w_j |k_j||| / ||sum_j w_j k_j||` (both norms over
the channels of a row; 1 without cancellation) that is `3 kappa u` of the row's norm. RMSNorm scales a row and keeps relative
error, to first order. After it transformers rounds the normed row, the cosines and the sines, and the rotated row, kvfold only
the last: 4u. Together, for a norm weight of one (otherwise times its largest over its root mean square):

    ||entry_kvfold - entry_transformers|| <= (3 kappa + 4) u ||entry||

If `position_bias` is bf16 too, which from_pretrained avoids, transformers also rounds the scores `s`, which changes weights by
up to a factor `exp(2u max|s|)`.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from ...contract import UnsupportedError
from ..switch import ON
from . import weights
from .compressors import (
    CACHE,
    CLASSES,
    MARK,
    OWN,
    REGISTERED,
    CompressorHook,
    argument,
    check_options,
    refuse_gradient_of,
    switch_off,
    switch_on,
)
from .layers import Snapshot, check_layer, rewind_layer, v4

_NAME = "transformers"


def patch(model: nn.Module, *, backend: str | None = None, max_new_tokens: int = 1) -> None:
    """Makes every DeepSeek-V4 compressor and indexer inside `model` pool with kvfold, until `unpatch(model)`.

    Works with `model(...)` and `model.generate(...)`, greedy, sampling and beam search, with and without a cache, and under
    `torch.compile(fullgraph=True)`. Threads may use one patched model at once, each with caches of its own. Patched models and
    their caches can be copied, pickled and saved. Weights are read at every call, so the model may be cast, moved, loaded,
    edited and offloaded as before; a changed `position_bias` holds for windows that begin later. A call that fails leaves its
    cache as it was, unless the call is compiled.

    Padding is pooled like any token, as in transformers.

    Whole sequences have gradients (`kvfold.training`), in train and in eval mode. A step from a filled cache has none through
    its compressors: in train mode it is refused where a gradient would be lost, in eval mode it runs detached.

    Limits, each refused with an `UnsupportedError`: fp16 projections (bf16 and fp32 are supported); static and quantized
    caches; rotary embeddings that change with the sequence length; weights on the meta device that no hook loads when their
    module runs.

    Args:
        model: anything with `DeepseekV4HCACompressor` or `DeepseekV4CSACompressor` modules in it. These and their indexers get
            a subclass as their class, whose name and "pooled by kvfold" show when the model is printed, and a forward hook.
        backend: as for `kvfold.compress`; None is Triton on a GPU and torch on a CPU.
        max_new_tokens: a step of up to this many tokens can be taken back to any position in it with `rewind`. With 1, the
            default, nothing can be taken back, and caches are smallest.

    Raises:
        ValueError: `model` has no such module, is patched already, or has a geometry that `CompressorSpec` refuses; an argument
            is none of those above.
        UnsupportedError: a rotary embedding that changes with the sequence length.
    """
    modules = [m for m in model.modules() if isinstance(m, v4.DeepseekV4HCACompressor | v4.DeepseekV4CSACompressor)]
    if not modules:
        raise ValueError("model must contain DeepseekV4HCACompressor or DeepseekV4CSACompressor modules, found none")
    if any(MARK in m.__dict__ for m in modules):
        raise ValueError("model is patched already; call unpatch(model) first")
    check_options(backend, max_new_tokens)
    for module in modules:  # all checks before the first change
        for part in weights.parts(module).values():
            weights.spec_of(part)
    hook = CompressorHook(backend, max_new_tokens)
    for module in modules:
        switch_on(module, hook)
    for module in model.modules():
        if isinstance(module, v4.DeepseekV4Model) and MARK not in module.__dict__:
            before = module.register_forward_pre_hook(_before_step, with_kwargs=True)
            after = module.register_forward_hook(_after_step, with_kwargs=True, always_call=True)
            module.__dict__[MARK] = before, after


def unpatch(model: nn.Module) -> None:
    """Removes from `model` what `patch` or `register` added, and nothing else. Caches that kvfold filled refuse further use.

    Raises:
        ValueError: `model` is not patched.
    """
    modules = [m for m in model.modules() if MARK in m.__dict__]
    if not modules:
        raise ValueError("model is not patched")
    for module in modules:
        if isinstance(module, v4.DeepseekV4Model):
            for handle in module.__dict__.pop(MARK):
                handle.remove()
        else:
            switch_off(module)


def register(*, backend: str | None = None, max_new_tokens: int = 1) -> None:
    """Makes DeepSeek-V4 models pool with kvfold that are created from now on, by `from_pretrained`, `from_config` or their
    class.

    They are as after `patch`, except that a call that fails may leave its cache changed, as transformers' own do. The classes
    are registered with `transformers.monkey_patching`, if this version has it, and in the table by which attention layers make
    their compressors. A second call changes the arguments, which are those of `patch`.

    Raises:
        ValueError: naming the argument; another class is registered for one of the compressors.
    """
    check_options(backend, max_new_tokens)
    mapping, names = _mapping(), {theirs.__name__: ours for theirs, ours in CLASSES.items()}
    if mapping is not None and mapping.get_patch_mapping().items().isdisjoint(names.items()):
        mapping.register_patch_mapping(names)
    # A dict of classes, which a mapping of names does not reach.
    v4.COMPRESSOR_CLASSES.update({kind: CLASSES.get(made, made) for kind, made in v4.COMPRESSOR_CLASSES.items()})
    REGISTERED.update(backend=backend, max_new_tokens=max_new_tokens)
    ON[_NAME] = "compressors and indexers of DeepSeek-V4 models that are made from now on"


def unregister() -> None:
    """Takes `register` back. Models that exist stay as they are; `unpatch(model)` changes them.

    Raises:
        ValueError: nothing is registered.
    """
    if ON.pop(_NAME, None) is None:
        raise ValueError("kvfold is not registered with transformers")
    mapping = _mapping()
    if mapping is not None:
        mapping.unregister_patch_mapping([theirs.__name__ for theirs in CLASSES])
    v4.COMPRESSOR_CLASSES.update({kind: OWN.get(made, made) for kind, made in v4.COMPRESSOR_CLASSES.items()})


def _mapping() -> Any:
    """transformers' module of patches, which older versions lack."""
    try:
        from transformers import monkey_patching
    except ImportError:
        return None
    return monkey_patching


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

    Reaches back by up to `patch(max_new_tokens=)` tokens and, if that is more than 1, to where the last step began. Entries
    need no change for that; sliding keys are put together from those before and after the step. Mutates `past_key_values`.

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
            fold.keys_at(length, layer.keys, layer.sliding_window)  # all checks before the first change
    for layer, fold in zip(past_key_values.layers, folds, strict=True):
        if fold is None:
            layer.crop(length - layer.get_seq_length())
        else:
            rewind_layer(layer, length)


_thread = threading.local()  # `before`: the cache of the model that runs in this thread, as it was


def _before_step(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a model's forward: what can be refused is refused now, and the cache is remembered as it is."""
    cache = argument(args, kwargs, *CACHE)
    refuse_gradient_of(argument(args, kwargs, 4, "inputs_embeds"), module, cache)
    if cache is not None:
        for layer, decoder in zip(cache.layers, module.layers, strict=False):
            if decoder.self_attn.compressor is not None:
                check_layer(layer)
    if not torch.compiler.is_compiling():
        if cache is not None:
            _check_lengths([layer.get_seq_length() for layer, _ in zip(cache.layers, module.layers, strict=False)])
        _thread.before = None if cache is None else Snapshot(cache)


def _check_lengths(lengths: list[int]) -> None:
    """Refuses layers of different lengths: a crop or a step goes layer by layer, and may have ended halfway, by Ctrl-C too."""
    if len({*lengths}) > 1:
        held = ", ".join(map(str, lengths))
        after = "as after a crop that failed or a call that was interrupted"
        raise UnsupportedError(f"a cache whose layers hold {held} tokens, {after}: start with a new cache")


def _after_step(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """After a model's forward, or after it failed: then there is no output."""
    if torch.compiler.is_compiling():
        return
    before, _thread.before = getattr(_thread, "before", None), None
    if output is None and before is not None:
        before.restore()
