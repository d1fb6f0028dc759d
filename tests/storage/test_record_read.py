"""`EntryCache.read` and `raw` against a dequantization of the oracle's bytes in fp64, and what the cache refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import record_oracle as oracle
from support.helpers import Backend
from support.record_support import CASES, SCALED, SPECS, Pages, dequantized, fields, permuted_slots, random_entries

import kvfold
from kvfold.storage.cache import EntryCache
from kvfold.storage.formats import FORMATS

ROWS_PER_PAGE = 5
N = 12


def some_entries(name: str, hd: int) -> np.ndarray:
    """Random ones and thresholds whose values fit fp32 when they are read back."""
    cases = oracle.threshold_cases(name, hd)
    cases = cases[np.abs(cases).max(axis=1) < 1e37]
    return np.concatenate([random_entries(N // 2, hd, 11), cases[:: len(cases) // (N // 2)][: N // 2]])


@pytest.mark.parametrize(("name", "hd", "scale"), SCALED)
def test_read(backend: Backend, name: str, hd: int, scale: float) -> None:
    """The fp64 value rounded once; with a global factor, two roundings: 2^-23 is a unit in the last place at the worst."""
    entries = some_entries(name, hd)
    slots = permuted_slots(N, 3 * ROWS_PER_PAGE, 12)
    pages = Pages(backend, name, SPECS[hd], 3, ROWS_PER_PAGE, gap=20, scale=scale)
    pages.write(slots, entries)
    want = dequantized(name, entries, scale)
    order = [7, 0, 0, 11, 3]  # repeated and in any order
    for dtype in (torch.int32, torch.int64):
        at = torch.tensor([slots[i] for i in order], dtype=dtype, device=backend.device)
        got = pages.cache.read(at)
        assert got.dtype == torch.float32 and got.shape == (len(order), hd) and got.device == at.device
        got = got.cpu().numpy()
        if name == "nvfp4_trtllm" and scale != 1:
            assert (np.abs(got - want[order]) <= 2.0**-23 * np.abs(want[order])).all()
        else:
            # As bits, so that -0 counts.
            assert (got.view(np.int32) == want[order].astype(np.float32).view(np.int32)).all()
    assert pages.cache.read(torch.empty(0, dtype=torch.int64, device=backend.device)).shape == (0, hd)


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_raw(backend: Backend, name: str, hd: int) -> None:
    """Field names in order, dtypes, shapes and bytes, copied out of the page."""
    fmt, entries = FORMATS[name], some_entries(name, hd)
    slots = permuted_slots(N, 3 * ROWS_PER_PAGE, 13)
    pages = Pages(backend, name, SPECS[hd], 3, ROWS_PER_PAGE)
    pages.write(slots, entries)
    want = fields(name, entries, 1.0)
    if fmt.pad and not fmt.pad_written:
        page, row = slots[4] // ROWS_PER_PAGE, slots[4] % ROWS_PER_PAGE
        at = oracle.places(name, hd, ROWS_PER_PAGE)[1][row, -fmt.pad :]
        want["pad"] = np.tile(pages.cache.pages[page].cpu().numpy()[at], (N, 1))  # the pattern
    got = pages.cache.raw(slots[4])
    assert list(got) == [key for key in ("values", "rotated", "scales", "pad") if key in want]
    values = {"bf16": torch.bfloat16, "fp32": torch.float32, "e4m3": torch.float8_e4m3fn, "e2m1": torch.uint8}[fmt.element]
    kinds = {"ue8m0": torch.uint8, "ue8m0x4": torch.uint8, "e4m3": torch.float8_e4m3fn}
    scales = kinds.get(fmt.scale, torch.float32)
    dtypes = {"values": values, "rotated": torch.bfloat16, "scales": scales, "pad": torch.uint8}
    before = pages.now()
    for key, field in got.items():
        assert field.dtype == dtypes[key] and field.shape == want[key][4].shape, key
        assert (field.view(torch.uint8).cpu().numpy() == want[key][4].view(np.uint8)).all(), key
        field.view(torch.uint8).fill_(255)  # a copy: the page stays
    assert all((a == b).all() for a, b in zip(before, pages.now(), strict=True))


def make(name: str = "fp8_ds_mla", hd: int = 512, **kw: object) -> EntryCache:
    return EntryCache.allocate(name, 2, 4, SPECS[hd], **kw)  # type: ignore[arg-type]


def test_read_refuses() -> None:
    cache = make()
    for slots, error in (
        ([0], TypeError),
        (torch.tensor([0.0]), ValueError),
        (torch.tensor([True]), ValueError),
        (torch.tensor([0], dtype=torch.int16), ValueError),
        (torch.tensor([[0]]), ValueError),
        (torch.tensor([8]), ValueError),
        (torch.tensor([3, -1]), ValueError),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError),
    ):
        with pytest.raises(error, match="slots"):
            cache.read(slots)  # type: ignore[arg-type]
    for slot, error in ((8, ValueError), (-1, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="slot"):
            cache.raw(slot)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"slot.*meta device"):
        make(device="meta").raw(0)


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_allocate(name: str, hd: int) -> None:
    cache = make(name, hd)
    sizes = oracle.page_bytes(name, hd, 4)
    assert (cache.page_bytes, cache.num_pages, cache.num_slots, cache.rows_per_page) == (sizes[0], 2, 8, 4)
    assert cache.storage.shape == (2, sizes[0]) and cache.storage.dtype == torch.uint8 and not cache.storage.any()
    assert (cache.scales is None) == (len(sizes) == 1)
    if cache.scales is not None:
        assert cache.scales.shape == (2, sizes[1]) and cache.scales.dtype == torch.uint8 and not cache.scales.any()
    empty = EntryCache.allocate(name, 0, 4, SPECS[hd])
    assert empty.num_slots == 0 and empty.read(torch.empty(0, dtype=torch.int64)).shape == (0, hd)


def test_cache_refuses() -> None:
    spec, pages = kvfold.V4_CSA, torch.zeros(2, 2880, dtype=torch.uint8)
    mxfp4 = torch.zeros(2, 4 * 256, dtype=torch.uint8)
    good = torch.zeros(2, 4 * 16, dtype=torch.uint8)
    base = {"storage": pages, "fmt": "fp8_ds_mla", "rows_per_page": 4, "spec": spec}
    apart = {**base, "fmt": "mxfp4", "storage": mxfp4, "scales": good}
    EntryCache(**base)  # type: ignore[arg-type]
    EntryCache(**apart)  # type: ignore[arg-type]
    for arguments, error, message in (
        ({**base, "storage": [1]}, TypeError, "storage"),
        ({**base, "fmt": "fp7"}, ValueError, "fmt"),
        ({**base, "rows_per_page": 0}, ValueError, "rows_per_page"),
        ({**base, "rows_per_page": 5}, ValueError, "storage.*bytes per page"),
        ({**base, "spec": None}, TypeError, "spec"),
        ({**base, "spec": kvfold.V4_INDEXER}, ValueError, "spec.head_dim=128"),
        ({**base, "storage": pages.flatten()}, ValueError, "storage.*page dimension"),
        ({**base, "storage": pages[:, ::2]}, ValueError, "storage"),
        ({**base, "storage": pages.flatten()[1:-2879].expand(2, 2880)}, ValueError, "storage"),
        ({**base, "storage": torch.zeros(2, 2881, dtype=torch.uint8)}, ValueError, "storage.*multiple of 2 bytes"),
        ({**base, "storage": torch.zeros(5761, dtype=torch.uint8)[1:].view(2, 2880)}, ValueError, "storage.*multiple of 2"),
        ({**base, "scales": good}, ValueError, "scales must be None"),
        ({**apart, "scales": None}, TypeError, "scales"),
        ({**apart, "scales": good[:1]}, ValueError, "scales.*2 pages"),
        ({**apart, "scales": good[:, 1:]}, ValueError, "scales.*64 bytes per page"),
        ({**apart, "scales": good.to("meta")}, ValueError, "scales"),
        *(({**base, "scale": scale}, ValueError, "scale must be") for scale in (0.0, -1.0, float("inf"), float("nan"))),
        # Not numbers that the kernels' fp32 holds with full precision.
        *(({**base, "scale": scale}, ValueError, "scale must be") for scale in (1e39, 1e-39, 1e-50)),
    ):
        with pytest.raises(error, match=message):
            EntryCache(**arguments)  # type: ignore[arg-type]
