"""`compress_many`: two compressors in one launch do what one call for each does, to the bit, errors included."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import SPECS, Backend, Engine, bits, change_long_rows, make_tokens
from support.window_support import WindowEngine
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, StepPlan
from kvfold.backend_triton import table as configs

MAIN, INDEXER = SPECS["csa"], SPECS["indexer"]
# (spec, format, kv_score, state) of both compressors
PAIRS = {
    "fp32": ((MAIN, "fp32", torch.float32, torch.float32), (INDEXER, "fp32", torch.float32, torch.float32)),
    "bf16": ((MAIN, "fp8_ds_mla", torch.bfloat16, torch.bfloat16), (INDEXER, "bf16", torch.bfloat16, torch.float32)),
    "mixed": ((INDEXER, "fp32", torch.float32, torch.float32), (MAIN, "fp8_ds_mla", torch.bfloat16, torch.bfloat16)),
    "128": (
        (CompressorSpec(head_dim=512, ratio=128), "fp32", torch.bfloat16, torch.float32),
        (CompressorSpec(head_dim=64, ratio=128, has_ape=False, rope_dim=0), "bf16", torch.float32, torch.float32),
    ),
}
SLOTS, ENTRIES = 5, 12
FIELDS = ["kv_score", "state", "cache", "spec", "ape", "norm_weight", "rope"]


class Two:
    """Two compressors in two copies: one is called with `compress_many`, the other with `compress` twice. They must agree."""

    def __init__(self, backend: Backend, name: str, max_new_tokens: int = 4) -> None:
        self.backend, self.pair = backend, PAIRS[name]
        self.ratio = self.pair[0][0].ratio
        options: dict[str, Any] = {"num_slots": SLOTS, "max_new_tokens": max_new_tokens, "max_entries": ENTRIES}
        self.together, self.apart = (
            [Engine(spec, backend, fmt=fmt, state_dtype=state, **options) for spec, fmt, _, state in self.pair]
            for _ in range(2)
        )
        self.errors = 0

    def tokens(self, n: int, seed: int) -> list[Tensor]:
        return [make_tokens(spec, n, seed=seed + i, dtype=dtype) for i, (spec, _, dtype, _) in enumerate(self.pair)]

    def call(self, plan: StepPlan, new: list[Tensor], without: tuple[int, ...] = ()) -> None:
        """One `compress_many` and two `compress`, and the comparison of every byte and of the errors counted.

        without: the compressors that get no cache.
        """
        new = [rows.to(self.backend.device) for rows in new]
        calls = []
        for engines in (self.together, self.apart):
            both = [arguments(engine, rows) for engine, rows in zip(engines, new, strict=True)]
            calls.append([(*one[:2], None if i in without else one[2], *one[3:]) for i, one in enumerate(both)])
        plan.errors.zero_()
        kvfold.compress_many(calls[0], plan, backend=self.backend.name)
        self.errors = int(plan.errors)
        plan.errors.zero_()
        for kv_score, state, cache, *others in calls[1]:
            named = dict(zip(FIELDS[3:], others, strict=True))
            kvfold.compress(kv_score, plan, state, cache, backend=self.backend.name, **named)
        assert self.errors == int(plan.errors)
        for one, other in zip(self.together, self.apart, strict=True):
            one.check_canaries()
            for ours, theirs in zip(one.snapshot(), other.snapshot(), strict=True):
                assert torch.equal(ours, theirs)

    def step(self, batch: list[tuple[int, int, list[Tensor]]]) -> None:
        """A call for (state slot, start, new rows of both compressors)."""
        lengths = [len(new[0]) for _, _, new in batch]
        targets = [
            slot * ENTRIES + window
            for (slot, start, _), n in zip(batch, lengths, strict=True)
            if slot != -1 and n
            for window in range(start // self.ratio, (start + n) // self.ratio)
        ]
        plan = self.plan([start for _, start, _ in batch], lengths, [slot for slot, _, _ in batch], targets)
        self.call(plan, [torch.cat([new[i] for _, _, new in batch]) for i in (0, 1)])

    def plan(self, starts: list[int], lengths: list[int], slots: list[int], targets: list[int] | None, **options) -> StepPlan:
        ints = {"dtype": torch.int32, "device": self.backend.device}
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        if targets is not None:
            options["entry_slots"] = torch.tensor(targets, dtype=torch.int64, device=self.backend.device)
        return StepPlan.build(
            self.ratio, torch.tensor(starts, **ints), torch.tensor(ends, **ints), max([1, *lengths]),
            state_slots=torch.tensor(slots, **ints), **options,
        )  # fmt: skip


def arguments(engine: Engine, rows: Tensor) -> tuple:
    """As `compress_many` takes them."""
    return rows, engine.state, engine.cache, engine.spec, engine.ape, engine.norm_weight, engine.rope


@pytest.mark.parametrize("name", PAIRS)
def test_prefill_decode_absent_and_rejected(backend: Backend, name: str) -> None:
    """Sequences that start at different times, in steps of any size, with absent ones beside them and drafts rejected."""
    if backend.slow and name in ("fp32", "bf16"):
        pytest.skip("the interpreter does the pair with dtypes of both, and the one of ratio 128")
    two, rng = Two(backend, name), random.Random(3)
    ratio = two.ratio
    length = (2 if ratio == 128 else 8) * ratio + 3
    texts = [two.tokens(length, seed=40 + 2 * i) for i in range(4)]
    wrong = two.tokens(8, seed=60)
    at = [0, 0, 0, 0]
    first = (length - 9, ratio + 1, 2, ratio - 1)  # prefills; then decode
    for turn in range(5 if backend.slow else 12):
        batch: list[tuple[int, int, list[Tensor]]] = []
        for i in rng.sample(range(4), 4):
            start = at[i]
            if turn == i % 2 and start == 0:
                n, accepted = first[i], first[i]
            elif turn <= i % 2 or start >= length:
                continue
            else:
                n = min(rng.randint(1, 4), length - start)
                accepted = rng.randint(0, n)
            new = [torch.cat([t[start : start + accepted], w[: n - accepted]]) for t, w in zip(texts[i], wrong, strict=True)]
            batch.append((i, start, new))
            at[i] += accepted
        batch.insert(1, (-1, 3, [w[:3] for w in wrong]))
        batch.append((4, 7, [w[:0] for w in wrong]))
        two.step(batch)
        assert two.errors == 0
    assert min(at) > 0
    if ratio == 4:  # entries were made, and are right
        done = at[0] // ratio
        got = two.together[0].entries(0, done)
        want = two.together[0].weights.entries(texts[0][0][: done * ratio], MAIN if name != "mixed" else INDEXER)
        assert done >= 5 and (got - want).abs().max() < (0.3 if name == "bf16" else 1e-4)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_cache_block_table(backend: Backend, name: str) -> None:
    """The entry slots that the plan computes are for both caches."""
    two = Two(backend, name)
    pages = torch.tensor([[3, 1], [-1, 0]], dtype=torch.int32, device=backend.device)
    plan = two.plan([0, 0], [13, 9], [1, 4], None, cache_block_table=pages, rows_per_page=5)
    two.call(plan, two.tokens(22, seed=1))
    assert two.errors == 0
    assert two.together[0].cache.read(torch.tensor([15, 16, 17], device=backend.device)).isfinite().all()


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1)])
def test_without_a_cache(backend: Backend, without: tuple[int, ...]) -> None:
    """A compressor without a cache keeps its state; without any, the plan may do without entry slots."""
    two = Two(backend, "fp32")
    before = [engine.cache.storage.clone() for engine in two.together]
    two.call(two.plan([0], [9], [2], [0, 1] if len(without) == 1 else None), two.tokens(9, seed=2), without)
    assert two.errors == 0
    for i, engine in enumerate(two.together):
        assert torch.equal(engine.cache.storage, before[i]) == (i in without)
        assert engine.needed(9) <= set(engine.held(2, 9))


@pytest.mark.parametrize("name", PAIRS)
def test_refused_as_often_as_by_two_calls(backend: Backend, name: str) -> None:
    """Each compressor counts what it refuses, so a sequence without its state is counted twice; the others go on."""
    if backend.slow and name != "mixed":
        pytest.skip("the interpreter does the pair with dtypes of both")
    two = Two(backend, name)
    n = two.ratio + 1
    new = two.tokens(3 * n, seed=7)
    two.call(two.plan([0, 1, 0], [n, n, n], [0, 1, 2], [0, 1, 2]), new)  # the second has no history
    assert two.errors == 2
    two.call(two.plan([0, 0, 0], [n, n, n], [0, SLOTS, 2], [0, 1, 2]), new)  # a state slot beyond both states
    assert two.errors == 2
    two.call(two.plan([0, 0, 0], [n, n, n], [0, 1, 2], [0, 10**6, 2]), new)  # an entry slot beyond both caches
    assert two.errors == 2
    two.call(two.plan([0, 0, 0], [n, n, n], [0, 1, 2], [0]), new)  # fewer places than entries
    assert two.errors == 4
    two.call(two.plan([0, 0, 0], [n, n, n], [0, 1, 2], [0, 1, 2]), [new[0], new[1][: 2 * n]])  # one kv_score is too short
    assert two.errors == 1
    two.call(two.plan([0, 0, 0], [n, n, n], [0, 1, 2], [0, 1, 2]), [new[0][:0], new[1]])  # and one is empty
    assert two.errors == 3
    plan = two.plan([0, 0, 0], [n, n, n], [0, 1, 2], [0, 1, 2])
    plan.update(torch.tensor([0, -4, 0], dtype=torch.int32, device=backend.device), plan.cu_seqlens.clone())
    two.call(plan, new)  # what the plan refuses, it counted when it was made
    assert two.errors == 0
    two.step([(i, 0, [rows[:n] for rows in new]) for i in range(3)])
    assert two.errors == 0


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("lengths", [(13,), (45, 9)])
def test_programs_take_windows_in_turn(
    backend: Backend, lengths: tuple[int, ...], few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for 3 programs of each compressor, or for 2 where windows are few, most take more than one, some by lot.

    The main compressor has a row of the table for `few` windows, whose programs draw none by lot; or the one for many.
    """
    if backend.name != "triton":
        pytest.skip("other backends have no programs")
    change_long_rows(monkeypatch, programs=3, pair_programs=2)
    if not few:
        many = (c for c in configs.CONFIGS if c.kind != "rows" or c.bucket == configs.ANY)
        monkeypatch.setattr(configs, "CONFIGS", tuple(many))
    two = Two(backend, "bf16")
    two.step([(slot, 0, two.tokens(n, seed=20 + 2 * slot)) for slot, n in enumerate(lengths)])
    assert two.errors == 0
    # The counts, which are back at zero: check_canaries.
    assert [bool(engine.state._workspaces) for engine in two.together] == [not few, True]


