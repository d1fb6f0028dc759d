"""From checked arguments to the launches of the forward and of the backward."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from ..backend_triton import args
from ..backend_triton.build import INTERPRETED
from ..backend_triton.launcher import Launcher, address, launcher_of, supports_pdl
from ..spec import CompressorSpec
from .args import Parts
from .keys import keys_of
from .problem import Entries, Gradients, How, Inputs, Recipe, Records, Runs, Sums, scratch_records
from .table import each_of
from .variants import tiles_of


class Launch(NamedTuple):
    launcher: Launcher
    groups: int  # of windows
    each: int  # windows of a group
    tiles: int  # programs of a group, or of an entry


class Launches(NamedTuple):
    """All launches of a call. These may be None: entries, if programs have whole windows; read, without fake quantization;
    either again, or finish and spread; fold, tail and folded without `Runs`, and the last two without fold rows.
    """

    forward: Launch
    entries: Launch | None
    read: Launch | None
    again: Launch | None
    finish: Launch | None
    spread: Launch | None
    fold: Launch | None
    tail: Launch | None
    folded: Launch | None
    sum: Launch


def forward_triton(x: Inputs, how: How, out: torch.Tensor | None = None) -> Entries:
    """Entries, latents and the kept fold, or None, after the arguments were checked. One launch; one more where programs share
    windows, and one with fake quantization, which reads the records. out: memory for the entries.
    """
    spec, device = how.spec, x.value.device
    capacity = x.value.shape[0] // spec.ratio
    kept = torch.empty((3, capacity, spec.head_dim), dtype=torch.float32, device=device) if how.keeps else None
    latent = torch.empty((capacity, spec.head_dim), dtype=how.out_dtype, device=device) if how.latent else None
    entries = torch.empty((capacity, spec.head_dim), dtype=how.out_dtype, device=device) if out is None else out
    if not capacity:
        return Entries(entries, latent, kept)
    chosen, pdl = _launches(x, how, capacity), supports_pdl(device)
    records = None if how.fmt is None else scratch_records(x, how)
    pieces, pieces_bits = _pieces(x, capacity)
    tokens, bits = _tokens(x.value, x.score, x.ape)
    finish, finish_bits = _finish(x)
    output = _output(entries, records, (address(latent), *finish))
    held = (address(kept), capacity * spec.head_dim) if how.keeps else (None, None)
    # All that is made here is aligned.
    bits |= pieces_bits | finish_bits | output.page_stride | output.scales_stride
    _launch(chosen.forward, capacity, (*pieces, *tokens, *output, *held), bits, pdl)
    if chosen.entries is not None:
        _launch(chosen.entries, capacity, (*pieces, *output, *held), bits, pdl)
    if records is not None:
        read_records(x, how, records, entries)
    return Entries(entries, latent, kept)


def read_records(x: Inputs, how: How, records: Records, entries: torch.Tensor) -> None:
    """Writes to `entries` what attention reads of the records of a call: one launch."""
    capacity, device = how.capacity(x), x.value.device
    (pieces, bits), output = _pieces(x, capacity), _output(entries, records, (None, None, None, 0))
    bits |= output.page_stride | output.scales_stride
    read = _launches(x, how, capacity).read
    _launch(read, capacity, (*pieces, *output, address(entries)), bits, supports_pdl(device))


def backward_triton(
    x: Inputs,
    how: How,
    kept: torch.Tensor | None,
    d_entries: torch.Tensor,
    d_latent: torch.Tensor | None,
    given: Sums | None = None,
) -> Gradients:
    """The gradients of all inputs, after the arguments were checked. Two launches, or three where the fold was kept; one less
    if sums are given, which are continued and not yet added.
    """
    spec, device = how.spec, x.value.device
    capacity, head_dim = x.value.shape[0] // spec.ratio, spec.head_dim
    chosen, pdl = _launches(x, how, capacity, given is not None), supports_pdl(device)
    of_ape, of_weight = chosen.again or chosen.spread, chosen.again or chosen.finish
    d_value, d_score = _dense_like(x.value), _dense_like(x.score)
    # The groups' sums for ape and for norm_weight, then gradients of pooled rows: multiples of 16 numbers, as entries have.
    pooled = 0 if chosen.again is not None else capacity * head_dim
    if given is None:
        d_ape, d_norm_weight = _new_weights(x, spec)
        first = of_ape.groups * spec.ratio * spec.channels if spec.has_ape else 0
        at = first + of_weight.groups * head_dim
        scratch = d_norm_weight.new_empty(at + pooled)
        ape, weight = _part(scratch, 0) if spec.has_ape else None, _part(scratch, first)
        ape_groups, weight_groups = (of_ape.groups, of_ape.each, None), (of_weight.groups, of_weight.each, None)
    else:
        d_ape, d_norm_weight, at = given.ape, given.norm_weight, 0
        scratch = torch.empty(pooled, dtype=torch.float32, device=device)
        ape, weight = address(given.ape), address(given.norm_weight)
        ape_groups, weight_groups = (
            (runs.rows.shape[0], runs.windows, address(runs.rows)) for runs in (given.of_ape, given.of_weight)
        )

    (pieces, pieces_bits), (finish, finish_bits) = _pieces(x, capacity), _finish(x)
    tokens, bits = _tokens(x.value, x.score, x.ape)
    gradients, gradients_bits = _tokens(d_value, d_score, None)
    entries, latent = address(d_entries), address(d_latent)
    bits |= pieces_bits | finish_bits | gradients_bits
    if not INTERPRETED:
        bits |= entries | (latent or 0)
    if chosen.again is not None:
        values = *pieces, *tokens, *finish, entries, latent, None, *gradients, ape, weight, *ape_groups
        _launch(chosen.again, ape_groups[0], values, bits, pdl)
    else:
        held, dy = (address(kept), capacity * head_dim), _part(scratch, at)
        if not INTERPRETED:
            bits |= held[0]
        values = *pieces, *finish, *held, entries, latent, dy, None, weight, *weight_groups
        _launch(chosen.finish, weight_groups[0], values, bits, pdl)
        values = *pieces, *tokens, *held, None, None, dy, *gradients, ape, None, *ape_groups
        _launch(chosen.spread, ape_groups[0], values, bits, pdl)
    if given is None:
        _sum(chosen.sum, ape, weight, d_ape, d_norm_weight, 0, pdl)
    return Gradients(d_value, d_score, d_ape, d_norm_weight)


def tail_triton(x: Inputs, how: How, tails: torch.Tensor, folds: torch.Tensor, out: torch.Tensor) -> None:
    """Folds of tokens whose windows end elsewhere: one launch."""
    (tokens, bits), places = _tokens(x.value, x.score, x.ape), (address(tails), address(folds), address(out))
    launch = _launches(x, how, len(tails), True).tail
    values = places[0], *tokens, *places[1:]
    _launch(launch, len(tails), values, bits | _bits(*places), supports_pdl(x.value.device))


def finish_triton(x: Inputs, how: How, live: Inputs, folds: torch.Tensor) -> Entries:
    """Entries of windows that continue from fold rows, and what is kept of them: one launch, or two with fake quantization."""
    spec, device, capacity = how.spec, x.value.device, how.capacity(x)
    kept = torch.empty(how.kept_shape(x), dtype=torch.float32, device=device)
    entries = torch.empty(capacity, spec.head_dim, dtype=how.out_dtype, device=device)
    records = None if how.fmt is None else scratch_records(x, how)
    (pieces, pieces_bits), (finish, finish_bits) = _pieces(live, capacity), _finish(x)
    tokens, bits = _tokens(live.value, live.score, live.ape)
    rows, output = address(folds), _output(entries, records, (None, *finish))
    bits |= pieces_bits | finish_bits | _bits(rows, output.page_stride, output.scales_stride)
    values = *pieces, *tokens, rows, *output, address(kept), kept.stride(0)
    _launch(_launches(x, how, capacity, True).folded, capacity, values, bits, supports_pdl(device))
    if records is not None:
        read_records(x, how, records, entries)
    return Entries(entries, None, kept)


def pull_triton(x: Inputs, how: How, kept: torch.Tensor, d_entries: torch.Tensor, sums: Sums) -> torch.Tensor:
    """The first half of the backward, where the fold was kept: one launch. Continues the sums for norm_weight."""
    device, capacity = x.value.device, how.capacity(x)
    pooled = torch.empty(capacity, how.spec.head_dim, dtype=torch.float32, device=device)
    (pieces, pieces_bits), (finish, finish_bits) = _pieces(x, capacity), _finish(x)
    held, entries, parts = (address(kept), kept.stride(0)), address(d_entries), _runs(None, sums.norm_weight, sums.of_weight)
    bits = pieces_bits | finish_bits | _bits(*held, entries)
    values = *pieces, *finish, *held, entries, None, address(pooled), *parts
    _launch(_launches(x, how, capacity, True).finish, parts.groups, values, bits, supports_pdl(device))
    return pooled


def spread_triton(x: Inputs, how: How, rows: torch.Tensor, sums: Sums) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The other half, from `rows` `[3, capacity, head_dim]`: one launch. Continues the sums for ape."""
    device, capacity = x.value.device, how.capacity(x)
    d_value, d_score = _dense_like(x.value), _dense_like(x.score)
    pieces, pieces_bits = _pieces(x, capacity)
    tokens, bits = _tokens(x.value, x.score, x.ape)
    gradients, gradients_bits = _tokens(d_value, d_score, None)
    # The kernel reads no inverse sums, in whose place the gradients lie.
    held, pooled, parts = (address(rows), rows.stride(0)), address(rows[1]), _runs(sums.ape, None, sums.of_ape)
    bits |= pieces_bits | gradients_bits | _bits(*held, pooled)
    values = *pieces, *tokens, *held, None, None, pooled, *gradients, *parts
    _launch(_launches(x, how, capacity, True).spread, parts.groups, values, bits, supports_pdl(device))
    return d_value, d_score


