"""`EntryCache`: pages of records in one format, usually an engine's own memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..arguments.checks import address_of, check_device, check_dtype, check_int, check_memory, check_type, usable_device
from ..arguments.overlap import Place, check_apart
from ..contract import INT32_MAX
from ..spec import CompressorSpec, check_spec
from .formats import FORMATS, RecordFormat, get_format
from .pack import read_fields, unpack_records
from .remembered import Checked, Layer, check_made, dtype_name

MOST_ROWS = 1 << 20  # of a page


class EntryCache(Checked):
    """Pages of records. Slot `s` is row `s % rows_per_page` of page `s // rows_per_page`.

    Attributes:
        storage: the tensor given, `[num_pages, ...]`.
        scales: the second buffer of formats that keep scales apart, uint8 `[num_pages, rows_per_page * tail_bytes]`; else None.
        pages: the memory of `storage` as uint8 `[num_pages, page_bytes]`.
        scale: the scale of the whole cache. Formats with one scale per cache divide values by it; for `nvfp4_trtllm` it is the
            global factor g. 1 for formats that take none.
        scale_tensor: the same as kernels read it, fp32 `[1]` on the cache's device; None for formats that take none.
        format, spec, rows_per_page: as given.
        page_bytes: bytes of a page, with as much of the format's padding as `storage` has.
    """

    pages: torch.Tensor
    scale_pages: torch.Tensor | None
    scale_tensor: torch.Tensor | None
    page_bytes: int
    _own_scale: torch.Tensor | None = None  # of a number: made once, as a CUDA graph may have its address
    _own_number: float = 1.0

    def __init__(
        self,
        storage: torch.Tensor,
        fmt: str | RecordFormat,
        rows_per_page: int,
        spec: CompressorSpec,
        *,
        scales: torch.Tensor | None = None,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        """Wraps an engine's page tensor.

        Args:
            storage: `[num_pages, ...]`. Of any integer dtype, whose elements are taken as bytes; or of the floating dtype of
                the format's `element`: bfloat16, float32, float8_e4m3fn (which engines use also where a page holds more than
                e4m3) or float4_e2m1fn_x2. No other dtype: e4m3 is OCP's, and codes of float8_e4m3fnuz mean other numbers. Each
                page is dense and holds its records, with or without the format's padding. Pages may lie further apart.
            scales: `[num_pages, ...]` likewise, if and only if the format keeps scales in a buffer of their own. If floating:
                float8_e8m0fnu, float8_e4m3fn or float32, to match the format's `scale`.
            scale: a number from 2**-126 to 2**126; 1 unless the format takes one, see the class. Or an fp32 tensor of one
                element on the cache's device: every store reads it when it runs, and its value is not checked.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        self.storage, self.scales, self.scale = storage, scales, scale
        self.format, self.spec, self.rows_per_page = get_format(fmt), spec, rows_per_page
        self._validate()

    def _check(self) -> None:
        storage, scales, spec, rows_per_page, fmt = self.storage, self.scales, self.spec, self.rows_per_page, self.format
        check_memory("storage", storage, fake=True)
        check_type("format", fmt, RecordFormat)
        _check_layout(fmt, rows_per_page, spec)
        if fmt.in_footer and rows_per_page * fmt.row_bytes(spec) > INT32_MAX:
            raise ValueError(  # where kernels find the tails, in 32 bits
                f"rows_per_page must leave a page's rows below 2**31 bytes in format {fmt.name!r}, got {rows_per_page}"
            )
        least, most = fmt.used_bytes(spec, rows_per_page), fmt.page_bytes(spec, rows_per_page)
        self.pages = _byte_pages("storage", storage, fmt.element, least, most, fmt.alignment)
        self.page_bytes = self.pages.shape[1]
        if self.num_slots >= 1 << 32:  # kernels find the page of a slot in 32 bits (backend_triton/kernels/record.py)
            raise ValueError(f"storage must have fewer than 2**32 slots, got {self.num_slots}")
        self.scale_pages = None
        if fmt.separate:
            check_memory("scales", scales, fake=True)
            check_device("scales", scales, storage.device)
            if scales.shape[:1] != storage.shape[:1]:
                raise ValueError(f"scales must have {storage.shape[0]} pages like storage, got {list(scales.shape)}")
            size = rows_per_page * fmt.tail_bytes(spec)
            self.scale_pages = _byte_pages("scales", scales, fmt.scale, size, size, fmt.scale_bytes)
            check_apart((Place("scales", self.scale_pages, written=True), Place("storage", self.pages, written=True)))
        elif scales is not None:
            raise ValueError(f"scales must be None: format {fmt.name!r} keeps its scales in the page")
        self.scale_tensor = self._check_scale()
        self._named = FORMATS.get(fmt.name) == fmt  # so an operator (ops.py) can be told it by its name
        self._tensors = (self.pages,) if self.scale_pages is None else (self.pages, self.scale_pages)
        self._layer: Layer | None = None  # what the last `store` got with this cache: calls/checks.py

    def _watch(self) -> tuple[torch.Tensor, ...]:
        """The scale too: kernels get its address as a number."""
        return self._tensors if self.scale_tensor is None else (*self._tensors, self.scale_tensor)

    def _check_scale(self) -> torch.Tensor | None:
        """The scale as kernels read it. Of a number it is a tensor of the cache's own, made once."""
        fmt, scale = self.format, self.scale
        if isinstance(scale, torch.Tensor) and not fmt.takes_scale:
            raise TypeError(f"scale must be the number 1: format {fmt.name!r} takes none, got a tensor")
        if isinstance(scale, torch.Tensor):
            check_memory("scale", scale, fake=True)
            check_dtype("scale", scale, (torch.float32,))
            if scale.numel() != 1:
                raise ValueError(f"scale must be a number or a tensor of one element, got {list(scale.shape)}")
            check_device("scale", scale, self.device)
            return scale.detach().reshape(1)
        self.scale = scale = _number("scale", scale)
        if not 2.0**-126 <= scale <= 2.0**126:  # both it and its inverse are normal numbers in fp32
            raise ValueError(f"scale must be from 2**-126 to 2**126, got {scale}")
        if not fmt.takes_scale:
            if scale != 1:
                raise ValueError(f"scale must be 1: format {fmt.name!r} takes none, got {scale}")
            return None
        own = self._own_scale
        if own is None or own.device != self.device:
            own = self._own_scale = self.pages.new_full((1,), scale, dtype=torch.float32)
        elif self._own_number != scale:
            with torch.inference_mode():  # where it may have been made
                own.fill_(scale)
        self._own_number = scale
        return own

    def __reduce__(self) -> tuple:
        """Copies and pickles are rebuilt, as `pages` must be a view of their own storage."""
        return _made_again, (self.scales, self.scale, self.storage, self.format, self.rows_per_page, self.spec)

    @classmethod
    def allocate(
        cls,
        fmt: str | RecordFormat,
        num_pages: int,
        rows_per_page: int,
        spec: CompressorSpec,
        *,
        device: torch.device | str | None = None,
        scale: float | torch.Tensor = 1.0,
    ) -> EntryCache:
        """A zeroed cache: uint8 `[num_pages, page_bytes]`, and uint8 scales where the format keeps them apart."""
        check_int("num_pages", num_pages, 0, INT32_MAX)
        fmt = get_format(fmt)
        _check_layout(fmt, rows_per_page, spec)
        bytes_of = {"dtype": torch.uint8, "device": usable_device("device", device)}
        storage = torch.zeros(num_pages, fmt.page_bytes(spec, rows_per_page), **bytes_of)
        scales = torch.zeros(num_pages, rows_per_page * fmt.tail_bytes(spec), **bytes_of) if fmt.separate else None
        return cls(storage, fmt, rows_per_page, spec, scales=scales, scale=scale)

    @classmethod
    def from_blocks(
        cls,
        view: torch.Tensor,
        fmt: str | RecordFormat,
        spec: CompressorSpec,
        *,
        scales: torch.Tensor | None = None,
        scale: float | torch.Tensor = 1.0,
    ) -> EntryCache:
        """Wraps an engine's view of its blocks, `[blocks, rows, record]`: each block is a page of `rows` records.

        Args:
            view: of the dtypes that `EntryCache` takes. The page follows from the format, from `rows` and from the distance of
                blocks, `stride(0)`. That may be any that holds the records; padding after them is the engine's. Rows are
                dense. If tails come after the records of a page, the last size is only the engine's label, such as 584, and
                not used for addresses. Otherwise it is the bytes from one record to the next.
            scales, scale: as `EntryCache` takes them.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        fmt = get_format(fmt)
        check_memory("view", view, fake=True)
        if view.dim() != 3:
            raise ValueError(f"view must be [blocks, rows, record], got shape {list(view.shape)}")
        blocks, rows, _ = view.shape
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"view must have from 1 to {MOST_ROWS} rows in a block, got shape {list(view.shape)}")
        _check_layout(fmt, rows, spec)
        _check_page_dtype("view", view, fmt.element)
        sizes, item = f"got shape {list(view.shape)} and strides {tuple(view.stride())} of {view.dtype}", view.element_size()
        if view.stride(2) != 1 or (rows > 1 and view.stride(1) != view.shape[2]):
            raise ValueError(f"view must have dense rows, {sizes}")
        if not fmt.in_footer and view.shape[2] * item != fmt.row_bytes(spec):
            raise ValueError(f"view must have rows of {fmt.row_bytes(spec)} bytes in format {fmt.name!r}, {sizes}")
        used = fmt.used_bytes(spec, rows)
        if blocks > 1 and view.stride(0) * item < used:
            raise ValueError(f"view must have blocks that lie {used} bytes apart or more in format {fmt.name!r}, {sizes}")
        apart = view.stride(0) * item if blocks > 1 else used
        if address_of(view) % fmt.alignment or apart % fmt.alignment:
            raise ValueError(f"view must have blocks that start at a multiple of {fmt.alignment} bytes, {sizes}")
        if fmt.separate:
            check_memory("scales", scales, fake=True)
            if scales.shape[:1] != view.shape[:1]:
                raise ValueError(f"scales must have {blocks} pages like view, got {list(scales.shape)}")
        memory = view.detach().view(torch.uint8)
        if blocks and memory.storage_offset() + (blocks - 1) * apart + used > memory.untyped_storage().nbytes():
            raise ValueError(f"view must have {used} bytes of memory in its last block in format {fmt.name!r}, {sizes}")
        return cls(memory.as_strided((blocks, used), (apart, 1)), fmt, rows, spec, scales=scales, scale=scale)

    def _facts(self) -> Iterator[tuple[str, object]]:
        yield from (("format", self.format.name), ("head_dim", self.spec.head_dim), ("num_pages", self.num_pages))
        yield from (("rows_per_page", self.rows_per_page), ("num_slots", self.num_slots))
        yield from (("record_bytes", self.format.record_bytes(self.spec)), ("page_bytes", self.page_bytes))
        yield from (("dtype", dtype_name(self.storage)), ("device", self.device))
        if self.format.takes_scale:
            yield "scale", "a tensor" if isinstance(self.scale, torch.Tensor) else self.scale

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
        """Entries as numbers, dequantized.

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
        return unpack_records(self, slots.long())

    def raw(self, slot: int) -> dict[str, torch.Tensor]:
        """The named fields of one record, copied, in their own types.

        Returns:
            `values` (bf16, fp32 or e4m3 `[n]`; e2m1: uint8 codes 0..15, one per channel). Then, if the format has them:
            `rotated` (bf16 `[rope_dim]`), `scales` (fp32, e4m3, or uint8 ue8m0 codes, one or four per group), `pad` (uint8).
        """
        check_made("cache", self, EntryCache)
        check_int("slot", slot, 0, self.num_slots - 1)
        if self.device.type == "meta":
            raise ValueError("slot must be of a cache on a CPU or a GPU, got the meta device")
        return {name: field[0] for name, field in read_fields(self, torch.tensor([slot], device=self.device)).items()}


