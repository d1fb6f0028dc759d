"""Pieces of a packing, and tokens of whole windows: how they are read, and how their gradients are written."""

import triton
import triton.language as tl

from ...backend_triton.kernels.fold import minus_zero, spread
from ...backend_triton.kernels.prefetch import prefetch_lines, prefetch_pieces
from ...backend_triton.kernels.record import bf16_bits
from ...backend_triton.kernels.tokens import gap, whole_row
from ..args import Group, Piece


@triton.jit
def load_piece(pieces, n):
    """Loads piece n past the L1 cache, like all that earlier launches may have written: see `pdl.load_plan`."""
    at = pieces.rows + n * 4
    return Piece(
        tl.load(at, cache_modifier=".cg"), tl.load(at + 1, cache_modifier=".cg"), tl.load(at + 2, cache_modifier=".cg")
    )  # fmt: skip


@triton.jit
def load_next_piece(pieces, n):
    """Piece n; after the last one, a piece of no tokens."""
    token, window, rest = load_piece(pieces, tl.minimum(n, pieces.count - 1))
    there = n < pieces.count
    return Piece(token, tl.where(there, window, -1), tl.where(there, rest, 0))


@triton.jit
def load_group(parts, pieces, group):
    if parts.runs is None:
        first = group * parts.each
        last = tl.minimum(first + parts.each, pieces.capacity)
        behind = group + pieces.capacity
        at = group
    else:
        run = parts.runs + group * 4
        first = tl.load(run, cache_modifier=".cg")
        last = tl.load(run + 1, cache_modifier=".cg")
        behind = group + parts.each
        at = tl.load(run + 2, cache_modifier=".cg")
    return Group(first, tl.maximum(last - first, 0), behind, at)


@triton.jit
def count_pieces(taken, pieces, parts):
    """How many pieces a group has, those of no window included."""
    return taken.own + (tl.maximum(pieces.count - taken.behind, 0) + parts.groups - 1) // parts.groups


@triton.jit
def nth_piece(i, taken, parts):
    """The number of piece i of a group."""
    return tl.where(i < taken.own, taken.first + i, taken.behind + (i - taken.own) * parts.groups)


@triton.jit
def begin_sum(at, parts, mask):
    """What a sum starts from: zeros, or what an earlier launch left. mask: that of a tile; None for all."""
    if parts.runs is None:
        sums = tl.zeros(at.shape, tl.float32)
    elif mask is None:
        sums = tl.load(at, cache_modifier=".cg")
    else:
        sums = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    return sums


@triton.jit
def put(at, x, mask, BF16_CONVERSION: tl.constexpr, STREAM: tl.constexpr = False):
    """Stores fp32, rounded to nearest even if `at` points at bf16; a NaN may become any NaN. STREAM: first to leave L2."""
    CACHE: tl.constexpr = ".cs" if STREAM else ""
    if at.dtype.element_ty == tl.bfloat16 and BF16_CONVERSION:
        tl.store(at, x.to(tl.bfloat16), mask=mask, cache_modifier=CACHE)
    elif at.dtype.element_ty == tl.bfloat16:
        tl.store(at.to(tl.pointer_type(tl.int16)), bf16_bits(x, False), mask=mask, cache_modifier=CACHE)
    else:
        tl.store(at, x, mask=mask, cache_modifier=CACHE)


@triton.jit
def put_zeros(gradients, first, count, SPEC: tl.constexpr):
    """Stores zeros as the gradients of `count` tokens from `first` on, at most a window of them."""
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    WIDTH: tl.constexpr = CHANNELS if SPEC.KIND == "" else 2 * CHANNELS
    # Not `range(0, count)`: Triton 3.6 takes the bound of an inner loop for what it was before the loop around it (note 0070).
    for i in range(0, SPEC.RATIO):
        row = first + i
        at = gradients.kv_score + row.to(tl.int64) * gradients.stride + tl.arange(0, WIDTH)
        if SPEC.KIND != "":
            at = whole_row(at, gradients, row, CHANNELS)
        if i < count:
            tl.store(at, tl.zeros((WIDTH,), gradients.kv_score.dtype.element_ty))


@triton.jit
def load_pairs(tokens, piece, SPEC: tl.constexpr):
    """Values and scores of all rows of a window, unconverted; -0 and -inf where the window before is missing."""
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    BEFORE: tl.constexpr = SPEC.RATIO * SPEC.OVERLAP
    x = piece.token - BEFORE
    at = tokens.kv_score + x.to(tl.int64) * tokens.stride + tl.arange(0, SPEC.HEAD_DIM)
    there = spread(piece.window >= SPEC.OVERLAP, SPEC.HEAD_DIM)
    ks = ()
    ss = ()
    for j in tl.static_range(SPEC.RATIO + BEFORE):
        half = 0 if j < BEFORE else SPEC.OVERLAP * SPEC.HEAD_DIM
        score_at = at + half + gap(tokens, x + j, CHANNELS)
        if j < BEFORE:
            ks = ks + (tl.load(at + half, mask=there, other=minus_zero(), cache_modifier=".cg"),)
            ss = ss + (tl.load(score_at, mask=there, other=float("-inf"), cache_modifier=".cg"),)
        else:
            ks = ks + (tl.load(at + half, cache_modifier=".cg"),)
            ss = ss + (tl.load(score_at, cache_modifier=".cg"),)
        at += tokens.stride
    return ks, ss


@triton.jit
def fetch_pairs(tokens, piece, BULK: tl.constexpr, SPEC: tl.constexpr):
    """Fetches into the L2 cache what `load_pairs` loads: half rows of 1 KB or more, if `BULK`, as pieces (note 0070)."""
    BYTES: tl.constexpr = tokens.kv_score.dtype.element_ty.primitive_bitwidth // 8
    PIECES: tl.constexpr = BULK and SPEC.HEAD_DIM * BYTES >= 1024
    LINES: tl.constexpr = 1 if PIECES else (SPEC.HEAD_DIM * BYTES + 127) // 128
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    BEFORE: tl.constexpr = SPEC.RATIO * SPEC.OVERLAP
    ROWS: tl.constexpr = SPEC.RATIO + BEFORE
    ALL: tl.constexpr = LINES * (2 if ROWS == 1 else 4 if ROWS <= 2 else 8 if ROWS <= 4 else 16)  # ranges are powers of two
    e = tl.arange(0, 128 if PIECES else ALL)  # pieces: no fewer than threads, or several of them would fetch the same one
    j = e // (2 * LINES)
    x = piece.token - BEFORE + j
    at = x.to(tl.int64) * tokens.stride + tl.where(j < BEFORE, 0, SPEC.OVERLAP * SPEC.HEAD_DIM)
    at += tl.where(e // LINES % 2 == 0, 0, gap(tokens, x, CHANNELS))
    wanted = (piece.window >= tl.where(j < BEFORE, SPEC.OVERLAP, 0)) & (j < ROWS)
    at = tokens.kv_score.to(tl.int64, bitcast=True) + at * BYTES + e % LINES * 128
    if PIECES:
        prefetch_pieces(at, wanted, SPEC.HEAD_DIM * BYTES)
    else:
        prefetch_lines(at, wanted)
