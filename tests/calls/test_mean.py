"""A `MeanState` against SGLang's online update, written here in fp64 from its layout: [max | sum | mean] in one row a request.

Either may do any step over the pool, so that each reads the other's rows.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend, Weights, bits, make_tokens
from support.ops_support import through_operators
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, MeanState, StepPlan, UnsupportedError
from kvfold.contract import pooled_bound, pooled_worst, resumed_bound

SMALL = CompressorSpec(head_dim=16, ratio=16, rope_dim=8)
LARGE = CompressorSpec(head_dim=64, ratio=128, rope_dim=16)
OWN, ENGINE = "kvfold", "engine"


@dataclass
class Sequence:
    """One of the test: its tokens, slot and length, steps that began inside of its open window, and its exact rows."""

    tokens: Tensor
    slot: int
    length: int = 0
    resumed: int = 0
    exact: list[Tensor] = field(default_factory=list)  # [max, sum, mean] after each token, fp64 `[3, head_dim]`


def update(row: Tensor, k: Tensor, a: Tensor, offset: int) -> Tensor:
    """The online update of a row `[3, head_dim]` by a value and its biased score, the row's fp64 or fp32."""
    if offset == 0:
        return torch.stack((a, torch.ones_like(a), k))
    m, s, mean = row
    top = torch.maximum(m, a)
    old, e = s * torch.exp(m - top), torch.exp(a - top)
    return torch.stack((top, old + e, (mean * old + k * e) / (old + e)))


