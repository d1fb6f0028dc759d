"""The torch backend of a projection: kv_score from hidden states, by the order of sums of contract.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..contract import CHUNKS_OF_HIDDEN, chunk_of_hidden
from ..storage.step import Projection
from ..storage.weights import ScaledWeight

_AT_ONCE = 64  # tokens, so that their sums stay in a cache


@torch.no_grad()
def product_torch(p: Projection, kv_scores: Sequence[torch.Tensor]) -> None:
    """Writes kv_score of each compressor. Every operation is elementwise, so which tokens come together changes no bit."""
    for weights, kv_score in zip(p.weights, kv_scores, strict=True):
        numbers = [w.dequantized() if isinstance(w, ScaledWeight) else w for w in weights]
        rows = torch.cat(numbers).t().float().contiguous()  # [hidden_dim, columns]
        for hidden, out in zip(p.hidden.split(_AT_ONCE), kv_score.split(_AT_ONCE), strict=True):
            sums = project_tokens(hidden.float(), rows)
            out.copy_(sums.bfloat16() if p.round_kv_score else sums)


def project_tokens(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """fp32 `[T, hidden_dim]` times `[hidden_dim, columns]`, both of bf16 numbers, whose products fp32 holds exactly."""
    count, columns = hidden.shape[0], weight.shape[1]
    chunk, total = chunk_of_hidden(hidden.shape[1]), hidden.new_zeros(count, columns)
    for first in range(0, CHUNKS_OF_HIDDEN, 2):
        pair = hidden.new_zeros(count, columns)
        for i in (first, first + 1):
            sums = hidden.new_zeros(count, columns)
            of_chunk = slice(i * chunk, (i + 1) * chunk)
            for x, w in zip(hidden[:, of_chunk].unbind(1), weight[of_chunk], strict=True):
                sums.addcmul_(x[:, None], w)
            pair += sums
        total += pair
    return total
