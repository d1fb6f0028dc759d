"""Record formats: the bytes that one entry becomes in a page of the cache; and `EntryCache`, pages with a format."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import check_device, check_int, check_type
from .spec import CompressorSpec


@dataclass(frozen=True)
class RecordFormat:
    """One record layout, to the byte. Offsets are relative to the page; `N` is the page's number of rows.

    Attributes:
        name: the public name.
        element: encoding of the quantized (or only) channels: `"bf16"`, `"fp32"` or `"e4m3"`.
        group: channels that share a scale; 0 when there are no scales.
        scale_floor: least scale; scales are powers of two, kept as ue8m0 (exponent + 127 in one byte).
        rotated_bf16: the last `rope_dim` channels are stored as bf16 behind the quantized ones.
        tail: bytes per row behind the last record of a page, where the scales are: one per group, then zero bytes.
        page_align: the page is rounded up to a multiple of this many bytes.
        head_dim, rope_dim: what the layout is defined for; None for any.
        source: whose bytes these are.
    """

    name: str
    element: str
    group: int = 0
    scale_floor: float = 0.0
    rotated_bf16: bool = False
    tail: int = 0
    page_align: int = 1
    head_dim: int | None = None
    rope_dim: int | None = None
    source: str = "kvfold"

    def check(self, spec: CompressorSpec) -> None:
        """Raises ValueError when the layout is not defined for `spec`."""
        for field in ("head_dim", "rope_dim"):
            want, have = getattr(self, field), getattr(spec, field)
            if want is not None and have != want:
                raise ValueError(f"format {self.name!r} is defined for {field}={want}, got spec.{field}={have}")

    def row_bytes(self, spec: CompressorSpec) -> int:
        """Bytes from one record to the next (without its share of the tail)."""
        quantized = spec.head_dim - (spec.rope_dim if self.rotated_bf16 else 0)
        size = {"bf16": 2, "fp32": 4, "e4m3": 1}[self.element]
        return quantized * size + (2 * spec.rope_dim if self.rotated_bf16 else 0)

    def page_bytes(self, spec: CompressorSpec, rows_per_page: int) -> int:
        """Bytes of a page of `rows_per_page` records, padding included."""
        used = (self.row_bytes(spec) + self.tail) * rows_per_page
        return -(-used // self.page_align) * self.page_align


FORMATS: dict[str, RecordFormat] = {
    fmt.name: fmt
    for fmt in (
        RecordFormat("bf16", element="bf16", source="plain rows: DeepSeek reference, vLLM, SGLang, transformers"),
        RecordFormat("fp32", element="fp32", source="plain rows"),
        # Floor on the scale, not on amax: the smallest code is 114. Page padding as vLLM's allocator has it.
        RecordFormat(
            "fp8_ds_mla",
            element="e4m3",
            group=64,
            scale_floor=1e-4,
            rotated_bf16=True,
            tail=8,
            page_align=576,
            head_dim=512,
            rope_dim=64,
            source="vLLM, default CUDA writer",
        ),
    )
}


def get_format(fmt: str | RecordFormat) -> RecordFormat:
    """The format of that name (or `fmt` itself). Raises ValueError listing the known names."""
    if isinstance(fmt, RecordFormat):
        return fmt
    check_type("fmt", fmt, str)
    if fmt not in FORMATS:
        raise ValueError(f"fmt must be one of {sorted(FORMATS)}, got {fmt!r}")
    return FORMATS[fmt]


class EntryCache:
    """Pages of records. Slot `s` is row `s % rows_per_page` of page `s // rows_per_page`.

    Attributes:
        storage: the tensor given, `[num_pages, ...]`.
        pages: the same memory as uint8 `[num_pages, page_bytes]`.
        format, spec, rows_per_page, page_bytes.
    """

    def __init__(self, storage: torch.Tensor, fmt: str | RecordFormat, rows_per_page: int, spec: CompressorSpec) -> None:
        """Wraps an engine's page tensor.

        Args:
            storage: `[num_pages, ...]` of any dtype. Each page is dense and has at least the format's page bytes; pages
                may lie further apart than that.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_type("storage", storage, torch.Tensor)
        check_type("spec", spec, CompressorSpec)
        check_int("rows_per_page", rows_per_page, 1, 1 << 20)
        self.format = get_format(fmt)
        self.format.check(spec)
        self.spec = spec
        self.rows_per_page = rows_per_page
        self.page_bytes = self.format.page_bytes(spec, rows_per_page)
        if storage.dim() < 2:
            raise ValueError(f"storage must have a page dimension and one more, got shape {list(storage.shape)}")
        self.storage = storage
        self.pages = _byte_pages(storage, self.page_bytes)
        unit = {"bf16": 2, "fp32": 4, "e4m3": 2}[self.format.element]
        if self.pages.data_ptr() % unit or (self.num_pages > 1 and self.pages.stride(0) % unit):
            raise ValueError(f"storage must have pages that start at a multiple of {unit} bytes")

    @classmethod
    def allocate(
        cls,
        fmt: str | RecordFormat,
        num_pages: int,
        rows_per_page: int,
        spec: CompressorSpec,
        *,
        device: torch.device | str | None = None,
    ) -> EntryCache:
        """A zeroed cache: uint8 `[num_pages, page_bytes]`."""
        check_type("spec", spec, CompressorSpec)
        check_int("num_pages", num_pages, 0, (1 << 31) - 1)
        check_int("rows_per_page", rows_per_page, 1, 1 << 20)
        page_bytes = get_format(fmt).page_bytes(spec, rows_per_page)
        storage = torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device=device)
        return cls(storage, fmt, rows_per_page, spec)

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
        check_type("slots", slots, torch.Tensor)
        if slots.dtype not in (torch.int32, torch.int64) or slots.dim() != 1:
            raise ValueError(f"slots must be int32 or int64 [n], got {slots.dtype} {list(slots.shape)}")
        check_device("slots", slots, self.device)
        if slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= self.num_slots):
            raise ValueError(f"slots must be from 0 to {self.num_slots - 1}, got {int(slots.min())}..{int(slots.max())}")
        from .pack import unpack_records  # pack.py needs this module's types

        return unpack_records(self, slots.long())


def _byte_pages(storage: torch.Tensor, page_bytes: int) -> torch.Tensor:
    num_pages, item = storage.shape[0], storage.element_size()
    have = storage[:1].numel() * item if num_pages else page_bytes
    if have < page_bytes:
        raise ValueError(f"storage must have at least {page_bytes} bytes per page, got {have}")
    dense = 1
    for size, stride in zip(reversed(storage.shape[1:]), reversed(storage.stride()[1:]), strict=True):
        if size > 1 and stride != dense:
            raise ValueError(f"storage must be dense within a page, got strides {tuple(storage.stride())}")
        dense *= size
    if num_pages > 1 and storage.stride(0) < dense:
        raise ValueError(f"storage must have pages that do not overlap, got strides {tuple(storage.stride())}")
    if num_pages == 0:
        return torch.empty(0, page_bytes, dtype=torch.uint8, device=storage.device)
    flat = storage.as_strided((num_pages, dense), (storage.stride(0), 1))
    return flat.view(torch.uint8)[:, :page_bytes]
