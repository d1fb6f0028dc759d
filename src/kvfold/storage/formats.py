"""Record formats: the bytes that one entry becomes in a page of the cache; and `EntryCache`, pages with a format."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..arguments.checks import check_device, check_int, check_memory, check_type, usable_device
from ..arguments.overlap import Place, check_apart
from ..spec import CompressorSpec, check_spec
from .format_rules import ELEMENT_BITS, ELEMENT_MAX, SCALE_BYTES, check_format, check_page_dtype
from .remembered import Checked, Layer, check_made


@dataclass(frozen=True)
class RecordFormat:
    """One record layout, to the byte: the value that drives every writer, reader and test.

    A page of N rows has N records, then (or in a second buffer) N tails. A record is the quantized channels, then the rotated
    ones if they stay bf16; a tail is the scales of its record, then pad bytes. A format of your own is made like those of
    `FORMATS`, or from one of them by `dataclasses.replace`.

    Attributes:
        name: the public name.
        source: whose bytes these are.
        element: encoding of the quantized (or only) channels: `"bf16"`, `"fp32"`, `"e4m3"` or `"e2m1"` (two to a byte, the even
            channel in the low nibble). bf16 and fp32 go with `page_align`, `round_rows`, `head_dims` and `rope_dim` only.
        group: channels that share a scale, a power of two; 0 when there are no scales in the record.
        scale: `"none"`, `"static"` (one number per cache), or in the tail as `"ue8m0"` (power of two, exponent + 127), `"pow2"`
            (power of two as fp32), `"fp32"` or `"e4m3"`.
        floor, floor_on: the least value of the group's largest magnitude (`"amax"`) or of the scale itself (`"scale"`). 0 for
            none, which scales of fp32, and of e4m3 floored on amax, can do without.
        rotated_bf16: the last `rope_dim` channels are kept as bf16.
        pad: bytes behind the scales of a tail. pad_written: whether the writer zeroes them (a power of two of them) or leaves
            them.
        page_align: the page is rounded up to a multiple of this many bytes, itself 1 or a multiple of `alignment`.
        separate: tails are in a buffer of their own, `EntryCache.scales`.
        round_rows: pooled rows are rounded to bf16 before the norm. round_values: values are rounded to bf16 before they
            are quantized.
        ties_to_zero: e2m1 ties go toward zero and -0 becomes 0, instead of ties to even and -0 kept.
        divide: values are divided by the scale, where it is e4m3 and floored itself; otherwise multiplied by its inverse, which
            differs in the last bit unless the scale is a power of two.
        head_dims, rope_dim: what the layout is defined for; empty and None for any.

    Raises:
        TypeError, ValueError: naming the field, when fields do not go together. What is made can be stored and read.
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

    def __post_init__(self) -> None:
        check_format(self)
        object.__setattr__(self, "floor", float(self.floor))

    def check(self, spec: CompressorSpec) -> None:
        """Raises ValueError when the layout is not defined for `spec`."""
        if self.head_dims and spec.head_dim not in self.head_dims:
            raise ValueError(
                f"format {self.name!r} is defined for head_dim in {self.head_dims}, got spec.head_dim={spec.head_dim}"
            )
        if self.rope_dim is not None and spec.rope_dim != self.rope_dim:
            raise ValueError(f"format {self.name!r} is defined for rope_dim={self.rope_dim}, got spec.rope_dim={spec.rope_dim}")
        if self.group and spec.head_dim % self.group:
            raise ValueError(
                f"format {self.name!r} needs head_dim in groups of {self.group}, got spec.head_dim={spec.head_dim}"
            )
        if self.rotated_bf16:
            step = max(self.group, 1)
            if not self.quantized(spec) or self.quantized(spec) % step:
                raise ValueError(
                    f"format {self.name!r} needs groups of {step} before the rotated channels, "
                    f"got spec.rope_dim={spec.rope_dim} of spec.head_dim={spec.head_dim}"
                )
            if self.values_bytes(spec) % 2 or self.row_bytes(spec) % self.alignment:
                raise ValueError(
                    f"format {self.name!r} needs fields at multiples of their size, got spec.rope_dim={spec.rope_dim}"
                )
            if not self.separate and self.tail_bytes(spec) % 2 and self.page_align % 2:  # the next page starts behind them
                raise ValueError(
                    f"format {self.name!r} needs an even page_align, or tails of an even size, "
                    f"got {self.tail_bytes(spec)} bytes for spec.head_dim={spec.head_dim}"
                )

    @property
    def element_max(self) -> float:
        """Largest magnitude of the element encoding, to which scales map a group's largest; 0 for bf16 and fp32."""
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
        return self.scale == "static" or (self.scale == "e4m3" and self.floor_on == "amax")

    def quantized(self, spec: CompressorSpec) -> int:
        """Channels in the element encoding; the rest is bf16."""
        return spec.head_dim - (spec.rope_dim if self.rotated_bf16 else 0)

    def constants(self, spec: CompressorSpec) -> dict[str, object]:
        """What the kernels' epilogue is compiled for."""
        return {
            "ROUND_ROWS": self.round_rows,
            "ELEMENT": self.element,
            "GROUP": self.group,
            "SCALE": self.scale,
            "FLOOR": self.floor,
            "FLOOR_ON_SCALE": self.floor_on == "scale",
            "DIVIDE": self.divide,
            "ROTATED_BF16": self.rotated_bf16,
            "PAD": self.pad if self.pad_written else 0,
            "ROUND_VALUES": self.round_values,
            "TIES_TO_ZERO": self.ties_to_zero,
            "ROW_BYTES": self.row_bytes(spec),
            "TAIL_BYTES": self.tail_bytes(spec),
        }

    def groups(self, spec: CompressorSpec) -> int:
        """Scales in a tail."""
        return self.quantized(spec) // self.group if self.scale_bytes else 0

    def values_bytes(self, spec: CompressorSpec) -> int:
        """Bytes of a record's channels in the element encoding, which come first."""
        return self.quantized(spec) * ELEMENT_BITS[self.element] // 8

    def row_bytes(self, spec: CompressorSpec) -> int:
        """Bytes from one record to the next, tails not counted."""
        return self.values_bytes(spec) + (2 * spec.rope_dim if self.rotated_bf16 else 0)

    def tail_bytes(self, spec: CompressorSpec) -> int:
        """Bytes from one tail to the next."""
        return self.groups(spec) * self.scale_bytes + self.pad

    def record_bytes(self, spec: CompressorSpec) -> int:
        """Bytes that one entry costs, page padding not counted."""
        return self.row_bytes(spec) + self.tail_bytes(spec)

    def page_bytes(self, spec: CompressorSpec, rows_per_page: int) -> int:
        """Bytes of a page of `rows_per_page` records in the main buffer, padding included."""
        used = rows_per_page * (self.row_bytes(spec) if self.separate else self.record_bytes(spec))
        return -(-used // self.page_align) * self.page_align


# The smallest normal fp32 times 6: below it a group of e2m1 would need a scale under 2**-126.
_E2M1_FLOOR = 6 * 2.0**-126


def _mla(name: str, source: str, floor: float, **fields: object) -> RecordFormat:
    """The 584-byte record of the main cache; engines differ in the floor, the pad byte and the page's padding."""
    base = RecordFormat(
        name, source, "e4m3", 64, "ue8m0", floor, rotated_bf16=True, pad=1, round_values=True, head_dims=(512,), rope_dim=64
    )
    return replace(base, **fields)


_TABLE = (
    # TensorRT-LLM hands bf16 rows from its pooling to what follows, which rounds nothing between norm and quantizer.
    RecordFormat("bf16", "plain rows: vLLM full cache, SGLang", "bf16"),
    RecordFormat("bf16_trtllm", "TensorRT-LLM, plain rows", "bf16", round_rows=True),
    RecordFormat("fp32", "plain rows", "fp32"),
    RecordFormat("fp8_tensor", "vLLM full cache, SGLang", "e4m3", scale="static", round_values=True),
    RecordFormat("fp8_tensor_trtllm", "TensorRT-LLM, per tensor", "e4m3", scale="static", round_rows=True),
    # Floor on the scale, not on amax: the smallest code is 114 where the others have 105 or 92.
    _mla("fp8_ds_mla", "vLLM, default CUDA writer", 1e-4, floor_on="scale", page_align=576, pad_written=True),
    _mla("fp8_ds_mla_vllm_triton", "vLLM, Triton writer", 1e-4, page_align=576, pad_written=True),
    _mla("fp8_ds_mla_sglang", "SGLang", 1e-4, page_align=576),
    _mla("fp8_ds_mla_trtllm", "TensorRT-LLM, footer scales", 1e-8, round_rows=True),
    RecordFormat("fp8_block128", "TensorRT-LLM, blockwise", "e4m3", 128, "fp32", round_rows=True, head_dims=(512, 128)),
    RecordFormat("mxfp4", "TensorRT-LLM, MXFP4", "e2m1", 32, "ue8m0", _E2M1_FLOOR, separate=True, round_rows=True),
    RecordFormat("nvfp4_trtllm", "TensorRT-LLM, NVFP4", "e2m1", 16, "e4m3", separate=True, round_rows=True, head_dims=(512,)),
    RecordFormat("indexer_fp8_vllm", "vLLM, scales in fp32", "e4m3", 128, "pow2", 1e-4, round_values=True, head_dims=(128,)),
    RecordFormat("indexer_fp8_sglang", "SGLang", "e4m3", 128, "fp32", 1e-4, head_dims=(128,)),
    RecordFormat("indexer_mxfp4", "vLLM", "e2m1", 32, "ue8m0", _E2M1_FLOOR, round_values=True, head_dims=(128,)),
    RecordFormat("indexer_mxfp4_sglang", "SGLang, store", "e2m1", 32, "ue8m0", 1e-4, ties_to_zero=True, head_dims=(128,)),
    # The layout of FlashInfer and vLLM 0.32; what engines round before it differs.
    RecordFormat(
        "v41_mxfp8", "V4.1 MXFP8, footer", "e4m3", 32, "ue8m0", 1e-4, page_align=512, round_values=True, head_dims=(512,)
    ),
    RecordFormat(
        "v41_nvfp4", "V4.1 NVFP4, footer", "e2m1", 16, "e4m3", 2**-9, "scale", round_values=True, divide=True, head_dims=(512,)
    ),
)
FORMATS: dict[str, RecordFormat] = {fmt.name: fmt for fmt in _TABLE}


def get_format(fmt: str | RecordFormat) -> RecordFormat:
    """The format of that name (or `fmt` itself). Raises ValueError listing the known names."""
    if isinstance(fmt, RecordFormat):
        if "name" not in fmt.__dict__:
            raise ValueError("fmt must be made by RecordFormat(...), got one without fields")
        return fmt
    check_type("fmt", fmt, str)
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {sorted(FORMATS)}, got {fmt!r}")
    return FORMATS[fmt]


class EntryCache(Checked):
    """Pages of records. Slot `s` is row `s % rows_per_page` of page `s // rows_per_page`.

    Attributes:
        storage: the tensor given, `[num_pages, ...]`.
        scales: the second buffer of formats that keep scales apart, uint8 `[num_pages, rows_per_page * tail_bytes]`; else None.
        pages: the memory of `storage` as uint8 `[num_pages, page_bytes]`.
        scale: `fp8_tensor` and `fp8_tensor_trtllm`: what values are divided by; `nvfp4_trtllm`: the global factor g. 1 for the
            others.
        format, spec, rows_per_page, page_bytes.
    """

    pages: torch.Tensor
    scale_pages: torch.Tensor | None
    page_bytes: int

    def __init__(
        self,
        storage: torch.Tensor,
        fmt: str | RecordFormat,
        rows_per_page: int,
        spec: CompressorSpec,
        *,
        scales: torch.Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """Wraps an engine's page tensor.

        Args:
            storage: `[num_pages, ...]` of any integer dtype, which stand for bytes, or of the floating dtype that the format's
                `element` is: bfloat16, float32, float8_e4m3fn (as engines also view pages that hold more than
                e4m3), float4_e2m1fn_x2. No other: e4m3 is OCP's, and the codes of float8_e4m3fnuz are other numbers. Each page
                is dense and has at least the format's page bytes; pages may lie further apart than that.
            scales: `[num_pages, ...]` likewise, if and only if the format keeps scales in a buffer of their own; as floats
                float8_e8m0fnu, float8_e4m3fn or float32, as the format's `scale` is.
            scale: a number from 2**-126 to 2**126; 1 unless the format takes one, see the class.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        self.storage, self.scales, self.scale = storage, scales, scale
        self.format, self.spec, self.rows_per_page = get_format(fmt), spec, rows_per_page
        self._validate()

    def _check(self) -> None:
        storage, scales, spec, rows_per_page = self.storage, self.scales, self.spec, self.rows_per_page
        check_memory("storage", storage, fake=True)
        check_spec("spec", spec)
        check_int("rows_per_page", rows_per_page, 1, 1 << 20)
        check_type("format", self.format, RecordFormat)
        get_format(self.format)
        self.format.check(spec)
        self.page_bytes, self.scale = self.format.page_bytes(spec, rows_per_page), _number("scale", self.scale)
        if not 2.0**-126 <= self.scale <= 2.0**126:  # both it and its inverse are normal numbers in fp32
            raise ValueError(f"scale must be from 2**-126 to 2**126, got {self.scale}")
        if self.scale != 1 and not self.format.takes_scale:
            raise ValueError(f"scale must be 1: format {self.format.name!r} takes none, got {self.scale}")
        if self.format.scale_bytes and not self.format.separate and rows_per_page * self.format.row_bytes(spec) >= 1 << 31:
            raise ValueError(  # where kernels find the tails, in 32 bits
                f"rows_per_page must leave a page's rows below 2**31 bytes in format {self.format.name!r}, got {rows_per_page}"
            )
        check_page_dtype("storage", storage, self.format.element)
        self.pages = _byte_pages("storage", storage, self.page_bytes, self.format.alignment)
        if self.num_slots >= 1 << 32:  # kernels find the page of a slot in 32 bits (backend_triton/kernels/record.py)
            raise ValueError(f"storage must have fewer than 2**32 slots, got {self.num_slots}")
        self.scale_pages = None
        if self.format.separate:
            check_memory("scales", scales, fake=True)
            check_device("scales", scales, storage.device)
            if scales.shape[:1] != storage.shape[:1]:
                raise ValueError(f"scales must have {storage.shape[0]} pages like storage, got {list(scales.shape)}")
            check_page_dtype("scales", scales, self.format.scale)
            size = rows_per_page * self.format.tail_bytes(spec)
            self.scale_pages = _byte_pages("scales", scales, size, self.format.scale_bytes)
            check_apart((Place("scales", self.scale_pages, written=True), Place("storage", self.pages, written=True)))
        elif scales is not None:
            raise ValueError(f"scales must be None: format {self.format.name!r} keeps its scales in the page")
        self._named = FORMATS.get(self.format.name) == self.format  # so an operator (ops.py) can be told it by its name
        self._tensors = (self.pages,) if self.scale_pages is None else (self.pages, self.scale_pages)
        self._layer: Layer | None = None  # what the last `store` got with this cache: store.py

    def __reduce__(self) -> tuple:
        """Copies and pickles are made anew, as `pages` must be a view of their own storage."""
        return _made_again, (self.storage, self.format, self.rows_per_page, self.spec, self.scales, self.scale)

    @classmethod
    def allocate(
        cls,
        fmt: str | RecordFormat,
        num_pages: int,
        rows_per_page: int,
        spec: CompressorSpec,
        *,
        device: torch.device | str | None = None,
        scale: float = 1.0,
    ) -> EntryCache:
        """A zeroed cache: uint8 `[num_pages, page_bytes]`, and uint8 scales where the format keeps them apart."""
        check_spec("spec", spec)
        check_int("num_pages", num_pages, 0, (1 << 31) - 1)
        check_int("rows_per_page", rows_per_page, 1, 1 << 20)
        fmt = get_format(fmt)
        fmt.check(spec)
        device = usable_device("device", device)
        page_bytes, scales = fmt.page_bytes(spec, rows_per_page), None
        storage = torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device=device)
        if fmt.separate:
            scales = torch.zeros(num_pages, rows_per_page * fmt.tail_bytes(spec), dtype=torch.uint8, device=device)
        return cls(storage, fmt, rows_per_page, spec, scales=scales, scale=scale)

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def num_slots(self) -> int:
        return self.num_pages * self.rows_per_page

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Entries as numbers.

        Args:
            slots: int32 or int64 `[n]`, flat row indices from 0 to `num_slots - 1`, on the cache's device.

        Returns:
            fp32 `[n, head_dim]`: what an attention kernel that reads these bytes sees. Synchronizes with the host, to
            check the slots.
        """
        check_made("cache", self, EntryCache)
        check_memory("slots", slots)
        if slots.dtype not in (torch.int32, torch.int64) or slots.dim() != 1:
            raise ValueError(f"slots must be int32 or int64 [n], got {slots.dtype} {list(slots.shape)}")
        check_device("slots", slots, self.device)
        if self.device.type == "meta":
            raise ValueError("slots must be of a cache on a CPU or a GPU, got the meta device")
        if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= self.num_slots):
            raise ValueError(f"slots must be from 0 to {self.num_slots - 1}, got {int(slots.min())}..{int(slots.max())}")
        from .pack import unpack_records  # pack.py needs this module's types

        return unpack_records(self, slots.long())

    def raw(self, slot: int) -> dict[str, torch.Tensor]:
        """The named fields of one record, copied, in their own types.

        Returns:
            `values` (bf16, fp32 or e4m3 `[n]`; e2m1: uint8 codes 0..15, one per channel), then, where the format has them,
            `rotated` (bf16 `[rope_dim]`), `scales` (fp32, e4m3, or uint8 ue8m0 codes, one per group) and `pad` (uint8).
        """
        check_made("cache", self, EntryCache)
        check_int("slot", slot, 0, self.num_slots - 1)
        if self.device.type == "meta":
            raise ValueError("slot must be of a cache on a CPU or a GPU, got the meta device")
        from .pack import raw_fields

        return raw_fields(self, torch.tensor([slot], device=self.device))


def _number(name: str, value: object) -> float:
    """A float from any single number; text and truth values are none."""
    try:
        if isinstance(value, (str, bytes, bytearray, memoryview, bool)) or getattr(value, "dtype", None) in (bool, torch.bool):
            raise TypeError
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf  # an int beyond fp64
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None


def _byte_pages(name: str, storage: torch.Tensor, page_bytes: int, unit: int) -> torch.Tensor:
    """The pages as uint8 `[num_pages, page_bytes]`, checked to be dense, disjoint and aligned to `unit` bytes."""
    if storage.dim() < 2:
        raise ValueError(f"{name} must have a page dimension and one more, got shape {list(storage.shape)}")
    num_pages, item = storage.shape[0], storage.element_size()
    have = storage[:1].numel() * item if num_pages else page_bytes
    if have < page_bytes:
        raise ValueError(f"{name} must have at least {page_bytes} bytes per page, got {have}")
    dense = 1
    for size, stride in zip(reversed(storage.shape[1:]), reversed(storage.stride()[1:]), strict=True):
        if size > 1 and stride != dense:
            raise ValueError(f"{name} must be dense within a page, got strides {tuple(storage.stride())}")
        dense *= size
    if num_pages > 1 and storage.stride(0) < dense:
        raise ValueError(f"{name} must have pages that do not overlap, got strides {tuple(storage.stride())}")
    if num_pages == 0:
        return torch.empty(0, page_bytes, dtype=torch.uint8, device=storage.device)
    if storage.data_ptr() % unit or (num_pages > 1 and storage.stride(0) * item % unit):
        raise ValueError(f"{name} must have pages that start at a multiple of {unit} bytes")
    flat = storage.detach().as_strided((num_pages, dense), (storage.stride(0), 1))
    pages = flat.view(torch.uint8)[:, :page_bytes]
    check_memory(name, pages, fake=True)  # a view made inside of a transform is none of plain memory
    return pages


def _made_again(
    storage: torch.Tensor,
    fmt: RecordFormat,
    rows_per_page: int,
    spec: CompressorSpec,
    scales: torch.Tensor | None,
    scale: float,
) -> EntryCache:
    return EntryCache(storage, fmt, rows_per_page, spec, scales=scales, scale=scale)
