"""From checked arguments to one backend."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from .problem import Entries, Gradients, How, Inputs
from .pure import backward_torch, forward_torch


@cache
def _triton() -> ModuleType:
    """Imported by its first call, as it imports triton, which the torch backend does not need."""
    from . import launch

    return launch


def forward(x: Inputs, how: How) -> Entries:
    if how.backend == "triton":
        return _triton().forward_triton(x, how)
    with torch.no_grad():
        return forward_torch(x, how)


def backward(x: Inputs, how: How, kept: torch.Tensor, d_entries: torch.Tensor, d_latent: torch.Tensor | None) -> Gradients:
    """d_entries, d_latent: contiguous, in `how.out_dtype`."""
    if how.backend == "triton":
        return _triton().backward_triton(x, how, kept, d_entries, d_latent)
    with torch.no_grad():
        return backward_torch(x, how, kept, d_entries, d_latent)
