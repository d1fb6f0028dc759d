"""What both kernels of a plan have in common: what they are given and write, the rules of `StepPlan.update`, and the items."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ... import contract
from .numbers import to_int32

SEQUENCES = 16  # per program
MOST_POSITIONS = tl.constexpr(contract.MOST_POSITIONS)
INT32_MAX = tl.constexpr(contract.INT32_MAX)


class Given(NamedTuple):
    """What `update` is given of each of `batch` sequences, and the plan's bounds.

    first_row: of kv_score that the step has. metadata: of None in a plain plan.
    """

    lengths: Any
    cu_seqlens: Any
    first_row: Any
    state_slots: Any
    batch: Any
    max_new_tokens: Any
    max_tokens: Any
    metadata: Any


class Written(NamedTuple):
    """The plan's own tensors (`args.PlanArguments`)."""

    start_pos: Any
    cu_seqlens: Any
    cu_entries: Any
    items: Any
    num_items: Any
    errors: Any
    item_capacity: Any
    entry_items: Any
    entry_capacity: Any
    entry_slots: Any


@triton.jit
def count_windows(given, inside, start, token, length, slot, RATIO: tl.constexpr):
    """Windows touched, entries made and whether refused, of sequences that are `inside` the batch."""
    end = start + length
    present = inside & (slot != -1) & (length != 0)
    wrong = (slot < -1) | (start < 0) | (length < 0) | (length > given.max_new_tokens) | (token < given.first_row)
    wrong = present & (wrong | (token - given.first_row + length > given.max_tokens) | (end > MOST_POSITIONS))
    if given.metadata.source is not None:
        wrong = wrong | (present & ((start > MOST_POSITIONS) | (token > INT32_MAX)))
        start, end, token, slot = to_int32(start), to_int32(end), to_int32(token), to_int32(slot)
    live = present & (wrong == 0)
    # Only live sequences have a start and an end that may be divided.
    first = tl.where(live, start, 0) // RATIO
    windows = tl.where(live, (tl.where(live, end, 1) - 1) // RATIO - first + 1, 0)
    entries = tl.where(live, tl.where(live, end, 0) // RATIO - first, 0)
    # Their sums stay below max_tokens / RATIO + 2 * batch.
    return windows.to(tl.int32), entries.to(tl.int32), wrong, start.to(tl.int32), end.to(tl.int32), token.to(tl.int32), slot


@triton.jit
def store_items(items, index, used, window, start, end, token, slot, entry, b):
    """Work items `index`, `[sequences, windows]`, where they are `used`. start, end, token, slot, b: of the sequences."""
    item = items + index.to(tl.int64) * 8
    zero = tl.zeros(index.shape, tl.int32)
    tl.store(item, window, mask=used)
    tl.store(item + 1, start[:, None] + zero, mask=used)
    tl.store(item + 2, end[:, None] + zero, mask=used)
    tl.store(item + 3, token[:, None] + zero, mask=used)
    tl.store(item + 4, slot[:, None] + zero, mask=used)
    tl.store(item + 5, entry, mask=used)
    tl.store(item + 6, b[:, None] + zero, mask=used)
