"""A whole step as calls: layers with weights of their own, and any number of sets of states, caches and kv_score for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

import kvfold
from kvfold.storage.weights import blocks_of, of_each

from . import models
from .calls import Buffers, Step, Weights
from .models import AnyCase, Model, StepCase
from .protocol import Case

PARTS = ("updates", "compressors", "projections", "apart", "fused", "fused-fp8")
Call = Callable[[], None]


def missing() -> str:
    """Why `fused` cannot be timed, empty where it can."""
    return "" if hasattr(kvfold, "project_compress") else "this kvfold has no project_compress"


class Layer(NamedTuple):
    """One layer's weights: of its projection `[columns, hidden_dim]`, main before indexer, and of each compressor."""

    ratio: int
    projection: torch.Tensor
    compressors: list[Weights]


def in_fp8(weight: torch.Tensor, scales: torch.Tensor | None = None) -> kvfold.ScaledWeight:
    """A weight in FP8. scales: of its blocks; without them it is one of `projections`, whose blocks are all alike."""
    rows, width = weight.shape
    if scales is None:
        # Codes up to seven times as large as the root of their mean square.
        scales = torch.full((blocks_of(rows), blocks_of(width)), width**-0.5 / 64, device=weight.device)
    codes = (weight.float() / of_each(scales, rows, width)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return kvfold.ScaledWeight(codes, scales)


class LayerSet(NamedTuple):
    """What a layer has for itself in one set. kv_score: `[tokens, columns]`, of which each compressor has its own columns."""

    kv_score: torch.Tensor
    own: list[Buffers]


def projections(model: Model, device: str = "cuda") -> list[torch.Tensor]:
    """Of all layers of a model; made once, as they are most of the memory."""
    found = []
    for ratio in model.ratios:
        weight = torch.empty(models.columns(ratio), model.hidden_dim, dtype=torch.bfloat16, device=device)
        found.append(weight.normal_(std=model.hidden_dim**-0.5))
    return found


class WholeStep:
    """All layers of one case. Plans are of a ratio; weights of a layer; `make_set` makes the rest."""

    def __init__(self, case: AnyCase, weights: list[torch.Tensor], device: str = "cuda") -> None:
        """weights: of `projections`, those of the case's layers."""
        self.case, self.device = case, device
        cases: dict[int, Case] = {layer.ratio: layer for layer in case.layers}
        self.steps = {ratio: Step(layer, models.VARIANTS[ratio], device) for ratio, layer in cases.items()}
        self.hidden = torch.randn(case.tokens, case.model.hidden_dim, device=device).bfloat16()
        self.layers = [
            Layer(layer.ratio, weight, [self._own(given) for given in self.steps[layer.ratio].weights])
            for layer, weight in zip(case.layers, weights, strict=True)
        ]
        self.scaled: list[kvfold.ScaledWeight] = []  # of the layers, in FP8, once a step of them is asked for

    def _own(self, given: Weights) -> Weights:
        """Weights of one layer; rotations are of the model."""
        return given._replace(ape=torch.randn_like(given.ape), norm_weight=torch.rand_like(given.norm_weight) + 0.5)

    def make_set(self) -> list[LayerSet]:
        found = []
        for layer in self.layers:
            step = self.steps[layer.ratio]
            kv_score = torch.randn(self.case.tokens, layer.projection.shape[0], device=self.device).bfloat16()
            parts = kv_score.split([spec.kv_score_width for spec in step.specs], dim=1)
            own = [b._replace(kv_score=part) for b, part in zip(step.buffers(), parts, strict=True)]
            found.append(LayerSet(kv_score, own))
        return found

    def call(self, part: str, buffers: list[LayerSet]) -> Call:
        """One step, or the part of it that is named so in `PARTS`, over a set. A prompt's plan is updated by nobody: it is
        one of a whole model's."""
        layers = list(zip(self.layers, buffers, strict=True))
        updated = isinstance(self.case, StepCase) and part != "projections"
        found = [self._update(step) for step in self.steps.values()] if updated else []
        if part == "fused-fp8" and not self.scaled:
            self.scaled += [in_fp8(layer.projection) for layer in self.layers]
        for i, (layer, own) in enumerate(layers) if part != "updates" else []:
            if part in ("projections", "apart"):
                found.append(self._project(layer, own))
            if part in ("compressors", "apart"):
                found.append(self._compress(layer, own))
            if part in ("fused", "fused-fp8"):
                found.append(self._fused(layer, own, layer.projection if part == "fused" else self.scaled[i]))

        def step() -> None:
            for one in found:
                one()

        return step

    def check(self, call: Call) -> None:
        """Makes the call once; a step that is refused would be fast."""
        call()
        for ratio, step in self.steps.items():
            if int(step.plan.errors):
                raise RuntimeError(f"{self.case.name}: plan.errors is {int(step.plan.errors)} after the ratio-{ratio} layers")

    def _update(self, step: Step) -> Call:
        return lambda: step.plan.update(step.start_pos, step.cu_seqlens)

    def _project(self, layer: Layer, own: LayerSet) -> Call:
        weight = layer.projection.t()
        return lambda: torch.mm(self.hidden, weight, out=own.kv_score)

    def _compress(self, layer: Layer, own: LayerSet) -> Call:
        step = self.steps[layer.ratio]
        made = [
            kvfold.Compressor(b.kv_score, b.state, b.cache, spec, *weights)
            for b, spec, weights in zip(own.own, step.specs, layer.compressors, strict=True)
        ]
        if len(made) == 2:
            return lambda: kvfold.compress_many(made, step.plan)
        (one,) = made
        given = {"spec": one.spec, **layer.compressors[0]._asdict()}
        return lambda: kvfold.compress(one.kv_score, step.plan, one.state, one.cache, **given)

    def _fused(self, layer: Layer, own: LayerSet, weight: torch.Tensor | kvfold.ScaledWeight) -> Call:
        # Rounded as torch.mm's, which is bf16.
        step = self.steps[layer.ratio]
        made = [
            kvfold.Compressor(None, b.state, b.cache, spec, *weights)
            for b, spec, weights in zip(own.own, step.specs, layer.compressors, strict=True)
        ]
        if len(made) == 2:
            return lambda: kvfold.project_compress_many(self.hidden, weight, made, step.plan, round_kv_score=True)
        (one,) = made
        given = {"spec": one.spec, **layer.compressors[0]._asdict(), "round_kv_score": True}
        return lambda: kvfold.project_compress(self.hidden, weight, step.plan, one.state, one.cache, **given)
