"""Seeded tokens and weights of a compressor; and states and caches full of NaN, as memory may be that an engine reuses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..spec import CompressorSpec
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.formats import FORMATS
from ..storage.mean_state import MeanState
from ..storage.window_state import WindowState

UNTOUCHED = 0xA5  # each byte of a new cache
Device = torch.device | str


def make_tokens(
    spec: CompressorSpec, lengths: Sequence[int], values: str, draw: torch.Generator, dtype: torch.dtype, device: Device
) -> list[Tensor]:
    """kv_score rows `[n, spec.kv_score_width]` of each sequence, drawn on the CPU: the same on every machine.

    values: "normal"; "peaked": one score of a window outweighs the rest; "tied": all scores are 0; "masked": many scores are
    -inf, but never all of a window; "hidden": sometimes all of a window, whose entry is then NaN; "zeros": as "masked", and in
    half of the channels all values are 0 or, mostly, -0.
    """
    found = []
    for n in lengths:
        k, s = torch.randn(n, 2 * spec.channels, generator=draw, dtype=torch.float32).split(spec.channels, dim=1)
        mask = torch.rand(s.shape, generator=draw, dtype=torch.float32) < {"masked": 0.5, "zeros": 0.4, "hidden": 0.7}.get(
            values, 0
        )
        if values != "hidden":
            mask[:: spec.ratio] = False
        s = torch.zeros_like(s) if values == "tied" else 8 * s if values == "peaked" else s
        if values == "zeros":
            zeros = torch.where(torch.rand(k.shape, generator=draw, dtype=torch.float32) < 0.9, torch.full_like(k, -0.0), 0.0)
            k = torch.where(torch.rand(spec.channels, generator=draw, dtype=torch.float32) < 0.5, zeros, k)
        s = s.masked_fill(mask, -torch.inf)
        found.append((torch.cat((k, s), dim=1) if spec.gate else k).to(device, dtype))
    return found


def make_weights(
    spec: CompressorSpec, length: int, values: str, draw: torch.Generator, norm_dtype: torch.dtype, device: Device
) -> dict[str, CompressorSpec | Tensor | None]:
    """spec, ape, norm_weight and rope, as `compress` takes them; `length`: tokens of the longest sequence."""
    ape = torch.randn(spec.ratio, spec.channels, generator=draw, dtype=torch.float32) * (values != "tied")
    norm_weight = (1 + 0.2 * torch.randn(spec.head_dim, generator=draw, dtype=torch.float32)).to(device, norm_dtype)
    rope = reference.rope_table(length + 1, spec.rope_dim).to(device) if spec.rope_dim else None
    return {"spec": spec, "ape": ape.to(device) if spec.has_ape else None, "norm_weight": norm_weight, "rope": rope}


def make_state(
    spec: CompressorSpec,
    slots: int,
    max_new_tokens: int,
    dtype: torch.dtype,
    device: Device,
    *,
    round_inputs: bool = False,
    gap: int | None = None,
) -> FoldState:
    """A `FoldState` whose rows are NaN. gap: put it in an engine's pages, with so many unused bytes after each."""
    how = {"dtype": dtype, "round_inputs": round_inputs}
    if gap is None:
        state = FoldState.allocate(spec, slots, max_new_tokens, device=device, **how)
    else:
        size = FoldState.page_bytes(spec, max_new_tokens, dtype) + gap
        pages = torch.full((slots, size), UNTOUCHED, dtype=torch.uint8, device=device)
        state = FoldState.over(pages, spec, max_new_tokens, fresh=True, **how)
    state.rows.fill_(torch.nan)
    return state


def make_means(spec: CompressorSpec, slots: int, device: Device) -> MeanState:
    """A `MeanState` of NaN."""
    return MeanState(spec, torch.full((slots, 3 * spec.head_dim), torch.nan, dtype=torch.float32, device=device))


def make_pools(
    spec: CompressorSpec, pages: int, page_size: int, dtype: torch.dtype, device: Device, *, joined: bool = False
) -> WindowState:
    """A `WindowState` of NaN. joined: both pools are columns of one tensor."""
    if not joined:
        return WindowState(*torch.full((2, pages, page_size, spec.channels), torch.nan, dtype=dtype, device=device).unbind(0))
    pool = torch.full((pages, page_size, 2 * spec.channels), torch.nan, dtype=dtype, device=device)
    return WindowState(pool[..., : spec.channels], pool[..., spec.channels :])


def make_cache(
    fmt: str,
    spec: CompressorSpec,
    pages: int,
    rows_per_page: int,
    device: Device,
    *,
    scale: float | Tensor = 1.0,
    gap: int = 0,
    blocks: bool = False,
) -> EntryCache:
    """A cache of bytes `UNTOUCHED`, with `gap` more of them after each page. blocks: made by `EntryCache.from_blocks`."""
    known = FORMATS[fmt]
    sizes = known.page_bytes(spec, rows_per_page), rows_per_page * known.tail_bytes(spec)
    wide = [torch.full((pages, size + gap), UNTOUCHED, dtype=torch.uint8, device=device)[:, :size] for size in sizes]
    scales = wide[1] if known.separate else None
    if blocks:
        record = known.record_bytes(spec) if known.in_footer else known.row_bytes(spec)
        view = wide[0].as_strided((pages, rows_per_page, record), (wide[0].stride(0), record, 1))
        return EntryCache.from_blocks(view, known, spec, scales=scales, scale=scale)
    return EntryCache(wide[0], known, rows_per_page, spec, scales=scales, scale=scale)