def test_one_compressor(backend: Backend) -> None:
    """Is `compress`."""
    two = Two(backend, "bf16")
    plan = two.plan([0, 0], [9, 5], [1, 0], [0, 1, 2])
    rows = two.tokens(14, seed=3)[0].to(backend.device)
    kvfold.compress_many([arguments(two.together[0], rows)], plan, backend=backend.name)
    two.apart[0].compress(rows, plan)
    for ours, theirs in zip(two.together[0].snapshot(), two.apart[0].snapshot(), strict=True):
        assert torch.equal(ours, theirs)
    assert int(plan.errors) == 0


def test_an_empty_batch(backend: Backend) -> None:
    two = Two(backend, "fp32")
    two.call(two.plan([], [], [], []), two.tokens(0, seed=0))
    two.call(two.plan([3, 0], [0, 0], [0, -1], [0]), two.tokens(0, seed=0))
    assert two.errors == 0


class Call:
    """Arguments of a good call, of which a test spoils one."""

    def __init__(self, backend: Backend) -> None:
        self.two = Two(backend, "fp32")
        self.device = backend.device
        self.plan = self.two.plan([0], [9], [0], [0, 1])
        rows = [one.to(self.device) for one in self.two.tokens(9, seed=0)]
        self.both = [list(arguments(engine, new)) for engine, new in zip(self.two.together, rows, strict=True)]

    def put(self, i: int, field: str, value: Any) -> Call:
        self.both[i][FIELDS.index(field)] = value
        return self


