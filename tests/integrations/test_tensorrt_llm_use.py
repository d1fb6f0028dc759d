"""TensorRT-LLM from the outside: registering its operators, compiled code, and `compress_records`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend, make_tokens
from test_tensorrt_llm import CUDA, INT32, ON_BOTH, graph_of, launches_of
from torch import Tensor

from benchmarks.lib import protocol
from benchmarks.run import trtllm
from kvfold import CompressorSpec, EntryCache, StepPlan, reference
from kvfold.integrations import tensorrt_llm
from kvfold.integrations.switch import ON
from kvfold.integrations.tensorrt_llm import Pools, compress_records
from kvfold.integrations.tensorrt_llm.operators import IMPLEMENTATIONS, schemas
from kvfold.storage.formats import FORMATS

BF16 = torch.bfloat16
OPS = torch.ops.trtllm
BLOCK = 2  # records of a block of the cache


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    yield
    tensorrt_llm.forget()


@pytest.fixture
def operators() -> Iterator[None]:
    tensorrt_llm.register()
    yield
    tensorrt_llm.unregister()


def in_a_process(code: str) -> str:
    """What a fresh process prints, as an operator is a process's."""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_registered_unless_asked() -> None:
    """Not by an import, and by `load` where the variable has the name."""
    code = """
import os, sys, torch
from kvfold.integrations import tensorrt_llm
for engines in ("", "vllm,sglang", "vllm, tensorrt_llm"):
    os.environ["KVFOLD_ENGINES"] = engines
    tensorrt_llm.load()
    print(hasattr(torch.ops.trtllm, "compressor_postprocess_scatter"), "tensorrt_llm" in sys.modules)
"""
    assert in_a_process(code).splitlines() == ["False False", "False False", "True False"]


def test_a_state_that_it_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_ENGINES", "tensorrt_llm:fold")
    with pytest.raises(ValueError, match="KVFOLD_ENGINES must have one of window behind tensorrt_llm:, got 'fold'"):
        tensorrt_llm.load()
    assert "tensorrt_llm" not in ON


def test_it_says_that_it_is_on() -> None:
    tensorrt_llm.register()
    assert ON["tensorrt_llm"] == "3 operators trtllm::compressor_*"
    tensorrt_llm.unregister()
    assert "tensorrt_llm" not in ON


OTHERS = """
import torch
from kvfold.integrations import tensorrt_llm
from kvfold.integrations.tensorrt_llm.operators import IMPLEMENTATIONS, schemas
library, seen = torch.library.Library("trtllm", "FRAGMENT"), []
for name, schema in schemas().items():
    library.define(f"{name}({schema.replace(CHANGED)}) -> ()")
    library.impl(name, lambda *_, name=name: seen.append(name), "CPU")
    torch.library.register_fake(f"trtllm::{name}", lambda *_: None, lib=library)
def call():
    x, one = torch.zeros(2, 32), torch.zeros(2, dtype=torch.int32)
    torch.ops.trtllm.compressor_prefill_reduction(x, x, x, x, one, one, x, one, one, one, one, 0, 8, 32, 4, 1)
    return len(seen)
"""


def test_operators_of_another_library_are_taken_over_on_request() -> None:
    """Refused without; with `replace` kvfold's are called, and behind `unregister` the others again."""
    code = (
        OTHERS.replace("CHANGED", "'', ''")
        + """
try:
    tensorrt_llm.register()
except RuntimeError as error:
    print(error)
print(call())
tensorrt_llm.register(replace=True)
tensorrt_llm.register(replace=True)
print(call())
tensorrt_llm.unregister()
print(call())
"""
    )
    message, *counts = in_a_process(code).splitlines()
    assert message.endswith("is defined by another library: register(replace=True)") and counts == ["1", "1", "2"]


def test_older_schemas_are_taken_over_and_unknown_ones_refused() -> None:
    older = OTHERS.replace("CHANGED", "', Tensor? new_tokens_per_seq=None', ''")
    assert in_a_process(older + "tensorrt_llm.register(replace=True); print(call())") == "0\n"
    newer = OTHERS.replace("CHANGED", "'int page_size', 'int page_size, bool is_overlap'")
    code = """
try:
    tensorrt_llm.register(replace=True)
except RuntimeError as error:
    print(error)
print(call.__name__)
"""
    assert "takes 'is_overlap'" in in_a_process(newer + code)


