"""`store_record` alone in a kernel: one row of fp32 per program, so that tests choose what reaches the quantizer."""

import triton
import triton.language as tl

from kvfold.backend_triton.kernels.record import store_record


@triton.jit(do_not_specialize=["rows_per_page"])  # as kvfold builds kernels: a page of one row is a number like any other
def write_records(
    entries, slots, pages, page_stride, scales, scales_stride, rows_per_page, cache_scale,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    FLOOR: tl.constexpr, FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr,
    PAD: tl.constexpr, ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr,
    ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    y = tl.load(entries + i.to(tl.int64) * HEAD_DIM + tl.arange(0, HEAD_DIM))
    store_record(
        y, tl.load(slots + i), pages, page_stride, scales, scales_stride, rows_per_page, cache_scale,
        HEAD_DIM, ROPE_DIM, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16,
        PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES,
    )  # fmt: skip