class Pool:
    """A pool of an engine with its sequences. Rows hold NaN before anybody wrote them."""

    def __init__(self, spec: CompressorSpec, backend: Backend, slots: int, banks: int = 0) -> None:
        self.spec, self.backend, self.weights = spec, backend, Weights.make(spec)
        self.ape = self.weights.ape.to(backend.device)
        whole = torch.full(((1 + banks), slots, 3 * spec.head_dim + 4), torch.nan, device=backend.device)
        self.rows = whole[..., : 3 * spec.head_dim]
        self.state, self.banked = MeanState(spec, self.rows[0]), MeanState(spec, self.rows) if banks else None
        self.whole = whole

    def sequence(self, slot: int, n: int, seed: int) -> Sequence:
        found = Sequence(make_tokens(self.spec, n, seed, score_scale=2.0), slot)
        k, s = found.tokens.split(self.spec.channels, dim=1)
        row = torch.empty(0)
        for x in range(n):
            a = s[x] + self.weights.ape[x % self.spec.ratio]
            row = update(row, k[x].double(), a.double(), x % self.spec.ratio)
            found.exact.append(row)
        return found

    def step(self, batch: list[tuple[Sequence, int]], who: str = OWN, state: MeanState | None = None) -> Tensor:
        """New tokens of sequences; checks pooled rows and the pool, and returns all pooled rows."""
        before = bits(self.whole).clone()
        rows = self._own(batch, state or self.state) if who == OWN else self._engine(batch)
        ratio, done = self.spec.ratio, iter(rows)
        for one, new in batch:
            end = one.length + new
            if one.slot < 0:
                continue
            resumed = one.resumed
            for x in range(one.length, end):
                if x % ratio == 0:
                    resumed = 0
                elif x == one.length:
                    resumed += 1
                if x % ratio == ratio - 1:
                    self._check(next(done), one, x, resumed)
            if not state:
                one.length, one.resumed = end, resumed
                if end % ratio and new:
                    self.check_row(one, 0, end)
        assert next(done, None) is None
        # Only these rows, and of those no byte where no window is open.
        owners = [(0, one.slot) for one, _ in batch if one.slot >= 0 and one.length % ratio and not state]
        for one, new in batch if state else ():
            owners += [(k, one.slot) for k in range(1, new + 1) if (one.length + k) % ratio]
        after = bits(self.whole).clone()
        for bank, slot in owners:
            after[bank, slot, : 3 * self.spec.head_dim] = before[bank, slot, : 3 * self.spec.head_dim]
        assert torch.equal(after, before), "another row changed"
        return rows

    def check_row(self, one: Sequence, bank: int, length: int) -> None:
        """The row of a sequence of this length, in this bank."""
        m, s, mean = self.rows[bank, one.slot].cpu().view(3, -1)
        want = one.exact[length - 1]
        worst = pooled_worst(self.spec.ratio) + resumed_bound(2 * self.spec.ratio)
        assert torch.equal(m.double(), want[0])
        assert ((s - want[1]).abs() <= worst * want[1]).all()
        self._check(mean, one, length - 1, one.resumed + 1)

    def _check(self, got: Tensor, one: Sequence, x: int, resumed: int) -> None:
        """A mean after position x. A step of the engine rounds sum, mean and weights, so twice as often as one of kvfold."""
        want, first = one.exact[x][2], x - x % self.spec.ratio
        k, s = one.tokens[first : x + 1].double().split(self.spec.channels, dim=1)
        p = (s + self.weights.ape[: len(s)]).softmax(dim=0)
        bound = pooled_worst(self.spec.ratio) + resumed_bound(2 * resumed)
        assert ((got.cpu() - want).abs() <= bound * (p * k.abs()).sum(dim=0)).all(), (x, resumed)

    def plan(self, batch: list[tuple[Sequence, int]]) -> StepPlan:
        ints = {"dtype": torch.int32, "device": self.backend.device}
        ends = torch.tensor([0, *torch.tensor([new for _, new in batch]).cumsum(0).tolist()], **ints)
        start = torch.tensor([one.length for one, _ in batch], **ints)
        slots = torch.tensor([one.slot for one, _ in batch], **ints)
        return StepPlan.build(self.spec.ratio, start, ends, max([1, *(new for _, new in batch)]), state_slots=slots)

    def tokens(self, batch: list[tuple[Sequence, int]]) -> Tensor:
        empty = torch.empty(0, 2 * self.spec.channels)
        return torch.cat([empty, *(one.tokens[one.length : one.length + new] for one, new in batch)]).to(self.backend.device)

    def _own(self, batch: list[tuple[Sequence, int]], state: MeanState) -> Tensor:
        plan = self.plan(batch)
        rows = torch.full((plan.entry_capacity, self.spec.head_dim), torch.nan, device=self.backend.device)
        how = {"spec": self.spec, "ape": self.ape, "norm_weight": None, "rope": None, "backend": self.backend.name}
        kvfold.compress(self.tokens(batch), plan, state, None, rows=rows, **how)
        assert int(plan.errors) == 0
        return rows[: int(plan.cu_entries[-1])]

    def _engine(self, batch: list[tuple[Sequence, int]]) -> Tensor:
        """As SGLang's own kernel does it: fp32, in the same pool; a row is not stored at the end of a window."""
        found = []
        for one, new in batch:
            k, s = one.tokens.split(self.spec.channels, dim=1)
            row = self.rows[0, one.slot].cpu().view(3, -1)
            for x in range(one.length, one.length + new):
                offset = x % self.spec.ratio
                row = update(row, k[x], s[x] + self.weights.ape[offset], offset)
                found += [row[2]] if offset == self.spec.ratio - 1 else []
            if new and (one.length + new) % self.spec.ratio:
                self.rows[0, one.slot] = row.flatten().to(self.rows.device)
        return torch.stack(found) if found else torch.empty(0, self.spec.head_dim)


@pytest.mark.parametrize("spec", [LARGE, SMALL], ids=["ratio-128", "ratio-16"])
def test_decode_one_token_at_a_time(backend: Backend, spec: CompressorSpec) -> None:
    """Over more than two windows, beside a padded request and one that is in a slot for the second time."""
    pool = Pool(spec, backend, 4)
    first, second, padding = pool.sequence(2, 310, 1), pool.sequence(0, 310, 2), pool.sequence(-1, 310, 3)
    pool.step([(second, 5)])
    steps = 305 if spec is LARGE else 36
    if backend.slow and spec is LARGE:
        pool.step([(first, 247)])
        steps = 18
    for i in range(steps):
        pool.step([(first, 1), (padding, 1), (second, int(i % 3 > 0))])
        if i == 7:
            second = pool.sequence(0, 310, 4)
    assert first.length > 2 * spec.ratio


