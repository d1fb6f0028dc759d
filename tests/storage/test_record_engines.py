"""V4.1 records against the engines' own steps, written from their sources in plain torch and nowhere else used.

`rows` go through kvfold's norm, whose sum of squares every engine adds in another order: what is compared begins behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from support.helpers import Backend
from support.record_support import write
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache
from kvfold.storage.formats import FORMATS

MAIN = CompressorSpec(512, 2, has_ape=False, norm_eps=1e-20)
KEY = CompressorSpec(128, 2, has_ape=False, norm_eps=1e-6)
N = 48
SIXTH, LEAST4 = torch.tensor(1 / 6, dtype=torch.float32), 6 * 2.0**-126


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def normed(rows: Tensor, spec: CompressorSpec, weight: Tensor) -> Tensor:
    """RMSNorm in fp32, its sum in pairs of neighbours as kvfold has it."""
    total = rows * rows
    while total.shape[1] > 1:
        total = total[:, 0::2] + total[:, 1::2]
    return rows * (1 / torch.sqrt(total * (1 / spec.head_dim) + spec.norm_eps)) * weight


def rotated(x: Tensor, table: Tensor, positions: Tensor) -> Tensor:
    """The last 64 channels in pairs of neighbours, products and sums rounded one by one."""
    cos, sin = table[positions].chunk(2, dim=1)
    even, odd = x[:, -64::2], x[:, -63::2]
    out = x.clone()
    out[:, -64::2], out[:, -63::2] = even * cos - odd * sin, odd * cos + even * sin
    return out


def e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def hardware_fp4(x: Tensor) -> Tensor:
    """Codes of `cvt.rn.satfinite.e2m1x2`: ties to even, -0 kept."""
    return torch.from_numpy(np.clip(x.numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).copy())


def fp4_value(codes: Tensor) -> Tensor:
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes.long()]


def nibbles(codes: Tensor) -> Tensor:
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def groups(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    grouped = x.unflatten(1, (-1, size))
    return grouped, grouped.abs().amax(-1)


def ceil_code(x: Tensor) -> Tensor:
    """The exponent byte of the next power of two, by bits."""
    bits = x.contiguous().view(torch.int32)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()


def power(code: Tensor) -> Tensor:
    return (code.int() << 23).view(torch.float32)


def vllm_mxfp8(x: Tensor) -> Tensor:
    """Exponents by log2 of amax times the fp32 inverse of 448, amax floored."""
    grouped, amax = groups(x, 32)
    e = torch.ceil(torch.log2(amax.clamp(min=1e-4) * torch.tensor(1 / 448, dtype=torch.float32)))
    values = e4m3(grouped * torch.exp2(-e)[..., None]).view(torch.uint8).flatten(1)
    return torch.cat([values, (e + 127).clamp(0, 255).to(torch.uint8)], dim=1)


def vllm_nvfp4(x: Tensor) -> Tensor:
    grouped, amax = groups(x, 16)
    scale = (amax * SIXTH).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
    codes = hardware_fp4(grouped / scale.float()[..., None]).flatten(1)
    return torch.cat([nibbles(codes), scale.view(torch.uint8)], dim=1)


def sglang_mxfp8(x: Tensor) -> Tensor:
    """The scale's byte from the bits of amax, from 114 on; products with its exact inverse."""
    grouped, amax = groups(x, 32)
    bits = amax.contiguous().view(torch.int32)
    code = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()).clamp(min=114)
    return torch.cat([e4m3(grouped * power(254 - code)[..., None]).view(torch.uint8).flatten(1), code.to(torch.uint8)], dim=1)


def sglang_nvfp4(x: Tensor) -> Tensor:
    grouped, amax = groups(x, 16)
    scale = (amax / torch.tensor(6.0)).clamp(min=2.0**-9).clamp(max=448.0).to(torch.float8_e4m3fn)
    codes = hardware_fp4(grouped / scale.float()[..., None]).flatten(1)
    return torch.cat([nibbles(codes), scale.view(torch.uint8)], dim=1)


def sglang_faked(x: Tensor) -> Tensor:
    """Quantized to fp4 in groups of 16, all 512 channels, and back."""
    grouped, amax = groups(x, 16)
    scale = (amax * SIXTH).clamp(min=2.0**-9).clamp(max=448.0).to(torch.float8_e4m3fn).float()[..., None]
    return (fp4_value(hardware_fp4(grouped / scale + 0.0)) * scale).flatten(1)


