"""`EntryCache.from_blocks`: the views that engines have of their blocks, as they are."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from support import record_oracle as oracle
from support.helpers import CANARY, Backend
from support.record_support import SPECS, permuted_slots, random_entries, write

import kvfold
from kvfold import EntryCache
from kvfold.storage.formats import FORMATS

BLOCKS = 4
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16


class View(NamedTuple):
    """`[blocks, rows, label]` of a dtype: `stride` bytes from block to block, `offset` before the first, `end` behind the last.

    end: of the bytes that the last block has.
    """

    name: str
    rows: int
    label: int
    stride: int
    offset: int = 0
    end: int = 0
    dtype: torch.dtype = torch.uint8

    @property
    def head_dim(self) -> int:
        return 512 if 512 in oracle.FORMATS[self.name]["head_dims"] else 128

    def lay_out(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory, and the engine's view of it."""
        whole = torch.full((self.offset + (BLOCKS - 1) * self.stride + (self.end or self.stride),), CANARY, dtype=torch.uint8)
        whole = whole.to(device)
        item = self.dtype.itemsize
        size = (BLOCKS, self.rows, self.label)
        return whole, whole.view(self.dtype).as_strided(size, (self.stride // item, self.label, 1), self.offset // item)


VIEWS = {
    "vLLM C4, padded pages": View("fp8_ds_mla", 64, 584, 37_440),
    "vLLM C4, unpadded": View("fp8_ds_mla", 64, 584, 37_376),
    "vLLM C4, padding behind all pages but the last": View("fp8_ds_mla", 64, 584, 37_440, end=37_376),
    "vLLM C4, one layer of a packed block": View("fp8_ds_mla_vllm_triton", 64, 584, 3 * 37_440 + 8640, offset=8640),
    "vLLM C128": View("fp8_ds_mla", 2, 584, 1728),
    "vLLM C128, unpadded": View("fp8_ds_mla", 2, 584, 1168),
    "vLLM C128, a label of the values alone": View("fp8_ds_mla", 2, 576, 1728),
    "vLLM V4.1, ratio 1": View("v41_mxfp8_interleaved_vllm", 128, 528, 67_584 + 512),
    "vLLM V4.1, ratio 2": View("v41_mxfp8_interleaved_vllm", 64, 528, 4 * 33_792, offset=33_792),
    "vLLM V4.1, fp4": View("v41_nvfp4_interleaved_vllm", 64, 288, 64 * 288 + 48),
    "vLLM V4.1, SM90": View("fp8_ds_mla_v41", 32, 584, 19_008),
    "vLLM V4.1, plain rows": View("bf16_v41", 16, 512, 16 * 1024 + 256, dtype=BF16),
    "vLLM V4.1, plain fp8 rows": View("fp8_tensor_v41", 16, 512, 16 * 512 + 1024, dtype=E4M3),
    "vLLM indexer": View("indexer_fp8_vllm", 64, 132, 64 * 132),
    "vLLM indexer, packed": View("indexer_fp8_v41", 64, 132, 16_896, offset=512),
    "vLLM indexer, SM100": View("indexer_fp8_v41_sm100", 64, 132, 8704),
    "vLLM indexer, fp4": View("indexer_mxfp4_v41", 64, 68, 4608),
    "vLLM C4, e4m3 view": View("fp8_ds_mla", 64, 584, 37_440, dtype=E4M3),
    "SGLang V4": View("fp8_ds_mla_v41_sglang", 64, 584, 37_440),
    "SGLang V41": View("v41_mxfp8_sglang_fp4", 64, 528, 33_792),
    "SGLang V41_NEW": View("v41_mxfp8_interleaved_sglang_fp4", 16, 528, 16 * 528),
    "SGLang V41_FP4, in a page of its own size": View("v41_nvfp4_sglang", 4, 288, 1280),
    "FlashInfer, 384 bytes": View("nvfp4_flashinfer", 64, 384, 24_576 + 32),
    "SGLang, 368 bytes": View("mxfp4_sm90_sglang", 64, 368, 64 * 368),
    "two bytes to an integer": View("fp8_ds_mla", 2, 292, 1728, dtype=torch.int16),
    "a block of one row": View("v41_mxfp8_interleaved_vllm", 1, 528, 544),
}


@pytest.mark.parametrize("which", VIEWS)
def test_views_of_engines(backend: Backend, which: str) -> None:
    """Records are where the oracle has them in each block; every other byte of the engine's memory stays."""
    view = VIEWS[which]
    whole, blocks = view.lay_out(backend.device)
    cache = EntryCache.from_blocks(blocks, view.name, SPECS[view.head_dim])
    assert (cache.num_pages, cache.rows_per_page, cache.device) == (BLOCKS, view.rows, whole.device)
    assert cache.storage.data_ptr() == blocks.data_ptr()
    n = min(9, cache.num_slots)
    slots, entries = permuted_slots(n, cache.num_slots, 3), random_entries(n, view.head_dim, 4)
    slots[0] = cache.num_slots - 1 if cache.num_slots - 1 not in slots else slots[0]  # the last bytes
    write(backend, cache, slots, entries)
    want = np.full(whole.numel(), CANARY, np.uint8)
    for i, slot in enumerate(slots):
        block, row = divmod(slot, view.rows)
        ((data, written),) = oracle.pack(view.name, entries[i : i + 1], [row], view.rows)
        at = view.offset + block * view.stride + np.flatnonzero(written)
        want[at] = data[written]
    assert (whole.cpu().numpy() == want).all()
    same = EntryCache(torch.zeros(1, cache.format.page_bytes(cache.spec, n), dtype=torch.uint8), view.name, n, cache.spec)
    write(Backend("torch", torch.device("cpu")), same, list(range(n)), entries)
    assert torch.equal(cache.read(torch.tensor(slots, device=backend.device)).cpu(), same.read(torch.arange(n)))


def test_scales_in_a_buffer_of_their_own(backend: Backend) -> None:
    """Of formats that have one: it is `[blocks, ...]` as ever; and a number or a tensor of the whole cache."""
    blocks = torch.zeros(3, 4, 256, dtype=torch.uint8, device=backend.device)
    tails = torch.zeros(3, 4 * 32, dtype=torch.uint8, device=backend.device)
    scale = torch.full((1,), 2.7, device=backend.device)
    cache = EntryCache.from_blocks(blocks, "nvfp4_trtllm", SPECS[512], scales=tails, scale=scale)
    entries = random_entries(12, 512, 5)
    write(backend, cache, list(range(12)), entries)
    for page in range(3):
        rows = entries[4 * page : 4 * page + 4]
        (data, _), (codes, _) = oracle.pack("nvfp4_trtllm", rows, [0, 1, 2, 3], 4, global_scale=np.float32(2.7))
        assert (blocks[page].cpu().numpy().ravel() == data).all() and (tails[page].cpu().numpy() == codes).all()


def test_a_page_without_its_padding() -> None:
    """`EntryCache` takes it too, and says what there is; whole pages have the format's size."""
    spec, name = SPECS[512], "fp8_ds_mla"
    for size, found in ((37_376, 37_376), (37_400, 37_400), (37_440, 37_440), (40_000, 37_440)):
        assert EntryCache(torch.zeros(2, size, dtype=torch.uint8), name, 64, spec).page_bytes == found
    with pytest.raises(ValueError, match=r"storage must have at least 37376 bytes per page, got 37375"):
        EntryCache(torch.zeros(2, 37_375, dtype=torch.uint8), name, 64, spec)
    blocks = torch.zeros(0, 64, 584, dtype=torch.uint8)
    assert EntryCache.from_blocks(blocks, name, spec).num_slots == 0
    assert EntryCache.from_blocks(torch.zeros(1, 64, 584, dtype=torch.uint8), name, spec).num_slots == 64


def test_calls_with_an_engines_view(backend: Backend) -> None:
    """`store` into blocks has the bytes that it has in pages of kvfold's own; copies are of the same view."""
    view, spec = VIEWS["vLLM C128, unpadded"], SPECS[512]
    _, blocks = view.lay_out(backend.device)
    cache, device = EntryCache.from_blocks(blocks, view.name, spec), backend.device
    own = EntryCache.allocate(view.name, BLOCKS, view.rows, spec, device=device)
    twin = copy.deepcopy(cache)
    rows, ints = torch.randn(6, 512, generator=torch.Generator().manual_seed(1)), torch.arange(7, dtype=torch.int32)
    plan = kvfold.StepPlan.build(
        4,
        0 * ints[:6].to(device),
        4 * ints.to(device),
        4,
        state_slots=ints[:6].to(device),
        entry_slots=ints[:6].long().to(device),
    )
    rest = {"norm_weight": torch.ones(512, device=device), "rope": kvfold.reference.rope_table(64, 64).to(device)}
    for one in (cache, own, twin):
        kvfold.store(rows.to(device), plan, one, spec=spec, **rest, backend=backend.name)
    at = torch.arange(6, device=device)
    assert torch.equal(cache.read(at), own.read(at)) and torch.equal(twin.read(at), own.read(at))
    assert cache.read(at).any() and cache.pages.data_ptr() != twin.pages.data_ptr()


def test_refused() -> None:
    """Before anything is made of it, naming the argument."""
    spec, u8 = SPECS[512], torch.uint8
    good = torch.zeros(3, 64, 584, dtype=u8)
    wide = torch.zeros(3, 64, 592, dtype=u8)
    flat = torch.zeros(40_000, dtype=u8)
    for view, name, error, message in (
        ([1], "fp8_ds_mla", TypeError, "^view "),
        (good.view(3, -1), "fp8_ds_mla", ValueError, r"^view must be \[blocks, rows, record\]"),
        (good[:, None], "fp8_ds_mla", ValueError, r"^view must be \[blocks, rows, record\]"),
        (good, "fp7", ValueError, "^fmt "),
        (good.half(), "fp8_ds_mla", TypeError, "^view must be of an integer dtype"),
        (good.view(torch.float8_e5m2), "fp8_ds_mla", TypeError, "^view must be of an integer dtype"),
        (good[:, :, ::2], "fp8_ds_mla", ValueError, "^view must have dense rows"),
        (wide[:, :, :584], "fp8_ds_mla", ValueError, "^view must have dense rows"),
        (good.transpose(0, 1), "fp8_ds_mla", ValueError, "^view must have dense rows"),
        (good[:, :0], "fp8_ds_mla", ValueError, "^view must have from 1 to"),
        (good, "v41_mxfp8_interleaved_vllm", ValueError, "^view must have rows of 528 bytes"),
        (good, "bf16", ValueError, "^view must have rows of 1024 bytes"),
        (torch.zeros(3, 64, 576, dtype=u8), "fp8_ds_mla", ValueError, "^view must have blocks that lie 37376 bytes apart"),
        (
            flat.as_strided((2, 64, 500), (1000, 500, 1)),
            "fp8_ds_mla",
            ValueError,
            "^view must have blocks that lie 37376 bytes",
        ),
        (
            torch.zeros(1, 64, 576, dtype=u8),
            "fp8_ds_mla",
            ValueError,
            "^view must have 37376 bytes of memory in its last block",
        ),
        (flat[1:37_377].view(1, 64, 584), "fp8_ds_mla", ValueError, "^view must have blocks that start at a multiple of 2"),
    ):
        with pytest.raises(error, match=message):
            EntryCache.from_blocks(view, name, spec)
    with pytest.raises(ValueError, match=r"spec\.head_dim=128"):
        EntryCache.from_blocks(good, "fp8_ds_mla", kvfold.V4_INDEXER)
    with pytest.raises(TypeError, match=r"^scales"):
        EntryCache.from_blocks(torch.zeros(3, 4, 256, dtype=u8), "mxfp4", spec)
    with pytest.raises(ValueError, match=r"^scale must be 1"):
        EntryCache.from_blocks(good, "fp8_ds_mla", spec, scale=2.0)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_view(name: str) -> None:
    """`[blocks, rows, record]` of what `allocate` would make is the same cache."""
    fmt = FORMATS[name]
    spec = SPECS[512 if not fmt.head_dims or 512 in fmt.head_dims else 128]
    size = fmt.row_bytes(spec) if fmt.separate else fmt.record_bytes(spec)
    scales = torch.zeros(2, 8 * fmt.tail_bytes(spec), dtype=torch.uint8) if fmt.separate else None
    cache = EntryCache.from_blocks(torch.zeros(2, 8, size, dtype=torch.uint8), name, spec, scales=scales)
    own = EntryCache.allocate(name, 2, 8, spec)
    entries = random_entries(16, spec.head_dim, 6)
    for one in (cache, own):
        write(Backend("torch", torch.device("cpu")), one, list(range(16)), entries)
    assert torch.equal(cache.pages, own.pages[:, : cache.page_bytes])
