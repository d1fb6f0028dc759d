"""Every record format, byte for byte, against the oracle: on each backend, on thresholds and random data, over whole pages."""

from __future__ import annotations

import numpy as np
import pytest
import record_oracle as oracle
import torch
from helpers import Backend
from record_support import CASES, SCALED, SPECS, Pages, permuted_slots, random_entries

from kvfold import CompressorSpec
from kvfold.records import FORMATS, EntryCache, get_format

ROWS_PER_PAGE = 7  # odd, so that tails and pages do not happen to be aligned


def test_tables_agree() -> None:
    """The library and the oracle know the same formats, with the same sizes."""
    assert list(FORMATS) == list(oracle.FORMATS)
    for name, hd in CASES:
        fmt, spec = FORMATS[name], SPECS[hd]
        fmt.check(spec)
        assert fmt.record_bytes(spec) == oracle.FORMATS[name]["record_bytes"][hd], name
        assert (fmt.row_bytes(spec), fmt.tail_bytes(spec)) == oracle.FORMATS[name]["planes"][hd], name
        for rows in (1, 2, 7, 64):
            sizes = [fmt.page_bytes(spec, rows)] + ([rows * fmt.tail_bytes(spec)] if fmt.separate else [])
            assert sizes == oracle.page_bytes(name, hd, rows), (name, hd, rows)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_refuse_other_shapes(name: str) -> None:
    fmt = FORMATS[name]
    for hd in (16, 128, 256, 512):
        for rope_dim in (0, 16):
            spec = CompressorSpec(hd, 4, rope_dim=rope_dim)
            wrong = (fmt.head_dims and hd not in fmt.head_dims) or (fmt.group and hd % fmt.group)
            if wrong or fmt.rope_dim not in (None, rope_dim):
                with pytest.raises(ValueError, match=f"{name}.*spec.(head_dim={hd}|rope_dim={rope_dim})"):
                    fmt.check(spec)
            else:
                fmt.check(spec)


def test_get_format() -> None:
    assert get_format("bf16") is FORMATS["bf16"] and get_format(FORMATS["mxfp4"]) is FORMATS["mxfp4"]
    with pytest.raises(ValueError, match=r"fp8_ds_mla_sglang.*'fp7'"):
        get_format("fp7")
    with pytest.raises(TypeError, match="fmt"):
        get_format(8)  # type: ignore[arg-type]


def test_slots_fit_32_bits() -> None:
    """By which kernels find the page of a slot; 4096 pages of 2**20 rows have one slot too many."""
    spec = CompressorSpec(16, 4, rope_dim=0)
    assert EntryCache.allocate("bf16", 4095, 1 << 20, spec, device="meta").num_slots == (1 << 32) - (1 << 20)
    with pytest.raises(ValueError, match=rf"\bstorage\b.*{1 << 32}"):
        EntryCache.allocate("bf16", 4096, 1 << 20, spec, device="meta")


@pytest.mark.parametrize(("name", "hd", "scale"), SCALED)
def test_thresholds(backend: Backend, name: str, hd: int, scale: float) -> None:
    """Every place where bytes change: scale thresholds, ties, signs, zeros, floors, saturation, 1e-45 to 1e38."""
    entries = oracle.threshold_cases(name, hd)
    if backend.slow:
        entries = entries[:: max(1, len(entries) // (150 if hd == 128 else 75))]
    pages = Pages(backend, name, SPECS[hd], 1, len(entries), scale=scale)
    slots = permuted_slots(len(entries), len(entries), 0)
    pages.write(slots, entries)
    pages.check(slots, entries)


@pytest.mark.parametrize(("name", "hd", "scale"), SCALED)
def test_random(backend: Backend, name: str, hd: int, scale: float) -> None:
    n = 24 if backend.slow else 2000
    pages = Pages(backend, name, SPECS[hd], -(-n // ROWS_PER_PAGE), ROWS_PER_PAGE, scale=scale)
    slots = permuted_slots(n, pages.cache.num_slots, 1)
    entries = random_entries(n, hd, 2)
    pages.write(slots, entries)
    pages.check(slots, entries)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(("name", "hd"), CASES)
def test_other_bytes_stay(backend: Backend, name: str, hd: int, inverted: bool) -> None:
    """Rows that are not written, pad bytes that a writer leaves, page padding, the gap between pages and what lies around.

    A third of the rows is written, then half of those again with other entries; the gap makes a page stride that is not a
    multiple of 16 bytes.
    """
    pages = Pages(backend, name, SPECS[hd], 4, ROWS_PER_PAGE, gap=20, inverted=inverted)
    slots = permuted_slots(9, pages.cache.num_slots, 3)
    assert len({slot // ROWS_PER_PAGE for slot in slots}) > 2
    first, second = random_entries(9, hd, 4), random_entries(9, hd, 5)
    pages.write(slots, first)
    pages.check(slots, first)
    pages.write(slots[:4], second[:4])
    pages.check(slots, np.concatenate([second[:4], first[4:]]))


@pytest.mark.parametrize(("name", "hd"), [(name, hd) for name, hd in CASES if FORMATS[name].element != "fp32"])
def test_pages_of_other_dtypes(name: str, hd: int) -> None:
    """An engine's tensor is taken as it is: its own dtype, more dimensions, more bytes than a page needs."""
    fmt, spec = FORMATS[name], SPECS[hd]
    need = fmt.page_bytes(spec, 8)
    scales = torch.zeros(3, 8, fmt.tail_bytes(spec), dtype=torch.uint8) if fmt.separate else None
    for storage in (
        torch.zeros(3, need // 4, 2, dtype=torch.int16),
        torch.zeros(3, need + 64, dtype=torch.float8_e4m3fn),
        torch.zeros(6, need // 8, dtype=torch.int64)[::2],
    ):
        cache = EntryCache(storage, name, 8, spec, scales=scales)
        assert cache.pages.shape == (3, need) and cache.pages.data_ptr() == storage.data_ptr()
        cache.pages[1] = 1
        assert int(storage[1].view(torch.uint8).sum()) == need
        assert not storage[0].view(torch.uint8).any() and not storage[2].view(torch.uint8).any()
