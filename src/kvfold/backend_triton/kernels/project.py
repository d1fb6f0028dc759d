"""From hidden states to kv_score, each number of it by one order of sums, whatever tokens it comes with.

hidden_dim is cut into 8 chunks. A chunk is summed by one chain of matrix instructions, from its first number on; then chunks
in pairs, and the pairs in order (contract.py). Columns are the rows of these instructions and tokens their columns, so that
one instruction serves one token and many; which tile a token is in changes nothing of what is added to what.

Programs that share a tile leave their parts of it in memory. The last one that has adds them up, unless whoever reads
kv_score does (parts.py).
"""

import triton
import triton.language as tl

from ... import contract
from ..args import Hidden, Parts, Sums, Weights
from .parts import CHUNKS, PAIRS, rounded_to, sum_parts
from .pdl import let_go_early, wait_for_inputs
from .prefetch import prefetch_pieces

STEP = tl.constexpr(contract.HIDDEN_STEP)
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
def added(a, b):
    """a + b. As `+` Triton would make `b` the sum that the instructions behind `a` begin with, where it sees that this is 0."""
    return tl.fma(a, tl.full(a.shape, 1.0, tl.float32), b)


@triton.jit
def tiles_at(w_at, x_at, there, k, DEPTH: tl.constexpr, P: tl.constexpr):
    """DEPTH numbers from `k` on of weights and of hidden states, a row for each row of them.

    there: whether a hidden state is.
    """
    d = k + tl.arange(0, DEPTH)
    if P.CHUNK * CHUNKS == P.HIDDEN_DIM:
        w = tl.load(w_at[:, None] + d[None, :])
        x = tl.load(x_at[:, None] + d[None, :], mask=there[:, None], other=0.0)
    else:
        w = tl.load(w_at[:, None] + d[None, :], mask=d[None, :] < P.HIDDEN_DIM, other=0.0)
        inside = there[:, None] & (d[None, :] < P.HIDDEN_DIM)
        x = tl.load(x_at[:, None] + d[None, :], mask=inside, other=0.0)
    return w, x


@triton.jit
def product(w_at, x_at, there, k, acc, HOW: tl.constexpr, P: tl.constexpr):
    """Adds DEPTH numbers of hidden states, from `k` on, times their weights to `acc`, a row of weights to a row of it."""
    if HOW.TARGET.BF16_PRODUCTS:
        w, x = tiles_at(w_at, x_at, there, k, P.DEPTH, P)
        acc = tl.dot(w, tl.trans(x), acc)
    else:
        # The interpreter's own product has another order of sums for every shape.
        for i in tl.static_range(0, P.DEPTH, STEP):
            w, x = tiles_at(w_at, x_at, there, k + i, STEP, P)
            acc += tl.sum(w.to(tl.float32)[:, None, :] * x.to(tl.float32)[None, :, :], axis=2)
    return acc


