"""Entries made over paged raw state against the fp64 reference: every kind of spec, scores that are hard, and the rows kept."""

from __future__ import annotations

import pytest
import torch
from support.helpers import SPECS, Backend, Weights, make_tokens, norm_error
from support.window_support import WindowEngine, cut, run
from torch import Tensor

from kvfold import CompressorSpec, reference
from kvfold.contract import pooled_bound

BF16_ULP = 2.0**-8  # largest relative error of rounding to bf16
INPUTS = [
    pytest.param(torch.float32, torch.float32, id="fp32-fp32state"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32state"),
    pytest.param(torch.float32, torch.bfloat16, id="fp32-bf16state"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16-bf16state"),
]
inputs = pytest.mark.parametrize("dtype, state_dtype", INPUTS)
MORE_SPECS = {
    **SPECS,
    "2": CompressorSpec(head_dim=128, ratio=2),
    "2-overlap-no-ape": CompressorSpec(head_dim=256, ratio=2, overlap=True, has_ape=False),
    "4": CompressorSpec(head_dim=256, ratio=4),
    "4-overlap-256": CompressorSpec(head_dim=256, ratio=4, overlap=True),
    "8": CompressorSpec(head_dim=256, ratio=8, has_ape=False),
    "16": CompressorSpec(head_dim=128, ratio=16),
    "64": CompressorSpec(head_dim=256, ratio=64),
    "128-narrow": CompressorSpec(head_dim=128, ratio=128),
}


def rounding_bound(tokens: Tensor, spec: CompressorSpec, ape: Tensor | None) -> Tensor:
    """Largest |pooled row of a bf16 state - fp64 pooled row|, fp64 [windows, head_dim].

    A value is kept as k (1 + d) and a biased score as s (1 + e), |d| and |e| at most u = 2^-8. So a score moves by at most
    D = u max|s|, a weight p (a quotient of exponentials) by a factor between exp(-2D) and exp(2D), a term p k by one
    between exp(-2D) (1 - u) and exp(2D) (1 + u), and the sum by at most (exp(2D) (1 + u) - 1) sum p |k|. All in fp32, which
    adds `pooled_bound` of the same sum.
    """
    k, s = tokens.double().split(spec.channels, dim=1)
    mean = reference.pooled(torch.cat([k.abs(), s], dim=1), spec, ape)
    if ape is not None:
        s = s + ape.double()[torch.arange(len(s)) % spec.ratio]
    largest = s.abs()[: len(mean) * spec.ratio].unflatten(0, (-1, spec.ratio)).amax(1)
    if spec.overlap:
        before = torch.cat([torch.zeros_like(largest[:1]), largest[:-1]])
        largest = torch.maximum(before[:, : spec.head_dim], largest[:, spec.head_dim :])
    return (torch.exp(2 * BF16_ULP * largest) * (1 + BF16_ULP) - 1 + pooled_bound(spec.window_rows)) * mean


def check(engine: WindowEngine, tokens: Tensor, pooled: dict[int, Tensor], sequence: int = 0) -> None:
    """These windows' pooled rows, and the entries in the cache, are right."""
    spec, weights = engine.spec, engine.weights
    windows = sorted(pooled)
    got, rounded = torch.stack([pooled[w] for w in windows]), engine.reference(tokens)[windows]
    assert norm_error(got, rounded) <= pooled_bound(spec.window_rows)
    exact = reference.pooled(tokens, spec, weights.ape)[windows]
    if engine.state.dtype == torch.float32:
        assert norm_error(got, exact) <= pooled_bound(spec.window_rows)
    else:
        assert ((got.double() - exact).abs() <= rounding_bound(tokens, spec, weights.ape)[windows]).all()
    if engine.fmt == "fp32":
        want = reference.rms_norm(engine.reference(tokens), weights.norm_weight, spec.norm_eps)
        want = reference.rope(want, weights.rope, torch.arange(len(want)) * spec.ratio, spec.rope_dim)
        want = reference.hadamard(want) if spec.hadamard else want
        assert norm_error(engine.entries(sequence, len(want))[windows], want[windows]) <= 1e-5


@inputs
@pytest.mark.parametrize("name", MORE_SPECS)
def test_a_prefill_and_a_decode(backend: Backend, name: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """Entries of live rows, of old rows and of both; the engine checks that every token's row is kept as defined."""
    spec = MORE_SPECS[name]
    if backend.slow and spec.ratio == 128 and (dtype != state_dtype or (name == "hca" and dtype == torch.bfloat16)):
        pytest.skip("the interpreter takes seconds for this, and the other ratios show the same")
    engine = WindowEngine(
        spec, backend, num_sequences=2, length=5 * spec.ratio, page_size=6, state_dtype=state_dtype, one_pool=spec.overlap
    )
    length = 3 * spec.ratio + 2
    tokens = make_tokens(spec, length, seed=40, dtype=dtype)
    before = spec.ratio + spec.ratio // 2
    check(engine, tokens, run(engine, 1, tokens, [before, spec.ratio // 2, *cut(length - 2 * spec.ratio, spec.ratio - 1)]), 1)
    text = make_tokens(spec, length, seed=41, dtype=dtype)
    check(engine, text, run(engine, 0, text, [length]))


SCORES = ("scale 1e4", "scale 1e4 and ties", "all equal", "ties at the top", "rising", "falling", "masked", "first masked")


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("name", ["indexer", "16", "128-narrow"])
def test_hard_scores(backend: Backend, name: str, kind: str) -> None:
    spec = MORE_SPECS[name]
    if backend.slow and spec.ratio == 128 and kind in ("scale 1e4", "ties at the top", "rising", "falling"):
        pytest.skip("the interpreter takes seconds for this, and the other ratios show the same")
    tokens, weights = make_tokens(spec, 3 * spec.ratio, seed=42, score_scale=1e4), Weights.make(spec)
    weights = Weights(torch.zeros(spec.ratio, spec.channels), weights.norm_weight, weights.rope)
    score, draw = tokens[:, spec.channels :], torch.Generator().manual_seed(43)
    if kind == "scale 1e4 and ties":
        score.copy_((score / 1e4).round() * 1e4)
    elif kind == "all equal":
        score.fill_(-12345.0)
    elif kind == "ties at the top":
        score[0 :: spec.ratio] = 5e4
        score[spec.ratio - 1 :: spec.ratio] = 5e4
    elif kind in ("rising", "falling"):
        far = 80 if kind == "rising" else -80
        score.copy_(torch.linspace(-far, far, len(score))[:, None].expand_as(score))
    elif kind == "masked":
        score[torch.rand(score.shape, generator=draw) < 0.5] = -torch.inf
        score[1 :: spec.ratio] = 0.25  # one token of each window is left in every channel
    elif kind == "first masked":
        score[0 :: spec.ratio] = -torch.inf
    for steps in ([len(tokens)], cut(len(tokens), spec.ratio // 2 + 1)):
        engine = WindowEngine(spec, backend, num_sequences=1, length=len(tokens), page_size=32, weights=weights)
        check(engine, tokens, run(engine, 0, tokens, steps))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["indexer", "16"])
def test_nan_and_infinity_stay_in_their_channel_and_window(backend: Backend, name: str, state_dtype: torch.dtype) -> None:
    """Also a channel of which all scores are -inf, which has no mean; read live, and read back from pages."""
    spec = MORE_SPECS[name]
    tokens, c, hd = make_tokens(spec, 4 * spec.ratio, seed=44), spec.channels, spec.head_dim
    tokens[spec.ratio + 1, c - 1] = torch.nan  # a value of the last channel, in the half of its own window
    tokens[spec.ratio + 1, c - 2] = torch.inf
    tokens[spec.ratio + 1, -5] = torch.nan  # a score
    tokens[:, -7] = torch.where(torch.arange(len(tokens)) // spec.ratio == 1, -torch.inf, tokens[:, -7])
    if spec.overlap:
        tokens[: spec.ratio, c + hd - 7] = -torch.inf  # the other half of the rows of window 1
    for steps in ([len(tokens)], cut(len(tokens), 3)):
        engine = WindowEngine(spec, backend, num_sequences=1, length=len(tokens), page_size=4, state_dtype=state_dtype, seed=1)
        pooled = run(engine, 0, tokens, steps)
        got, want = torch.stack([pooled[w] for w in range(4)]), engine.reference(tokens)
        assert torch.equal(got.isfinite(), want.isfinite()) and torch.equal(got.isnan(), want.isnan())
        assert (~got.isfinite()).nonzero().tolist() == [[1, hd - i] for i in (7, 5, 2, 1)]
        finite = want.isfinite()
        error = norm_error(got.where(finite, torch.zeros(())), want.where(finite, torch.zeros(()).double()))
        assert error <= pooled_bound(spec.window_rows)


@pytest.mark.parametrize("name", ["csa", "128-narrow"])
def test_rows_in_bf16(backend: Backend, name: str) -> None:
    """`rows` in bf16 are the fp32 ones, rounded once; without a cache nothing else is made."""
    spec = MORE_SPECS[name]
    tokens = make_tokens(spec, 2 * spec.ratio, seed=45)
    engine = WindowEngine(spec, backend, num_sequences=1, length=len(tokens), page_size=8)
    step = engine.step([(0, 0, tokens)])
    got = torch.stack([step.pooled[0, w] for w in range(2)])
    storage, rounded = engine.cache.storage.clone(), torch.zeros(2, spec.head_dim, dtype=torch.bfloat16).to(backend.device)
    cache, engine.cache = engine.cache, None
    engine.compress(tokens.to(backend.device), step.plan, rows=rounded)
    assert torch.equal(rounded.cpu(), got.bfloat16())
    assert torch.equal(cache.storage, storage)


def test_large_scores_close_together_in_different_rows(backend: Backend) -> None:
    """Weights are of differences: what rounding 50,000 * log2(e) loses, 0.3 %, must be lost alike by every row of a channel."""
    spec = MORE_SPECS["128-narrow"]
    tokens, weights = make_tokens(spec, 3 * spec.ratio, seed=45), Weights.make(spec)
    weights = Weights(torch.zeros(spec.ratio, spec.channels), weights.norm_weight, weights.rope)
    score = tokens[:, spec.channels :]
    score.copy_(50_000 + torch.rand(score.shape, generator=torch.Generator().manual_seed(46)))
    for steps in ([len(tokens)], cut(len(tokens), spec.ratio // 2 + 1)):
        engine = WindowEngine(spec, backend, num_sequences=1, length=len(tokens), page_size=128, weights=weights)
        check(engine, tokens, run(engine, 0, tokens, steps))
