"""Pooled rows and entries against the fp64 reference, and record bytes against a packer that shares no code with kvfold."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from support.helpers import SPECS, Backend, Engine, Weights, make_tokens, norm_error
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, reference
from kvfold.contract import pooled_bound
from kvfold.storage.fold_state import state_kind

ULP = 2.0**-24  # half a unit in the last place of a number in [1, 2), fp32
SHAPES = [(ratio, head_dim) for ratio in (1, 2, 4, 8, 128) for head_dim in (128, 256, 512)]


def pooled_rows(
    spec: CompressorSpec, backend: Backend, tokens: Tensor, weights: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """(pooled rows of one prefill, pooled rows of the reference)."""
    weights = weights or Weights.make(spec)
    windows = len(tokens) // spec.ratio
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1, max_entries=max(windows, 1), weights=weights)
    step = engine.step([(0, 0, tokens)])
    got = torch.stack([step.pooled[0, w] for w in range(windows)])
    return got, reference.pooled(tokens, spec, weights.ape)


@pytest.mark.parametrize("ratio, head_dim", SHAPES)
def test_pooled_rows(backend: Backend, ratio: int, head_dim: int) -> None:
    spec = CompressorSpec(head_dim=head_dim, ratio=ratio)
    tokens = make_tokens(spec, (2 if ratio == 128 else 6) * ratio + 1, seed=ratio)
    got, want = pooled_rows(spec, backend, tokens)
    assert norm_error(got, want) <= pooled_bound(spec.window_rows)


@pytest.mark.parametrize("ratio, head_dim", [(2, 256), (4, 128), (4, 512), (8, 128)])
@pytest.mark.parametrize("has_ape", [False, True])
def test_pooled_rows_with_overlap(backend: Backend, ratio: int, head_dim: int, has_ape: bool) -> None:
    spec = CompressorSpec(head_dim=head_dim, ratio=ratio, overlap=True, has_ape=has_ape)
    got, want = pooled_rows(spec, backend, make_tokens(spec, 6 * ratio + 1, seed=ratio))
    assert norm_error(got, want) <= pooled_bound(spec.window_rows)


def with_scores(name: str, kind: str) -> tuple[CompressorSpec, Tensor, Weights]:
    """Tokens whose scores are hard: of magnitude 80, all equal, tied in pairs at the top, or masked with -inf."""
    spec = SPECS[name]
    tokens, weights = make_tokens(spec, 3 * spec.ratio, seed=30), Weights.make(spec)
    score = tokens[:, spec.channels :]
    if kind == "magnitude 80":
        score.copy_(torch.rand(score.shape, generator=torch.Generator().manual_seed(31)) * 160 - 80)
    elif kind == "two scales":
        score.mul_(20)
    else:
        weights = Weights(torch.zeros(spec.ratio, spec.channels), weights.norm_weight, weights.rope)
        if kind == "all equal":
            score.fill_(-3.5)
        elif kind == "ties at the top":
            score.copy_(score.round())
            score[0 :: spec.ratio] = 80.0
            score[spec.ratio - 1 :: spec.ratio] = 80.0
        elif kind == "rising":
            score.copy_(torch.linspace(-80, 80, len(score))[:, None].expand_as(score))
        elif kind == "falling":
            score.copy_(torch.linspace(80, -80, len(score))[:, None].expand_as(score))
        elif kind == "masked":
            score[torch.rand(score.shape, generator=torch.Generator().manual_seed(32)) < 0.5] = -torch.inf
            score[1 :: spec.ratio] = 0.25  # one token of each window is left in every channel
        elif kind == "first masked":
            score[0 :: spec.ratio] = -torch.inf
    return spec, tokens, weights


KINDS = (
    "magnitude 80", "two scales", "all equal", "ties at the top", "rising", "falling", "masked", "first masked",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_pooled_rows_of_hard_scores(backend: Backend, name: str, kind: str) -> None:
    spec, tokens, weights = with_scores(name, kind)
    got, want = pooled_rows(spec, backend, tokens, weights)
    assert not want.isnan().any()
    assert norm_error(got, want) <= pooled_bound(spec.window_rows)


@pytest.mark.parametrize("name", SPECS)
def test_bf16_input(backend: Backend, name: str) -> None:
    """bf16 rows are taken exactly; the result is the fp32 one, rounded to bf16 once when the caller wants bf16."""
    spec, weights = SPECS[name], Weights.make(SPECS[name])
    tokens = make_tokens(spec, 3 * spec.ratio, seed=33, dtype=torch.bfloat16)
    got, want = pooled_rows(spec, backend, tokens, weights)
    assert norm_error(got, want) <= pooled_bound(spec.window_rows)
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1, weights=weights)
    plan = engine.step([(0, 0, tokens)]).plan
    rounded = torch.zeros(3, spec.head_dim, dtype=torch.bfloat16, device=backend.device)
    engine.compress(tokens.to(backend.device), plan, rows=rounded)
    assert torch.equal(rounded.cpu(), got.bfloat16())
    assert norm_error(rounded.cpu(), want) <= 4e-3


@pytest.mark.parametrize("name", SPECS)
def test_a_nan_stays_in_its_channel_and_window(backend: Backend, name: str) -> None:
    spec = SPECS[name]
    tokens, weights = make_tokens(spec, 4 * spec.ratio, seed=34), Weights.make(spec)
    tokens[spec.ratio + 1, spec.channels - 1] = torch.nan  # the last value channel of window 1
    tokens[spec.ratio + 1, spec.channels - 2] = torch.inf
    tokens[spec.ratio + 2, -5] = torch.nan  # a score
    got, want = pooled_rows(spec, backend, tokens, weights)
    assert torch.equal(got.isfinite(), want.isfinite())
    assert (~got.isfinite()).nonzero().tolist() == [[1, spec.head_dim - c] for c in (5, 2, 1)]
    clean = torch.where(want.isfinite(), want, 0)
    assert norm_error(torch.where(got.isfinite(), got, 0), clean) <= pooled_bound(spec.window_rows)


@pytest.mark.parametrize("name", SPECS)
def test_an_infinite_score(backend: Backend, name: str) -> None:
    """Over input rows its channel is NaN, as in the reference; a fold row goes on with that token's value."""
    spec = SPECS[name]
    tokens, weights = make_tokens(spec, 3 * spec.ratio, seed=35), Weights.make(spec)
    tokens[spec.ratio, -3] = torch.inf
    got, want = pooled_rows(spec, backend, tokens, weights)
    assert want.isnan().nonzero().tolist() == [[1, spec.head_dim - 3]]
    if state_kind(spec) == "fold":
        assert got[1, -3] == tokens[spec.ratio, spec.channels - 3]
        want[1, -3] = got[1, -3]
    assert torch.equal(got.isnan(), want.isnan())
    assert norm_error(got.nan_to_num(), want.nan_to_num()) <= pooled_bound(spec.window_rows)


