"""The backward of short windows: a program folds each of its windows again, and has everything it needs in registers.

There are no atomics: each group of windows sums gradients of ape and norm_weight, and `sums.py` adds the groups.
"""

import triton
import triton.language as tl

from ...backend_triton.args import Output, Tokens
from ...backend_triton.kernels.finish import load_finish
from ...backend_triton.kernels.fold import LOG2_E, ROWS_AT_ONCE, empty_group, fold_group, quotient, spread, widen
from ...backend_triton.kernels.pdl import wait_for_inputs
from ...backend_triton.kernels.rows import load_biases
from ...backend_triton.kernels.tokens import gap
from ..args import Incoming, Parts, Pieces
from .gradient import load_incoming, pull_back
from .tokens import (
    begin_sum,
    count_pieces,
    fetch_pairs,
    load_group,
    load_next_piece,
    load_pairs,
    nth_piece,
    put,
    put_zeros,
)


@triton.jit
def widen_again(x, INLINE_PTX: tl.constexpr):
    """`widen` of numbers that were widened before, hidden from the compiler, which would else keep those, in twice the
    registers.
    """
    if INLINE_PTX and x.dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [x.to(tl.int16, bitcast=True)], dtype=tl.int32, is_pure=False, pack=2,
        )  # fmt: skip
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = widen(x)
    return x


@triton.jit
def fold_more(m, l, a, weights, ks, ss, ape, AT: tl.constexpr, N: tl.constexpr, SPEC: tl.constexpr):
    """Folds the group of N rows from AT on after those that are folded already, and appends its weights to theirs."""
    biases = load_biases(ape, AT, None, SPEC, N)
    group_ks = ()
    group_ss = ()
    for i in tl.static_range(N):
        group_ks = group_ks + (widen(ks[AT + i]),)
        group_ss = group_ss + (widen(ss[AT + i]) + biases[i],)
    top, l, a = fold_group(m, l, a, group_ks, group_ss, N, AT == 0)
    found = ()
    if AT > 0:
        alpha = tl.exp2((m - top) * LOG2_E)
        for i in tl.static_range(AT):
            found = found + (weights[i] * alpha,)
    for i in tl.static_range(N):
        found = found + (tl.exp2((group_ss[i] - top) * LOG2_E),)
    return top, l, a, found


@triton.jit
def fold_again(ks, ss, ape, SPEC: tl.constexpr, ROWS: tl.constexpr):
    """The sum of weights and the pooled sum of a window's ROWS rows, as the forward makes them, and the weight of each row.

    Weights stay in registers: to make them twice was a fifth of the kernel's instructions.
    """
    m, l, a = empty_group(SPEC.HEAD_DIM)
    weights = ()
    for g in tl.static_range(0, ROWS, ROWS_AT_ONCE):
        m, l, a, weights = fold_more(
            m, l, a, weights, ks, ss, ape, g, ROWS_AT_ONCE if g + ROWS_AT_ONCE <= ROWS else ROWS - g, SPEC
        )  # fmt: skip
    return l, a, weights


@triton.jit
def spread_window(ks, y, dy, weights, sums, piece, gradients, SPEC: tl.constexpr, TARGET: tl.constexpr):
    """Writes the gradients of a window's tokens; returns `sums` plus those of its scores, row by row.

    dy: the gradient of the pooled row, divided by the sum of weights.
    """
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    BEFORE: tl.constexpr = SPEC.RATIO * SPEC.OVERLAP
    x = piece.token - BEFORE
    to = gradients.kv_score + x.to(tl.int64) * gradients.stride + tl.arange(0, SPEC.HEAD_DIM)
    there = spread(piece.window >= SPEC.OVERLAP, SPEC.HEAD_DIM)
    added = ()
    for j in tl.static_range(SPEC.RATIO + BEFORE):
        half = 0 if j < BEFORE else SPEC.OVERLAP * SPEC.HEAD_DIM
        mask = there if j < BEFORE else None
        k = widen_again(ks[j], TARGET.INLINE_PTX)
        dk = weights[j] * dy
        ds = dk * (k - y)
        put(to + half, dk, mask, TARGET.BF16_CONVERSION, True)
        put(to + half + gap(gradients, x + j, CHANNELS), ds, mask, TARGET.BF16_CONVERSION, True)
        added = added + (sums[j] + ds,)
        to += gradients.stride
    return added


@triton.jit
def put_no_lo(piece, gradients, SPEC: tl.constexpr):
    """Stores zeros as the gradients of the lo half of a window's tokens, which no next window takes."""
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    zeros = tl.zeros((SPEC.HEAD_DIM,), gradients.kv_score.dtype.element_ty)
    for i in tl.static_range(SPEC.RATIO):
        row = piece.token + i
        to = gradients.kv_score + row.to(tl.int64) * gradients.stride + tl.arange(0, SPEC.HEAD_DIM)
        tl.store(to, zeros)
        tl.store(to + gap(gradients, row, CHANNELS), zeros)


