"""Training with sequences that are cut over ranks: entries of a rank's tokens, and all ranks' entries, with gradients.

Over fold rows ranks send folds of windows across a cut (folds.py). Otherwise they send the rows that these need, and their
gradients come back: each half of a row is used by one window, so its gradient is that of one rank, and nothing is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..arguments.checks import check_memory
from ..spec import CompressorSpec
from ..training import problem
from ..training.checks import check_call
from ..training.problem import Gradients, How, Inputs, Sums
from ..training.run import backward, finish, forward
from .fold_training import carried, pass_on, pull_heads, small_tokens, spread_all
from .folds import CutFolds, folds_of
from .halo import CutPacking, Rows
from .transport import Parcel, Transport
from .weights import Weights

Tokens = tuple[torch.Tensor, ...]  # one tensor, or values and scores


class Call(NamedTuple):
    """What is no tensor. options: of `training.compress_forward` and `compress_backward` both. weights: see `entries`."""

    packing: CutPacking
    transport: Transport
    spec: CompressorSpec
    options: dict[str, Any]
    cache_scale: torch.Tensor | None
    weights: str


class Parameters(NamedTuple):
    """As `training.compress` takes them."""

    ape: torch.Tensor | None
    norm_weight: torch.Tensor
    rope: torch.Tensor | None


class Entries(torch.autograd.Function):
    """The entries that a rank owns."""

    @staticmethod
    def forward(ctx, call: Call, ape, norm_weight, rope, *tokens: torch.Tensor) -> torch.Tensor:
        packing, given = call.packing, Parameters(ape, norm_weight, rope)
        x, how = _checked(call, given, packing.inside, tokens)  # all arguments, before anything is sent
        at_seams = packing.seam_entries
        # One tensor, as to put two together would copy all entries.
        entries = tokens[0].new_empty(at_seams + how.capacity(x), call.spec.head_dim, dtype=how.out_dtype)
        inside = forward(x, how, out=entries[at_seams:])
        folds = folds_of(packing, call.spec, tokens[0].dtype)
        seams, small = _seams(call, given, tokens) if folds is None else (_folded(call, given, folds, x, how, tokens), ())
        kept = [inside.kept]
        if seams is not None:
            entries[:at_seams] = seams.entries[:at_seams]
            kept.append(seams.kept)
        ctx.call, ctx.count = call, len(tokens)
        ctx.save_for_backward(ape, norm_weight, rope, *tokens, *small, *kept)
        entries.resize_(packing.entries, call.spec.head_dim)  # not a slice: autograd lets nobody write to a view
        return entries if packing.order is None else entries[packing.order]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_entries: torch.Tensor):
        check_memory("d_entries", d_entries)
        call, packing, count = ctx.call, ctx.call.packing, ctx.count
        *given, rest = *ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        given, tokens, kept = Parameters(*given), rest[:count], rest[len(rest) - (1 if packing.seams is None else 2) :]
        small = rest[count : len(rest) - len(kept)]
        if packing.order is not None:
            d_entries = torch.empty_like(d_entries).index_copy_(0, packing.order, d_entries)
        at_seams, whole = d_entries.split([packing.seam_entries, packing.inside_entries])
        x, how = _checked(call, given, packing.inside, tokens)
        folds = folds_of(packing, call.spec, tokens[0].dtype)
        weights = Weights(x, how, packing, folds)
        if folds is None:
            d_tokens = _backward_rows(call, given, how, x, small, kept, (at_seams, whole), weights)
        else:
            d_tokens = _backward_folds(call, given, how, x, folds, tokens, kept, (at_seams, whole), weights)
        d_ape, d_norm_weight = weights.gradients(call.transport, call.weights)
        return None, d_ape, d_norm_weight.to(given.norm_weight.dtype), None, *d_tokens


class AllEntries(torch.autograd.Function):
    """The entries of all ranks, in the order of one process; the gradient of an entry is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx, packing: CutPacking, transport: Transport, entries: torch.Tensor) -> torch.Tensor:
        ctx.packing, ctx.transport = packing, transport
        counts = [len(numbers) for numbers in packing.numbers]
        found = entries.new_zeros(sum(counts), entries.shape[1])
        if not len(found):
            return found
        padded = entries.new_zeros(max(counts), entries.shape[1])
        padded[: len(entries)] = entries
        data = padded.view(torch.uint8).flatten()
        for numbers, theirs in zip(packing.numbers, transport.gather(data, "entries"), strict=True):
            found[numbers] = theirs.view(entries.dtype).view(padded.shape)[: len(numbers)]
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_all: torch.Tensor):
        packing, transport = ctx.packing, ctx.transport
        mine = d_all[packing.numbers[transport.rank]]
        others = [rank for rank in range(transport.size) if rank != transport.rank]
        sent = [Parcel(rank, d_all[packing.numbers[rank]].contiguous()) for rank in others if len(packing.numbers[rank])]
        received = {rank: torch.empty_like(mine) for rank in others if len(mine)}
        transport.exchange(sent, [Parcel(*one) for one in received.items()], "gradients of entries")
        total = torch.zeros_like(mine, dtype=torch.promote_types(mine.dtype, torch.float32))
        for rank in range(transport.size):  # one order on every rank
            total += received.get(rank, mine)
        return None, None, total.to(d_all.dtype)


