"""Weights of a projection: where the rows of its columns are, and which numbers FP8 codes stand for.

A number is the code's times the scale of its block of 128 x 128, as one product in fp32, then rounded to the nearest bf16.
Whether the product makes it as it takes a tile, or a launch before it, changes no bit.
"""

import triton
import triton.language as tl

from ... import contract
from ..args import Weights
from .pdl import wait_for_inputs
from .record import bf16_bits, e4m3_number

BLOCK = tl.constexpr(contract.SCALE_BLOCK)


@triton.jit
def weight_rows(weights, column, HIDDEN_DIM: tl.constexpr):
    """Where the rows of these columns begin. Gaps are added by a product, as Triton forgets the alignment of a selection."""
    at = column.to(tl.int64) * HIDDEN_DIM
    if weights.cut_1 is not None:
        at += (column >= weights.cut_1).to(tl.int64) * weights.gap_1
    if weights.cut_2 is not None:
        at += (column >= weights.cut_2).to(tl.int64) * weights.gap_2
        at += (column >= weights.cut_3).to(tl.int64) * weights.gap_3
    return weights.rows + at


@triton.jit
def scale_rows(weights, column, HIDDEN_DIM: tl.constexpr):
    """Where the scales of these columns begin. Blocks of each tensor are counted from its own first row."""
    row = column
    at = tl.zeros_like(column).to(tl.int64)
    if weights.cut_1 is not None:
        row = tl.where(column >= weights.cut_1, column - weights.cut_1, row)
        at = tl.where(column >= weights.cut_1, weights.scales_1, at)
    if weights.cut_2 is not None:
        row = tl.where(column >= weights.cut_2, column - weights.cut_2, row)
        at = tl.where(column >= weights.cut_2, weights.scales_2, at)
        row = tl.where(column >= weights.cut_3, column - weights.cut_3, row)
        at = tl.where(column >= weights.cut_3, weights.scales_3, at)
    return weights.scales + at + row // BLOCK * tl.cdiv(HIDDEN_DIM, BLOCK)


@triton.jit
def scaled(code, scale, TARGET: tl.constexpr):
    """bf16 of e4m3fn codes (uint8) times their scales."""
    if TARGET.E4M3_CONVERSION:
        x = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
    else:
        x = e4m3_number(code.to(tl.int32)) * scale
    if TARGET.BF16_CONVERSION:
        w = x.to(tl.bfloat16)  # not by `bf16_bits`, which makes every NaN the same one, number by number
    else:
        w = bf16_bits(x).to(tl.bfloat16, bitcast=True)
    return w


@triton.jit
def dequantize_kernel(
    weights_rows, weights_columns, weights_cut_1, weights_gap_1, weights_cut_2, weights_gap_2, weights_cut_3, weights_gap_3,
    weights_scales, weights_scales_1, weights_scales_2, weights_scales_3, made_rows,
    HOW: tl.constexpr, HIDDEN_DIM: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Makes bf16 weights, `[columns, HIDDEN_DIM]`, from codes and scales: a program for BLOCKS blocks of a row."""
    weights = Weights(
        weights_rows, weights_columns, weights_cut_1, weights_gap_1, weights_cut_2, weights_gap_2, weights_cut_3, weights_gap_3,
        weights_scales, weights_scales_1, weights_scales_2, weights_scales_3,
    )  # fmt: skip
    ACROSS: tl.constexpr = (HIDDEN_DIM + BLOCKS * BLOCK - 1) // (BLOCKS * BLOCK)
    column = tl.program_id(0) // ACROSS
    block = tl.program_id(0) % ACROSS * BLOCKS + tl.arange(0, BLOCKS)
    d = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    there = d < HIDDEN_DIM
    # What this writes, the launch before may still read.
    wait_for_inputs(HOW.PDL)
    code = tl.load(weight_rows(weights, column, HIDDEN_DIM) + d, mask=there, other=0)
    scale = tl.load(scale_rows(weights, column, HIDDEN_DIM) + block, mask=block * BLOCK < HIDDEN_DIM, other=0.0)
    w = scaled(code, scale[:, None], HOW.TARGET)
    tl.store(made_rows + column.to(tl.int64) * HIDDEN_DIM + d, w, mask=there)
