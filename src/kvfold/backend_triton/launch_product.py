"""From checked arguments to the launches that make kv_score from hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..storage.step import Projection
from ..storage.weights import ScaledWeight, Weight
from . import args
from .args import flat
from .keys import AddKey, DequantizeKey, ProjectKey
from .launcher import address, launcher_of, multiprocessors, pack, supports_pdl
from .table import Tiling, scaled_tiling, tiling, whole_rounds
from .variants import ADDED_AT_ONCE, DEQUANTIZED_AT_ONCE


def product_triton(p: Projection, kv_scores: Sequence[torch.Tensor], pdl: bool) -> None:
    """Makes kv_score of each compressor, all in one product where they are side by side."""
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


def _product(p: Projection, weights: tuple[Weight, ...], kv_score: torch.Tensor, pdl: bool) -> None:
    (count, columns), here = kv_score.shape, multiprocessors(kv_score.device)
    in_bf16 = weights
    if p.scaled and scaled_tiling(count, columns) is None:
        in_bf16 = (dequantize(weights, pdl),)
    steps, cut = [(p.hidden, kv_score)], whole_rounds(count, columns, here)
    if cut:
        steps = [(p.hidden[:cut], kv_score[:cut]), (p.hidden[cut:], kv_score[cut:])]
    for hidden, out in steps:
        # Few tokens that a cut leaves take the kernel of a step of so many, which `warmup` makes.
        of_codes = scaled_tiling(len(out), columns) if p.scaled else None
        config = of_codes or tiling(len(out), columns, here)
        _rows(hidden, weights if of_codes else in_bf16, out, config, pdl, p.round_kv_score)


def _rows(
    hidden: torch.Tensor, weights: tuple[Weight, ...], kv_score: torch.Tensor, config: Tiling, pdl: bool, rounded: bool
) -> None:
    """kv_score of these hidden states, by this row of the table: a launch, and where there are parts one that adds them."""
    if config.parts == 1:
        project(hidden, weights, kv_score, config, pdl, rounded)
        return
    parts = torch.empty((config.parts, *kv_score.shape), dtype=torch.float32, device=kv_score.device)
    project(hidden, weights, parts, config, pdl)
    add(parts, kv_score, pdl, rounded)


def dequantize(weights: tuple[Weight, ...], pdl: bool) -> torch.Tensor:
    """One launch that makes bf16 of weights in FP8, one tensor after the other."""
    given = _weights(weights)
    width = given.rows.shape[1]
    made = torch.empty(given.columns, width, dtype=torch.bfloat16, device=given.rows.device)
    values, bits = pack(*flat((given, made)))
    launcher = launcher_of(DequantizeKey(width, _tensors(weights)), made.device)
    launcher(given.columns * -(-width // DEQUANTIZED_AT_ONCE), values, bits | _gaps(given), pdl)
    return made


def project(
    hidden: torch.Tensor, weights: tuple[Weight, ...], out: torch.Tensor, config: Tiling, pdl: bool, rounded: bool = False
) -> None:
    """One launch of the product. out: kv_score, or its parts where there are several, fp32 `[parts, T, columns]`."""
    count, columns = out.shape[-2:]
    sums = args.Sums(out, out.stride(-2), out.stride(0) if config.parts > 1 else None)
    groups = args.ProjectArguments(args.Hidden(hidden, hidden.stride(0), count), _weights(weights), sums)
    values, bits = pack(*flat(groups))
    bits |= groups.hidden.stride | sums.stride | (sums.step or 0) | _gaps(groups.weights)
    key = ProjectKey(hidden.shape[1], config, _tensors(weights), out.dtype, rounded, isinstance(weights[0], ScaledWeight))
    launcher_of(key, hidden.device)(config.tiles(count, columns) * config.parts, values, bits, pdl)


def add(parts: torch.Tensor, kv_score: torch.Tensor, pdl: bool, rounded: bool) -> None:
    """One launch that makes kv_score from its parts."""
    count, columns = kv_score.shape
    given, made = args.Sums(parts, parts.stride(1), parts.stride(0)), args.Sums(kv_score, kv_score.stride(0))
    values, bits = pack(*flat(args.AddArguments(given, columns, made)))
    launcher = launcher_of(AddKey(parts.shape[0], kv_score.dtype, rounded), kv_score.device)
    launcher(count * -(-columns // ADDED_AT_ONCE), values, bits | given.stride | given.step | made.stride, pdl)


def _weights(weights: tuple[Weight, ...]) -> args.Weights:
    """Up to four tensors: from the first one's row 0 a column's row lies as far as their sizes say, and a gap for each cut."""
    scales = [weight.scales for weight in weights if isinstance(weight, ScaledWeight)]
    rows = [weight.codes.view(torch.uint8) if isinstance(weight, ScaledWeight) else weight for weight in weights]
    cuts: list[int | None] = []
    end, columns = rows[0].data_ptr(), 0
    for i, weight in enumerate(rows):
        if i:
            cuts += [columns, (weight.data_ptr() - end) // weight.element_size()]
        end, columns = weight.data_ptr() + weight.nbytes, columns + weight.shape[0]
    if len(weights) == 3:
        cuts += [columns, 0]
    found = args.Weights(rows[0], columns, *cuts)
    if not scales:
        return found
    away = [(x.data_ptr() - scales[0].data_ptr()) // x.element_size() for x in scales[1:]] + [0] * (len(scales) == 3)
    return found._replace(scales=address(scales[0]), **{f"scales_{i}": at for i, at in enumerate(away, 1)})


def _tensors(weights: tuple[Weight, ...]) -> int:
    """How many tensors of weights a kernel is compiled for."""
    return len(weights) if len(weights) < 3 else 4


def _gaps(weights: args.Weights) -> int:
    """All gaps, or-ed."""
    return (weights.gap_1 or 0) | (weights.gap_2 or 0) | (weights.gap_3 or 0)
