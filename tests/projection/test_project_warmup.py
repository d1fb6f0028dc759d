"""Which kernels `warmup` prepares for projections: those that calls then ask for; no GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import BACKENDS
from support.project_support import FOLD, NARROW, ONE, ROWS, Projected

import kvfold
from kvfold import CompressorSpec
from kvfold.backend_triton import launch, launch_product, table
from kvfold.backend_triton import prepare as preparing
from kvfold.backend_triton.keys import AddKey, DequantizeKey, Key, PairKey, ProjectKey, StepKey
from kvfold.testing.projected import make_hidden, make_scaled_weight

FP32, BF16, WIDTH = torch.float32, torch.bfloat16, 256
COUNTS = (3, 20)  # tokens of a step
LONG = replace(FOLD, ratio=256)  # whose windows are longer than a short step


class Asked:
    """What is prepared, and what calls ask for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.prepared: set[Key] = set()
        self.keys: set[Key] = set()
        self.backend = BACKENDS["cuda" if torch.cuda.is_available() else "interpreter"]
        # One row with parts and one without, for the two counts; of weights in FP8 one, so that more are made bf16 before.
        patch.setattr(table, "TILINGS", (table.TILINGS[0], table.TILINGS[-1]))
        patch.setattr(table, "SCALED", (table.SCALED[1],))
        patch.setattr(preparing, "prepare", lambda keys, *rest: self.prepared.update(keys) or 1)
        patch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda *_: torch.device("cuda", 0))
        for module in (launch, launch_product):
            patch.setattr(module, "launcher_of", lambda key, device: self.keys.add(key) or (lambda *arguments: None))

    def layer(self, spec: CompressorSpec) -> Projected:
        return Projected(spec, self.backend, WIDTH)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


def kinds(keys: set[Key]) -> set[tuple]:
    """Without rows of the tables, which follow from sizes."""
    of = {(key.tensors, key.sums, key.rounded, key.scaled) for key in keys if isinstance(key, ProjectKey)}
    of |= {(key.sums, key.rounded) for key in keys if isinstance(key, AddKey)}
    return of | {("dequantize", key.tensors) for key in keys if isinstance(key, DequantizeKey)}


@pytest.mark.parametrize("kept", ["bf16", "fp8"])
@pytest.mark.parametrize("spec", [FOLD, LONG, ROWS, ONE], ids=["fold", "long", "rows", "ungated"])
def test_one(asked: Asked, spec: CompressorSpec, kept: str) -> None:
    """With a kv_score of the caller's and without, rounded or not, by a weight and by two; and nothing else is prepared."""
    how = {"hidden_dims": (WIDTH,), "weights": (kept,), "round_kv_score": (False, True)}
    kvfold.warmup([spec], ["fp32"], dtypes=(), max_new_tokens=(3, 32), **how)
    one = asked.layer(spec)
    half = spec.kv_score_width // 2
    if kept == "fp8":
        made = [make_scaled_weight(rows, WIDTH, device=one.backend.device) for rows in (2 * half, half)]
        weights = [made[0], (made[1], made[1])][: 1 + spec.gate]
    else:
        weights = [one.weight, (one.weight[:half], one.weight[half:])][: 1 + spec.gate]
    for count, weight, rounded, dtype in product(COUNTS, weights, (False, True), (None, FP32, BF16)):
        if rounded or dtype is not BF16:
            kv_score = (
                None if dtype is None else torch.empty(count, spec.kv_score_width, dtype=dtype, device=one.backend.device)
            )
            one.step(make_hidden(count, WIDTH), [(0, 0, count)], weight, kv_score=kv_score, round_kv_score=rounded)
    assert asked.keys <= asked.prepared
    assert any(isinstance(key, StepKey) for key in asked.keys) and any(isinstance(key, AddKey) for key in asked.keys)
    assert kinds(asked.prepared) == kinds(asked.keys)


@pytest.mark.parametrize("kept", ["bf16", "fp8"])
def test_two(asked: Asked, kept: str) -> None:
    pair, device = ((ROWS, "fp32"), (NARROW, "fp32")), asked.backend.device
    kvfold.warmup([], [], dtypes=(), max_new_tokens=(20,), many=[pair], hidden_dims=(WIDTH,), weights=(kept,))
    both = [asked.layer(spec) for spec, _ in pair]
    if kept == "fp8":
        stacked = make_scaled_weight(sum(spec.kv_score_width for spec, _ in pair), WIDTH, device=device)
        weights = [make_scaled_weight(spec.kv_score_width, WIDTH, device=device) for spec, _ in pair]
        halves = [(make_scaled_weight(spec.channels, WIDTH, device=device),) * 2 for spec, _ in pair]
    else:
        weights = [one.weight for one in both]
        stacked, halves = torch.cat(weights), [tuple(one.weight.chunk(2)) for one in both]
    for count, weight, given in product(COUNTS, (stacked, weights, halves), (False, True)):
        made = []
        for one in both:
            kv_score = torch.empty(count, one.spec.kv_score_width, device=device) if given else None
            made.append((kv_score, one.state, one.cache, *one.given.values()))
        plan = both[0].plan([(0, 0, count)])
        plan.max_new_tokens = 20
        hidden = make_hidden(count, WIDTH).to(device)
        kvfold.project_compress_many(hidden, weight, made, plan, backend=asked.backend.name)
    assert asked.keys <= asked.prepared and any(isinstance(key, PairKey) for key in asked.keys)
    assert kinds(asked.keys) == kinds(asked.prepared)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"^hidden_dims must be a multiple of 64 and at least 256"):
        kvfold.warmup([FOLD], [None], hidden_dims=(100,))
    with pytest.raises(ValueError, match=r"^weights must be among"):
        kvfold.warmup([FOLD], [None], weights=("fp4",))
    with pytest.raises(ValueError, match=r"^round_kv_score must be among"):
        kvfold.warmup([FOLD], [None], round_kv_score=(None,))


def test_without_hidden_states_nothing_is_prepared(asked: Asked) -> None:
    kvfold.warmup([FOLD], [None])
    assert not kinds(asked.prepared)
