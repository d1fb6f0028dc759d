"""Entries to record bytes and back, in plain torch: the torch backend's store and `EntryCache.read` on any device."""

from __future__ import annotations

import torch

from .records import EntryCache

E4M3_MAX = 448.0


def pack_records(cache: EntryCache, slots: torch.Tensor, entries: torch.Tensor) -> None:
    """Writes `entries` (fp32 `[n, head_dim]`, after norm, RoPE and Hadamard) into int64 `slots`, all of them valid."""
    fmt, spec = cache.format, cache.spec
    page, row = slots // cache.rows_per_page, slots % cache.rows_per_page
    if fmt.element != "e4m3":
        dtype = torch.bfloat16 if fmt.element == "bf16" else torch.float32
        _scatter(cache, page, row * fmt.row_bytes(spec), entries.to(dtype).contiguous().view(torch.uint8))
        return
    quantized = spec.head_dim - spec.rope_dim
    values = entries[:, :quantized].bfloat16().float().unflatten(1, (-1, fmt.group))
    # A NaN does not choose the scale of its neighbours; an infinity makes it 2**127, under which they become 0.
    amax = values.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(-1)
    code = ue8m0_code((amax / E4M3_MAX).clamp(min=fmt.scale_floor)).clamp(max=254)
    scaled = (values * inverse_scale(code)[..., None]).clamp(-E4M3_MAX, E4M3_MAX).flatten(1)
    record = torch.cat(
        (
            scaled.to(torch.float8_e4m3fn).view(torch.uint8),
            entries[:, quantized:].bfloat16().contiguous().view(torch.uint8),
        ),
        dim=1,
    )
    _scatter(cache, page, row * fmt.row_bytes(spec), record)
    tail = torch.zeros(len(slots), fmt.tail, dtype=torch.uint8, device=entries.device)
    tail[:, : code.shape[1]] = code.to(torch.uint8)
    _scatter(cache, page, cache.rows_per_page * fmt.row_bytes(spec) + row * fmt.tail, tail)


def unpack_records(cache: EntryCache, slots: torch.Tensor) -> torch.Tensor:
    """fp32 `[n, head_dim]` from int64 `slots`, all of them valid."""
    fmt, spec = cache.format, cache.spec
    page, row = slots // cache.rows_per_page, slots % cache.rows_per_page
    record = _gather(cache, page, row * fmt.row_bytes(spec), fmt.row_bytes(spec))
    if fmt.element != "e4m3":
        return record.view(torch.bfloat16 if fmt.element == "bf16" else torch.float32).float()
    quantized = spec.head_dim - spec.rope_dim
    values = record[:, :quantized].contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (-1, fmt.group))
    rotated = record[:, quantized:].contiguous().view(torch.bfloat16).float()
    tail = _gather(cache, page, cache.rows_per_page * fmt.row_bytes(spec) + row * fmt.tail, fmt.tail)
    scale = (tail[:, : values.shape[1]].int() << 23).view(torch.float32)
    return torch.cat(((values * scale[..., None]).flatten(1), rotated), dim=1)


def ue8m0_code(scale: torch.Tensor) -> torch.Tensor:
    """int32: exponent + 127 of the least power of two that is not below `scale` (fp32, positive, normal)."""
    return (scale.view(torch.int32) + 0x7FFFFF) >> 23


def inverse_scale(code: torch.Tensor) -> torch.Tensor:
    """fp32 `2 ** (127 - code)`, exact for codes 1 to 253, 0 for 254."""
    return ((254 - code) << 23).view(torch.float32)


def _byte_index(page: torch.Tensor, offset: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return page[:, None], offset[:, None] + torch.arange(width, device=page.device)


def _scatter(cache: EntryCache, page: torch.Tensor, offset: torch.Tensor, data: torch.Tensor) -> None:
    cache.pages[_byte_index(page, offset, data.shape[1])] = data


def _gather(cache: EntryCache, page: torch.Tensor, offset: torch.Tensor, width: int) -> torch.Tensor:
    return cache.pages[_byte_index(page, offset, width)]