def _seams(call: Call, given: Parameters, tokens: Sequence[torch.Tensor]) -> tuple[problem.Entries | None, Tokens]:
    """Of raw rows: windows at seams, and the small tensors that they are made of."""
    small = _seam_tokens(call, tokens)
    seams = call.packing.seams
    return None if seams is None else forward(*_checked(call, given, seams, small)), small


def _folded(
    call: Call, given: Parameters, folds: CutFolds, x: Inputs, how: How, tokens: Sequence[torch.Tensor]
) -> problem.Entries | None:
    """Of fold rows: windows at seams."""
    found = carried(folds, x, how, call.transport)
    if found is None:
        return None
    return finish(_heads(call, given, tokens), how, x._replace(pieces=folds.heads.pieces), found)


def _heads(call: Call, given: Parameters, tokens: Sequence[torch.Tensor]) -> Inputs:
    """Of the windows at seams, for what reads no tokens."""
    seams = call.packing.seams
    none = [x.new_empty(seams.tokens, x.shape[1]) for x in tokens]
    return _checked(call, given, seams, none)[0]


def _backward_rows(
    call: Call,
    given: Parameters,
    how: How,
    x: Inputs,
    small: Tokens,
    kept: Sequence[torch.Tensor],
    d_entries: Sequence[torch.Tensor],
    weights: Weights,
) -> Tokens:
    """The gradients of tokens where ranks send raw rows. kept, d_entries: of windows inside, and at seams; the other way."""
    d_small = small
    if call.packing.seams is not None:  # first, as windows inside go on with what these add
        of_seams, _ = _checked(call, given, call.packing.seams, small)
        d_small = _parts(_backward(of_seams, how, kept[1], d_entries[0], weights.sums(True)))
    d_tokens = _parts(_backward(x, how, kept[0], d_entries[1], weights.sums(False)))
    _return(call, d_tokens, d_small)
    return d_tokens


def _backward_folds(
    call: Call,
    given: Parameters,
    how: How,
    x: Inputs,
    folds: CutFolds,
    tokens: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    d_entries: Sequence[torch.Tensor],
    weights: Weights,
) -> Tokens:
    """The same where they send folds."""
    sums, mine = weights.sums(True), kept[0].new_empty(0, 3, how.spec.head_dim)
    if call.packing.seams is not None:  # first, as windows inside go on with what these add
        mine = pull_heads(_heads(call, given, tokens), how, kept[1], d_entries[0].contiguous(), sums)
    d_tokens = _parts(_backward(x, how, kept[0], d_entries[1], weights.sums(False)))
    rows = pass_on(folds, mine, call.transport)
    if folds.packing is not None:
        small = small_tokens(folds.packing.tokens, folds.own, tokens)  # nobody reads what is made of the other rows
        spread_all(_checked(call, given, folds.packing, small)[0], how, folds, rows, d_tokens, sums)
    return d_tokens


