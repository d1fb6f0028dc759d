"""`Layer`: one of SGLang's compressors as kvfold's arguments, made once and kept with its norm."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...compress import compress
from ...restore import restore
from ...spec import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec
from ...storage.cache import EntryCache
from ...storage.fold_state import FoldState
from ...storage.mean_state import MeanState
from ...storage.snapshots import Snapshots
from ...storage.window_state import WindowState
from .source import POOLS, Source
from .step import Step

_LAYERS: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()
_ROPES: dict[tuple, tuple[weakref.ref, torch.Tensor]] = {}  # by address, as long as the tensor there is the one it was


def rope_of(freqs: torch.Tensor) -> torch.Tensor:
    """fp32 `[max_pos, rope_dim]`, cosines then sines, of SGLang's complex table; one for all layers that share it."""
    key = (freqs.data_ptr(), tuple(freqs.shape), freqs.device)
    if key not in _ROPES or _ROPES[key][0]() is None:
        _ROPES[key] = weakref.ref(freqs), torch.cat([freqs.real, freqs.imag], dim=1).float()
    return _ROPES[key][1]


def ape_of(ape: torch.Tensor, spec: CompressorSpec) -> torch.Tensor:
    """fp32 `[ratio, channels]`, a copy: SGLang keeps an overlap's earlier halves in the first rows, then the later ones."""
    with torch.inference_mode(False):  # new weights may come outside of it
        rows = ape.detach().float()
        if spec.overlap:
            rows = rows.reshape(2 * spec.ratio, spec.head_dim)
            return torch.cat([rows[: spec.ratio], rows[spec.ratio :]], dim=1)
        return rows.reshape(spec.ratio, spec.channels).clone()


@dataclass
class Layer:
    """What does not change from step to step.

    Attributes:
        states: by whether the step's drafts go to banks, which SGLang's online pool has.
        pool: SGLang's raw rows `[rows, 2 * channels]`, where kvfold stores some behind the launch.
        made_of: the addresses that all this was made of.
    """

    spec: CompressorSpec
    ape: torch.Tensor
    rope: torch.Tensor
    cache: EntryCache
    states: tuple[FoldState | MeanState | WindowState, ...]
    snapshots: Snapshots | None
    pool: torch.Tensor
    made_of: tuple[int, ...]


def layer_of(norm: nn.Module, addresses: tuple[int, ...], make: Callable[[], Layer]) -> Layer:
    """The layer of this norm; made again if a tensor of it has moved."""
    layer = _LAYERS.get(norm)
    if layer is None or layer.made_of != addresses:
        layer = _LAYERS[norm] = make()
    return layer


def refresh_ape(_: Any, compressor: Any, *args: Any, **kwargs: Any) -> None:
    """An AFTER hook of SGLang's loading of `ape`: the copy follows in place, in graphs too."""
    layer = _LAYERS.get(compressor.norm)
    if layer is not None:
        layer.ape.copy_(ape_of(compressor.ape, layer.spec))


def spec_of(ratio: int, head_dim: int, is_indexer: bool, eps: float) -> CompressorSpec:
    """The spec of a V4 compressor."""
    base = V4_HCA if ratio == 128 else V4_INDEXER if is_indexer else V4_CSA
    return replace(base, head_dim=head_dim, norm_eps=eps)


def make_layer(
    source: Source,
    spec: CompressorSpec,
    fmt: str,
    *,
    buffer: torch.Tensor,
    ape: torch.Tensor,
    freqs: torch.Tensor,
    kv_cache: torch.Tensor,
    page_size: int,
    banks: int,
    made_of: tuple[int, ...],
) -> Layer:
    """Wraps what SGLang hands to a compressor: its state pool, cache pages `[pages, bytes]`, and weights."""
    cache = EntryCache(kv_cache.view(torch.uint8).flatten(1), fmt, page_size, spec)
    snapshots = None
    if source.kind == "fold":
        state, snapshots = POOLS[buffer.data_ptr()].views(spec)
        states: tuple[FoldState | MeanState | WindowState, ...] = (state,)
    else:
        states = _states(source, spec, buffer, banks)
    return Layer(spec, ape_of(ape, spec), rope_of(freqs), cache, states, snapshots, buffer, made_of)


def _states(source: Source, spec: CompressorSpec, buffer: torch.Tensor, banks: int) -> tuple[MeanState | WindowState, ...]:
    width = buffer.shape[-1]
    if source.kind == "mean":
        slots = buffer.view(1 + banks, -1, width)
        return (MeanState(spec, slots[0]), MeanState(spec, slots)) if banks else (MeanState(spec, slots[0]),)
    rows = buffer.view(-1, spec.ratio, width)
    return (WindowState(rows[..., : spec.channels], rows[..., spec.channels :]),)


def run(layer: Layer, step: Step, kv_score: torch.Tensor, norm_weight: torch.Tensor) -> None:
    """One compressor's part of a step: one launch, and on rings of SWA pages a few small ones behind that of a long step."""
    state = layer.states[step.banks]
    pdl = None
    if kv_score.is_cuda and step.stream != torch.cuda.current_stream().cuda_stream:
        pdl = False  # the launch before it on this stream is not the one that wrote the plan
    if step.hits and layer.snapshots is not None:
        restore(state, layer.snapshots, *step.hits, step.plan.errors)
    compress(
        kv_score,
        step.plan,
        state,
        layer.cache,
        spec=layer.spec,
        ape=layer.ape,
        norm_weight=norm_weight,
        rope=layer.rope,
        snapshots=layer.snapshots,
        pdl=pdl,
    )
    if step.kept:
        token, offset, row = step.kept
        raw = kv_score.index_select(0, token)
        raw[:, layer.spec.channels :] += layer.ape.index_select(0, offset)
        layer.pool.index_copy_(0, row, raw.to(layer.pool.dtype))
