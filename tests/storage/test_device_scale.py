"""A scale of the whole cache in a tensor: read by the store that runs, never by the host."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.helpers import Backend, Weights, make_tokens
from support.ops_support import Recorder, through_operators
from torch.library import opcheck

import kvfold
from kvfold import CompressorSpec, EntryCache
from kvfold.storage.formats import FORMATS

TAKING = [name for name, fmt in FORMATS.items() if fmt.takes_scale]
N, NUMBER = 6, 0.37


class Call:
    """A prompt of `N` windows, into a cache with this scale."""

    def __init__(self, backend: Backend, name: str, scale: float | torch.Tensor) -> None:
        self.backend, device = backend, backend.device
        wide = FORMATS[name].head_dims
        self.spec = CompressorSpec(wide[0] if wide else 64, 4, overlap=True, rope_dim=64)
        weights = Weights.make(self.spec)
        self.ape, self.norm_weight, self.rope = (x.to(device) for x in (weights.ape, weights.norm_weight, weights.rope))
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        self.plan = kvfold.StepPlan.build(
            4, zero, zero.new_tensor([0, 4 * N]), 4 * N, state_slots=zero, entry_slots=torch.arange(N, device=device)
        )
        self.state = kvfold.FoldState.allocate(self.spec, 1, 4, device=device)
        self.cache = EntryCache.allocate(name, 2, 4, self.spec, device=device, scale=scale)
        self.tokens = make_tokens(self.spec, 4 * N, 3).to(device)
        self.rows = torch.zeros(N, self.spec.head_dim, device=device)

    @property
    def rest(self) -> dict:
        return {"spec": self.spec, "norm_weight": self.norm_weight, "rope": self.rope}

    def compress(self, backend: str | None = None) -> torch.Tensor:
        how = {"rows": self.rows, "backend": backend or self.backend.name}
        kvfold.compress(self.tokens, self.plan, self.state, self.cache, ape=self.ape, **self.rest, **how)
        assert int(self.plan.errors) == 0
        return self.cache.pages.cpu().clone()

    def store(self) -> torch.Tensor:
        self.cache.pages.zero_()
        kvfold.store(self.rows, self.plan, self.cache, **self.rest, backend=self.backend.name)
        return self.cache.pages.cpu().clone()


def unaligned(backend: Backend, value: float) -> torch.Tensor:
    """A layer's scale in a tensor of many: at 12 bytes, where nothing that is read 16 bytes at a time can be."""
    return torch.tensor([1.0, 2.0, 4.0, value], device=backend.device)[3]


@pytest.mark.parametrize("name", TAKING)
def test_as_a_number_and_read_when_it_runs(backend: Backend, name: str) -> None:
    tensor = unaligned(backend, NUMBER)
    number, device = Call(backend, name, NUMBER), Call(backend, name, tensor)
    want = number.compress()
    assert torch.equal(device.compress(), want) and torch.equal(device.store(), want) and want.any()
    assert torch.equal(
        device.cache.read(torch.arange(N, device=backend.device)), number.cache.read(torch.arange(N, device=backend.device))
    )
    layer = device.cache._layer
    tensor.fill_(2.5)  # by the engine, between two steps
    changed = Call(backend, name, 2.5).compress()
    assert not torch.equal(changed, want)
    assert torch.equal(device.store(), changed) and device.cache._layer is layer
    assert torch.equal(device.compress(), changed)


def test_the_same_kernel_for_every_address(backend: Backend) -> None:
    """Where the scale lies does not choose a kernel, as the alignment of other tensors does."""
    if backend.name != "triton" or backend.slow:
        pytest.skip("launches")
    from kvfold.backend_triton import launcher

    Call(backend, "fp8_tensor", torch.full((1,), NUMBER, device=backend.device)).compress()
    before = launcher.compilations
    Call(backend, "fp8_tensor", unaligned(backend, NUMBER)).compress()
    assert launcher.compilations == before


def test_a_number_that_is_set_later_has_the_same_place() -> None:
    """A CUDA graph may have its address."""
    call = Call(Backend("torch", torch.device("cpu")), "fp8_tensor", NUMBER)
    before, place = call.compress(), call.cache.scale_tensor.data_ptr()
    call.cache.scale = 2.5
    assert not torch.equal(call.store(), before)
    assert call.cache.scale_tensor.data_ptr() == place and call.cache.scale_tensor.tolist() == [2.5]
    assert EntryCache.allocate("bf16", 1, 1, call.spec).scale_tensor is None


