"""From checked arguments to the launches of the forward and of the backward."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..backend_triton import args
from ..backend_triton.args import flat
from ..backend_triton.launcher import Launcher, launcher_of, pack, supports_pdl
from .args import Incoming, Kept, Parts, Pieces
from .problem import Entries, Gradients, How, Inputs, read_back, scratch_cache
from .table import choose, groups_of
from .variants import TrainingKey


class Launch(NamedTuple):
    launcher: Launcher
    groups: int  # of windows
    tiles: int  # programs of a group


class Launches(NamedTuple):
    """All of a call. again, or finish and spread, is None."""

    forward: Launch
    again: Launch | None
    finish: Launch | None
    spread: Launch | None
    sum: Launch


def forward_triton(x: Inputs, how: How) -> Entries:
    """Entries, latents and the kept fold, after the arguments were checked: one launch, and with fake quantization what reads
    the records back."""
    spec, device, capacity = how.spec, x.value.device, how.capacity(x)
    kept = torch.empty(how.kept_shape(x), dtype=torch.float32, device=device)
    latent = torch.empty(how.latent_shape(x), dtype=how.out_dtype, device=device)
    cache = entries = None
    if how.fmt is None:
        entries = torch.empty(capacity, spec.head_dim, dtype=how.out_dtype, device=device)
        pages = {"pages": entries.view(torch.uint8), "rows_per_page": max(capacity, 1), "num_slots": capacity}
    else:
        cache = scratch_cache(x, how)
        pages = {
            "pages": cache.pages,
            "page_stride": cache.pages.stride(0),
            "scales": cache.scale_pages,
            "scales_stride": 0 if cache.scale_pages is None else cache.scale_pages.stride(0),
            "rows_per_page": cache.rows_per_page,
            "num_slots": cache.num_slots,
            "scale": None if cache.scale_tensor is None else cache.scale_tensor.data_ptr(),
        }
    if capacity:
        output = args.Output(
            latent=latent if how.latent else None,
            norm_weight=x.norm_weight,
            rope=x.rope,
            max_position=0 if x.rope is None else x.rope.shape[0],
            **pages,
        )
        groups = _pieces(x, capacity), _tokens(x.value, x.score, x.ape), output, _kept(kept, how)
        _launch(launches_of(*_asked(x, how)).forward, capacity, groups, False, output.page_stride | output.scales_stride)
    if cache is not None:
        entries = read_back(cache, x, how)
    return Entries(entries, latent, kept)


def backward_triton(
    x: Inputs, how: How, kept: torch.Tensor, d_entries: torch.Tensor, d_latent: torch.Tensor | None
) -> Gradients:
    """The gradients of all inputs, after the arguments were checked: two launches, or three where the fold was kept."""
    spec, device, capacity = how.spec, x.value.device, how.capacity(x)
    chosen = launches_of(*_asked(x, how))
    single = {"dtype": torch.float32, "device": device}
    d_value = torch.empty(x.value.shape, dtype=x.value.dtype, device=device)
    d_score = None if x.score is None else torch.empty(x.score.shape, dtype=x.value.dtype, device=device)
    d_ape = torch.empty(spec.ratio, spec.channels, **single) if spec.has_ape else None
    d_norm_weight = torch.empty(spec.head_dim, **single)
    of_ape = chosen.again or chosen.spread
    of_weight = chosen.again or chosen.finish
    ape = torch.empty(of_ape.groups, spec.ratio * spec.channels, **single) if spec.has_ape else None
    weight = torch.empty(of_weight.groups, spec.head_dim, **single)

    pieces, tokens = _pieces(x, capacity), _tokens(x.value, x.score, x.ape)
    finish = x.norm_weight, x.rope, 0 if x.rope is None else x.rope.shape[0]
    gradients = _tokens(d_value, d_score, None)
    dependent = supports_pdl(device)
    if chosen.again is not None:
        incoming = Incoming(d_entries, d_latent)
        parts = Parts(ape, weight, chosen.again.groups)
        groups = pieces, tokens, *finish, incoming, gradients, parts
        _launch(chosen.again, chosen.again.groups, groups, False)
    else:
        pooled = torch.empty(capacity, spec.head_dim, **single)
        incoming = Incoming(d_entries, d_latent, pooled)
        groups = pieces, *finish, _kept(kept, how), incoming, Parts(None, weight, chosen.finish.groups)
        _launch(chosen.finish, chosen.finish.groups, groups, False)
        incoming = Incoming(pooled=pooled)
        groups = pieces, tokens, _kept(kept, how), incoming, gradients, Parts(ape, None, chosen.spread.groups)
        _launch(chosen.spread, chosen.spread.groups * chosen.spread.tiles, groups, dependent)
    # What the launch before wrote, this one waits for by itself, having started meanwhile.
    _launch(chosen.sum, chosen.sum.tiles, (Parts(ape, weight, 1), d_ape, d_norm_weight), dependent)
    return Gradients(d_value, d_score, d_ape, d_norm_weight)


def _asked(x: Inputs, how: How) -> tuple:
    """What launches follow from."""
    types = x.value.dtype, x.score is not None, x.norm_weight.dtype
    return how._replace(backend=""), types, how.capacity(x), x.value.device


@lru_cache(maxsize=1024)
def launches_of(how: How, types: tuple, capacity: int, device: torch.device) -> Launches:
    """Remembered, as hashing a key takes longer than a launch."""
    keys = keys_of(how, types, capacity)
    spec = how.spec
    found: dict[str, Launch] = {}
    for kernel, key in keys.items():
        tiles = 1
        if kernel == "spread":
            rows, columns = min(key.config.rows, 1 << (spec.ratio - 1).bit_length()), min(key.config.columns, spec.head_dim)
            tiles = -(-spec.ratio // rows) * (1 + spec.overlap) * (spec.head_dim // columns)
        elif kernel == "sum":
            width = spec.ratio * spec.channels if spec.has_ape else 0
            tiles = -(-width // key.config.columns) + -(-spec.head_dim // key.config.columns)
        found[kernel] = Launch(launcher_of(key, device), key.groups, tiles)
    return Launches(*(found.get(name) for name in Launches._fields))


def keys_of(how: How, types: tuple, capacity: int) -> dict[str, TrainingKey]:
    """The key of each launch of a call, by the name of its kernel; of the launch that is not made there is none.

    types: dtype of kv_score, whether it is two tensors, dtype of norm_weight.
    """
    names = ("forward", "finish", "spread") if how.keeps else ("forward", "again")
    configs = {name: choose(name, how.spec, capacity) for name in (*names, "sum")}
    groups = {name: groups_of(config, capacity) for name, config in configs.items()}
    last, before = names[-1], names[1]
    found = {}
    for name, config in configs.items():
        counts = (groups[last], groups[before]) if name == "sum" else (groups[name], 1)
        found[name] = TrainingKey(how.spec, how.record, config, *types, how.out_dtype, how.latent, how.keeps, *counts)
    return found


def _launch(launch: Launch, grid: int, groups: tuple, pdl: bool, strides: int = 0) -> None:
    """strides: besides those of tokens and kept folds, or-ed."""
    values, bits = pack(*flat(groups))
    for group in groups:
        if isinstance(group, args.Tokens):
            strides |= group.stride | (group.apart or 0) | (group.skew or 0)
        elif isinstance(group, Kept):
            strides |= group.plane or 0
    launch.launcher(grid, values, bits | strides, pdl)


def _pieces(x: Inputs, capacity: int) -> Pieces:
    return Pieces(x.pieces, x.pieces.shape[0], capacity)


def _kept(kept: torch.Tensor, how: How) -> Kept:
    return Kept(kept, kept.stride(0)) if how.keeps else Kept()


def _tokens(value: torch.Tensor, score: torch.Tensor | None, ape: torch.Tensor | None) -> args.Tokens:
    apart = skew = None
    stride = value.stride(0)
    if score is not None:
        apart, skew = (score.data_ptr() - value.data_ptr()) // value.element_size(), score.stride(0) - stride
    return args.Tokens(value, stride, value.shape[0], ape, apart, skew)
