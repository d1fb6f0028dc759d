"""Steps over a plan: the bits of one `compress`, whatever was launched before, and nothing kept that could go stale or stay."""

import copy
import gc
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", minversion="5.17")
from support.transformers_support import CACHE, TWO, close, compressors, ids, run, tiny
from support.transformers_support import step as step_of
from transformers import DynamicCache

from kvfold import CompressorSpec, EntryCache, FoldState, StepPlan, compress, reference
from kvfold.backend_triton import again
from kvfold.backend_triton.launcher import Launcher
from kvfold.integrations.transformers import patch, planned, rewind, step

SPECS = [CompressorSpec(head_dim=32, ratio=ratio, overlap=overlap, rope_dim=16) for ratio, overlap in ((16, False), (4, True))]
LENGTH = 84


@pytest.fixture(autouse=True)
def thread(monkeypatch):
    """As a thread that has kept nothing, with plans on a CPU too."""
    monkeypatch.setattr(step, "goes_together", lambda *_: False)
    monkeypatch.setattr(planned, "_thread", planned._OfThread())


class Sequences:
    """Random tokens of a batch and the weights of their compressor; what they are made into, one step after the other."""

    def __init__(self, spec, batch, dtype, backend, most=1, bias=torch.float32, seed=0):
        torch.manual_seed(seed)
        device = backend.device
        self.spec, self.most, self.backend, self.at = spec, most, backend.name, 0
        self.kv = torch.randn(batch, LENGTH, spec.channels).to(device, dtype)
        self.gate = (4 * torch.randn(batch, LENGTH, spec.channels)).to(device, dtype)
        self.ape = torch.randn(spec.ratio, spec.channels).to(device, bias)
        self.norm_weight = torch.randn(spec.head_dim).to(device)
        self.rope = reference.rope_table(256, 16).to(device)
        self.state = step.new_state(self.kv, (spec.head_dim, spec.ratio, spec.overlap, spec.rope_dim), most, self.backend)
        self.entries = torch.empty(batch, 0, spec.head_dim, dtype=dtype, device=device)

    def step(self, new):
        at, end, ratio = self.at, self.at + new, self.spec.ratio
        batch, capacity, width = self.entries.shape
        if not capacity or end // ratio > capacity:
            more = self.entries.new_full((batch, end // ratio + 1 - capacity, width), 7.0)
            self.entries = torch.cat([self.entries, more], 1)
        places = torch.arange(at // ratio, end // ratio, device=self.kv.device) * ratio
        planned.step_planned(
            self.kv[:, at:end].contiguous(), self.gate[:, at:end].contiguous(), self.ape, self.norm_weight,
            self.rope[places] if len(places) else None, *self.state, self.entries, at, self.most, self.spec, self.backend,
        )  # fmt: skip
        self.at = end

    def done(self):
        return self.entries[:, : self.at // self.spec.ratio]

    def whole(self):
        """Entries by one step of `compress`."""
        (batch, length), spec = self.kv.shape[:2], self.spec
        count, rows = length // spec.ratio, torch.arange(batch, dtype=torch.int32, device=self.kv.device)
        ends = torch.arange(batch + 1, dtype=torch.int32, device=self.kv.device) * length
        plan = StepPlan.build(
            spec.ratio, torch.zeros_like(rows), ends, length, state_slots=rows,
            cache_block_table=rows[:, None].contiguous(), rows_per_page=count,
        )  # fmt: skip
        cache = EntryCache.allocate(planned.FORMATS[self.kv.dtype], batch, count, spec, device=self.kv.device)
        state = FoldState.allocate(spec, batch, 8, device=self.kv.device)
        weights = {"spec": spec, "ape": self.ape.float(), "norm_weight": self.norm_weight, "rope": self.rope}
        tokens = torch.cat([self.kv, self.gate], -1).flatten(0, 1)
        compress(tokens, plan, state, cache, **weights, backend=self.backend)
        return cache.read(torch.arange(batch * count, device=self.kv.device)).view(batch, count, -1)


def counted():
    """Sequences and entries that were refused."""
    return sum(int(one.plan.errors) for kept in planned._thread.streams.values() for one in kept.plans.values())


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_bits(backend, spec, seed):
    """Random cuts, tokens taken back, caches in turn; each next one finds launches of those before."""
    draw = random.Random(seed)
    batch, most, dtype = draw.choice((1, 2)), draw.choice((1, 2, 5)), draw.choice((torch.float32, torch.bfloat16))
    bias = draw.choice((torch.float32, torch.bfloat16))
    for cache in range(2):
        one = Sequences(spec, batch, dtype, backend, most, bias, seed=10 * seed + cache)
        furthest = 0
        while one.at < LENGTH:
            one.step(min(LENGTH - one.at, draw.choice((1, 1, 1, 2, 3, 5, 17, 30))))
            furthest = max(furthest, one.at)
            if draw.random() < 0.3 and one.at < LENGTH and most > 1:
                one.at = max(one.at - draw.randint(0, most), furthest - most, 0)
        assert torch.equal(one.done().float(), one.whole())
    assert counted() == 0
    kinds = next(kept.again for kept in planned._thread.streams.values())
    assert bool(kinds) == (backend.name == "triton")


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_step(backend, bias):
    """Written in place, unseen, put elsewhere, or others; windows that begin later have them."""
    spec = SPECS[0]
    one, want = (Sequences(spec, 1, torch.float32, backend, bias=bias) for _ in range(2))
    changes = (
        lambda s: s.ape.mul_(0.5),
        lambda s: s.norm_weight.data.mul_(2.0),
        lambda s: setattr(s.ape, "data", s.ape.data.roll(1)),
        lambda s: (setattr(s, "ape", s.ape.roll(1)), setattr(s, "norm_weight", s.norm_weight.roll(1))),
    )
    for window, change in enumerate((lambda s: None, *changes)):
        change(one), change(want)
        for _ in range(spec.ratio):
            one.step(1)
        assert torch.equal(one.entries[:, window], want.whole()[:, window])


def test_wrong_weights_are_refused_by_name(backend):
    one = Sequences(SPECS[0], 1, torch.float32, backend)
    one.step(3)
    one.step(3)
    one.ape = one.ape[:-1]
    with pytest.raises(ValueError, match="ape must have shape"):
        one.step(3)
    one.ape, one.norm_weight = torch.zeros(16, 32, device=backend.device), one.norm_weight.double()
    with pytest.raises(TypeError, match="norm_weight must be"):
        one.step(3)


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "interpreter"], indirect=True)
def test_weights_of_another_shape_at_the_same_address_are_refused(backend, bias):
    """On a CPU; on a GPU a tensor keeps its shape."""
    one = Sequences(SPECS[0], 1, torch.float32, backend, bias=bias)
    for _ in range(3):
        one.step(1)
    for name in ("ape", "norm_weight"):
        weight = getattr(one, name)
        whole = weight.data
        weight.data = whole[:1]
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            one.step(1)
        weight.data = whole
        one.step(1)


def test_wrong_projections_are_refused(backend):
    """They go through `compress`, which says what is wrong, also behind steps that were right."""
    one = Sequences(SPECS[0], 1, torch.float32, backend)
    one.step(3)
    one.gate = one.gate.bfloat16()
    with pytest.raises(TypeError, match=r"kv_score\[1\] must be torch.float32"):
        one.step(3)
    one.gate = one.gate.float()[..., :16]
    with pytest.raises(ValueError, match=r"kv_score"):
        one.step(3)


def test_a_cache_that_goes_is_freed(backend):
    one = Sequences(SPECS[1], 1, torch.float32, backend)
    for _ in range(9):
        one.step(1)
    gone = [weakref.ref(x) for x in (*one.state, one.entries, one.ape)]
    (kept,) = planned._thread.streams.values()
    assert len(kept.known) == 1
    del one
    gc.collect()
    assert not any(ref() is not None for ref in gone) and not kept.known


def test_plans_are_few(backend):
    """Chunks of any lengths share them, and those of long prompts do not stay."""
    spec = SPECS[1]
    one = Sequences(spec, 1, torch.float32, backend)
    for new in (9, 10, 12, 16, 3):
        one.step(new)
    (kept,) = planned._thread.streams.values()
    assert [key[2] for key in kept.plans] == [16, 3]
    for new in (5000, 2, *range(20, 20 + planned._MOST_PLANS)):
        kept.plan(4, 1, 0, new, 2000 if new > 4096 else 64)
        assert len(kept.plans) <= planned._MOST_PLANS
    assert all(key[2] <= 4096 for key in kept.plans)


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("order", [(4, 512), (512, 1024), (1024, 512, 4)], ids=str)
def test_compressors_of_all_widths_share_scratch(backend, order, monkeypatch):
    """An indexer counts items that are drawn; entries of fold rows are shared in slices, which are as wide as they are."""

    def checked(scratch, slices, draws, entries, head_dim):
        rows, tickets = scratch_of(scratch, slices, draws, entries, head_dim)
        if slices > 1:
            asked.append(entries * head_dim)
            assert rows.numel() >= asked[-1] and tickets.numel() >= entries
        elif draws:
            asked.append(0)
            assert rows is None and tickets.numel() >= 1
        return rows, tickets

    asked, scratch_of = [], again.scratch_of
    monkeypatch.setattr(again, "scratch_of", checked)
    overlapping = CompressorSpec(head_dim=128, ratio=4, overlap=True, rope_dim=16)
    for width in order:
        spec = overlapping if width == 4 else CompressorSpec(head_dim=width, ratio=64, rope_dim=16)
        for seed in range(2):
            one = Sequences(spec, 1, torch.float32, backend, seed=seed)
            one.step(42), one.step(42)
            assert torch.equal(one.done(), one.whole())
    (kept,) = planned._thread.streams.values()
    assert {*asked} == {0 if width == 4 else width for width in order} and len(kept.scratch._workspaces) <= 2


def test_kinds_of_steps_are_few(backend, monkeypatch):
    monkeypatch.setattr(planned, "_MOST_KINDS", 2)
    one = Sequences(SPECS[1], 1, torch.float32, backend)
    for new in (9, 20, 1, 3, 1, 4):
        one.step(new)
    (kept,) = planned._thread.streams.values()
    assert len(kept.again) <= 2 and torch.equal(one.done(), one.whole()[:, : one.at // 4])


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_no_operation_but_the_launch(backend, monkeypatch):
    """Of a decode step that ends no window, where a layer before it has made the plan of the step."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names = set()
    one, other = (Sequences(SPECS[0], 1, torch.float32, backend, seed=seed) for seed in (0, 1))
    for _ in range(4):
        one.step(1)
        if other.at < 3:
            other.step(1)
    tokens = other.kv[:, 3:4].contiguous(), other.gate[:, 3:4].contiguous()
    launches = []
    monkeypatch.setattr(Launcher, "__call__", lambda *launch: launches.append(launch))  # interpreted, it is many operations
    with Seen():
        planned.step_planned(
            *tokens, other.ape, other.norm_weight, None, *other.state, other.entries, 3, 1, other.spec, other.backend
        )
    assert names <= {"view", "detach"} and len(launches) == 1  # neither launches anything


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_a_model_over_kernels(backend):
    """Prompts, chunks and decode behind a copied cache, in inference mode and out of it; a cast between two runs."""
    plain = tiny(layer_types=TWO).to(backend.device)
    model = copy.deepcopy(plain)
    patch(model, backend="triton", max_new_tokens=3)
    tokens = ids(40, 2).to(backend.device)
    for _ in range(2):
        want = run(plain, tokens, [13, 17, 18, 19, 20])[0]
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            got = [model(tokens[:, :13].clone(), **{CACHE: cache}).logits]
        copied = copy.deepcopy(cache)
        for one in (copied, cache):  # the second has the same tokens in other memory
            rest = [step_of(model, piece, one) for piece in tokens[:, 13:].split([4, 1, 1, 1, 20], 1)]
        close(torch.cat([*got, *rest], 1), want)
        rewind(cache, 38)
        close(step_of(model, tokens[:, 38:], cache), want[:, 38:])
        for compressor in (one for part in (plain, model) for one in compressors(part)):
            compressor.position_bias = torch.nn.Parameter(compressor.position_bias.detach().bfloat16())
    assert counted() == 0
