"""Entries to record bytes and back, in plain torch: the torch backend's store and `EntryCache.read` on any device.

The same rounding as `backend_triton/kernels/record.py`, which does with integers what torch has types for. A quotient is always
of two tensors (`_divide`): torch turns a number divided by a tensor into a product with the rounded inverse.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import pad

from ..spec import CompressorSpec
from .formats import ELEMENT_MAX, FP4_GROUPS, POWERS_OF_TWO, RecordFormat

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "pow2": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "ue8m0": torch.uint8,
    "ue8m0x4": torch.uint8,
}
# Between neighbouring codes; a tie goes to the even code, so it goes up behind the odd codes 1, 3 and 5.
_E2M1_THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E2M1_NEAREST = 0x7C3B7  # the mantissa of the least fp32 above 6 / sqrt(2)


class Records(Protocol):
    """What this module takes of an `EntryCache`."""

    format: RecordFormat
    spec: CompressorSpec
    rows_per_page: int
    scale_tensor: torch.Tensor | None
    pages: torch.Tensor
    scale_pages: torch.Tensor | None


def pack_records(cache: Records, slots: torch.Tensor, entries: torch.Tensor) -> None:
    """Writes `entries` (fp32 `[n, head_dim]`, after norm, RoPE and Hadamard) into int64 `slots`, all of them valid."""
    fmt, quantized = cache.format, cache.format.quantized(cache.spec)
    if fmt.element in ("bf16", "fp32"):
        scatter(*record_address(cache, slots), _bytes(bf16_bits(entries) if fmt.element == "bf16" else entries))
        return
    entries = finished_values(entries, fmt)
    values = entries[:, :quantized]
    if fmt.scale == "static":
        values = values * _divide(torch.ones_like(values[:, :1]), cache.scale_tensor)
    else:
        grouped = values.unflatten(1, (-1, fmt.group))
        stored, factor = group_scale(largest(grouped), fmt, cache.scale_tensor)
        values = (grouped / factor[..., None] if fmt.divide else grouped * factor[..., None]).flatten(1)
        scatter(*tail_address(cache, slots), pad(stored, (0, fmt.pad if fmt.pad_written else 0)))
    if fmt.element == "e4m3":
        record = e4m3_bytes(values)
    else:
        codes = e2m1_codes(values, fmt.ties_to_zero, fmt.unsigned_zero)
        record = codes[:, 0::2] | codes[:, 1::2] << 4
    scatter(*record_address(cache, slots), record)
    if fmt.rotated_bf16:
        scatter(*rotated_address(cache, slots), _bytes(bf16_bits(entries[:, quantized:])))


def finished_values(entries: torch.Tensor, fmt: RecordFormat) -> torch.Tensor:
    """Entries as they are quantized: rounded to bf16, and to fp4 and back, where the format says so."""
    values = entries.bfloat16().float() if fmt.round_values else entries
    if not fmt.fp4_first:
        return values
    grouped = values.unflatten(1, (-1, FP4_GROUPS[fmt.fp4_first]))
    return through_fp4(grouped, fp4_scale(largest(grouped), fmt.fp4_first), fmt.fp4_first).flatten(1)


def largest(grouped: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each group `[n, groups, size]`. A NaN does not choose the scale of its neighbours."""
    return grouped.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(-1)


def fp4_scale(amax: torch.Tensor, kind: str) -> torch.Tensor:
    """The scale of each group in `fp4_first` = `kind`."""
    if kind == "nvfp4":
        return e4m3_bytes(_divide(amax, ELEMENT_MAX["e2m1"]).clamp(min=2.0**-9)).view(torch.float8_e4m3fn).float()
    return _power(_ceil_code(_divide(amax.clamp(min=ELEMENT_MAX["e2m1"] * 2.0**-126), ELEMENT_MAX["e2m1"])))


