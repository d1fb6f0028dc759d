"""What plans with and without metadata have in common: what they are given, what they write, and work items."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ... import contract

SEQUENCES = 16  # per program
MOST_POSITIONS = tl.constexpr(contract.MOST_POSITIONS)
INT32_MAX = tl.constexpr(contract.INT32_MAX)


class Given(NamedTuple):
    """What `update` is given of each of `batch` sequences, and the plan's bounds.

    first_row: the first row of kv_score that belongs to the step. metadata: all None in a plain plan.
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
def store_items(items, index, used, window, start, end, token, slot, entry, b):
    """Work items `index`, `[sequences, windows]`, where they are `used`. start, end, token, slot, b: those of the sequences."""
    item = items + index.to(tl.int64) * 8
    zero = tl.zeros(index.shape, tl.int32)
    tl.store(item, window, mask=used)
    tl.store(item + 1, start[:, None] + zero, mask=used)
    tl.store(item + 2, end[:, None] + zero, mask=used)
    tl.store(item + 3, token[:, None] + zero, mask=used)
    tl.store(item + 4, slot[:, None] + zero, mask=used)
    tl.store(item + 5, entry, mask=used)
    tl.store(item + 6, b[:, None] + zero, mask=used)
