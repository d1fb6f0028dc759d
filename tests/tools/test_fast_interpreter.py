"""What the suite's interpreter leaves out changes no bit; see fast_interpreter.py."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from support import fast_interpreter
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles in this process")


@triton.jit
def last_and_sum(a, b, c, d):
    return a * 0.5 + c, tl.maximum(b, d) + 1  # neither is associative, so the order shows


@triton.jit
def reduce_kernel(x, out, AXIS: tl.constexpr, KEEP: tl.constexpr):
    i, j = tl.arange(0, 8), tl.arange(0, 4)
    at = i[:, None] * 4 + j[None, :]
    block = tl.load(x + at)
    first, second = tl.reduce((block, (block * 8).to(tl.int32)), AXIS, last_and_sum, keep_dims=KEEP)
    tl.store(out + at, tl.zeros([8, 4], tl.float32) + (first + second if KEEP else tl.sum(first + second)))


def as_triton_does(patch: pytest.MonkeyPatch) -> None:
    for owner, name, ours in fast_interpreter.REPLACED:
        patch.setattr(owner, name, fast_interpreter.ORIGINAL[ours.__name__])
    for name, theirs in fast_interpreter.OPERATED.items():
        patch.setattr(tl.tensor, name, theirs)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_reductions_are_in_the_same_order(axis: int, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.zeros(8, 4), torch.zeros(8, 4)
    assert interpreter.ReduceOps.generic_reduce is fast_interpreter.generic_reduce
    reduce_kernel[(1,)](x, ours, axis, keep)
    with monkeypatch.context() as patch:
        as_triton_does(patch)
        reduce_kernel[(1,)](x, theirs, axis, keep)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)) and bool(ours.abs().sum() > 0)


def test_every_dtype_is_the_same() -> None:
    plain = [
        tl.int1,
        tl.int8,
        tl.uint8,
        tl.int16,
        tl.int32,
        tl.int64,
        tl.uint64,
        tl.float16,
        tl.bfloat16,
        tl.float32,
        tl.float8e4nv,
    ]
    for kind in [*plain, tl.pointer_type(tl.float32)]:
        for each in (kind, tl.block_type(kind, [4])):
            assert fast_interpreter.get_np_dtype(each) == fast_interpreter.ORIGINAL["get_np_dtype"](each), each


@triton.jit
def mixed_kernel(x, out, numbers, N: tl.constexpr):
    """Operands of one dtype and of two, scalars, pointers, shapes to broadcast, and integers that overflow."""
    i, j = tl.arange(0, N), tl.arange(0, 4)
    block = tl.load(x + i[:, None] * 4 + j[None, :])
    tl.static_assert(block.shape[0] == N and block.numel == 4 * N and i.dtype == tl.int32)
    half, whole = block.to(tl.bfloat16), (block * 8).to(tl.int32)
    sums = (half + block * 2 - whole) / (1 + j[None, :]) + tl.sum(block, 0)[None, :]
    big = tl.load(numbers) * 65536 + whole.to(tl.int64) * tl.load(numbers + 1)
    many = tl.where((whole & 1) == 0, sums, big.to(tl.float32) * 1e-9) + tl.broadcast_to(i[:, None], [N, 4])
    tl.store(out + i[:, None] * 4 + j[None, :], tl.maximum(many, -block), mask=(i < N - 1)[:, None])


def test_other_operations_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
    numbers = torch.tensor([70_000, 3], dtype=torch.int32)
    ours, theirs = torch.zeros(8, 4), torch.zeros(8, 4)
    mixed_kernel[(1,)](x, ours, numbers, 8)
    with monkeypatch.context() as patch:
        as_triton_does(patch)
        mixed_kernel[(1,)](x, theirs, numbers, 8)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)) and bool(ours[:7].abs().sum() > 0)


def test_all_is_replaced() -> None:
    for owner, name, ours in fast_interpreter.REPLACED:
        assert getattr(owner, name) is ours, name


@triton.jit
def operators_kernel(x, y, n, out, F: tl.constexpr, I: tl.constexpr):
    """Every operator that is replaced: of blocks, of a block and a scalar, of blocks of other shapes, and of numbers."""
    i, j = tl.arange(0, 8), tl.arange(0, 4)
    at = i[:, None] * 4 + j[None, :]
    a, b, k, one = tl.load(x + at), tl.load(y + at), tl.load(n + at), tl.load(x)
    row, wide = tl.load(x + j)[None, :], k.to(tl.int64)
    f = (a + b - one) * row + F * a - (F - b) + (one - a) + 3 * b - (2 - a) + (1.5 - one)
    m = (k + I) * 3 - (I - k) + (7 - k) * k + (k - tl.load(n))
    w = (wide + I) * wide - (5 - wide) + 2 * wide + (wide + k)
    mask = ((a < b) & (k >= I)) | ((b > 0.5) & (wide != k)) | (f == a) | (k <= 2) & (one > a)
    same = ((k == I) | (wide < 3)) & (a == a)
    tl.store(out + at, f + mask.to(tl.int32) * 2 + same.to(tl.int32))
    tl.store(out + 96 + at, w.to(tl.float32))
    tl.store(out + 32 + at, m.to(tl.float32) + (a * (one < 0) + (k > 0).to(tl.float32)) * (m == w.to(tl.int32)).to(tl.float32))
    tl.store(out + 64 + at, (m * 65537 * 65537).to(tl.float32))


def test_operators_make_what_triton_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, 4, generator=draw) * 10 for _ in range(2))
    x[0, 1], y[2, 2], x[3, 3] = torch.nan, torch.inf, -0.0
    n = torch.randint(-9, 9, (8, 4), generator=draw, dtype=torch.int32)
    for scale in (1, 1 << 28):
        ours, theirs = torch.zeros(128), torch.zeros(128)
        assert all(getattr(tl.tensor, name) is not theirs for name, theirs in fast_interpreter.OPERATED.items())
        operators_kernel[(1,)](x, y, n * scale, ours, 0.1, 3)
        with monkeypatch.context() as patch:
            as_triton_does(patch)
            operators_kernel[(1,)](x, y, n * scale, theirs, 0.1, 3)
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)) and len(ours.unique()) > 40