def entry_bound(spec: CompressorSpec, weights: Weights) -> float:
    """Largest |fp32 entry - fp64 entry|, as a Euclidean norm over an entry.

    The pooled row is within `pooled_bound` of its norm; dividing by the root mean square, whose own error is no larger
    than that plus a tree of log2(hd) + 1 sums and four roundings, gives a vector of norm sqrt(hd). The weight stretches by its
    largest, the rotations by nothing; each of product, rotation (three roundings) and Hadamard level rounds once more.
    """
    levels = spec.head_dim.bit_length() - 1
    relative = pooled_bound(spec.window_rows) + (levels + 5) * ULP + 4 * ULP + (levels + 1) * ULP * spec.hadamard
    return relative * spec.head_dim**0.5 * float(weights.norm_weight.abs().max())


@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_entries(backend: Backend, name: str, fmt: str) -> None:
    spec, weights = SPECS[name], Weights.make(SPECS[name])
    tokens = make_tokens(spec, 4 * spec.ratio + 1, seed=35)
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1, fmt=fmt, weights=weights)
    engine.step([(0, 0, tokens)])
    got, want = engine.entries(0, 4), weights.entries(tokens, spec)
    bound = entry_bound(spec, weights)
    if fmt == "fp32":
        assert (got - want).norm(dim=1).max() <= bound
    else:  # the fp32 entry, rounded once: half a unit in the last of 8 bits
        exact = Engine(spec, backend, num_slots=1, max_new_tokens=1, weights=weights)
        exact.step([(0, 0, tokens)])
        assert torch.equal(got, exact.entries(0, 4).bfloat16().float())
        assert ((got - want).abs() <= 2.0**-8 * (want.abs() + bound) + bound).all()


@pytest.mark.parametrize("rope_dim, hadamard", [(0, False), (0, True), (32, False), (128, True)])
def test_entries_of_other_specs(backend: Backend, rope_dim: int, hadamard: bool) -> None:
    spec = CompressorSpec(head_dim=128, ratio=2, has_ape=False, rope_dim=rope_dim, norm_eps=1e-20, hadamard=hadamard)
    weights, tokens = Weights.make(spec), make_tokens(spec, 9, seed=36)
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1, weights=weights)
    engine.step([(0, 0, tokens)])
    difference = engine.entries(0, 4).double() - weights.entries(tokens, spec)
    assert difference.norm(dim=1).max() <= entry_bound(spec, weights)


