"""From checked arguments to the launches that make kv_score of hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..storage.fold_state import FoldState
from ..storage.remembered import RememberingState
from ..storage.step import Compressor, Outputs, PlanData, Projection
from . import args
from .args import flat
from .keys import AddKey, Parts, ProjectKey, is_short
from .launch import compress_triton, use_pdl
from .launcher import launcher_of, pack, supports_pdl
from .table import Tiling, tiling
from .variants import ADDED_AT_ONCE

LEAST_COUNTS = 1024  # tiles, of which most calls have fewer


def project_triton(p: Projection, c: Compressor, plan: PlanData, out: Outputs, pdl: bool | None) -> None:
    """A short step, after its arguments were checked: kv_score in parts, which `compress` adds up as it reads them."""
    whole = c.value
    config = tiling(*whole.shape)
    parts = whole.as_strided((config.parts, *whole.shape), (whole.numel(), *whole.stride()))
    project(p.hidden, p.weights[0], config, use_pdl(pdl, plan, p.hidden.device), parts=parts)
    compress_triton(c, plan, out, pdl, Parts(config.parts, p.round_kv_score, parts.stride(0), config.early))


def parts_of(p: Projection, compressors: Sequence[Compressor], plan: PlanData) -> int:
    """In how many parts a call may leave kv_score; 0 where it must be whole.

    Input rows are read more than once, and kept: to add up their parts each time takes longer than to do it once.
    """
    c, count = compressors[0], p.hidden.shape[0]
    if len(compressors) > 1 or c.kv_score is not None or not count:
        return 0
    config = tiling(count, c.spec.kv_score_width)
    parts = config.parts
    if parts == 1 or config.adds != "reader" or not isinstance(c.state, FoldState) or not isinstance(plan, PlanData) or not plan.item_capacity:
        return 0
    return parts if c.state.kind == "fold" and is_short("fold", c.state.spec, plan.max_new_tokens) else 0


def product_triton(p: Projection, kv_scores: Sequence[torch.Tensor], pdl: bool, state: object = None) -> None:
    """kv_score of each compressor: one launch for all that are side by side. state: what keeps scratch for the next call."""
    pdl = pdl and supports_pdl(p.hidden.device)
    whole = side_by_side(kv_scores)
    if whole is not None and len(kv_scores) > 1:
        _product(p, tuple(weight for weights in p.weights for weight in weights), whole, pdl, state)
        return
    for weights, kv_score in zip(p.weights, kv_scores, strict=True):
        _product(p, weights, kv_score, pdl, state)


def side_by_side(kv_scores: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """One tensor of all columns, where they are neighbours in the same rows."""
    first = kv_scores[0]
    stride, at, columns = first.stride(0), first.data_ptr(), 0
    for x in kv_scores:
        if x.dtype is not first.dtype or x.stride(0) != stride or x.data_ptr() != at + columns * x.element_size():
            return None
        columns += x.shape[1]
    return first.as_strided((first.shape[0], columns), (stride, 1)) if columns <= stride else None


def _product(p: Projection, weights: tuple[torch.Tensor, ...], kv_score: torch.Tensor, pdl: bool, state: object) -> None:
    config = tiling(*kv_score.shape)
    parts = done = None
    if config.parts > 1:
        parts = torch.empty((config.parts, *kv_score.shape), dtype=torch.float32, device=kv_score.device)
        if config.adds != "last":
            project(p.hidden, weights, config, pdl, parts=parts)
            add(parts, kv_score, config.early, pdl, p.round_kv_score)
            return
        done = _counts(state, config.tiles(*kv_score.shape), kv_score.device)
    project(p.hidden, weights, config, pdl, kv_score, parts, done, p.round_kv_score)


def add(parts: torch.Tensor, kv_score: torch.Tensor, early: bool, pdl: bool, rounded: bool) -> None:
    """One launch that makes kv_score of its parts."""
    count, columns = kv_score.shape
    groups = args.Parts(parts, parts.stride(1), parts.stride(0)), count, columns, args.Sums(kv_score, kv_score.stride(0))
    values, bits = pack(*flat(groups))
    launcher = launcher_of(AddKey(parts.shape[0], kv_score.dtype, rounded, early), kv_score.device)
    launcher(count * -(-columns // ADDED_AT_ONCE), values, bits | parts.stride(0) | parts.stride(1) | kv_score.stride(0), pdl)


def early_of(p: Projection, compressors: Sequence[Compressor]) -> Parts:
    """Whether the launch behind the product lets the next one begin at once."""
    columns = sum(c.spec.kv_score_width for c in compressors)
    return Parts(early=tiling(p.hidden.shape[0], columns).early)


def _counts(state: object, tiles: int, device: torch.device) -> torch.Tensor:
    """How many programs of each tile are done, zero between calls. Kept by a state, as scratch of `compress` is."""
    if not isinstance(state, RememberingState):
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    for made in state._counts[-1:]:
        if made.shape[0] >= tiles and made.device == device:
            return made
    made = torch.zeros(max(tiles, LEAST_COUNTS), dtype=torch.int32, device=device)
    if not (made.is_cuda and torch.cuda.is_current_stream_capturing()):  # else it is zeroed by replays of the graph alone
        state._counts.append(made)
    return made


def project(
    hidden: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    config: Tiling,
    pdl: bool,
    kv_score: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
    done: torch.Tensor | None = None,
    rounded: bool = False,
) -> None:
    """One launch of the product. parts: fp32 `[parts, T, columns]`, where there are parts; without `kv_score` all it makes."""
    out = parts if kv_score is None else kv_score
    count, columns = out.shape[-2:]
    groups = args.ProjectArguments(
        args.Hidden(hidden, hidden.stride(0), count),
        _weights(weights),
        args.Parts() if parts is None else args.Parts(parts, parts.stride(1), parts.stride(0), done),
        args.Sums() if kv_score is None else args.Sums(kv_score, kv_score.stride(0)),
    )
    tensors = 1 if len(weights) == 1 else 2 if len(weights) == 2 else 4
    values, bits = pack(*flat(groups))
    for stride in (groups.hidden.stride, groups.sums.stride, groups.parts.stride, groups.parts.step, *groups.weights[3::2]):
        bits |= stride or 0
    key = ProjectKey(hidden.shape[1], config, tensors, None if kv_score is None else kv_score.dtype, rounded)
    launcher_of(key, hidden.device)(config.tiles(count, columns) * config.parts, values, bits, pdl)


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
