"""The torch backend of training: any device, fp64 too, vectorized over entries. Kernels are to be read beside it.

Nothing here is differentiated by torch: the gradient is written out, and `gradcheck` compares it with differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from ..backend_torch.finish import norm, tree_sum, turn
from ..backend_torch.fold import LOG2_E, LOWEST, State, exp2, fold_group, fold_step
from ..contract import ROWS_AT_ONCE
from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.pack import pack_records, to_bf16, unpack_records
from .problem import Entries, Gradients, How, Inputs, Sums, scratch_records
from .pure_sums import blocks, go_on, new_sums, total_torch


class Row(NamedTuple):
    """Row j of the window of every entry: where it is, and what it brings.

    live: bool `[capacity]`, whether it is there. at: its row of kv_score, int64. half: its channels. k, s: value and score with
    ape, `[capacity, head_dim]`.
    """

    live: torch.Tensor
    at: torch.Tensor
    half: slice
    k: torch.Tensor
    s: torch.Tensor


def forward_torch(x: Inputs, how: How) -> Entries:
    """Entries, latents and the kept fold, after the arguments were checked."""
    return _deliver(x, how, *pool(x, how))


def finish_torch(x: Inputs, how: How, live: Inputs, folds: torch.Tensor) -> Entries:
    """The same of windows that go on from fold rows `[capacity, 3, head_dim]` (run.py: `finish`)."""
    token, _, _, begin = live.pieces[: len(folds)].long().unbind(1)
    m, l, a = _fold_on(live, how.spec, folds.unbind(1), token, begin, torch.full_like(begin, how.spec.ratio))
    return _deliver(x, how, m, 1.0 / l, a / l)


def tail_torch(x: Inputs, how: How, tails: torch.Tensor, folds: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the folds of tails (run.py: `fold_tails`)."""
    token, before, begin, end = tails.long().unbind(1)
    empty = folds.new_zeros(3, how.spec.head_dim)
    empty[0] = LOWEST
    state = torch.where((before >= 0)[:, None, None], folds[before.clamp(min=0)], empty).unbind(1)
    out.copy_(torch.stack(_fold_on(x, how.spec, state, token, begin, end), dim=1))


def _fold_on(
    x: Inputs, spec: CompressorSpec, state: State, token: torch.Tensor, begin: torch.Tensor, end: torch.Tensor
) -> State:
    """Folds the tokens of windows from places `begin` to before `end`; the first of each is row `token`."""
    value, score = (x.value, x.score) if x.score is not None else x.value.split(spec.channels, dim=1)
    for j in range(spec.ratio):
        there = ((j >= begin) & (j < end))[:, None]
        at = torch.where(there[:, 0], token + j - begin, token)
        k, s = value[at].to(x.wide), score[at].to(x.wide)
        new = fold_step(state, k, s if x.ape is None else s + x.ape[j])
        state = tuple(torch.where(there, after, before) for after, before in zip(new, state, strict=True))
    return state


def _deliver(x: Inputs, how: How, m: torch.Tensor, inverse: torch.Tensor, y: torch.Tensor) -> Entries:
    spec, capacity = how.spec, how.capacity(x)
    there, position = _places(x, spec, capacity)
    kept = torch.where(there, torch.stack([m, inverse, y]), 0.0) if how.keeps else y.new_empty(0)
    normed = norm(y, spec, x.norm_weight, how.record)
    latent = _narrow(torch.where(there, normed, 0.0), how.out_dtype) if how.latent else y.new_empty(0, dtype=how.out_dtype)
    done = turn(normed, spec, _rotations(x), position, how.record)
    if how.fmt is None:
        return Entries(_narrow(torch.where(there, done, 0.0), how.out_dtype), latent, kept)
    records, slots = scratch_records(x, how), torch.arange(capacity, device=y.device)
    pack_records(records, slots, torch.where(there, done, 0.0))
    return Entries(_narrow(torch.where(there, unpack_records(records, slots), 0.0), how.out_dtype), latent, kept)


def backward_torch(
    x: Inputs,
    how: How,
    kept: torch.Tensor,
    d_entries: torch.Tensor,
    d_latent: torch.Tensor | None,
    sums: Sums | None = None,
) -> Gradients:
    """The gradients of all inputs, after the arguments were checked; with sums that are given, these go on."""
    capacity, given = how.capacity(x), sums or new_sums(x, how, how.capacity(x))
    m, inverse, y = kept if how.keeps else pool(x, how)
    pooled = pull_torch(x, how, inverse if how.spec.gate else None, y, d_entries, d_latent, given)
    value, score = spread_torch(x, how, m, y, pooled, given)
    ape, norm_weight = given.ape, given.norm_weight
    if sums is None:
        ape, norm_weight = total_torch(x, how, *blocks(how, capacity, ape, norm_weight))
    return Gradients(value, score, ape, norm_weight)


def pull_torch(
    x: Inputs,
    how: How,
    inverse: torch.Tensor | None,
    y: torch.Tensor,
    d_entries: torch.Tensor,
    d_latent: torch.Tensor | None,
    sums: Sums,
) -> torch.Tensor:
    """The gradients of pooled rows, divided by the sums of weights if there are any; goes on with the sums for norm_weight."""
    there, _ = _places(x, how.spec, how.capacity(x))
    dy, share = pull_back(x, how, y, d_entries, d_latent)
    dy, share = torch.where(there, dy, 0.0), torch.where(there, share, 0.0)
    go_on(sums.norm_weight, share, sums.of_weight)
    return dy if inverse is None else dy * inverse


