"""`compressor_postprocess_scatter` as one launch: who a row is of, where its record goes, and the record itself.

What follows the search for the place of a row is `store`'s: the functions of `backend_triton/kernels/finish.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...backend_triton import args
from ...backend_triton.args import LOOSE, STRIDE, Output, Schedule, flat, types_of
from ...backend_triton.build import KERNELS, Variant
from ...backend_triton.kernels.finish import emit, load_finish
from ...backend_triton.kernels.pdl import wait_for_inputs
from ...backend_triton.launcher import Launcher, address, pack, supports_pdl
from ...backend_triton.table import choose
from ...backend_triton.variants import POINTERS, VARIANTS, format_of, spec_of
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.formats import RecordFormat


class Rows(NamedTuple):
    """Where the rows go, as the operator is told: tensors of int32, but for the mask.

    mask: of each row, uint8. positions: for RoPE. count, offsets, first: of each sequence, how many rows, where they begin, and
    the number of the first one's entry. table: `[batch, width]`, blocks of the cache, `pitch` numbers apart.
    """

    mask: object
    positions: object
    count: object
    offsets: object
    first: object
    table: object
    pitch: object
    width: object
    batch: object
    errors: object


_INTS = LOOSE + "*i32"
_TYPES = Rows(LOOSE + "*u8", *(_INTS,) * 5, pitch="i64", width="i32", batch="i32", errors=_INTS)
AT_ONCE = 256  # sequences whose offsets are looked at together


@triton.jit
def postprocess_kernel(
    rows_mask, rows_positions, rows_count, rows_offsets, rows_first, rows_table, rows_pitch, rows_width, rows_batch,
    rows_errors,
    pooled, pooled_stride,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    also_rows, also_latent, also_norm_weight, also_rope, also_max_position, also_pages, also_page_stride, also_scales,
    also_scales_stride, also_rows_per_page, also_num_slots, also_scale,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr, ALSO: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A program for each row: its record to its slot, and to the same row of the other output if there is one."""
    output = Output(
        output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
        output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    also = Output(
        also_rows, also_latent, also_norm_weight, also_rope, also_max_position, also_pages, also_page_stride, also_scales,
        also_scales_stride, also_rows_per_page, also_num_slots, also_scale,
    )  # fmt: skip
    wait_for_inputs(HOW.PDL)  # all that it reads may be of the launch before
    row = tl.program_id(0)
    wanted = tl.load(rows_mask + row) != 0
    position = row
    if SPEC.ROPE_DIM > 0:
        position = tl.load(rows_positions + row)
    y = tl.load(pooled + row.to(tl.int64) * pooled_stride + tl.arange(0, SPEC.HEAD_DIM)).to(tl.float32)
    # Offsets do not decrease, so that the row is of the sequence behind all that end before it.
    sequence = row * 0
    for begin in range(0, rows_batch, AT_ONCE):
        b = begin + tl.arange(0, AT_ONCE)
        end = tl.load(rows_offsets + 1 + b, mask=b < rows_batch, other=2147483647)
        sequence += tl.sum((end <= row).to(tl.int32), axis=0)
    known = wanted & (sequence < rows_batch)
    index = row - tl.load(rows_offsets + sequence, mask=known, other=0)
    known = known & (index >= 0) & (index < tl.load(rows_count + sequence, mask=known, other=0))
    if known:
        fine = True
        if SPEC.ROPE_DIM > 0:
            fine = (position >= 0) & (position < output.max_position)
        number = index + tl.load(rows_first + sequence)
        column = number // output.rows_per_page
        inside = (number >= 0) & (column < rows_width)
        page = tl.load(rows_table + sequence * rows_pitch + column, mask=inside, other=-2).to(tl.int64)
        slot = page * output.rows_per_page + (number - column * output.rows_per_page)
        if fine:
            weight, cos, sin = load_finish(position, output, SPEC)
            if also.pages is not None:
                emit(y, row, row.to(tl.int64), weight, cos, sin, also, SPEC, ALSO, HOW.TARGET)
            if (page >= 0) & (slot < output.num_slots):
                emit(y, row, slot, weight, cos, sin, output, SPEC, FMT, HOW.TARGET)
        # A page of -1 drops the record, as everywhere; what else is wrong is counted.
        if (fine == 0) | (page < -1) | (slot >= output.num_slots):
            tl.atomic_add(rows_errors, 1)


class PostprocessKey(NamedTuple):
    """What the kernel depends on. also: the format of the other output. rows, norm_weight: dtypes."""

    spec: CompressorSpec
    fmt: RecordFormat
    also: RecordFormat | None
    rows: torch.dtype
    norm_weight: torch.dtype


def postprocess_variant(key: PostprocessKey) -> Variant:
    spec, config = key.spec, choose("store", key.spec, 1)
    outputs = [_types(spec, fmt, key.norm_weight) for fmt in (key.fmt, key.also)]
    return Variant(
        "trtllm_postprocess",
        tuple(flat((_TYPES, POINTERS[key.rows], STRIDE, *outputs))),
        (
            ("HOW", Schedule()),
            ("SPEC", spec_of(spec)),
            ("FMT", format_of(key.fmt, spec)),
            ("ALSO", format_of(key.also, spec)),
            ("AT_ONCE", AT_ONCE),
        ),
        config.num_warps,
        config.registers,
    )


def _types(spec: CompressorSpec, fmt: RecordFormat | None, norm_weight: torch.dtype) -> tuple:
    if fmt is None:
        return (None,) * len(Output._fields)
    absent = ["rows", "latent"] + ["scales"] * (not fmt.separate) + ["rope"] * (not spec.rope_dim)
    absent += ["scale"] * (not fmt.takes_scale)
    return types_of(Output, norm_weight=POINTERS[norm_weight])._replace(**dict.fromkeys(absent))


KERNELS["trtllm_postprocess"] = postprocess_kernel
VARIANTS[PostprocessKey] = postprocess_variant


def launch(
    launcher: Launcher,
    rows: Rows,
    pooled: torch.Tensor,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    cache: EntryCache,
    also: tuple[torch.Tensor, torch.Tensor | None] | None,
) -> None:
    """One launch on the current stream. also: the other output, bytes `[n, ...]`, and its scales if they are apart."""
    finishing = {"norm_weight": norm_weight, "rope": rope, "max_position": 0 if rope is None else rope.shape[0]}
    pages, scales = cache.pages, cache.scale_pages
    output = args.Output(
        pages=pages,
        page_stride=pages.stride(0),
        scales=scales,
        scales_stride=0 if scales is None else scales.stride(0),
        rows_per_page=cache.rows_per_page,
        num_slots=cache.num_slots,
        scale=None if cache.scale_tensor is None else cache.scale_tensor.data_ptr(),
        **finishing,
    )
    other, strides = (None,) * len(Output._fields), pooled.stride(0) | output.page_stride | output.scales_stride
    if also is not None:
        values, tails = also
        other = args.Output(
            pages=values,
            page_stride=values.stride(0),
            scales=tails,
            scales_stride=0 if tails is None else tails.stride(0),
            num_slots=values.shape[0],
            **finishing,
        )
        strides |= other.page_stride | other.scales_stride
    told = Rows(*(address(x) if isinstance(x, torch.Tensor) else x for x in rows))
    values, bits = pack(*flat((told, pooled, pooled.stride(0), output, other)))
    launcher(pooled.shape[0], values, bits | strides, supports_pdl(pooled.device))
