"""The gradients of ape and norm_weight: the groups' sums, added in an order that the number of groups alone decides."""

import triton
import triton.language as tl

from ...backend_triton.kernels.pdl import wait_for_inputs


@triton.jit
def sum_columns(parts, width, out, c, GROUPS: tl.constexpr, TILE: tl.constexpr, LOG2_TILE: tl.constexpr):
    """Columns `c` of `parts` `[GROUPS, width]`: group g to group g + TILE and so on, then a tree of neighbours."""
    COLUMNS: tl.constexpr = c.shape[0]
    g = tl.arange(0, TILE)
    inside = c < width
    sums = tl.zeros((TILE, COLUMNS), tl.float32)
    for first in tl.static_range(0, GROUPS, TILE):
        mask = tl.broadcast_to((first + g < GROUPS)[:, None], (TILE, COLUMNS)) & tl.broadcast_to(
            inside[None, :], (TILE, COLUMNS)
        )
        at = parts + (first + g)[:, None].to(tl.int64) * width + c[None, :]
        sums += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    for i in tl.static_range(LOG2_TILE):
        sums = tl.sum(tl.reshape(sums, (TILE >> (i + 1), 2, COLUMNS)), axis=1)
    tl.store(out + c, tl.reshape(sums, (COLUMNS,)), mask=inside)


@triton.jit
def train_sum_kernel(
    parts_ape, parts_weight, parts_groups, parts_each, parts_runs, d_ape, d_norm_weight,
    GROUPS: tl.constexpr, TILE: tl.constexpr, LOG2_TILE: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, WEIGHT_TILE: tl.constexpr,
    LOG2_WEIGHT_TILE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Programs of COLUMNS columns: those of ape, WIDTH in all, then those of norm_weight."""
    wait_for_inputs(HOW.PDL)
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0)
    c = tl.arange(0, COLUMNS)
    if parts_ape is not None:
        if block < BLOCKS:
            sum_columns(parts_ape, WIDTH, d_ape, block * COLUMNS + c, GROUPS, TILE, LOG2_TILE)
    if block >= BLOCKS:
        at = (block - BLOCKS) * COLUMNS + c
        sum_columns(parts_weight, SPEC.HEAD_DIM, d_norm_weight, at, WEIGHT_GROUPS, WEIGHT_TILE, LOG2_WEIGHT_TILE)
