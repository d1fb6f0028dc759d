"""Problems of training: packed sequences with empty and short ones, their weights, and fp64 autograd of the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, reference
from kvfold.training import Gradients, Packing, compress_backward, compress_forward

from .helpers import Backend, Weights, make_tokens

SPECS = {
    "csa": CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=16),
    "indexer": CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8, hadamard=True),
    "hca": CompressorSpec(head_dim=32, ratio=16, rope_dim=16),
    "odd": CompressorSpec(head_dim=16, ratio=12, rope_dim=0, hadamard=True),
    "wide-overlap": CompressorSpec(head_dim=16, ratio=5, overlap=True, rope_dim=16),
    "v41-r2": CompressorSpec(head_dim=16, ratio=2, has_ape=False, rope_dim=8, norm_eps=1e-20),
    "v41-r1": CompressorSpec(head_dim=16, ratio=1, has_ape=False, rope_dim=8, norm_eps=1e-20, gate=False),
    "ratio-1": CompressorSpec(head_dim=16, ratio=1, rope_dim=8),
}
REAL = {"hca": kvfold.V4_HCA, "csa": kvfold.V4_CSA, "indexer": kvfold.V4_INDEXER, "v41-r2": kvfold.V41_MAIN_R2}


def lengths_of(spec: CompressorSpec) -> list[int]:
    """Empty and short sequences, whole windows, and tails."""
    r = spec.ratio
    return [0, 2 * r, r - 1, 0, r, r + r // 2, 1]


def tokens_of(spec: CompressorSpec, n: int, seed: int, dtype: torch.dtype, score_scale: float = 1.0) -> Tensor:
    rows = make_tokens(spec, n, seed, dtype, score_scale)
    return rows if spec.gate else rows[:, : spec.channels].contiguous()


@dataclass
class Problem:
    """Rows of all sequences, then `spare` ones that are of none and hold NaN. Tensors on the CPU."""

    spec: CompressorSpec
    lengths: list[int]
    kv_score: Tensor
    weights: Weights

    @classmethod
    def make(
        cls,
        spec: CompressorSpec,
        dtype: torch.dtype = torch.float32,
        lengths: list[int] | None = None,
        seed: int = 0,
        spare: int = 3,
        score_scale: float = 1.0,
    ) -> Problem:
        lengths = lengths_of(spec) if lengths is None else lengths
        rows = tokens_of(spec, sum(lengths), seed, dtype, score_scale)
        spare_rows = torch.full((spare, spec.kv_score_width), torch.nan, dtype=dtype)
        return cls(spec, lengths, torch.cat([rows, spare_rows]), Weights.make(spec, seed, max_positions=1024))

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    @property
    def windows(self) -> int:
        return sum(n // self.spec.ratio for n in self.lengths)

    def packing(self, device: torch.device) -> Packing:
        return Packing.build(self.cu_seqlens.to(device), self.kv_score.shape[0], self.spec.ratio, max_seqlen=max(self.lengths))

    def tokens(self, device: torch.device, pair: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        rows = self.kv_score.to(device)
        return (rows[:, : self.spec.channels].contiguous(), rows[:, self.spec.channels :]) if pair else rows

    def given(self, backend: Backend) -> dict:
        """Keyword arguments of every call."""
        w, device = self.weights, backend.device
        found = {"spec": self.spec, "norm_weight": w.norm_weight.to(device), "backend": backend.name}
        found["ape"] = None if w.ape is None else w.ape.to(device)
        return found | {"rope": w.rope.to(device) if self.spec.rope_dim else None}

    def incoming(self, seed: int = 7) -> Tensor:
        """A gradient for entries, NaN in the rows behind them."""
        rows = torch.randn(self.windows, self.spec.head_dim, generator=torch.Generator().manual_seed(seed))
        spare = self.kv_score.shape[0] // self.spec.ratio - self.windows
        return torch.cat([rows, torch.full((spare, self.spec.head_dim), torch.nan)])

    def exact(self, g: Tensor, g_latent: Tensor | None = None, pooled: Tensor | None = None) -> tuple[Tensor, Gradients]:
        """Entries, and gradients by fp64 autograd. pooled: fp32 rows whose rounding to bf16 stands in for the pooled rows."""
        spec, w = self.spec, self.weights
        leaves = [self.kv_score.double().requires_grad_(), w.norm_weight.double().requires_grad_()]
        if w.ape is not None:
            leaves.append(w.ape.double().requires_grad_())
        rows, weight, ape = (*leaves, None)[:3]
        found, done = [], 0
        for start, n in zip(self.cu_seqlens.tolist(), self.lengths, strict=False):
            if n // spec.ratio:
                y = reference.pooled(rows[start : start + n], spec, ape)
                if pooled is not None:
                    y = y + (pooled[done : done + len(y)].bfloat16().double() - y).detach()
                done += len(y)
                latent = reference.rms_norm(y, weight, spec.norm_eps)
                positions = torch.arange(len(y)) * spec.ratio
                turned = reference.rope(latent, w.rope, positions, spec.rope_dim) if spec.rope_dim else latent
                found.append((reference.hadamard(turned) if spec.hadamard else turned, latent))
        entries, latents = (torch.cat(x) for x in zip(*found, strict=True))
        outputs, incoming = [entries], [g[: len(entries)].double()]
        if g_latent is not None:
            outputs, incoming = [*outputs, latents], [*incoming, g_latent[: len(entries)].double()]
        grads = torch.autograd.grad(outputs, leaves, incoming)
        return entries.detach(), Gradients(grads[0].nan_to_num(0.0), None, grads[2] if ape is not None else None, grads[1])


class Ran(NamedTuple):
    """What one forward and one backward gave, on the CPU; gradients of values and scores in one tensor."""

    entries: Tensor
    latent: Tensor
    kept: Tensor
    gradients: Gradients


def run(problem: Problem, backend: Backend, pair: bool = False, latent: bool = True, **how: object) -> Ran:
    """Both halves of a call, with the incoming gradients of seeds 7 and 8."""
    packing, tokens = problem.packing(backend.device), problem.tokens(backend.device, pair)
    given = problem.given(backend) | how
    found = compress_forward(tokens, packing, **given, latent=latent)
    g, g_latent = (problem.incoming(seed).to(found.entries) for seed in (7, 8))
    if latent:
        given["d_latent"] = g_latent
    got = compress_backward(g, tokens, packing, found.kept, **given)
    value = got.value if got.score is None else torch.cat([got.value, got.score], dim=1)
    cpu = [x if x is None else x.cpu() for x in (value, None, got.ape, got.norm_weight)]
    return Ran(*(x.cpu() for x in found), Gradients(*cpu))


def off(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of what is right, if that is not zero."""
    return float((got.double() - want.double()).norm() / (want.double().norm() if want.any() else 1.0))


def same(one: Ran, other: Ran) -> bool:
    flat = [[x for x in (*ran[:3], *ran.gradients) if x is not None] for ran in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
