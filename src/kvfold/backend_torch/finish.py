"""What follows the pooling, in plain torch: RMSNorm, RoPE, Hadamard, quantization and store."""

from __future__ import annotations

import torch

from ..spec import CompressorSpec
from ..storage.formats import RecordFormat
from ..storage.pack import pack_records, to_bf16
from ..storage.step import Compressor, Outputs, Placed, PlanData
from .items import Items


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension (a power of two) by pairing neighbours, so that the order never depends on a device."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def finish(
    y: torch.Tensor,
    spec: CompressorSpec,
    weight: torch.Tensor | None,
    table: torch.Tensor | None,
    positions: torch.Tensor,
    fmt: RecordFormat,
) -> torch.Tensor:
    """RMSNorm, RoPE and Hadamard of pooled rows: fp32 `[n, head_dim]` and int64 `[n]` to fp32 `[n, head_dim]`.

    Rounds to bf16 on the way only where `fmt` says so. weight: None leaves out the norm.
    """
    return turn(norm(y, spec, weight, fmt), spec, table, positions, fmt)


def norm(y: torch.Tensor, spec: CompressorSpec, weight: torch.Tensor | None, fmt: RecordFormat | None = None) -> torch.Tensor:
    """RMSNorm of rows, which are rounded to bf16 before if `fmt` says so."""
    y = y.bfloat16().float() if fmt is not None and fmt.round_rows else y
    if weight is None:
        return y
    mean = tree_sum(y * y) * (1.0 / spec.head_dim)
    return y * (1.0 / torch.sqrt(mean + spec.norm_eps))[:, None] * weight.to(y.dtype)


def turn(
    y: torch.Tensor, spec: CompressorSpec, table: torch.Tensor | None, positions: torch.Tensor | None, fmt: RecordFormat
) -> torch.Tensor:
    """RoPE and Hadamard of rows, which are rounded to bf16 before if `fmt` says so. positions: None for row by row."""
    y = y.bfloat16().float() if fmt.round_normed else y
    if spec.rope_dim:
        cos, sin = (table if positions is None else table[positions]).chunk(2, dim=1)
        x = y[:, -spec.rope_dim :]
        even, odd = x[:, 0::2], x[:, 1::2]
        rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(1)
        y = torch.cat((y[:, : spec.head_dim - spec.rope_dim], rotated), dim=1)
    if spec.hadamard:
        half = 1
        while half < spec.head_dim:
            low, high = y.view(-1, spec.head_dim // (2 * half), 2, half).unbind(2)
            y = torch.stack((low + high, low - high), dim=2).flatten(1)
            half *= 2
        y = y * spec.head_dim**-0.5
    return y


def slots_of(items: Items, plan: PlanData) -> torch.Tensor:
    """The cache slot of each item's entry: -1 where it is dropped or there is none, 0 where the plan has no slots."""
    if plan.entry_slots is None or plan.entry_capacity == 0:
        return torch.zeros_like(items.entry)
    inside = (items.entry >= 0) & (items.entry < plan.entry_capacity)
    return torch.where(inside, plan.entry_slots[torch.where(inside, items.entry, 0)], -1)


def emit(pooled: torch.Tensor, items: Items, plan: PlanData, c: Compressor, out: Outputs, room: int | None = None) -> None:
    """Delivers the pooled rows of the items whose window ends: to the cache, if any, and to the outputs given in `out`.

    room: how many places for entries there are; by default as many as plan and `out` have.
    """
    cache, spec, rope = c.cache, c.spec, c.rope
    entry, position = items.entry, items.window * spec.ratio
    wrong, slot = entry >= (plan.room(*out) if room is None else room), slots_of(items, plan)
    keep = (entry >= 0) & ~wrong & (slot != -1)
    if cache is not None:
        bad = (slot < -1) | (slot >= cache.num_slots)
        if spec.rope_dim:
            bad |= position >= rope.shape[0]
        wrong |= keep & bad
        keep &= ~bad
    plan.errors.add_(wrong.sum().int())
    kept = keep.nonzero()[:, 0]
    if kept.numel() == 0:
        return
    y = pooled[kept]
    if out.rows is not None:
        out.rows[entry[kept]] = to_bf16(y) if out.rows.dtype == torch.bfloat16 else y
    if cache is None and out.latent is None:
        return
    y = norm(y, spec, c.norm_weight, None if cache is None else cache.format)
    if out.latent is not None:
        out.latent[entry[kept]] = to_bf16(y)
    if cache is not None:
        pack_records(cache, slot[kept], turn(y, spec, rope, position[kept], cache.format))


@torch.inference_mode()
def store_placed_torch(p: Placed) -> None:
    """`store` without a plan, after its arguments were checked."""
    slots = p.slots.long()
    wanted = known = slots >= 0
    positions = slots
    if p.spec.rope_dim:
        positions = p.positions.long()
        known = wanted & (positions >= 0) & (positions < p.rope.shape[0])
    refused = wanted & ~known
    for cache in p.caches:
        inside = known & (slots < cache.num_slots)
        refused |= known & ~inside
        kept = inside.nonzero()[:, 0]
        if kept.numel():
            y = p.rows[kept].float()
            y = finish(y, p.spec, p.norm_weight, p.rope, positions[kept], cache.format)
            pack_records(cache, slots[kept], y)
    if p.errors is not None:
        p.errors.add_(refused.sum().int())


@torch.inference_mode()
def store_torch(c: Compressor, plan: PlanData) -> None:
    """`store` of the pooled rows `c.kv_score`, after its arguments were checked."""
    pooled, items = c.kv_score, Items.of(plan)
    items = items[items.entry >= 0]
    rows = torch.zeros(len(items.entry), c.spec.head_dim, dtype=torch.float32, device=pooled.device)
    inside = items.entry < plan.room(pooled)
    rows[inside] = pooled[items.entry[inside]].float()
    emit(rows, items, plan, c, Outputs(), plan.room(pooled))
