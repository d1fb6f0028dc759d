"""What may be given: plain memory that is there, objects that were made, facts that agree. Else nothing is written."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS
from support.fuzz_support import CALLS, World
from support.helpers import Backend
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import kvfold
from kvfold import EntryCache, FoldState, Snapshots, StepPlan, WindowState

CPU = BACKENDS["torch"]


def freed(x: Tensor) -> Tensor:
    """The same sizes over a storage of no bytes."""
    gone = x.clone()
    gone.untyped_storage().resize_(0)
    return gone


def cut_short(x: Tensor) -> Tensor:
    gone = x.clone()
    gone.untyped_storage().resize_(gone.untyped_storage().nbytes() - 1)
    return gone


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


# Tensors that are not what stands in their memory, or have none; and a word of the reason.
HIDDEN: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "negated": ("resolve_neg", lambda x: x._neg_view()),
    "without memory": ("zeros", lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device)),
    "freed": ("storage", freed),
    "cut short": ("storage", cut_short),
    "a subclass with tensors inside": ("TwoTensor", lambda x: TwoTensor(x, x)),
    "nested": ("nested", lambda x: torch.nested.nested_tensor([x[:1], x[1:]], dtype=x.dtype, device=x.device)),
    "sparse": ("sparse", lambda x: x.to_sparse()),
    "not loaded": ("load", lambda x: torch.nn.UninitializedBuffer(dtype=x.dtype, device=x.device)),
}


def arguments(world: World) -> list[str]:
    return [name for name in world.names() if isinstance(world.leaves[name], Tensor)]


def refused(world: World, name: str, reason: str, what: str) -> None:
    """The call is refused by the name of the argument, and no byte was written."""
    before = world.arena.clone()
    with pytest.raises((TypeError, ValueError)) as error:
        world.run()
    text, words = str(error.value), [part for part in name.split(".") if not part.isdigit()]
    assert any(re.search(rf"\b{word}\b", text) for word in words), f"{what} {name} is not named: {text}"
    assert re.search(reason, text), f"{what} {name}: {text}"
    assert torch.equal(world.arena, before), f"{what} {name}: refused, and something was written"


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("call", CALLS)
def test_memory_that_is_not_the_tensor(call: str, how: str) -> None:
    """Every tensor argument of every call, and of every constructor behind it."""
    reason, hide = HIDDEN[how]
    for kind in ("rows", "fold", "window") if call in ("compress", "update") else ("rows",):
        world = World(kind, call, CPU)
        for name in arguments(world):
            good = world.leaves[name]
            world.leaves[name] = hide(good)
            refused(world, name, reason, how)
            world.leaves[name] = good


@pytest.mark.parametrize("call", ["compress", "store", "place", "restore", "update"])
def test_a_fake_tensor_among_real_ones(call: str) -> None:
    world = World("rows", call, CPU)
    traced = {"compress": ("kv_score",), "restore": ("state.rows",), "update": ("start_pos",)}.get(call, ("rows",))
    for name in arguments(world):
        if name in traced or (call != "update" and name.startswith("plan.")):
            continue  # with the first the call is traced; a plan is made of fake tensors whole or not at all
        good = world.leaves[name]
        world.leaves[name] = fake(good)
        before = world.arena.clone()
        with pytest.raises(TypeError, match=r"fake|Fake|plain dense"):
            world.run()
        assert torch.equal(world.arena, before)
        world.leaves[name] = good


@pytest.mark.parametrize("call", ["compress", "store", "place", "restore", "update"])
def test_the_first_argument_alone_is_fake(call: str) -> None:
    world = World("rows", call, CPU)
    name = {"compress": "kv_score", "restore": "state.rows", "update": "start_pos"}.get(call, "rows")
    world.leaves[name] = fake(world.leaves[name])
    if call == "restore":
        world.leaves["state.positions"] = fake(world.leaves["state.positions"])
    refused(world, "plan.snapshots.state.cu_seqlens.slots", "FakeTensor", "real beside fake:")


def test_real_and_imaginary_parts(backend: Backend) -> None:
    """The imaginary part of a conjugate is an fp32 tensor with a sign that its memory does not have."""
    world = World("rows", "compress", backend)
    pairs = torch.complex(world.leaves["kv_score"], world.leaves["kv_score"])
    world.leaves["kv_score"] = pairs.conj().imag
    refused(world, "kv_score", "resolve_neg|contiguous", "conjugated")
    world.leaves["ape"] = world.leaves["ape"]._neg_view()
    world.leaves["kv_score"] = world.put(pairs.imag.contiguous())
    refused(world, "ape", "resolve_neg", "negated")


@pytest.mark.parametrize("transform", ["vmap", "functionalize", "grad"])
def test_inside_a_transform(transform: str) -> None:
    """The tensor of the transform is refused, and so is a call that has none of it, or that makes its objects there."""
    world = World("rows", "compress", CPU)
    made = {key: value for key, (value, _) in objects(world).items()}
    before, x = world.arena.clone(), world.leaves["kv_score"]

    def inside(run: Callable[[Tensor], object]) -> None:
        def call(x: Tensor) -> Tensor:
            run(x)
            return x.sum()

        with pytest.raises((TypeError, ValueError), match=r"inside"):
            getattr(torch.func, transform)(call)(x[None].clone() if transform == "vmap" else x.clone())
        assert torch.equal(world.arena, before)

    def given(x: Tensor) -> None:
        world.leaves["kv_score"] = x
        call_with(world, made)

    inside(given)
    world.leaves["kv_score"] = x
    inside(lambda _: call_with(world, made))
    inside(lambda _: world.run())
    inside(lambda _: made["plan"].update(world.leaves["plan.start_pos"], world.leaves["plan.cu_seqlens"]))


@pytest.mark.parametrize("call", ["compress", "many", "store", "place", "restore", "update", "read"])
def test_inference_tensors_are_tensors(call: str) -> None:
    """Made inside of inference mode and used outside, and the other way round: the same bytes as with others."""
    worlds = []
    for inside, run_inside in ((False, False), (True, False), (False, True)):
        with torch.inference_mode(inside):
            world = World("rows", call, CPU)
        with torch.inference_mode(run_inside):
            assert world.run() == 0
        worlds.append(world)
    assert all(torch.equal(world.arena, worlds[0].arena) for world in worlds)


@pytest.mark.parametrize("kind", ["rows", "fold", "window"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_the_callers(backend: Backend, kind: str, dtype: torch.dtype) -> None:
    """Engines set it while they load a model: it changes no bit and no dtype."""
    found = []
    for default in (torch.float32, dtype):
        world = World(kind, "compress", backend)
        plan, cache = world.plan(), world._make(EntryCache, "cache", spec=world.spec)
        made = {"plan": plan, "cache": cache, "state": world.state(), "snapshots": None}
        mxfp4 = EntryCache(torch.full((1, 4 * 32), 0x5A).byte(), "mxfp4", 4, world.spec, scales=torch.full((1, 8), 127).byte())
        torch.set_default_dtype(default)
        try:
            call_with(world, made)
            store_with(world, made)
            found.append([world.arena, cache.read(torch.arange(3, device=world.backend.device)), mxfp4.read(torch.arange(4))])
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("kind", ["rows", "fold", "window"])
def test_a_plan_is_checked_once(backend: Backend, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """To count in `errors` sets no attribute, which would have the plan checked again in every call."""
    world, checks = World(kind, "compress", backend), []
    made = {key: value for key, (value, _) in objects(world).items()} | {"snapshots": None}
    monkeypatch.setattr(StepPlan, "_check", lambda plan: checks.append(plan))
    for _ in range(2):
        made["plan"].update(world.leaves["plan.start_pos"], world.leaves["plan.cu_seqlens"])
        call_with(world, made)
        store_with(world, made)
    assert not checks


def objects(world: World) -> dict[str, tuple[Any, type]]:
    return {
        "plan": (world.plan(), StepPlan),
        "state": (world.state(), WindowState if world.kind == "window" else FoldState),
        "cache": (world._make(EntryCache, "cache", spec=world.spec), EntryCache),
        "snapshots": (world.snapshots(), Snapshots),
    }


def call_with(world: World, made: dict[str, Any], **more: Any) -> None:
    found = world.leaves
    named = {name: found[name] for name in ("ape", "norm_weight", "rope", "spec")} | {"snapshots": made["snapshots"]}
    named |= {"backend": found["backend"], **more}
    kvfold.compress(found["kv_score"], made["plan"], made["state"], made["cache"], **named)


@pytest.mark.parametrize("kind", ["rows", "window"])
def test_objects_that_nobody_made(kind: str) -> None:
    world = World(kind, "compress", CPU)
    good = {name: made for name, (made, _) in objects(world).items()}
    before = world.arena.clone()
    for name, (_, cls) in objects(world).items():
        if good[name] is None:
            continue
        with pytest.raises(ValueError, match=rf"^{name} must be made by {cls.__name__}\."):
            call_with(world, good | {name: object.__new__(cls)})
        for wrong in (4, "x", object(), cls):
            with pytest.raises(TypeError, match=rf"^{name} must be "):
                call_with(world, good | {name: wrong})
    blank = StepPlan()
    weights = {name: world.leaves[name] for name in ("spec", "norm_weight", "rope")}
    for call in (
        lambda: kvfold.store(world.leaves["rows"], blank, good["cache"], **weights),
        lambda: blank.update(world.leaves["plan.start_pos"], world.leaves["plan.cu_seqlens"]),
    ):
        with pytest.raises(ValueError, match=r"^plan must be made by StepPlan\.build"):
            call()
    assert torch.equal(world.arena, before)


# An attribute that was set, to what, and the word that names it.
REPLACED: dict[str, Callable[[World], Any]] = {
    "plan.ratio": lambda w: "4",
    "plan.items": lambda w: torch.zeros(3, 8, dtype=torch.int64),
    "plan.entry_slots": lambda w: torch.zeros(2, dtype=torch.int64),
    "plan.errors": lambda w: torch.zeros(1),
    "plan.state_slots": lambda w: freed(torch.zeros(3, dtype=torch.int32)),
    "plan.rows_per_page": lambda w: 5,
    "state.rows": lambda w: torch.zeros(4, 3),
    "state.positions": lambda w: None,
    "state.max_new_tokens": lambda w: 0,
    "cache.storage": lambda w: torch.zeros(8, 3),
    "cache.scale": lambda w: float("nan"),
    "cache.rows_per_page": lambda w: -1,
    "cache.format": lambda w: "bf16",
    "snapshots.rows": lambda w: torch.zeros(6, 2, 8),
    "snapshots.page_size": lambda w: 7,
}


@pytest.mark.parametrize("name", REPLACED)
def test_an_attribute_that_was_set_is_checked_again(name: str) -> None:
    """Also behind a first call, when what is remembered of it says that all is well."""
    world = World("rows", "compress", CPU)
    made = {key: value for key, (value, _) in objects(world).items()}
    call_with(world, made)
    before = world.arena.clone()
    owner, attribute = name.split(".")
    setattr(made[owner], attribute, REPLACED[name](world))
    with pytest.raises((TypeError, ValueError), match=rf"\b({owner}|{attribute})\b"):
        call_with(world, made)
    assert torch.equal(world.arena, before)


def test_errors_are_counted_in_the_tensor_that_is_there_now(backend: Backend) -> None:
    world = World("fold", "compress", backend)
    made = {key: value for key, (value, _) in objects(world).items()}
    call_with(world, made)
    world.leaves["plan.state_slots"][0] = 99  # no such slot
    first, made["plan"].errors = made["plan"].errors, torch.zeros(1, dtype=torch.int32, device=backend.device)
    made["plan"].update(world.leaves["plan.start_pos"], world.leaves["plan.cu_seqlens"])
    call_with(world, made)
    assert (int(first), int(made["plan"].errors)) == (0, 1)


@pytest.mark.parametrize("call", ["compress", "store"])
def test_pages_of_plan_and_cache(backend: Backend, call: str) -> None:
    """Both say how many entries a page has; with slots of the caller's own the plan says nothing."""
    world = World("rows", call, backend)
    world.leaves["plan.rows_per_page"] = 2
    refused(world, "plan.rows_per_page", "rows_per_page=2", "other pages:")
    world.leaves |= {"plan.entry_slots": world.put(torch.arange(12)), "plan.cache_block_table": None}
    world.leaves["rows"] = world.put(torch.ones(12, world.spec.head_dim))
    refused(world, "plan.rows_per_page", "rows_per_page=2", "other pages:")
    world.leaves["plan.rows_per_page"] = None
    assert world.run() == 0


