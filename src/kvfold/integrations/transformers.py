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

import weakref
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..spec import CompressorSpec
from .transformers_cache import CompressorFold, LayerFold, Plans, UnsupportedError

try:
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
except ImportError as error:
    raise ImportError(
        "kvfold.integrations.transformers needs transformers 5.17 or newer: pip install 'kvfold[demo]'"
    ) from error

__all__ = ["UnsupportedError", "entries", "patch", "rewind", "rope_table", "unpatch"]

_MARK = "_kvfold"
_FIRST_POSITIONS = 4096
# Rotary embeddings of these kinds change with the length of the sequence; an entry, once written, cannot.
_VARYING_ROPE = ("dynamic", "longrope")
_LAYER_METHODS = ("reset", "reorder_cache", "batch_repeat_interleave", "batch_select_indices")


def patch(model: nn.Module, *, backend: str | None = None, max_new_tokens: int = 8) -> None:
    """Makes every DeepSeek-V4 compressor and indexer inside `model` pool with kvfold, until `unpatch(model)`.

    Works with `model(...)` and `model.generate(...)`, greedy, sampling and beam search, with and without a cache. Use
    `torch.no_grad()`: kvfold has no gradient here. Padding is not supported, as it is not by transformers, which
    pools it: positions that betray padding are refused; padding hidden in `attention_mask` alone is pooled just as
    transformers would. One patched model serves one thread at a time.

    Args:
        model: anything with `DeepseekV4HCACompressor` or `DeepseekV4CSACompressor` modules in it; changed in place.
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
    shared = _Shared(backend, max_new_tokens)
    patches = [_Patch(module, shared) for module in modules]  # all checks before the first change
    for module, mark in zip(modules, patches, strict=True):
        mark.own_forward = module.__dict__.get("forward")
        setattr(module, _MARK, mark)
        module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def unpatch(model: nn.Module) -> None:
    """Gives every compressor inside `model` its own forward back. Caches that kvfold filled refuse further use.

    Raises:
        ValueError: `model` is not patched.
    """
    modules = [m for m in model.modules() if _MARK in m.__dict__]
    if not modules:
        raise ValueError("model is not patched")
    for module in modules:
        own = module.__dict__.pop(_MARK).own_forward
        del module.__dict__["forward"]
        if own is not None:
            module.forward = own


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
    for layer, fold in zip(past_key_values.layers, folds, strict=True):
        if fold is None:
            layer.crop(length - layer.get_seq_length())
        else:
            layer.keys = layer.values = fold.rewind(length, layer.sliding_window)
            layer.cumulative_length = length


def rope_table(rotary_emb: nn.Module, positions: torch.Tensor, layer_type: str = "compress") -> torch.Tensor:
    """The `rope` argument of `kvfold.compress` for a `DeepseekV4RotaryEmbedding`.

    Args:
        rotary_emb: as every compressor has one; positions: integers `[n]`; layer_type: which of its frequencies.

    Returns:
        fp32 `[n, rope_dim]` on the device of `positions`, cosines then sines.
    """
    like = torch.empty(0, device=positions.device, dtype=torch.float32)
    cos, sin = rotary_emb(like, position_ids=positions[None], layer_type=layer_type)
    return torch.cat([cos[0], sin[0]], dim=-1)


class _Shared:
    """What the patched modules of one model have in common: options, the step's plans, rotary tables."""

    def __init__(self, backend: str | None, max_new_tokens: int) -> None:
        self.backend = backend
        self.max_new_tokens = max_new_tokens
        self.plans = Plans()
        self._tables: dict[tuple, torch.Tensor] = {}
        self._checked: weakref.ref | None = None

    def __deepcopy__(self, memo: dict) -> _Shared:
        return memo.setdefault(id(self), _Shared(self.backend, self.max_new_tokens))

    def check_positions(self, position_ids: torch.Tensor, start: int, new: int) -> None:
        """Refuses positions that do not continue the sequence: padding, packed sequences. Looks at every prefill."""
        if self._checked is not None and self._checked() is position_ids:
            return  # the layers of a step share one tensor
        expected = torch.arange(start, start + new, device=position_ids.device)
        if position_ids.shape[-1] != new or not bool((position_ids == expected).all()):
            raise UnsupportedError(
                f"position_ids other than {start}..{start + new - 1} in every row: DeepSeek-V4's compressor in transformers"
                " knows neither padding nor packed sequences; batch sequences of equal length"
            )
        self._checked = weakref.ref(position_ids)

    def rope(self, mark: _Patch, rotary: nn.Module, positions: int, device: torch.device) -> torch.Tensor:
        """fp32 `[at least positions, rope_dim]`, cosines then sines, from the module's own rotary embedding."""
        key = (device, *mark.rope_key)
        table = self._tables.get(key)
        have = 0 if table is None else table.shape[0]
        if have < positions:
            size = max(_FIRST_POSITIONS, 1 << (positions - 1).bit_length())
            more = torch.arange(have, size, device=device)
            part = rope_table(rotary, more, mark.layer_type)
            # Rows already there keep their bits: they are not computed again.
            table = part if table is None else torch.cat([table, part])
            self._tables[key] = table
        assert table is not None
        return table


