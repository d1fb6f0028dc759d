"""NaN and infinity: what each format stores for them, and that nothing else changes.

Expected bytes come from the oracle's bytes of an entry with ordinary numbers in place of the bad ones; see DESIGN.md, Records.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import record_oracle as oracle
from support.helpers import Backend
from support.record_support import CASES, SPECS, Pages, permuted_slots, random_entries

from kvfold.storage.formats import FORMATS

ROWS = 5
BAD = 2  # which of the entries is spoiled
SLOTS = permuted_slots(8, 2 * ROWS, 6)
# Quiet and signalling NaNs of both signs and with payloads; hardware makes the last one.
NANS = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFABCDEF, 0x7FFFFFFF], np.uint32).view(np.float32)


def quantized(name: str, hd: int) -> int:
    """Channels that are not kept as bf16 or fp32."""
    if oracle.FORMATS[name]["element"] in ("bf16", "fp32"):
        return 0
    return 448 if oracle.FORMATS[name]["needs_rope"] else hd


def nan_code(name: str) -> int:
    """e4m3 has a NaN; e2m1 has none, and hardware stores 6."""
    return 0x7F if oracle.FORMATS[name]["element"] == "e4m3" else 7


class Record:
    """The oracle's bytes of one entry, to be changed channel by channel."""

    def __init__(self, name: str, entry: np.ndarray) -> None:
        self.name, self.hd = name, len(entry)
        first, *second = (buffer for buffer, _ in oracle.pack(name, entry[None], [0], 1))
        at, behind = oracle.places(name, self.hd, 1)
        self.data, self.tail = first[at[0]], (second or [first])[0][behind[0]]

    def set_channel(self, channel: int, x: np.float32, code: int) -> None:
        """Stores element `code`; where channels are bf16 or fp32 instead, `x` itself, a NaN in bf16 as 0x7FC0."""
        count, element = quantized(self.name, self.hd), oracle.FORMATS[self.name]["element"]
        if channel < count and element == "e4m3":
            self.data[channel] = code
        elif channel < count:
            keep = 0x0F if channel % 2 else 0xF0
            self.data[channel // 2] = self.data[channel // 2] & keep | code << 4 * (channel % 2)
        elif element == "fp32":
            self.data[4 * channel : 4 * channel + 4] = np.array([x]).view(np.uint8)
        else:
            at = len(self.data) - 2 * (self.hd - channel)
            high = {np.inf: 0x7F80, -np.inf: 0xFF80}.get(float(x), 0x7FC0)
            self.data[at : at + 2] = np.array([high], np.uint16).view(np.uint8)


def check(backend: Backend, name: str, hd: int, entries: np.ndarray, stand_ins: np.ndarray, record: Record) -> None:
    """Stores `entries`: all bytes are the oracle's for `stand_ins`, but entry `BAD` has the bytes of `record`."""
    pages = Pages(backend, name, SPECS[hd], 2, ROWS)
    pages.write(SLOTS, entries)
    expected = pages.expected(SLOTS, stand_ins)
    page, row = divmod(SLOTS[BAD], ROWS)
    starts = [
        len(whole) // 2 - size * pages.num_pages // 2 + page * size for whole, size in zip(expected, pages.sizes, strict=True)
    ]
    at, behind = oracle.places(name, hd, ROWS)
    expected[0][starts[0] + at[row]] = record.data
    pad = oracle.FORMATS[name]["pad"]
    kept = len(record.tail) - (pad[0] if pad and pad[1] == "kept" else 0)
    expected[-1][starts[-1] + behind[row, :kept]] = record.tail[:kept]
    for got, want in zip(pages.now(), expected, strict=True):
        wrong = np.flatnonzero(got != want)
        assert not len(wrong), f"{len(wrong)} bytes differ, first at {wrong[0]}: got {got[wrong[0]]}, expected {want[wrong[0]]}"


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_nan(backend: Backend, name: str, hd: int) -> None:
    """A NaN becomes its channel's NaN code, whatever its sign and payload, and has no say in its group's scale."""
    entries = random_entries(len(SLOTS), hd, 7)
    channels = [0, 5, 16, 17, hd // 2 + 1, hd - 64, hd - 1]
    bad = [NANS[i % len(NANS)] for i in range(len(channels))]
    stand_ins = entries.copy()
    stand_ins[BAD, channels] = 0.0
    record = Record(name, stand_ins[BAD])
    for channel, x in zip(channels, bad, strict=True):
        record.set_channel(channel, x, nan_code(name))
    entries[BAD, channels] = bad
    check(backend, name, hd, entries, stand_ins, record)


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_all_nan(backend: Backend, name: str, hd: int) -> None:
    """An entry of NaNs has the scales of an entry of zeros."""
    entries = random_entries(len(SLOTS), hd, 8)
    stand_ins = entries.copy()
    stand_ins[BAD] = 0.0
    record = Record(name, stand_ins[BAD])
    entries[BAD] = np.resize(NANS, hd)
    for channel in range(hd):
        record.set_channel(channel, entries[BAD, channel], nan_code(name))
    check(backend, name, hd, entries, stand_ins, record)


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_infinity(backend: Backend, name: str, hd: int) -> None:
    """An infinity saturates where its group has no scale, or an e4m3 scale; elsewhere the scale goes to its end.

    Then the group's finite channels become 0 with their sign (where the format keeps it) and the infinite ones the NaN code. A
    NaN beside an infinity changes nothing. What goes through nvfp4 first saturates there, at 6 * 448.
    """
    f = oracle.FORMATS[name]
    size = f["group"] or 64
    entries = random_entries(len(SLOTS), hd, 9)
    channels = {1: np.inf, 2: -np.inf, 3: np.nan, hd - 1: -np.inf}
    stand_ins = entries.copy()
    for channel, x in channels.items():
        stand_ins[BAD, channel] = np.clip(np.nan_to_num(x, nan=0.0), -1e38, 1e38)
    record = Record(name, stand_ins[BAD])
    saturates = f["scale"] in (None, "e4m3") or f["fp4_first"] == "nvfp4"
    for channel, x in channels.items():
        entries[BAD, channel] = x
        sign = 0x80 if f["element"] == "e4m3" else 8
        finite_top = (0x7E if f["element"] == "e4m3" else 7) | (sign if x < 0 else 0)
        if f["fp4_first"] != "nvfp4" or np.isnan(x):  # otherwise as what stands in for it
            record.set_channel(channel, np.float32(x), finite_top if saturates and not np.isnan(x) else nan_code(name))
        group = channel // size
        if np.isnan(x) or saturates or channel >= quantized(name, hd):
            continue
        for other in range(group * size, group * size + size):
            if np.isfinite(entries[BAD, other]) and other not in channels:
                keeps = f["element"] != "e2m1_toward_zero" and not f["no_minus"] and np.signbit(entries[BAD, other])
                record.set_channel(other, entries[BAD, other], sign if keeps else 0)
        if f["scale"] in ("ue8m0", "ue8m0x4"):
            record.tail.reshape(-1, 4 if f["scale"] == "ue8m0x4" else 1)[group] = 254
        else:
            end = 2.0**127 if f["scale"] == "pow2" else np.inf
            record.tail[4 * group : 4 * group + 4] = np.array([end], "<f4").view(np.uint8)
    check(backend, name, hd, entries, stand_ins, record)


@pytest.mark.parametrize("name", ["fp8_block128"])
def test_overflowing_factor(backend: Backend, name: str) -> None:
    """448 / amax is infinite for amax below 1.3e-36, and a zero times it a NaN: the same bytes on every backend."""
    entries = np.zeros((len(SLOTS), 128), np.float32)
    entries[:, :4] = np.array([1e-36, 1e-37, -1e-40, 1e-45], np.float32)
    entries[1::2, 0] = 2e-36
    pages = Pages(backend, name, SPECS[128], 2, ROWS)
    pages.write(SLOTS, entries)
    values = pages.cache.raw(SLOTS[0])["values"].view(torch.uint8).tolist()
    assert values[:5] == [0x7E, 0x7E, 0xFE, 0x7E, 0x7F]
    values = pages.cache.raw(SLOTS[1])["values"].view(torch.uint8).tolist()
    assert values[0] == 0x7E and 0x7F not in values[1:] and values[4] == 0


@pytest.mark.parametrize(("name", "hd"), CASES)
def test_reading_back(backend: Backend, name: str, hd: int) -> None:
    """A reader sees a NaN as NaN where the element has one, else as 6 times the scale; the other groups and entries as ever."""
    entries = random_entries(len(SLOTS), hd, 10)
    entries[BAD] = np.clip(entries[BAD], -3e4, 3e4)
    clean = Pages(backend, name, SPECS[hd], 2, ROWS)
    clean.write(SLOTS, entries)
    entries[BAD, 1] = np.nan
    pages = Pages(backend, name, SPECS[hd], 2, ROWS)
    pages.write(SLOTS, entries)
    at = torch.tensor(SLOTS, device=backend.device)
    got, want = pages.cache.read(at).cpu(), clean.cache.read(at).cpu()
    bad = got[BAD, 1].item()
    if FORMATS[name].element == "e2m1":
        group = entries[BAD, : FORMATS[name].group]
        assert bad >= np.nanmax(np.abs(group)) / 2 > 0
    else:
        assert np.isnan(bad)
    got[BAD, : FORMATS[name].group or 2] = want[BAD, : FORMATS[name].group or 2]
    assert torch.equal(got, want)
