"""The operator `trtllm::compressor_postprocess_scatter`: values against fp64, bytes against `store`, places against loops."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend
from test_tensorrt_llm import CUDA, INT32, graph_of, launches_of
from torch import Tensor
from torch.library import opcheck

import kvfold
from kvfold import CompressorSpec, EntryCache, reference
from kvfold.integrations import tensorrt_llm
from kvfold.integrations.tensorrt_llm.postprocess import postprocess_scatter
from kvfold.storage.formats import FORMATS

BF16, FP32 = torch.bfloat16, torch.float32
BY_TYPE = {0: "bf16_trtllm", 1: "fp8_tensor_trtllm", 2: "fp8_block128", 3: "mxfp4", 4: "nvfp4_trtllm"}
RATIO, MAX_POS, PER_BLOCK = 4, 256, 3


@pytest.fixture(autouse=True, scope="module")
def operators() -> Iterator[None]:
    tensorrt_llm.register(nvfp4=True)
    yield
    tensorrt_llm.unregister()


@dataclass
class Scatter:
    """Rows of five requests: some make none, one has a mask of False, one a page of -1; reserved places stand between."""

    where: Backend
    head_dim: int = 128
    kind: int = 0
    dtype: torch.dtype = BF16
    rotate: bool = False
    rope_dim: int = 64
    side: bool = False
    gap: int = 1

    def __post_init__(self) -> None:
        g, device = torch.Generator().manual_seed(3), self.where.device
        self.counts, self.first = [2, 0, 3, 1, 4], [5, 9, 0, 7, 1]
        offsets = [sum(self.counts[:b]) + self.gap * b for b in range(6)]
        n, width, blocks = offsets[5] + 2, 4, 24
        self.places = {offsets[b] + i: (b, first + i) for b, first in enumerate(self.first) for i in range(self.counts[b])}
        self.masked = offsets[2] + 1
        self.offsets, self.n = offsets, n
        self.rows = torch.randn(n, self.head_dim, generator=g).to(self.dtype)
        for row in range(n):
            if row not in self.places:
                self.rows[row] = torch.nan
        self.weight = (1 + 0.2 * torch.randn(self.head_dim, generator=g)).to(self.dtype)
        self.table = reference.rope_table(MAX_POS, self.rope_dim) if self.rope_dim else torch.zeros(1, 2)
        # Of rows without an entry the position is whatever was there.
        self.positions = [self.places[r][1] * RATIO if r in self.places else -(10**9) for r in range(n)]
        order = random.Random(1).sample(range(blocks), 5 * width)
        self.blocks = [order[b * width : (b + 1) * width] for b in range(5)]
        self.blocks[3][7 // PER_BLOCK] = -1  # where the only entry of request 3 would go
        self.fmt = FORMATS["fp32" if self.dtype == FP32 else BY_TYPE[self.kind]]
        self.spec = CompressorSpec(self.head_dim, RATIO, rope_dim=self.rope_dim, hadamard=self.rotate)
        record = self.fmt.row_bytes(self.spec) + (0 if self.fmt.name == "nvfp4_trtllm" else self.fmt.tail_bytes(self.spec))
        if self.fmt.in_footer:
            record = self.fmt.record_bytes(self.spec)
        self.cache = torch.full((blocks, PER_BLOCK * record), 0xA5, dtype=torch.uint8, device=device)
        tail = PER_BLOCK * self.fmt.tail_bytes(self.spec)
        self.scales = torch.full((blocks, tail), 0xA5, dtype=torch.uint8, device=device) if self.kind == 4 else None
        self.out = self.quant = self.quant_scales = None
        if self.side and self.kind in (0, 1):
            self.out = torch.full_like(self.rows, 7.0).to(device)
        elif self.side:
            self.quant = torch.full((n, self.fmt.row_bytes(self.spec)), 0x11, dtype=torch.uint8, device=device)
            groups, scale = self.fmt.groups(self.spec), torch.float32 if self.kind == 2 else torch.uint8
            self.quant_scales = torch.full((n, groups), 17, dtype=scale, device=device)

    def arguments(self) -> dict[str, object]:
        def ints(values: object) -> Tensor:
            return torch.tensor(values, dtype=INT32, device=self.where.device)

        mask = [row in self.places and row != self.masked for row in range(self.n)]
        mask[self.offsets[1]] = True  # no request has an entry here: `num_outputs` says so
        return {
            "kv_comp": self.rows.to(self.where.device), "kv_out": self.out, "rms_weight": self.weight.to(self.where.device),
            "rms_eps": 1e-6, "cos_sin_table": self.table.view(len(self.table), 2, -1).to(self.where.device),
            "position_ids": ints(self.positions), "nope_dim": self.head_dim - self.rope_dim, "rope_dim": self.rope_dim,
            "kv_cache": self.cache, "kv_cache_scale": self.scales, "num_outputs": ints(self.counts),
            "cu_kv_comp": ints(self.offsets), "start_pos": ints(self.first), "block_offsets": ints(self.blocks),
            "compressed_mask": torch.tensor(mask, device=self.where.device), "tokens_per_block": PER_BLOCK,
            "cache_scale_type": self.kind, "nvfp4_global_scale": 0.5 if self.kind == 4 else 1.0,
            "rotate_activation": self.rotate, "quant_output": self.quant, "scale_output": self.quant_scales,
        }  # fmt: skip

    def run(self) -> None:
        """By the operator; on the interpreter past it, as an operator of CPU tensors takes the torch backend."""
        given = self.arguments()
        if self.where.slow:
            postprocess_scatter(**given, backend="triton")
        else:
            torch.ops.trtllm.compressor_postprocess_scatter(**given)

    def wanted(self) -> dict[int, tuple[int, int]]:
        """Which row must go to which block and row of it; block -1 for none."""
        found = {}
        for row, (b, entry) in self.places.items():
            if row != self.masked:
                found[row] = self.blocks[b][entry // PER_BLOCK], entry % PER_BLOCK
        return found

    def as_cache(self, pages: Tensor) -> EntryCache:
        """The blocks as kvfold has them."""
        values = PER_BLOCK * self.fmt.row_bytes(self.spec)
        scales = self.scales if self.kind == 4 else pages[:, values:] if self.fmt.separate else None
        held = pages[:, :values] if self.fmt.separate else pages
        return EntryCache(held, self.fmt, PER_BLOCK, self.spec, scales=scales, scale=0.5 if self.kind == 4 else 1.0)

    def check(self) -> None:
        """Bytes are those of `store` at the places that loops find; all others are as they were."""
        wanted, other, device = self.wanted(), replace(self), self.where.device
        stored = {row: place for row, place in wanted.items() if place[0] >= 0}
        kvfold.store(
            self.rows[list(stored)].to(device),
            other.as_cache(other.cache),
            slots=torch.tensor([block * PER_BLOCK + at for block, at in stored.values()], device=device),
            positions=torch.tensor([self.positions[row] for row in stored], device=device),
            spec=self.spec,
            norm_weight=self.weight.to(device),
            rope=self.table.to(device) if self.rope_dim else None,
            backend=self.where.name,
        )
        assert torch.equal(self.cache, other.cache)
        if self.scales is not None:
            assert torch.equal(self.scales, other.scales)
        assert int(tensorrt_llm.errors(self.where.device)) == 0
        if self.side:
            self.check_side(wanted)

    def check_side(self, wanted: dict[int, tuple[int, int]]) -> None:
        """The second output has every finished row in its place, that of a dropped record too."""
        exact = self.exact()
        cache = self.as_cache(self.cache)
        for row in range(self.n):
            if row not in wanted:
                left = [self.out, 7.0] if self.out is not None else [self.quant, 0x11]
                assert bool((left[0][row] == left[1]).all())
            elif self.out is not None:
                off = (self.out[row].double().cpu() - exact[row]).abs().max()
                assert float(off) <= 2.0**-8 * float(exact[row].abs().max())
            elif wanted[row][0] >= 0:
                block, at = wanted[row]
                width, tail = self.fmt.row_bytes(self.spec), self.fmt.tail_bytes(self.spec)
                page = self.cache[block]
                assert torch.equal(page[at * width : (at + 1) * width], self.quant[row])
                begin = PER_BLOCK * width + at * tail
                assert torch.equal(page[begin : begin + tail], self.quant_scales[row].view(torch.uint8))
        assert cache.num_slots

    def exact(self) -> dict[int, Tensor]:
        """Finished rows in fp64."""
        found = {}
        for row in self.places:
            y = reference.rms_norm(self.rows[row].double(), self.weight.double(), 1e-6)[None]
            if self.rope_dim:
                y = reference.rope(y, self.table, torch.tensor([self.positions[row]]), self.rope_dim)
            found[row] = (reference.hadamard(y) if self.rotate else y)[0]
        return found

    def check_values(self) -> None:
        """What attention reads is the fp64 row but for its quantization: half a step of the code, or a last bit."""
        exact, cache = self.exact(), self.as_cache(self.cache)
        for row, (block, at) in self.wanted().items():
            if block < 0:
                continue
            got = cache.read(torch.tensor([block * PER_BLOCK + at], device=self.where.device))[0].cpu().double()
            want, size = exact[row], exact[row].abs()
            groups = size.view(-1, {3: 32, 4: 16}.get(self.kind, self.head_dim)).amax(1, keepdim=True)
            groups = groups.expand(-1, self.head_dim // len(groups)).flatten()
            # fp4: half of the widest gap, 1 of scales up to a third of the largest; of e4m3 scales a sixteenth more.
            bound = {0: 2.0**-8 * size, 1: 2.0**-4 * size + 2.0**-10, 2: 2.0**-4 * size + groups * 2.0**-17}.get(
                self.kind, groups / 3 * 1.07
            )
            if self.dtype == FP32:
                bound = 2e-6 * groups
            assert bool(((got - want).abs() <= bound + 1e-6).all()), (row, float((got - want).abs().max()))


def each(dims: tuple[int, ...] = (128, 512)) -> list:
    found = [(hd, kind, BF16) for hd in dims for kind in BY_TYPE if kind != 4 or hd == 512]
    return [*found, (128, 0, FP32)]


@pytest.mark.parametrize(("head_dim", "kind", "dtype"), each())
@pytest.mark.parametrize("rotate", [False, True])
def test_records(backend: Backend, head_dim: int, kind: int, dtype: torch.dtype, rotate: bool) -> None:
    one = Scatter(backend, head_dim, kind, dtype, rotate)
    one.run()
    one.check()
    one.check_values()


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_second_output(backend: Backend, kind: int) -> None:
    one = Scatter(backend, 128, kind, rotate=True, side=True)
    one.run()
    one.check()


@pytest.mark.parametrize("gap", [0, 3])
def test_places(backend: Backend, gap: int) -> None:
    """Without reserved places, and with more of them than entries."""
    one = Scatter(backend, 128, 0, gap=gap)
    if gap == 0:
        one.offsets[1] = one.offsets[0] + 2
    one.run()
    one.check()


def test_without_rope(backend: Backend) -> None:
    one = Scatter(backend, 128, 0, rope_dim=0)
    one.run()
    one.check()
    one.check_values()


def test_what_is_wrong_is_counted(backend: Backend) -> None:
    """A block beyond the cache, a table too short, and a position beyond the table: three rows, nothing written for them."""
    one = Scatter(backend, 128, 0)
    given = one.arguments()
    given["block_offsets"][0, 5 // PER_BLOCK] = 99  # entry 5 of request 0
    given["start_pos"][2] = 4 * PER_BLOCK - 2  # entries 10, 11, and 12 behind the table; the second is masked
    given["position_ids"][one.offsets[4]] = MAX_POS
    if backend.slow:
        postprocess_scatter(**given, backend="triton")
    else:
        torch.ops.trtllm.compressor_postprocess_scatter(**given)
    errors = tensorrt_llm.errors(backend.device)
    counted = int(errors)
    errors.zero_()
    assert counted == 3


def test_rows_before_the_first_request_are_of_none(backend: Backend) -> None:
    """With a mask that is true they would be entries before that request's first, which are stored already."""
    one = Scatter(backend, 128, 0)
    given = one.arguments()
    given["cu_kv_comp"].fill_(2)  # no request has a row
    given["position_ids"].clamp_(min=0)
    given["kv_comp"].nan_to_num_()
    given["compressed_mask"].fill_(True)
    if backend.slow:
        postprocess_scatter(**given, backend="triton")
    else:
        torch.ops.trtllm.compressor_postprocess_scatter(**given)
    assert bool((one.cache == 0xA5).all()) and int(tensorrt_llm.errors(backend.device)) == 0


