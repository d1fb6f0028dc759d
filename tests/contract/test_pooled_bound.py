"""The bound of a pooled row as a function of its window's rows: it holds, and not by much."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import Backend, Engine, Weights, norm_error
from support.window_support import WindowEngine
from torch import Tensor

from kvfold import CompressorSpec, reference
from kvfold.contract import pooled_bound, pooled_worst

CASES = [  # ratio, overlap, raw: fold rows, input rows and raw windows, of 1 to 8192 rows
    *((ratio, False, False) for ratio in (1, 4, 8, 31, 128, 129, 1024, 4096)),
    *((ratio, True, False) for ratio in (1, 4, 64, 1024)),
    *((ratio, False, True) for ratio in (1, 4, 128, 4096)),
    *((ratio, True, True) for ratio in (1, 4, 512)),
]
KINDS = ("random", "tied", "tied, large means", "one value", "rising", "falling")
CHANNELS = 64


def make_window(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Values and scores [n, CHANNELS]."""
    g = torch.Generator().manual_seed(n)
    k, s = torch.randn(n, CHANNELS, generator=g), torch.randn(n, CHANNELS, generator=g)
    if "tied" in kind or kind == "one value":
        s = torch.full_like(s, -3.5)
    if "large means" in kind:
        k = k + 100 * torch.randn(1, CHANNELS, generator=g)
    if kind == "one value":  # so that each sum of a channel is rounded the same way for as long as its exponent stays
        k = k[:1].repeat(n, 1)
    if kind in ("rising", "falling"):
        s = torch.linspace(0, 32 if kind == "rising" else -32, n)[:, None].repeat(1, CHANNELS)
    if kind == "slow":  # rises with every token and by so little that all weigh as much, the first one through n exponentials
        k = k.sort(0).values
        s = torch.linspace(0, 0.1, n)[:, None].repeat(1, CHANNELS)
    if kind == "sink":  # all others weigh a little less than what 1 can be told from, and are lost from the sum of weights
        s = torch.full_like(s, -24.02 * math.log(2))
        s[0] = 0.0
    return k, s


def pool(
    backend: Backend, ratio: int, overlap: bool, raw: bool, windows: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled rows of these windows, each of a sequence: what was found, the exact ones, and those of |values|."""
    spec = CompressorSpec(head_dim=CHANNELS, ratio=ratio, overlap=overlap, has_ape=False, rope_dim=0)
    options: dict = {"weights": Weights.make(spec, max_positions=2 * ratio)}
    if raw:
        engine: Engine = WindowEngine(
            spec, backend, num_sequences=len(windows), length=2 * ratio, page_size=ratio, **options
        )  # fmt: skip
    else:
        engine = Engine(spec, backend, num_slots=len(windows), max_new_tokens=1, max_entries=2, **options)
    texts = []
    for window in windows:
        k, s = window
        if overlap:  # the first half of the rows are the lo ones of a window before
            k, s = (torch.cat([x[:ratio], x[ratio:]], dim=1).repeat(2, 1) for x in window)
        texts.append(torch.cat([k, s], dim=1))
    step = engine.step([(i, 0, tokens) for i, tokens in enumerate(texts)])
    got = torch.stack([step.pooled[i, int(overlap)] for i in range(len(windows))])
    want = [reference.pooled(tokens, spec, None)[-1] for tokens in texts]
    sizes = [torch.cat([tokens[:, : spec.channels].abs(), tokens[:, spec.channels :]], dim=1) for tokens in texts]
    return got, torch.stack(want), torch.stack([reference.pooled(tokens, spec, None)[-1] for tokens in sizes])


@pytest.mark.parametrize("ratio, overlap, raw", CASES)
def test_bound(backend: Backend, ratio: int, overlap: bool, raw: bool) -> None:
    rows = ratio * (1 + overlap)
    if backend.slow and (rows > 128 or (overlap and rows > 8)):
        pytest.skip("a token takes the interpreter a millisecond")
    got, want, size = pool(backend, ratio, overlap, raw, [make_window(kind, rows) for kind in KINDS])
    errors = {kind: norm_error(got[i : i + 1], want[i : i + 1]) for i, kind in enumerate(KINDS)}
    assert max(errors.values()) <= pooled_bound(rows), errors
    assert ((got.double() - want).abs() <= pooled_worst(rows) * size).all()
    if rows >= 128 and not (raw and backend.name == "triton"):  # 8 lanes, whose sums are an eighth as long, are nearer
        assert max(errors.values()) > pooled_bound(rows) / 3, f"the bound is loose: {errors}"


@pytest.mark.parametrize("ratio", [128, 1024])
def test_errors_that_go_one_way(backend: Backend, ratio: int) -> None:
    """The other bound holds then too: of weights that are all lost from a sum, and of a maximum that rises with every token."""
    if backend.slow and ratio > 128:
        pytest.skip("a token takes the interpreter a millisecond")
    got, want, size = pool(backend, ratio, False, False, [make_window("sink", ratio), make_window("slow", ratio)])
    assert norm_error(got[:1], want[:1]) > max(0.9 * ratio * 2.0**-24, pooled_bound(ratio))
    assert ((got.double() - want).abs() <= pooled_worst(ratio) * size).all()


def test_values_that_cancel(backend: Backend) -> None:
    """The norm of the row is no measure then, but the mean of |values| still is."""
    k, s = make_window("tied", 8)
    k[0], k[7] = k[0] + 1e4, k[7] - 1e4
    got, want, size = pool(backend, 8, False, False, [(k, s)])
    assert norm_error(got, want) > pooled_bound(8)
    assert ((got.double() - want).abs() <= pooled_worst(8) * size).all()


def test_bound_as_promised() -> None:
    assert {pooled_bound(n) for n in (1, 4, 8, 127, 128)} == {2e-6}
    assert pooled_bound(4096) == 6.4e-5
    assert all(pooled_bound(n) <= pooled_worst(n) for n in range(2, 8193))