def spread_torch(
    x: Inputs, how: How, m: torch.Tensor, y: torch.Tensor, pooled: torch.Tensor, sums: Sums
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of kv_score, of what `pull_torch` gave; goes on with the sums for ape."""
    spec, tokens = how.spec, x.value.shape[0]
    # A row more than there are, where what is of no token goes.
    whole = torch.zeros(tokens + 1, spec.kv_score_width, dtype=x.value.dtype, device=y.device)
    d_value, d_score = whole[:, : spec.channels], whole[:, spec.channels :]
    added = None if sums.ape is None else sums.ape.view(-1, spec.ratio, spec.channels)
    for j, row in enumerate(_rows(x, spec)):
        at, live = torch.where(row.live, row.at, tokens), row.live[:, None]
        if not spec.gate:
            d_value[at] = _narrow(torch.where(live, pooled, 0.0), x.value.dtype)
            continue
        dk = torch.where(live, _weight(row.s, m) * pooled, 0.0)
        ds = torch.where(live, dk * (row.k - y), 0.0)
        d_value[at, row.half] = _narrow(dk, x.value.dtype)
        d_score[at, row.half] = _narrow(ds, x.value.dtype)
        if added is not None:
            go_on(added[:, j % spec.ratio, row.half], ds, sums.of_ape)
    if x.score is None:
        return whole[:tokens], None
    return d_value[:tokens].contiguous(), d_score[:tokens].contiguous()


def pull_back(
    x: Inputs, how: How, y: torch.Tensor, d_entries: torch.Tensor, d_latent: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the gradients of entries and latents to that of pooled rows `y`, and each entry's share of norm_weight's.

    Roundings and quantization pass the gradient as it is.
    """
    spec, wide = how.spec, y.dtype
    exact = replace(how.record, round_normed=False)
    _, position = _places(x, spec, y.shape[0])
    g = d_entries.to(wide)
    if spec.hadamard:  # its own transpose
        g = turn(g, replace(spec, rope_dim=0), None, position, exact)
    if spec.rope_dim:  # turned the other way
        cos, sin = _rotations(x).chunk(2, dim=1)
        g = turn(g, replace(spec, hadamard=False), torch.cat([cos, -sin], dim=1), position, exact)
    if d_latent is not None:
        g = g + d_latent.to(wide)
    if how.round_rows:
        y = y.bfloat16().to(wide)
    scale = (1.0 / torch.sqrt(tree_sum(y * y) * (1.0 / spec.head_dim) + spec.norm_eps))[:, None]
    normed, weighted = y * scale, g * x.norm_weight.to(wide)
    dot = (tree_sum(weighted * normed) * (1.0 / spec.head_dim))[:, None]
    return (weighted - normed * dot) * scale, g * normed


def pool(x: Inputs, how: How) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest score, the inverse of the sum of weights and the pooled row of each entry, `[capacity, head_dim]`."""
    spec = how.spec
    rows = _rows(x, spec)
    if not spec.gate:
        y = next(rows).k
        return y, y, y
    shape = how.capacity(x), spec.head_dim
    zeros = torch.zeros(shape, dtype=x.wide, device=x.value.device)
    if zeros.dtype == torch.float64:  # to check gradients by: the plain formula
        found = [*rows]
        score = torch.stack([row.s for row in found])
        m = score.amax(0)
        weights = torch.exp(score - m)
        l = weights.sum(0)
        return m, 1.0 / l, (weights * torch.stack([row.k for row in found])).sum(0) / l
    state = torch.full_like(zeros, LOWEST), zeros, zeros
    if state_kind(spec) == "fold":
        for row in rows:
            state = fold_step(state, row.k, row.s)
    else:
        state, found = None, [*rows]
        for j in range(0, len(found), ROWS_AT_ONCE):
            group = found[j : j + ROWS_AT_ONCE]
            state = fold_group(state, torch.stack([row.k for row in group], -2), torch.stack([row.s for row in group], -2))
    m, l, a = state
    return m, 1.0 / l, a / l


def _rows(x: Inputs, spec: CompressorSpec) -> Iterator[Row]:
    """The rows of all windows, in the order of positions."""
    pieces = x.pieces[: x.value.shape[0] // spec.ratio].long()
    value, score = (x.value, x.score) if x.score is not None or not spec.gate else x.value.split(spec.channels, dim=1)
    before = spec.ratio * spec.overlap
    for j in range(spec.window_rows):
        live = pieces[:, 1] >= (1 if j < before else 0)
        at = torch.where(live, pieces[:, 0] + (j - before), 0)
        half = slice(0, spec.head_dim) if j < before else slice(spec.channels - spec.head_dim, spec.channels)
        # What is not there weighs nothing, and adding -0 changes no bit.
        k = torch.where(live[:, None], value[at, half].to(x.wide), -0.0)
        s = k
        if spec.gate:
            s = score[at, half].to(x.wide)
            s = torch.where(live[:, None], s if x.ape is None else s + x.ape[j % spec.ratio, half], -math.inf)
        yield Row(live, at, half, k, s)


def _weight(s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """e to the power of a score less the largest."""
    return torch.exp(s - m) if s.dtype == torch.float64 else exp2((s - m) * LOG2_E)


def _places(x: Inputs, spec: CompressorSpec, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are entries, `[capacity, 1]`, and the position that RoPE turns each by."""
    window = x.pieces[:capacity, 1].long()
    return (window >= 0)[:, None], window.clamp(min=0) * spec.ratio


def _rotations(x: Inputs) -> torch.Tensor | None:
    """The table of RoPE, with a row at least: rows that are no entries are turned by its first one, also if all are such."""
    return x.rope if x.rope is None or len(x.rope) else x.rope.new_zeros(1, x.rope.shape[1])


def _narrow(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to nearest even, with one NaN."""
    return to_bf16(y) if dtype == torch.bfloat16 else y.to(dtype)
