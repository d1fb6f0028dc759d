"""The call as torch's autograd sees it, while nothing is traced."""

from __future__ import annotations

import torch

from .problem import How, Inputs
from .run import backward, forward


class Compress(torch.autograd.Function):
    """`compress` of checked arguments. Differentiable once: in values, scores, ape and norm_weight."""

    @staticmethod
    def forward(ctx, value, score, ape, norm_weight, rope, scale, pieces, how: How) -> tuple[torch.Tensor, torch.Tensor]:
        x = Inputs(value, score, pieces, ape, norm_weight, rope, scale)
        found = forward(x, how)
        ctx.save_for_backward(value, score, ape, norm_weight, rope, pieces, found.kept)
        ctx.how = how
        ctx.set_materialize_grads(False)  # zeros for what has no gradient cost the host more than looking
        if not how.latent:
            ctx.mark_non_differentiable(found.latent)
        return found.entries, found.latent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_entries: torch.Tensor | None, d_latent: torch.Tensor | None):
        if d_entries is None and d_latent is None:
            return (None,) * 8
        value, score, ape, norm_weight, rope, pieces, kept = ctx.saved_tensors
        x, how = Inputs(value, score, pieces, ape, norm_weight, rope, None), ctx.how
        d_entries = torch.zeros_like(d_latent) if d_entries is None else d_entries.contiguous()
        if how.latent:
            d_latent = torch.zeros_like(d_entries) if d_latent is None else d_latent.contiguous()
        found = backward(x, how, kept, d_entries, d_latent)
        # Torch drops those that nobody asked for.
        return found.value, found.score, found.ape, found.norm_weight.to(norm_weight.dtype), None, None, None, None