def test_chunks_of_both(backend: Backend) -> None:
    """Prompts, chunks and decode of several sequences, by kvfold and the engine in turn, over short and long kernels."""
    rng, pool = random.Random(1), Pool(SMALL, backend, 5)
    living = {slot: pool.sequence(slot, 400, slot) for slot in range(4)}
    for i in range(16 if backend.slow else 64):
        slots = rng.sample(sorted(living), rng.randint(1, 4))
        most = rng.choice((1, 4, 8, 40) if backend.slow else (1, 4, 8, 40, 100))
        batch = [(living[slot], rng.randint(0, most)) for slot in slots]
        pool.step(batch, ENGINE if rng.random() < 0.3 else OWN)
        for slot in slots:
            if living[slot].length > 250 or rng.random() < 0.1:
                pool.rows[0, slot] = torch.nan  # whatever the former owner left
                living[slot] = pool.sequence(slot, 400, 100 * i + slot)


def reversed_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs in order; now the last one first."""
    from triton.runtime.interpreter import interpreter_builder

    original = interpreter_builder.set_grid_idx
    monkeypatch.setattr(
        interpreter_builder, "set_grid_idx", lambda x, y, z: original(interpreter_builder.grid_dim[0] - 1 - x, y, z)
    )


@pytest.mark.parametrize("new", [5, 37], ids=str)
def test_read_and_write_in_one_launch(backend: Backend, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that goes on with a row and leaves another: whichever program runs first, as many sequences as programs."""
    if backend.slow:
        reversed_programs(monkeypatch)
    count = 3 if backend.device.type == "cpu" else 300  # more than there are programs
    pool = Pool(SMALL, backend, count)
    every = [pool.sequence(slot, 100, slot) for slot in range(count)]
    pool.step([(one, 13 + i % 2) for i, one in enumerate(every)])
    for _ in range(2):
        pool.step([(one, new) for one in every])


def test_bits_follow_the_cuts_inside_windows_alone(backend: Backend) -> None:
    """Where no step goes on inside of a window they are those of a `FoldState`; otherwise within its bound."""
    tokens, ends = make_tokens(SMALL, 64, 0), (64,)
    pool = Pool(SMALL, backend, 1)

    def over(cuts: tuple[int, ...], fold: bool = False) -> Tensor:
        one, found = Sequence(tokens, 0), []
        state = FoldState.allocate(SMALL, 1, 8, device=backend.device) if fold else pool.state
        for start, end in pairwise((0, *cuts, *ends)):
            one.length = start
            found.append(pool._own([(one, end - start)], state).clone())
        return torch.cat(found)

    whole = over((), fold=True)
    assert torch.equal(bits(over(())), bits(whole)) and torch.equal(bits(over((16, 48))), bits(whole))
    inside = (5, 16, 17, 18, 40)
    once = over(inside)
    assert torch.equal(bits(once), bits(over(inside)))
    off = (once.double() - whole.double()).norm(dim=1) / whole.double().norm(dim=1)
    assert off.max() <= pooled_bound(16) + resumed_bound(3)


def test_banks_keep_each_draft(backend: Backend) -> None:
    """Bank k is the row after k new tokens, the row itself stays, a step can be made again, and any of it accepted."""
    pool, rng = Pool(SMALL, backend, 3, banks=4), random.Random(0)
    one, other = pool.sequence(2, 200, 1), pool.sequence(0, 200, 2)
    pool.step([(one, 6), (other, 16)])
    for _ in range(12):
        drafts = [(one, rng.randint(1, 4)), (other, rng.randint(0, 4))]
        rows = pool.step(drafts, state=pool.banked)
        again = pool.step(drafts, state=pool.banked)
        assert torch.equal(bits(rows), bits(again))
        for sequence, new in drafts:
            for k in range(1, new + 1):
                length = sequence.length + k
                inside = sequence.length % 16 != 0 and sequence.length // 16 == (length - 1) // 16
                if length % 16:
                    resumed, sequence.resumed = sequence.resumed, sequence.resumed if inside else 0
                    pool.check_row(sequence, k, length)
                    sequence.resumed = resumed
            accepted = rng.choice((0, new, new))
            if accepted:  # what SGLang does before its next step
                if (sequence.length + accepted) % 16:
                    pool.rows[0, sequence.slot] = pool.rows[accepted, sequence.slot]
                crossed = (sequence.length + accepted - 1) // 16 > (sequence.length - 1) // 16
                sequence.resumed = 0 if crossed else sequence.resumed + 1
                sequence.length += accepted
    assert one.length > 16 and other.length > 32