SPOILED: dict[str, tuple[str, Callable[[Call], object]]] = {
    "kv_score: width": ("kv_score", lambda c: c.put(0, "kv_score", torch.zeros(9, 1024, device=c.device))),
    "kv_score: type": ("kv_score", lambda c: c.put(1, "kv_score", None)),
    "state: spec": ("state", lambda c: c.put(1, "state", FoldState.allocate(MAIN, 2, 4, device=c.device))),
    "state: device": ("state", lambda c: c.put(1, "state", FoldState.allocate(INDEXER, 2, 4, device="meta"))),
    "cache: spec": ("cache", lambda c: c.put(1, "cache", c.both[0][2])),
    "cache: device": ("cache", lambda c: c.put(0, "cache", EntryCache.allocate("fp32", 2, 5, MAIN, device="meta"))),
    "spec: type": ("spec", lambda c: c.put(0, "spec", "csa")),
    "state: another spec's": (
        "state",
        lambda c: c.put(1, "spec", CompressorSpec(head_dim=128, ratio=8, overlap=True, hadamard=True)),
    ),
    "ape: missing": ("ape", lambda c: c.put(1, "ape", None)),
    "norm_weight: shape": ("norm_weight", lambda c: c.put(0, "norm_weight", torch.ones(128, device=c.device))),
    "rope: dtype": ("rope", lambda c: c.put(1, "rope", torch.zeros(9, 64, device=c.device).half())),
}


