"""What kvfold reads of a compressor of transformers: its shape, weights and rotations, and what autograd wants of it.

All of it is read at every call, while the compressor runs: a model may be moved, cast, loaded, edited or offloaded between
two calls. Nothing is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...contract import UnsupportedError
from ...spec import CompressorSpec

# Rotary embeddings of these kinds change with the length of the sequence; an entry, once written, cannot.
_VARYING_ROPE = ("dynamic", "longrope")
_ENTRY_DTYPES: dict[tuple, torch.dtype] = {}  # by forward of the norm, dtype of the rows and of its weight


def parts(module: nn.Module) -> dict[str, Any]:
    """The compressors in `module` by the names that transformers gives their entries."""
    indexer = getattr(module, "indexer", None)
    return {"compressor": module} if indexer is None else {"compressor": module, "indexer": indexer}


class Shape(NamedTuple):
    """What a compressor is, in numbers: what `CompressorSpec` is made of, as an operator takes it."""

    head_dim: int
    ratio: int
    overlap: bool
    rope_dim: int

    def spec(self, norm_eps: float) -> CompressorSpec:
        if torch.compiler.is_compiling():  # in hex: another number would be a variable of the next graph, and no constant
            return _constant_spec(*self, norm_eps.hex())
        return _spec(*self, norm_eps)


@functools.lru_cache(maxsize=256)
def _spec(head_dim: int, ratio: int, overlap: bool, rope_dim: int, norm_eps: float) -> CompressorSpec:
    return CompressorSpec(head_dim=head_dim, ratio=ratio, overlap=overlap, rope_dim=rope_dim, norm_eps=norm_eps)


@torch.compiler.assume_constant_result  # what is not traced: the json by which a spec tells what it is
def _constant_spec(head_dim: int, ratio: int, overlap: bool, rope_dim: int, norm_eps: str) -> CompressorSpec:
    return _spec(head_dim, ratio, overlap, rope_dim, float.fromhex(norm_eps))


def shape_of(part: Any) -> Shape:
    """The shape of a compressor or indexer as it is now."""
    rotary, kind = part.rotary_emb, part.rope_layer_type
    if rotary.rope_type[kind] in _VARYING_ROPE:
        raise UnsupportedError(f"rope type {rotary.rope_type[kind]!r}: it changes with the length")
    rope_dim = 2 * getattr(rotary, f"{kind}_inv_freq").numel()
    return Shape(part.head_dim, part.compress_rate, part.position_bias.shape[-1] == 2 * part.head_dim, rope_dim)


def spec_of(part: Any) -> CompressorSpec:
    """The spec of a compressor or indexer as it is now."""
    return shape_of(part).spec(part.kv_norm.variance_epsilon)


def position_bias(part: Any) -> torch.Tensor:
    """`[ratio, channels]`: the module's own tensor."""
    bias = part.position_bias
    if bias.device.type == "meta":
        raise not_loaded(part, "position_bias")
    return _ordinary(bias)


def norm_weight(part: Any, device: torch.device) -> torch.Tensor:
    """fp32 or bf16 `[head_dim]`: the norm's own tensor, or a copy where a hook of the norm loads and drops it."""
    norm, weight = part.kv_norm, part.kv_norm.weight
    if weight.device != device:
        weight = _loaded(norm, "weight", device, lambda: norm(torch.zeros(1, part.head_dim, device=device)))
    weight = _ordinary(weight)
    return weight.float() if weight.dtype is torch.float16 else weight


def entry_dtype(part: Any, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that the module's norm gives for rows of `dtype`: versions of transformers differ where its weight is fp32."""
    norm = part.kv_norm
    # Of a norm that nobody has changed it is known; hooks, and a forward of its own, may do as they like.
    plain = not (torch.compiler.is_compiling() or norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__)
    case = type(norm).forward, dtype, norm.weight.dtype
    found = _ENTRY_DTYPES.get(case) if plain else None
    if found is None:
        with torch.no_grad():  # checkpointing counts what a step saves, and there is no second one of this
            found = norm(torch.zeros(1, part.head_dim, dtype=dtype, device=device)).dtype
        if plain:
            _ENTRY_DTYPES[case] = found
    return found


def _ordinary(tensor: torch.Tensor) -> torch.Tensor:
    # Tensors made in inference mode may not be used in calls that are made outside of it.
    return tensor.clone() if not torch.compiler.is_compiling() and tensor.is_inference() else tensor


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


def refuse_gradients(part: Any, tensors: dict[str, torch.Tensor]) -> None:
    """In a step from a filled cache none of these may require one, projections too: a replica's weights are no parameters."""
    names = [name for name, tensor in tensors.items() if tensor.requires_grad]
    if names and part.training and torch.is_grad_enabled():
        raise UnsupportedError(
            f"gradients through the compressor in a step from a filled cache, which {', '.join(names)} would need: train on"
            " whole sequences, use torch.no_grad(), freeze it, or unpatch(model)"
        )


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


def rope_rows(part: Any, start: int, end: int, device: torch.device) -> torch.Tensor:
    """fp32 `[n, rope_dim]`: the rotations, as they are now, of the entries of the `n` windows that end in `start .. end - 1`.

    While traced, of as many windows as could end in so many tokens, so that no step needs a graph of its own.
    """
    ratio, rotary, kind = part.compress_rate, part.rotary_emb, part.rope_layer_type
    name = f"{kind}_inv_freq"
    first, traced = start // ratio, torch.compiler.is_compiling()
    count = -((start - end) // ratio) if traced else end // ratio - first
    if not count:
        return torch.empty(0, 2 * getattr(rotary, name).numel(), dtype=torch.float32, device=device)
    if traced:
        positions = (torch.arange(count, device=device) + first) * ratio
    else:
        positions = torch.arange(first * ratio, (first + count) * ratio, ratio, device=device)
    try:
        rows = rope_table(rotary, positions, kind)
    except RuntimeError:  # what operations between a meta tensor and a real one raise
        if getattr(rotary, name).device.type == "meta":
            raise not_loaded(rotary, name) from None
        raise
    if rows.device.type == "meta":
        raise not_loaded(rotary, name)
    return rows