@triton.jit
def train_again_kernel(
    pieces_rows, pieces_count, pieces_capacity,
    tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew,
    output_norm_weight, output_rope, output_max_position,
    incoming_entries, incoming_latent, incoming_pooled,
    gradients_kv_score, gradients_stride, gradients_count, gradients_ape, gradients_apart, gradients_skew,
    parts_ape, parts_weight, parts_groups, parts_each, parts_runs,
    FETCH: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Each group takes consecutive windows, then tokens of no window, whose gradients are zeros."""
    wait_for_inputs(HOW.PDL)
    group = tl.program_id(0)
    pieces = Pieces(pieces_rows, pieces_count, pieces_capacity)
    tokens = Tokens(tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew)
    gradients = Tokens(
        gradients_kv_score, gradients_stride, gradients_count, gradients_ape, gradients_apart, gradients_skew
    )  # fmt: skip
    # As if there were a cache: `load_finish` then reads cosines and sines.
    output = Output(
        None, None, output_norm_weight, output_rope, output_max_position, pieces_rows, 0, None, 0, 1, 0, None
    )  # fmt: skip
    incoming = Incoming(incoming_entries, incoming_latent, incoming_pooled)
    parts = Parts(parts_ape, parts_weight, parts_groups, parts_each, parts_runs)
    ROWS: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP)
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    c = tl.arange(0, SPEC.HEAD_DIM)
    taken = load_group(parts, pieces, group)
    of_weight = parts.weight + taken.at.to(tl.int64) * SPEC.HEAD_DIM + c
    shares = begin_sum(of_weight, parts, None)
    of_ape = of_weight
    if parts.ape is not None:
        of_ape = parts.ape + taken.at.to(tl.int64) * (SPEC.RATIO * CHANNELS) + c
    sums = ()
    for j in tl.static_range(ROWS):
        half = 0 if j < SPEC.RATIO * SPEC.OVERLAP else SPEC.OVERLAP * SPEC.HEAD_DIM
        if parts.ape is not None:
            sums = sums + (begin_sum(of_ape + (j % SPEC.RATIO) * CHANNELS + half, parts, None),)
        else:
            sums = sums + (tl.zeros((SPEC.HEAD_DIM,), tl.float32),)
    piece = load_next_piece(pieces, nth_piece(0, taken, parts))
    for i in range(0, count_pieces(taken, pieces, parts)):
        number = nth_piece(i, taken, parts)
        behind = load_next_piece(pieces, nth_piece(i + 1, taken, parts))
        if piece.window >= 0:
            g, g_latent = load_incoming(incoming, number, SPEC)
            finish = load_finish(piece.window * SPEC.RATIO, output, SPEC)  # early: it is needed when the window is folded
            if SPEC.KIND == "":
                y = widen(tl.load(tokens.kv_score + piece.token.to(tl.int64) * tokens.stride + c, cache_modifier=".cg"))
                dy, share = pull_back(g, g_latent, y, finish, SPEC, FMT, HOW.TARGET)
                to = gradients.kv_score + piece.token.to(tl.int64) * gradients.stride + c
                put(to, dy, None, HOW.TARGET.BF16_CONVERSION)
            else:
                ks, ss = load_pairs(tokens, piece, SPEC)
                if FETCH and HOW.TARGET.INLINE_PTX:
                    fetch_pairs(tokens, behind, HOW.PDL, SPEC)
                l, a, weights = fold_again(ks, ss, tokens.ape, SPEC, ROWS)
                y = quotient(a, l, HOW.TARGET.FAST_DIVISION)
                dy, share = pull_back(g, g_latent, y, finish, SPEC, FMT, HOW.TARGET)
                dy = quotient(dy, l, HOW.TARGET.FAST_DIVISION)
                sums = spread_window(ks, y, dy, weights, sums, piece, gradients, SPEC, HOW.TARGET)
                if SPEC.OVERLAP and piece.rest != 0:
                    put_no_lo(piece, gradients, SPEC)
            shares += share
        else:
            put_zeros(gradients, piece.token, piece.rest, SPEC)
        piece = behind
    if parts.ape is not None:
        for j in tl.static_range(ROWS):
            half = 0 if j < SPEC.RATIO * SPEC.OVERLAP else SPEC.OVERLAP * SPEC.HEAD_DIM
            tl.store(of_ape + (j % SPEC.RATIO) * CHANNELS + half, sums[j])
    tl.store(of_weight, shares)
