"""From checked arguments to the launches that make kv_score of hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..storage.fold_state import FoldState
from ..storage.step import Compressor, Outputs, PlanData, Projection
from . import args
from .args import flat
from .keys import AddKey, ProjectKey, is_short
from .launch import Parts, compress_triton, use_pdl
from .launcher import launcher_of, pack, supports_pdl
from .table import Tiling, tiling
from .variants import ADDED_AT_ONCE


def project_triton(p: Projection, c: Compressor, plan: PlanData, out: Outputs, pdl: bool | None) -> None:
    """A short step, after its arguments were checked: kv_score in parts, which `compress` adds up as it reads them."""
    whole, config = c.value, tiling(p.hidden.shape[0])
    parts = whole.as_strided((config.parts, *whole.shape), (whole.numel(), *whole.stride()))
    project(p.hidden, p.weights[0], parts, config, use_pdl(pdl, plan, p.hidden.device))
    compress_triton(c, plan, out, pdl, Parts(config.parts, p.round_kv_score, parts.stride(0)))


def parts_of(p: Projection, compressors: Sequence[Compressor], plan: PlanData) -> int:
    """In how many parts a call may leave kv_score; 0 where it must be whole.

    Input rows are read more than once, and kept: to add up their parts each time takes longer than to do it once.
    """
    c, count = compressors[0], tiling(p.hidden.shape[0]).parts
    if count == 1 or len(compressors) > 1 or c.kv_score is not None or not p.hidden.shape[0]:
        return 0
    if not isinstance(c.state, FoldState) or not isinstance(plan, PlanData) or not plan.item_capacity:
        return 0
    return count if c.state.kind == "fold" and is_short("fold", c.state.spec, plan.max_new_tokens) else 0


def product_triton(p: Projection, kv_scores: Sequence[torch.Tensor], pdl: bool) -> None:
    """kv_score of each compressor: one launch where tokens are many, else one and another that adds up what it made."""
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
    config = tiling(p.hidden.shape[0])
    if config.parts == 1:
        project(p.hidden, weights, kv_score, config, pdl, p.round_kv_score)
        return
    count, columns = kv_score.shape
    parts = torch.empty((config.parts, count, columns), dtype=torch.float32, device=kv_score.device)
    project(p.hidden, weights, parts, config, pdl)
    add(parts, kv_score, pdl, p.round_kv_score)


def project(
    hidden: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    config: Tiling,
    pdl: bool,
    rounded: bool = False,
) -> None:
    """One launch of the product. out: kv_score, or with `config.parts` above 1 parts of it `[parts, T, columns]`."""
    (count, columns), parted = out.shape[-2:], out.dim() == 3
    groups = args.ProjectArguments(
        args.Hidden(hidden, hidden.stride(0), count),
        _weights(weights),
        args.Sums(out, out.stride(-2), out.stride(0) if parted else None),
    )
    tensors = 1 if len(weights) == 1 else 2 if len(weights) == 2 else 4
    values, bits = pack(*flat(groups))
    for stride in (groups.hidden.stride, groups.sums.stride, groups.sums.part, *groups.weights[3::2]):
        bits |= stride or 0
    key = ProjectKey(hidden.shape[1], config, tensors, out.dtype, rounded and not parted)
    tiles = -(-columns // config.columns) * -(-count // config.tokens)
    launcher_of(key, hidden.device)(tiles * config.parts, values, bits, pdl)


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


def add(parts: torch.Tensor, kv_score: torch.Tensor, pdl: bool, rounded: bool) -> None:
    """One launch that makes kv_score of its parts."""
    count, columns = kv_score.shape
    groups = args.AddArguments(parts, count, columns, parts.stride(0), kv_score, kv_score.stride(0))
    values, bits = pack(*groups)
    key = AddKey(parts.shape[0], kv_score.dtype, rounded)
    across = -(-columns // ADDED_AT_ONCE)
    launcher_of(key, kv_score.device)(count * across, values, bits | groups.part | groups.stride | columns, pdl)
