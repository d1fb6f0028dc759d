"""Rounding is unbiased where it should be: statistics with a stated chance of a false alarm, and the biases that are meant.

Elements are rounded with a scale of exactly 1, which every group gets from one channel that holds the encoding's largest
value. All draws are seeded, so a test that passes once always passes; `ALPHA` is the chance, over seeds, that a correct
rounding would have failed a test, by Hoeffding's inequality for sums of independent bounded variables (for counts, a bound on
the binomial tails).
"""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest
import torch
from support.helpers import Backend
from support.record_support import SPECS, write

from kvfold.storage.cache import EntryCache
from kvfold.storage.formats import FORMATS

ALPHA = 1e-9
# Formats that round fp32 to elements in one step. Rounding to bf16 first moves ties, which is why the others are not here.
ENCODINGS = {"e4m3": ("fp8_block128", 128), "e2m1": ("mxfp4", 128), "e2m1 ties to zero": ("indexer_mxfp4_sglang", 128)}


def code_values(encoding: str) -> np.ndarray:
    """The non-negative values in the order of their codes, from the definition of the encoding."""
    if encoding == "e4m3":
        return np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127])
    return np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def rounded(backend: Backend, encoding: str, x: np.ndarray) -> np.ndarray:
    """What the writer makes of each value of `x`, in fp64."""
    name, hd = ENCODINGS[encoding]
    group, top = FORMATS[name].group, FORMATS[name].element_max
    assert FORMATS[name].round_values is False and np.abs(x).max() <= top
    body = np.resize(x.astype(np.float32), (-(-len(x) // ((hd // group) * (group - 1))), hd // group, group - 1))
    assert (body.ravel()[: len(x)] == x).all(), "values must be fp32 numbers"
    entries = np.concatenate([np.full((*body.shape[:2], 1), top, np.float32), body], axis=2).reshape(-1, hd)
    cache = EntryCache.allocate(name, 1, len(entries), SPECS[hd], device=backend.device)
    write(backend, cache, list(range(len(entries))), entries)
    out = cache.read(torch.arange(len(entries), device=backend.device)).cpu().double().numpy()
    out = out.reshape(len(entries), hd // group, group)
    assert (out[:, :, 0] == top).all(), "the scale is not 1"
    return out[:, :, 1:].ravel()[: len(x)]


def draws(encoding: str, per_cell: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed values inside every cell between neighbouring codes, uniform on odd 4096ths of it, so that none is a tie.

    Returns their magnitudes, signs and cells.
    """
    rng, values = np.random.default_rng(seed), code_values(encoding)
    cell = np.repeat(np.arange(len(values) - 1), per_cell)
    low, high = values[cell], values[cell + 1]
    magnitude = low + (high - low) * (2 * rng.integers(0, 2048, len(cell)) + 1) / 4096
    return magnitude, rng.choice([-1.0, 1.0], len(cell)), cell


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_uniform_values_round_up_half_the_time(backend: Backend, encoding: str) -> None:
    """In each cell, for each sign, and over all: the count of roundings away from zero is binomial with probability 1/2."""
    values = code_values(encoding)
    cells = len(values) - 1
    per_cell = (20_000 if backend.slow else 200_000) // cells
    magnitude, sign, cell = draws(encoding, per_cell, 21)
    got = rounded(backend, encoding, magnitude * sign) * sign
    up = got == values[cell + 1]
    assert (up | (got == values[cell])).all(), "a value left its cell"
    checks = [(f"cell {i} sign {s:+.0f}", (cell == i) & (sign == s)) for i in range(cells) for s in (-1.0, 1.0)]
    checks.append(("all", np.ones(len(up), bool)))
    for what, chosen in checks:
        n, ups = int(chosen.sum()), int(up[chosen].sum())
        bound = sqrt(n / 2 * log(2 * len(checks) / ALPHA))  # 2 exp(-2 bound^2 / n) for each of the checks
        assert abs(ups - n / 2) <= bound, f"{what}: {ups} of {n} up, bound {bound:.0f}"
        assert bound < n / 2, "the bound says nothing"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_uniform_values_have_no_mean_error(backend: Backend, encoding: str) -> None:
    """The error in units of the cell lies in [-1/2, 1/2] with mean 0; truncation would have mean -1/2."""
    values = code_values(encoding)
    magnitude, sign, cell = draws(encoding, (20_000 if backend.slow else 200_000) // (len(values) - 1), 22)
    got = rounded(backend, encoding, magnitude * sign)
    width = (values[1:] - values[:-1])[cell]
    bound = sqrt(log(4 / ALPHA) / (2 * len(cell)))
    for what, error in (
        ("away from zero", (got * sign - magnitude) / width),
        ("upward", (got - magnitude * sign) / width),
    ):
        assert np.abs(error).max() < 0.5
        assert abs(error.mean()) <= bound, f"{what}: mean error {error.mean():.5f} of a cell, bound {bound:.5f}"


def ties(encoding: str) -> np.ndarray:
    values = code_values(encoding)
    return (values[1:] + values[:-1]) / 2


@pytest.mark.parametrize("encoding", ["e4m3", "e2m1"])
def test_ties_to_even_are_balanced(backend: Backend, encoding: str) -> None:
    """Every tie of both signs goes to the even code, so as many go up as down.

    Exactly so for e4m3's 126 ties. Of e2m1's seven the last, 5, goes down to 4 and has no partner; the six below it balance.
    Then ties at random, which is what coarse inputs such as bf16 give: a binomial count with probability 1/2.
    """
    values, at = code_values(encoding), ties(encoding)
    at = at[: len(at) // 2 * 2]
    got = rounded(backend, encoding, np.concatenate([at, -at])) * np.repeat([1, -1], len(at))
    up = (got == np.tile(values[1 : len(at) + 1], 2)).astype(int)
    assert (up == np.tile(np.arange(len(at)) % 2, 2)).all()
    assert 2 * up.sum() == len(up)

    rng = np.random.default_rng(23)
    n = 20_000 if backend.slow else 200_000
    index, sign = rng.integers(0, len(at), n), rng.choice([-1.0, 1.0], n)
    ups = int((rounded(backend, encoding, at[index] * sign) * sign == values[index + 1]).sum())
    assert abs(ups - n / 2) <= sqrt(n / 2 * log(2 / ALPHA)), f"{ups} of {n} up"


@pytest.mark.parametrize("encoding", ["e2m1", "e2m1 ties to zero"])
def test_ties_to_zero_are_biased(backend: Backend, encoding: str) -> None:
    """Of values on a grid of quarters of a cell, 1 in 4 is a tie. Ties toward zero shrink every one of them by half a cell.

    That makes a mean error of -1/8 of a cell; ties to even make none, over the six cells that balance. Each within a bound
    far below the difference, so that either rounding would fail as the other.
    """
    values = code_values(encoding)
    n, rng = 20_000 if backend.slow else 400_000, np.random.default_rng(24)
    cell, sign = rng.integers(0, 6, n), rng.choice([-1.0, 1.0], n)
    width = (values[1:] - values[:-1])[cell]
    magnitude = values[cell] + width * rng.integers(0, 4, n) / 4
    got = rounded(backend, encoding, magnitude * sign) * sign
    error = (got - magnitude) / width
    tie = magnitude == ties(encoding)[cell]
    bound = sqrt(log(4 / ALPHA) / (2 * n))  # the errors lie in [-1/2, 1/2]; two bounds
    assert bound < 1 / 16
    if encoding == "e2m1":
        assert abs(error.mean()) <= bound
    else:
        assert (error[tie] == -0.5).all()
        assert abs(error.mean() + 1 / 8) <= bound
    assert abs(error[~tie].sum()) <= sqrt(n / 2 * log(4 / ALPHA))  # what is no tie is unbiased either way
