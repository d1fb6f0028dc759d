"""Record formats of a user's own: refused when they are made, naming the field; or stored and read right on every backend."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from math import inf, nan
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import BACKENDS
from hypothesis import event, given, settings
from hypothesis import strategies as st
from support.helpers import CANARY, Backend, Weights, make_tokens
from support.record_oracle import through_fp4, to_bf16
from support.record_support import SPECS, write

import kvfold
from kvfold import CompressorSpec
from kvfold.storage.cache import EntryCache
from kvfold.storage.formats import FORMATS, RecordFormat

NAMES = [field.name for field in fields(RecordFormat)]
E4M3 = {"name": "mine", "source": "me", "element": "e4m3", "group": 32, "scale": "ue8m0", "floor": 1e-4}
BITS = {"bf16": 16, "fp32": 32, "e4m3": 8, "e2m1": 4}
TOP = {"e4m3": 448.0, "e2m1": 6.0}
WIDTH = {"ue8m0": 1, "ue8m0x4": 4, "e4m3": 1, "pow2": 4, "fp32": 4}

# What one field of a good format is changed to, by the field that the error names.
NONSENSE: list[tuple[str, dict[str, Any]]] = [
    *[("name", {"name": bad}) for bad in (None, 3, "", b"mine")],
    *[("source", {"source": bad}) for bad in (None, 3)],
    *[("element", {"element": bad}) for bad in ("fp8", "", None, 8, ["e4m3"])],
    *[("scale", {"scale": bad}) for bad in ("e5m2", "none", None, 1.0, torch.ones(1))],
    *[("floor_on", {"floor_on": bad}) for bad in ("max", None, True)],
    *[("group", {"group": bad}) for bad in (0, -32, 24, 8192, True, 32.0, None, "32")],
    *[
        ("floor", {"floor": bad})
        for bad in (0.0, -1e-4, nan, inf, 1e-40, 1e39, 10**400, True, "1e-4", None, torch.tensor(1e-4))
    ],
    *[("pad", {"pad": bad}) for bad in (-1, True, 1.0, 1 << 20)],
    *[("page_align", {"page_align": bad}) for bad in (0, -576, True, 576.0, 1 << 40)],
    *[
        ("head_dims", {"head_dims": bad})
        for bad in ([128], 128, (0,), (True,), (128.0,), (96,), (8192,), (16,), ("128",), None)
    ],
    *[("rope_dim", {"rope_dim": bad}) for bad in (-2, 7, 64.0, True, 8192, "64")],
    *[
        (name, {name: bad})
        for name in ("rotated_bf16", "pad_written", "separate", "interleaved", "nearest_scale", "divide")
        for bad in (1, None, "yes")
    ],
    *[
        (name, {name: bad})
        for name in ("round_rows", "round_normed", "round_values", "ties_to_zero", "unsigned_zero", "zero_small")
        for bad in (0, None, "no")
    ],
    *[("fp4_first", {"round_values": True, "fp4_first": bad}) for bad in (None, True, "fp4", "e2m1", 16)],
    ("fp4_first", {"fp4_first": "nvfp4"}),  # of values that are not rounded to bf16
    ("head_dims", {"head_dims": (16,), "group": 16, "round_values": True, "fp4_first": "mxfp4"}),  # half a group of 32
    ("interleaved", {"interleaved": True, "separate": True}),
    *[(name, {name: True}) for name in ("ties_to_zero", "unsigned_zero", "nearest_scale")],  # of e4m3, which has no such rule
    ("nearest_scale", {"element": "e2m1", "scale": "fp32", "nearest_scale": True}),
    ("zero_small", {"zero_small": True}),
    ("zero_small", {"scale": "e4m3", "floor_on": "scale", "floor": 2**-9, "divide": True, "zero_small": True}),
    ("divide", {"divide": True}),  # a power of two is multiplied by its inverse
    ("divide", {"scale": "fp32", "divide": True}),
    ("divide", {"scale": "e4m3", "floor_on": "scale", "floor": 2**-9}),
    ("floor", {"scale": "e4m3", "floor_on": "scale", "divide": True}),  # 1e-4 is no e4m3
    ("floor", {"scale": "e4m3", "floor_on": "scale", "divide": True, "floor": 449.0}),
    ("floor", {"scale": "fp32", "floor_on": "scale", "floor": 0.0}),
    ("floor", {"floor": 447 * 2.0**-126}),  # its scale is no normal number
    ("pad", {"scale": "fp32", "pad": 2}),  # the next tail would not start at a multiple of 4
    ("pad", {"pad": 3, "pad_written": True}),
    ("page_align", {"scale": "fp32", "page_align": 6}),
    ("page_align", {"rotated_bf16": True, "page_align": 3}),
    ("head_dims", {"head_dims": (128,), "rotated_bf16": True, "rope_dim": 16}),  # a group across the border
    ("head_dims", {"head_dims": (128,), "rotated_bf16": True, "rope_dim": 128}),  # nothing is left
    ("head_dims", {"head_dims": (64,), "rope_dim": 128}),
    ("head_dims", {"head_dims": (64,), "rotated_bf16": True, "rope_dim": 34, "group": 2, "scale": "fp32"}),  # rows of 98 bytes
    *[("group", {"element": element, "scale": "none", "floor": 0.0}) for element in ("bf16", "fp32")],
    *[("scale", {"element": "bf16", "group": 0, "floor": 0.0, "scale": scale}) for scale in ("ue8m0", "fp32", "static")],
    *[("group", {"scale": "static", "floor": 0.0})],
    *[("floor", {"scale": "static", "group": 0})],
    *[
        (name, {"element": element, "scale": scale, "group": 0, "floor": 0.0, name: bad})
        for element, scale in (("bf16", "none"), ("fp32", "none"), ("e4m3", "static"))
        for name, bad in (
            ("floor_on", "scale"),
            ("pad", 1),
            ("pad_written", True),
            ("separate", True),
            ("divide", True),
            ("interleaved", True),
            ("zero_small", True),
        )
    ],
    *[
        (name, {"element": element, "scale": "none", "group": 0, "floor": 0.0, name: True})
        for element in ("bf16", "fp32")
        for name in ("rotated_bf16", "round_values", "ties_to_zero", "unsigned_zero")
    ],
]


@pytest.mark.parametrize(("name", "changed"), NONSENSE, ids=lambda x: x if isinstance(x, str) else str(x)[:60])
def test_nonsense_is_refused(name: str, changed: dict[str, Any]) -> None:
    """When it is made, also from a format that makes sense; the error begins with the field."""
    good = RecordFormat(**E4M3)
    for make in (lambda: RecordFormat(**E4M3 | changed), lambda: replace(good, **changed)):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must .*(, got |: )"):
            make()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_the_table_can_be_changed(name: str) -> None:
    """`dataclasses.replace` with the same fields is the same format; with another name and page padding a good one."""
    fmt = FORMATS[name]
    assert replace(fmt) == fmt and hash(replace(fmt)) == hash(fmt) and replace(fmt, floor=fmt.floor) == fmt
    mine = replace(fmt, name="mine", source="", page_align=4096, round_rows=not fmt.round_rows)
    assert mine.page_bytes(SPECS[fmt.head_dims[0] if fmt.head_dims else 512], 3) % 4096 == 0
    assert isinstance(replace(fmt, floor=1, floor_on="amax", divide=False).floor if fmt.group else 0.0, float)


def test_specs_that_do_not_fit_are_refused() -> None:
    rotated = RecordFormat(**E4M3, rotated_bf16=True)
    # Its tail has 2 bytes here, whatever it would have for another rope_dim.
    RecordFormat(**E4M3, rotated_bf16=True, pad=1, head_dims=(128,)).check(CompressorSpec(128, 4, rope_dim=96))
    odd = RecordFormat("odd", "me", "e2m1", 1, "ue8m0", 1e-4, rotated_bf16=True)
    for fmt, spec in (
        (rotated, CompressorSpec(16, 4, rope_dim=0)),
        (rotated, CompressorSpec(64, 4, rope_dim=16)),
        (rotated, CompressorSpec(64, 4, rope_dim=64)),
        (odd, CompressorSpec(64, 4, rope_dim=2)),  # bf16 would start at an odd byte
        (replace(rotated, scale="pow2", group=2), CompressorSpec(64, 4, rope_dim=2)),  # fp32 scales behind 3 rows of 66 bytes
        (replace(rotated, pad=1), CompressorSpec(128, 4, rope_dim=64)),  # pages of 3 * 195 bytes, with bf16 in them
    ):
        with pytest.raises(ValueError, match=rf"format '{fmt.name}' .*spec\.(rope_dim|head_dim)="):
            EntryCache.allocate(fmt, 1, 3, spec)


def test_tails_that_kernels_cannot_find_are_refused() -> None:
    """They find the tails of a page in 32 bits."""
    fmt, spec = RecordFormat(**E4M3), CompressorSpec(4096, 4)
    EntryCache.allocate(fmt, 1, (1 << 19) - 1, spec, device="meta")
    EntryCache.allocate(replace(fmt, separate=True), 1, 1 << 19, spec, device="meta")
    with pytest.raises(ValueError, match=rf"^rows_per_page must .*got {1 << 19}"):
        EntryCache.allocate(fmt, 1, 1 << 19, spec, device="meta")


@pytest.mark.parametrize("of", ["storage", "scales"])
def test_pages_are_aligned_to_their_widest_field(of: str) -> None:
    """fp32 scales in a buffer of their own start at a multiple of 4 bytes, and so do rows of fp32."""
    fmt = RecordFormat("mine", "me", "fp32") if of == "storage" else RecordFormat(**E4M3 | {"scale": "fp32"}, separate=True)
    spec = CompressorSpec(32, 4, rope_dim=0)
    assert fmt.alignment == (4 if of == "storage" else 1)
    at = torch.zeros(4096, dtype=torch.uint8)[1:2049].view(2, 1024)
    good = {"storage": torch.zeros(2, 1024, dtype=torch.uint8), "scales": torch.zeros(2, 1024, dtype=torch.uint8)}
    good = good if fmt.separate else {"storage": good["storage"]}
    EntryCache(fmt=fmt, rows_per_page=2, spec=spec, **good)
    with pytest.raises(ValueError, match=f"^{of} must have pages that start at a multiple of 4 bytes"):
        EntryCache(fmt=fmt, rows_per_page=2, spec=spec, **good | {of: at})


# ---- what is accepted, works -------------------------------------------------------------------------------------------------

HEAD_DIMS = (16, 32, 64, 128)
ROWS_PER_PAGE, NUM_PAGES, SLOTS = 3, 3, [7, 0, 5]
FLOORS = (0.0, 2.0**-126, 6 * 2.0**-126, 448 * 2.0**-126, 1e-8, 1e-4, 2.0**-9, 2.0**-13 * (1 + 2.0**-25), 0.3, 5.0, 448.0, 1e20)
SPOILED = (
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    24,
    64,
    -1,
    0.5,
    nan,
    1 << 40,
    "",
    "e4m3",
    "e2m1",
    "bf16",
    "scale",
    "static",
    "pow2",
    (16,),
)


@st.composite
def drawn_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Fields that often go together; in a third of the draws one of them is spoiled."""
    element = draw(st.sampled_from(["e4m3", "e2m1", "e4m3", "e2m1", "e4m3", "e2m1", "bf16", "fp32"]))
    flags = {name: draw(st.booleans()) for name in ("round_rows", "round_normed")}
    flags["page_align"] = draw(st.sampled_from([1, 1, 4, 12, 64, 576]))
    found: dict[str, Any] = {"name": "mine", "source": "me", "element": element, **flags}
    if element in TOP:
        found["scale"] = draw(st.sampled_from(["static", "ue8m0", "ue8m0x4", "pow2", "fp32", "e4m3", "e4m3"]))
        found |= {"round_values": draw(st.booleans()), "rotated_bf16": draw(st.booleans())}
        found |= {name: element == "e2m1" and draw(st.booleans()) for name in ("ties_to_zero", "unsigned_zero")}
        found["fp4_first"] = draw(st.sampled_from(["", "", "nvfp4", "mxfp4"])) if found["round_values"] else ""
        if found["scale"] != "static":
            found |= {"group": 2 ** draw(st.integers(0, 6)), "floor": draw(st.sampled_from(FLOORS))}
            found |= {"floor_on": draw(st.sampled_from(["amax", "scale"])), "separate": draw(st.booleans())}
            found |= {"pad": draw(st.sampled_from([0, 0, 1, 2, 4, 8, 12])), "pad_written": draw(st.booleans())}
            found["interleaved"] = not found["separate"] and draw(st.booleans())
            found["divide"] = found["scale"] == "e4m3" and found["floor_on"] == "scale"
            found["zero_small"] = found["scale"] == "e4m3" and found["floor_on"] == "amax" and draw(st.booleans())
            powers = found["scale"] in ("ue8m0", "ue8m0x4", "pow2")
            found["nearest_scale"] = element == "e2m1" and powers and draw(st.booleans())
    if draw(st.integers(0, 2)) == 0:
        found[draw(st.sampled_from(NAMES))] = draw(st.sampled_from(SPOILED))
    return found


