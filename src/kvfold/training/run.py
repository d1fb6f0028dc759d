"""From checked arguments to one backend."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from .problem import Entries, Gradients, How, Inputs, Recipe, Sums
from .pure import backward_torch, forward_torch
from .pure_sums import fold_torch, total_torch


@cache
def _triton() -> ModuleType:
    """Imported by its first call, as it imports triton, which the torch backend does not need."""
    from . import launch

    return launch


def forward(x: Inputs, how: How, bare: bool = False) -> Entries:
    """bare: whether latents and the kept fold may be None where there are none, as an empty tensor costs the host 3 us."""
    if how.backend == "triton":
        found = _triton().forward_triton(x, how)
        return found if bare else found.whole()
    with torch.no_grad():
        return forward_torch(x, how)


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
