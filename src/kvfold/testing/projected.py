"""`ProjectedEngine`: an `Engine` whose steps begin with hidden states."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..compress import project_compress
from ..storage.weights import Weight
from .engine import Engine, Step


class ProjectedEngine(Engine):
    """Sequences of hidden states over one compressor: each step is a `project_compress`.

    `tokens` are kv_score as before, to compare with. What they are made of is set behind `make`.

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
