"""`Packing`: every token once, windows in order, and offsets that are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.training import Packing


def pieces(packing: Packing) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Windows as (token, window, whether last), and how often each token is in a piece."""
    windows, seen = [], [0] * packing.tokens
    for n, (token, window, rest, _) in enumerate(packing.pieces.tolist()):
        if window >= 0:
            assert n == len(windows), "windows come first"
            windows.append((token, window, rest))
        for row in range(token, token + (packing.ratio if window >= 0 else rest)):
            seen[row] += 1
    return windows, seen


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=6),
    st.sampled_from([1, 2, 3, 4, 8, 128]),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([None, 0, 5, 30]),
)
def test_every_token_is_in_one_piece(lengths, ratio, before, behind, dtype, most) -> None:
    cu = torch.tensor([before, *lengths], dtype=dtype).cumsum(0).to(dtype)
    tokens = int(cu[-1]) + behind
    packing = Packing.build(cu, tokens, ratio, max_seqlen=most)
    windows, seen = pieces(packing)
    assert seen == [1] * tokens
    counts = [min(n, tokens if most is None else most) // ratio for n in lengths]
    want = [(int(cu[b]) + w * ratio, w, int(w == n - 1)) for b, n in enumerate(counts) for w in range(n)]
    assert windows == want
    assert packing.cu_entries.tolist() == torch.tensor([0, *counts]).cumsum(0).tolist()
    assert packing.capacity == tokens // ratio and packing.pieces.shape == (packing.capacity + len(lengths) + 2, 4)


@given(st.lists(st.integers(-(2**40), 2**40), min_size=2, max_size=6))
def test_offsets_that_are_none_stay_inside(cu: list[int]) -> None:
    """No error, as nobody looks at them; no token outside, and none twice."""
    packing = Packing.build(torch.tensor(cu), 25, 4)
    assert pieces(packing)[1] == [1] * 25


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"cu_seqlens": [0, 4]}, "cu_seqlens must be a torch.Tensor"),
        ({"cu_seqlens": torch.zeros(2)}, "cu_seqlens must be torch.int32 or torch.int64"),
        ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "cu_seqlens must have shape"),
        ({"cu_seqlens": torch.zeros(1, dtype=torch.int32)}, "cu_seqlens must have a sequence"),
        ({"tokens": -1}, "tokens must be from 0"),
        ({"tokens": 4.0}, "tokens must be an int"),
        ({"tokens": 2**31 - 1, "ratio": 1}, "tokens and cu_seqlens must make at most"),
        ({"ratio": 0}, "ratio must be from 1"),
        ({"max_seqlen": -1}, "max_seqlen must be from 0"),
        ({"max_seqlen": "4"}, "max_seqlen must be an int"),
    ],
)
def test_bad_arguments(changed: dict, message: str) -> None:
    arguments = {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "tokens": 4, "ratio": 2} | changed
    with pytest.raises((TypeError, ValueError), match=message):
        Packing.build(**arguments)
