"""`check` takes NaN and infinity as docs/numerics.md says: a right call is equal, and a fault beside them is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.debug_support import wrong
from support.helpers import Backend
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, testing
from kvfold.debug.check import Report, check
from kvfold.storage.formats import FORMATS

INF = float("inf")
FOLD = CompressorSpec(head_dim=128, ratio=16)
ROWS = CompressorSpec(head_dim=128, ratio=4, overlap=True)
WIDE = CompressorSpec(head_dim=512, ratio=4, overlap=True)
HADAMARD = CompressorSpec(head_dim=128, ratio=4, overlap=True, hadamard=True)
KINDS = {
    "fold": (FOLD, "fold", torch.float32), "rows": (ROWS, "fold", torch.float32), "wide": (WIDE, "fold", torch.float32),
    "hadamard": (HADAMARD, "fold", torch.float32), "window": (ROWS, "window", torch.float32),
    "window16": (FOLD, "window", torch.float32), "window_bf16": (ROWS, "window", torch.bfloat16),
}  # fmt: skip
CHANNEL = 37  # of a pooled row: with overlap of the half that serves its own window


def put(tokens: Tensor, spec: CompressorSpec, half: str, token: int, value: float) -> None:
    start = spec.channels - spec.head_dim + (spec.channels if half == "s" else 0)
    tokens[token, start + CHANNEL] = value


def all_masked(tokens: Tensor, spec: CompressorSpec) -> None:
    """Of both halves, as an entry with overlap is made of tokens of two windows."""
    for start in range(spec.channels + CHANNEL, 2 * spec.channels, spec.head_dim):
        tokens[:, start] = -INF


PLANTED: dict[str, Callable[[Tensor, CompressorSpec], None]] = {
    "a NaN value": lambda x, spec: put(x, spec, "k", spec.ratio + 1, torch.nan),
    "a NaN score": lambda x, spec: put(x, spec, "s", spec.ratio + 1, torch.nan),
    "a score of inf": lambda x, spec: put(x, spec, "s", spec.ratio + 1, INF),
    "two scores of inf": lambda x, spec: [put(x, spec, "s", spec.ratio + i, INF) for i in (0, 2)],
    "a masked score": lambda x, spec: put(x, spec, "s", spec.ratio + 1, -INF),
    "all scores masked": all_masked,
    "an infinite value": lambda x, spec: put(x, spec, "k", spec.ratio + 1, INF),
    "values of both infinities": lambda x, spec: [put(x, spec, "k", spec.ratio + i, v) for i, v in ((0, INF), (3, -INF))],
    "an infinite value of no weight": lambda x, spec: [
        put(x, spec, "k", spec.ratio + 1, -INF), put(x, spec, "s", spec.ratio + 1, -500.0)
    ],
    "an infinite value under a score of inf": lambda x, spec: [
        put(x, spec, half, spec.ratio + 1, INF) for half in ("k", "s")
    ],
    "an infinite value beside a score of inf": lambda x, spec: [
        put(x, spec, "k", spec.ratio, INF), put(x, spec, "s", spec.ratio + 1, INF)
    ],
}  # fmt: skip


class Step:
    """The second step of a sequence, two windows and a half of it, after half a window of history."""

    def __init__(self, kind: str, plant: Callable, fmt: str, backend: Backend) -> None:
        spec, state, dtype = KINDS[kind]
        self.spec, draw, half = spec, torch.Generator().manual_seed(5), spec.ratio // 2
        tokens = testing.make_tokens(spec, [3 * spec.ratio], "normal", draw, torch.float32, "cpu")[0]
        plant(tokens, spec)
        tokens = tokens.bfloat16().float().to(backend.device)
        weights = testing.make_weights(spec, len(tokens), "normal", draw, torch.float32, backend.device)
        options = {"most": 2 * spec.ratio, "rows_per_page": 8, "page_size": spec.ratio, "shuffled": False, "rows": None}
        engine = testing.Engine.make([tokens], weights, kind=state, fmt=fmt, dtype=dtype, backend=backend.name, **options)
        engine.run([testing.Step.of((0, 0, half))])
        self.args, named = engine.arguments(testing.Step.of((0, half, len(tokens) - half)))
        self.named = {**named, "backend": backend.name, "full_history": [tokens[:half]]}

    def check(self, **options: object) -> Report:
        return check(*self.args, **self.named | options)


def fits(kind: str, fmt: str) -> bool:
    spec, form = KINDS[kind][0], FORMATS[fmt]
    return not form.head_dims or spec.head_dim in form.head_dims


TORCH = Backend("torch", torch.device("cpu"))
RIGHT = [(kind, fmt) for kind in KINDS for fmt in ("fp32", "indexer_mxfp4") if fits(kind, fmt)]
OTHERS = [("wide" if fits("wide", fmt) else "rows", fmt) for fmt in sorted(FORMATS) if fmt not in ("fp32", "indexer_mxfp4")]


@pytest.mark.parametrize("plant", PLANTED)
def test_a_right_call_is_equal_in_every_format(plant: str) -> None:
    i = list(PLANTED).index(plant)
    for kind, fmt in (*RIGHT[i % 2 :: 2], *OTHERS[i % 3 :: 3]):  # all of them meet all kinds of entries: finite, NaN, zeros
        report = Step(kind, PLANTED[plant], fmt, TORCH).check()
        assert report.equal and report.entries == report.referenced == 3, f"{kind}, {fmt}: {report}"


@pytest.mark.parametrize("kind", ("fold", "rows", "window", "window_bf16"))
@pytest.mark.parametrize("plant", PLANTED)
def test_kernels_are_equal(backend: Backend, plant: str, kind: str) -> None:
    if backend.slow and kind != ("fold", "rows", "window")[list(PLANTED).index(plant) % 3]:
        pytest.skip("slow")
    report = Step(kind, PLANTED[plant], "indexer_mxfp4", backend).check()
    assert report.equal and report.referenced == 3, report


@pytest.mark.parametrize("kind", ("fold", "rows", "hadamard", "window"))
def test_values_whose_squares_no_fp32_holds_make_zeros(backend: Backend, kind: str) -> None:
    for value in (1e20, -3e38):
        step = Step(kind, lambda x, spec, value=value: put(x, spec, "k", spec.ratio + 1, value), "fp32", backend)
        report = step.check()
        assert report.equal and report.referenced == 3, report
    if kind == "fold":  # zeros, and nothing else is right

        def spoil(state, cache, rows, _) -> None:
            cache.pages[0].view(torch.float32)[step.spec.head_dim + 3] = 0.5  # of window 1

        with pytest.MonkeyPatch.context() as patch:
            wrong(patch, spoil)
            report = Step(kind, lambda x, spec: put(x, spec, "k", spec.ratio + 1, 1e20), "fp32", TORCH).check(backend="triton")
        assert report.headline == "DIFFERENT", report


def pooled_row(state, cache, rows, _) -> None:
    if rows is not None:
        rows[1, CHANNEL + 1] += 0.01


def record(state, cache, rows, _) -> None:
    cache.pages[0, cache.format.row_bytes(cache.spec) + 4 * (CHANNEL + 1) + 3] ^= 64  # fp32, of window 1: a NaN no more


def state_row(state, cache, rows, _) -> None:
    last = int(state.held()[0].argmax())
    width = state.rows.shape[-1]
    state.rows[0, last, ..., (CHANNEL + 1) % width] += 0.01


def other_class(state, cache, rows, _) -> None:
    """Of the channel that is not finite, another number."""
    if rows is not None:
        rows[1, CHANNEL] = 3.0


@pytest.mark.parametrize("kind", ("fold", "rows"))
@pytest.mark.parametrize("plant", PLANTED)
def test_a_fault_in_the_next_channel_is_found(monkeypatch: pytest.MonkeyPatch, plant: str, kind: str) -> None:
    step = Step(kind, PLANTED[plant], "fp32", TORCH)
    for spoil, stage, channel in ((pooled_row, "pooled row", CHANNEL + 1), (state_row, "state row", CHANNEL + 1),
                                  (record, "record bytes", None), (other_class, "pooled row", CHANNEL)):  # fmt: skip
        with monkeypatch.context() as patch:
            wrong(patch, spoil)
            report = step.check(backend="triton")
        named = [d for d in report.differences if d.stage == stage and channel in (None, d.channel)]
        assert named and report.headline == "DIFFERENT", (stage, str(report))


def test_m_of_a_fold_row_is_exact_beside_a_masked_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The m of a channel without weights is the lowest number, in whose norm any other m would vanish."""
    step = Step("fold", all_masked, "fp32", TORCH)

    def spoil(state, cache, rows, _) -> None:
        state.rows[0, int(state.held()[0].argmax()), 0, CHANNEL + 1] += 1e-5

    wrong(monkeypatch, spoil)
    report = step.check(backend="triton")
    assert report.first is not None and (report.first.stage, report.first.channel) == ("state row", CHANNEL + 1)
    assert report.first.where.endswith(", m")


def test_a_sink_is_no_difference() -> None:
    """A token that outweighs all others by 2^24, in all channels: more rounding than random rows have, and none but that."""
    spec = kvfold.CompressorSpec(16, 128, rope_dim=0, has_ape=False)
    tokens = torch.full((128, 32), 0.7654321)
    tokens[:, 16:] = -0.5
    tokens[0] = torch.tensor([-0.7654321] * 16 + [16.2] * 16)
    weights = {"spec": spec, "ape": None, "norm_weight": torch.ones(16), "rope": None}
    args, named = testing.Engine.make([tokens], weights, fmt="fp32").arguments(testing.Step.of((0, 0, 128)))
    report = kvfold.check(*args, **named)
    assert report.equal and report.referenced == 1, str(report)
