"""A `FoldState` whose slots lie apart, in an engine's pages: the same bits as one of its own, and no byte between touched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.helpers import CANARY, SMALL_ROWS, Backend, Engine, bits, call_restore, make_tokens
from support.ops_support import lengths_of, through_operators
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, Snapshots, StepPlan, UnsupportedError

BF16, FP32 = torch.bfloat16, torch.float32
SPECS = {**SMALL_ROWS, "fold": CompressorSpec(head_dim=32, ratio=16, rope_dim=16)}
MOST = 3


class Paged(Engine):
    """Slot s is page s of a pool that an engine has used for other things; `gap` bytes lie between pages."""

    gap = 64

    def _make_state(self, num_slots: int, max_new_tokens: int, dtype: torch.dtype) -> FoldState:
        size = FoldState.page_bytes(self.spec, max_new_tokens, dtype)
        pool = self._allocate("state.pages", (num_slots, size + self.gap), torch.uint8)
        pool.copy_(torch.arange(pool.numel(), device=pool.device).view_as(pool).remainder(251).to(torch.uint8))
        pool[:, size:] = CANARY
        self.between = pool[:, size:]
        state = FoldState.over(pool[:, :size], self.spec, max_new_tokens, dtype=dtype)
        state.forget(torch.arange(num_slots, device=pool.device))
        state.rows.fill_(torch.nan)
        return state

    def check_canaries(self) -> None:
        super().check_canaries()
        assert bool((self.between == CANARY).all()), "bytes between pages were overwritten"


class Odd(Paged):
    """At multiples of 4 bytes and of no more."""

    gap = 20


def steps(spec: CompressorSpec) -> list[tuple[int, int, int, int]]:
    """(slot, start, tokens, seed): a prompt, chunks, drafts of which some are rejected, decode, long steps, other owners."""
    ratio = spec.ratio
    found, at = [], 0
    for slot, prompt in ((1, ratio + 1), (0, 5 * ratio + 2), (3, 2 * ratio)):
        found.append((slot, 0, prompt, slot))
        at = prompt
        for accepted in range(MOST + 1):
            found.append((slot, at, MOST, slot))
            at += accepted
        found += [
            (slot, at, 3 * ratio + 5, slot),
            (slot, at, 1, slot),
            (slot, at + 1, 1, slot),
            (slot, at + 2, 2 * ratio, slot),
        ]
    return [*found, (1, 0, 2 * ratio + 3, 7), (1, 2 * ratio + 3, 2, 7)]  # another owner of slot 1


@pytest.mark.parametrize("kind", [Paged, Odd])
@pytest.mark.parametrize("name, dtype", [("rows", FP32), ("rows", BF16), ("rows-2", FP32), ("rows-3", FP32), ("fold", FP32)])
def test_same_bits_as_a_state_of_its_own(backend: Backend, kind: type[Engine], name: str, dtype: torch.dtype) -> None:
    if backend.slow and (kind is Odd) == (name in ("fold", "rows-2")):
        pytest.skip("the interpreter does each state in one kind of page, and each kind with states of both kinds")
    spec = SPECS[name]
    made = {"num_slots": 5, "max_new_tokens": MOST, "max_entries": 24, "state_dtype": dtype}
    plain, paged = Engine(spec, backend, **made), kind(spec, backend, **made)
    for slot, start, count, seed in steps(spec):
        if start == 0:
            paged.state.rows[slot] = torch.nan  # of the former owner
            plain.state.rows[slot] = torch.nan
        new = make_tokens(spec, start + count, seed, dtype=dtype)[start:]
        batch = [(slot, start, new), (-1, 3, new[:1])]
        one, other = plain.step(batch, padding=1), paged.step(batch, padding=1)
        assert one.pooled.keys() == other.pooled.keys()
        assert all(torch.equal(bits(row), bits(other.pooled[at])) for at, row in one.pooled.items())
        assert plain.tags(slot) == paged.tags(slot)
        held, same = plain.held(slot, start + count), paged.held(slot, start + count)
        assert held.keys() == same.keys() and all(torch.equal(row, same[x]) for x, row in held.items())
    assert torch.equal(plain.cache.storage, paged.cache.storage) and bool(plain.cache.storage.any())


def test_a_slot_that_has_nothing_is_refused(backend: Backend) -> None:
    engine = Paged(SPECS["fold"], backend, num_slots=3, max_new_tokens=MOST)
    step = engine.step([(2, 5, make_tokens(engine.spec, 2, 0)), (1, 0, make_tokens(engine.spec, 2, 1))], strict=False)
    assert step.errors == 1
    assert engine.tags(2) == [-1] * len(engine.tags(2)) and engine.tags(1)[:2] == [0, 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_forget_writes_the_tags_of_its_slots_alone(backend: Backend, dtype: torch.dtype) -> None:
    spec, device = SPECS["rows"], backend.device
    size = FoldState.page_bytes(spec, MOST)
    pool = torch.arange(4 * size, device=device).remainder(251).to(torch.uint8).view(4, size)
    for slots in ([2], [3, 1, 3, -1, 4], [-1, 9, 0], [-5, 4, 1 << 30], []):
        pages = pool.clone()
        state = FoldState.over(pages, spec, MOST)
        untouched = state.positions.clone()
        state.forget(torch.tensor(slots, dtype=dtype, device=device))
        inside = sorted({slot for slot in slots if 0 <= slot < 4})
        assert bool((state.positions[inside] == -1).all())
        state.positions.copy_(untouched)
        assert torch.equal(pages, pool)
    FoldState.over(pool[:0], spec, MOST).forget(torch.tensor([0, -1], device=device))


def test_sizes() -> None:
    """A page holds rows, then tags; ratio 128 with 4 new tokens fits a page of 37,440 bytes."""
    for spec in (*SPECS.values(), kvfold.V4_HCA, kvfold.V4_CSA, kvfold.V4_INDEXER):
        for most in (1, 4, 7):
            like = FoldState.allocate(spec, 1, most, device="meta")
            size = FoldState.page_bytes(spec, most)
            assert size % 64 == 0 and like.bytes_per_slot <= size < like.bytes_per_slot + 64
    assert 36_864 < FoldState.page_bytes(kvfold.V4_HCA, 4) <= 37_440
    for dtype, most in ((FP32, 98_400), (BF16, 49_200)):  # half of what whole rows took
        assert FoldState.allocate(kvfold.V4_CSA, 1, 4, device="meta", dtype=dtype).bytes_per_slot <= most
    assert FoldState.page_bytes(kvfold.V4_CSA, 4, BF16) < FoldState.page_bytes(kvfold.V4_CSA, 4)
    pages = torch.zeros(6, 37_440, dtype=torch.uint8)
    state = FoldState.over(pages, kvfold.V4_HCA, 4, fresh=True)
    assert state.num_slots == 6 and bool((state.positions == -1).all()) and bool((state.rows == 0).all())
    state.rows[2], state.positions[2] = 1, 5
    floats, ints = pages[2].view(FP32), pages[2].view(torch.int32)
    assert bool((floats[: 6 * 3 * 512] == 1).all()) and ints[6 * 3 * 512 :][:7].tolist() == [5] * 6 + [0]


def test_any_dtype_and_shape_of_pages() -> None:
    spec = SPECS["fold"]
    size = FoldState.page_bytes(spec, MOST)
    for pages in (
        torch.zeros(3, size // 4),
        torch.zeros(3, 2, size // 4, dtype=BF16),
        torch.zeros(3, size // 8, dtype=torch.int64),
        torch.zeros(6, size, dtype=torch.int8)[::2],
    ):
        state = FoldState.over(pages, spec, MOST, fresh=True)
        state.rows[1] = 3.0
        assert pages[1].contiguous().view(torch.uint8).any() and not pages[::2].contiguous().view(torch.uint8)[..., :-64].any()


def test_strides_by_the_constructor(backend: Backend) -> None:
    """Slots of a wider tensor, rows and tags each."""
    spec, device = SPECS["rows"], backend.device
    plain = Engine(spec, backend, num_slots=3, max_new_tokens=MOST, max_entries=8)
    apart = Engine(spec, backend, num_slots=3, max_new_tokens=MOST, max_entries=8)
    shape = plain.state.rows.shape
    rows = torch.full((9, *shape[1:]), torch.nan, device=device)
    tags = torch.full((6, plain.state.positions.shape[1]), -1, dtype=torch.int32, device=device)
    apart.state = FoldState(spec, rows[1::3], tags[::2], MOST)
    for start, end in ((0, 5), (5, 8), (7, 9), (9, 23)):
        new = make_tokens(spec, end, 3)[start:]
        for engine in (plain, apart):
            engine.step([(2, start, new), (0, start, new)])
    assert torch.equal(plain.cache.storage, apart.cache.storage)
    assert torch.equal(bits(plain.state.rows), bits(apart.state.rows)) and bool((tags[1::2] == -1).all())
    assert bool(rows[::3].isnan().all()) and bool(rows[2::3].isnan().all())


@pytest.mark.parametrize("name, page", [("rows", 8), ("fold", 6)])
def test_snapshots_that_lie_apart(backend: Backend, name: str, page: int) -> None:
    """A prefix hit from strided snapshots into pages: the same entries as without."""
    spec, device = SPECS[name], backend.device
    end = 3 * page
    tokens = make_tokens(spec, end + 2 * spec.ratio, 4)
    whole = Engine(spec, backend, num_slots=1, max_new_tokens=len(tokens), max_entries=24)
    whole.step([(0, 0, tokens)])
    engine = Paged(spec, backend, num_slots=3, max_new_tokens=MOST, max_entries=24)
    like = Snapshots.allocate(spec, 1, page, device="meta")
    rows = torch.full((8, *like.rows.shape[1:]), torch.nan, device=device)
    tags = torch.full((8, like.rows_per_page + 3), -1, dtype=torch.int32, device=device)
    engine.snapshots = Snapshots(spec, rows[::2], tags[::2, : like.rows_per_page], page)
    engine.step([(1, 0, tokens[:end])], snapshot_table=[[3, 1, 2, -1, -1, -1, -1]])
    assert call_restore(engine, engine.snapshots, [2], [2], [end]) == 0
    engine.snapshots, kept = None, engine.snapshots
    step = engine.step([(2, end, tokens[end:])])
    want = whole.entries(0, len(tokens) // spec.ratio)[end // spec.ratio :]
    got = engine.cache.read(torch.arange(24, device=device) + 48).cpu()[end // spec.ratio :][: len(want)]
    assert step.errors == 0 and torch.equal(got, want) and len(want)
    assert bool(rows[1::2].isnan().all()) and bool((tags[1::2] == -1).all())
    assert bool((tags[:, like.rows_per_page :] == -1).all())
    assert bool((kept.positions[2] >= 0).all())


def weights_of(spec: CompressorSpec) -> dict[str, object]:
    ape = torch.ones(spec.ratio, spec.channels) if spec.has_ape else None
    rope = kvfold.reference.rope_table(64, spec.rope_dim)
    return {"spec": spec, "ape": ape, "norm_weight": torch.ones(spec.head_dim), "rope": rope}


def test_states_and_caches_in_one_pool() -> None:
    """An engine hands out pages of one allocation to either; two states of one launch have the same slots, so may not."""
    spec, where = SPECS["fold"], Backend("torch", torch.device("cpu"))
    size = FoldState.page_bytes(spec, MOST)
    pool = torch.zeros(4, size, dtype=torch.uint8)
    state, cache = FoldState.over(pool, spec, MOST, fresh=True), EntryCache(pool, "fp32", 4, spec)
    start, ends = lengths_of(where, [0], [16])
    plan = StepPlan.build(16, start, ends, 16, state_slots=torch.tensor([1], dtype=torch.int32), entry_slots=torch.tensor([9]))
    tokens, weights = make_tokens(spec, 16, 0), weights_of(spec)
    kvfold.compress(tokens, plan, state, cache, **weights)
    assert state.positions[1].tolist() != [-1] * 5 and bool(cache.read(torch.tensor([9])).any()) and int(plan.errors) == 0
    own = FoldState(spec, state.rows, state.positions, MOST)
    with pytest.raises(ValueError, match=r"cache must not share memory with state"):
        kvfold.compress(tokens, plan, own, cache, **weights)
    other = FoldState.over(pool, spec, MOST)
    pair = [(tokens, one, None, spec, *[weights[name] for name in ("ape", "norm_weight", "rope")]) for one in (state, other)]
    with pytest.raises(ValueError, match=r"state must not share memory with state of compressors\[0\]"):
        kvfold.compress_many(pair, plan)
    further = FoldState.over(torch.zeros_like(pool), spec, MOST, fresh=True)
    kvfold.compress_many([(*pair[0][:2], None, *pair[0][3:]), (tokens, further, cache, *pair[1][3:])], plan)


def test_operators_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, compiled, copied and pickled, a state in pages is what it is."""
    spec, where = SPECS["rows"], Backend("torch", torch.device("cpu"))
    start, ends = lengths_of(where, [0], [9])
    plan = StepPlan.build(4, start, ends, 9, state_slots=torch.tensor([2], dtype=torch.int32), entry_slots=torch.arange(2))
    tokens, weights = make_tokens(spec, 9, 0), weights_of(spec)

    def made() -> tuple[Tensor, FoldState, EntryCache]:
        pool = torch.zeros(4, FoldState.page_bytes(spec, MOST), dtype=torch.uint8)
        return pool, FoldState.over(pool, spec, MOST, fresh=True), EntryCache.allocate("bf16", 1, 2, spec)

    def call(state: FoldState, cache: EntryCache) -> None:
        kvfold.compress(tokens, plan, state, cache, **weights)

    pool, state, cache = made()
    call(state, cache)
    copies = copy.deepcopy(state), pickle.loads(pickle.dumps(state))
    for one in copies:
        assert torch.equal(one.pages, pool) and torch.equal(one.rows, state.rows)
        one.positions.fill_(5)
        assert bool((one.pages[:, one.rows[0].nbytes :][:, : 4 * one.positions.shape[1]].view(torch.int32) == 5).all())
    compiled, other, kept = made()
    torch.compile(call, backend="aot_eager", fullgraph=True)(other, kept)
    assert torch.equal(compiled, pool) and torch.equal(kept.storage, cache.storage)
    through_operators(monkeypatch)
    flat, other, kept = made()
    call(other, kept)
    assert torch.equal(flat, pool) and torch.equal(kept.storage, cache.storage)