def test_masked_tokens_leave_a_cleared_row(backend: Backend) -> None:
    """Of scores of -inf alone; a cleared row that is read is one of no tokens."""
    pool = Pool(SMALL, backend, 1)
    one = pool.sequence(0, 40, 1)
    one.tokens[:3, 16:] = -torch.inf
    pool._own([(one, 2)], pool.state)
    m, s, mean = pool.rows[0, 0].cpu().view(3, -1)
    assert (m == -torch.inf).all() and (s == 0).all() and (mean == 0).all()
    one.length = 2
    pool._own([(one, 1)], pool.state)
    one.length = 3
    pool._own([(one, 1)], pool.state)
    m, s, mean = pool.rows[0, 0].cpu().view(3, -1)
    assert torch.equal(m, one.tokens[3, 16:] + pool.weights.ape[3]) and (s == 1).all() and torch.equal(mean, one.tokens[3, :16])


def test_nothing_new(backend: Backend) -> None:
    pool = Pool(SMALL, backend, 2)
    one, padding = pool.sequence(1, 20, 1), pool.sequence(-1, 20, 1)
    pool.step([])
    pool.step([(one, 0), (padding, 3)])
    assert pool.rows.isnan().all()


def test_refused_and_counted(backend: Backend) -> None:
    """A slot behind the pool, and tokens that kv_score has not: the sequence is skipped whole."""
    pool = Pool(SMALL, backend, 2)
    one, outside, fine = pool.sequence(0, 40, 1), pool.sequence(2, 40, 2), pool.sequence(1, 40, 3)
    for new in (1, 20):
        batch = [(fine, new), (outside, new), (one, new)]
        plan, before = pool.plan(batch), bits(pool.whole).clone()
        how = {"spec": SMALL, "ape": pool.ape, "norm_weight": None, "rope": None, "backend": pool.backend.name}
        kvfold.compress(pool.tokens(batch)[:-1], plan, pool.state, None, **how)
        assert int(plan.errors) == 2
        after = bits(pool.whole)
        assert torch.equal(after[:, 0], before[:, 0]) and not pool.rows[0, 1].isnan().any()