def sglang_584(x: Tensor) -> Tensor:
    """583 bytes: the last of the tail is left alone."""
    grouped, amax = groups(x[:, :448], 64)
    code = ceil_code(amax.clamp(min=1e-4) / torch.tensor(448.0))
    values = e4m3(grouped * power(254 - code)[..., None]).view(torch.uint8).flatten(1)
    return torch.cat([values, x[:, 448:].bfloat16().contiguous().view(torch.uint8), code.to(torch.uint8)], dim=1)


def vllm_584(x: Tensor, unrotated: Tensor) -> Tensor:
    grouped, amax = groups(unrotated[:, :448], 64)
    e = torch.ceil(torch.log2(amax.clamp(min=1e-4) * torch.tensor(1 / 448, dtype=torch.float32)))
    values = e4m3(grouped * torch.exp2(-e)[..., None]).view(torch.uint8).flatten(1)
    tail = torch.nn.functional.pad((e + 127).to(torch.uint8), (0, 1))
    return torch.cat([values, x[:, 448:].bfloat16().contiguous().view(torch.uint8), tail], dim=1)


def flashinfer_mxfp8(x: Tensor) -> Tensor:
    """A floor on amax, and one on the scale."""
    grouped, amax = groups(x, 32)
    code = ceil_code((amax.clamp(min=1e-4) / torch.tensor(448.0)).clamp(min=1e-4))
    return torch.cat([e4m3(grouped * power(254 - code)[..., None]).view(torch.uint8).flatten(1), code.to(torch.uint8)], dim=1)


def flashinfer_384(x: Tensor) -> Tensor:
    """No floor; a product with the inverse of the scale, which is 0 for a scale of 0. Both quotients as IEEE has them."""
    grouped, amax = groups(x[:, :448], 16)
    scale = (amax / torch.tensor(6.0)).clamp(max=448.0).to(torch.float8_e4m3fn)
    factor = torch.where(scale.float() == 0, 0.0, torch.ones(1) / scale.float())
    codes = hardware_fp4(grouped * factor[..., None]).flatten(1)
    tail = torch.nn.functional.pad(scale.view(torch.uint8), (0, 4))
    return torch.cat([nibbles(codes), x[:, 448:].bfloat16().contiguous().view(torch.uint8), tail], dim=1)


def vllm_key4(x: Tensor) -> Tensor:
    grouped, amax = groups(x, 32)
    e = torch.ceil(torch.log2(amax.clamp(min=LEAST4) * SIXTH)).clamp(-127, 127)
    codes = hardware_fp4(grouped * torch.exp2(-e)[..., None]).flatten(1)
    return torch.cat([nibbles(codes), (e + 127).to(torch.uint8)], dim=1)


def sglang_key4(x: Tensor) -> Tensor:
    """Two stages: quantized and back with one scale, packed with another; zeros without a sign in the end."""
    grouped, amax = groups(x, 32)
    code = ceil_code(amax.clamp(min=LEAST4) * SIXTH)[..., None]
    faked = fp4_value(hardware_fp4(grouped * power(254 - code) + 0.0)) * power(code)
    code = ceil_code((faked.abs().amax(-1) / torch.tensor(6.0)).clamp(min=1e-4)).clamp(1, 254)
    codes = hardware_fp4(faked * power(254 - code)[..., None]).flatten(1)
    return torch.cat([nibbles(torch.where(codes & 7 == 0, 0, codes)), code.to(torch.uint8)], dim=1)


def vllm_key8(x: Tensor) -> tuple[Tensor, Tensor]:
    amax = x.abs().amax(1, keepdim=True).clamp(min=1e-4)
    e = torch.ceil(torch.log2(amax * torch.tensor(1 / 448, dtype=torch.float32)))
    return e4m3(x * torch.exp2(-e)).view(torch.uint8), e


def vllm_key8_fp32(x: Tensor) -> Tensor:
    values, e = vllm_key8(x)
    return torch.cat([values, torch.exp2(e).view(torch.uint8)], dim=1)


def vllm_key8_sm100(x: Tensor) -> Tensor:
    values, e = vllm_key8(x)
    word = ((torch.exp2(e).view(torch.int32) >> 23) & 0xFF).long() * 0x01010101
    return torch.cat([values, (word - (word >> 31 << 32)).int().view(torch.uint8)], dim=1)


# What each engine makes of normed rows in fp32, with a rotation: bytes [n, record], fields in the order of `raw`.
Turn = Callable[[Tensor], Tensor]


def _vllm(pack: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Turn], Tensor]:
    """The latent is bf16; rotated in fp32, and that is quantized."""
    return lambda y, turn: pack(turn(bf16(y)))


def _rounded(pack: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Turn], Tensor]:
    """Rounded behind the norm and behind the rotation."""
    return lambda y, turn: pack(bf16(turn(bf16(y))))