def _made_again(scales: torch.Tensor | None, scale: float | torch.Tensor, *rest: object) -> EntryCache:
    return EntryCache(*rest, scales=scales, scale=scale)  # type: ignore[arg-type]


def _check_layout(fmt: RecordFormat, rows_per_page: int, spec: CompressorSpec) -> None:
    check_spec("spec", spec)
    check_int("rows_per_page", rows_per_page, 1, MOST_ROWS)
    get_format(fmt).check(spec)


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


_INTEGERS = ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
_FLOATS = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "pow2": "float32",
    "e4m3": "float8_e4m3fn",
    "e2m1": "float4_e2m1fn_x2",
    "ue8m0": "float8_e8m0fnu",
    "ue8m0x4": "float8_e8m0fnu",
}


def _check_page_dtype(name: str, pages: torch.Tensor, encoding: str) -> None:
    """Checks that pages of this dtype can hold this encoding: integers hold any, floats must be of the encoding's dtype."""
    if pages.dtype not in [getattr(torch, dtype, None) for dtype in (*_INTEGERS, _FLOATS[encoding])]:
        raise TypeError(
            f"{name} must be of an integer dtype, as torch.uint8, or of torch.{_FLOATS[encoding]}, since it holds {encoding}, "
            f"got {pages.dtype}"
        )


