"""The backward of long windows, whose fold the forward kept: gradients of pooled rows, then of tokens, element by element."""

import triton
import triton.language as tl

from ...backend_triton.args import Output, Tokens
from ...backend_triton.kernels.finish import load_finish
from ...backend_triton.kernels.fold import LOG2_E, widen
from ...backend_triton.kernels.pdl import wait_for_inputs
from ...backend_triton.kernels.prefetch import prefetch_lines
from ...backend_triton.kernels.tokens import gap, gaps
from ..args import Incoming, Kept, Parts, Pieces
from .gradient import load_incoming, pull_back
from .tokens import begin_sum, count_pieces, load_group, load_next_piece, load_piece, nth_piece, put


@triton.jit
def train_finish_kernel(
    pieces_rows, pieces_count, pieces_capacity,
    output_norm_weight, output_rope, output_max_position,
    kept_rows, kept_plane,
    incoming_entries, incoming_latent, incoming_pooled,
    parts_ape, parts_weight, parts_groups, parts_each, parts_runs,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Each group takes consecutive entries. Writes gradients of pooled rows, divided by the sums of weights."""
    wait_for_inputs(HOW.PDL)
    group = tl.program_id(0)
    pieces = Pieces(pieces_rows, pieces_count, pieces_capacity)
    # As if there were a cache: `load_finish` then reads cosines and sines.
    output = Output(
        None, None, output_norm_weight, output_rope, output_max_position, pieces_rows, 0, None, 0, 1, 0, None
    )  # fmt: skip
    kept = Kept(kept_rows, kept_plane)
    incoming = Incoming(incoming_entries, incoming_latent, incoming_pooled)
    parts = Parts(parts_ape, parts_weight, parts_groups, parts_each, parts_runs)
    c = tl.arange(0, SPEC.HEAD_DIM)
    taken = load_group(parts, pieces, group)
    of_weight = parts.weight + taken.at.to(tl.int64) * SPEC.HEAD_DIM + c
    shares = begin_sum(of_weight, parts, None)
    for i in range(0, taken.own):
        number = taken.first + i
        piece = load_piece(pieces, number)
        if piece.window >= 0:
            at = number.to(tl.int64) * SPEC.HEAD_DIM + c
            inverse = tl.load(kept.rows + at + kept.plane, cache_modifier=".cg")
            y = tl.load(kept.rows + at + 2 * kept.plane, cache_modifier=".cg")
            g, g_latent = load_incoming(incoming, number, SPEC)
            finish = load_finish(piece.window * SPEC.RATIO, output, SPEC)
            dy, share = pull_back(g, g_latent, y, finish, SPEC, FMT, HOW.TARGET)
            shares += share
            tl.store(incoming.pooled + at, dy * inverse)
    tl.store(of_weight, shares)


@triton.jit
def put_tile(gradients, token, j, rows, c, dk, ds, SPEC: tl.constexpr, TARGET: tl.constexpr):
    """Stores gradients of tokens `token + j`, `[rows, channels]`, where `rows` says so; None: all of them."""
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    to = gradients.kv_score + (token + j)[:, None].to(tl.int64) * gradients.stride + c[None, :]
    mask = None if rows is None else tl.broadcast_to(rows[:, None], dk.shape)
    put(to, dk, mask, TARGET.BF16_CONVERSION)
    put(to + gaps(gradients, token + j, CHANNELS), ds, mask, TARGET.BF16_CONVERSION)


@triton.jit
def fetch_tile(tokens, piece, lo, j0, c0, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPEC: tl.constexpr):
    """Fetches into the L2 cache what a program reads of a window: ROWS rows from `j0` on, COLUMNS channels from `c0` on."""
    BYTES: tl.constexpr = tokens.kv_score.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = (COLUMNS * BYTES + 127) // 128
    ALL: tl.constexpr = ROWS * 2 * LINES
    e = tl.arange(0, ALL if ALL > 128 else 128)  # no fewer than threads, or several of them would fetch the same one
    j = j0 + e // (2 * LINES)
    x = piece.token - lo * SPEC.RATIO + j
    at = x.to(tl.int64) * tokens.stride + c0
    at += tl.where(e // LINES % 2 == 0, 0, gap(tokens, x, SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)))
    wanted = (piece.window >= lo) & (j < SPEC.RATIO) & (e < ALL)
    prefetch_lines(tokens.kv_score.to(tl.int64, bitcast=True) + at * BYTES + e % LINES * 128, wanted)


@triton.jit
def train_spread_kernel(
    pieces_rows, pieces_count, pieces_capacity,
    tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew,
    kept_rows, kept_plane,
    incoming_entries, incoming_latent, incoming_pooled,
    gradients_kv_score, gradients_stride, gradients_count, gradients_ape, gradients_apart, gradients_skew,
    parts_ape, parts_weight, parts_groups, parts_each, parts_runs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FETCH: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of each window of a group, COLUMNS channels of each token; and tokens of no window.

    With overlap the first half of a window's rows are the lo halves of the tokens of the window before.
    """
    pieces = Pieces(pieces_rows, pieces_count, pieces_capacity)
    tokens = Tokens(tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew)
    kept = Kept(kept_rows, kept_plane)
    incoming = Incoming(incoming_entries, incoming_latent, incoming_pooled)
    gradients = Tokens(
        gradients_kv_score, gradients_stride, gradients_count, gradients_ape, gradients_apart, gradients_skew
    )  # fmt: skip
    parts = Parts(parts_ape, parts_weight, parts_groups, parts_each, parts_runs)
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    SLICES: tl.constexpr = SPEC.HEAD_DIM // COLUMNS
    BLOCKS: tl.constexpr = (SPEC.RATIO + ROWS - 1) // ROWS
    TILES: tl.constexpr = SLICES * BLOCKS * (1 + SPEC.OVERLAP)
    WHOLE: tl.constexpr = BLOCKS * ROWS == SPEC.RATIO
    tile = tl.program_id(0) % TILES
    group = tl.program_id(0) // TILES
    c0 = tile % SLICES * COLUMNS
    block = tile // SLICES
    lo = (block < BLOCKS * SPEC.OVERLAP).to(tl.int32)  # whether these are rows of the window before
    half = (1 - lo) * (SPEC.OVERLAP * SPEC.HEAD_DIM)
    j0 = block % BLOCKS * ROWS
    # The launch before, which made gradients of pooled rows, has waited itself before this one could begin: all else is there.
    # With runs there may be none of that launch.
    if parts.runs is not None:
        wait_for_inputs(HOW.PDL)
    taken = load_group(parts, pieces, group)
    piece = load_next_piece(pieces, nth_piece(0, taken, parts))
    if FETCH and HOW.TARGET.INLINE_PTX:
        fetch_tile(tokens, piece, lo, j0, half + c0, ROWS, COLUMNS, SPEC)
    c = c0 + tl.arange(0, COLUMNS)
    j = j0 + tl.arange(0, ROWS)
    inside = j < SPEC.RATIO
    at_half = c + half
    zeros = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias = zeros
    where = None if WHOLE else tl.broadcast_to(inside[:, None], (ROWS, COLUMNS))
    filled = None if WHOLE else inside
    if tokens.ape is not None:
        bias = tl.load(tokens.ape + j[:, None] * CHANNELS + at_half[None, :], mask=where, other=None if WHOLE else 0.0)
    sums = zeros
    if parts.ape is not None:
        of_ape = parts.ape + taken.at.to(tl.int64) * (SPEC.RATIO * CHANNELS) + j[:, None] * CHANNELS + at_half[None, :]
        sums = begin_sum(of_ape, parts, where)
    if parts.runs is None:
        wait_for_inputs(HOW.PDL)
    for i in range(0, count_pieces(taken, pieces, parts)):
        number = nth_piece(i, taken, parts)
        behind = load_next_piece(pieces, nth_piece(i + 1, taken, parts))
        if piece.window >= lo:
            token = piece.token - lo * SPEC.RATIO
            row = number.to(tl.int64) * SPEC.HEAD_DIM + c
            m = tl.load(kept.rows + row, cache_modifier=".cg")
            y = tl.load(kept.rows + row + 2 * kept.plane, cache_modifier=".cg")
            dy = tl.load(incoming.pooled + row, cache_modifier=".cg")
            at = tokens.kv_score + (token + j)[:, None].to(tl.int64) * tokens.stride + at_half[None, :]
            score_at = at + gaps(tokens, token + j, CHANNELS)
            if WHOLE:
                k = tl.load(at, cache_modifier=".cg")
                s = tl.load(score_at, cache_modifier=".cg")
            else:
                k = tl.load(at, mask=where, other=0.0, cache_modifier=".cg")
                s = tl.load(score_at, mask=where, other=float("-inf"), cache_modifier=".cg")
            if FETCH and HOW.TARGET.INLINE_PTX:
                fetch_tile(tokens, behind, lo, j0, half + c0, ROWS, COLUMNS, SPEC)
            dk = tl.exp2((widen(s) + bias - m[None, :]) * LOG2_E) * dy[None, :]
            ds = dk * (widen(k) - y[None, :])
            sums += ds if WHOLE else tl.where(where, ds, 0.0)
            put_tile(gradients, token, j, filled, at_half, dk, ds, SPEC, HOW.TARGET)
        # The lo halves of a last window, which no window behind it takes; and tokens of no window.
        if SPEC.OVERLAP and (lo == 1) & (piece.window >= 0) & (piece.rest != 0):
            put_tile(gradients, piece.token, j, filled, at_half, zeros, zeros, SPEC, HOW.TARGET)
        if piece.window < 0:
            put_tile(gradients, piece.token, j, j < piece.rest, at_half, zeros, zeros, SPEC, HOW.TARGET)
        piece = behind
    if parts.ape is not None:
        tl.store(of_ape, sums, mask=where)
