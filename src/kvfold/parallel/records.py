"""Records as bytes, out of the pages of a cache and into them: what ranks send of entries.

Whole records, by views of pages. `debug.compare` takes their fields apart instead, by the address of every byte: for few.
"""

from __future__ import annotations

import torch

from ..storage.cache import EntryCache
from .carry import redirect


def record_bytes(cache: EntryCache) -> int:
    """Bytes of one record, wherever its parts are."""
    return sum(part.shape[2] for part in _parts(cache))


def read_records(cache: EntryCache, slots: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the records of int64 `slots` `[n]` to uint8 `out` `[n, record_bytes]`; of a slot outside anything."""
    if len(slots) == 0 or cache.num_slots == 0:
        return
    page, row = _places(cache, torch.where((slots >= 0) & (slots < cache.num_slots), slots, 0))
    first = 0
    for part in _parts(cache):
        out[:, first : first + part.shape[2]] = part[page, row]
        first += part.shape[2]


def write_records(cache: EntryCache, slots: torch.Tensor, data: torch.Tensor) -> None:
    """The opposite, of different slots; those outside are passed over."""
    if len(slots) == 0 or cache.num_slots == 0:
        return
    there = (slots >= 0) & (slots < cache.num_slots)
    which = redirect(there)
    there, data = there[which, None], data[which]
    page, row = _places(cache, torch.where(there[:, 0], slots[which], 0))
    first = 0
    for part in _parts(cache):
        new = data[:, first : first + part.shape[2]]
        part[page, row] = torch.where(there, new, part[page, row])
        first += part.shape[2]


def _places(cache: EntryCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return slots // cache.rows_per_page, slots % cache.rows_per_page


def _parts(cache: EntryCache) -> list[torch.Tensor]:
    """Views of the pages, uint8 `[pages, rows, bytes]`: the records, and their tails where these stand apart."""
    fmt, spec, rows = cache.format, cache.spec, cache.rows_per_page
    width, tail = fmt.row_bytes(spec), fmt.tail_bytes(spec)
    parts = [cache.pages[:, : rows * width].unflatten(1, (rows, width))]
    if cache.scale_pages is not None:
        parts.append(cache.scale_pages[:, : rows * tail].unflatten(1, (rows, tail)))
    elif fmt.in_footer:
        parts.append(cache.pages[:, rows * width : rows * (width + tail)].unflatten(1, (rows, tail)))
    return parts
