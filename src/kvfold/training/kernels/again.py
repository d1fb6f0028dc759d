"""The backward of short windows: a program folds each of its windows again and has all that it needs in registers.

No atomics: who adds up the gradients of ape and norm_weight is a group of windows, and `sums.py` adds the groups.
"""

import triton
import triton.language as tl

from ...backend_triton.args import Output, Tokens
from ...backend_triton.kernels.fold import LOG2_E, empty_group, quotient, spread, widen
from ...backend_triton.kernels.pdl import wait_for_inputs
from ...backend_triton.kernels.rows import fold_part, load_biases
from ...backend_triton.kernels.tokens import gap
from ..args import Incoming, Parts, Pieces
from .gradient import load_incoming, pull_back
from .tokens import begin_sum, count_pieces, load_group, load_pairs, load_piece, nth_piece, put, put_zeros


@triton.jit
def opaque(x, INLINE_PTX: tl.constexpr):
    """The same bf16 numbers, new to the compiler: else it holds what it made of them before, in twice the registers."""
    if INLINE_PTX and x.dtype == tl.bfloat16:
        moved = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x.to(tl.int16, bitcast=True)], dtype=tl.int16, is_pure=False, pack=2
        )  # fmt: skip
        x = moved.to(tl.bfloat16, bitcast=True)
    return x


@triton.jit
def spread_window(ks, ss, ape, held, m, y, dy, sums, piece, gradients, SPEC: tl.constexpr, TARGET: tl.constexpr):
    """Writes the gradients of a window's tokens; returns `sums` with those of its scores, row by row.

    held: ape of all rows; None: each row's is read when it is its turn, as all of them would fill a quarter of the registers.
    dy: of the pooled row, divided by the sum of weights.
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
        k = widen(opaque(ks[j], TARGET.INLINE_PTX))
        s = widen(opaque(ss[j], TARGET.INLINE_PTX))
        if held is None:
            s += load_biases(ape, j, None, SPEC, 1)[0]
        else:
            s += held[j]
        dk = tl.exp2((s - m) * LOG2_E) * dy
        ds = dk * (k - y)
        put(to + half, dk, mask, TARGET.BF16_CONVERSION)
        put(to + half + gap(gradients, x + j, CHANNELS), ds, mask, TARGET.BF16_CONVERSION)
        added = added + (sums[j] + ds,)
        to += gradients.stride
    return added


@triton.jit
def put_no_lo(piece, gradients, SPEC: tl.constexpr):
    """Zeros for the lo half of a window's tokens, which no window behind it takes."""
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
    HOLD: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """A group takes windows that follow each other, then tokens of no window, whose gradients are zeros."""
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
    held = None
    if HOLD:
        held = load_biases(tokens.ape, 0, None, SPEC, ROWS)
    for i in range(0, count_pieces(taken, pieces, parts)):
        number = nth_piece(i, taken, parts)
        piece = load_piece(pieces, number)
        if piece.window >= 0:
            g, g_latent = load_incoming(incoming, number, SPEC)
            if SPEC.KIND == "":
                y = widen(tl.load(tokens.kv_score + piece.token.to(tl.int64) * tokens.stride + c, cache_modifier=".cg"))
                dy, share = pull_back(g, g_latent, y, piece.window, output, SPEC, FMT, HOW.TARGET)
                to = gradients.kv_score + piece.token.to(tl.int64) * gradients.stride + c
                put(to, dy, None, HOW.TARGET.BF16_CONVERSION)
            else:
                ks, ss = load_pairs(tokens, piece, SPEC)
                m, l, a = empty_group(SPEC.HEAD_DIM)
                m, l, a = fold_part(m, l, a, ks, ss, tokens.ape, held, 0, True, SPEC, ROWS)
                y = quotient(a, l, HOW.TARGET.FAST_DIVISION)
                dy, share = pull_back(g, g_latent, y, piece.window, output, SPEC, FMT, HOW.TARGET)
                dy = quotient(dy, l, HOW.TARGET.FAST_DIVISION)
                sums = spread_window(ks, ss, tokens.ape, held, m, y, dy, sums, piece, gradients, SPEC, HOW.TARGET)
                if SPEC.OVERLAP and piece.rest != 0:
                    put_no_lo(piece, gradients, SPEC)
            shares += share
        else:
            put_zeros(gradients, piece.token, piece.rest, SPEC)
    if parts.ape is not None:
        for j in tl.static_range(ROWS):
            half = 0 if j < SPEC.RATIO * SPEC.OVERLAP else SPEC.OVERLAP * SPEC.HEAD_DIM
            tl.store(of_ape + (j % SPEC.RATIO) * CHANNELS + half, sums[j])
    tl.store(of_weight, shares)