def test_schemas_say_what_implementations_take() -> None:
    import inspect

    for name, schema in schemas(nvfp4=True).items():
        names = [one.split("=")[0].split()[-1] for one in schema.split(", ")]
        assert {*names} == {*inspect.signature(IMPLEMENTATIONS[name]).parameters} - {"backend"}


class Model:
    """A layer of TensorRT-LLM with all its buffers, for requests that go on from step to step."""

    def __init__(
        self, where: Backend, head_dim: int, ratio: int, kind: int, *, rotate: bool = False, batch: int = 3, seed: int = 1
    ) -> None:
        self.where, self.kind, self.rotate, device = where, kind, rotate, where.device
        self.spec = CompressorSpec(head_dim, ratio, overlap=ratio == 4, rope_dim=16, hadamard=rotate)
        length, g = 3 * ratio + 8, torch.Generator().manual_seed(seed)
        self.tokens = [make_tokens(self.spec, length, 10 * seed + b).to(device) for b in range(batch)]
        self.ape = torch.randn(ratio, self.spec.channels, generator=g).to(device)
        self.weight = (1 + 0.2 * torch.randn(head_dim, generator=g)).bfloat16().to(device)
        self.table = reference.rope_table(256, 16).to(device)
        pages, blocks = -(-length // 8), -(-length // ratio // BLOCK)
        shape = (batch * pages, 8, self.spec.channels)
        rows = self.ints(torch.randperm(batch * pages, generator=g).tolist()).view(batch, pages)
        self.pools = Pools(*(torch.zeros(shape, device=device) for _ in range(2)), rows, rows.flip(0).contiguous(), 8)
        self.blocks = self.ints(torch.randperm(batch * blocks, generator=g).tolist()).view(batch, blocks)
        self.fmt = FORMATS[("bf16_trtllm", "fp8_tensor_trtllm", "fp8_block128", "mxfp4")[kind]]
        record = self.fmt.row_bytes(self.spec) + self.fmt.tail_bytes(self.spec) * (self.fmt.separate or self.fmt.in_footer)
        self.cache = torch.zeros(batch * blocks, BLOCK * record, dtype=torch.uint8, device=device)

    def ints(self, values: object) -> Tensor:
        return torch.tensor(list(values), dtype=INT32, device=self.where.device)

    def lengths(self, start: list[int], new: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """kv_score, kv_lens and cu_seq_lens of a step."""
        kv_score = torch.cat([x[a : a + n] for x, a, n in zip(self.tokens, start, new, strict=True)])
        lens = self.ints(a + n for a, n in zip(start, new, strict=True))
        return kv_score, lens, self.ints(sum(new[:b]) for b in range(len(new) + 1))

    def records(self, start: list[int], new: list[int], lengths: tuple[Tensor, Tensor] | None = None, **more: object) -> None:
        kv_score, *made = self.lengths(start, new)
        lens, cu_seq = lengths or made
        compress_records(
            kv_score, self.pools, self.cache, ape=self.ape, norm_weight=self.weight, norm_eps=1e-6,
            cos_sin_table=self.table.view(-1, 2, 8), kv_lens=lens, cu_seq_lens=cu_seq, block_table=self.blocks,
            tokens_per_block=BLOCK, cache_scale_type=self.kind, rotate_activation=self.rotate, **more,
        )  # fmt: skip

    def operators(self, start: list[int], new: list[int]) -> None:
        """The same by two operators, as `Compressor.forward` calls them for contexts."""
        kv_score, lens, cu_seq = self.lengths(start, new)
        batch, ratio, hd = len(new), self.spec.ratio, self.spec.head_dim
        first = [a // ratio for a in start]
        made = [(a + n) // ratio - f for a, n, f in zip(start, new, first, strict=True)]
        cu_comp = self.ints(sum(made[:b]) for b in range(batch + 1))
        output = torch.zeros(sum(made), hd, dtype=BF16, device=self.where.device)
        kv, score, kv_table, score_table, page = self.pools
        OPS.compressor_prefill_reduction(
            kv_score, self.ape, kv, score, kv_table, score_table, output, lens, self.ints(start), cu_seq, cu_comp, batch, page,
            hd, ratio, max([1, *made]),
        )  # fmt: skip
        positions = self.ints(ratio * (f + i) for f, count in zip(first, made, strict=True) for i in range(count))
        mask = torch.ones(len(output), dtype=torch.bool, device=self.where.device)
        OPS.compressor_postprocess_scatter(
            output, None, self.weight, 1e-6, self.table.view(-1, 2, 8), positions, hd - 16, 16, self.cache, self.ints(made),
            cu_comp, self.ints(first), self.blocks, mask, BLOCK, self.kind, self.rotate, None, None,
        )  # fmt: skip


def script(ratio: int) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts, chunks beside tokens, and drafts of which some are rejected."""
    yield [0, 0, 0], [ratio + 1, 2, 2 * ratio]
    yield [ratio + 1, 2, 2 * ratio], [4, ratio, 1]
    yield [ratio + 3, ratio + 2, 2 * ratio + 1], [4, 4, 4]


@ON_BOTH
@pytest.mark.parametrize(("head_dim", "ratio", "kind", "rotate"), [
    (32, 4, 0, False), (32, 128, 0, False), (32, 4, 1, False), (128, 4, 2, True), (128, 4, 3, True), (512, 128, 2, False),
])  # fmt: skip
def test_records_are_those_of_the_operators(
    where: Backend, operators: None, head_dim: int, ratio: int, kind: int, rotate: bool
) -> None:
    """To the byte, pools too; and entries are those of one sequence by itself in fp64, but for bf16 and the code."""
    one, other = (Model(where, head_dim, ratio, kind, rotate=rotate) for _ in range(2))
    for start, new in script(ratio):
        one.records(start, new, max_new_tokens=max(new) if max(new) <= 4 else None)
        other.operators(start, new)
        assert torch.equal(one.cache, other.cache)
        assert all(torch.equal(a, b) for a, b in zip(one.pools[:2], other.pools[:2], strict=True))
    assert int(tensorrt_llm.errors(where.device)) == 0
    spec, values = one.spec, BLOCK * one.fmt.row_bytes(one.spec)
    parts = (one.cache[:, :values], one.cache[:, values:]) if one.fmt.separate else (one.cache, None)
    cache = EntryCache(parts[0], one.fmt, BLOCK, spec, scales=parts[1])
    ends = [ratio + 7, ratio + 6, 2 * ratio + 5]
    for b, end in enumerate(ends):
        exact = reference.entries(one.tokens[b][:end].cpu(), spec, one.ape.cpu(), one.weight.cpu(), one.table.cpu())
        slots = [int(one.blocks[b, w // BLOCK]) * BLOCK + w % BLOCK for w in range(end // ratio)]
        got = cache.read(torch.tensor(slots, device=where.device)).cpu()
        off = (got - exact).norm(dim=1) / exact.norm(dim=1)
        assert float(off.max()) < (2.0**-7, 2.0**-4, 2.0**-4, 0.25)[kind]


@ON_BOTH
def test_a_scale_on_the_device(where: Backend) -> None:
    """It is read by each store: what changes it between steps changes the codes of the next ones."""
    scale = torch.ones(1, device=where.device)
    one, other = (Model(where, 32, 4, 1) for _ in range(2))
    one.records([0, 0, 0], [8, 8, 8], scale=scale)
    scale.fill_(0.5)
    one.records([8, 8, 8], [4, 4, 4], scale=scale)
    other.records([0, 0, 0], [8, 8, 8])
    other.records([8, 8, 8], [4, 4, 4], scale=0.5)
    assert torch.equal(one.cache, other.cache)


def test_wrong_arguments_of_records() -> None:
    one = Model(BACKENDS["torch"], 32, 4, 1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        one.records([0, 0, 0], [8, 8, 8], max_new_tokens=0)
    one.table = one.table.double()
    with pytest.raises(TypeError, match=r"^cos_sin_table"):
        one.records([0, 0, 0], [8, 8, 8])
    one.table = one.table.float()
    with pytest.raises(TypeError, match="scale must be the number 1"):
        Model(BACKENDS["torch"], 32, 4, 0).records([0, 0, 0], [8, 8, 8], scale=torch.ones(1))


@ON_BOTH
def test_compiled_code_calls_them(where: Backend, operators: None) -> None:
    """A whole graph, no break: the operators are traced by their fakes, and what they mutate is the caller's."""
    one, other = (Model(where, 32, 4, 0) for _ in range(2))
    given = [*one.lengths([0, 0, 0], [9, 2, 4])]
    rows = torch.zeros(3, 32, dtype=BF16, device=where.device)
    cu_comp, first = one.ints([0, 2, 2, 3]), one.ints([0, 0, 0])

    def step(kv_score: Tensor, kv: Tensor, score: Tensor, output: Tensor) -> Tensor:
        OPS.compressor_prefill_reduction(
            kv_score * 1.0, one.ape, kv, score, *one.pools[2:4], output, given[1], first, given[2], cu_comp, 3, 8, 32, 4, 2
        )
        return output * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = compiled(given[0], one.pools.paged_kv, one.pools.paged_score, rows)
    want = step(given[0], other.pools.paged_kv, other.pools.paged_score, torch.zeros_like(rows))
    assert torch.equal(got, want) and torch.equal(rows * 2, want) and want.abs().max() > 0
    assert torch.equal(one.pools.paged_kv, other.pools.paged_kv)


@ON_BOTH
def test_layers_share_a_plan_update(where: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind `step` one update serves all layers, each with tables of its own. Without it, and for others, all update."""
    updates, update = [], StepPlan.update
    monkeypatch.setattr(StepPlan, "update", lambda plan, *given, **more: (updates.append(plan), update(plan, *given, **more)))
    layers = [Model(where, 32, 4, 0, seed=seed) for seed in range(3)]
    alone = [Model(where, 32, 4, 0, seed=seed) for seed in range(3)]
    for layer in (*layers, *alone):
        layer.blocks = layers[0].blocks  # which are those of all layers of a ratio
    for round_, (start, new) in enumerate(script(4)):
        lens, cu_seq = layers[0].lengths(start, new)[1:]
        if round_:
            tensorrt_llm.step()
        for layer, other in zip(layers, alone, strict=True):
            before = len(updates)
            layer.records(start, new, lengths=(lens, cu_seq))
            # The first layer of new metadata builds the plan, which updates it too.
            assert len(updates) - before == (2 if layer is layers[0] else int(round_ == 0))
            other.records(start, new)
            assert torch.equal(layer.cache, other.cache) and layer.cache.any()
    before = len(updates)
    layers[0].records(start, new)  # the same step told by other tensors
    assert len(updates) > before
    assert not torch.equal(layers[0].cache, layers[1].cache)


@pytest.mark.gpu
def test_on_a_gpu_records_are_two_launches() -> None:
    one = Model(CUDA, 512, 4, 0)
    kv_score, lens, cu_seq = one.lengths([0, 0, 0], [4, 4, 4])
    fixed = {
        "ape": one.ape, "norm_weight": one.weight, "norm_eps": 1e-6, "cos_sin_table": one.table.view(-1, 2, 8), "kv_lens": lens,
        "cu_seq_lens": cu_seq, "block_table": one.blocks, "tokens_per_block": BLOCK, "max_new_tokens": 4,
    }  # fmt: skip

    def call() -> None:
        compress_records(kv_score, one.pools, one.cache, **fixed)

    assert launches_of(call) == 2
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph, want = graph_of(call), one.cache.clone()
    one.cache.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(one.cache, want)


def test_the_page_runs_as_pasted() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tensorrt_llm.md").read_text()
    scope: dict = {}
    for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(text, "tensorrt_llm.md", "exec"), scope)
    one, other = Model(BACKENDS["torch"], 32, 4, 1), Model(BACKENDS["torch"], 32, 4, 1)
    kv_score, lens, cu_seq = one.lengths([0, 0, 0], [9, 4, 2])
    compressor = SimpleNamespace(
        ape=one.ape, norm=SimpleNamespace(weight=one.weight, variance_epsilon=1e-6), kv_cache_dtype=1, rotate_activation=False,
        rotary_emb=SimpleNamespace(rotary_cos_sin=one.table.view(-1, 2, 8)),
    )  # fmt: skip
    metadata = SimpleNamespace(num_contexts=3, num_generations=0, kv_lens_cuda_runtime=lens, cu_seq_lens_cuda=cu_seq)
    scope["behind_the_projection"](compressor, kv_score, metadata, one.pools, one.cache, one.blocks, BLOCK)
    other.records([0, 0, 0], [9, 4, 2])
    assert torch.equal(one.cache, other.cache) and one.cache.any()


@pytest.mark.parametrize("kind", trtllm.KINDS)
@pytest.mark.parametrize("case", [case for case in trtllm.CASES if case.batch == 16], ids=lambda case: case.name)
def test_the_benchmark_times_the_same_work(case: protocol.Case, kind: int) -> None:
    """Each way leaves the records of the first; `calls_of` itself raises where one is refused."""
    inputs = trtllm.Inputs(case, kind, "cpu")
    calls, cache = inputs.calls()
    calls["compress"]()
    want = cache.clone()
    assert want.any()
    for way in trtllm.TO:
        cache.zero_()
        calls["pool"]()
        calls[way]()
        assert torch.equal(cache, want) or way == "pool", way
    inputs.check()