def test_operator_is_in_order() -> None:
    for kind, side in ((0, True), (2, True), (3, False), (4, False)):
        one = Scatter(BACKENDS["torch"], 512, kind, side=side)
        one.rows.nan_to_num_()
        given = one.arguments()
        schema = torch.ops.trtllm.compressor_postprocess_scatter.default._schema
        opcheck(torch.ops.trtllm.compressor_postprocess_scatter.default, tuple(given[x.name] for x in schema.arguments))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache_scale_type": 5}, "cache_scale_type must be"),
        ({"tokens_per_block": 0}, "tokens_per_block must be from 1"),
        ({"kv_comp": torch.zeros(128)}, "kv_comp must have shape"),
        ({"rms_weight": torch.ones(127)}, "rms_weight must have shape"),
        ({"cos_sin_table": torch.zeros(64, 2, 16)}, "cos_sin_table must have shape"),  # as many numbers, of other positions
        ({"cos_sin_table": torch.zeros(64, 2, 32).double()}, "cos_sin_table must be torch.float32"),
        ({"cache_scale_type": 4}, "kv_cache_scale must be given"),
        ({"nope_dim": 65}, "nope_dim and rope_dim must add up to 128"),
        ({"kv_comp": torch.zeros(17, 128, dtype=torch.float16)}, "kv_comp must be"),
        ({"kv_comp": torch.zeros(17, 128), "cache_scale_type": 1}, "kv_comp must be"),
        ({"compressed_mask": torch.ones(17)}, "compressed_mask must be"),
        ({"compressed_mask": torch.ones(3, dtype=torch.bool)}, "compressed_mask must have 17 rows"),
        ({"position_ids": torch.ones(17)}, "position_ids must be"),
        ({"start_pos": torch.ones(4, dtype=INT32)}, "start_pos must have 5 rows"),
        ({"block_offsets": torch.ones(5, 4)}, "block_offsets must be int32"),
        ({"kv_cache": torch.zeros(24, 767, dtype=torch.uint8)}, "kv_cache must be contiguous blocks of 768 bytes"),
        ({"kv_out": torch.zeros(17, 128)}, "kv_out must be"),
        ({"quant_output": torch.zeros(17, 128, dtype=torch.uint8)}, "must be given together"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, object], message: str) -> None:
    one = Scatter(BACKENDS["torch"], 128, 0)
    before = one.cache.clone()
    assert one.n == 17
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.trtllm.compressor_postprocess_scatter(**(one.arguments() | changed))
    assert torch.equal(one.cache, before)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "side"), [(0, True), (1, False), (2, True), (3, True), (4, False)])
def test_on_a_gpu_one_launch_no_allocation_no_sync(kind: int, side: bool) -> None:
    one = Scatter(CUDA, 512, kind, side=side)
    given = one.arguments()
    own = torch.ops.trtllm.compressor_postprocess_scatter
    assert launches_of(lambda: own(**given)) == 1
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        own(**given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = graph_of(lambda: own(**given))
    one.cache.fill_(0xA5)
    if one.scales is not None:
        one.scales.fill_(0xA5)
    graph.replay()
    torch.cuda.synchronize()
    one.check()