@pytest.mark.parametrize("what", SPOILED)
def test_errors_name_the_compressor_and_the_argument(backend: Backend, what: str) -> None:
    name, spoil = SPOILED[what]
    call = Call(backend)
    before = [list(row) for row in call.both]
    snapshots = [engine.snapshot() for engine in call.two.together]
    spoil(call)
    wrong = max(i for i in (0, 1) if any(a is not b for a, b in zip(before[i], call.both[i], strict=True)))
    with pytest.raises((TypeError, ValueError), match=rf"^compressors\[{wrong}\]: .*\b{re.escape(name)}\b"):
        kvfold.compress_many([tuple(one) for one in call.both], call.plan, backend=backend.name)
    for engine, before_call in zip(call.two.together, snapshots, strict=True):
        for was, now in zip(before_call, engine.snapshot(), strict=True):
            assert torch.equal(was, now)


def test_sharing_is_refused(backend: Backend) -> None:
    """The same state or cache twice, also as another object over the same memory, would be written by both at once."""
    call = Call(backend)
    main = call.both[0]
    twin = FoldState(MAIN, main[1].rows, main[1].positions, main[1].max_new_tokens)
    other = FoldState.allocate(MAIN, SLOTS, 4, device=call.device)
    for name, state, cache in [("state", main[1], None), ("state", twin, None), ("cache", other, main[2])]:
        second = [main[0], state, cache, *main[3:]]
        with pytest.raises(ValueError, match=rf"^compressors\[1\]: {name} must not (be shared|share memory)"):
            kvfold.compress_many([tuple(main), tuple(second)], call.plan, backend=backend.name)
    kvfold.compress_many([tuple(main), (main[0], other, None, *main[3:])], call.plan, backend=backend.name)
    there = other.held()[0] >= 0
    assert there.any() and torch.equal(bits(other.rows[0][there]), bits(main[1].rows[0][there]))


def test_how_many_and_of_what_kind(backend: Backend) -> None:
    call = Call(backend)
    one = tuple(call.both[0])
    with pytest.raises(ValueError, match=r"\bcompressors\b.*got 3"):
        kvfold.compress_many([one, tuple(call.both[1]), one], call.plan, backend=backend.name)
    with pytest.raises(ValueError, match=r"\bcompressors\b.*got 0"):
        kvfold.compress_many([], call.plan, backend=backend.name)
    with pytest.raises(TypeError, match=r"\bcompressors\b"):
        kvfold.compress_many(iter([one]), call.plan, backend=backend.name)  # type: ignore[arg-type]
    for bad in (one[:-1], list(one), None):
        with pytest.raises(TypeError, match=r"\bcompressors\[1\].*kv_score"):
            kvfold.compress_many([one, bad], call.plan, backend=backend.name)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"\bbackend\b"):
        kvfold.compress_many([one], call.plan, backend="cuda")
    paged = WindowEngine(INDEXER, backend, num_sequences=1, length=9, page_size=3)
    with pytest.raises(TypeError, match=r"^compressors\[1\]: .*\bstate\b.*FoldState"):
        second = list(call.both[1])
        second[1] = paged.state
        kvfold.compress_many([one, tuple(second)], call.plan, backend=backend.name)
