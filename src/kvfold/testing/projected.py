"""`ProjectedEngine`: an `Engine` whose steps start from hidden states; and seeded hidden states and projection weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compress import project_compress
from ..storage.weights import ScaledWeight, Weight, blocks_of
from .data import Device
from .engine import Engine, Step


def make_hidden(count: int, width: int, seed: int = 0, device: Device = "cpu") -> Tensor:
    """Hidden states, bf16 `[count, width]`, drawn on the CPU: the same on every machine."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draw, dtype=torch.float32).bfloat16().to(device)


def make_weight(rows: int, width: int, seed: int = 0, device: Device = "cpu") -> Tensor:
    """A projection's weight, bf16 `[rows, width]`, which makes numbers of about 1 from those of `make_hidden`."""
    draw = torch.Generator().manual_seed(100 + seed)
    return (torch.randn(rows, width, generator=draw, dtype=torch.float32) / width**0.5).bfloat16().to(device)


def make_scaled_weight(rows: int, width: int, seed: int = 0, device: Device = "cpu") -> ScaledWeight:
    """The same in FP8: all finite codes, subnormal ones too, and scales that are all different and no powers of two."""
    draw = torch.Generator().manual_seed(200 + seed)
    codes = torch.randint(0, 256, (rows, width), generator=draw, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    scales = torch.rand(blocks_of(rows), blocks_of(width), generator=draw, dtype=torch.float32)
    scales = 2e-3 * scales / width**0.5 + 1e-6
    return ScaledWeight(codes.view(torch.float8_e4m3fn).to(device), scales.to(device))


class ProjectedEngine(Engine):
    """Sequences of hidden states over one compressor: each step is a `project_compress`.

    `tokens` are kv_score as in `Engine`, to compare with. `begin` sets what they are made of; call it after `make`.

    Attributes:
        hidden: bf16 `[length, hidden_dim]` of each sequence.
        weight: as `project_compress` takes it.
    """

    hidden: Sequence[Tensor]
    weight: Weight | tuple[Weight, Weight]

    def begin(self, hidden: Sequence[Tensor], weight: Weight | tuple[Weight, Weight]) -> ProjectedEngine:
        """Sets what `tokens` are made of."""
        self.hidden, self.weight = hidden, weight
        return self

    def kv_score(self, step: Step, wrong: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The hidden states of a step, in the places of its kv_score."""
        tokens, self.tokens = self.tokens, self.hidden
        try:
            return super().kv_score(step, wrong)
        finally:
            self.tokens = tokens

    def _call(self, hidden: Tensor, *args: object, **named: object) -> None:
        project_compress(hidden, self.weight, *args, **named)  # type: ignore[arg-type]
