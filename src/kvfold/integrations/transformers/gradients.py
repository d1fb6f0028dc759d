"""Entries with gradients, by `kvfold.training`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...arguments.checks import makes_fakes
from ...contract import UnsupportedError
from ...training import Packing, compress
from . import weights
from .cache import check_dtypes


def _packing(ratio: int, device: torch.device, batch: int, new: int) -> Packing:
    """Of sequences of one length: the same for all layers and steps."""
    with torch.no_grad():
        cu_seqlens = torch.arange(batch + 1, device=device) * new
        return Packing.build(cu_seqlens, batch * new, ratio, max_seqlen=new)


_known_packing = functools.lru_cache(maxsize=16)(_packing)


def wanted(part: Any, kv: torch.Tensor, gate: torch.Tensor) -> bool:
    """Whether entries of these projections are to have gradients: where anything that they are made of has.

    In eval mode, not those of weights that a hook loads and drops: there they are detached.
    """
    if not torch.is_grad_enabled():
        return False
    here = part.training or all(x.device == kv.device for x in (part.position_bias, part.kv_norm.weight))
    return here and any(x.requires_grad for x in (kv, gate, part.position_bias, part.kv_norm.weight))


def entries(part: Any, kv: torch.Tensor, gate: torch.Tensor, rope: torch.Tensor, backend: str | None) -> torch.Tensor:
    """`[batch, windows, head_dim]` of sequences from their first tokens on; the bits that the model makes without gradients.

    rope: a row for each window, as `weights.rope_rows` makes them.

    Raises UnsupportedError for dtypes that kvfold has not, and for weights that a hook would have to load.
    """
    batch, new = kv.shape[:2]
    weight, out_dtype = part.kv_norm.weight, weights.entry_dtype(part, kv.dtype, kv.device)
    check_dtypes(kv.dtype, out_dtype)
    for name, tensor in (("position_bias", part.position_bias), ("kv_norm.weight", weight)):
        if tensor.device != kv.device:
            raise UnsupportedError(f"gradients of {name} of {type(part).__name__}, which is on {tensor.device}: load it first")
    spec = weights.spec_of(part)
    table = rope.repeat_interleave(spec.ratio, 0)  # by position
    found = compress(
        (kv.flatten(0, 1), gate.flatten(0, 1)),
        (_packing if torch.compiler.is_compiling() or makes_fakes() else _known_packing)(spec.ratio, kv.device, batch, new),
        spec=spec,
        ape=part.position_bias.float(),
        norm_weight=weight.float() if weight.dtype is torch.float16 else weight,
        rope=table,
        round_rows=False,
        out_dtype=out_dtype,
        backend=backend,
    )
    return found[: batch * (new // spec.ratio)].unflatten(0, (batch, new // spec.ratio))