def _checked(call: Call, given: Parameters, packing, tokens: Sequence[torch.Tensor]) -> tuple[Inputs, How]:
    options = {"cache_scale": call.cache_scale, "latent": False, **call.options}
    return check_call(_one(tokens), packing, spec=call.spec, **given._asdict(), **options)


def _backward(x: Inputs, how: How, kept: torch.Tensor, d_entries: torch.Tensor, sums: Sums) -> Gradients:
    missing = how.capacity(x) - len(d_entries)
    if missing > 0 and how.backend == "torch":  # kernels read none of an entry that is not there, so theirs is not copied
        d_entries = torch.cat([d_entries, d_entries.new_zeros(missing, how.spec.head_dim)])
    return backward(x, how, kept, d_entries.contiguous(), None, sums)


def _one(tokens: Sequence[torch.Tensor]) -> torch.Tensor | Tokens:
    return tokens[0] if len(tokens) == 1 else tuple(tokens)


def _parts(found: Gradients) -> Tokens:
    return (found.value,) if found.score is None else (found.value, found.score)


def _seam_tokens(call: Call, tokens: Sequence[torch.Tensor]) -> Tokens:
    """The small tensors, of this rank's rows and of what the others send."""
    packing = call.packing
    if not packing.touches:
        return ()
    count = packing.seams.tokens if packing.seams is not None else 0
    small = small_tokens(count, packing.own, tokens)
    sent = [Parcel(one.rank, _packed(tokens, one.rows)) for one in packing.lent if len(one.rows)]
    received = [(one, _room(small, one.rows)) for one in packing.borrowed if len(one.rows)]
    call.transport.exchange(sent, [Parcel(one.rank, data) for one, data in received], "rows of windows across a cut")
    for one, data in received:
        for into, rows in zip(small, _unpacked(data, small), strict=True):
            into[one.rows] = rows
    return small


def _return(call: Call, d_tokens: Tokens, d_small: Sequence[torch.Tensor]) -> None:
    """Puts the gradients of rows at seams where they belong: here, or on the rank that lent the row."""
    packing, spec = call.packing, call.spec
    if not packing.touches:
        return
    sent = [Parcel(one.rank, _packed(d_small, one.rows)) for one in packing.borrowed if len(one.rows)]
    received = [(one, _room(d_tokens, one.rows)) for one in packing.lent if len(one.rows)]
    call.transport.exchange(sent, [Parcel(one.rank, data) for one, data in received], "gradients of rows across a cut")
    found = [(packing.own_hi, packing.own_lo, d_small)]
    found += [(one.hi, one.lo, _unpacked(data, d_tokens)) for one, data in received]
    for hi, lo, gradients in found:
        for into, new in zip(d_tokens, gradients, strict=True):
            _put_half(into, new, hi, int(spec.overlap), spec)
            if spec.overlap:
                _put_half(into, new, lo, 0, spec)


def _put_half(into: torch.Tensor, new: torch.Tensor, rows: Rows, half: int, spec: CompressorSpec) -> None:
    """Of some rows one half of the values, of the scores, or of both where they are in one tensor."""
    if len(rows.at):
        halves = -1, 1 + spec.overlap, spec.head_dim
        into.unflatten(1, halves)[:, :, half][rows.of] = new.unflatten(1, halves)[:, :, half][rows.at]


def _packed(tokens: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    found = [x[rows] for x in tokens]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def _room(tokens: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """For what `_packed` makes of so many rows."""
    return tokens[0].new_empty(len(rows), sum(x.shape[1] for x in tokens))


def _unpacked(data: torch.Tensor, like: Sequence[torch.Tensor]) -> Tokens:
    return data.split([x.shape[1] for x in like], dim=1)


def bytes_sent(packing: CutPacking, spec: CompressorSpec, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that the packing's rank sends, for kv_score of this dtype, in a forward and in its backward; weights aside."""
    folds = folds_of(packing, spec, dtype)
    if folds is not None:
        return folds.bytes_sent(spec)
    row = spec.kv_score_width * dtype.itemsize
    forward, backward = (sum(len(one.rows) for one in some) * row for some in (packing.lent, packing.borrowed))
    return forward, backward
