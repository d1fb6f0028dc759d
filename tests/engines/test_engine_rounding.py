"""That the mended interpreter rounds as a GPU does."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def round_kernel(source, target, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_nearest_even(dtype: torch.dtype) -> None:
    ties = torch.tensor([1.00390625, 1.01171875, -1.0625, 1.1875, 0.0, -0.0, 447.9, 2.0**-9], dtype=torch.float32)
    values = torch.cat([ties, torch.randn(1016, generator=torch.Generator().manual_seed(1)) * 100])
    found = torch.zeros(1024, dtype=dtype)
    round_kernel[(1,)](values, found, 1024)
    assert torch.equal(found.float(), values.to(dtype).float())