def _finished(pack: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Turn], Tensor]:
    """Given finished rows in bf16, whatever was rounded before."""
    return lambda y, turn: pack(bf16(turn(y)))


def _faked(pack: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Turn], Tensor]:
    return lambda y, turn: pack(sglang_faked(bf16(turn(bf16(y)))))


ENGINES: dict[str, Callable[[Tensor, Turn], Tensor]] = {
    "bf16_v41": _vllm(lambda x: x.bfloat16().view(torch.uint8)),
    "fp8_tensor_v41": _rounded(lambda x: e4m3(x * 1.0).view(torch.uint8)),
    "fp8_tensor_v41_sglang": _faked(lambda x: e4m3(x).view(torch.uint8)),
    "fp8_ds_mla_v41": lambda y, turn: vllm_584(turn(bf16(y)), bf16(y)),
    "fp8_ds_mla_v41_sglang": _faked(sglang_584),
    "v41_mxfp8_interleaved_vllm": _vllm(vllm_mxfp8),
    "v41_mxfp8_sglang": _rounded(sglang_mxfp8),
    "v41_mxfp8_interleaved_sglang": _rounded(sglang_mxfp8),
    "v41_mxfp8_sglang_fp4": _faked(sglang_mxfp8),
    "v41_mxfp8_interleaved_sglang_fp4": _faked(sglang_mxfp8),
    "v41_mxfp8": _finished(flashinfer_mxfp8),
    "v41_nvfp4": _finished(sglang_nvfp4),
    "nvfp4_flashinfer": _finished(flashinfer_384),
    "v41_nvfp4_interleaved_vllm": _vllm(vllm_nvfp4),
    "v41_nvfp4_sglang": _rounded(sglang_nvfp4),
    "v41_nvfp4_interleaved_sglang": _rounded(sglang_nvfp4),
    "indexer_mxfp4_v41": _rounded(vllm_key4),
    "indexer_mxfp4_v41_sglang": _rounded(sglang_key4),
    "indexer_fp8_v41": _rounded(vllm_key8_fp32),
    "indexer_fp8_v41_sm100": _rounded(vllm_key8_sm100),
}
ROUNDED_ROWS = {name for name in ENGINES if "sglang" in name or "indexer" in name} - {
    "v41_mxfp8_sglang",
    "v41_mxfp8_interleaved_sglang",
}


def spec_of(name: str) -> CompressorSpec:
    return KEY if name.startswith("indexer") else MAIN


def bytes_of(cache: EntryCache, n: int) -> np.ndarray:
    """Fields of the first `n` records in the order of `raw`, but for pad bytes that are left alone."""
    fmt, found = cache.format, []
    for slot in range(n):
        fields = cache.raw(slot)
        values = fields["values"].cpu()
        fields["values"] = nibbles(values[None])[0] if fmt.element == "e2m1" else values
        if not fmt.pad_written:
            fields.pop("pad", None)
        found.append(torch.cat([field.cpu().contiguous().view(torch.uint8) for field in fields.values()]))
    return torch.stack(found).numpy()


@pytest.mark.parametrize("name", ENGINES)
def test_stored_as_the_engine_does(backend: Backend, name: str) -> None:
    """Pooled rows of all sizes through `store`: 0 bytes differ."""
    spec, device, n = spec_of(name), backend.device, 12 if backend.slow else N
    g = torch.Generator().manual_seed(7)
    rows = torch.randn(n, spec.head_dim, generator=g) * 10.0 ** torch.linspace(-6, 4, n)[:, None]
    rows[1] *= 10.0 ** torch.linspace(-8, 0, spec.head_dim)  # groups of all sizes in one row
    rows[2] = torch.where(torch.rand(spec.head_dim, generator=g) < 0.9, 0.0, rows[2])
    rows[3] = 0.0
    weight = 1 + 0.2 * torch.randn(spec.head_dim, generator=g)
    table = kvfold.reference.rope_table(4 * n, 64)
    ints = torch.arange(n + 1, dtype=torch.int32, device=device)
    plan = kvfold.StepPlan.build(2, 2 * ints[:n], 2 * ints, 2, state_slots=ints[:n], entry_slots=ints[:n].long())
    cache = EntryCache.allocate(name, -(-n // 8), 8, spec, device=device)
    rest = {"norm_weight": weight.to(device), "rope": table.to(device), "backend": backend.name}
    kvfold.store(rows.to(device), plan, cache, spec=spec, **rest)
    assert FORMATS[name].round_rows == (name in ROUNDED_ROWS)
    y = normed(bf16(rows) if name in ROUNDED_ROWS else rows, spec, weight)
    want = ENGINES[name](y, lambda x: rotated(x, table, 2 * torch.arange(n))).numpy()
    got = bytes_of(cache, n)
    assert got.shape == want.shape and int((got != want).sum()) == 0
    assert int(plan.errors) == 0


def hard_rows(width: int) -> Tensor:
    """bf16 numbers: ties of every encoding, zeros of both signs, tiny and huge ones, and the thresholds of scales."""
    g = torch.Generator().manual_seed(8)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 3.0, 6.0, 1.0625, 1.1875, 17.0, 27.0, 416.0, 448.0])
    rows = ties[torch.randint(len(ties), (24, width), generator=g)] * 2.0 ** torch.randint(-16, 3, (24, 1), generator=g)
    powers = 2.0 ** torch.randint(-140, 100, (16, width), generator=g) * (
        1 + torch.randint(128, (16, width), generator=g) / 128
    )
    levels = torch.randn(16, width, generator=g) * 2.0 ** torch.linspace(-30, 12, 16)[:, None]
    some = torch.cat([rows, powers, levels, torch.zeros(2, width), 1e-38 * torch.randn(4, width, generator=g)])
    some = some * torch.where(torch.rand(some.shape, generator=g) < 0.5, -1.0, 1.0)
    some[torch.rand(some.shape, generator=g) < 0.05] = 0.0
    return bf16(some)