def expected_page(entries: np.ndarray, rows_per_page: int, canary: int) -> np.ndarray:
    """The bytes of a page of fp8_ds_mla records made from fp32 entries [n, 512], n <= rows_per_page, in numpy alone."""
    size = -(-584 * rows_per_page // 576) * 576
    page = np.full(size, canary, dtype=np.uint8)
    for j, entry in enumerate(entries.astype(np.float32)):
        half = entry.astype(ml_dtypes.bfloat16)
        page[576 * j + 448 : 576 * j + 576] = half[448:].view(np.uint8)
        for g in range(7):
            group = half[64 * g : 64 * g + 64].astype(np.float32)
            scale = np.maximum(np.float32(1e-4), np.abs(group).max() / np.float32(448))
            code = (scale.view(np.uint32) + np.uint32(0x7FFFFF)) >> np.uint32(23)
            quantized = (group / np.float32(2.0 ** (int(code) - 127))).astype(ml_dtypes.float8_e4m3fn)
            page[576 * j + 64 * g : 576 * j + 64 * g + 64] = quantized.view(np.uint8)
            page[576 * rows_per_page + 8 * j + g] = code
        page[576 * rows_per_page + 8 * j + 7] = 0
    return page


@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e-2, 40.0, 3e4])
@pytest.mark.parametrize("name", ["hca", "csa"])
def test_fp8_ds_mla_bytes(backend: Backend, name: str, scale: float) -> None:
    """Norm weights of many sizes put the groups below the scale's floor, near it, and far above."""
    spec, rows_per_page = SPECS[name], 3
    base = Weights.make(spec)
    spread = torch.logspace(-1, 1, 512)[torch.randperm(512, generator=torch.Generator().manual_seed(37))]
    weight = base.norm_weight * spread * scale
    weight[64:128] = 0.0  # a group of zeros, some of them negative
    weights = Weights(base.ape, weight, base.rope)
    windows = 3 if name == "hca" else 7
    tokens = make_tokens(spec, windows * spec.ratio, seed=38)
    options = {"num_slots": 1, "max_new_tokens": 1, "max_entries": windows, "weights": weights}
    exact = Engine(spec, backend, fmt="fp32", **options)
    exact.step([(0, 0, tokens)])
    entries = exact.entries(0, windows).numpy()
    packed = Engine(spec, backend, fmt="fp8_ds_mla", rows_per_page=rows_per_page, **options)
    packed.step([(0, 0, tokens)])
    pages = packed.cache.storage.cpu().numpy()
    assert pages.shape == (-(-windows // rows_per_page), 2304)
    codes = set()
    for index, page in enumerate(pages):
        want = expected_page(entries[3 * index : 3 * index + 3], rows_per_page, canary=0xA5)
        assert np.array_equal(page, want), f"page {index}, bytes {np.flatnonzero(page != want)[:20].tolist()}"
        codes |= {*want[576 * rows_per_page : 576 * rows_per_page + 7].tolist()}
    assert 114 in codes  # the floor
    got = packed.entries(0, windows)
    for j in range(windows):
        half = torch.from_numpy(entries[j]).bfloat16().float()
        assert torch.equal(got[j, 448:], half[448:])
        step = 2.0 ** (pages[j // 3][576 * 3 + 8 * (j % 3) : 576 * 3 + 8 * (j % 3) + 7].astype(int) - 127)
        error = (got[j, :448] - half[:448]).abs().reshape(7, 64)
        # Half a step of e4m3: 2^-4 of a normal number, 2^-10 of the scale below that.
        allowed = torch.maximum(half[:448].abs().reshape(7, 64) * 2.0**-4, torch.tensor(step)[:, None] * 2.0**-10)
        assert (error <= allowed).all()


def test_bf16_rows_round_to_even_and_have_one_nan(backend: Backend) -> None:
    """`rows` in bf16 are the fp32 rows rounded once; a NaN is 0x7FC0 on every backend."""
    spec = CompressorSpec(head_dim=128, ratio=1, has_ape=False)
    # One token per window with equal weights: the pooled row is the value row itself.
    tie_down, tie_up = 1 + 2.0**-8, 1 + 3 * 2.0**-8
    tokens = torch.full((1, 256), 0.0)
    tokens[0, :4] = torch.tensor([tie_down, tie_up, torch.nan, -torch.inf])
    ints = {"dtype": torch.int32, "device": backend.device}
    zero, cu_seqlens = torch.zeros(1, **ints), torch.tensor([0, 1], **ints)
    plan = kvfold.StepPlan.build(1, zero, cu_seqlens, 1, state_slots=zero)
    state = kvfold.FoldState.allocate(spec, 1, 1, device=backend.device)
    rows = torch.zeros(1, 128, dtype=torch.bfloat16, device=backend.device)
    weights = {"spec": spec, "ape": None, "norm_weight": None, "rope": None}
    kvfold.compress(tokens.to(backend.device), plan, state, None, rows=rows, backend=backend.name, **weights)
    got = rows[0, :5].view(torch.int16).tolist()
    assert got == [0x3F80, 0x3F82, 0x7FC0, 0xFF80 - 0x10000, 0]