@pytest.mark.parametrize("kind", ["rows", "window"])
def test_a_later_plan_is_compared_with_the_layer(kind: str) -> None:
    """What a plan reads may lie in no tensor that the call writes, though the layer was checked with another plan."""
    world = World(kind, "compress", CPU)
    made = {key: value for key, (value, _) in objects(world).items()}
    call_with(world, made)
    state = world.leaves["state.kv" if kind == "window" else "state.rows"]
    places = {"state": state, "cache": world.leaves["cache.storage"]}
    names = ["plan.block_tables.0", "plan.entry_slots"] if kind == "window" else ["plan.state_slots", "plan.snapshot_table"]
    if kind == "rows":
        places["snapshots"] = world.leaves["snapshots.rows"]
    for name in names:
        for other, memory in places.items():
            good = world.leaves[name]
            inside = memory.view(-1).view(torch.uint8)[: good.nbytes].view(good.dtype).view(good.shape)
            world.leaves[name] = inside
            kept = memory.clone()
            inside.copy_(good)
            spoiled = made | {"plan": world.plan()}
            before = world.arena.clone()
            for _ in range(2):  # the second is no better
                with pytest.raises(ValueError, match=rf"plan\.\w+ must not share memory with {other}"):
                    call_with(world, spoiled)
                assert torch.equal(world.arena, before)
            memory.copy_(kept)
            world.leaves[name] = good
            call_with(world, made)


