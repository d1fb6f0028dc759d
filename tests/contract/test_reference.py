"""The reference against closed forms and small independent computations, so that it can be trusted to judge the rest."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.helpers import SPECS, Weights, make_tokens

from kvfold import CompressorSpec, reference

TINY = CompressorSpec(head_dim=16, ratio=3, rope_dim=4)
TINY_OVERLAP = CompressorSpec(head_dim=16, ratio=3, overlap=True, rope_dim=4)
TINY_NO_APE = dataclasses.replace(TINY, has_ape=False)


@pytest.mark.parametrize("overlap", [False, True])
def test_pooled_is_the_formula_written_as_a_loop(overlap: bool) -> None:
    spec = TINY_OVERLAP if overlap else TINY
    tokens, weights = make_tokens(spec, 11, seed=0).double(), Weights.make(spec)
    got = reference.pooled(tokens, spec, weights.ape)
    assert got.shape == (3, 16) and got.dtype == torch.float64
    for window in range(3):
        for channel in range(16):
            terms = []  # (weight, value)
            for t in range(9):
                own, before = t // 3 == window, t // 3 == window - 1
                if own or (before and overlap):
                    # An own token brings its last 16 channels, one of the window before its first 16.
                    c = channel + (16 if overlap and own else 0)
                    score = tokens[t, spec.channels + c] + weights.ape[t % 3, c].double()
                    terms.append((math.exp(score), float(tokens[t, c])))
            want = sum(w * v for w, v in terms) / sum(w for w, _ in terms)
            assert float(got[window, channel]) == pytest.approx(want, rel=1e-13)


def test_equal_scores_give_the_mean() -> None:
    tokens = make_tokens(TINY_NO_APE, 9, seed=1)
    tokens[:, 16:] = 7.25
    got = reference.pooled(tokens, TINY_NO_APE, None)
    torch.testing.assert_close(got, tokens[:, :16].double().reshape(3, 3, 16).mean(1), rtol=1e-14, atol=1e-15)


def test_ties_share_and_masked_tokens_do_not_count() -> None:
    tokens = make_tokens(TINY_NO_APE, 3, seed=2)
    tokens[:, 16:] = torch.tensor([90.0, 90.0, -math.inf])[:, None]
    got = reference.pooled(tokens, TINY_NO_APE, None)[0]
    torch.testing.assert_close(got, tokens[:2, :16].double().mean(0), rtol=1e-14, atol=1e-15)


def test_one_high_score_picks_its_token() -> None:
    tokens = make_tokens(TINY_NO_APE, 3, seed=3)
    tokens[1, 16:] = 2000.0
    assert torch.equal(reference.pooled(tokens, TINY_NO_APE, None)[0], tokens[1, :16].double())


def test_ape_is_a_score_by_position_in_the_window() -> None:
    tokens, ape = make_tokens(TINY, 9, seed=4), Weights.make(TINY).ape
    shifted = tokens.double()
    shifted[:, 16:] += ape.double().repeat(3, 1)
    want = reference.pooled(shifted, TINY_NO_APE, None)
    assert torch.equal(reference.pooled(tokens, TINY, ape), want)
    assert (want - reference.pooled(tokens, TINY_NO_APE, None)).abs().max() > 0.1


def test_a_ratio_of_one_returns_the_values() -> None:
    spec = CompressorSpec(head_dim=16, ratio=1, rope_dim=0)
    tokens, ape = make_tokens(spec, 5, seed=5), torch.randn(1, 16)
    assert torch.equal(reference.pooled(tokens, spec, ape), tokens[:, :16].double())


@pytest.mark.parametrize("length", [0, 1, 2])
def test_fewer_tokens_than_a_window_make_no_entry(length: int) -> None:
    tokens, weights = make_tokens(TINY_OVERLAP, length, seed=6), Weights.make(TINY_OVERLAP)
    assert reference.pooled(tokens, TINY_OVERLAP, weights.ape).shape == (0, 16)
    assert weights.entries(tokens, TINY_OVERLAP).shape == (0, 16)


def test_fp32_is_close_to_fp64() -> None:
    spec = SPECS["hca"]
    tokens, weights = make_tokens(spec, 256, seed=7), Weights.make(spec)
    single = reference.pooled(tokens, spec, weights.ape, torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), reference.pooled(tokens, spec, weights.ape), rtol=0, atol=2e-6)


def test_wrong_arguments_are_named() -> None:
    tokens, ape = make_tokens(TINY, 3, seed=8), Weights.make(TINY).ape
    with pytest.raises(ValueError, match="kv_score"):
        reference.pooled(tokens[:, :16], TINY, ape)
    with pytest.raises(ValueError, match="ape"):
        reference.pooled(tokens, TINY, None)
    with pytest.raises(ValueError, match="ape"):
        reference.pooled(tokens, TINY_NO_APE, ape)
    with pytest.raises(ValueError, match="power of two"):
        reference.hadamard(torch.ones(1, 6))


def test_rms_norm() -> None:
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 1.0, 1.0])
    want = torch.tensor([[3.0, -8.0, 0.0, 0.0]], dtype=torch.float64) / math.sqrt(25 / 4 + 0.25)
    torch.testing.assert_close(reference.rms_norm(x, weight, 0.25), want, rtol=1e-15, atol=0)
    assert torch.equal(reference.rms_norm(torch.zeros(1, 4), weight, 1e-6), torch.zeros(1, 4))


def test_rope_is_a_complex_product_on_interleaved_pairs() -> None:
    table = reference.rope_table(300, 8)
    x = torch.randn(4, 20, dtype=torch.float64)
    positions = torch.tensor([0, 7, 128, 299])
    turn = torch.complex(table[positions, :4].double(), table[positions, 4:].double())
    want = torch.view_as_real(torch.view_as_complex(x[:, 12:].reshape(4, 4, 2)) * turn).flatten(1)
    got = reference.rope(x, table, positions, 8)
    assert torch.equal(got[:, :12], x[:, :12])
    torch.testing.assert_close(got[:, 12:], want, rtol=1e-14, atol=1e-15)
    assert torch.equal(got[0], x[0])  # position 0 turns nothing


def test_rope_table_without_yarn() -> None:
    table = reference.rope_table(100, 8, theta=10000.0, factor=1.0)
    angle = torch.arange(100.0, dtype=torch.float64)[:, None] * 10000.0 ** -torch.tensor([0, 0.25, 0.5, 0.75]).double()
    assert table.shape == (100, 8) and table.dtype == torch.float32
    assert torch.equal(table, torch.cat([angle.cos(), angle.sin()], dim=1).float())


def test_rope_table_keeps_fast_pairs_and_slows_the_slow_ones() -> None:
    table, plain = reference.rope_table(1 << 17, 64), reference.rope_table(1 << 17, 64, factor=1.0)
    # By hand: corr(32) = 64 ln(65536 / (64 pi)) / (2 ln 160000) = 15.45, corr(1) = 24.70, so pairs 0..15 stay as they
    # are, pairs 25..31 turn 16 times slower, and the rest is a straight line over 15..25.
    fast, slow = list(range(16)), list(range(25, 32))
    assert torch.equal(table[:, fast], plain[:, fast])
    far = torch.arange(0, 1 << 17, 16)
    torch.testing.assert_close(table[far][:, slow], plain[: len(far)][:, slow], rtol=0, atol=1e-6)
    assert not torch.equal(table[:, 16], plain[:, 16])
    frequency = 160000.0 ** (-2 * 20 / 64) * (0.5 / 16 + 0.5)  # pair 20, the middle of the ramp
    assert float(table[100, 20]) == pytest.approx(math.cos(100 * frequency), abs=1e-6)
    assert float(table[100, 52]) == pytest.approx(math.sin(100 * frequency), abs=1e-6)


@pytest.mark.parametrize("hd", [1, 2, 128])
def test_hadamard_is_the_sylvester_matrix(hd: int) -> None:
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(hd)] for i in range(hd)], dtype=torch.float64)
    got = reference.hadamard(torch.eye(hd, dtype=torch.float64))
    torch.testing.assert_close(got, matrix / math.sqrt(hd), rtol=1e-15, atol=0)
    torch.testing.assert_close(reference.hadamard(got), torch.eye(hd, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", SPECS)
def test_entries_are_the_stages_in_order(name: str) -> None:
    spec = SPECS[name]
    tokens, weights = make_tokens(spec, 3 * spec.ratio + 1, seed=9), Weights.make(spec)
    x = reference.pooled(tokens, spec, weights.ape)
    x = x * torch.rsqrt(x.pow(2).sum(1, keepdim=True) / spec.head_dim + 1e-6) * weights.norm_weight.double()
    angle = torch.atan2(weights.rope[:, 32:].double(), weights.rope[:, :32].double())
    for window in range(3):
        for pair in range(32):
            a, b = spec.head_dim - 64 + 2 * pair, spec.head_dim - 63 + 2 * pair
            turn = float(angle[window * spec.ratio, pair])  # the window's first token
            even, odd = float(x[window, a]), float(x[window, b])
            x[window, a] = even * math.cos(turn) - odd * math.sin(turn)
            x[window, b] = even * math.sin(turn) + odd * math.cos(turn)
    if spec.hadamard:
        x = reference.hadamard(x)
    # atan2 of a table rounded to fp32 gives a turn of length 1 only up to 2^-24.
    torch.testing.assert_close(weights.entries(tokens, spec), x, rtol=1e-6, atol=1e-6)


def test_overlap_agrees_with_gate_concatenation() -> None:
    """The form in which model code usually writes it: shift the lo halves by a window, then one softmax over 2R rows."""
    spec = SPECS["csa"]
    tokens, weights = make_tokens(spec, 20, seed=10).double(), Weights.make(spec)
    kv, gate = tokens.chunk(2, dim=-1)
    chunk_kv = kv.view(5, 4, 1024)
    chunk_gate = gate.view(5, 4, 1024) + weights.ape.double()
    new_kv = chunk_kv.new_zeros(5, 8, 512)
    new_gate = chunk_gate.new_full((5, 8, 512), -math.inf)
    new_kv[:, 4:], new_gate[:, 4:] = chunk_kv[..., 512:], chunk_gate[..., 512:]
    new_kv[1:, :4], new_gate[1:, :4] = chunk_kv[:-1, :, :512], chunk_gate[:-1, :, :512]
    want = torch.einsum("wtc,wtc->wc", new_kv, new_gate.softmax(dim=1))
    torch.testing.assert_close(reference.pooled(tokens, spec, weights.ape), want, rtol=1e-13, atol=1e-14)


def test_sizes_that_torch_would_stretch_or_cut() -> None:
    spec = CompressorSpec(head_dim=16, ratio=4, rope_dim=16)
    for rows in (1, 2, 8):
        with pytest.raises(ValueError, match=r"^ape must be \[4, 16\]"):
            reference.pooled(torch.zeros(8, 32), spec, torch.zeros(rows, 16))
    with pytest.raises(ValueError, match=r"^rope_dim must be even"):
        reference.rope_table(8, 15)
    with pytest.raises(ValueError, match=r"^max_pos must not be negative"):
        reference.rope_table(-1, 16)
