"""Entries of packed sequences: a program for each, which folds its window as `compress` does and finishes it likewise.

Where windows are few and long, several programs share the channels of one. An entry needs all channels, so a second launch
makes it from the pooled row, which is kept for the backward anyway.
"""

import triton
import triton.language as tl

from ...backend_triton.args import Opened, Output, Sequence, Tokens
from ...backend_triton.kernels.finish import emit, load_finish, store_row
from ...backend_triton.kernels.fold import empty_fold, empty_group, quotient, widen
from ...backend_triton.kernels.long_fold import fold_stretches
from ...backend_triton.kernels.pdl import wait_for_inputs
from ...backend_triton.kernels.record import load_scale, store_record
from ...backend_triton.kernels.rows import fold_part, load_live, load_window
from ...backend_triton.kernels.tokens import apart_from
from ..args import Kept, Pieces
from .tokens import load_piece


@triton.jit
def fold_window(tokens, piece, c0, HOW: tl.constexpr, SPEC: tl.constexpr):
    """The fold of channels `[c0, c0 + SLICE)` of a window, token by token."""
    none = piece.token * 0
    live = tokens.kv_score + piece.token.to(tl.int64) * tokens.stride + c0 + tl.arange(0, HOW.SLICE)
    ape = None if tokens.ape is None else tokens.ape + c0
    own = Tokens(tokens.kv_score, tokens.stride, tokens.count, ape, tokens.apart, tokens.skew)
    mine = Opened(live, apart_from(tokens, piece.token), none, none, none, none, none, none, none, none, none)
    m, l, a = empty_fold(HOW.SLICE)
    ms, ls, as_, _behind = fold_stretches(
        (m,), (l,), (a,), (mine,), none, none + SPEC.RATIO // HOW.AHEAD, 0, own, HOW, SPEC
    )  # fmt: skip
    return ms[0], ls[0], as_[0]


@triton.jit
def fold_rows(tokens, piece, HOW: tl.constexpr, SPEC: tl.constexpr):
    """The fold of a window of input rows, a group at a time."""
    ROWS: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP)
    AHEAD: tl.constexpr = HOW.AHEAD
    KEPT: tl.constexpr = tokens.kv_score.dtype.element_ty
    none = piece.token * 0
    first = piece.token - piece.window * SPEC.RATIO
    live = tokens.kv_score + first.to(tl.int64) * tokens.stride
    own = Tokens(tokens.kv_score, tokens.stride, tokens.count, tokens.ape, apart_from(tokens, first), tokens.skew)
    seq = Sequence(tokens.kv_score, tokens.kv_score, none, none, none, none)  # of which only the dtype is looked at
    m, l, a = empty_group(SPEC.HEAD_DIM)
    if ROWS == AHEAD:
        if piece.window >= SPEC.OVERLAP:
            ks, ss = load_live(live, own, piece.window, 0, ROWS, KEPT, SPEC, HOW.TARGET.INLINE_PTX)
            m, l, a = fold_part(m, l, a, ks, ss, tokens.ape, None, 0, True, SPEC, AHEAD)
        else:
            wide_ks, wide_ss = load_window(
                live, own, seq, piece.window, None, None, 0, "live", SPEC, AHEAD, HOW.TARGET.BF16_CONVERSION
            )  # fmt: skip
            m, l, a = fold_part(m, l, a, wide_ks, wide_ss, tokens.ape, None, 0, True, SPEC, AHEAD)
    else:
        for j0 in range(0, ROWS, AHEAD):
            ks, ss = load_window(live, own, seq, piece.window, None, None, j0, "live", SPEC, AHEAD, HOW.TARGET.BF16_CONVERSION)
            m, l, a = fold_part(m, l, a, ks, ss, tokens.ape, None, j0, False, SPEC, AHEAD)
    return m, l, a


@triton.jit
def keep(kept, slot, c0, m, inverse, y, HOW: tl.constexpr, SPEC: tl.constexpr):
    at = kept.rows + slot * SPEC.HEAD_DIM + c0 + tl.arange(0, HOW.SLICE)
    tl.store(at, m)
    tl.store(at + kept.plane, inverse)
    tl.store(at + 2 * kept.plane, y)


@triton.jit
def deliver(y, piece, n, output, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Makes entry n from pooled row `y`. Entry n is row n, or record n: plain rows are records of one page."""
    weight, cos, sin = load_finish(piece.window * SPEC.RATIO, output, SPEC)
    emit(y, n, n.to(tl.int64), weight, cos, sin, output, SPEC, FMT, HOW.TARGET)


@triton.jit
def deliver_zeros(n, output, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    nothing = tl.zeros((SPEC.HEAD_DIM,), tl.float32)
    store_record(nothing, n.to(tl.int64), load_scale(output), output, SPEC, FMT, HOW.TARGET)
    if output.latent is not None:
        store_row(output.latent, nothing, n, None, SPEC.HEAD_DIM, HOW.TARGET, 1)


@triton.jit
def train_forward_kernel(
    pieces_rows, pieces_count, pieces_capacity,
    tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    kept_rows, kept_plane,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Folds SLICE channels of a window and keeps them; if these are all channels, also makes the entry."""
    wait_for_inputs(HOW.PDL)
    SLICES: tl.constexpr = SPEC.HEAD_DIM // HOW.SLICE
    n = tl.program_id(0) // SLICES
    c0 = tl.program_id(0) % SLICES * HOW.SLICE
    piece = load_piece(Pieces(pieces_rows, pieces_count, pieces_capacity), n)
    tokens = Tokens(tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew)
    output = Output(
        output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
        output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    kept = Kept(kept_rows, kept_plane)
    slot = n.to(tl.int64)
    if piece.window >= 0:
        if SPEC.KIND == "":
            row = tokens.kv_score + piece.token.to(tl.int64) * tokens.stride
            y = widen(tl.load(row + tl.arange(0, SPEC.HEAD_DIM), cache_modifier=".cg"))
        else:
            if SPEC.KIND == "fold":
                m, l, a = fold_window(tokens, piece, c0, HOW, SPEC)
            else:
                m, l, a = fold_rows(tokens, piece, HOW, SPEC)
            y = quotient(a, l, HOW.TARGET.FAST_DIVISION)
            if kept.rows is not None:
                keep(kept, slot, c0, m, tl.div_rn(1.0, l), y, HOW, SPEC)
        if SLICES == 1:
            deliver(y, piece, n, output, HOW, SPEC, FMT)
    else:
        if kept.rows is not None:
            nothing = tl.zeros((HOW.SLICE,), tl.float32)
            keep(kept, slot, c0, nothing, nothing, nothing, HOW, SPEC)
        if SLICES == 1:
            deliver_zeros(n, output, HOW, SPEC, FMT)


@triton.jit
def train_entries_kernel(
    pieces_rows, pieces_count, pieces_capacity,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    kept_rows, kept_plane,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Makes entries from pooled rows that the launch before kept."""
    wait_for_inputs(HOW.PDL)
    n = tl.program_id(0)
    piece = load_piece(Pieces(pieces_rows, pieces_count, pieces_capacity), n)
    output = Output(
        output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
        output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    if piece.window >= 0:
        at = kept_rows + 2 * kept_plane + n.to(tl.int64) * SPEC.HEAD_DIM + tl.arange(0, SPEC.HEAD_DIM)
        deliver(tl.load(at, cache_modifier=".cg"), piece, n, output, HOW, SPEC, FMT)
    else:
        deliver_zeros(n, output, HOW, SPEC, FMT)
