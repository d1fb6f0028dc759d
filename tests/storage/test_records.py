"""Every record format, byte for byte, against the oracle: on each backend, on thresholds and random data, over whole pages."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import record_oracle as oracle
from support.helpers import Backend
from support.record_support import CASES, SCALED, SCALES, SPECS, Pages, permuted_slots, random_entries, write

import kvfold
from kvfold import CompressorSpec
from kvfold.storage.cache import EntryCache
from kvfold.storage.formats import FORMATS, get_format

ROWS_PER_PAGE = 7  # odd, so that tails and pages do not happen to be aligned


def test_tables_agree() -> None:
    """The library and the oracle know the same formats, with the same sizes."""
    assert list(FORMATS) == list(oracle.FORMATS)
    for name, hd in CASES:
        fmt, spec = FORMATS[name], SPECS[hd]
        fmt.check(spec)
        assert fmt.record_bytes(spec) == oracle.FORMATS[name]["record_bytes"][hd], name
        planes = fmt.values_bytes(spec) + fmt.rotated_bytes(spec), fmt.tail_bytes(spec)
        assert planes == oracle.FORMATS[name]["planes"][hd], name
        for rows in (1, 2, 7, 64):
            assert fmt.used_bytes(spec, rows) <= fmt.page_bytes(spec, rows) < fmt.used_bytes(spec, rows) + fmt.page_align
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
    with pytest.raises(TypeError, match=r"^fmt must be the name of a record format, or a RecordFormat, got int$"):
        get_format(8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^fake_quant must be one of"):
        get_format("fp7", "fake_quant")


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


OWN = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "pow2": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e2m1": getattr(torch, "float4_e2m1fn_x2", torch.uint8),
    "ue8m0": getattr(torch, "float8_e8m0fnu", torch.uint8),
    "ue8m0x4": getattr(torch, "float8_e8m0fnu", torch.uint8),
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
OTHERS = (
    torch.bool,
    torch.complex64,
    torch.float16,
    torch.float64,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_pages_of_other_dtypes(name: str, hd: int) -> None:
    """A tensor is taken as it is: integers or the format's own dtype, more dimensions, more bytes than a page needs."""
    fmt, spec = FORMATS[name], SPECS[hd]
    need = fmt.page_bytes(spec, 8)
    scales = torch.zeros(3, 8, fmt.tail_bytes(spec), dtype=torch.uint8) if fmt.separate else None
    for storage in (
        torch.zeros(3, need // 4, 2, dtype=torch.int16),
        torch.zeros(3, need + 64, dtype=torch.uint8).view(OWN[fmt.element]),
        torch.zeros(6, need // 8, dtype=torch.int64)[::2],
    ):
        cache = EntryCache(storage, name, 8, spec, scales=scales)
        assert cache.pages.shape == (3, need) and cache.pages.data_ptr() == storage.data_ptr()
        cache.pages[1] = 1
        assert int(storage[1].view(torch.uint8).sum()) == need
        assert not storage[0].view(torch.uint8).any() and not storage[2].view(torch.uint8).any()


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_numbers_of_another_kind_are_refused(name: str, hd: int) -> None:
    """A page of a floating dtype that is not the format's own would be read as other numbers by whoever made it."""
    fmt, spec = FORMATS[name], SPECS[hd]
    page = torch.zeros(2, fmt.page_bytes(spec, 8), dtype=torch.uint8)
    tail = torch.zeros(2, 8 * fmt.tail_bytes(spec), dtype=torch.uint8) if fmt.separate else None
    for of, encoding in (("storage", fmt.element), ("scales", fmt.scale)) if fmt.separate else (("storage", fmt.element),):
        for dtype in {*INTEGERS, *OTHERS, *OWN.values()}:
            given = {"storage": page, "scales": tail}
            given[of] = given[of].view(dtype)
            if dtype in (*INTEGERS, OWN[encoding]):
                EntryCache(given["storage"], name, 8, spec, scales=given["scales"])
                continue
            with pytest.raises(
                TypeError, match=rf"^{of} must be of an integer dtype.* {OWN[encoding]}.*{encoding}, got {dtype}$"
            ):
                EntryCache(given["storage"], name, 8, spec, scales=given["scales"])


@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_that_nothing_takes_is_refused(name: str) -> None:
    """A number that would be left out is refused; 1 goes everywhere, as an engine has one for each layer."""
    fmt = FORMATS[name]
    spec = SPECS[fmt.head_dims[0] if fmt.head_dims else 512]
    assert fmt.takes_scale == (name in SCALES)
    EntryCache.allocate(name, 1, 1, spec, scale=1)
    if fmt.takes_scale:
        assert EntryCache.allocate(name, 1, 1, spec, scale=0.5).scale == 0.5
    else:
        with pytest.raises(ValueError, match=rf"^scale must be 1: format '{name}'.*0\.5"):
            EntryCache.allocate(name, 1, 1, spec, scale=0.5)


@pytest.mark.parametrize("hd", [128, 512])
def test_fp8_tensor_and_trtllms(backend: Backend, hd: int) -> None:
    """One casts the value rounded to bf16, the other the value itself, as torch does; about 3 % of bytes are one apart."""
    n, spec = 64, SPECS[hd]
    y = torch.randn(n, hd, generator=torch.Generator().manual_seed(3))
    found = {}
    for name, values in (("fp8_tensor", y.bfloat16().float()), ("fp8_tensor_trtllm", y)):
        cache = EntryCache.allocate(name, n // 4, 4, spec, device=backend.device)
        write(backend, cache, list(range(n)), y.numpy())
        found[name] = cache.pages.view(n, hd).cpu()
        assert torch.equal(found[name], values.to(torch.float8_e4m3fn).view(torch.uint8)), name
    apart = (found["fp8_tensor"].int() - found["fp8_tensor_trtllm"].int()).abs()
    assert int(apart.max()) == 1 and 0.025 < float((apart == 1).float().mean()) < 0.037


@pytest.mark.parametrize(("name", "other"), [("bf16_trtllm", "bf16"), ("fp8_tensor_trtllm", None)])
def test_trtllms_rows_are_bf16_before_the_norm(backend: Backend, name: str, other: str | None) -> None:
    """Behind a norm whose weight is 1, without RoPE: torch's own cast of the normed bf16 row, and of the fp32 one elsewhere."""
    spec = CompressorSpec(128, 4, rope_dim=0)
    n, device = 16, backend.device
    rows = torch.randn(n, 128, generator=torch.Generator().manual_seed(5))
    ints = torch.arange(n, dtype=torch.int32, device=device)
    plan = kvfold.StepPlan.build(
        4, 4 * ints, torch.arange(n + 1, dtype=torch.int32, device=device) * 4, 4, state_slots=ints, entry_slots=ints.long()
    )
    dtype = torch.bfloat16 if FORMATS[name].element == "bf16" else torch.float8_e4m3fn
    for fmt, pooled in ((name, rows.bfloat16().float()), (other, rows)):
        if fmt is None:
            continue
        cache = EntryCache.allocate(fmt, 4, 4, spec, device=device)
        kvfold.store(
            rows.to(device), plan, cache, spec=spec, norm_weight=torch.ones(128, device=device), rope=None, backend=backend.name
        )
        exact = pooled.double() / (pooled.double().square().mean(1, keepdim=True) + spec.norm_eps).sqrt()
        got, want = cache.pages.view(n, -1).cpu(), exact.float().to(dtype).view(torch.uint8)
        # The norm is rounded a few times, which moves a code where a value is next to a tie.
        assert int((got != want).sum()) <= 4, fmt
        wrong = (rows if fmt == name else rows.bfloat16()).double()
        wrong = wrong / (wrong.square().mean(1, keepdim=True) + spec.norm_eps).sqrt()
        assert int((got != wrong.float().to(dtype).view(torch.uint8)).sum()) > 20, fmt
