"""Tensors that share memory: refused where a call writes what it uses under another name, taken where only extents meet."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from support.fuzz_support import KINDS, World
from support.helpers import Backend, make_tokens
from torch import Tensor

import kvfold
from kvfold import EntryCache, FoldState, Snapshots, StepPlan, WindowState
from kvfold.arguments.overlap import extent, find_room, share_bytes

SPEC = KINDS["rows"][0]


@st.composite
def views(draw: st.DrawFn) -> tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
    """A dtype, an offset, sizes and strides in elements of a view in 512 bytes."""
    dtype = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32]))
    room = 512 // dtype.itemsize
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    strides = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 7, 8, 12, 16]), min_size=len(sizes), max_size=len(sizes)))
    span = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True) if n)
    return dtype, draw(st.integers(0, room - span - 1)), tuple(sizes), tuple(strides)


@given(views(), views())
def test_share_bytes_is_exact(one: Any, other: Any) -> None:
    """Against the bytes themselves."""
    memory = torch.zeros(512, dtype=torch.uint8)
    found = []
    for dtype, offset, sizes, strides in (one, other):
        memory.zero_()
        view = memory.view(dtype).as_strided(sizes, strides, offset)
        view.fill_(-1 if dtype != torch.uint8 else 255)
        found.append((view, set(memory.nonzero().flatten().tolist())))
    (a, bytes_a), (b, bytes_b) = found
    assert share_bytes(a, b) == share_bytes(b, a) == bool(bytes_a & bytes_b)
    for view, its in found:
        first, behind = extent(view)
        assert (first == behind) == (not its)
        if its:
            assert (first - memory.data_ptr(), behind - memory.data_ptr() - 1) == (min(its), max(its))


def test_bounds() -> None:
    top = 1 << 64
    for start, end, room in (
        (0, 10, (0, 10)), (5, 11, None), (10, 20, None), (12, 13, None), (20, 30, (20, 30)), (21, 25, (20, 30)),
        (20, 31, None), (25, 50, None), (40, 99, (40, top)), (39, 40, None),
    ):  # fmt: skip
        assert find_room([10, 20, 30, 40], start, end) == (room or (0, 0))
    assert find_room([], 1, 2) == (0, top)


# What a call writes, and what else it is given. Of a plan `update` alone looks at tensors that are not here.
PAIRS = {
    "compress": (
        ("state.", "snapshots.", "cache.", "rows"),
        ("kv_score", "ape", "norm_weight", "rope", "plan.state_slots", "plan.entry_slots", "plan.snap", "plan.block_tables"),
    ),
    "store": (("cache.",), ("rows", "norm_weight", "rope", "plan.entry_slots")),
    "restore": (("state.", "errors"), ("snapshots.", "slots", "pages", "start_pos")),
    "many": (("0.state.", "1.state.", "0.cache.", "1.snapshots."), ("0.kv_score", "1.kv_score", "1.ape", "plan.state_slots")),
}


@pytest.mark.parametrize("kind", ["rows", "fold", "window"])
@pytest.mark.parametrize("call", PAIRS)
def test_what_is_written_is_nothing_else(call: str, kind: str) -> None:
    """Each tensor in the memory of each larger one that the call writes: refused by its name, and nothing was written."""
    if kind == "window" and call in ("many", "restore"):
        pytest.skip("these take a FoldState")
    world, (written, read), tried = World(kind, call, BACKENDS["torch"]), PAIRS[call], 0
    good, memory = dict(world.leaves), world.arena.clone()
    for name in [n for n in good if n.startswith((*written, *read))]:
        for other in [n for n in good if n.startswith(written) and n != name]:
            world.leaves = dict(good)
            world.arena.copy_(memory)
            a, b = good[name], good[other]
            if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.nbytes > b.nbytes:
                continue
            if kind == "window" and {name.split(".")[0], other.split(".")[0]} == {"state", "cache"}:
                continue  # pages of one allocation: below
            start = b.storage_offset() * b.element_size()
            world.leaves[name] = world.arena[start : start + a.nbytes].view(a.dtype).view(a.shape).copy_(a.clone())
            before = world.arena.clone()
            with pytest.raises(ValueError) as error:
                world.run()
            assert "must not share memory with" in str(error.value), f"{name} in the memory of {other}: {error.value}"
            for one in (name, other):  # by the argument of the call, or of the object that has both
                assert any(re.search(rf"\b{word}\b", str(error.value)) for word in one.split(".")), str(error.value)
            assert torch.equal(world.arena, before)
            tried += 1
    assert tried >= 1


def ints(*values: int, device: torch.device | None = None) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


class Layers:
    """A step of one sequence of 9 tokens, for tensors that a test lays out; `entries` are those of tensors of their own."""

    def __init__(self, backend: Backend) -> None:
        world = World("rows", "compress", backend)
        self.backend, self.device = backend, backend.device
        self.weights = {name: world.leaves[name] for name in ("ape", "norm_weight", "rope")}
        self.tokens = make_tokens(SPEC, 9, seed=5).to(self.device)

    def plan(self, **options: Any) -> StepPlan:
        options = options or {"state_slots": ints(0, device=self.device)}
        pages = ints(2, 0, device=self.device)[None]
        start, ends = ints(0, device=self.device), ints(0, 9, device=self.device)
        return StepPlan.build(4, start, ends, 9, cache_block_table=pages, rows_per_page=1, **options)

    def compress(self, kv_score: Tensor, state: Any, cache: EntryCache, plan: StepPlan | None = None, **more: Any) -> Tensor:
        plan = plan or self.plan()
        kvfold.compress(kv_score, plan, state, cache, spec=SPEC, **self.weights, backend=self.backend.name, **more)
        assert int(plan.errors) == 0
        return cache.read(ints(2, 0, device=self.device))

    def state(self) -> FoldState:
        return FoldState.allocate(SPEC, 1, 4, device=self.device)

    def cache(self) -> EntryCache:
        return EntryCache.allocate("bf16", 3, 1, SPEC, device=self.device)

    def entries(self) -> Tensor:
        return self.compress(self.tokens, self.state(), self.cache())


def test_caches_of_all_layers_in_one_allocation(backend: Backend) -> None:
    """The stride of a layer is within a page, so that extents of two layers meet and no byte of theirs does."""
    layers = Layers(backend)
    whole = torch.zeros(3, 2, 64, dtype=torch.bfloat16, device=layers.device)
    caches = [EntryCache(whole[:, i], "bf16", 1, SPEC) for i in (0, 1)]
    wide = torch.cat([layers.tokens, layers.tokens], dim=1)  # a projection for both
    both = [wide[:, :256], wide[:, 256:]]
    want = layers.entries()
    for kv_score, cache in zip(both, caches, strict=True):
        assert torch.equal(layers.compress(kv_score, layers.state(), cache), want)
    whole.zero_()
    pair = [(kv, layers.state(), cache, SPEC, *layers.weights.values()) for kv, cache in zip(both, caches, strict=True)]
    plan = layers.plan()
    kvfold.compress_many(pair, plan, backend=backend.name)
    assert int(plan.errors) == 0
    for cache in caches:
        assert torch.equal(cache.read(ints(2, 0, device=layers.device)), want)


def test_everything_in_one_arena(backend: Backend) -> None:
    """State rows, tags and pages one behind the other."""
    layers = Layers(backend)
    like, cache = layers.state(), layers.cache()
    sizes = [like.rows.nbytes, like.positions.nbytes, cache.storage.nbytes]
    rows, tags, pages = torch.zeros(sum(sizes), dtype=torch.uint8, device=layers.device).split(sizes)
    tags.view(torch.int32).fill_(-1)
    state = FoldState(SPEC, rows.view(like.rows.dtype).view(like.rows.shape), tags.view(torch.int32).view(1, -1), 4)
    assert torch.equal(layers.compress(layers.tokens, state, EntryCache(pages.view(3, -1), "bf16", 1, SPEC)), layers.entries())


def test_pages_of_one_allocation_for_state_and_cache(backend: Backend) -> None:
    """An engine gives pages of one allocation to value rows, to score rows and to entries; whose is which its tables say."""
    layers = Layers(backend)
    size = 4 * 256  # a page: 4 value rows side by side with 4 score rows, fp32, or records
    whole = torch.zeros(7, size, device=layers.device)
    raw = whole.view(7, 4, 256)
    state = WindowState(raw[..., :128], raw[..., 128:])
    cache = EntryCache(whole.view(torch.uint8), "bf16", 1, SPEC)
    table = ints(3, 5, 6, device=layers.device)[None]
    found = layers.compress(layers.tokens, state, cache, layers.plan(block_tables=(table, table), page_size=4))
    own = WindowState(torch.zeros_like(raw[..., :128]), torch.zeros_like(raw[..., 128:]))
    plan = layers.plan(block_tables=(table, table), page_size=4)
    want = layers.compress(layers.tokens, own, layers.cache(), plan)
    # Strides choose the width of accesses, and with it the order of sums; see `WindowState`.
    assert torch.equal(found, want) if backend.name == "torch" else torch.allclose(found, want, atol=1e-2)
    assert torch.equal(state.kv[3], own.kv[3]) and torch.equal(state.score[6], own.score[6])


def test_pools_that_share_rows() -> None:
    pool = torch.zeros(4, 8, 48)
    WindowState(pool[..., :16], pool[..., 16:32])
    WindowState(pool[:, ::2, :16], pool[:, 1::2, :16])  # every other row
    WindowState(pool[::2, :, :16], pool[1::2, :, :16])  # every other page
    WindowState(pool[:2, :, :16], pool[2:, :, :16])
    for kv, score in (
        (pool[..., :16], pool[..., :16]),
        (pool[..., :16], pool[..., 15:31]),
        (pool[:, :6:2, :16], pool[:, 2::2, :16]),
        (pool[:3, :, :16], pool[2:, :, :16]),
        (pool.view(-1)[:512].view(2, 16, 16), pool.view(-1)[511:1023].view(2, 16, 16)),
    ):
        with pytest.raises(ValueError, match="kv must not share memory with score"):
            WindowState(kv, score)


def test_objects_that_overlap_themselves() -> None:
    like = FoldState.allocate(SPEC, 2, 4)
    memory = like.rows.view(torch.int32).view(-1)
    with pytest.raises(ValueError, match="positions must not share memory with rows"):
        FoldState(SPEC, like.rows, memory[8 : 8 + like.positions.numel()].view(2, -1), 4)
    kept = Snapshots.allocate(SPEC, 3, 8)
    memory = kept.rows.view(torch.int32).view(-1)
    with pytest.raises(ValueError, match="positions must not share memory with rows"):
        Snapshots(SPEC, kept.rows, memory[: kept.positions.numel()].view(3, -1), 8)
    pages = torch.zeros(3, 512, dtype=torch.uint8)
    EntryCache(pages[:, :128], "mxfp4", 4, SPEC, scales=pages[:, 128:])
    with pytest.raises(ValueError, match="storage must not share memory with scales"):
        EntryCache(pages, "mxfp4", 4, SPEC, scales=pages[:, 127:])


def test_caches_of_two_compressors_that_overlap_partly(backend: Backend) -> None:
    layers = Layers(backend)
    memory = torch.zeros(5, 128, dtype=torch.uint8, device=layers.device)
    caches = EntryCache(memory[:3], "bf16", 1, SPEC), EntryCache(memory[2:], "bf16", 1, SPEC)
    pair = [(layers.tokens, layers.state(), cache, SPEC, *layers.weights.values()) for cache in caches]
    with pytest.raises(ValueError, match=r"compressors\[1\]: cache must not share memory with cache of compressors\[0\]"):
        kvfold.compress_many(pair, layers.plan(), backend=backend.name)
    assert not memory.any()


def test_what_comes_later_is_looked_at_too(backend: Backend) -> None:
    """After a good call with the same layer, kv_score and rows in the memory of its state, and rows in that of kv_score."""
    layers = Layers(backend)
    state, cache = layers.state(), layers.cache()
    plan = layers.plan()
    rows = torch.zeros(plan.entry_capacity, 64, device=layers.device)
    layers.compress(layers.tokens, state, cache, plan, rows=rows)
    before = state.rows.clone()
    for kv_score, out in (
        (state.rows.view(-1)[: 9 * 256].view(9, 256), None),
        (layers.tokens, state.rows.view(-1)[100 : 100 + rows.numel()].view(rows.shape)),
        (layers.tokens, layers.tokens.view(-1)[100 : 100 + rows.numel()].view(rows.shape)),
    ):
        with pytest.raises(ValueError, match=r"(kv_score|rows) must not share memory with (state|kv_score)"):
            layers.compress(kv_score, state, cache, plan, rows=out)
    assert torch.equal(state.rows, before)


def test_update_from_its_own_tensors(backend: Backend) -> None:
    """The plan's own start_pos and cu_seqlens, advanced in place, may be what it is updated from; its other tensors may not."""
    layers = Layers(backend)
    plan, twin = layers.plan(), layers.plan()
    start, ends = ints(3, device=layers.device), ints(0, 5, device=layers.device)
    plan.start_pos.copy_(start)
    plan.cu_seqlens.copy_(ends)
    plan.update(plan.start_pos, plan.cu_seqlens)
    twin.update(start, ends)
    n = int(twin.num_items)
    assert torch.equal(plan.items[:n], twin.items[:n]) and torch.equal(plan.entry_slots, twin.entry_slots)
    before = plan.items.clone()
    for bad in ((plan.num_items, ends), (plan.start_pos, plan.items.view(-1)[:2]), (plan.cu_seqlens[1:], ends)):
        with pytest.raises(ValueError, match=r"(start_pos|cu_seqlens) must not share memory with plan"):
            plan.update(*bad)
    assert torch.equal(plan.items, before)


def test_no_gradient(backend: Backend) -> None:
    """Tensors that require a gradient give the same bits, and nothing that the call leaves keeps a graph alive."""
    layers = Layers(backend)
    want = layers.entries()
    layers.weights = {name: weight.requires_grad_() for name, weight in layers.weights.items()}
    for gradient in (False, True):
        state, cache, plan = layers.state(), layers.cache(), layers.plan()
        rows = torch.zeros(plan.entry_capacity, 64, device=layers.device, requires_grad=gradient)
        state.rows.requires_grad_(gradient)
        assert torch.equal(layers.compress(layers.tokens.clone().requires_grad_(), state, cache, plan, rows=rows), want)
        assert all(x.is_leaf and x.requires_grad == gradient for x in (state.rows, rows))
        assert not cache.pages.requires_grad
        named = {"norm_weight": layers.weights["norm_weight"], "rope": layers.weights["rope"]}
        kvfold.store(rows, plan, cache, spec=SPEC, **named, backend=backend.name)
        assert torch.equal(cache.read(ints(2, 0, device=layers.device)), want)
