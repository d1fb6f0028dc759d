"""Record formats: the bytes that one entry becomes in a page of the cache, and which fields of a format go together."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from ..arguments.checks import check_int, check_type
from ..spec import CompressorSpec

ELEMENT_BITS = {"bf16": 16, "fp32": 32, "e4m3": 8, "e2m1": 4}
ELEMENT_MAX = {"e4m3": 448.0, "e2m1": 6.0}  # the encodings that are scaled
SCALE_BYTES = {"ue8m0": 1, "ue8m0x4": 4, "e4m3": 1, "pow2": 4, "fp32": 4}
POWERS_OF_TWO = ("ue8m0", "ue8m0x4", "pow2")
FP4_GROUPS = {"": 1, "nvfp4": 16, "mxfp4": 32}  # of `fp4_first`

# Fields that need scales in the record, and those that need these or one scale for the whole cache.
_OF_SCALES = (
    "group", "floor", "floor_on", "pad", "pad_written", "separate", "interleaved", "nearest_scale", "zero_small", "divide",
)  # fmt: skip
_OF_CODES = ("scale", "rotated_bf16", "round_values", "fp4_first", "ties_to_zero", "unsigned_zero", *_OF_SCALES)
_SWITCHES = (
    "rotated_bf16", "pad_written", "separate", "interleaved", "round_rows", "round_normed", "round_values", "ties_to_zero",
    "unsigned_zero", "nearest_scale", "zero_small", "divide",
)  # fmt: skip


@dataclass(frozen=True)
class RecordFormat:
    """One record layout, to the byte: the value that drives every writer, reader and test.

    A page of N rows has N records and then, or in a second buffer, N tails. A record is the quantized channels, then the
    rotated channels if they stay bf16. A tail is the scales of its record, then pad bytes. An interleaved record has its tail
    between the two, and then nothing follows the records of a page. Make a format of your own like those of `FORMATS`, or from
    one of them by `dataclasses.replace`.

    Attributes:
        name: the public name.
        source: whose bytes these are.
        element: encoding of the quantized (or only) channels: `"bf16"`, `"fp32"`, `"e4m3"` or `"e2m1"` (two to a byte, the even
            channel in the low nibble). With bf16 and fp32 only `page_align`, `round_rows`, `round_normed`, `head_dims` and
            `rope_dim` may be set.
        group: channels that share a scale, a power of two; 0 if the record has no scales.
        scale: `"none"`, `"static"` (one number per cache), or in the tail as `"ue8m0"` (power of two, exponent + 127),
            `"ue8m0x4"` (four equal ue8m0 bytes), `"pow2"` (power of two as fp32), `"fp32"` or `"e4m3"`.
        floor, floor_on: the least value of the group's largest magnitude (`"amax"`) or of the scale itself (`"scale"`). 0 means
            no floor, which only scales of fp32, and of e4m3 floored on amax, may have.
        rotated_bf16: whether the last `rope_dim` channels stay bf16.
        pad: bytes after the scales of a tail. pad_written: whether the writer zeroes them (then a power of two of them) or
            leaves them alone.
        page_align: the page is rounded up to a multiple of this many bytes, itself 1 or a multiple of `alignment`.
        separate: whether tails are in a buffer of their own, `EntryCache.scales`.
        interleaved: whether a tail is in its record, after the values and before the rotated channels.
        round_rows, round_normed, round_values: what is rounded to bf16: pooled rows before the norm; normed rows before the
            rotation; values before they are quantized.
        fp4_first: a rounding of all channels, rotated ones too, before they are quantized: `""` for none, `"nvfp4"` for e2m1 in
            groups of 16 with e4m3 scales of at least 2**-9, `"mxfp4"` for e2m1 in groups of 32 with power-of-two scales. Ties
            to even; -0 becomes 0, and a small negative value -0. Needs `round_values`.
        ties_to_zero: e2m1 ties go toward zero and -0 becomes 0. Otherwise ties go to even and -0 is kept.
        unsigned_zero: in e2m1, -0 and values that round to it become 0; ties go to even.
        nearest_scale: for e2m1, take the power of two whose logarithm is nearest to that of amax / 6, and saturate what exceeds
            it. Otherwise take the least power of two that holds amax.
        zero_small: a group whose e4m3 scale rounds to 0 becomes zeros with their signs, and there is no `EntryCache.scale`.
            Otherwise the group saturates.
        divide: whether values are divided by the scale; exactly for e4m3 scales that are floored themselves. Otherwise they are
            multiplied by its inverse, which differs in the last bit unless the scale is a power of two.
        head_dims, rope_dim: what the layout is defined for; empty and None for any.

    Raises:
        TypeError, ValueError: naming the field, if fields do not go together. Every format that exists can be stored and read.
    """

    name: str
    source: str
    element: str
    group: int = 0
    scale: str = "none"
    floor: float = 0.0
    floor_on: str = "amax"
    rotated_bf16: bool = False
    pad: int = 0
    pad_written: bool = False
    page_align: int = 1
    separate: bool = False
    round_rows: bool = False
    round_values: bool = False
    ties_to_zero: bool = False
    divide: bool = False
    head_dims: tuple[int, ...] = ()
    rope_dim: int | None = None
    interleaved: bool = False
    round_normed: bool = False
    fp4_first: str = ""
    unsigned_zero: bool = False
    nearest_scale: bool = False
    zero_small: bool = False

    def __post_init__(self) -> None:
        _check_format(self)
        object.__setattr__(self, "floor", float(self.floor))

    def check(self, spec: CompressorSpec) -> None:
        """Raises ValueError when the layout is not defined for `spec`."""
        problem = self._problem(spec)
        if problem:
            raise ValueError(f"format {self.name!r} {problem}")

    def _problem(self, spec: CompressorSpec) -> str:
        if self.head_dims and spec.head_dim not in self.head_dims:
            return f"is defined for head_dim in {self.head_dims}, got spec.head_dim={spec.head_dim}"
        if self.rope_dim not in (None, spec.rope_dim):
            return f"is defined for rope_dim={self.rope_dim}, got spec.rope_dim={spec.rope_dim}"
        step, tail, got = max(self.group, 1), self.tail_bytes(spec), f"got spec.rope_dim={spec.rope_dim}"
        widest = max(step, FP4_GROUPS[self.fp4_first])
        if spec.head_dim % widest:
            return f"needs head_dim in groups of {widest}, got spec.head_dim={spec.head_dim}"
        if not self.rotated_bf16:
            return ""
        if not self.quantized(spec) or self.quantized(spec) % step:
            return f"needs groups of {step} before the rotated channels, {got} of spec.head_dim={spec.head_dim}"
        between = self.values_bytes(spec) % max(self.scale_bytes, 1) if self.interleaved else 0
        if between or self.rotated_at(spec) % 2 or self.row_bytes(spec) % self.alignment:
            return f"needs fields at multiples of their size, {got}"
        if self.in_footer and tail % 2 and self.page_align % 2:  # the next page starts behind them
            return f"needs an even page_align, or tails of an even size, got {tail} bytes for spec.head_dim={spec.head_dim}"
        return ""

    @property
    def element_max(self) -> float:
        """Largest magnitude of the element encoding, to which a scale maps its group's largest value; 0 for bf16 and fp32."""
        return ELEMENT_MAX.get(self.element, 0.0)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale in the tail."""
        return SCALE_BYTES.get(self.scale, 0)

    @property
    def alignment(self) -> int:
        """Bytes that every page starts at a multiple of: the size of the widest field in it."""
        wide = {"bf16": 2, "fp32": 4}.get(self.element, 1)
        return max(wide, 2 if self.rotated_bf16 else 1, 1 if self.separate else self.scale_bytes)

    @property
    def takes_scale(self) -> bool:
        """Whether `EntryCache.scale` has a part in the bytes."""
        return self.scale == "static" or (self.scale == "e4m3" and self.floor_on == "amax" and not self.zero_small)

    @property
    def in_footer(self) -> bool:
        """Whether tails stand behind the records of their page."""
        return self.scale_bytes > 0 and not self.separate and not self.interleaved

    def quantized(self, spec: CompressorSpec) -> int:
        """Channels in the element encoding; the rest is bf16."""
        return spec.head_dim - (spec.rope_dim if self.rotated_bf16 else 0)

    def constants(self, spec: CompressorSpec) -> dict[str, object]:
        """What the kernels' epilogue is compiled for."""
        same = (
            "round_rows", "round_normed", "round_values", "fp4_first", "element", "group", "scale", "floor", "divide",
            "rotated_bf16", "interleaved", "ties_to_zero", "unsigned_zero", "nearest_scale", "zero_small",
        )  # fmt: skip
        return {
            **{name.upper(): getattr(self, name) for name in same},
            "FLOOR_ON_SCALE": self.floor_on == "scale",
            "PAD": self.pad if self.pad_written else 0,
            "VALUES_BYTES": self.values_bytes(spec),
            "ROTATED_AT": self.rotated_at(spec),
            "ROW_BYTES": self.row_bytes(spec),
            "TAIL_BYTES": self.tail_bytes(spec),
        }

    def groups(self, spec: CompressorSpec) -> int:
        """Scales in a tail."""
        return self.quantized(spec) // self.group if self.scale_bytes else 0

    def values_bytes(self, spec: CompressorSpec) -> int:
        """Bytes of a record's channels in the element encoding, which come first."""
        return self.quantized(spec) * ELEMENT_BITS[self.element] // 8

    def rotated_bytes(self, spec: CompressorSpec) -> int:
        """Bytes of the channels that are kept as bf16."""
        return 2 * spec.rope_dim if self.rotated_bf16 else 0

    def rotated_at(self, spec: CompressorSpec) -> int:
        """The byte of a record where the channels that stay bf16 start."""
        return self.values_bytes(spec) + (self.tail_bytes(spec) if self.interleaved else 0)

    def row_bytes(self, spec: CompressorSpec) -> int:
        """Bytes from one record to the next; its tail counts only where it stands inside."""
        return self.rotated_at(spec) + self.rotated_bytes(spec)

    def tail_bytes(self, spec: CompressorSpec) -> int:
        """Bytes of a tail."""
        return self.groups(spec) * self.scale_bytes + self.pad

    def record_bytes(self, spec: CompressorSpec) -> int:
        """Bytes that one entry costs, page padding not counted."""
        return self.values_bytes(spec) + self.tail_bytes(spec) + self.rotated_bytes(spec)

    def used_bytes(self, spec: CompressorSpec, rows_per_page: int) -> int:
        """Bytes of a page of `rows_per_page` records in the main buffer, padding not counted."""
        return rows_per_page * (self.row_bytes(spec) if self.separate else self.record_bytes(spec))

    def page_bytes(self, spec: CompressorSpec, rows_per_page: int) -> int:
        """Bytes of such a page with its padding."""
        return -(-self.used_bytes(spec, rows_per_page) // self.page_align) * self.page_align


def _check_format(fmt: RecordFormat) -> None:
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
    for name in ("ties_to_zero", "unsigned_zero", "nearest_scale"):
        if getattr(fmt, name) and fmt.element != "e2m1":
            raise ValueError(f"{name} must be False where element is {fmt.element!r}, got True")
    if fmt.fp4_first and not fmt.round_values:
        raise ValueError(f"fp4_first must be '' unless round_values is True, got {fmt.fp4_first!r}")
    if fmt.page_align != 1 and fmt.page_align % fmt.alignment:
        raise ValueError(f"page_align must be 1 or a multiple of {fmt.alignment}, got {fmt.page_align}")
    for head_dim in fmt.head_dims:
        if head_dim % max(fmt.group, FP4_GROUPS[fmt.fp4_first]):
            raise ValueError(
                f"head_dims must be multiples of group={fmt.group} and of the groups of fp4_first, got {fmt.head_dims}"
            )
        try:
            if fmt.rope_dim is not None:  # otherwise what else there is to say waits for a spec
                fmt.check(CompressorSpec(head_dim, 1, rope_dim=fmt.rope_dim))
        except ValueError as error:
            raise ValueError(f"head_dims must go with the other fields, got {fmt.head_dims}: {error}") from None


def _check_types(fmt: RecordFormat) -> None:
    """Each field by itself."""
    kinds = {str: ("name", "source", "element", "scale", "floor_on", "fp4_first"), bool: _SWITCHES, tuple: ("head_dims",)}
    for kind, names in kinds.items():
        for name in names:
            check_type(name, getattr(fmt, name), kind)
    if not fmt.name:
        raise ValueError("name must not be empty, got ''")
    known = {"element": ELEMENT_BITS, "scale": ("none", "static", *SCALE_BYTES), "floor_on": ("amax", "scale")}
    known["fp4_first"] = FP4_GROUPS
    for name, accepted in known.items():
        if getattr(fmt, name) not in accepted:
            raise ValueError(f"{name} must be one of {list(accepted)}, got {getattr(fmt, name)!r}")
    check_int("group", fmt.group, 0, 4096)
    check_int("pad", fmt.pad, 0, 4096)
    check_int("page_align", fmt.page_align, 1, 1 << 30)
    if isinstance(fmt.floor, bool) or not isinstance(fmt.floor, (int, float)):
        raise TypeError(f"floor must be a float, got {type(fmt.floor).__name__}")
    if not 0 <= fmt.floor < math.inf:
        raise ValueError(f"floor must be finite and not negative, got {fmt.floor}")
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
    divide = fmt.scale == "e4m3" and on_scale  # group_scale gives an inverse for all others
    # The smallest scale, a normal fp32, must be a number that it can be divided by.
    low, high = 2.0**-126 * (1 if on_scale else ELEMENT_MAX[fmt.element]), 2.0**100
    if divide:
        low, high = 2.0**-9, 448.0
    without = not on_scale and fmt.scale in ("e4m3", "fp32")
    if not (low <= fmt.floor <= high or (without and fmt.floor == 0)):
        zero = "0, or " if without else ""
        where = f"where element is {fmt.element!r}, scale {fmt.scale!r} and floor_on {fmt.floor_on!r}"
        raise ValueError(f"floor must be {zero}from {low!r} to {high!r} {where}, got {fmt.floor!r}")
    if fmt.divide != divide:
        where = "where" if divide else "unless"
        raise ValueError(f"divide must be {divide} {where} scale is 'e4m3' and floor_on 'scale', got {fmt.divide}")
    if fmt.interleaved and fmt.separate:
        raise ValueError("interleaved must be False where separate is True, got True")
    if fmt.nearest_scale and fmt.scale not in POWERS_OF_TWO:
        raise ValueError(f"nearest_scale must be False unless scale is one of {list(POWERS_OF_TWO)}, got True")
    if fmt.zero_small and (fmt.scale != "e4m3" or on_scale):
        raise ValueError("zero_small must be False unless scale is 'e4m3' and floor_on 'amax', got True")
    if fmt.pad % fmt.scale_bytes:
        raise ValueError(f"pad must be a multiple of {fmt.scale_bytes} where scale is {fmt.scale!r}, got {fmt.pad}")
    if fmt.pad_written and fmt.pad & (fmt.pad - 1):  # a vector of a kernel
        raise ValueError(f"pad must be a power of two where pad_written is True, got {fmt.pad}")


# The smallest normal fp32 times 6: below it a group of e2m1 would need a scale under 2**-126.
_E2M1_FLOOR = 6 * 2.0**-126


# What engines round to bf16 on the way from the pooled row to the record: vLLM's V4.1; its indexer, and SGLang's V4.1.
_NORMED: dict = {"round_normed": True}
_ALL: dict = {"round_rows": True, "round_normed": True, "round_values": True}
_FAKED: dict = {**_ALL, "fp4_first": "nvfp4"}  # SGLang's fp8 records of ratios 1 and 2


def _mla(name: str, source: str, floor: float, **fields: object) -> RecordFormat:
    """The 584-byte record of the main cache; engines differ in the floor, the pad byte and the page's padding."""
    base = RecordFormat(
        name, source, "e4m3", 64, "ue8m0", floor, rotated_bf16=True, pad=1, round_values=True, head_dims=(512,), rope_dim=64
    )
    return replace(base, **fields)


def _v41_mxfp8(name: str, source: str, **fields: object) -> RecordFormat:
    """V4.1's record of 528 bytes. A floor on the scale makes 114 the smallest code, one on amax 105."""
    return replace(RecordFormat(name, source, "e4m3", 32, "ue8m0", 1e-4, "scale", head_dims=(512,)), **fields)


def _v41_nvfp4(name: str, source: str, **fields: object) -> RecordFormat:
    """V4.1's record of 288 bytes."""
    return replace(RecordFormat(name, source, "e2m1", 16, "e4m3", 2**-9, "scale", divide=True, head_dims=(512,)), **fields)


def _indexer(name: str, source: str, element: str, scale: str, floor: float = 1e-4, **fields: object) -> RecordFormat:
    """An indexer's key: one scale in e4m3, four in e2m1."""
    return RecordFormat(name, source, element, 128 if element == "e4m3" else 32, scale, floor, head_dims=(128,), **fields)


_TABLE = (
    # TensorRT-LLM hands bf16 rows from its pooling to what follows, which rounds nothing between norm and quantizer.
    RecordFormat("bf16", "plain rows: vLLM full cache, SGLang", "bf16"),
    RecordFormat("bf16_trtllm", "TensorRT-LLM, plain rows", "bf16", round_rows=True),
    RecordFormat("bf16_v41", "vLLM V4.1, plain rows", "bf16", **_NORMED),
    RecordFormat("fp32", "plain rows", "fp32"),
    RecordFormat("fp8_tensor", "vLLM full cache, SGLang", "e4m3", scale="static", round_values=True),
    RecordFormat("fp8_tensor_trtllm", "TensorRT-LLM, per tensor", "e4m3", scale="static", round_rows=True),
    RecordFormat("fp8_tensor_v41", "vLLM V4.1, plain rows", "e4m3", scale="static", round_values=True, **_NORMED),
    RecordFormat("fp8_tensor_v41_sglang", "SGLang V4.1, UNIFORM_FP8", "e4m3", scale="static", head_dims=(512,), **_FAKED),
    # Floor on the scale, not on amax: the smallest code is 114 where the others have 105 or 92.
    _mla("fp8_ds_mla", "vLLM, default CUDA writer", 1e-4, floor_on="scale", page_align=576, pad_written=True),
    _mla("fp8_ds_mla_vllm_triton", "vLLM, Triton writer", 1e-4, page_align=576, pad_written=True),
    _mla("fp8_ds_mla_sglang", "SGLang", 1e-4, page_align=576),
    _mla("fp8_ds_mla_trtllm", "TensorRT-LLM, footer scales", 1e-8, round_rows=True),
    _mla("fp8_ds_mla_v41", "vLLM V4.1, not SM100", 1e-4, page_align=576, pad_written=True, **_NORMED),
    _mla("fp8_ds_mla_v41_sglang", "SGLang V4.1, default", 1e-4, page_align=576, **_FAKED),
    RecordFormat("fp8_block128", "TensorRT-LLM, blockwise", "e4m3", 128, "fp32", round_rows=True, head_dims=(512, 128)),
    RecordFormat("mxfp4", "TensorRT-LLM, MXFP4", "e2m1", 32, "ue8m0", _E2M1_FLOOR, separate=True, round_rows=True),
    RecordFormat("nvfp4_trtllm", "TensorRT-LLM, NVFP4", "e2m1", 16, "e4m3", separate=True, round_rows=True, head_dims=(512,)),
    RecordFormat(
        "nvfp4_flashinfer", "FlashInfer, 384 bytes", "e2m1", 16, "e4m3", rotated_bf16=True, zero_small=True, pad=4,
        pad_written=True, round_values=True, head_dims=(512,), rope_dim=64,
    ),
    RecordFormat(
        "mxfp4_sm90_sglang", "SGLang pull request, 368 bytes", "e2m1", 32, "ue8m0", _E2M1_FLOOR, rotated_bf16=True,
        interleaved=True, nearest_scale=True, pad=2, round_values=True, head_dims=(512,), rope_dim=64,
    ),
    _indexer("indexer_fp8_vllm", "vLLM, scales in fp32", "e4m3", "pow2", round_values=True),
    _indexer("indexer_fp8_vllm_sm100", "vLLM on SM100", "e4m3", "ue8m0x4", round_values=True),
    _indexer("indexer_fp8_v41", "vLLM V4.1, scales in fp32", "e4m3", "pow2", **_ALL),
    _indexer("indexer_fp8_v41_sm100", "vLLM V4.1 on SM100", "e4m3", "ue8m0x4", **_ALL),
    _indexer("indexer_fp8_sglang", "SGLang", "e4m3", "fp32"),
    _indexer("indexer_mxfp4", "vLLM", "e2m1", "ue8m0", _E2M1_FLOOR, round_values=True),
    _indexer("indexer_mxfp4_v41", "vLLM V4.1", "e2m1", "ue8m0", _E2M1_FLOOR, **_ALL),
    _indexer("indexer_mxfp4_sglang", "SGLang, store", "e2m1", "ue8m0", ties_to_zero=True),
    _indexer(
        "indexer_mxfp4_v41_sglang", "SGLang V4.1", "e2m1", "ue8m0", floor_on="scale", fp4_first="mxfp4", unsigned_zero=True,
        **_ALL,
    ),
    # V4.1's records of all channels: scales at the page's end, as FlashInfer and SGLang have them, or in each record.
    _v41_mxfp8("v41_mxfp8", "FlashInfer V4.1, MXFP8", page_align=512, round_values=True),
    _v41_mxfp8("v41_mxfp8_sglang", "SGLang V41, ratios 4, 128", page_align=512, round_values=True, **_NORMED),
    _v41_mxfp8("v41_mxfp8_sglang_fp4", "SGLang V41, ratios 1, 2", page_align=512, **_FAKED),
    _v41_mxfp8("v41_mxfp8_interleaved_vllm", "vLLM V4.1 on SM100, MXFP8", interleaved=True, floor_on="amax", **_NORMED),
    _v41_mxfp8(
        "v41_mxfp8_interleaved_sglang", "SGLang V41_NEW, ratios 4, 128", interleaved=True, round_values=True, **_NORMED
    ),
    _v41_mxfp8("v41_mxfp8_interleaved_sglang_fp4", "SGLang V41_NEW, ratios 1, 2", interleaved=True, **_FAKED),
    _v41_nvfp4("v41_nvfp4", "FlashInfer V4.1, NVFP4", round_values=True),
    _v41_nvfp4("v41_nvfp4_sglang", "SGLang V41_FP4, ratios 1, 2", page_align=256, **_ALL),
    _v41_nvfp4("v41_nvfp4_interleaved_vllm", "vLLM V4.1 on SM100, NVFP4", interleaved=True, **_NORMED),
    _v41_nvfp4("v41_nvfp4_interleaved_sglang", "SGLang V41_FP4_NEW, ratios 1, 2", interleaved=True, **_ALL),
)  # fmt: skip
FORMATS: dict[str, RecordFormat] = {fmt.name: fmt for fmt in _TABLE}


def get_format(fmt: str | RecordFormat, argument: str = "fmt") -> RecordFormat:
    """The format of that name (or `fmt` itself). Raises ValueError naming the argument and listing the known names."""
    if isinstance(fmt, RecordFormat):
        if "name" not in fmt.__dict__:
            raise ValueError(f"{argument} must be made by RecordFormat(...), got one without fields")
        return fmt
    if not isinstance(fmt, str):
        raise TypeError(f"{argument} must be the name of a record format, or a RecordFormat, got {type(fmt).__name__}")
    if fmt not in FORMATS:
        raise ValueError(f"{argument} must be one of {sorted(FORMATS)}, got {fmt!r}")
    return FORMATS[fmt]