class _Patch:
    """One patched compressor module: its specs by transformers' names, and how to undo the patch."""

    own_forward: Any = None

    def __init__(self, module: nn.Module, shared: _Shared) -> None:
        self.shared = shared
        self.layer_type = module.rope_layer_type
        rotary: Any = module.rotary_emb
        if rotary.rope_type[self.layer_type] in _VARYING_ROPE:
            raise UnsupportedError(f"rope type {rotary.rope_type[self.layer_type]!r}: it changes with the length")
        inv_freq = getattr(rotary, f"{self.layer_type}_inv_freq")
        scaling = getattr(rotary, f"{self.layer_type}_attention_scaling")
        self.rope_key = (self.layer_type, float(scaling), tuple(inv_freq.tolist()))
        self.rope_dim = 2 * inv_freq.numel()
        self.specs = {name: self._spec(part) for name, part in _parts(module).items()}

    def _spec(self, part: Any) -> CompressorSpec:
        return CompressorSpec(
            head_dim=part.head_dim,
            ratio=part.compress_rate,
            overlap=part.position_bias.shape[-1] == 2 * part.head_dim,
            rope_dim=self.rope_dim,
            norm_eps=part.kv_norm.variance_epsilon,
        )


def _parts(module: nn.Module) -> dict[str, Any]:
    indexer = getattr(module, "indexer", None)
    return {"compressor": module} if indexer is None else {"compressor": module, "indexer": indexer}


def _forward(self: nn.Module, hidden_states, q_residual, position_ids, past_key_values, layer_idx):
    """Replaces a compressor's forward: the same arguments and results, on a stand-in for the cache."""
    mark: _Patch = getattr(self, _MARK)
    new = hidden_states.shape[1]
    if past_key_values is None:
        fold, start, layer = LayerFold(1), 0, None
    else:
        layer = past_key_values.layers[layer_idx] if layer_idx < len(past_key_values.layers) else None
        fold = _layer_fold(layer, mark.shared.max_new_tokens)
        # transformers counts the step's tokens before it calls the compressor
        start = layer.cumulative_length - new if layer.is_initialized else fold.length
    if new > 1 or start == 0:
        mark.shared.check_positions(position_ids, start, new)
    fold.begin(start, new, layer.keys if layer is not None else None)
    stand_in = _StandIn({layer_idx: _PoolingLayer(self, mark, fold, start, new)})
    forward = mark.own_forward or MethodType(type(self).forward, self)
    result = forward(hidden_states, q_residual, position_ids, stand_in, layer_idx)
    fold.rewound = False
    return result


class _StandIn:
    """What transformers' compressor sees as its cache: only `layers[layer_idx]`."""

    def __init__(self, layers: dict[int, _PoolingLayer]) -> None:
        self.layers = layers


