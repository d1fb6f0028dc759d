"""What a `RecordFormat` may say, and the dtypes of its pages. What is accepted here is stored right by both backends."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from ..arguments.checks import check_int, check_type
from ..spec import CompressorSpec

if TYPE_CHECKING:
    from .formats import RecordFormat

ELEMENT_BITS = {"bf16": 16, "fp32": 32, "e4m3": 8, "e2m1": 4}
ELEMENT_MAX = {"e4m3": 448.0, "e2m1": 6.0}  # the encodings that are scaled
SCALE_BYTES = {"ue8m0": 1, "e4m3": 1, "pow2": 4, "fp32": 4}

# Fields that need scales in the record, and those that need these or one scale for the whole cache.
_OF_SCALES = ("group", "floor", "floor_on", "pad", "pad_written", "separate", "divide")
_OF_CODES = ("scale", "rotated_bf16", "round_values", "ties_to_zero", *_OF_SCALES)
_SWITCHES = ("rotated_bf16", "pad_written", "separate", "round_rows", "round_values", "ties_to_zero", "divide")
_SMALLEST = 2.0**-126  # normal fp32
_LARGEST_FLOOR = 2.0**100


def check_format(fmt: RecordFormat) -> None:
    """Raises TypeError or ValueError, naming the field, unless every store of a record of `fmt` is defined."""
    _check_types(fmt)
    if fmt.element not in ELEMENT_MAX:
        _check_left_out(fmt, _OF_CODES, f"where element is {fmt.element!r}, which is stored as it is")
    elif fmt.scale == "none":
        raise ValueError(f"scale must be one of {['static', *SCALE_BYTES]} where element is {fmt.element!r}, got 'none'")
    elif fmt.scale == "static":
        _check_left_out(fmt, _OF_SCALES, "where scale is 'static', which is not in the record")
    else:
        _check_scales(fmt)
    if fmt.ties_to_zero and fmt.element != "e2m1":
        raise ValueError(f"ties_to_zero must be False where element is {fmt.element!r}, got True")
    if fmt.page_align != 1 and fmt.page_align % fmt.alignment:
        raise ValueError(f"page_align must be 1 or a multiple of {fmt.alignment}, got {fmt.page_align}")
    for head_dim in fmt.head_dims:
        if fmt.group and head_dim % fmt.group:
            raise ValueError(f"head_dims must be multiples of group={fmt.group}, got {fmt.head_dims}")
        try:
            if fmt.rope_dim is not None:  # otherwise what else there is to say waits for a spec
                fmt.check(CompressorSpec(head_dim, 1, rope_dim=fmt.rope_dim))
        except ValueError as error:
            raise ValueError(f"head_dims must go with the other fields, got {fmt.head_dims}: {error}") from None


def _check_types(fmt: RecordFormat) -> None:
    """Each field by itself."""
    for name in ("name", "source"):
        check_type(name, getattr(fmt, name), str)
    if not fmt.name:
        raise ValueError("name must not be empty, got ''")
    known = {"element": ELEMENT_BITS, "scale": ("none", "static", *SCALE_BYTES), "floor_on": ("amax", "scale")}
    for name, accepted in known.items():
        check_type(name, getattr(fmt, name), str)
        if getattr(fmt, name) not in accepted:
            raise ValueError(f"{name} must be one of {list(accepted)}, got {getattr(fmt, name)!r}")
    for name in _SWITCHES:
        check_type(name, getattr(fmt, name), bool)
    check_int("group", fmt.group, 0, 4096)
    check_int("pad", fmt.pad, 0, 4096)
    check_int("page_align", fmt.page_align, 1, 1 << 30)
    if isinstance(fmt.floor, bool) or not isinstance(fmt.floor, (int, float)):
        raise TypeError(f"floor must be a float, got {type(fmt.floor).__name__}")
    if not 0 <= fmt.floor < math.inf:
        raise ValueError(f"floor must be finite and not negative, got {fmt.floor}")
    check_type("head_dims", fmt.head_dims, tuple)
    for head_dim in fmt.head_dims:
        check_int("head_dims", head_dim, 16, 4096)
        if head_dim & (head_dim - 1):
            raise ValueError(f"head_dims must be powers of two, got {fmt.head_dims}")
    if fmt.rope_dim is not None:
        check_int("rope_dim", fmt.rope_dim, 0, 4096)
        if fmt.rope_dim % 2:
            raise ValueError(f"rope_dim must be even, got {fmt.rope_dim}")


def _check_left_out(fmt: RecordFormat, names: tuple[str, ...], where: str) -> None:
    """Fields that mean nothing there must be as they are by default."""
    for field in fields(fmt):
        value = getattr(fmt, field.name)
        if field.name in names and value != field.default:
            raise ValueError(f"{field.name} must be {field.default!r} {where}, got {value!r}")


def _check_scales(fmt: RecordFormat) -> None:
    """Scales in the tail: group, floor, division and pad."""
    if fmt.group < 1 or fmt.group & (fmt.group - 1):
        raise ValueError(f"group must be a power of two from 1 to 4096 where scale is {fmt.scale!r}, got {fmt.group}")
    on_scale = fmt.floor_on == "scale"
    # The smallest scale must be a number that it can be divided by.
    low, high = _SMALLEST * (1 if on_scale else ELEMENT_MAX[fmt.element]), _LARGEST_FLOOR
    if fmt.scale == "e4m3" and on_scale:
        low, high = 2.0**-9, 448.0
    without = not on_scale and fmt.scale in ("e4m3", "fp32")
    if not (low <= fmt.floor <= high or (without and fmt.floor == 0)):
        zero = "0, or " if without else ""
        where = f"where element is {fmt.element!r}, scale {fmt.scale!r} and floor_on {fmt.floor_on!r}"
        raise ValueError(f"floor must be {zero}from {low!r} to {high!r} {where}, got {fmt.floor!r}")
    divide = fmt.scale == "e4m3" and on_scale
    if fmt.divide != divide:  # group_scale gives an inverse for all but these
        where = "where scale is 'e4m3' and floor_on 'scale'" if divide else "unless scale is 'e4m3' and floor_on 'scale'"
        raise ValueError(f"divide must be {divide} {where}, got {fmt.divide}")
    if fmt.pad % fmt.scale_bytes:
        raise ValueError(f"pad must be a multiple of {fmt.scale_bytes} where scale is {fmt.scale!r}, got {fmt.pad}")
    if fmt.pad_written and fmt.pad & (fmt.pad - 1):  # a vector of a kernel
        raise ValueError(f"pad must be a power of two where pad_written is True, got {fmt.pad}")


def _dtypes(*names: str) -> tuple[torch.dtype, ...]:
    """Those that this torch has."""
    return tuple(getattr(torch, name) for name in names if hasattr(torch, name))


_INTEGERS = _dtypes("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
_FLOATS = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "pow2": "float32",
    "e4m3": "float8_e4m3fn",
    "e2m1": "float4_e2m1fn_x2",
    "ue8m0": "float8_e8m0fnu",
}


def check_page_dtype(name: str, pages: torch.Tensor, encoding: str) -> None:
    """Raises TypeError unless `pages` are integers, which hold any bytes, or floats of this encoding of elements or scales."""
    if pages.dtype not in (*_INTEGERS, *_dtypes(_FLOATS[encoding])):
        raise TypeError(
            f"{name} must be of an integer dtype, as torch.uint8, or of torch.{_FLOATS[encoding]}, since it holds {encoding}, "
            f"got {pages.dtype}"
        )
