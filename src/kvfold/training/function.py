"""The call as torch's autograd sees it, while nothing is traced."""

from __future__ import annotations

import torch

from .problem import How, Inputs
from .run import backward, forward


class Compress(torch.autograd.Function):
    """`compress` of checked arguments: entries, and latents where they are asked for.

    Differentiable once: in values, scores, ape and norm_weight, which are given apart from `x` for autograd to see them.
    """

    @staticmethod
    def forward(ctx, value, score, ape, norm_weight, x: Inputs, how: How) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        found = forward(x, how, bare=True)
        ctx.save_for_backward(value, score, ape, norm_weight, x.pieces, x.rope, found.kept)
        ctx.how = how
        if not how.latent:
            return found.entries
        ctx.set_materialize_grads(False)  # zeros for what has no gradient cost the host more than looking
        return found.entries, found.latent

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # The decorator turns autograd off and on again, which is off but for `create_graph`.
        return _backward_once(ctx, *gradients) if torch.is_grad_enabled() else _backward(ctx, *gradients)


def _backward(ctx, d_entries: torch.Tensor | None, d_latent: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
    if d_entries is None and d_latent is None:
        return (None,) * 6
    value, score, ape, norm_weight, pieces, rope, kept = ctx.saved_tensors
    x, how = Inputs(value, score, pieces, ape, norm_weight, rope, None), ctx.how
    d_entries = torch.zeros_like(d_latent) if d_entries is None else d_entries.contiguous()
    if how.latent:
        d_latent = torch.zeros_like(d_entries) if d_latent is None else d_latent.contiguous()
    d_value, d_score, d_ape, d_norm_weight = backward(x, how, kept, d_entries, d_latent)
    if norm_weight.dtype is not d_norm_weight.dtype:
        d_norm_weight = d_norm_weight.to(norm_weight.dtype)
    return d_value, d_score, d_ape, d_norm_weight, None, None  # torch drops those that nobody asked for


_backward_once = torch.autograd.function.once_differentiable(_backward)
