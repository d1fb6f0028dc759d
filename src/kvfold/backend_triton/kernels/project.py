"""From hidden states to kv_score, each number of it by one order of sums, whatever tokens it comes with.

hidden_dim is cut into 8 chunks. A chunk is summed by one chain of matrix instructions, from its first number on; then chunks
in pairs, and the pairs in order (contract.py). Columns are the rows of these instructions and tokens their columns, so that
one instruction serves one token and many; which tile a token is in changes nothing of what is added to what.

Programs that share a tile leave their parts of it in memory. The last one that has adds them up, unless whoever reads
kv_score does (parts.py).
"""

import triton
import triton.language as tl

from ..args import Hidden, Parts, Sums, Weights
from .parts import CHUNKS, PAIRS, rounded_to, sum_parts
from .pdl import wait_for_inputs

SUMMED = tl.constexpr(16)  # tokens of a tile whose parts are added up at once: those of more would take too many registers


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
def chunk_of(w_at, x_at, chunk, HOW: tl.constexpr, P: tl.constexpr):
    """The sums of a chunk of hidden_dim. A loop of its own, so that an instruction need not wait for the one before it."""
    TILES: tl.constexpr = P.CHUNK // P.DEPTH
    ROOM: tl.constexpr = HOW.TARGET.SHARED_BYTES // ((P.COLUMNS + P.TOKENS) * P.DEPTH * 2)  # for tiles under way
    STAGES: tl.constexpr = P.STAGES if P.STAGES < ROOM else ROOM
    acc = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
    for i in tl.range(0, TILES, num_stages=STAGES):
        acc = product(w_at, x_at, chunk * P.CHUNK + i * P.DEPTH, acc, HOW, P)
    return acc


@triton.jit
def project_kernel(
    hidden_rows, hidden_stride, hidden_count,
    weights_rows, weights_columns, weights_cut_1, weights_gap_1, weights_cut_2, weights_gap_2, weights_cut_3, weights_gap_3,
    parts_rows, parts_stride, parts_step, parts_done,
    sums_rows, sums_stride,
    HOW: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A program: the sums of one tile over a part of hidden_dim, or over all of it."""
    hidden = Hidden(hidden_rows, hidden_stride, hidden_count)
    weights = Weights(
        weights_rows, weights_columns, weights_cut_1, weights_gap_1, weights_cut_2, weights_gap_2, weights_cut_3, weights_gap_3
    )
    parts = Parts(parts_rows, parts_stride, parts_step, parts_done)
    sums = Sums(sums_rows, sums_stride)
    across = tl.cdiv(weights.columns, P.COLUMNS)
    tiles = across * tl.cdiv(hidden.count, P.TOKENS)
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    column = tile % across * P.COLUMNS + tl.arange(0, P.COLUMNS)
    token = tile // across * P.TOKENS + tl.arange(0, P.TOKENS)
    # Beyond the last one the last is taken again, and not stored.
    w_at = weight_rows(weights, tl.minimum(column, weights.columns - 1), P.HIDDEN_DIM)
    x_at = hidden.rows + tl.minimum(token, hidden.count - 1).to(tl.int64) * hidden.stride
    wait_for_inputs(HOW.PDL)
    there = (column < weights.columns)[:, None] & (token < hidden.count)[None, :]
    if P.PARTS == 1:
        total = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
        for pair in range(PAIRS):
            first = chunk_of(w_at, x_at, 2 * pair, HOW, P)
            total += first + chunk_of(w_at, x_at, 2 * pair + 1, HOW, P)
        store_sums(sums, column, token, total, there, HOW)
    else:
        if P.PARTS == CHUNKS:
            total = chunk_of(w_at, x_at, part, HOW, P)
        else:
            first = chunk_of(w_at, x_at, 2 * part, HOW, P)
            total = first + chunk_of(w_at, x_at, 2 * part + 1, HOW, P)
        at = parts.rows + column[:, None] + token.to(tl.int64)[None, :] * parts.stride
        tl.store(at + part.to(tl.int64) * parts.step, total, mask=there)
        if sums.rows is not None:
            tl.debug_barrier()  # all threads' parts are written before one of them counts this program
            if tl.atomic_add(parts.done + tile, 1, sem="acq_rel") == P.PARTS - 1:
                tl.store(parts.done + tile, 0)  # as the next call finds it
                for i in range(0, P.TOKENS, SUMMED):
                    some = tile // across * P.TOKENS + i + tl.arange(0, SUMMED)
                    add_parts(parts, sums, column, some, weights.columns, hidden.count, HOW, P)


@triton.jit
def add_parts(parts, sums, column, token, columns, count, HOW: tl.constexpr, P: tl.constexpr):
    there = (column < columns)[:, None] & (token < count)[None, :]
    at = parts.rows + column[:, None] + token.to(tl.int64)[None, :] * parts.stride
    store_sums(sums, column, token, sum_parts(at, parts.step, there, P.PARTS), there, HOW)


@triton.jit
def store_sums(sums, column, token, x, there, HOW: tl.constexpr):
    x = rounded_to(x, sums.rows.dtype.element_ty, HOW.ROUNDED, HOW.TARGET.BF16_CONVERSION)
    tl.store(sums.rows + column[:, None] + token.to(tl.int64)[None, :] * sums.stride, x, mask=there)
