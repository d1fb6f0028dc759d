"""What an attention kernel reads from records: the inverse of `store_record`, in the operations of `storage.pack`."""

import triton
import triton.language as tl

from ...backend_triton.args import Output
from ...backend_triton.kernels.pdl import wait_for_inputs
from ...backend_triton.kernels.record import bf16_value, e2m1_value, e4m3_number, load_scale, tail_address
from ..args import Pieces
from .tokens import load_piece, put


@triton.jit
def load_factors(record, page, number, row, c, inside, scale, cache, FMT: tl.constexpr):
    """The factor of each of the channels `c`, where they are `inside` the quantized ones."""
    tail = tail_address(record, page, number, row, cache, FMT)
    group = c // FMT.GROUP
    if FMT.SCALE == "fp32" or FMT.SCALE == "pow2":
        factor = tl.load(tail.to(tl.pointer_type(tl.float32)) + group, mask=inside, other=0.0, cache_modifier=".cg")
    else:
        WIDTH: tl.constexpr = 4 if FMT.SCALE == "ue8m0x4" else 1
        code = tl.load(tail + group * WIDTH, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)
        if FMT.SCALE == "e4m3":
            factor = e4m3_number(code)
        else:
            factor = (code << 23).to(tl.float32, bitcast=True)
    if scale is not None:
        factor = tl.div_rn(factor, scale)
    return factor


@triton.jit
def load_record(slot, cache, SPEC: tl.constexpr, FMT: tl.constexpr):
    """The numbers of record `slot`, fp32 `[HEAD_DIM]`."""
    c = tl.arange(0, SPEC.HEAD_DIM)
    number = slot // cache.rows_per_page
    row = slot - number * cache.rows_per_page
    page = cache.pages + number * cache.page_stride
    record = page + row * FMT.ROW_BYTES
    if FMT.ELEMENT == "fp32":
        y = tl.load(record.to(tl.pointer_type(tl.float32)) + c, cache_modifier=".cg")
    elif FMT.ELEMENT == "bf16":
        y = bf16_value(tl.load(record.to(tl.pointer_type(tl.int16)) + c, cache_modifier=".cg"))
    else:
        QUANTIZED: tl.constexpr = SPEC.HEAD_DIM - (SPEC.ROPE_DIM if FMT.ROTATED_BF16 else 0)
        inside = c < QUANTIZED
        if FMT.ELEMENT == "e4m3":
            y = e4m3_number(tl.load(record + c, mask=inside, other=0, cache_modifier=".cg").to(tl.int32))
        else:
            pair = tl.load(record + c // 2, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)
            y = e2m1_value((pair >> (c % 2 * 4)) & 15)
        scale = load_scale(cache)
        if FMT.SCALE == "static":
            y = y * scale
        else:
            y = y * load_factors(record, page, number, row, c, inside, scale, cache, FMT)
        if FMT.ROTATED_BF16:
            rotated = (record + FMT.ROTATED_AT).to(tl.pointer_type(tl.int16)) + (c - QUANTIZED)
            y = tl.where(inside, y, bf16_value(tl.load(rotated, mask=c >= QUANTIZED, other=0, cache_modifier=".cg")))
    return y


@triton.jit
def train_read_kernel(
    pieces_rows, pieces_count, pieces_capacity,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    entries, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Reads entry n from record n, which the launch before wrote; zeros where there is no entry."""
    wait_for_inputs(HOW.PDL)
    n = tl.program_id(0)
    piece = load_piece(Pieces(pieces_rows, pieces_count, pieces_capacity), n)
    cache = Output(
        output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
        output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    slot = n.to(tl.int64)
    y = tl.zeros((SPEC.HEAD_DIM,), tl.float32)
    if piece.window >= 0:
        y = load_record(slot, cache, SPEC, FMT)
    put(entries + slot * SPEC.HEAD_DIM + tl.arange(0, SPEC.HEAD_DIM), y, None, HOW.TARGET.BF16_CONVERSION)