def test_entry_slots_replaced_by_some_inside_the_cache() -> None:
    world = World("rows", "compress", CPU)
    made = {key: value for key, (value, _) in objects(world).items()}
    call_with(world, made)
    count = made["plan"].entry_capacity
    made["plan"].entry_slots = world.leaves["cache.storage"].view(-1)[: 8 * count].view(torch.int64)
    before = world.arena.clone()
    with pytest.raises(ValueError, match=r"plan\.entry_slots must not share memory with cache"):
        call_with(world, made)
    assert torch.equal(world.arena, before)


@pytest.mark.parametrize("kind", ["rows", "window"])
def test_weights_that_died(kind: str) -> None:
    """A weight of the call before is gone, and the next call has another, or none: checked as at the first."""
    world = World(kind, "compress", CPU)
    made = {key: value for key, (value, _) in objects(world).items()}
    for name in ("ape", "norm_weight", "rope"):
        kept = world.leaves[name]
        world.leaves[name] = kept.clone()
        call_with(world, made)
        world.leaves[name] = None
        gc.collect()
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must be"):
            call_with(world, made)
        world.leaves[name] = kept
        call_with(world, made)


def test_memory_freed_between_two_calls(backend: Backend) -> None:
    """What was checked before is looked at again where its memory is no longer there."""
    for name in ("state.rows", "state.positions", "cache.storage", "snapshots.rows", "ape", "plan.entry_slots", "plan.items"):
        world = World("rows", "compress", backend)
        for leaf in list(world.leaves):
            if isinstance(world.leaves[leaf], Tensor):
                world.leaves[leaf] = world.leaves[leaf].clone()  # storages of their own
        made = {key: value for key, (value, _) in objects(world).items()}
        call_with(world, made)
        owner, *attribute = name.split(".")
        target = getattr(made[owner], attribute[0]) if attribute else world.leaves[owner]
        size = target.untyped_storage().nbytes()
        target.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=rf"\b({'|'.join([owner, *attribute])})\b.*storage"):
            if owner == "plan" and backend.device.type == "cuda":  # where `update` looks, once for all layers of a step
                made["plan"].update(world.leaves["plan.start_pos"], world.leaves["plan.cu_seqlens"])
            call_with(world, made)
        target.untyped_storage().resize_(size)