class _PoolingLayer:
    """What it sees as its cache layer: takes the rows, leaves transformers none to pool, and answers with entries."""

    def __init__(self, module: nn.Module, mark: _Patch, fold: LayerFold, start: int, new: int) -> None:
        self.parts, self.mark, self.fold = _parts(module), mark, fold
        self.start, self.new = start, new

    def store_compression_weights(self, name: str, kv: torch.Tensor, gate: torch.Tensor):
        if torch.is_grad_enabled() and (kv.requires_grad or gate.requires_grad):
            raise UnsupportedError(
                "gradients through the compressor: use torch.no_grad(), or unpatch(model) to train with transformers' own"
            )
        shared, part, spec = self.mark.shared, self.parts[name], self.mark.specs[name]
        # What is kept must outlive an inference_mode block, in which tensors are made that nobody may write to later.
        with torch.inference_mode(False), torch.no_grad():
            fold = self.fold.folds.get(name)
            if fold is None:
                # The norm itself says what dtype it returns: transformers 5.17 and 5.23 differ when its weight is fp32.
                entry = part.kv_norm(torch.zeros(1, spec.head_dim, dtype=kv.dtype, device=kv.device)).dtype
                fold = CompressorFold(spec, kv.shape[0], self.fold.max_new_tokens, kv, entry)
                self.fold.folds[name] = fold
            if fold.storage.shape[0] != kv.shape[0]:
                raise UnsupportedError(f"a batch of {kv.shape[0]} on a cache of {fold.storage.shape[0]} sequences")
            fold.advance(
                torch.cat([kv, gate], dim=-1).flatten(0, 1),
                self.start,
                self.new,
                shared.plans,
                ape=part.position_bias.detach().float(),
                norm_weight=part.kv_norm.weight.detach(),
                rope=shared.rope(self.mark, part.rotary_emb, self.start + self.new, kv.device),
                backend=shared.backend,
                # A CPU tells at once; elsewhere ask where waiting costs little (prefill) or an error is possible (rewind).
                check=kv.device.type == "cpu" or self.new > 1 or self.fold.rewound,
            )
        return kv[:, :0], gate[:, :0], 0

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        return self.fold.folds[name].entries()


def _layer_fold(layer: Any, max_new_tokens: int) -> LayerFold:
    """The `LayerFold` of a cache layer, attached to it at its first use."""
    if not isinstance(layer, v4.DeepseekV4HCACache):
        raise UnsupportedError(
            f"a cache layer of type {type(layer).__name__}: DeepSeek-V4 needs its own dynamic cache layers, as made by"
            " DynamicCache(config=model.config); static and quantized caches are not supported"
        )
    fold = getattr(layer, "kvfold", None)
    if fold is None:
        fold = layer.kvfold = LayerFold(max_new_tokens)
        for name in _LAYER_METHODS:
            setattr(layer, name, MethodType(globals()[f"_layer_{name}"], layer))
        layer.store_compression_weights = MethodType(_layer_refuses, layer)
    return fold


def _layer_reset(self: Any) -> None:
    # The layer becomes what it was before kvfold, fit for a patched and for an unpatched model.
    for name in (*_LAYER_METHODS, "store_compression_weights", "kvfold"):
        del self.__dict__[name]
    self.reset()


def _layer_reorder_cache(self: Any, beam_idx: torch.Tensor) -> None:
    type(self).reorder_cache(self, beam_idx)
    self.kvfold.select(beam_idx, self.keys)


def _layer_batch_repeat_interleave(self: Any, repeats: int) -> None:
    indices = torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats)
    type(self).batch_repeat_interleave(self, repeats)
    self.kvfold.select(indices, self.keys)


def _layer_batch_select_indices(self: Any, indices: torch.Tensor) -> None:
    type(self).batch_select_indices(self, indices)
    self.kvfold.select(indices, self.keys)


def _layer_refuses(self: Any, *args: Any, **kwargs: Any) -> None:
    raise UnsupportedError("a cache filled by a kvfold-patched model in an unpatched one: start with a new cache")
