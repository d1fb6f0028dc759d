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
