"""The gradients of ape and norm_weight: the groups' sums, added in an order that the number of groups alone decides.

Consecutive groups are a block, whose sums are added in order; then a tree of neighbours adds the blocks. So a rank with some of
the windows can add the groups and blocks that it has whole: `train_fold_kernel`, for `problem.Recipe`.
"""

import triton
import triton.language as tl

from ...backend_triton.kernels.pdl import wait_for_inputs

MOST_UNROLLED = tl.constexpr(16)


@triton.jit
def load_groups(parts, g, width, c, inside, GROUPS: tl.constexpr):
    mask = (g < GROUPS)[:, None] & inside[None, :]
    return tl.load(parts + g[:, None].to(tl.int64) * width + c[None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def sum_columns(parts, width, out, c, GROUPS: tl.constexpr, TILE: tl.constexpr, LOG2_TILE: tl.constexpr):
    """Columns `c` of `parts` `[GROUPS, width]`, of TILE blocks."""
    COLUMNS: tl.constexpr = c.shape[0]
    OF_A_BLOCK: tl.constexpr = (GROUPS + TILE - 1) // TILE
    first = tl.arange(0, TILE) * OF_A_BLOCK
    inside = c < width
    sums = tl.zeros((TILE, COLUMNS), tl.float32)
    if OF_A_BLOCK <= MOST_UNROLLED:  # all loads at once
        for i in tl.static_range(OF_A_BLOCK):
            sums += load_groups(parts, first + i, width, c, inside, GROUPS)
    else:
        for i in range(0, OF_A_BLOCK):
            sums += load_groups(parts, first + i, width, c, inside, GROUPS)
    for i in tl.static_range(LOG2_TILE):
        sums = tl.sum(tl.reshape(sums, (TILE >> (i + 1), 2, COLUMNS)), axis=1)
    tl.store(out + c, tl.reshape(sums, (COLUMNS,)), mask=inside)


@triton.jit
def train_fold_kernel(sums, rows, items, width, out, COLUMNS: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr):
    """Adds COLUMNS columns of a row of `problem.Recipe`, whose sums are `width` numbers each."""
    wait_for_inputs(HOW.PDL)
    tiles = (width + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // tiles
    c = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < width
    first = tl.load(rows + row, cache_modifier=".cg")
    behind = tl.load(rows + row + 1, cache_modifier=".cg")
    block = tl.zeros((COLUMNS,), tl.float32)
    group = tl.zeros((COLUMNS,), tl.float32)
    for i in range(first, behind):
        item = tl.load(items + i, cache_modifier=".cg")
        part = tl.load(sums + (item >> 1).to(tl.int64) * SPEC.HEAD_DIM + c, mask=inside, other=0.0, cache_modifier=".cg")
        begins = (item & 1) != 0
        block = tl.where(begins, block + group, block)
        group = tl.where(begins, part, group + part)
    tl.store(out + row.to(tl.int64) * width + c, block + group, mask=inside)


@triton.jit
def train_sum_kernel(
    parts_ape, parts_weight, parts_groups, parts_each, parts_runs, d_ape, d_norm_weight,
    GROUPS: tl.constexpr, TILE: tl.constexpr, LOG2_TILE: tl.constexpr, WEIGHT_GROUPS: tl.constexpr, WEIGHT_TILE: tl.constexpr,
    LOG2_WEIGHT_TILE: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Adds COLUMNS columns in each program: first those of ape, WIDTH in all, then those of norm_weight."""
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
