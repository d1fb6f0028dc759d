"""From hidden states to kv_score, each number of it by one order of sums, whatever tokens it comes with.

hidden_dim is cut into 8 chunks. A chunk is summed by one chain of matrix instructions, from its first number on; then chunks
in pairs, and the pairs in order (contract.py). Columns are the rows of these instructions and tokens their columns, so that
one instruction serves one token and many; which tile a token is in changes nothing of what is added to what.
"""

import triton
import triton.language as tl

from ..args import Hidden, Sums, Weights
from .parts import CHUNKS, PAIRS, rounded_to, sum_parts
from .pdl import wait_for_inputs


@triton.jit
def weight_rows(weights, column, HIDDEN_DIM: tl.constexpr):
    """Where the rows of these columns begin."""
    at = column.to(tl.int64) * HIDDEN_DIM
    if weights.cut_1 is not None:
        at += tl.where(column >= weights.cut_1, weights.gap_1, 0)
    if weights.cut_2 is not None:
        at += tl.where(column >= weights.cut_2, weights.gap_2, 0)
        at += tl.where(column >= weights.cut_3, weights.gap_3, 0)
    return weights.rows + at


@triton.jit
def product(w_at, x_at, k, acc, HOW: tl.constexpr, P: tl.constexpr):
    """Adds DEPTH numbers of hidden states, from `k` on, times their weights to `acc`, `[COLUMNS, TOKENS]`."""
    d = k + tl.arange(0, P.DEPTH)
    if P.CHUNK * CHUNKS == P.HIDDEN_DIM:
        w = tl.load(w_at[:, None] + d[None, :])
        x = tl.load(x_at[:, None] + d[None, :])
    else:
        w = tl.load(w_at[:, None] + d[None, :], mask=d[None, :] < P.HIDDEN_DIM, other=0.0)
        x = tl.load(x_at[:, None] + d[None, :], mask=d[None, :] < P.HIDDEN_DIM, other=0.0)
    if HOW.TARGET.BF16_PRODUCTS:
        acc = tl.dot(w, tl.trans(x), acc)
    else:
        # The interpreter's own product has another order of sums for every shape.
        acc += tl.sum(w.to(tl.float32)[:, None, :] * x.to(tl.float32)[None, :, :], axis=2)
    return acc


@triton.jit
def project_kernel(
    hidden_rows, hidden_stride, hidden_count,
    weights_rows, weights_columns, weights_cut_1, weights_gap_1, weights_cut_2, weights_gap_2, weights_cut_3, weights_gap_3,
    sums_rows, sums_stride, sums_part,
    HOW: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A program: the sums of one tile over a part of hidden_dim, or over all of it."""
    hidden = Hidden(hidden_rows, hidden_stride, hidden_count)
    weights = Weights(
        weights_rows, weights_columns, weights_cut_1, weights_gap_1, weights_cut_2, weights_gap_2, weights_cut_3, weights_gap_3
    )
    sums = Sums(sums_rows, sums_stride, sums_part)
    across = tl.cdiv(weights.columns, P.COLUMNS)
    pid = tl.program_id(0)
    column = pid % across * P.COLUMNS + tl.arange(0, P.COLUMNS)
    along = tl.cdiv(hidden.count, P.TOKENS)
    token = pid // across % along * P.TOKENS + tl.arange(0, P.TOKENS)
    part = pid // across // along
    # Beyond the last one the last is taken again, and not stored.
    w_at = weight_rows(weights, tl.minimum(column, weights.columns - 1), P.HIDDEN_DIM)
    x_at = hidden.rows + tl.minimum(token, hidden.count - 1).to(tl.int64) * hidden.stride
    wait_for_inputs(HOW.PDL)
    TILES: tl.constexpr = P.CHUNK // P.DEPTH  # of a chunk
    ROOM: tl.constexpr = HOW.TARGET.SHARED_BYTES // ((P.COLUMNS + P.TOKENS) * P.DEPTH * 2)  # for tiles under way
    STAGES: tl.constexpr = P.STAGES if P.STAGES < ROOM else ROOM
    acc = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
    first = part * (CHUNKS // P.PARTS * TILES)
    if P.PARTS == CHUNKS:
        for i in tl.range(0, TILES, num_stages=STAGES):
            acc = product(w_at, x_at, (first + i) * P.DEPTH, acc, HOW, P)
        total = acc
    elif P.PARTS == PAIRS:
        pair = acc
        for i in tl.range(0, 2 * TILES, num_stages=STAGES):
            acc = product(w_at, x_at, (first + i) * P.DEPTH, acc, HOW, P)
            if i == TILES - 1:
                pair = acc
                acc = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
        total = pair + acc
    else:
        pair = acc
        total = acc
        for i in tl.range(0, CHUNKS * TILES, num_stages=STAGES):
            acc = product(w_at, x_at, i * P.DEPTH, acc, HOW, P)
            if i % (2 * TILES) == TILES - 1:
                pair = acc
                acc = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
            elif i % (2 * TILES) == 2 * TILES - 1:
                total += pair + acc
                acc = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
    there = (column < weights.columns)[:, None] & (token < hidden.count)[None, :]
    at = sums.rows + column[:, None] + token.to(tl.int64)[None, :] * sums.stride
    if P.PARTS > 1:
        tl.store(at + part.to(tl.int64) * sums.part, total, mask=there)
    else:
        tl.store(at, rounded_to(total, sums.rows.dtype.element_ty, HOW.ROUNDED, HOW.TARGET.BF16_CONVERSION), mask=there)


@triton.jit
def add_kernel(
    parts, count, columns, part, kv_score, stride, HOW: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """kv_score from the parts of a product: a program for SIZE columns of a row."""
    across = tl.cdiv(columns, SIZE)
    pid = tl.program_id(0)
    column = pid % across * SIZE + tl.arange(0, SIZE)
    row = (pid // across).to(tl.int64)
    there = column < columns
    wait_for_inputs(HOW.PDL)
    x = sum_parts(parts + row * columns + column, part, there, HOW.PARTS)
    x = rounded_to(x, kv_score.dtype.element_ty, HOW.ROUNDED, HOW.TARGET.BF16_CONVERSION)
    tl.store(kv_score + row * stride + column, x, mask=there)
