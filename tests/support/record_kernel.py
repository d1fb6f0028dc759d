"""`store_record` alone in a kernel: one row of fp32 per program, so that tests choose what reaches the quantizer."""

from typing import Any

import triton
import triton.language as tl

from kvfold.backend_triton.args import Output, Target
from kvfold.backend_triton.build import INTERPRETED, wrapped
from kvfold.backend_triton.kernels.record import load_scale, store_record
from kvfold.backend_triton.variants import format_of, spec_of
from kvfold.storage.cache import EntryCache


@triton.jit(do_not_specialize=["rows_per_page"])  # as kvfold builds kernels: a page of one row is a number like any other
def write_records(
    entries, slots, pages, page_stride, scales, scales_stride, rows_per_page, cache_scale,
    SPEC: tl.constexpr, FMT: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    cache = Output(
        None, None, None, None, None, pages, page_stride, scales, scales_stride, rows_per_page, None, cache_scale
    )  # fmt: skip
    i = tl.program_id(0)
    y = tl.load(entries + i.to(tl.int64) * SPEC.HEAD_DIM + tl.arange(0, SPEC.HEAD_DIM))
    store_record(y, tl.load(slots + i), load_scale(cache), cache, SPEC, FMT, TARGET)


def constants_of(cache: EntryCache) -> dict[str, Any]:
    """Of a GPU without instructions for bf16 and e4m3, so that all is rounded by hand."""
    found = {"SPEC": spec_of(cache.spec), "FMT": format_of(cache.format, cache.spec), "TARGET": Target()}
    return found if INTERPRETED else {name: wrapped(value) for name, value in found.items()}