def test_forgotten_slots_are_empty(backend: Backend) -> None:
    world = World("fold", "compress", backend)
    state, device = world.state(), backend.device
    held = copy.deepcopy(state.positions)
    assert bool((held[0:3] >= 0).any(1)[1:].all())
    state.forget(torch.tensor([-1, 1, 99, 1, -(1 << 40)], device=device))
    assert bool((state.positions[1] == -1).all())
    others = [0, 2, 3]
    assert torch.equal(state.positions[others], held[others])
    state.forget(torch.tensor([], dtype=torch.int32, device=device))
    for wrong in (1, torch.tensor(1), torch.zeros(1), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([True])):
        with pytest.raises((TypeError, ValueError), match=r"\bslots\b"):
            state.forget(wrong)  # type: ignore[arg-type]
    # The sequence of that slot, which starts in a window, is refused; the others go on.
    world.leaves["state.positions"].copy_(state.positions)
    assert world.run() == 1


def test_snapshots_are_asked_about_whole_positions() -> None:
    kept = Snapshots.allocate(kvfold.V4_CSA, 1, 8)
    assert kept.of(torch.tensor([3, 4, 7], dtype=torch.uint8)).tolist() == [False, True, True]
    for wrong in (4, [4], torch.zeros(2), torch.tensor([True]), torch.zeros(2, dtype=torch.complex64)):
        with pytest.raises((TypeError, ValueError), match=r"^positions must be"):
            kept.of(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["state.rows", "state.positions", "ape", "rope", "plan.state_slots", "plan.cache_block_table"])
def test_sizes_changed_in_place(name: str) -> None:
    """On a CPU, where the torch backend would index with them."""
    world = World("rows", "compress", CPU)
    made = {key: value for key, (value, _) in objects(world).items()}
    call_with(world, made)
    before = world.arena.clone()
    world.leaves[name].resize_(2, 3, 1)
    with pytest.raises(ValueError, match=rf"\b{name.split('.')[-1]}\b"):
        call_with(world, made)
    with pytest.raises(ValueError, match=rf"\b{name.split('.')[-1]}\b"):
        call_with(world, made)
    assert torch.equal(world.arena, before)


