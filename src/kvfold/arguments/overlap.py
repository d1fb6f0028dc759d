"""Tensors that share memory: what a call writes must be nothing else that it reads or writes."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch._subclasses import FakeTensor

MOST_STEPS = 10_000  # of the search in `share_bytes`: behind them it has shown nothing
NO_ROOM = (0, 0)


class Place(NamedTuple):
    """A tensor of a call under the name of its argument.

    paged: its pages are handed out by an engine, which may give pages of one allocation to several such tensors.
    """

    name: str
    tensor: torch.Tensor
    written: bool = False
    paged: bool = False


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of a tensor's first byte, and the one behind its last; equal where it has no elements."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    if tensor.numel() == 0:
        return start, start
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + span * tensor.element_size()


def share_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have a byte in common, exactly, however their rows and pages interleave.

    That is whether `a0 + sum(i_k * stride_k) = b0 + sum(j_k * stride_k)` has a solution: searched from the longest stride to
    the shortest, with the few multiples of each that the shorter ones can still correct. Strides that do not nest, such as
    1000 and 999, may take more than `MOST_STEPS`; the answer is no then.
    """
    if a.numel() == 0 or b.numel() == 0:
        return False
    low, high = Counter(), Counter()  # of the multiples of a stride
    for stride, count in _runs(a):
        high[stride] += count - 1
    for stride, count in _runs(b):
        low[stride] -= count - 1
    strides = sorted({*low, *high}, reverse=True)
    # What the strides from each on can reach; the last one is 1, so that all between can be reached.
    reach = [[stride * times[stride] for stride in reversed(strides)] for times in (low, high)]
    least, most = ([*accumulate(each, initial=0)][::-1] for each in reach)
    steps, open_ends = 0, [(0, b.data_ptr() - a.data_ptr())]
    while open_ends and steps < MOST_STEPS:
        steps += 1
        k, rest = open_ends.pop()
        if not least[k] <= rest <= most[k]:
            continue
        stride = strides[k]
        if stride == 1:
            return True
        first = max(low[stride], -(-(rest - most[k + 1]) // stride))
        last = min(high[stride], (rest - least[k + 1]) // stride)
        open_ends += [(k + 1, rest - times * stride) for times in range(first, min(last, first + MOST_STEPS) + 1)]
    return False


def _runs(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Strides in bytes and their counts; the bytes that lie side by side are one run of stride 1."""
    size = tensor.element_size()
    run, found = size, []
    for stride, count in sorted((s * size, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s):
        if stride == run and not found:
            run *= count
        else:
            found.append((stride, count))
    return [(1, run), *found]


def check_apart(places: Sequence[Place]) -> list[int]:
    """ValueError where a written tensor shares a byte with another one; two paged ones may (see `WindowState`).

    It names the later of the two first. Returns the bounds of what the tensors span, ascending: a first byte and the one behind
    the last in turn, as `find_room` takes them.
    """
    if not places or torch.compiler.is_compiling() or places[0].tensor.device.type == "meta":
        return []
    fakes = [place for place in places if isinstance(place.tensor, FakeTensor)]
    if fakes:
        real = next((place for place in places if not isinstance(place.tensor, FakeTensor)), None)
        if real is not None and not fakes[0].tensor.fake_mode.allow_non_fake_inputs:
            raise TypeError(f"{fakes[0].name} must be a real tensor like {real.name}, got a FakeTensor")
        return []
    spans = sorted([(*extent(place.tensor), i) for i, place in enumerate(places)])
    bounds, end = [], 0
    for at, (first, behind, i) in enumerate(spans):
        if first == behind:
            continue
        if first >= end:
            bounds += (first, behind)
        else:  # the extents meet: rows or pages of the two may still lie between each other
            for _, other, j in spans[:at]:
                if other > first:
                    _check_two(places[min(i, j)], places[max(i, j)])
            bounds[-1] = max(end, behind)
        end = bounds[-1]
    return bounds


def _check_two(one: Place, other: Place) -> None:
    if (one.written or other.written) and not (one.paged and other.paged) and share_bytes(one.tensor, other.tensor):
        written = "both are" if one.written and other.written else f"{one.name if one.written else other.name} is"
        raise ValueError(f"{other.name} must not share memory with {one.name}: {written} written")


def find_room(bounds: list[int], start: int, end: int) -> tuple[int, int]:
    """The room between bounds of `check_apart` in which `[start, end)` lies; `NO_ROOM` where it meets what is between them."""
    at = bisect_right(bounds, start)
    low, high = bounds[at - 1] if at else 0, bounds[at] if at < len(bounds) else 1 << 64
    return (low, high) if at % 2 == 0 and end <= high else NO_ROOM


def join_bounds(one: list[int], other: list[int]) -> list[int] | None:
    """The bounds of two groups of tensors together; None where they meet, so that their bytes must be compared."""
    spans = sorted([*zip(one[::2], one[1::2], strict=True), *zip(other[::2], other[1::2], strict=True)])
    joined = [end for span in spans for end in span]
    return joined if joined == sorted(joined) else None