def _byte_pages(name: str, storage: torch.Tensor, encoding: str, least: int, most: int, unit: int) -> torch.Tensor:
    """The pages as uint8 `[num_pages, n]`, n from `least` to `most`, checked to be dense, disjoint and aligned to `unit`."""
    _check_page_dtype(name, storage, encoding)
    if storage.dim() < 2:
        raise ValueError(f"{name} must have a page dimension and one more, got shape {list(storage.shape)}")
    num_pages, item = storage.shape[0], storage.element_size()
    if num_pages == 0:
        return torch.empty(0, most, dtype=torch.uint8, device=storage.device)
    have, dense = storage.numel() // num_pages, storage.is_contiguous()
    if have * item < least:
        raise ValueError(f"{name} must have at least {least} bytes per page, got {have * item}")
    if not dense and not storage[0].is_contiguous():
        raise ValueError(f"{name} must be dense within a page, got strides {tuple(storage.stride())}")
    if num_pages > 1 and storage.stride(0) < have:
        raise ValueError(f"{name} must have pages that do not overlap, got strides {tuple(storage.stride())}")
    if address_of(storage) % unit or (num_pages > 1 and storage.stride(0) * item % unit):
        raise ValueError(f"{name} must have pages that start at a multiple of {unit} bytes")
    flat = storage.detach()
    flat = flat.view(num_pages, have) if dense else flat.as_strided((num_pages, have), (storage.stride(0), 1))
    pages = flat.view(torch.uint8)
    if have * item > most:
        pages = pages[:, :most]
    check_memory(name, pages, fake=True)  # inside a transform of torch.func even a view of a plain tensor is not plain
    return pages
