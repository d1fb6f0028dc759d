"""Prefetches to the L2 cache, while the launch before still runs.

Before its wait a dependent launch may read nothing that a kernel in flight may write. But a prefetch reads nothing. All
multiprocessors share the L2 cache, so a load finds what was written after the prefetch too. Only what the launch will load is
fetched, so every address is inside the tensors given.
"""

import triton
import triton.language as tl

from .places import hi_home, hi_row, home_before, lo_places, lo_row
from .tokens import gap


@triton.jit
def prefetch_lines(at, wanted):
    """Fetches the lines of 128 bytes that hold the addresses `at`, int64, where they are `wanted`."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r", [at, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_pieces(at, wanted, SIZE: tl.constexpr):
    """Fetches SIZE bytes, a multiple of 16, from each of the addresses `at`, int64, that is `wanted`.

    Uses the engine for bulk copies, which leaves the load units free: better for many rows, but a single line arrives later
    than by `prefetch_lines` (docs/notes/0026).
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b64 a; and.b64 a, $1, -16; setp.ne.b32 p, $2, 0;"
        " @p cp.async.bulk.prefetch.L2.global [a], $3; mov.b32 $0, 0; }",
        "=r,l,r,r", [at, wanted.to(tl.int32), tl.full(at.shape, SIZE, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_fold(live, tokens, seq, last, begin, stop, resumes, HOW: tl.constexpr, SPEC: tl.constexpr):
    """Fetches what a short step over fold rows loads: the row at home `last`, tags, and positions `[begin, stop)`, AHEAD at
    most.
    """
    LINES: tl.constexpr = (SPEC.HEAD_DIM * 4 + 127) // 128
    STEP: tl.constexpr = 128 if SPEC.HEAD_DIM >= 32 else SPEC.HEAD_DIM * 4
    e = tl.arange(0, 4 * LINES)
    row = (seq.rows + last * (3 * SPEC.HEAD_DIM)).to(tl.int64, bitcast=True)
    prefetch_lines(row + e * STEP, (e < 3 * LINES) & resumes)
    first = seq.tags.to(tl.int64, bitcast=True)
    e = tl.arange(0, 2)
    prefetch_lines(first + e * (seq.ring * 4), e >= 0)
    prefetch_tokens(live, tokens, begin, stop, HOW.AHEAD, SPEC.HEAD_DIM)


@triton.jit
def prefetch_tokens(live, tokens, begin, stop, AHEAD: tl.constexpr, CHANNELS: tl.constexpr):
    """Fetches rows of kv_score at positions `[begin, stop)`, AHEAD at most; `live` points at position 0."""
    BYTES: tl.constexpr = live.dtype.element_ty.primitive_bitwidth // 8
    # Values and scores in one piece, or in two.
    PARTS: tl.constexpr = 1 if tokens.skew is None else 2
    LINES: tl.constexpr = (2 // PARTS * CHANNELS * BYTES + 127) // 128
    e = tl.arange(0, AHEAD * PARTS * LINES)
    x = begin + e // (PARTS * LINES)
    at = live.to(tl.int64, bitcast=True) + x.to(tl.int64) * (tokens.stride * BYTES) + (e % LINES) * 128
    if PARTS == 2:
        at += tl.where(e // LINES % 2 == 0, 0, gap(tokens, x, CHANNELS) * BYTES)
    prefetch_lines(at, x < stop)


@triton.jit
def prefetch_rows(live, tokens, seq, window, begin, stop, home, ends, SPEC: tl.constexpr):
    """Fetches what a short step over input rows loads: the new rows of a window, and if it `ends` the old ones, from their
    homes.

    home: that of the window.
    """
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    BYTES: tl.constexpr = seq.rows.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = (SPEC.HEAD_DIM * BYTES + 127) // 128
    # A short step has windows of up to 8 rows; ranges are powers of two.
    NEW: tl.constexpr = SPEC.RATIO if SPEC.RATIO <= 2 else 4 if SPEC.RATIO <= 4 else 8
    e = tl.arange(0, NEW * (1 + SPEC.OVERLAP) * 2 * LINES)
    j = e // (2 * LINES)
    x = (window - SPEC.OVERLAP) * SPEC.RATIO + j
    # The window before gives its lo rows. Values lie before scores.
    lo = lo_row(home_before(seq, home), SPEC)
    hi = hi_row(seq, hi_home(seq, home), SPEC) - SPEC.RATIO * SPEC.OVERLAP
    part = (tl.where(j < SPEC.RATIO * SPEC.OVERLAP, lo, hi) + j) * 2 + (e // LINES) % 2
    at = seq.rows.to(tl.int64, bitcast=True) + part.to(tl.int64) * (SPEC.HEAD_DIM * BYTES) + (e % LINES) * 128
    prefetch_lines(at, ends & (x >= 0) & (x < seq.start) & (j < SPEC.RATIO * (1 + SPEC.OVERLAP)))
    first = seq.tags.to(tl.int64, bitcast=True)
    e = tl.arange(0, 2)  # all tags of a state for 4 drafts, and half of one for 12
    prefetch_lines(first + e * 128, e * 32 < lo_places(seq, SPEC) + 2 * seq.ring)
    prefetch_tokens(live, tokens, begin, stop, NEW, CHANNELS)


@triton.jit
def prefetch_window(
    pool, page_size, item, c0, before, this, SPEC: tl.constexpr, SLICE: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Fetches channels `[c0, c0 + SLICE)` of the old rows of a window on page `this`, and on page `before` for the window
    before.

    PIECES: each row as one piece.
    """
    BYTES: tl.constexpr = pool.rows.dtype.element_ty.primitive_bitwidth // 8
    SIZE: tl.constexpr = SLICE * BYTES if PIECES else 128
    PARTS: tl.constexpr = (SLICE * BYTES + SIZE - 1) // SIZE
    ALL: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP) * PARTS
    e = tl.arange(0, ALL if ALL > 128 else 128)  # no fewer than threads, or several of them would fetch the same one
    j = e // PARTS
    x = (item.window - SPEC.OVERLAP) * SPEC.RATIO + j
    first = j < SPEC.RATIO * SPEC.OVERLAP
    row = (tl.maximum(x, 0) % page_size).to(tl.int64)
    c = c0 + tl.where(first, 0, SPEC.OVERLAP * SPEC.HEAD_DIM)
    at = pool.rows.to(tl.int64, bitcast=True)
    at += (tl.where(first, before, this) * pool.page_stride + row * pool.row_stride + c) * BYTES
    at += (e % PARTS) * SIZE
    wanted = (x >= 0) & (x < item.start) & (e < ALL)
    if PIECES:
        prefetch_pieces(at, wanted, SIZE)
    else:
        prefetch_lines(at, wanted)


@triton.jit
def prefetch_item(item, there, c0, tokens, SPEC: tl.constexpr, SLICE: tl.constexpr):
    """Fetches the first 128 new tokens of a work item: channels `[c0, c0 + SLICE)` without overlap, or whole rows."""
    window, start, end, token, _, _, _ = item
    BYTES: tl.constexpr = tokens.kv_score.dtype.element_ty.primitive_bitwidth // 8
    # Values and scores, or both at once.
    PARTS: tl.constexpr = 2 if (SLICE < SPEC.HEAD_DIM) or (tokens.skew is not None) else 1
    SIZE: tl.constexpr = SLICE * BYTES if SLICE < SPEC.HEAD_DIM else 2 // PARTS * SPEC.HEAD_DIM * (1 + SPEC.OVERLAP) * BYTES
    begin = tl.maximum(start, window * SPEC.RATIO)
    e = tl.arange(0, 128 * PARTS)  # as in `prefetch_window`
    x = begin + e // PARTS
    row = token + x - start
    at = row.to(tl.int64) * tokens.stride + c0 + e % PARTS * gap(tokens, row, SPEC.HEAD_DIM)
    wanted = there & (x < end) & (x < window * SPEC.RATIO + SPEC.RATIO) & (token + end - start <= tokens.count)
    prefetch_pieces(tokens.kv_score.to(tl.int64, bitcast=True) + at * BYTES, wanted, SIZE)