def _runs(ape: torch.Tensor | None, weight: torch.Tensor | None, runs: Runs) -> Parts:
    """Sums that a launch continues."""
    return Parts(address(ape), address(weight), runs.rows.shape[0], runs.windows, address(runs.rows))


def fold_triton(x: Inputs, how: How, sums: torch.Tensor, recipe: Recipe, out: torch.Tensor) -> None:
    """Writes a recipe's rows to `out` `[n, width]`, fp32, of a dense tensor of sums: one launch."""
    count, width = out.shape
    if out.numel():
        launch, places = _launches(x, how, how.capacity(x), True).fold, (address(sums), address(out))
        values = places[0], address(recipe.rows), address(recipe.items), width, places[1]
        tiles, pdl = -(-width // launch.tiles), supports_pdl(x.value.device)
        launch.launcher(count * tiles, values, _bits(*places), pdl)


def total_triton(
    x: Inputs, how: How, capacity: int, ape: torch.Tensor | None, norm_weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of weights, from the sums of all blocks: one launch."""
    device = x.value.device
    d_ape, d_norm_weight = _new_weights(x, how.spec)
    ape, weight = address(ape), address(norm_weight)
    _sum(_launches(x, how, capacity, True).sum, ape, weight, d_ape, d_norm_weight, _bits(ape, weight), supports_pdl(device))
    return d_ape, d_norm_weight


def _dense_like(x: torch.Tensor | None) -> torch.Tensor | None:
    """Rows one behind the other: kept strides may be columns, where rows of the input overlap."""
    return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def _new_weights(x: Inputs, spec: CompressorSpec) -> tuple[torch.Tensor | None, torch.Tensor]:
    d_ape = torch.empty_like(x.ape) if spec.has_ape else None
    return d_ape, torch.empty(spec.head_dim, dtype=torch.float32, device=x.value.device)


def _sum(
    launch: Launch, ape: object, weight: object, d_ape: torch.Tensor | None, d_weight: torch.Tensor, bits: int, pdl: bool
) -> None:
    _launch(launch, 1, (ape, weight, 1, 1, None, address(d_ape), address(d_weight)), bits, pdl)


def _launches(x: Inputs, how: How, capacity: int, runs: bool = False) -> Launches:
    types = x.value.dtype, x.score is not None, x.norm_weight.dtype
    return launches_of(how, types, capacity, x.value.device, runs)


@lru_cache(maxsize=1024)
def launches_of(how: How, types: tuple, capacity: int, device: torch.device, runs: bool = False) -> Launches:
    """The launches of a call; remembered, as hashing keys takes longer than a launch."""
    found = {}
    for kernel, key in keys_of(how, types, capacity, runs).items():
        found[kernel] = Launch(launcher_of(key, device), key.groups, each_of(key.groups or 1, capacity), tiles_of(key))
    return Launches(*(found.get(name) for name in Launches._fields))


def _launch(launch: Launch, count: int, values: tuple, bits: int, pdl: bool) -> None:
    """Launches a program, or `tiles` of them, for each of `count`. Dependent launches wait for all earlier ones, and read past
    the L1 cache what those may have written.
    """
    launch.launcher(count * launch.tiles, values, bits, pdl)


def _bits(*values: object) -> int:
    """Addresses, or-ed; 0 for the tensors of interpreted kernels."""
    bits = 0
    for value in values:
        if value.__class__ is int:
            bits |= value
    return bits


def _part(scratch: torch.Tensor, at: int) -> object:
    """The part of a new tensor that begins with number `at`."""
    return scratch[at:] if INTERPRETED else scratch.data_ptr() + 4 * at


def _pieces(x: Inputs, capacity: int) -> tuple[tuple, int]:
    """`args.Pieces`, and their address for `bits`."""
    if INTERPRETED:
        return (x.pieces, x.pieces.shape[0], capacity), 0
    at = x.pieces.data_ptr()
    return (at, x.pieces.shape[0], capacity), at


def _finish(x: Inputs) -> tuple[tuple, int]:
    """Norm weight, RoPE table and its length; and their addresses, or-ed."""
    length = 0 if x.rope is None else x.rope.shape[0]
    if INTERPRETED:
        return (x.norm_weight, x.rope, length), 0
    weight, rope = x.norm_weight.data_ptr(), None if x.rope is None else x.rope.data_ptr()
    return (weight, rope, length), weight | (rope or 0)


def _output(entries: torch.Tensor, records: Records | None, finish: tuple) -> args.Output:
    """Where entries go: plain rows are records of one page. finish: latents, and `_finish`."""
    if records is None:
        pages, rows = entries.view(torch.uint8) if INTERPRETED else entries, entries.shape[0]
        return args.Output(None, *finish, address(pages), 0, None, 0, rows, rows, None)
    pages, scales, scale, rows = records.pages, records.scale_pages, records.scale_tensor, records.rows_per_page
    apart = None, 0
    if scales is not None:
        apart = address(scales), scales.stride(0)
    slots, at = rows * pages.shape[0], None if scale is None else scale.data_ptr()
    return args.Output(None, *finish, address(pages), pages.stride(0), *apart, rows, slots, at)


def _tokens(value: torch.Tensor, score: torch.Tensor | None, ape: torch.Tensor | None) -> tuple[tuple, int]:
    """`backend_triton.args.Tokens`; and what of them must be a multiple of 16, or-ed."""
    apart = skew = None
    stride, bits = value.stride(0), 0
    if score is not None:
        apart, skew = (score.data_ptr() - value.data_ptr()) // value.element_size(), score.stride(0) - stride
        bits = apart | skew
    if INTERPRETED:
        return (value, stride, value.shape[0], ape, apart, skew), 0
    at, of_ape = value.data_ptr(), None if ape is None else ape.data_ptr()
    return (at, stride, value.shape[0], of_ape, apart, skew), bits | at | stride | (of_ape or 0)