@pytest.mark.parametrize("name", ENGINES)
def test_hard_rows(backend: Backend, name: str) -> None:
    """Finished rows of bf16 numbers, as every engine has them before it quantizes, but for vLLM's rotated channels."""
    spec = spec_of(name)
    x = hard_rows(spec.head_dim)
    x = x[:: 4 if backend.slow else 1]
    cache = EntryCache.allocate(name, 1, len(x), spec, device=backend.device)
    write(backend, cache, list(range(len(x))), x.numpy())
    want = ENGINES[name](x, lambda y: y).numpy()
    assert int((bytes_of(cache, len(x)) != want).sum()) == 0


@pytest.mark.parametrize("name", ENGINES)
def test_a_nan_changes_no_other_byte(backend: Backend, name: str) -> None:
    """Engines promise nothing for one. Here it is one code, and all other channels are as beside a zero."""
    spec = spec_of(name)
    x = hard_rows(spec.head_dim)[:6]
    x[:, 5] = 0.0
    spoiled = x.clone()
    spoiled[:, 5] = torch.nan
    cache = EntryCache.allocate(name, 1, len(x), spec, device=backend.device)
    write(backend, cache, list(range(len(x))), spoiled.numpy())
    wrong = bytes_of(cache, len(x)) != ENGINES[name](x, lambda y: y).numpy()
    element = FORMATS[name].element
    at = {"bf16": [10, 11], "e4m3": [5], "e2m1": [2]}[element]
    assert wrong[:, at].any() and not np.delete(wrong, at, axis=1).any()


def test_one_stage_is_not_sglangs_key() -> None:
    """How many bytes of SGLang's V4.1 key a single stage with its floor has otherwise: it is no substitute."""
    x = bf16(torch.randn(512, 128, generator=torch.Generator().manual_seed(9)))
    grouped, amax = groups(x, 32)
    code = ceil_code((amax / torch.tensor(6.0)).clamp(min=1e-4))
    codes = hardware_fp4(grouped * power(254 - code)[..., None]).flatten(1)
    one = torch.cat([nibbles(torch.where(codes & 7 == 0, 0, codes)), code.to(torch.uint8)], dim=1)
    two = sglang_key4(x)
    scales = (one[:, 64:] != two[:, 64:]).float().mean()
    assert 0.05 < scales < 0.3
    # Where the scale is the same, so are the codes; where it is one lower, the values are.
    same = (one[:, 64:] == two[:, 64:]).repeat_interleave(16, dim=1)
    assert torch.equal(one[:, :64][same], two[:, :64][same])
    assert torch.equal((one[:, 64:] - two[:, 64:]).unique(), torch.tensor([0, 1], dtype=torch.uint8))


def test_zeros_that_vllm_turns() -> None:
    """vLLM rotates all channels, those before the last 64 by (1, 0): a zero may change its sign, and nothing else does.

    kvfold leaves them as they are, so such a zero is one bit of another record. Behind a norm it needs a pooled 0, or an
    underflow.
    """
    x = hard_rows(512)
    even, odd = x[:, 0::2], x[:, 1::2]
    turned = torch.stack((even * 1.0 - odd * 0.0, odd * 1.0 + even * 0.0), dim=2).flatten(1)
    assert torch.equal(turned, x) and bool((turned.signbit() != x.signbit()).any())
    assert not (turned.signbit() != x.signbit())[x != 0].any()
