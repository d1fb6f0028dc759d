"""From checked arguments to one backend."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from .problem import Entries, Gradients, How, Inputs, Recipe, Sums
from .pure import backward_torch, finish_torch, forward_torch, pull_torch, spread_torch, tail_torch
from .pure_sums import fold_torch, total_torch


@cache
def _triton() -> ModuleType:
    """Imported by its first call, as it imports triton, which the torch backend does not need."""
    from . import launch

    return launch


def forward(x: Inputs, how: How, bare: bool = False, out: torch.Tensor | None = None) -> Entries:
    """bare: whether latents and the kept fold may be None where there are none, as an empty tensor costs the host 3 us.

    out: contiguous `[capacity, head_dim]`, for the entries; default a new tensor.
    """
    if how.backend == "triton":
        found = _triton().forward_triton(x, how, out)
        return found if bare else found.whole()
    with torch.no_grad():
        found = forward_torch(x, how)
        return found if out is None else found._replace(entries=out.copy_(found.entries))


def backward(
    x: Inputs,
    how: How,
    kept: torch.Tensor | None,
    d_entries: torch.Tensor,
    d_latent: torch.Tensor | None,
    sums: Sums | None = None,
) -> Gradients:
    """d_entries, d_latent: contiguous, in `how.out_dtype`. sums: mutated; the gradients of weights are then what it has."""
    if how.backend == "triton":
        return _triton().backward_triton(x, how, kept, d_entries, d_latent, sums)
    with torch.no_grad():
        return backward_torch(x, how, kept, d_entries, d_latent, sums)


def fold(x: Inputs, how: How, sums: torch.Tensor, recipe: Recipe, out: torch.Tensor) -> None:
    """Writes the rows of a recipe to `out` `[n, width]`. sums: dense, as those that a backward goes on with."""
    if how.backend == "triton":
        return _triton().fold_triton(x, how, sums, recipe, out)
    with torch.no_grad():
        return fold_torch(how, sums, recipe, out)


def total(
    x: Inputs, how: How, capacity: int, ape: torch.Tensor | None, norm_weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of ape and norm_weight, of the sums of all blocks of a call with room for `capacity` entries."""
    if how.backend == "triton":
        return _triton().total_triton(x, how, capacity, ape, norm_weight)
    with torch.no_grad():
        return total_torch(x, how, ape, norm_weight)


def fold_tails(x: Inputs, how: How, tails: torch.Tensor, folds: torch.Tensor, out: torch.Tensor) -> None:
    """Writes `out` `[n, 3, head_dim]`: folds of tokens of `x` whose windows end elsewhere, as a state has them.

    tails: int32 `[n, 4]`, `problem.TAIL_FIELDS`. folds: `[rows, 3, head_dim]`, those before; `out` may be some of the rows.
    """
    if how.backend == "triton":
        _triton().tail_triton(x, how, tails, folds, out)
        return
    with torch.no_grad():
        tail_torch(x, how, tails, folds, out)


def finish(x: Inputs, how: How, live: Inputs, folds: torch.Tensor) -> Entries:
    """The forward of windows that begin elsewhere, behind `folds` of the tokens there: fp32 `[capacity, 3, head_dim]`, as a
    state has them.

    x: of as many windows; no token of it is read. live: the tokens that are here. Its pieces are the same windows, `token` the
    row of the first token that is here, and `begin` that one's place in the window.
    """
    if how.backend == "triton":
        return _triton().finish_triton(x, how, live, folds)
    with torch.no_grad():
        return finish_torch(x, how, live, folds)


def pull(x: Inputs, how: How, kept: torch.Tensor, d_entries: torch.Tensor, sums: Sums) -> torch.Tensor:
    """The first half of the backward, where the fold was kept: `[capacity, head_dim]`, gradients of pooled rows, divided by the
    sums of weights. sums: mutated, those for norm_weight. Of `x` no token is read."""
    if how.backend == "triton":
        return _triton().pull_triton(x, how, kept, d_entries, sums)
    with torch.no_grad():
        return pull_torch(x, how, kept[1], kept[2], d_entries, None, sums)


def spread(x: Inputs, how: How, rows: torch.Tensor, sums: Sums) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The other half: gradients of values and scores. rows: `[3, capacity, head_dim]`, as kept, but for the inverse sums of
    weights, in whose place is what `pull` gave. sums: mutated, those for ape."""
    if how.backend == "triton":
        return _triton().spread_triton(x, how, rows, sums)
    with torch.no_grad():
        return spread_torch(x, how, rows[0], rows[2], rows[1], sums)