@triton.jit
def chunk_of(w_at, x_at, there, chunk, HOW: tl.constexpr, P: tl.constexpr, LENGTH: tl.constexpr):
    """The sums of a chunk's first LENGTH numbers. A loop of its own, so that an instruction need not wait for the one before."""
    ROOM: tl.constexpr = HOW.TARGET.SHARED_BYTES // ((P.COLUMNS + P.TOKENS) * P.DEPTH * 2)  # for tiles under way
    STAGES: tl.constexpr = P.STAGES if P.STAGES < ROOM else ROOM
    acc = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
    for i in tl.range(0, LENGTH // P.DEPTH, num_stages=STAGES):
        acc = product(w_at, x_at, there, chunk * P.CHUNK + i * P.DEPTH, acc, HOW, P)
    return acc


@triton.jit
def last_chunk_of(w_at, x_at, there, chunk, ahead, HOW: tl.constexpr, P: tl.constexpr):
    """The sums of a chunk of whose weights the last ones are `ahead`."""
    if P.AHEAD == 0 or not HOW.TARGET.BF16_PRODUCTS:
        acc = chunk_of(w_at, x_at, there, chunk, HOW, P, P.CHUNK)
    else:
        x = tl.load(x_at[:, None] + (chunk * P.CHUNK + P.CHUNK - P.AHEAD + tl.arange(0, P.AHEAD))[None, :])
        acc = chunk_of(w_at, x_at, there, chunk, HOW, P, P.CHUNK - P.AHEAD)
        acc = tl.dot(ahead, tl.trans(tl.where(there[:, None], x, 0.0)), acc)
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
    along = tl.cdiv(hidden.count, P.TOKENS)
    tiles = across * along
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    if P.GROUP == 0:
        tile_column = tile % across
        tile_token = tile // across
    else:
        # Tiles of GROUP rows of them at a time, so that what is on the GPU at once shares more.
        group = tile // (P.GROUP * across)
        height = tl.minimum(along - group * P.GROUP, P.GROUP)
        tile_token = group * P.GROUP + tile % (P.GROUP * across) % height
        tile_column = tile % (P.GROUP * across) // height
    column = tile_column * P.COLUMNS + tl.arange(0, P.COLUMNS)
    token = tile_token * P.TOKENS + tl.arange(0, P.TOKENS)
    w_at = weight_rows(weights, tl.minimum(column, weights.columns - 1), P.HIDDEN_DIM)
    x_there = token < hidden.count
    x_at = hidden.rows + tl.minimum(token, hidden.count - 1).to(tl.int64) * hidden.stride
    LAST: tl.constexpr = CHUNKS // P.PARTS  # chunks of a part
    ahead = 0
    if P.AHEAD > 0:
        d = (part + 1) * (LAST * P.CHUNK) - P.AHEAD + tl.arange(0, P.AHEAD)
        ahead = tl.load(w_at[:, None] + d[None, :])
    wait_for_inputs(HOW.PDL)
    there = (column < weights.columns)[:, None] & (token < hidden.count)[None, :]
    if P.PARTS == 1:
        total = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
        for pair in range(PAIRS):
            half = chunk_of(w_at, x_at, x_there, 2 * pair, HOW, P, P.CHUNK)
            total += added(chunk_of(w_at, x_at, x_there, 2 * pair + 1, HOW, P, P.CHUNK), half)
        store_sums(sums, column, token, total, there, HOW)
    else:
        if P.PARTS == CHUNKS:
            total = last_chunk_of(w_at, x_at, x_there, part, ahead, HOW, P)
        else:
            half = chunk_of(w_at, x_at, x_there, 2 * part, HOW, P, P.CHUNK)
            total = added(last_chunk_of(w_at, x_at, x_there, 2 * part + 1, ahead, HOW, P), half)
        at = parts.rows + column[:, None] + token.to(tl.int64)[None, :] * parts.stride
        tl.store(at + part.to(tl.int64) * parts.step, total, mask=there)
        if sums.rows is not None:
            tl.debug_barrier()  # all threads' parts are written before one of them counts this program
            if tl.atomic_add(parts.done + tile, 1, sem="acq_rel") == P.PARTS - 1:
                tl.store(parts.done + tile, 0)  # as the next call finds it
                for i in range(0, P.TOKENS, SUMMED):
                    some = tile_token * P.TOKENS + i + tl.arange(0, SUMMED)
                    add_parts(parts, sums, column, some, weights.columns, hidden.count, HOW, P)


@triton.jit
def add_kernel(
    parts_rows, parts_stride, parts_step, parts_done, count, columns, sums_rows, sums_stride,
    HOW: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """kv_score from the parts of a product: a program for SIZE columns of a row."""
    let_go_early(HOW)
    across = tl.cdiv(columns, SIZE)
    pid = tl.program_id(0)
    column = pid % across * SIZE + tl.arange(0, SIZE)
    row = (pid // across).to(tl.int64)
    there = column < columns
    wait_for_inputs(HOW.PDL)
    x = sum_parts(parts_rows + row * parts_stride + column, parts_step, there, HOW.PARTS)
    x = rounded_to(x, sums_rows.dtype.element_ty, HOW.ROUNDED, HOW.TARGET.BF16_CONVERSION)
    tl.store(sums_rows + row * sums_stride + column, x, mask=there)


@triton.jit
def add_parts(parts, sums, column, token, columns, count, HOW: tl.constexpr, P: tl.constexpr):
    there = (column < columns)[:, None] & (token < count)[None, :]
    at = parts.rows + column[:, None] + token.to(tl.int64)[None, :] * parts.stride
    store_sums(sums, column, token, sum_parts(at, parts.step, there, P.PARTS), there, HOW)


@triton.jit
def store_sums(sums, column, token, x, there, HOW: tl.constexpr):
    x = rounded_to(x, sums.rows.dtype.element_ty, HOW.ROUNDED, HOW.TARGET.BF16_CONVERSION)
    tl.store(sums.rows + column[:, None] + token.to(tl.int64)[None, :] * sums.stride, x, mask=there)