def through_fp4(grouped: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """What is left of groups `[n, groups, size]` in e2m1 under these scales; NaN stays."""
    scale = scale[..., None]
    inverse = _power(254 - (scale.view(torch.int32) >> 23))  # of a power of two
    quotient = grouped / scale if kind == "nvfp4" else grouped * inverse
    quotient = torch.where(quotient == 0, 0.0, quotient)  # of either sign
    return torch.where(grouped.isnan(), grouped, e2m1_values(e2m1_codes(quotient)) * scale)


def group_scale(amax: torch.Tensor, fmt: RecordFormat, cache_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tail's bytes, uint8 `[n, groups * scale_bytes]`, and what each group is multiplied by (or divided by)."""
    if fmt.floor_on == "amax":
        amax = amax.clamp(min=fmt.floor)
    elif fmt.scale in POWERS_OF_TWO:
        amax = amax.clamp(min=fmt.floor * fmt.element_max)  # as kernels do: the same power of two for every floor
    scale = _divide(amax, fmt.element_max)
    if fmt.floor_on == "scale":
        scale = scale.clamp(min=fmt.floor)
    if fmt.scale == "fp32":
        if fmt.floor == 0:
            return _bytes(scale), torch.where(amax > 0, _divide(fmt.element_max, amax), 1.0)
        return _bytes(scale), _divide(1.0, scale)
    if fmt.scale == "e4m3":
        if fmt.floor_on == "scale":
            code = e4m3_bytes(scale)
            return code, code.view(torch.float8_e4m3fn).float()
        if cache_scale is None:
            code = e4m3_bytes(scale)
            inverse = _divide(1.0, code.view(torch.float8_e4m3fn).float())
            return code, torch.where(code > 0, inverse, 0.0)
        code = e4m3_bytes(_divide(amax * cache_scale, fmt.element_max))
        return code, _divide(cache_scale, code.view(torch.float8_e4m3fn).float().clamp(min=1e-12))
    code = _nearest_code(amax) if fmt.nearest_scale else _ceil_code(scale)
    if fmt.scale == "pow2":
        return _bytes(_power(code)), _power(254 - code)
    return code.to(torch.uint8).repeat_interleave(fmt.scale_bytes, dim=-1), _power(254 - code)


def _ceil_code(scale: torch.Tensor) -> torch.Tensor:
    """ue8m0 of the least power of two that is not below; an infinity makes it 2**127, under which its neighbours become 0."""
    return ((scale.view(torch.int32) + 0x7FFFFF) >> 23).clamp(max=254)


def _nearest_code(amax: torch.Tensor) -> torch.Tensor:
    """ue8m0 of the power of two that is nearest to amax / 6 by its logarithm: it goes up from 6 / sqrt(2) on."""
    code = ((amax.view(torch.int32) + 0x800000 - _E2M1_NEAREST) >> 23) - 3
    return torch.where(amax.isinf(), 254, code)


def _power(code: torch.Tensor) -> torch.Tensor:
    """fp32 of a ue8m0 code."""
    return (code.int() << 23).view(torch.float32)


def bf16_bits(x: torch.Tensor) -> torch.Tensor:
    """int16 bits of fp32 as bf16: nearest even, NaN as 0x7FC0 (torch's own NaN depends on the device and on vectorization)."""
    return torch.where(x.isnan(), 0x7FC0, x.bfloat16().view(torch.int16))


def to_bf16(x: torch.Tensor) -> torch.Tensor:
    """fp32 rounded to bf16 as `bf16_bits` does it: what is stored must not depend on torch's NaN."""
    return bf16_bits(x).view(torch.bfloat16)


def e4m3_bytes(x: torch.Tensor) -> torch.Tensor:
    """uint8 codes of fp32: nearest even, saturating at 448, NaN as 0x7F."""
    codes = x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(x.isnan(), 0x7F, codes)


def e2m1_codes(x: torch.Tensor, ties_to_zero: bool = False, unsigned_zero: bool = False) -> torch.Tensor:
    """uint8 codes 0..15 of fp32, saturating at 6; NaN as 7."""
    mag, code = x.abs(), torch.zeros_like(x, dtype=torch.uint8)
    for odd, threshold in enumerate(_E2M1_THRESHOLDS):
        code += (mag >= threshold) if odd % 2 and not ties_to_zero else (mag > threshold)
    sign = x.signbit() & (code > 0) if ties_to_zero or unsigned_zero else x.signbit()
    return torch.where(x.isnan(), 7, code | sign.to(torch.uint8) << 3)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """fp32 of uint8 codes 0..15. From the bits: a table would come from the host, which no CUDA graph records."""
    codes = codes.int()
    mag = codes & 7
    bits = torch.where(mag > 1, ((mag >> 1) + 126) << 23 | (mag & 1) << 22, mag * 0x3F000000)
    return (bits | (codes & 8) << 28).view(torch.float32)


def read_fields(cache: Records, slots: torch.Tensor) -> dict[str, torch.Tensor]:
    """The fields of `EntryCache.raw`, `[n, ...]` each, from int64 `slots`, all of them valid."""
    fmt, spec = cache.format, cache.spec
    values = gather(*record_address(cache, slots), fmt.values_bytes(spec))
    if fmt.element == "e2m1":
        fields = {"values": torch.stack((values & 15, values >> 4), dim=2).flatten(1)}
    else:
        fields = {"values": _typed(values, _DTYPES[fmt.element])}
    if fmt.rotated_bf16:
        fields["rotated"] = _typed(gather(*rotated_address(cache, slots), fmt.rotated_bytes(spec)), torch.bfloat16)
    if fmt.scale_bytes:
        tail = gather(*tail_address(cache, slots), fmt.tail_bytes(spec))
        scales, unused = tail.tensor_split([fmt.groups(spec) * fmt.scale_bytes], dim=1)
        fields["scales"] = _typed(scales, _DTYPES[fmt.scale])
        if fmt.pad:
            fields["pad"] = unused
    return fields


def unpack_records(cache: Records, slots: torch.Tensor) -> torch.Tensor:
    """fp32 `[n, head_dim]` from int64 `slots`, all of them valid."""
    fmt, fields = cache.format, read_fields(cache, slots)
    values, scales = fields["values"], fields.get("scales")
    values = e2m1_values(values) if fmt.element == "e2m1" else values.float()
    if fmt.scale == "static":
        values = values * cache.scale_tensor
    elif scales is not None:
        factor = _power(scales[:, :: fmt.scale_bytes]) if scales.dtype == torch.uint8 else scales.float()
        if fmt.takes_scale:
            factor = _divide(factor, cache.scale_tensor)
        values = (values.unflatten(1, (-1, fmt.group)) * factor[..., None]).flatten(1)
    if fmt.rotated_bf16:
        values = torch.cat((values, fields["rotated"].float()), dim=1)
    return values


def _divide(a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """a / b, correctly rounded on every device; one of the two is a tensor."""
    like = a if isinstance(a, torch.Tensor) else b
    a, b = (x if isinstance(x, torch.Tensor) else torch.full_like(like, x) for x in (a, b))
    return a / b


def _bytes(x: torch.Tensor) -> torch.Tensor:
    # As one row: an empty tensor may have strides that cannot be viewed.
    return x.reshape(-1).contiguous().view(torch.uint8).view(*x.shape[:-1], x.shape[-1] * x.element_size())


def _typed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The opposite."""
    return x.reshape(-1).contiguous().view(dtype).view(*x.shape[:-1], x.shape[-1] // dtype.itemsize)


def record_address(cache: Records, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pages, page of each slot, and offset of its record, which begins with its values."""
    page, row = slots // cache.rows_per_page, slots % cache.rows_per_page
    return cache.pages, page, row * cache.format.row_bytes(cache.spec)


def rotated_address(cache: Records, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for its channels that are kept as bf16."""
    pages, page, offset = record_address(cache, slots)
    return pages, page, offset + cache.format.rotated_at(cache.spec)


def tail_address(cache: Records, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for its tail, which may be in a buffer of its own."""
    fmt, spec = cache.format, cache.spec
    pages, page, record = record_address(cache, slots)
    if fmt.interleaved:
        return pages, page, record + fmt.values_bytes(spec)
    offset = slots % cache.rows_per_page * fmt.tail_bytes(spec)
    if cache.scale_pages is not None:
        return cache.scale_pages, page, offset
    return pages, page, offset + cache.rows_per_page * fmt.row_bytes(spec)


def scatter(pages: torch.Tensor, page: torch.Tensor, offset: torch.Tensor, data: torch.Tensor) -> None:
    """Writes uint8 `data` `[n, width]` to what an `*_address` found."""
    pages[page[:, None], offset[:, None] + torch.arange(data.shape[1], device=page.device)] = data


def gather(pages: torch.Tensor, page: torch.Tensor, offset: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 `[n, width]` from what an `*_address` found."""
    return pages[page[:, None], offset[:, None] + torch.arange(width, device=page.device)]