def test_check_and_dump(backend: Backend, tmp_path) -> None:
    spec = SPECS["fold"]
    engine = Paged(spec, backend, num_slots=3, max_new_tokens=MOST)
    tokens = make_tokens(spec, 35, 0)
    engine.step([(1, 0, tokens[:17])])
    start, ends = lengths_of(backend, [17], [18])
    slots = torch.tensor([1], dtype=torch.int32, device=backend.device)
    at = torch.tensor([3], device=backend.device)
    plan = StepPlan.build(16, start, ends, 18, state_slots=slots, entry_slots=at)
    given = (tokens[17:].to(backend.device), plan, engine.state, engine.cache)
    how = {"ape": engine.ape, "norm_weight": engine.norm_weight, "rope": engine.rope, "backend": backend.name}
    report = kvfold.check(*given, spec=spec, **how)
    assert report.equal, report
    path = tmp_path / "call.safetensors"
    kvfold.dump(path, *given, spec=spec, **how)
    kvfold.compress(*given, spec=spec, **how)
    again = kvfold.replay(path, device=backend.device, backend=backend.name)
    assert again.check().equal and again.errors == 0
    assert torch.equal(bits(again.tensors["0.state.rows"][1, :4]), bits(engine.state.rows[1, :4]))


def test_mistakes() -> None:
    spec = SPECS["fold"]
    size = FoldState.page_bytes(spec, MOST)
    pages = torch.zeros(3, size, dtype=torch.uint8)
    fill = pages.clone()
    for error, name, arguments, how in (
        (TypeError, "pages", (None, spec, MOST), {}),
        (ValueError, "pages", (pages[0], spec, MOST), {}),
        (ValueError, "pages", (pages[:, :-1], spec, MOST), {}),
        (ValueError, "pages", (torch.zeros(3, 2 * size, dtype=torch.uint8)[:, ::2], spec, MOST), {}),
        (ValueError, "pages", (pages[:1].expand(3, -1), spec, MOST), {}),
        (ValueError, "pages", (torch.zeros(3 * size + 8, dtype=torch.uint8)[2:-6].view(3, size), spec, MOST), {}),
        (ValueError, "pages", (torch.zeros(3, size + 2, dtype=torch.uint8)[:, :size], spec, MOST), {}),
        (TypeError, "spec", (pages, None, MOST), {}),
        (ValueError, "max_new_tokens", (pages, spec, 0), {}),
        (UnsupportedError, "dtype", (pages, spec, MOST), {"dtype": BF16}),
        (TypeError, "dtype", (pages, spec, MOST), {"dtype": "bf16"}),
        (TypeError, "fresh", (pages, spec, MOST), {"fresh": 1}),
    ):
        with pytest.raises(error, match=rf"^{name}\b"):
            FoldState.over(*arguments, **{"fresh": True, **how})
    assert torch.equal(pages, fill)
    rows, tags = torch.zeros(2, 5, 3, 32), torch.full((2, 5), -1, dtype=torch.int32)
    for name, bad in (
        ("rows", (rows.transpose(1, 2).contiguous().transpose(1, 2), tags)),
        ("rows", (rows[:1].expand(2, -1, -1, -1), tags)),
        ("positions", (rows, tags[:1].expand(2, -1))),
        ("positions", (rows, torch.zeros(2, 10, dtype=torch.int32)[:, ::2])),
        ("positions", (rows, rows.view(torch.int32)[:, :, 0, 0])),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            FoldState(spec, *bad, MOST)


def test_what_there_is_not_is_an_error() -> None:
    """What was asked for is never silently something else."""
    for call in (
        lambda: FoldState.allocate(kvfold.V4_HCA, 1, 1, dtype=BF16),
        lambda: Snapshots.allocate(kvfold.V4_HCA, 1, 64, dtype=BF16),
        lambda: FoldState.page_bytes(kvfold.V4_HCA, 1, BF16),
    ):
        with pytest.raises(UnsupportedError, match=r"^dtype must be torch.float32 .* there is bf16 for"):
            call()
    assert FoldState.allocate(kvfold.V4_CSA, 1, 1, dtype=BF16).rows.dtype == BF16
