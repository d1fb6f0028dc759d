"""What kvfold reads of a compressor of transformers: its shape, weights and rotations, and what autograd wants of it.

All of it is read at every call, while the compressor runs: a model may be moved, cast, loaded, edited or offloaded between
two calls. Only tables of rotations are kept, under the frequencies that they were made of.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...contract import UnsupportedError
from ...spec import CompressorSpec

_FIRST_POSITIONS = 4096
# Rotary embeddings of these kinds change with the length of the sequence; an entry, once written, cannot.
_VARYING_ROPE = ("dynamic", "longrope")
_spec = functools.lru_cache(maxsize=256)(CompressorSpec)


def parts(module: nn.Module) -> dict[str, Any]:
    """The compressors in `module` by the names that transformers gives their entries."""
    indexer = getattr(module, "indexer", None)
    return {"compressor": module} if indexer is None else {"compressor": module, "indexer": indexer}


def spec_of(part: Any) -> CompressorSpec:
    """The spec of a compressor or indexer as it is now."""
    rotary, kind = part.rotary_emb, part.rope_layer_type
    if rotary.rope_type[kind] in _VARYING_ROPE:
        raise UnsupportedError(f"rope type {rotary.rope_type[kind]!r}: it changes with the length")
    rope_dim = 2 * getattr(rotary, f"{kind}_inv_freq").numel()
    overlap = part.position_bias.shape[-1] == 2 * part.head_dim
    eps = part.kv_norm.variance_epsilon
    return _spec(head_dim=part.head_dim, ratio=part.compress_rate, overlap=overlap, rope_dim=rope_dim, norm_eps=eps)


def position_bias(part: Any) -> torch.Tensor:
    """fp32 `[ratio, channels]`: the module's own tensor where it is fp32."""
    bias = part.position_bias
    if bias.device.type == "meta":
        raise not_loaded(part, "position_bias")
    return _ordinary(bias).float()


def norm_weight(part: Any, device: torch.device) -> torch.Tensor:
    """fp32 or bf16 `[head_dim]`: the norm's own tensor, or a copy where a hook of the norm loads and drops it."""
    norm, weight = part.kv_norm, part.kv_norm.weight
    if weight.device != device:
        weight = _loaded(norm, "weight", device, lambda: norm(torch.zeros(1, part.head_dim, device=device)))
    weight = _ordinary(weight)
    return weight.float() if weight.dtype is torch.float16 else weight


def entry_dtype(part: Any, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What dtype the module's norm makes of rows of `dtype`: versions of transformers differ where its weight is fp32."""
    return part.kv_norm(torch.zeros(1, part.head_dim, dtype=dtype, device=device)).dtype


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    # Tensors made in inference mode may not be used in calls that are made outside of it.
    return tensor.clone() if tensor.is_inference() else tensor


class _Watch(TorchFunctionMode):
    """Takes a copy of `module.name` in the first operation that runs while it is on `device`; None: on any that has data."""

    def __init__(self, module: nn.Module, name: str, device: torch.device | None) -> None:
        super().__init__()
        self.module, self.name, self.device = module, name, device
        self.found: torch.Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = getattr(self.module, self.name, None) if self.found is None else None
        if tensor is not None and tensor.device.type != "meta" and self.device in (None, tensor.device):
            self.found = tensor.detach().clone()
        return func(*args, **(kwargs or {}))


def _loaded(module: nn.Module, name: str, device: torch.device | None, call: Callable[[], Any]) -> torch.Tensor:
    """`module.name` as it is inside `call`, which runs `module`: hooks that offload weights load them only for that."""
    with _Watch(module, name, device) as watch:
        try:
            call()
        except RuntimeError:  # what operations between a meta tensor and a real one raise
            if watch.found is None and getattr(module, name).device.type == "meta":
                raise not_loaded(module, name) from None
            raise
    tensor = getattr(module, name) if watch.found is None else watch.found
    if tensor.device.type == "meta":
        raise not_loaded(module, name)
    return tensor


def not_loaded(module: nn.Module, name: str) -> UnsupportedError:
    return UnsupportedError(f"{name} of {type(module).__name__} is on the meta device: load the weights first")


def check_gradients(module: nn.Module, hidden_states: torch.Tensor, first: bool, start: int) -> None:
    """Refuses what would silently give a wrong gradient. `first`: no earlier layer of this step was asked."""
    if not torch.is_grad_enabled():
        return
    if module.training and start:
        refuse_gradients(module, dict(module.named_parameters()) | {"hidden_states": hidden_states})
    elif (
        not module.training
        and hidden_states.requires_grad
        and (hidden_states.grad_fn is None or first)
        and _has_input(hidden_states)
    ):
        raise UnsupportedError(
            "gradients through the compressor to a model's input: hidden_states depends on a tensor that requires one and is no"
            " parameter. Use model.train(), torch.no_grad(), or unpatch(model)"
        )


def refuse_gradients(part: Any, tensors: dict[str, torch.Tensor]) -> None:
    """In a step from a filled cache none of these may require one, projections too: a replica's weights are no parameters."""
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    if names and part.training and torch.is_grad_enabled():
        raise UnsupportedError(
            f"gradients through the compressor in a step from a filled cache, which {', '.join(names)} would need: train on"
            " whole sequences, use torch.no_grad(), freeze it, or unpatch(model)"
        )


def _has_input(tensor: torch.Tensor) -> bool:
    """Whether a leaf of the graph behind `tensor`, which requires a gradient, is no parameter."""
    if tensor.grad_fn is None:
        return not isinstance(tensor, nn.Parameter)
    seen, left = {tensor.grad_fn}, [tensor.grad_fn]
    while left:
        node = left.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, nn.Parameter):
            return True
        fresh = {one for one, _ in node.next_functions if one is not None} - seen
        seen |= fresh
        left += fresh
    return False


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


