"""Comparisons of `check`: what may differ between two backends, and what may not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend_torch.items import Items
from ..storage.cache import EntryCache
from ..storage.formats import FP4_GROUPS
from ..storage.pack import (
    bf16_bits,
    e2m1_codes,
    e4m3_bytes,
    fp4_scale,
    gather,
    group_scale,
    record_address,
    rotated_address,
    scatter,
    tail_address,
    through_fp4,
)

# Of pooled rows that no backend has written: a NaN that none writes, as integers of the same size.
UNWRITTEN = {torch.float32: (torch.int32, 0x7FAD0000), torch.bfloat16: (torch.int16, 0x7FAD)}


@dataclass(frozen=True)
class Difference:
    """One place where a call is not what it should be; -1 where sequence or window is not known, None for no channel."""

    sequence: int
    window: int
    stage: str
    channel: int | None
    got: object
    want: object
    against: str
    where: str = ""

    def __str__(self) -> str:
        place = [f"sequence {self.sequence}"] * (self.sequence >= 0) + [f"window {self.window}"] * (self.window >= 0)
        place += [] if self.channel is None else [f"channel {self.channel}"]
        place += [self.where] if self.where else []
        return f"{self.stage}: {', '.join(place) or 'call'}: got {self.got}, {self.against} has {self.want}"


def written(rows: Tensor) -> Tensor:
    integers, fill = UNWRITTEN[rows.dtype]
    return (rows.view(integers) != fill).any(1)


def size_of(rows: Tensor) -> Tensor:
    """fp64 `[n, 1]`: the norm of each row, of the channels that are finite."""
    return torch.where(rows.isfinite(), rows, 0.0).double().norm(dim=1, keepdim=True)


def off(got: Tensor, want: Tensor, bound: float | Tensor, *, flushed: bool = False) -> Tensor:
    """bool like `want` `[n, channels]`: channels to blame in the rows that are further apart than `bound` of their norm.

    bound: a number, or `[n, 1]`.

    A NaN is equal to a NaN, and an infinity to itself; neither has a part in the norm, so each channel that is not finite
    stands for itself. flushed: an infinity is equal to a NaN too, as it is one times a weight that only one exp2 makes 0.
    """
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    if flushed:
        same = same | (got.isnan() & want.isinf()) | (got.isinf() & want.isnan())
    wild = ~same & ~(got.isfinite() & want.isfinite())
    gap = torch.where(same | wild, 0.0, got - want)
    size = size_of(want)
    far = gap.norm(dim=1, keepdim=True) > bound * size
    return wild | far & (gap.abs() > bound * size / want.shape[1] ** 0.5)


def first_channels(wrong: Tensor) -> list[tuple[int, ...]]:
    """Indices of the first channel of each row that has one; bool `[..., channels]`."""
    return [(*row, int(wrong[tuple(row)].nonzero()[0])) for row in wrong.any(-1).nonzero().tolist()]


def pooled_differences(got: Tensor, want: Tensor, items: Items, bound: float | Tensor, against: str) -> list[Difference]:
    """Of the entries of work items. bound: as for `off`, for all of them or for each."""
    found, entry = [], items.entry
    have = written(got)[entry]
    due = written(want)[entry] if want.dtype == torch.float32 else torch.ones_like(have)
    for i in (have != due).nonzero()[:, 0].tolist():
        words = ("made", "not made") if have[i] else ("not made", "made")
        found.append(Difference(int(items.sequence[i]), int(items.window[i]), "pooled row", None, *words, against))
    both = (have & due).nonzero()[:, 0]
    bound = bound[both] if isinstance(bound, Tensor) else bound
    wrong = off(got[entry[both]], want[entry[both]], bound, flushed=against == "torch")
    for i, channel in first_channels(wrong):
        item = items[both[i]]
        values = float(got[item.entry, channel]), float(want[item.entry, channel])
        found.append(Difference(int(item.sequence), int(item.window), "pooled row", channel, *values, against))
    return found


def bytes_of(cache: EntryCache, slots: Tensor) -> Tensor:
    """Values, rotated channels and tail of each slot, uint8 `[n, record_bytes]`."""
    return torch.cat([gather(*place, width) for place, width in fields_of(cache, slots)], dim=1)


def put_bytes(cache: EntryCache, slots: Tensor, data: Tensor) -> None:
    """The opposite of `bytes_of`."""
    fields = fields_of(cache, slots)
    for (place, _), part in zip(fields, data.split([width for _, width in fields], dim=1), strict=True):
        scatter(*place, part)


def fields_of(cache: EntryCache, slots: Tensor) -> list[tuple]:
    """Where each field of the records is, and its bytes."""
    fmt, spec = cache.format, cache.spec
    return [
        (record_address(cache, slots), fmt.values_bytes(spec)),
        (rotated_address(cache, slots), fmt.rotated_bytes(spec)),
        (tail_address(cache, slots), fmt.tail_bytes(spec)),
    ]


def _key(code: Tensor, sign: int) -> Tensor:
    """Codes of sign and magnitude as integers in the order of their values, -0 before 0."""
    code = code.long() & (2 * sign - 1)
    magnitude = code & (sign - 1)
    return torch.where(code >= sign, ~magnitude, magnitude)


def explained(cache: EntryCache, data: Tensor, y: Tensor, slack: Tensor) -> Tensor:
    """bool `[n, head_dim]`: whether the records `data` are entries between `y - slack` and `y + slack`, scales included."""
    fmt, spec = cache.format, cache.spec
    low, high = (y - slack).float(), (y + slack).float()
    if fmt.element == "fp32":
        values = data.view(torch.int32)
        within = _between(values, low.view(torch.int32), high.view(torch.int32), 1 << 31)
        return torch.where(y.isnan(), values.view(torch.float32).isnan(), within)
    if fmt.element == "bf16":
        return _between(data.view(torch.int16), bf16_bits(low), bf16_bits(high), 1 << 15)
    q, width = fmt.quantized(spec), fmt.record_bytes(spec) - fmt.tail_bytes(spec)
    # As one row of its own, since a copy of a single row or of none of its bytes may keep an odd stride, and then has no view.
    rotated = data[:, fmt.values_bytes(spec) : width].reshape(-1).view(torch.int16).view(len(data), spec.head_dim - q)
    ends = [x.bfloat16().float() if fmt.round_values else x for x in (low, high)]
    if fmt.fp4_first:
        size = FP4_GROUPS[fmt.fp4_first]
        grouped, scales = (
            [x.unflatten(1, (-1, size)) for x in ends],
            [fp4_scale(a, fmt.fp4_first) for a in _largest(ends, size)],
        )
        # Under one scale the ends are rounded like all between them; else a value may be off by half the widest step.
        wide = torch.where(scales[0] == scales[1], 0.0, scales[1])[..., None]
        near = [torch.where(wide > 0, x, through_fp4(x, scales[1], fmt.fp4_first)) for x in grouped]
        ends = [(near[0] - wide).flatten(1), (near[1] + wide).flatten(1)]
    kept = _between(rotated, *(bf16_bits(x[:, q:]) for x in ends), 1 << 15)
    ends = [x[:, :q] for x in ends]
    right = torch.ones_like(ends[0], dtype=torch.bool)
    if fmt.scale == "static":
        values = [x * (1.0 / cache.scale_tensor.expand(len(x), 1)) for x in ends]
    else:
        (tail0, f0), (tail1, f1) = (group_scale(x, fmt, cache.scale_tensor) for x in _largest(ends, fmt.group))
        tail = data[:, width : width + tail0.shape[1]].contiguous()
        if fmt.scale_bytes == 4:  # unsigned, as four equal bytes may begin with a bit that is set
            tail, tail0, tail1 = (x.view(torch.int32).long() & 0xFFFFFFFF for x in (tail, tail0, tail1))
        fine = (tail >= tail0) & (tail <= tail1)
        a, b = torch.where(tail == tail0, f0, f1)[..., None], torch.where(tail == tail1, f1, f0)[..., None]
        grouped = [x.unflatten(1, (-1, fmt.group)) for x in ends]
        both = [[(x / f if fmt.divide else x * f).flatten(1) for f in (a, b)] for x in grouped]
        values = [torch.minimum(*both[0]), torch.maximum(*both[1])]
        right = fine[..., None].expand_as(grouped[0]).flatten(1)
        if fmt.pad_written:
            right = right & (data[:, -fmt.pad :] == 0).all(1, keepdim=True)
    if fmt.element == "e4m3":
        codes = _between(data[:, :q], *map(e4m3_bytes, values), 1 << 7)
    else:
        nibbles = torch.stack((data[:, : q // 2] & 15, data[:, : q // 2] >> 4), dim=2).flatten(1)
        codes = _between(nibbles, *(e2m1_codes(x, fmt.ties_to_zero, fmt.unsigned_zero) for x in values), 1 << 3)
    return torch.cat((codes & right, kept), dim=1)


def _largest(ends: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """The least and the most that the largest magnitude of each group can be, of entries between two ends."""
    sizes = [x.abs().nan_to_num(nan=0.0, posinf=float("inf")) for x in ends]
    least = torch.where((ends[0] < 0) & (ends[1] > 0), 0.0, torch.minimum(*sizes))
    least, most = (x.unflatten(1, (-1, size)).amax(-1) for x in (least, torch.maximum(*sizes)))
    return least, most


def within_bf16(got: Tensor, y: Tensor, slack: Tensor) -> Tensor:
    """bool like `got`, which is bf16: whether it is a rounding of something between `y - slack` and `y + slack`."""
    low, high = (bf16_bits(x.float()) for x in (y - slack, y + slack))
    return _between(got.view(torch.int16), low, high, 1 << 15)


def _between(code: Tensor, low: Tensor, high: Tensor, sign: int) -> Tensor:
    code, low, high = (_key(x, sign) for x in (code, low, high))
    return (code >= low) & (code <= high)
