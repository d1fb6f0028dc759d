"""From hidden states to kv_score, with one order of sums for each number, whatever tokens it comes with.

hidden_dim is cut into 8 chunks. A chunk is summed by one chain of matrix instructions, from its first number on; then chunks
are added in pairs, and the pairs in order (contract.py). Columns are the rows of these instructions and tokens their columns,
so that the same instruction serves one token and many. The tile of a token does not change what is added to what.

Programs that share a tile write their parts of it to memory, and another launch adds them up: that uses the whole GPU, where
the last program of each tile would work alone (notes 0076, 0079).
"""

import triton
import triton.language as tl

from ... import contract
from ..args import Hidden, Sums, Weights
from .pdl import wait_for_inputs
from .record import bf16_bits, bf16_value
from .weights import BLOCK, scale_rows, scaled, weight_rows

CHUNKS = tl.constexpr(contract.CHUNKS_OF_HIDDEN)
PAIRS = tl.constexpr(contract.CHUNKS_OF_HIDDEN // 2)
STEP = tl.constexpr(contract.HIDDEN_STEP)


@triton.jit
def added(a, b):
    """a + b of two sums of products. With `+`, Triton may start the instructions of `a` from `b` instead of 0."""
    return tl.fma(a, tl.full(a.shape, 1.0, tl.float32), b)


@triton.jit
def tiles_at(w_at, s_at, x_at, there, k, DEPTH: tl.constexpr, HOW: tl.constexpr, P: tl.constexpr):
    """DEPTH numbers from `k` on of weights and of hidden states, a row for each column and each token that is `there`.

    Loads past the L1 cache, as the launch before may have made the weights (weights.py): see `pdl.load_plan`.
    """
    tl.static_assert(not P.SCALED or BLOCK % DEPTH == 0, "a tile has one scale for each column")
    d = k + tl.arange(0, DEPTH)
    if P.CHUNK * CHUNKS == P.HIDDEN_DIM:
        w = tl.load(w_at[:, None] + d[None, :], cache_modifier=".cg")
        x = tl.load(x_at[:, None] + d[None, :], mask=there[:, None], other=0.0, cache_modifier=".cg")
        if P.SCALED:
            w = scaled(w, tl.load(s_at + k // BLOCK)[:, None], HOW.TARGET)
    else:
        inside = (d < P.HIDDEN_DIM)[None, :]
        w = tl.load(w_at[:, None] + d[None, :], mask=inside, other=0, cache_modifier=".cg")
        x = tl.load(x_at[:, None] + d[None, :], mask=there[:, None] & inside, other=0.0, cache_modifier=".cg")
        if P.SCALED:
            w = scaled(w, tl.load(s_at + tl.minimum(k, P.HIDDEN_DIM - 1) // BLOCK)[:, None], HOW.TARGET)
            w = tl.where(inside, w, 0.0)  # a scale may be infinite
    return w, x


@triton.jit
def product(w_at, s_at, x_at, there, k, acc, DEPTH: tl.constexpr, HOW: tl.constexpr, P: tl.constexpr):
    """Adds DEPTH numbers of hidden states, from `k` on, times their weights to `acc`, `[COLUMNS, TOKENS]`."""
    if HOW.TARGET.BF16_PRODUCTS:
        w, x = tiles_at(w_at, s_at, x_at, there, k, DEPTH, HOW, P)
        acc = tl.dot(w, tl.trans(x), acc)
    else:
        # The interpreter's own product has another order of sums for every shape; this one has the same for every depth.
        for i in tl.static_range(0, DEPTH, STEP):
            w, x = tiles_at(w_at, s_at, x_at, there, k + i, STEP, HOW, P)
            # Its own cast gets subnormal numbers wrong.
            w, x = bf16_value(w.to(tl.int16, bitcast=True)), bf16_value(x.to(tl.int16, bitcast=True))
            acc += tl.sum(w[:, None, :] * x[None, :, :], axis=2)
    return acc


@triton.jit
def chunk_of(w_at, s_at, x_at, there, chunk, HOW: tl.constexpr, P: tl.constexpr):
    """The sums of a chunk of hidden_dim. A loop of its own, so that an instruction need not wait for the one before it."""
    TILES: tl.constexpr = P.CHUNK // P.DEPTH
    BYTES: tl.constexpr = (P.COLUMNS * (1 if P.SCALED else 2) + P.TOKENS * 2) * P.DEPTH
    ROOM: tl.constexpr = HOW.TARGET.SHARED_BYTES // BYTES  # for tiles under way
    STAGES: tl.constexpr = P.STAGES if P.STAGES < ROOM else ROOM
    acc = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
    for i in tl.range(0, TILES, num_stages=STAGES):
        acc = product(w_at, s_at, x_at, there, chunk * P.CHUNK + i * P.DEPTH, acc, P.DEPTH, HOW, P)
    return acc


@triton.jit
def pair_of(w_at, s_at, x_at, there, pair, HOW: tl.constexpr, P: tl.constexpr):
    """The sums of two chunks, by one loop: at the end of each loop matrix units wait for memory (note 0082)."""
    BYTES: tl.constexpr = 2 * (P.COLUMNS * (1 if P.SCALED else 2) + P.TOKENS * 2)  # of one number of each chunk
    ROOMY: tl.constexpr = 3 * BYTES * P.DEPTH <= HOW.TARGET.SHARED_BYTES or not HOW.TARGET.BF16_PRODUCTS
    DEPTH: tl.constexpr = P.DEPTH if ROOMY else P.DEPTH // 2  # so that tiles are under way while others are used
    ROOM: tl.constexpr = HOW.TARGET.SHARED_BYTES // (BYTES * DEPTH)
    STAGES: tl.constexpr = P.STAGES if P.STAGES < ROOM else ROOM
    first = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
    second = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
    for i in tl.range(0, P.CHUNK // DEPTH, num_stages=STAGES):
        k = 2 * pair * P.CHUNK + i * DEPTH
        first = product(w_at, s_at, x_at, there, k, first, DEPTH, HOW, P)
        second = product(w_at, s_at, x_at, there, k + P.CHUNK, second, DEPTH, HOW, P)
    return added(second, first)


@triton.jit
def place_of(tile, across, along, P: tl.constexpr):
    """The columns and tokens of a tile: GROUP rows of tiles at a time, so that tiles that run at once share more inputs."""
    group = tile // (P.GROUP * across)
    height = tl.minimum(along - group * P.GROUP, P.GROUP)
    within = tile % (P.GROUP * across)
    return within // height * P.COLUMNS, (group * P.GROUP + within % height) * P.TOKENS


@triton.jit
def project_kernel(
    hidden_rows, hidden_stride, hidden_count,
    weights_rows, weights_columns, weights_cut_1, weights_gap_1, weights_cut_2, weights_gap_2, weights_cut_3, weights_gap_3,
    weights_scales, weights_scales_1, weights_scales_2, weights_scales_3, sums_rows, sums_stride, sums_step,
    HOW: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """One program makes the sums of one tile over a part of hidden_dim, or over all of it."""
    hidden = Hidden(hidden_rows, hidden_stride, hidden_count)
    weights = Weights(
        weights_rows, weights_columns, weights_cut_1, weights_gap_1, weights_cut_2, weights_gap_2, weights_cut_3, weights_gap_3,
        weights_scales, weights_scales_1, weights_scales_2, weights_scales_3,
    )  # fmt: skip
    sums = Sums(sums_rows, sums_stride, sums_step)
    across = tl.cdiv(weights.columns, P.COLUMNS)
    along = tl.cdiv(hidden.count, P.TOKENS)
    tiles = across * along
    column, token = place_of(tl.program_id(0) % tiles, across, along, P)
    column += tl.arange(0, P.COLUMNS)
    token += tl.arange(0, P.TOKENS)
    # Beyond the last column that one is taken again, and not stored.
    read = tl.minimum(column, weights.columns - 1)
    w_at, s_at = weight_rows(weights, read, P.HIDDEN_DIM), None
    if P.SCALED:
        s_at = scale_rows(weights, read, P.HIDDEN_DIM)
    x_at = hidden.rows + token.to(tl.int64) * hidden.stride
    there = token < hidden.count
    wait_for_inputs(HOW.PDL)
    at = sums.rows + column[:, None] + token.to(tl.int64)[None, :] * sums.stride
    if P.PARTS == 1:
        total = tl.zeros((P.COLUMNS, P.TOKENS), tl.float32)
        for pair in range(PAIRS):
            total += pair_of(w_at, s_at, x_at, there, pair, HOW, P)
        x = rounded_to(total, sums.rows.dtype.element_ty, HOW)
    else:
        part = tl.program_id(0) // tiles
        if P.PARTS == CHUNKS:
            x = chunk_of(w_at, s_at, x_at, there, part, HOW, P)
        else:
            x = pair_of(w_at, s_at, x_at, there, part, HOW, P)
        at += part.to(tl.int64) * sums.step
    tl.store(at, x, mask=(column < weights.columns)[:, None] & there[None, :])


@triton.jit
def add_kernel(
    parts_rows, parts_stride, parts_step, columns, kv_score_rows, kv_score_stride, kv_score_step,
    HOW: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """kv_score from its parts, a chunk or a pair of chunks each: a program for SIZE columns of a token."""
    across = tl.cdiv(columns, SIZE)
    column = tl.program_id(0) % across * SIZE + tl.arange(0, SIZE)
    token = (tl.program_id(0) // across).to(tl.int64)
    there = column < columns
    wait_for_inputs(HOW.PDL)
    at = parts_rows + token * parts_stride + column
    found = ()
    for i in tl.static_range(PARTS):
        # Past the L1 cache, which may hold what stood there before this launch began.
        found = found + (tl.load(at + i * parts_step, mask=there, other=0.0, cache_modifier=".cg"),)
    EACH: tl.constexpr = PARTS // PAIRS
    total = tl.zeros((SIZE,), tl.float32)  # as who sums all of hidden_dim begins: no sum is -0
    for i in tl.static_range(PAIRS):
        total += found[2 * i] + found[2 * i + 1] if EACH == 2 else found[i]
    x = rounded_to(total, kv_score_rows.dtype.element_ty, HOW)
    tl.store(kv_score_rows + token * kv_score_stride + column, x, mask=there)


@triton.jit
def rounded_to(x, KIND: tl.constexpr, HOW: tl.constexpr):
    """fp32 as it is stored in dtype KIND; first rounded to the nearest bf16 if HOW says so."""
    if tl.bfloat16 == KIND:
        x = bf16_bits(x, HOW.TARGET.BF16_CONVERSION).to(tl.bfloat16, bitcast=True)
    elif HOW.ROUNDED:
        x = bf16_value(bf16_bits(x, HOW.TARGET.BF16_CONVERSION))
    return x