class _Table:
    """Rotations of one set of frequencies on one device; shared by all modules that have these frequencies."""

    rows: torch.Tensor | None = None


class _Seen(NamedTuple):
    """What a rotary embedding was when its table was last looked up."""

    key: tuple
    inv_freq: weakref.ref[torch.Tensor]
    written: tuple[int, int]
    table: _Table


def _written(tensor: torch.Tensor) -> tuple[int, int]:
    return (-1 if tensor.is_inference() else tensor._version), tensor.data_ptr()


class RopeTables:
    """Rotation tables by the values of the frequencies; one lives as long as a module had it at its last call."""

    def __init__(self) -> None:
        self._seen: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()
        self._tables: weakref.WeakValueDictionary[tuple, _Table] = weakref.WeakValueDictionary()

    def get(self, part: Any, positions: int, device: torch.device, look: bool) -> torch.Tensor:
        """fp32 `[at least positions, rope_dim]`, cosines then sines, from the module's own rotary embedding.

        A CPU compares the frequencies at every call. Elsewhere that waits for the device: it is done where `look` says so,
        and when the tensor is another one or was written to since the last call.
        """
        rotary, kind = part.rotary_emb, part.rope_layer_type
        name = f"{kind}_inv_freq"
        inv_freq = getattr(rotary, name)
        if inv_freq.device.type == "meta":
            inv_freq = _loaded(rotary, name, None, lambda: rope_table(rotary, torch.zeros(1, device=device), kind))
        seen, written = self._seen.get(rotary), _written(inv_freq)
        key = (type(rotary), kind, device, float(getattr(rotary, f"{kind}_attention_scaling")))
        known = seen is not None and seen.key[:4] == key and seen.inv_freq() is inv_freq and seen.written == written
        if not known or look or inv_freq.device.type == "cpu":
            key = (*key, tuple(inv_freq.tolist()))
            table = self._tables.setdefault(key, _Table())
            seen = self._seen[rotary] = _Seen(key, weakref.ref(inv_freq), written, table)
        table = seen.table
        have = 0 if table.rows is None else len(table.rows)
        if have < positions:
            more = torch.arange(have, max(_FIRST_POSITIONS, 1 << (positions - 1).bit_length()), device=device)
            new = rope_table(rotary, more, kind)
            # Rows already there keep their bits: they are not computed again.
            table.rows = new if table.rows is None else torch.cat([table.rows, new])
        return table.rows