@pytest.mark.parametrize("banks", [0, 4])
def test_records_through_operators(backend: Backend, banks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache, norm and RoPE behind it as over a `FoldState`; the operator writes the same bytes."""

    def records(state: MeanState | FoldState) -> tuple[Tensor, Tensor]:
        pool = Pool(SMALL, backend, 2)
        one, cache = pool.sequence(1, 64, 5), EntryCache.allocate("bf16", 1, 8, SMALL, device=backend.device)
        weights = {name: getattr(pool.weights, name).to(backend.device) for name in ("norm_weight", "rope")}
        for new in (16, 16) if not banks else (3, 4, 4):
            plan = pool.plan([(one, new)])
            table = torch.zeros(1, 1, dtype=torch.int32, device=backend.device)
            plan = StepPlan.build(
                16, plan.start_pos, plan.cu_seqlens, new, state_slots=plan.state_slots, cache_block_table=table, rows_per_page=8
            )
            kvfold.compress(
                pool.tokens([(one, new)]), plan, state, cache, spec=SMALL, ape=pool.ape, backend=backend.name, **weights
            )
            one.length += new
        return cache.storage, state.rows

    eager = records(MeanState.allocate(SMALL, 2, banks, device=backend.device))
    if not banks:
        assert torch.equal(eager[0], records(FoldState.allocate(SMALL, 2, 8, device=backend.device))[0]) and eager[0].any()
    through_operators(monkeypatch)
    traced = records(MeanState.allocate(SMALL, 2, banks, device=backend.device))
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(eager, traced, strict=True))


def test_calls_take_the_kernels_of_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the step: of decode, drafts over banks and prompts."""
    backend = BACKENDS["interpreter"]
    if not backend.slow:
        pytest.skip("Triton compiles in this process, so it does not interpret")
    launch, keys = import_module("kvfold.backend_triton.launch"), import_module("kvfold.backend_triton.keys")
    taken, find = set(), launch.launcher_of
    monkeypatch.setattr(launch, "launcher_of", lambda key, device: (taken.add(key), find(key, device))[1])
    pool = Pool(SMALL, backend, 2, banks=4)
    one, fp32 = pool.sequence(1, 60, 1), torch.float32
    pool.step([(one, 30)])
    pool.step([(one, 1)])
    pool.step([(one, 3)], state=pool.banked)
    warm = keys.Wanted((fp32,), (1, 4, 100), (fp32,), (fp32,), (False,))
    assert len(taken) == 3 and taken <= {*keys.mean_keys(SMALL, None, warm, fp32)}
    assert not [*keys.mean_keys(kvfold.V4_CSA, None, warm, fp32)] and not [
        *keys.mean_keys(kvfold.V41_MAIN_R1, None, warm, fp32)
    ]


@pytest.mark.gpu
def test_replayed_with_new_tokens() -> None:
    """A graph that was recorded over no sequence decodes one, token by token."""
    pool = Pool(SMALL, BACKENDS["cuda"], 2)
    one, ints = pool.sequence(1, 40, 1), {"dtype": torch.int32, "device": "cuda"}
    start, ends, slots = torch.zeros(1, **ints), torch.tensor([0, 1], **ints), torch.full((1,), -1, **ints)
    kv_score = torch.empty(1, 32, device="cuda")
    plan = StepPlan.build(16, start, ends, 1, state_slots=slots)

    def decode() -> None:
        plan.update(start, ends)
        kvfold.compress(kv_score, plan, pool.state, None, spec=SMALL, ape=pool.ape, norm_weight=None, rope=None)

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    slots.fill_(1)
    for x in range(40):
        kv_score.copy_(one.tokens[x : x + 1])
        start.fill_(x)
        graph.replay()
        one.resumed = 0 if x % 16 == 0 else one.resumed + 1
        if (x + 1) % 16:
            pool.check_row(one, 0, x + 1)
    assert int(plan.errors) == 0


def test_copies_stand_alone() -> None:
    pool = Pool(SMALL, Backend("torch", torch.device("cpu")), 2, banks=2)
    twin = copy.deepcopy(pool.banked)
    assert twin.banks == 2 and twin.rows.data_ptr() != pool.rows.data_ptr() and twin.bytes_per_slot == 3 * 3 * 16 * 4


ROWS = torch.zeros(4, 48)
BAD = {
    "overlap": ((kvfold.V4_CSA, ROWS), UnsupportedError, "spec must have no overlap"),
    "no gate": ((kvfold.V41_MAIN_R1, ROWS), ValueError, "spec must have a gate"),
    "bf16": ((SMALL, ROWS.bfloat16()), UnsupportedError, r"rows must be torch\.float32"),
    "fp16": ((SMALL, ROWS.half()), ValueError, "rows.dtype must be"),
    "no tensor": ((SMALL, None), TypeError, "rows must be a torch.Tensor"),
    "of fold rows": ((SMALL, ROWS.view(4, 3, 16)), ValueError, r"rows must have shape \[any, any, 48\]"),
    "wide": ((SMALL, torch.zeros(4, 49)), ValueError, r"rows must have shape \[any, 48\]"),
    "columns": ((SMALL, torch.zeros(48, 4).T), ValueError, "rows must be contiguous within a slot"),
    "one row": ((SMALL, ROWS[:1].expand(4, 48)), ValueError, "rows must have slots that do not overlap"),
    "many banks": ((SMALL, torch.zeros(10, 1, 48)), ValueError, "rows must have from 1 to 8 banks"),
    "no banks": ((SMALL, torch.zeros(1, 4, 48)), ValueError, "rows must have from 1 to 8 banks"),
    "banks between slots": ((SMALL, torch.zeros(4, 3, 48).transpose(0, 1)), ValueError, "rows must have banks a whole number"),
    "one bank": ((SMALL, torch.zeros(1, 4, 48).expand(3, 4, 48)), ValueError, "rows must have banks a whole number"),
    "one bank of one": ((SMALL, ROWS[:1, None].expand(3, 1, 48)), ValueError, "rows must have banks that do not overlap"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str) -> None:
    given, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        MeanState(*given)


def test_bad_calls(backend: Backend) -> None:
    """Nothing is written, and errors name the argument."""
    pool = Pool(SMALL, backend, 2, banks=2)
    one = pool.sequence(0, 40, 1)
    plan, tokens = pool.plan([(one, 3)]), pool.tokens([(one, 3)])
    rest = {"spec": SMALL, "ape": pool.ape, "norm_weight": None, "rope": None, "backend": backend.name}
    device = backend.device

    def refused(kind: type[Exception], message: str, plan: StepPlan = plan, state: MeanState = pool.state, **changed) -> None:
        with pytest.raises(kind, match=message):
            kvfold.compress(tokens, plan, state, None, **(rest | changed))

    refused(ValueError, "plan must be for at most 2 new tokens, the banks of state, got max_new_tokens=3", state=pool.banked)
    snapshots = kvfold.Snapshots.allocate(SMALL, 2, 8, device=device)
    refused(ValueError, "snapshots must be None for a MeanState", snapshots=snapshots)
    table = torch.zeros(1, 4, dtype=torch.int32, device=device)
    paged = StepPlan.build(16, plan.start_pos, plan.cu_seqlens, 3, block_tables=(table, table), page_size=4)
    refused(ValueError, "plan must have state_slots for a MeanState", plan=paged)
    refused(ValueError, "state must be for", state=MeanState.allocate(CompressorSpec(16, 32, rope_dim=8), 2, device=device))
    refused(ValueError, "state", rows=pool.whole.view(-1)[:16].view(1, 16))  # which is in the pool
    given = (tokens, pool.state, None, SMALL, pool.ape, None, None)
    with pytest.raises(TypeError, match=r"compressors\[0\]: state must be a FoldState"):
        kvfold.compress_many([given], plan, backend=backend.name)
    slots = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(TypeError, match="state must be a"):
        kvfold.restore(pool.state, snapshots, slots, slots, slots, slots.clone(), backend=backend.name)
    for look in (kvfold.check, partial(kvfold.dump, "/nowhere/call.safetensors")):
        with pytest.raises(UnsupportedError, match="state must be a FoldState or a WindowState for check and dump"):
            look(tokens, plan, pool.state, None, **rest)
    assert pool.whole.isnan().all() and int(plan.errors) == 0


@pytest.mark.parametrize("banks", [0, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_the_callers(backend: Backend, banks: int, dtype: torch.dtype) -> None:
    """Engines set it while they load a model: a pool is fp32 all the same, and what a step makes of it has the same bits."""
    spec = CompressorSpec(head_dim=16, ratio=16, rope_dim=8, has_ape=False)
    kv_score, slot = make_tokens(spec, 6, seed=5).to(backend.device), torch.zeros(1, dtype=torch.int32, device=backend.device)
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            state = MeanState.allocate(spec, 1, banks, device=backend.device)
            state.rows.view(-1, 3, 16)[0] = torch.linspace(0.5, 2, 48, dtype=torch.float32, device=backend.device).view(3, 16)
            rows = torch.zeros(1, 16, dtype=torch.float32, device=backend.device)
            plan = StepPlan.build(16, slot + 11, torch.cat((slot, slot + 6)), 6, state_slots=slot)
            kvfold.compress(
                kv_score, plan, state, None, spec=spec, ape=None, norm_weight=None, rope=None, rows=rows, backend=backend.name
            )
            assert int(plan.errors) == 0
            found.append(torch.cat((state.rows.flatten(), rows.flatten())))
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[1].dtype == torch.float32 and torch.equal(bits(found[0]), bits(found[1]))