def buffers_of(cache: EntryCache) -> list[torch.Tensor]:
    return [cache.pages] + ([] if cache.scale_pages is None else [cache.scale_pages])


def guarded(fmt: RecordFormat, spec: CompressorSpec, backend: Backend, fill: int) -> tuple[EntryCache, list[torch.Tensor]]:
    """A cache of bytes `fill`, and its buffers with canaries on both sides."""
    like = EntryCache.allocate(fmt, NUM_PAGES, ROWS_PER_PAGE, spec)
    wholes, inner = [], []
    for buffer in buffers_of(like):
        whole = torch.full((buffer.numel() + 512,), CANARY, dtype=torch.uint8, device=backend.device)
        whole[256:-256] = fill
        wholes.append(whole)
        inner.append(whole[256:-256].view(NUM_PAGES, -1))
    cache = EntryCache(inner[0], fmt, ROWS_PER_PAGE, spec, scales=(inner + [None])[1])
    return cache, wholes


def places(fmt: RecordFormat, spec: CompressorSpec) -> tuple[list[int], np.ndarray, np.ndarray]:
    """From the fields alone: bytes of a page in each buffer, and where the bytes of SLOTS are, `[3, n]` into all pages.

    Of a row, and of its tail in the last buffer with the pad at its end.
    """
    q = spec.head_dim - (spec.rope_dim if fmt.rotated_bf16 else 0)
    values = q * BITS[fmt.element] // 8
    row = values + 2 * (spec.head_dim - q)
    tail = q // fmt.group * WIDTH[fmt.scale] + fmt.pad if fmt.group else 0
    sizes = [ROWS_PER_PAGE * row] + ([ROWS_PER_PAGE * tail] if fmt.separate else [])
    sizes[0] = -(-(sizes[0] if fmt.separate else ROWS_PER_PAGE * (row + tail)) // fmt.page_align) * fmt.page_align
    page, at = np.divmod(np.array(SLOTS)[:, None], ROWS_PER_PAGE)
    if fmt.interleaved:
        start, inside = page * sizes[0] + at * (row + tail), np.arange(row)
        return sizes, start + inside + np.where(inside < values, 0, tail), start + values + np.arange(tail)
    rows = page * sizes[0] + at * row + np.arange(row)
    return sizes, rows, page * sizes[-1] + at * tail + np.arange(tail) + (0 if fmt.separate else ROWS_PER_PAGE * row)


def decode(fmt: RecordFormat, spec: CompressorSpec, row: np.ndarray, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the bytes of rows and tails mean in fp64, `[n, head_dim]`; and the scale of each channel that has one."""
    n, q = len(row), spec.head_dim - (spec.rope_dim if fmt.rotated_bf16 else 0)
    if fmt.element not in TOP:
        values = row.copy().view(ml_dtypes.bfloat16 if fmt.element == "bf16" else "<f4").astype(np.float64)
        return values, np.ones((n, 0))
    size = q * BITS[fmt.element] // 8
    codes = row[:, :size].copy()
    if fmt.element == "e4m3":
        values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    else:
        pairs = np.stack([codes & 15, codes >> 4], axis=2).reshape(n, q)
        values = pairs.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = np.ones((n, q))
    if fmt.group:
        found = tail[:, : q // fmt.group * WIDTH[fmt.scale]].copy()
        if fmt.scale == "ue8m0x4":
            assert (found.reshape(n, -1, 4) == found[:, ::4, None]).all()
            found = found[:, ::4]
        kinds = {"e4m3": ml_dtypes.float8_e4m3fn, "pow2": "<f4", "fp32": "<f4"}
        found = found.view(kinds.get(fmt.scale, np.uint8)).astype(np.float64)
        scales = np.repeat(2.0 ** (found - 127) if fmt.scale not in kinds else found, fmt.group, axis=1)
    rotated = row[:, size:].copy().view(ml_dtypes.bfloat16).astype(np.float64)
    return np.concatenate([values * scales, rotated], axis=1), scales


def check_close(fmt: RecordFormat, x: np.ndarray, got: np.ndarray, scales: np.ndarray) -> None:
    """Scales are what the fields say of the entries `x`, and values are off by half a step of the element at the most."""
    if fmt.fp4_first:
        x = through_fp4(to_bf16(x.astype(np.float32)), fmt.fp4_first).astype(np.float64)
    exact = {"bf16": 2.0**-8, "fp32": 0.0}.get(fmt.element, 2.0**-8)
    q = scales.shape[1]
    assert (np.abs(got - x)[:, q:] <= np.abs(x[:, q:]) * exact).all()
    if not q:
        return
    x, got, top = x[:, :q], got[:, :q], TOP[fmt.element]
    if fmt.group:
        amax = np.repeat(np.abs(x).reshape(len(x), -1, fmt.group).max(axis=2), fmt.group, axis=1)
        least = np.maximum(amax, fmt.floor) / top if fmt.floor_on == "amax" else np.maximum(amax / top, fmt.floor)
        near = 2.0**-8 if fmt.round_values else 2.0**-20
        if fmt.nearest_scale:
            assert (np.log2(scales) % 1 == 0).all() and (np.abs(np.log2(scales / least)) <= 0.5 + near).all()
        elif fmt.scale in ("ue8m0", "ue8m0x4", "pow2"):
            assert (np.log2(scales) % 1 == 0).all()
            assert (scales >= least * (1 - near)).all() and (scales < 2 * least * (1 + near)).all()
        elif fmt.scale == "fp32":
            assert (np.abs(scales - least) <= near * least).all()
        else:
            least = np.minimum(least, 448.0)
            assert (np.abs(scales - least) <= np.maximum(least / 15, 2.0**-10) + near * least).all()
    beyond = np.maximum(np.abs(x) - top * scales, 0)  # saturates
    step = np.maximum(np.abs(x) / 15, scales * 2.0**-10) if fmt.element == "e4m3" else np.maximum(np.abs(x) / 2.9, scales / 4)
    assert (np.abs(got - x) <= beyond + step * 1.01 + np.abs(x) * 2.0**-8).all()


def check_works(fmt: RecordFormat, spec: CompressorSpec, seed: int, backends: list[Backend]) -> None:
    """All backends store the same bytes, in their records and nowhere else, and read what the bytes mean, near the entries."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((len(SLOTS), spec.head_dim)) * 2.0 ** rng.integers(-12, 6, (len(SLOTS), 1))).astype(np.float32)
    x[0, rng.integers(0, spec.head_dim, 3)] = [0.0, -0.0, 1e-30]
    x[1, : spec.head_dim // 2] = 0
    sizes, rows, tails = places(fmt, spec)
    stored = []
    for backend in backends:
        for fill in (0x00, 0xFF):
            cache, wholes = guarded(fmt, spec, backend, fill)
            assert [buffer.shape[1] for buffer in buffers_of(cache)] == sizes
            write(backend, cache, SLOTS, x)
            after = [whole.cpu().numpy() for whole in wholes]
            untouched = [np.full_like(one, CANARY) for one in after]
            for one, inner in zip(untouched, buffers_of(cache), strict=True):
                one[256:-256] = fill
                assert one.size == inner.numel() + 512
            kept = tails.shape[1] - (0 if fmt.pad_written else fmt.pad)
            for one, want in zip(after, untouched, strict=True):
                if want is untouched[0]:
                    want[256 + rows] = one[256 + rows]
                if want is untouched[-1]:
                    want[256 + tails[:, :kept]] = one[256 + tails[:, :kept]]
                assert (one == want).all(), "a byte outside of the records"
            row, tail = after[0][256 + rows], after[-1][256 + tails]
            if fmt.pad and fmt.pad_written:
                assert not tail[:, -fmt.pad :].any()
            stored.append((backend.name, row, tail[:, :kept]))
        at = torch.tensor(SLOTS, device=backend.device)
        want, scales = decode(fmt, spec, row, tail)
        assert np.array_equal(cache.read(at).cpu().numpy().view(np.int32), want.astype(np.float32).view(np.int32))
        raw = cache.raw(SLOTS[0])
        have = {"values", *(["rotated"] if fmt.rotated_bf16 else []), *(["scales"] if fmt.group else [])}
        assert set(raw) == have | ({"pad"} if fmt.pad else set())
        check_close(fmt, x.astype(np.float64), want, scales)
    for name, row, tail in stored[1:]:
        for got, want in ((row, stored[0][1]), (tail, stored[0][2])):
            assert np.array_equal(got, want), f"{name} differs from {stored[0][0]}"


RUN = [BACKENDS["torch"], BACKENDS["cuda" if torch.cuda.is_available() else "interpreter"]]
MANY = settings.default.max_examples * (1 if torch.cuda.is_available() else 3)  # a GPU compiles a kernel for each


@settings(max_examples=MANY)
@given(drawn_fields(), st.sampled_from(HEAD_DIMS), st.sampled_from([0, 0, 2, 4, 8, 16, 32, 64, 128]), st.integers(0, 99))
def test_refused_or_right(made_of: dict[str, Any], head_dim: int, rope_dim: int, seed: int) -> None:
    """Whatever a format says: an error that names a field of it, or of the spec; or pages that hold what they should."""
    spec = CompressorSpec(head_dim, 4, rope_dim=min(rope_dim, head_dim))
    try:
        fmt = RecordFormat(**made_of)
    except (TypeError, ValueError) as error:
        event("refused")
        assert re.match(rf"({'|'.join(NAMES)}) must ", str(error)), error
        return
    try:
        fmt.check(spec)
    except ValueError as error:
        event("not for this spec")
        assert re.match(rf"format '{fmt.name}' (is|needs) .*spec\.(head_dim|rope_dim)=", str(error)), error
        return
    event("stored")
    check_works(fmt, spec, seed, RUN)


OWN = {
    "nvfp4 with a factor, 384 bytes": (
        RecordFormat("a", "", "e2m1", 16, "e4m3", rotated_bf16=True, pad=4, pad_written=True, head_dims=(512,), rope_dim=64),
        CompressorSpec(512, 4, overlap=True),
    ),
    "interleaved fp32 scales, through mxfp4": (
        RecordFormat("g", "", "e4m3", 8, "fp32", 1e-3, interleaved=True, round_values=True, fp4_first="mxfp4", pad=4),
        CompressorSpec(64, 4, rope_dim=16),
    ),
    "four codes for each scale, interleaved, beside bf16": (
        RecordFormat(
            "h",
            "",
            "e2m1",
            8,
            "ue8m0x4",
            1e-4,
            interleaved=True,
            rotated_bf16=True,
            round_normed=True,
            pad=8,
            pad_written=True,
            nearest_scale=True,
            unsigned_zero=True,
        ),
        CompressorSpec(64, 4, rope_dim=16),
    ),
    "e2m1 per tensor": (RecordFormat("b", "", "e2m1", scale="static", round_values=True), CompressorSpec(32, 4, rope_dim=8)),
    "fp32 scales floored": (
        RecordFormat("c", "", "e4m3", 16, "fp32", 1e-3, "scale", rotated_bf16=True, separate=True, pad=8),
        CompressorSpec(64, 4, rope_dim=16),
    ),
    "a scale for each channel": (RecordFormat("d", "", "e4m3", 1, "pow2", 1e-8), CompressorSpec(16, 4, rope_dim=0)),
    "one group, e4m3 scale": (
        RecordFormat("e", "", "e4m3", 32, "e4m3", 0.5, "scale", divide=True, pad=2, pad_written=True),
        CompressorSpec(32, 2, overlap=True, rope_dim=4),
    ),
    "e2m1 beside bf16, ties to zero": (
        RecordFormat("f", "", "e2m1", 4, "ue8m0", 1e-4, rotated_bf16=True, ties_to_zero=True, page_align=576),
        CompressorSpec(32, 4, rope_dim=8),
    ),
}


@pytest.mark.parametrize("which", OWN)
def test_some_of_ones_own(which: str) -> None:
    fmt, spec = OWN[which]
    check_works(fmt, spec, 1, RUN)


@pytest.mark.parametrize("which", OWN)
def test_compress_of_ones_own(backend: Backend, which: str) -> None:
    """A prompt, whose narrow entries a kernel finishes side by side, stores what `store` does of the same pooled rows."""
    fmt, spec = OWN[which]
    device, n = backend.device, 9 * spec.ratio + 1
    weights = Weights.make(spec)
    rest = {
        "spec": spec,
        "norm_weight": weights.norm_weight.to(device),
        "rope": weights.rope.to(device) if spec.rope_dim else None,
        "backend": backend.name,
    }
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    plan = kvfold.StepPlan.build(
        spec.ratio, zero, torch.tensor([0, n], dtype=torch.int32, device=device), n, state_slots=zero,
        entry_slots=torch.arange(9, device=device).flip(0),
    )  # fmt: skip
    caches = [EntryCache.allocate(fmt, 3, 3, spec, device=device) for _ in range(2)]
    state = kvfold.FoldState.allocate(spec, 1, 4, device=device)
    pooled = torch.zeros(9, spec.head_dim, device=device)
    tokens, ape = make_tokens(spec, n, 8).to(device), weights.ape.to(device)
    kvfold.compress(tokens, plan, state, caches[0], ape=ape, rows=pooled, **rest)
    kvfold.store(pooled, plan, caches[1], **rest)
    assert int(plan.errors) == 0 and caches[0].pages.any()
    for one, other in zip(*map(buffers_of, caches), strict=True):
        assert torch.equal(one, other)
