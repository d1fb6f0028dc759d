"""The operators `trtllm::compressor_*` that pool: rows and pools against fp64 and against the definition of a stored row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend, make_tokens
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from kvfold import CompressorSpec, reference
from kvfold.contract import pooled_bound
from kvfold.integrations import tensorrt_llm

BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32
CPU, CUDA = BACKENDS["torch"], BACKENDS["cuda"]
ON_BOTH = pytest.mark.parametrize("where", [CPU, pytest.param(CUDA, marks=pytest.mark.gpu)], ids=("cpu", "cuda"))
SHAPES = [(32, 4), (16, 128), (16, 2)]  # head_dim, ratio
OPS = torch.ops.trtllm


@pytest.fixture(autouse=True, scope="module")
def operators() -> Iterator[None]:
    tensorrt_llm.register()
    yield
    tensorrt_llm.unregister()


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    yield
    tensorrt_llm.forget()


@dataclass
class Layer:
    """One compressor of TensorRT-LLM: its pools full of NaN, with shuffled block tables, and the tokens of all requests."""

    where: Backend
    head_dim: int
    ratio: int
    lengths: list[int]
    page_size: int = 8
    dtype: torch.dtype = FP32
    state_dtype: torch.dtype = FP32
    out_dtype: torch.dtype = FP32
    seed: int = 0

    def __post_init__(self) -> None:
        self.spec = CompressorSpec(self.head_dim, self.ratio, overlap=self.ratio == 4, rope_dim=0)
        g, rng = torch.Generator().manual_seed(self.seed), random.Random(self.seed)
        self.tokens = [make_tokens(self.spec, n, self.seed + b, self.dtype) for b, n in enumerate(self.lengths)]
        self.ape = torch.randn(self.ratio, self.spec.channels, generator=g)
        columns = -(-max(self.lengths) // self.page_size) + 1
        blocks = len(self.lengths) * columns + 2
        shape = (blocks, self.page_size, self.spec.channels)
        self.pools = [torch.full(shape, torch.nan, dtype=self.state_dtype, device=self.where.device) for _ in range(2)]
        order = (rng.sample(range(blocks), len(self.lengths) * columns) for _ in range(2))
        self.tables = [self.ints(ids).view(-1, columns) for ids in order]
        self.expected = [pool.clone().cpu() for pool in self.pools]

    def ints(self, values: object) -> Tensor:
        return torch.tensor(list(values), dtype=INT32, device=self.where.device)

    def step(self, start: list[int], new: list[int], *, contexts: int = 0, gap: int = 0, next_n: int | None = None) -> Tensor:
        """A step in which request b brings `new[b]` tokens, the first `contexts` requests by the context operator.

        start: tokens before. gap: places of entries that are reserved for each request and more than it needs. Returns the
        output, NaN where nothing was written, and checks it and the pools.
        """
        batch, ratio = len(start), self.ratio
        ends = [a + n for a, n in zip(start, new, strict=True)]
        made = [e // ratio - a // ratio for a, e in zip(start, ends, strict=True)]
        cu_seq = self.ints(sum(new[:b]) for b in range(batch + 1))
        cu_comp = self.ints(sum(made[:b]) + gap * b for b in range(batch + 1))
        given = torch.cat([self.tokens[b][a:e] for b, (a, e) in enumerate(zip(start, ends, strict=True))])
        kv_score = given.to(self.where.device)
        count = int(cu_comp[-1])
        output = torch.full((count, self.head_dim), torch.nan, dtype=self.out_dtype, device=self.where.device)
        lens, first, ape = self.ints(ends), self.ints(start), self.ape.to(self.where.device)
        last = self.page_size, self.head_dim, ratio
        if contexts:
            OPS.compressor_prefill_reduction(
                kv_score[: sum(new[:contexts])], ape, *self.pools, *(table[:contexts] for table in self.tables), output,
                lens[:contexts], first[:contexts], cu_seq, cu_comp[: contexts + 1], contexts, *last, max([1, *made[:contexts]]),
            )  # fmt: skip
        if batch > contexts:
            most = max(new[contexts:]) if next_n is None else next_n
            ragged = None if len({*new[contexts:]}) == 1 else self.ints(new[contexts:])
            OPS.compressor_paged_kv_compress(
                kv_score, ape, *self.pools, *(table[contexts:] for table in self.tables), output, lens[contexts:],
                cu_seq[contexts:], cu_comp[contexts:], batch - contexts, *last, most, ragged,
            )  # fmt: skip
        self.check(start, ends, output.cpu(), cu_comp.tolist())
        return output

    def check(self, start: list[int], ends: list[int], output: Tensor, places: list[int]) -> None:
        """Rows of the output against fp64, and every byte of the pools against the definition of a stored row."""
        written = torch.zeros(len(output), dtype=torch.bool)
        for b, (a, e) in enumerate(zip(start, ends, strict=True)):
            entries = reference.pooled(*self.pooled_from(b, e))
            for w in range(a // self.ratio, e // self.ratio):
                at = places[b] + w - a // self.ratio
                written[at] = True
                off = (output[at].double() - entries[w]).norm() / entries[w].norm()
                rounding = 2.0**-8 if self.out_dtype == BF16 else 0
                assert float(off) <= pooled_bound(self.spec.window_rows) + rounding, (b, w)
            for position in range(a, e):
                page, row = divmod(position, self.page_size)
                for pool, table, half in zip(self.expected, self.tables, self.stored(b, position), strict=True):
                    pool[int(table[b, page]), row] = half
        assert output[~written].isnan().all(), "a place without an entry was written"
        for pool, expected in zip(self.pools, self.expected, strict=True):
            assert torch.equal(pool.cpu().view(torch.uint8), expected.view(torch.uint8))
        assert int(tensorrt_llm.errors(self.where.device)) == 0

    def stored(self, b: int, position: int) -> tuple[Tensor, Tensor]:
        """The value row and the biased score row of a token."""
        value, score = self.tokens[b][position].float().split(self.spec.channels)
        return value.to(self.state_dtype), (score + self.ape[position % self.ratio]).to(self.state_dtype)

    def pooled_from(self, b: int, end: int) -> tuple[Tensor, CompressorSpec, Tensor | None]:
        """What entries are made of: with pools of bf16, rows as they are kept there, whose scores have their bias."""
        if self.state_dtype == FP32:
            return self.tokens[b][:end], self.spec, self.ape
        return torch.stack([torch.cat(self.stored(b, x)) for x in range(end)]), replace(self.spec, has_ape=False), None


@ON_BOTH
@pytest.mark.parametrize(("head_dim", "ratio"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_prompts_then_tokens(where: Backend, head_dim: int, ratio: int, dtype: torch.dtype) -> None:
    """Prompts, shorter ones than a window too, then chunks beside tokens, then 1 to 4 new tokens of each with rejected ones."""
    layer = Layer(where, head_dim, ratio, [3 * ratio + 20] * 3, dtype=dtype)
    at = [2 * ratio + 3, 1, ratio]
    layer.step([0, 0, 0], at, contexts=3)
    layer.step([at[0], at[1], at[2]], [5, 2, 2], contexts=1)
    at = [at[0] + 5, at[1] + 2, at[2] + 2]
    for n, kept in ((1, 1), (2, 1), (3, 2), (4, 4), (4, 0)):
        layer.step(at, [n] * 3)
        at = [x + kept for x in at]


@ON_BOTH
@pytest.mark.parametrize(("head_dim", "ratio"), SHAPES)
@pytest.mark.parametrize("gap", [0, 1, 3])
def test_reserved_places(where: Backend, head_dim: int, ratio: int, gap: int) -> None:
    """Entries go to `cu_kv_comp[b] + i`, whatever stands between; the rest of the output stays as it was."""
    layer = Layer(where, head_dim, ratio, [2 * ratio + 12] * 4)
    layer.step([0, 0, 0, 0], [ratio, 2 * ratio + 1, 1, ratio - 1], contexts=4, gap=gap)
    layer.step([ratio, 2 * ratio + 1, 1, ratio - 1], [2] * 4, gap=gap)


@ON_BOTH
def test_ragged_generation(where: Backend) -> None:
    """`next_n` is a bound, and each request brings as many tokens as `cu_seq_lens` says."""
    layer = Layer(where, 32, 4, [40] * 4)
    layer.step([0] * 4, [9, 3, 4, 7], contexts=4)
    layer.step([9, 3, 4, 7], [6, 3, 1, 4], next_n=6)
    layer.step([15, 6, 5, 11], [1, 8, 2, 5], next_n=8)


@ON_BOTH
@pytest.mark.parametrize("page_size", [2, 4, 32])
def test_page_sizes(where: Backend, page_size: int) -> None:
    layer = Layer(where, 32, 4, [40] * 2, page_size=page_size)
    layer.step([0, 0], [18, 7], contexts=2)
    layer.step([18, 7], [4, 4])


@ON_BOTH
@pytest.mark.parametrize(("head_dim", "ratio"), SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_pools_of_bf16(where: Backend, head_dim: int, ratio: int, dtype: torch.dtype) -> None:
    """Rows are rounded as they are stored, and pooled as they are stored: the same entry in one chunk or several."""
    layer = Layer(where, head_dim, ratio, [2 * ratio + 8] * 2, dtype=dtype, state_dtype=BF16, out_dtype=BF16)
    layer.step([0, 0], [ratio + 1, 2], contexts=2)
    layer.step([ratio + 1, 2], [ratio, 5], contexts=2)
    layer.step([2 * ratio + 1, 7], [3, 3])


@ON_BOTH
@pytest.mark.parametrize(("head_dim", "ratio"), [(512, 4), (128, 4), (512, 128)])
def test_real_widths(where: Backend, head_dim: int, ratio: int) -> None:
    layer = Layer(where, head_dim, ratio, [ratio + 8] * 2, page_size=128, dtype=BF16, out_dtype=BF16)
    layer.step([0, 0], [ratio + 1, ratio - 1], contexts=2)
    layer.step([ratio + 1, ratio - 1], [4, 4])


@ON_BOTH
def test_pools_may_be_flat(where: Backend) -> None:
    """Pools of `[blocks, page_size * channels]` are the same memory."""
    layer, flat = Layer(where, 32, 4, [20]), Layer(where, 32, 4, [20])
    flat.pools = [pool.flatten(1) for pool in flat.pools]
    flat.expected = [pool.flatten(1) for pool in flat.expected]
    flat.check = lambda *_: None
    assert torch.equal(layer.step([0], [14], contexts=1), flat.step([0], [14], contexts=1))
    assert all(torch.equal(a.flatten(1).nan_to_num(), b.nan_to_num()) for a, b in zip(layer.pools, flat.pools, strict=True))


@ON_BOTH
def test_one_scratch_page(where: Backend) -> None:
    """Early pages of a prompt may all be one scratch page: its entries are made of live rows, and later ones of later pages."""
    layer = Layer(where, 32, 4, [64], page_size=8)
    layer.check = lambda *_: None  # the rows of the scratch page are anything
    for table in layer.tables:
        table[0, :6] = next(page for page in range(len(layer.pools[0])) if page not in table[0].tolist())
    rows = torch.cat([layer.step([0], [57], contexts=1), layer.step([57], [4])]).cpu().double()
    exact = reference.pooled(layer.tokens[0][:61], layer.spec, layer.ape)
    assert float(((rows - exact).norm(dim=1) / exact.norm(dim=1)).max()) <= pooled_bound(8)
    assert int(tensorrt_llm.errors(where.device)) == 0


@ON_BOTH
def test_a_wrong_page_is_counted(where: Backend) -> None:
    """A page that is not there drops what needs it, and nothing is written elsewhere."""
    layer = Layer(where, 32, 4, [16, 16])
    layer.check = lambda *_: None
    layer.step([0, 0], [7, 7], contexts=2)
    before = [pool.clone() for pool in layer.pools]
    layer.tables[0][0, 0] = 999
    output = layer.step([7, 7], [1, 1])
    errors = tensorrt_llm.errors(where.device)
    assert int(errors) > 0 and output[0].isnan().all() and not output[1].isnan().any()
    errors.zero_()
    changed = [(a.nan_to_num() != b.nan_to_num()).flatten(1).any(1).sum() for a, b in zip(layer.pools, before, strict=True)]
    assert int(changed[0]) <= 1


@ON_BOTH
def test_operators_are_in_order(where: Backend) -> None:
    """torch's own checks: what is mutated is in the schema, the fake call is right, sizes may be variables."""
    layer, calls = Layer(where, 16, 4, [20, 20]), []
    layer.check = lambda *_: None

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "trtllm":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Recorder():
        layer.step([0, 0], [9, 6], contexts=2)
        layer.step([9, 6], [3, 3], gap=1)
    assert [str(func) for func, _ in calls] == [
        "trtllm.compressor_prefill_reduction.default",
        "trtllm.compressor_paged_kv_compress.default",
    ]
    for func, args in calls:
        opcheck(func, tuple(x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"next_n": 9}, "next_n must be"),
        ({"next_n": 0}, "next_n must be"),
        ({"output": torch.zeros(2, 31)}, "output must have shape"),
        ({"output": torch.zeros(2, 32, dtype=torch.float16)}, "output must be"),
        ({"paged_kv": torch.zeros(9, 8, 63)}, "paged_kv must be contiguous pages"),
        ({"ape": torch.zeros(4, 63)}, "ape must have shape"),
        ({"kv_score": torch.zeros(2, 127)}, "kv_score must have shape"),
        ({"kv_lens": torch.zeros(2)}, "kv_lens must be"),
        ({"batch_size": 3}, "kv_lens must have 3 rows"),
        ({"cu_seq_lens": torch.zeros(2, dtype=INT32)}, "cu_seq_lens must have 3 rows"),
        ({"cu_kv_comp": torch.zeros(2, dtype=INT32)}, "cu_kv_comp must have 3 rows"),
        ({"block_table_score": torch.zeros(1, 4, dtype=INT32)}, "block_table_score must have 2 rows"),
        ({"page_size": 0}, "page_size must be from 1"),
        ({"compress_ratio": 0}, "compress_ratio must be from 1"),
        ({"cu_seq_lens": torch.zeros(3)}, "cu_seq_lens must be"),
        ({"cu_kv_comp": torch.zeros(3)}, "cu_kv_comp must be"),
        ({"new_tokens_per_seq": torch.zeros(2)}, "new_tokens_per_seq must be"),
        ({"compress_ratio": 5000}, "compress_ratio must be"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, object], message: str) -> None:
    table, pool = torch.zeros(2, 4, dtype=INT32), torch.zeros(9, 8, 64)
    given = {
        "kv_score": torch.zeros(2, 128), "ape": torch.zeros(4, 64), "paged_kv": pool, "paged_score": pool.clone(),
        "block_table_kv": table, "block_table_score": table, "output": torch.zeros(2, 32),
        "kv_lens": torch.tensor([4, 4], dtype=INT32), "cu_seq_lens": torch.tensor([0, 1, 2], dtype=INT32),
        "cu_kv_comp": torch.tensor([0, 1, 2], dtype=INT32), "batch_size": 2, "page_size": 8, "head_dim": 32,
        "compress_ratio": 4, "next_n": 1,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        OPS.compressor_paged_kv_compress(**(given | changed))
    assert not pool.any()


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What a call launches, recorded; it ran before, so that nothing is compiled or made while it is recorded."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def launches_of(call: Callable[[], object]) -> int:
    """Kernels and copies on the GPU of one call, after one like it."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ["compressor_paged_kv_compress", "compressor_prefill_reduction"])
def test_on_a_gpu_two_launches_no_allocation_no_sync(operator: str) -> None:
    """And in a graph other lengths and pages may be replayed."""
    layer, calls = Layer(CUDA, 512, 4, [600] * 3), []
    layer.check = lambda *_: None
    own = getattr(OPS, operator)

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is own.default:
                calls.append(args)
            return func(*args, **(kwargs or {}))

    contexts = 3 if operator.endswith("reduction") else 0
    with Recorder():
        layer.step([0, 0, 0], [4, 4, 4], contexts=contexts)
    (args,) = calls
    assert launches_of(lambda: own(*args)) == 2
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        own(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = graph_of(lambda: own(*args))
    want = args[6].clone()
    args[6].fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(args[6], want)
    args[7].copy_(layer.ints([8, 12, 4]))  # kv_lens: other windows of the same tokens
    if contexts:
        args[8].copy_(layer.ints([4, 8, 0]))
    args[6].fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(args[6][2], want[2])
    assert int(tensorrt_llm.errors(CUDA.device)) == 0
