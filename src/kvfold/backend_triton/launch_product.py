"""From checked arguments to the launches that make kv_score of hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..storage.step import Projection
from . import args
from .args import flat
from .keys import AddKey, ProjectKey
from .launcher import launcher_of, pack, supports_pdl
from .table import Tiling, tiling
from .variants import ADDED_AT_ONCE


def product_triton(p: Projection, kv_scores: Sequence[torch.Tensor], pdl: bool) -> None:
    """kv_score of each compressor: at once for all that are side by side."""
    pdl = pdl and supports_pdl(p.hidden.device)
    whole = side_by_side(kv_scores)
    if whole is not None and len(kv_scores) > 1:
        _product(p, tuple(weight for weights in p.weights for weight in weights), whole, pdl)
        return
    for weights, kv_score in zip(p.weights, kv_scores, strict=True):
        _product(p, weights, kv_score, pdl)


def side_by_side(kv_scores: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor of all columns, where they are neighbours in the same rows."""
    first = kv_scores[0]
    stride, at, columns = first.stride(0), first.data_ptr(), 0
    for x in kv_scores:
        if x.dtype is not first.dtype or x.stride(0) != stride or x.data_ptr() != at + columns * x.element_size():
            return None
        columns += x.shape[1]
    return first.as_strided((first.shape[0], columns), (stride, 1)) if columns <= stride else None


def _product(p: Projection, weights: tuple[torch.Tensor, ...], kv_score: torch.Tensor, pdl: bool) -> None:
    config = tiling(*kv_score.shape)
    if config.parts == 1:
        project(p.hidden, weights, kv_score, config, pdl, p.round_kv_score)
        return
    parts = torch.empty((config.parts, *kv_score.shape), dtype=torch.float32, device=kv_score.device)
    project(p.hidden, weights, parts, config, pdl)
    add(parts, kv_score, pdl, p.round_kv_score)


def project(
    hidden: torch.Tensor, weights: tuple[torch.Tensor, ...], out: torch.Tensor, config: Tiling, pdl: bool, rounded: bool = False
) -> None:
    """One launch of the product. out: kv_score, or where there are parts all of them, fp32 `[parts, T, columns]`."""
    count, columns = out.shape[-2:]
    sums = args.Sums(out, out.stride(-2), out.stride(0) if config.parts > 1 else None)
    groups = args.ProjectArguments(args.Hidden(hidden, hidden.stride(0), count), _weights(weights), sums)
    tensors = 1 if len(weights) == 1 else 2 if len(weights) == 2 else 4
    values, bits = pack(*flat(groups))
    for stride in (groups.hidden.stride, sums.stride, sums.step, *groups.weights[3::2]):
        bits |= stride or 0
    key = ProjectKey(hidden.shape[1], config, tensors, out.dtype, rounded)
    launcher_of(key, hidden.device)(config.tiles(count, columns) * config.parts, values, bits, pdl)


def add(parts: torch.Tensor, kv_score: torch.Tensor, pdl: bool, rounded: bool) -> None:
    """One launch that makes kv_score of its parts."""
    count, columns = kv_score.shape
    given, made = args.Sums(parts, parts.stride(1), parts.stride(0)), args.Sums(kv_score, kv_score.stride(0))
    values, bits = pack(*flat(args.AddArguments(given, columns, made)))
    launcher = launcher_of(AddKey(parts.shape[0], kv_score.dtype, rounded), kv_score.device)
    launcher(count * -(-columns // ADDED_AT_ONCE), values, bits | given.stride | given.step | made.stride, pdl)


def _weights(weights: tuple[torch.Tensor, ...]) -> args.Weights:
    """Up to four tensors: from the first one's row 0 a column's row lies as far as their sizes say, and a gap for each cut."""
    cuts: list[int | None] = []
    end, columns = weights[0].data_ptr(), 0
    for weight in weights:
        if weight is not weights[0]:
            cuts += [columns, (weight.data_ptr() - end) // 2]
        end, columns = weight.data_ptr() + weight.nbytes, columns + weight.shape[0]
    if len(weights) == 3:
        cuts += [columns, 0]
    return args.Weights(weights[0], columns, *cuts, *[None] * (6 - len(cuts)))