def test_refused() -> None:
    spec = CompressorSpec(64, 4)
    for scale, error in (
        (torch.ones(2), ValueError),
        (torch.ones(0), ValueError),
        (torch.ones(1, dtype=torch.float64), TypeError),
        (torch.ones(1, dtype=torch.bfloat16), TypeError),
        (torch.ones(1, dtype=torch.int32), TypeError),
        (torch.ones(1, device="meta"), ValueError),
        (torch.ones(1).to_sparse(), TypeError),
    ):
        with pytest.raises(error, match=r"^scale "):
            EntryCache.allocate("fp8_tensor", 1, 4, spec, scale=scale)
    for value in (1.0, 2.0):  # which the host would have to read
        with pytest.raises(TypeError, match=r"^scale must be the number 1"):
            EntryCache.allocate("bf16", 1, 4, spec, scale=torch.full((1,), value))
    cache = EntryCache.allocate("fp8_tensor", 1, 4, spec, scale=torch.ones(1))
    cache.scale = torch.ones(3)
    with pytest.raises(ValueError, match=r"cache: scale "):
        cache.read(torch.zeros(1, dtype=torch.int32))


def test_what_is_written_may_not_be_the_scale() -> None:
    call = Call(Backend("torch", torch.device("cpu")), "fp8_tensor", 1.0)
    call.cache.scale = call.state.rows.view(-1)[5:6]
    with pytest.raises(ValueError, match="must not share memory"):
        call.compress()


def test_copies_keep_it() -> None:
    tensor = torch.full((1,), NUMBER)
    call = Call(Backend("torch", torch.device("cpu")), "fp8_tensor", tensor)
    twin = copy.deepcopy(call.cache)
    assert twin.scale_tensor.tolist() == tensor.tolist() and twin.scale_tensor.data_ptr() != tensor.data_ptr()
    assert copy.copy(call.cache).scale is tensor


@pytest.mark.parametrize("name", ["fp8_tensor", "nvfp4_trtllm"])
def test_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes the tensor, which it reads and does not mutate; numbers come as the cache's own."""
    cpu = Backend("torch", torch.device("cpu"))
    want = Call(cpu, name, NUMBER).compress()
    calls = Call(cpu, name, NUMBER), Call(cpu, name, torch.full((), NUMBER))
    through_operators(monkeypatch)
    with Recorder() as recorder:
        assert all(torch.equal(call.compress(), want) and torch.equal(call.store(), want) for call in calls)
    assert {*recorder.calls} == {"kvfold::compress", "kvfold::store"}
    for operator, arguments in recorder.calls.values():
        opcheck(operator, arguments)


def test_in_compiled_code() -> None:
    cpu, tensor = Backend("torch", torch.device("cpu")), torch.full((1,), NUMBER)
    call, eager = Call(cpu, "fp8_tensor", tensor), Call(cpu, "fp8_tensor", NUMBER)
    torch._dynamo.reset()
    step = torch.compile(
        lambda rows: kvfold.store(rows, call.plan, call.cache, **call.rest), backend="aot_eager", fullgraph=True
    )
    eager.compress()
    call.rows.copy_(eager.rows)
    step(call.rows)
    assert torch.equal(call.cache.pages, eager.cache.pages)
    tensor.fill_(2.5)
    step(call.rows)
    assert torch.equal(call.cache.pages, Call(cpu, "fp8_tensor", 2.5).compress())


def test_check_dump_and_replay(tmp_path: Path) -> None:
    call = Call(Backend("torch", torch.device("cpu")), "nvfp4_trtllm", torch.full((1,), 2.7))
    given = (call.tokens, call.plan, call.state, call.cache)
    assert kvfold.check(*given, ape=call.ape, **call.rest).equal
    kvfold.dump(tmp_path / "x", *given, ape=call.ape, **call.rest)
    again = kvfold.replay(tmp_path / "x", device="cpu")
    assert again.compressors[0].cache.scale_tensor.tolist() == call.cache.scale_tensor.tolist()


@pytest.mark.gpu
def test_a_recorded_step_reads_it() -> None:
    """A replay has the scale of its own time."""
    gpu = Backend("triton", torch.device("cuda", 0))
    tensor = unaligned(gpu, NUMBER)
    call = Call(gpu, "fp8_tensor", tensor)
    call.compress()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kvfold.store(call.rows, call.plan, call.cache, **call.rest)
    for value in (NUMBER, 2.5):
        tensor.fill_(value)
        graph.replay()
        assert torch.equal(call.cache.pages.cpu(), Call(gpu, "fp8_tensor", value).compress())


@pytest.mark.parametrize("call", ["compress", "store"])
def test_a_scale_whose_memory_is_gone(backend: Backend, call: str) -> None:
    """Refused by name, also by a layer that has stored with it: reading it would end the process."""
    scale = torch.full((1,), NUMBER, device=backend.device)
    one = Call(backend, TAKING[0], scale)
    one.compress()
    one.store()
    scale.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="cache: scale must have its memory"):
        getattr(one, call)()
