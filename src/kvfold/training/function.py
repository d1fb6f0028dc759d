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
        if not how.latent:
            ctx.mark_non_differentiable(found.latent)
        return found.entries, found.latent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_entries: torch.Tensor, d_latent: torch.Tensor):
        value, score, ape, norm_weight, rope, pieces, kept = ctx.saved_tensors
        how = ctx.how
        x = Inputs(value, score, pieces, ape, norm_weight, rope, None)
        found = backward(x, how, kept, d_entries.contiguous(), d_latent.contiguous() if how.latent else None)
        wanted = zip((found.value, found.score, found.ape, found.norm_weight.to(norm_weight.dtype)), ctx.needs_input_grad)  # noqa: B905 (the rest is not differentiable)
        return *(gradient if needed else None for gradient, needed in wanted), None, None, None, None
