"""What a message of carries is: bytes, and views of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..storage.fold_state import FoldState, carry_shape
from .carry import Carry

ALIGNMENT = 16  # of everything in a message, in bytes


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def message_bytes(states: Sequence[FoldState], count: int, inside: bool) -> int:
    """Bytes of a message of `count` carries of each state. inside: whether any starts inside of a window."""
    return sum(padded(_rows_bytes(state, count, inside)) + padded(4 * count) for state in states)


def carries_in(data: torch.Tensor, states: Sequence[FoldState], count: int, inside: bool) -> list[Carry]:
    """The carries of each state in a message, as views of uint8 `[message_bytes]`: rows, then positions."""
    found, first = [], 0
    for state in states:
        size = _rows_bytes(state, count, inside)
        rows = data[first : first + size].view(state.rows.dtype).view(count, *_shape(state, inside))
        first += padded(size)
        found.append(Carry(rows, data[first : first + 4 * count].view(torch.int32)))
        first += padded(4 * count)
    return found


def _shape(state: FoldState, inside: bool) -> tuple[int, int]:
    return carry_shape(state.spec, None if inside else state.spec.ratio)


def _rows_bytes(state: FoldState, count: int, inside: bool) -> int:
    rows, width = _shape(state, inside)
    return count * rows * width * state.rows.element_size()
