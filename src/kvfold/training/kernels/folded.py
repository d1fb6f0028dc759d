"""Windows that lie on several GPUs: continues the fold of the tokens on the left with those here, and makes entries of it.

There is a program for each window. Tokens are folded one after the other, as `compress` folds them.
"""

import triton
import triton.language as tl

from ...backend_triton.args import Output, Tokens
from ...backend_triton.kernels.fold import empty_fold, fold_step, quotient
from ...backend_triton.kernels.long_fold import load_stretch
from ...backend_triton.kernels.pdl import wait_for_inputs
from ...backend_triton.kernels.tokens import gap
from ..args import Kept, Pieces
from .forward import deliver, keep
from .tokens import load_piece


@triton.jit
def load_fold(folds, row, SPEC: tl.constexpr):
    at = folds + row.to(tl.int64) * (3 * SPEC.HEAD_DIM) + tl.arange(0, SPEC.HEAD_DIM)
    m = tl.load(at, cache_modifier=".cg")
    l = tl.load(at + SPEC.HEAD_DIM, cache_modifier=".cg")
    a = tl.load(at + 2 * SPEC.HEAD_DIM, cache_modifier=".cg")
    return m, l, a


@triton.jit
def fold_on(m, l, a, tokens, token, begin, end, AHEAD: tl.constexpr, SPEC: tl.constexpr):
    """Folds the tokens of a window from place `begin` to before `end`, the first of which is row `token`."""
    for j0 in range(begin, end, AHEAD):
        j = begin * 0 + j0  # a tensor also where the interpreter has an int
        row = token + j - begin
        at = tokens.kv_score + row.to(tl.int64) * tokens.stride + tl.arange(0, SPEC.HEAD_DIM)
        ape = None if tokens.ape is None else tokens.ape + j * SPEC.HEAD_DIM
        biases, ks, ss = load_stretch(
            at, gap(tokens, row, 0), tokens, ape, end - j, AHEAD, SPEC.HEAD_DIM, SPEC.HEAD_DIM
        )  # fmt: skip
        for i in tl.static_range(AHEAD):
            m, l, a = fold_step(m, l, a, ks[i].to(tl.float32), ss[i].to(tl.float32) + biases[i])
    return m, l, a


@triton.jit
def train_tail_kernel(
    tails, tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew, folds, out,
    HOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Writes row n of `out`: the fold of tail n, which continues a row of `folds` or starts anew (`problem.TAIL_FIELDS`)."""
    wait_for_inputs(HOW.PDL)
    n = tl.program_id(0)
    token = tl.load(tails + n * 4, cache_modifier=".cg")
    before = tl.load(tails + n * 4 + 1, cache_modifier=".cg")
    begin = tl.load(tails + n * 4 + 2, cache_modifier=".cg")
    end = tl.load(tails + n * 4 + 3, cache_modifier=".cg")
    tokens = Tokens(tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew)
    m, l, a = empty_fold(SPEC.HEAD_DIM)
    if before >= 0:
        m, l, a = load_fold(folds, before, SPEC)
    m, l, a = fold_on(m, l, a, tokens, token, begin, end, HOW.AHEAD, SPEC)
    at = out + n.to(tl.int64) * (3 * SPEC.HEAD_DIM) + tl.arange(0, SPEC.HEAD_DIM)
    tl.store(at, m)
    tl.store(at + SPEC.HEAD_DIM, l)
    tl.store(at + 2 * SPEC.HEAD_DIM, a)


@triton.jit
def train_folded_kernel(
    pieces_rows, pieces_count, pieces_capacity,
    tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew,
    folds,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    kept_rows, kept_plane,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Makes entry n, which continues fold row n of `[n, 3, HEAD_DIM]`. All pieces are windows, with the place of their first
    token.
    """
    wait_for_inputs(HOW.PDL)
    n = tl.program_id(0)
    piece = load_piece(Pieces(pieces_rows, pieces_count, pieces_capacity), n)
    begin = tl.load(pieces_rows + n * 4 + 3, cache_modifier=".cg")
    tokens = Tokens(tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew)
    output = Output(
        output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
        output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    slot = n.to(tl.int64)
    m, l, a = load_fold(folds, n, SPEC)
    m, l, a = fold_on(m, l, a, tokens, piece.token, begin, begin * 0 + SPEC.RATIO, HOW.AHEAD, SPEC)
    y = quotient(a, l, HOW.TARGET.FAST_DIVISION)
    keep(Kept(kept_rows, kept_plane), slot, 0, m, tl.div_rn(1.0, l), y, HOW, SPEC)
    deliver(y, piece, n, output, HOW, SPEC, FMT)
