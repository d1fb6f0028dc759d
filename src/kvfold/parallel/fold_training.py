"""The forward and the backward of windows that lie on several ranks, of which fold rows are sent (folds.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..training.problem import How, Inputs, Sums
from ..training.run import fold_tails, pull, spread
from .folds import CutFolds
from .halo import Rows
from .transport import Parcel, Transport

Tokens = tuple[torch.Tensor, ...]  # one tensor, or values and scores


def carried(folds: CutFolds, x: Inputs, how: How, transport: Transport) -> torch.Tensor | None:
    """Sends and receives folds. Returns those before the windows that this rank owns, `[n, 3, head_dim]`; None without any."""
    rows = torch.empty(folds.rows, 3, how.spec.head_dim, dtype=torch.float32, device=x.value.device)
    for number, each in enumerate(folds.rounds):
        if each.tails is not None:
            fold_tails(x, how, each.tails, rows, rows[each.first : each.first + len(each.tails)])
        sent, received = ([Parcel(one.rank, rows[one.first : one.behind]) for one in some] for some in each[2:])
        transport.exchange(sent, received, f"the carries of round {number}")
    return None if folds.heads is None else rows[folds.heads.before]


def small_tokens(count: int, own: Rows, tokens: Tokens) -> Tokens:
    """The rank's tokens of windows at seams, in their places among `count` rows; the others are zeros."""
    small = tuple(x.new_zeros(count, x.shape[1]) for x in tokens)
    for into, x in zip(small, tokens, strict=True):
        into[own.at] = x[own.of]
    return small


def pull_heads(x: Inputs, how: How, kept: torch.Tensor, d_entries: torch.Tensor, sums: Sums) -> torch.Tensor:
    """Of the rank's own windows `[n, 3, head_dim]`: largest scores, gradients of pooled rows, pooled rows; what it sends."""
    return torch.stack([kept[0], pull(x, how, kept, d_entries, sums), kept[2]], dim=1)


def pass_on(folds: CutFolds, mine: torch.Tensor, transport: Transport) -> torch.Tensor:
    """Sends what `pull_heads` gave to who has tokens of these windows; returns it of all windows of this rank's tokens."""
    sent = [Parcel(one.rank, mine[one.which]) for one in folds.to]
    received = [Parcel(one.rank, mine.new_empty(one.count, *mine.shape[1:])) for one in folds.from_]
    transport.exchange(sent, received, "gradients of windows across a cut")
    return torch.cat([mine, *(parcel.data for parcel in received)])


def spread_all(x: Inputs, how: How, folds: CutFolds, rows: torch.Tensor, d_tokens: Sequence[torch.Tensor], sums: Sums) -> None:
    """Puts the gradients of the rank's own tokens of these windows where they belong. x: of `small_tokens`."""
    found = spread(x, how, rows.transpose(0, 1).contiguous(), sums)
    if sums.ape is not None:  # shares are of the rank's own tokens
        sums.ape.view(-1, how.spec.channels).index_fill_(0, folds.others_in(sums.of_ape), 0.0)
    for into, new in zip(d_tokens, found, strict=False):
        into[folds.own.of] = new[folds.own.at]