def test_devices_and_dtypes_of_what_is_allocated() -> None:
    spec, makers = kvfold.V4_CSA, {
        FoldState: (1, 4), WindowState: (1, 4), Snapshots: (1, 8),
    }  # fmt: skip
    for kind, sizes in makers.items():
        for wrong in ("bf16", "cuda:99", ("cpu",), 1.5, object()):
            with pytest.raises((TypeError, ValueError), match=r"^device must be"):
                kind.allocate(spec, *sizes, device=wrong)
        for wrong in (torch.float16, "fp32", [torch.float32]):
            with pytest.raises((TypeError, ValueError), match=r"^dtype must be"):
                kind.allocate(spec, *sizes, dtype=wrong)
    with pytest.raises((TypeError, ValueError), match=r"^device must be"):
        EntryCache.allocate("bf16", 1, 4, spec, device="nowhere")


def test_backends_that_are_no_name() -> None:
    world = World("rows", "compress", CPU)
    for wrong in ("cuda", 1, [], torch.zeros(4), ("torch",)):
        world.leaves["backend"] = wrong
        refused(world, "backend", "must be one of", "wrong")


@pytest.mark.parametrize("call", ["compress", "store"])
def test_a_weight_of_another_dtype_at_the_same_address(backend: Backend, call: str) -> None:
    """A module that is cast twice may have its weights where they were before: they are read as what they are now."""
    world = World("rows", call, backend)
    made = {key: value for key, (value, _) in objects(world).items()}
    run = {"compress": call_with, "store": store_with}[call]
    run(world, made)
    weight = world.leaves["norm_weight"] = world.leaves["norm_weight"].clone()
    run(world, made)
    narrow = torch.linspace(0.5, 1.5, weight.numel(), device=weight.device).bfloat16()
    weight.view(torch.bfloat16)[: weight.numel()].copy_(narrow)
    address = weight.data_ptr()
    weight.data = weight.data.view(torch.bfloat16)[: weight.numel()]
    assert (weight.data_ptr(), weight.dtype) == (address, torch.bfloat16)
    run(world, made)
    found = made["cache"].storage.clone()
    world.leaves["norm_weight"] = narrow
    run(world, made)
    assert torch.equal(found, made["cache"].storage)
    for name in ("ape", "rope") if call == "compress" else ("rope",):
        kept = world.leaves[name]
        wide = world.leaves[name] = kept.clone()
        run(world, made)
        wide.data = wide.data.view(torch.int32)
        with pytest.raises(TypeError, match=rf"^{name} must be torch.float32"):
            run(world, made)
        world.leaves[name] = kept


def store_with(world: World, made: dict[str, Any]) -> None:
    found = world.leaves
    rows = torch.ones(made["plan"].entry_capacity, world.spec.head_dim, dtype=torch.float32, device=world.backend.device)
    weights = {name: found[name] for name in ("spec", "norm_weight", "rope", "backend")}
    kvfold.store(rows, made["plan"], made["cache"], **weights)


@pytest.mark.parametrize("kind", ["rows", "window"])
def test_an_object_where_there_was_none_before(kind: str) -> None:
    """Behind a good call without a cache and snapshots, when a call like it is known."""
    world = World(kind, "compress", CPU)
    made = {key: value for key, (value, _) in objects(world).items()} | {"cache": None, "snapshots": None}
    call_with(world, made)
    before = world.arena.clone()
    for name, cls in (("cache", EntryCache), ("snapshots", Snapshots)):
        for wrong in (world.leaves["rows"], 4, np.zeros(4), object.__new__(cls)):
            with pytest.raises((TypeError, ValueError), match=rf"^{name} must be "):
                call_with(world, made | {name: wrong})
    assert torch.equal(world.arena, before)


@pytest.mark.parametrize("name", ["plan", "state", "cache", "snapshots"])
def test_a_look_alike_is_no_object_of_ours(name: str) -> None:
    """Behind a good call: one with the very attributes that such a call is known by."""
    world = World("fold", "compress", CPU)
    made = {key: value for key, (value, _) in objects(world).items()}
    call_with(world, made)
    before = world.arena.clone()
    with pytest.raises(TypeError, match=rf"^{name} must be "):
        call_with(world, made | {name: SimpleNamespace(**vars(made[name]))})
    assert torch.equal(world.arena, before)
