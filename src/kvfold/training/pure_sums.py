"""The torch backend's gradients of ape and norm_weight: fp64 sums over windows, in the order that kernels/sums.py has."""

from __future__ import annotations

import torch

from .problem import How, Inputs, Recipe, Runs, Sums
from .table import Groups, groups_for


def new_sums(x: Inputs, how: How, capacity: int) -> Sums:
    """Zeros, for all groups of a call."""
    spec, device, found, runs = how.spec, x.value.device, [], []
    for width, groups in zip((spec.ratio * spec.channels, spec.head_dim), groups_for(how.keeps, spec, capacity), strict=True):
        at = torch.arange(groups.count, device=device)
        ends = ((at + n) * groups.each for n in (0, 1))
        rows = torch.stack([*(end.clamp(max=capacity) for end in ends), at, at], dim=1)
        runs.append(Runs(rows, capacity, min(groups.each, capacity)))
        found.append(torch.zeros(groups.count, width, dtype=torch.float64, device=device))
    return Sums(found[0] if spec.has_ape else None, found[1], *runs)


def go_on(sums: torch.Tensor, shares: torch.Tensor, runs: Runs) -> None:
    """Adds the shares of windows to the sums of their runs, in order."""
    first, behind, at, _ = runs.rows.long().unbind(1)
    found = sums[at]
    for i in range(runs.longest):
        window = first + i
        there = window < behind
        share = shares[torch.where(there, window, 0)].double()
        found = torch.where(there[:, None], found + share, found)
    sums[at] = found


def blocks(how: How, capacity: int, *sums: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The sums of blocks, for ape and norm_weight, of those of all groups."""
    found = groups_for(how.keeps, how.spec, capacity)
    return [None if x is None else _blocks(x, groups) for x, groups in zip(sums, found, strict=True)]


def _blocks(sums: torch.Tensor, groups: Groups) -> torch.Tensor:
    missing = groups.blocks * groups.of_a_block - groups.count
    by_block = torch.cat([sums, sums.new_zeros(missing, sums.shape[1])]).view(groups.blocks, groups.of_a_block, -1)
    return _in_order(by_block.transpose(0, 1))


def _in_order(sums: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(sums[0])
    for one in sums:
        total = total + one
    return total


def fold_torch(how: How, sums: torch.Tensor, recipe: Recipe, out: torch.Tensor) -> None:
    """Writes a recipe's rows."""
    data, ends, items = sums.view(-1), recipe.rows.tolist(), recipe.items.tolist()
    for row, into in enumerate(out):
        block = group = torch.zeros_like(into)
        for item in items[ends[row] : ends[row + 1]]:
            first = (item >> 1) * how.spec.head_dim
            part = data[first : first + len(into)]
            block, group = (block + group, part) if item & 1 else (block, group + part)
        into.copy_(block + group)


def total_torch(
    x: Inputs, how: How, ape: torch.Tensor | None, norm_weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The gradients of weights, of the sums of all blocks."""
    totals = [None if sums is None else _in_order(sums).to(x.wide) for sums in (ape, norm_weight)]
    return totals[0] if totals[0] is None else totals[0].view(how.spec.ratio, how.spec.channels), totals[1]
