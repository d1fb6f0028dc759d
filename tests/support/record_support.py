"""What the tests of records share: pages with a pattern between canaries, the two writers, and the oracle read back."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import torch
from support import record_oracle as oracle
from support.helpers import CANARY, MARGIN, Backend
from torch import Tensor

import kvfold
from kvfold import CompressorSpec
from kvfold.storage.cache import EntryCache
from kvfold.storage.formats import FORMATS
from kvfold.storage.pack import pack_records

CASES = [(name, hd) for name in FORMATS for hd in oracle.FORMATS[name]["head_dims"]]
SPECS = {512: replace(kvfold.V4_HCA, ratio=4), 128: kvfold.V4_INDEXER}
# What `EntryCache.scale` is tried with: 1, and a number whose inverse is not an fp32 number.
SCALES = {
    **dict.fromkeys(("fp8_tensor", "fp8_tensor_trtllm", "fp8_tensor_v41", "fp8_tensor_v41_sglang"), (1.0, 0.37)),
    "nvfp4_trtllm": (1.0, 2.7),
}
SCALED = [(name, hd, scale) for name, hd in CASES for scale in SCALES.get(name, (1.0,))]


class Pages:
    """An `EntryCache` whose pages hold a pattern, lie `gap` bytes apart and are surrounded by canaries.

    `inverted` gives the complement of the pattern: a byte that is wrongly written can equal the one but not the other.
    """

    def __init__(
        self,
        backend: Backend,
        name: str,
        spec: CompressorSpec,
        num_pages: int,
        rows_per_page: int,
        *,
        gap: int = 0,
        scale: float = 1.0,
        inverted: bool = False,
    ) -> None:
        self.backend, self.name, self.spec, self.scale = backend, name, spec, scale
        self.num_pages, self.rows_per_page, self.gap = num_pages, rows_per_page, gap
        self.sizes = oracle.page_bytes(name, spec.head_dim, rows_per_page)
        self.wholes: list[Tensor] = []
        buffers = []
        for size in self.sizes:
            pattern = (torch.arange(num_pages * (size + gap)) * 73 + 41).remainder(251).to(torch.uint8)
            margin = torch.full((MARGIN,), CANARY, dtype=torch.uint8)
            whole = torch.cat([margin, ~pattern if inverted else pattern, margin]).to(backend.device)
            self.wholes.append(whole)
            buffers.append(whole[MARGIN:-MARGIN].view(num_pages, size + gap)[:, :size])
        self.before = [whole.cpu().numpy().copy() for whole in self.wholes]
        self.cache = EntryCache(buffers[0], name, rows_per_page, spec, scales=(buffers + [None])[1], scale=scale)

    def write(self, slots: list[int], entries: np.ndarray) -> None:
        write(self.backend, self.cache, slots, entries)

    def now(self) -> list[np.ndarray]:
        """All bytes of each buffer, canaries included."""
        return [whole.cpu().numpy().copy() for whole in self.wholes]

    def expected(self, slots: list[int], entries: np.ndarray) -> list[np.ndarray]:
        """What `now` must be: the oracle's bytes where a writer writes, everything else as it was."""
        after = [whole.copy() for whole in self.before]
        for page in sorted({slot // self.rows_per_page for slot in slots}):
            here = [i for i, slot in enumerate(slots) if slot // self.rows_per_page == page]
            packed = oracle.pack(
                self.name,
                entries[here],
                [slots[i] % self.rows_per_page for i in here],
                self.rows_per_page,
                static_scale=self.scale,
                global_scale=self.scale,
            )
            for whole, size, (data, written) in zip(after, self.sizes, packed, strict=True):
                at = MARGIN + page * (size + self.gap)
                whole[at : at + size][written] = data[written]
        return after

    def check(self, slots: list[int], entries: np.ndarray) -> None:
        """Every byte is as expected."""
        for buffer, (got, want) in enumerate(zip(self.now(), self.expected(slots, entries), strict=True)):
            wrong = np.flatnonzero(got != want)
            assert not len(wrong), (
                f"{self.name}: {len(wrong)} bytes of buffer {buffer} differ, first at {wrong[0] - MARGIN}: "
                f"got {got[wrong[0]]}, expected {want[wrong[0]]}"
            )


def write(backend: Backend, cache: EntryCache, slots: list[int], entries: np.ndarray) -> None:
    """Entries into slots, by the packer of this backend: `pack_records`, or `store_record` in one launch."""
    at = torch.tensor(slots, dtype=torch.int64, device=backend.device)
    y = torch.from_numpy(np.ascontiguousarray(entries)).to(backend.device)
    if backend.name == "torch":
        pack_records(cache, at, y)
        return
    from support.record_kernel import constants_of, write_records  # triton, which the torch backend does not need

    scales = cache.scale_pages
    write_records[(len(slots),)](
        y,
        at,
        cache.pages,
        cache.pages.stride(0),
        scales,
        scales.stride(0) if scales is not None else 0,
        cache.rows_per_page,
        None if cache.scale_tensor is None else cache.scale_tensor.data_ptr(),
        **constants_of(cache),
        num_warps=4 if cache.spec.head_dim > 128 else 1,
        enable_fp_fusion=False,
    )


def random_entries(n: int, hd: int, seed: int) -> np.ndarray:
    """Normal rows of different magnitudes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, hd)) * 10.0 ** rng.uniform(-4, 3, (n, 1))).astype(np.float32)


def permuted_slots(n: int, num_slots: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(num_slots)[:n].tolist()


def fields(name: str, entries: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """The oracle's bytes of entries, cut into the fields of each record as the layout says, [n, ...] each."""
    f, (n, hd) = oracle.FORMATS[name], entries.shape
    first, *second = (b for b, _ in oracle.pack(name, entries, list(range(n)), n, static_scale=scale, global_scale=scale))
    at, behind = oracle.places(name, hd, n)
    records, tails = first[at], (second or [first])[0][behind]
    if f["element"] in ("bf16", "fp32"):
        return {"values": records.view(ml_dtypes.bfloat16 if f["element"] == "bf16" else "<f4")}
    found = {}
    if f["needs_rope"]:
        records, rotated = records[:, :-128].copy(), records[:, -128:].copy()
        found["rotated"] = rotated.view(ml_dtypes.bfloat16)
    if f["element"] == "e4m3":
        found["values"] = records.view(ml_dtypes.float8_e4m3fn)
    else:
        found["values"] = np.stack([records & 15, records >> 4], axis=2).reshape(n, -1)
    if f["group"]:
        if f["pad"]:
            found["pad"], tails = tails[:, -f["pad"][0] :], tails[:, : -f["pad"][0]].copy()
        kinds = {"ue8m0": np.uint8, "ue8m0x4": np.uint8, "e4m3": ml_dtypes.float8_e4m3fn}
        found["scales"] = tails.view(kinds.get(f["scale"], "<f4"))
    return found


def dequantized(name: str, entries: np.ndarray, scale: float) -> np.ndarray:
    """What the oracle's bytes stand for, in fp64."""
    f, found = oracle.FORMATS[name], fields(name, entries, scale)
    values = found["values"]
    if f["element"].startswith("e2m1"):
        values = values.view(ml_dtypes.float4_e2m1fn)
    values = values.astype(np.float64)
    if name.startswith("fp8_tensor"):
        values = values * np.float64(np.float32(scale))
    if "scales" in found:
        scales = found["scales"]
        scales = scales[:, ::4] if f["scale"] == "ue8m0x4" else scales
        scales = 2.0 ** (scales.astype(np.float64) - 127) if scales.dtype == np.uint8 else scales.astype(np.float64)
        values = values * np.repeat(scales, f["group"], axis=1)
    if name == "nvfp4_trtllm":
        values = values / np.float64(np.float32(scale))
    if "rotated" in found:
        values = np.concatenate([values, found["rotated"].astype(np.float64)], axis=1)
    return values
