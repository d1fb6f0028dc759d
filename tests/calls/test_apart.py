"""`kv_score` as two tensors, values and scores: the same bits as one tensor gives, everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend
from support.ops_support import ON_BOTH, through_operators
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, reference

BF16, FP32 = torch.bfloat16, torch.float32
FOLD = CompressorSpec(head_dim=32, ratio=16, rope_dim=8)
TWO = CompressorSpec(head_dim=32, ratio=2, rope_dim=8, has_ape=False)
OVERLAP = CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=8)
PAGE = 8  # positions of a `WindowState`'s page


class Case(NamedTuple):
    """A compressor, the dtypes of its tokens and of what it keeps, its kind of state, and positions per page of snapshots."""

    spec: CompressorSpec
    dtype: torch.dtype = FP32
    kept: torch.dtype = FP32
    kind: str = "fold"
    prefix: int = 0


CASES = {
    "fold": Case(FOLD),
    "fold snapshots": Case(FOLD, BF16, prefix=6),
    "slices": Case(replace(FOLD, head_dim=512), BF16),
    "ratio 2": Case(TWO),
    "overlap": Case(OVERLAP, BF16),
    "overlap snapshots": Case(OVERLAP, BF16, BF16, prefix=4),
    "overlap 3": Case(replace(OVERLAP, ratio=3)),
    "wide": Case(replace(OVERLAP, head_dim=256), BF16, BF16),
    "window overlap": Case(OVERLAP, BF16, kind="window"),
    "window": Case(FOLD, kept=BF16, kind="window"),
    "window ratio 2": Case(TWO, kind="window"),
}
STEPS = {"short": (4, [(3, 2), (1, 1), (4, 4), (2, 0)]), "long": (40, [(17, 20), (1, 3)])}


def apart(joined: Tensor) -> tuple[Tensor, Tensor]:
    """Column slices of two tensors, with other strides and alignments, the scores first in memory."""
    found, (n, width) = [], (joined.shape[0], joined.shape[1] // 2)
    memory = torch.full((n * (2 * width + 45) + 64,), torch.nan, dtype=joined.dtype, device=joined.device)
    for half, start, stride in ((1, 3, width + 5), (0, n * (width + 5) + 16, width + 40)):
        found.append(memory.as_strided((n, width), (stride, 1), start))
        found[-1].copy_(joined[:, half * width : (half + 1) * width])
    return found[1], found[0]


class Run:
    """State, cache and snapshots of two sequences, and what every call so far has left."""

    def __init__(self, case: Case, backend: Backend) -> None:
        self.case, self.backend, device = case, backend, backend.device
        spec, draw = case.spec, torch.Generator().manual_seed(3)
        self.where, self.snapshots, self.at = {}, None, [0, 0]
        if case.kind == "fold":
            self.state = kvfold.FoldState.allocate(spec, 2, 4, device=device, **{"dtype": BF16} if case.kept == BF16 else {})
            self.where["state_slots"] = self.ints(0, 1)
            self.held = [self.state.rows, self.state.positions]
        else:
            self.state = kvfold.WindowState.allocate(spec, 16, PAGE, dtype=case.kept, device=device)
            tables = self.ints(*range(16)).view(2, 8)
            self.where |= {"block_tables": (tables, tables.clone()), "page_size": PAGE}
            self.held = [self.state.kv, self.state.score]
        if case.prefix:
            self.snapshots = kvfold.Snapshots.allocate(spec, 20, case.prefix, dtype=case.kept, device=device)
            self.where |= {"snapshot_table": self.ints(*range(20)).view(2, 10), "snapshot_page_size": case.prefix}
            self.held += [self.snapshots.rows, self.snapshots.positions]
        self.cache = kvfold.EntryCache.allocate("fp32", 16, 4, spec, device=device)
        self.held.append(self.cache.storage)
        for x in self.held:
            x.fill_(-1) if x.dtype == torch.int32 else x.zero_()
        self.ape = torch.randn(spec.ratio, spec.channels, generator=draw).to(device) if spec.has_ape else None
        self.weight = torch.rand(spec.head_dim, generator=draw).to(device)
        self.rope = reference.rope_table(64, spec.rope_dim).to(device)

    def ints(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.backend.device)

    def plan(self, lengths: tuple[int, int], bound: int) -> kvfold.StepPlan:
        start, ends = self.ints(*self.at), self.ints(0, lengths[0], sum(lengths))
        tables = {"cache_block_table": self.ints(*range(16)).view(2, 8), "rows_per_page": 4}
        self.at = [p + n for p, n in zip(self.at, lengths, strict=True)]
        return kvfold.StepPlan.build(self.case.spec.ratio, start, ends, bound, **tables, **self.where)

    def one(self, tokens: Tensor | tuple[Tensor, Tensor]) -> tuple:
        return tokens, self.state, self.cache, self.case.spec, self.ape, self.weight, self.rope, self.snapshots

    def compress(self, tokens: Tensor | tuple[Tensor, Tensor], plan: kvfold.StepPlan) -> tuple[Tensor, Tensor]:
        shape = plan.entry_capacity, self.case.spec.head_dim
        rows = torch.full(shape, -7.0, device=self.backend.device)
        latent = rows.bfloat16()
        kvfold.compress(
            tokens, plan, self.state, self.cache, spec=self.case.spec, ape=self.ape, norm_weight=self.weight, rope=self.rope,
            rows=rows, latent=latent, snapshots=self.snapshots, backend=self.backend.name,
        )  # fmt: skip
        assert int(plan.errors) == 0
        return rows, latent


def tokens_of(case: Case, count: int, device: torch.device) -> Tensor:
    return torch.randn(count, 2 * case.spec.channels, generator=torch.Generator().manual_seed(count)).to(device, case.dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", STEPS)
def test_the_same_bits(backend: Backend, name: str, length: str) -> None:
    case, (bound, steps) = CASES[name], STEPS[length]
    runs = Run(case, backend), Run(case, backend)
    for lengths in steps:
        joined = tokens_of(case, sum(lengths), backend.device)
        one, two = (run.compress(x, run.plan(lengths, bound)) for run, x in zip(runs, (joined, apart(joined)), strict=True))
        assert all(map(torch.equal, one, two))
        assert all(map(torch.equal, runs[0].held, runs[1].held))


def test_of_a_pair_one_may_be_apart(backend: Backend) -> None:
    cases = CASES["overlap"], Case(replace(OVERLAP, head_dim=64, hadamard=True))
    for bound, steps in STEPS.values():
        runs = [[Run(case, backend) for case in cases] for _ in range(3)]
        for lengths in steps:
            joined = [tokens_of(case, sum(lengths), backend.device) for case in cases]
            for i, two in enumerate(runs):
                plans = [run.plan(lengths, bound) for run in two]
                given = [apart(x) if i == 2 or (i == 1 and j) else x for j, x in enumerate(joined)]
                made = [run.one(x) for run, x in zip(two, given, strict=True)]
                kvfold.compress_many(made, plans[0], backend=backend.name)
                assert int(plans[0].errors) == 0
            for other in runs[1:]:
                for mine, theirs in zip(runs[0], other, strict=True):
                    assert all(map(torch.equal, mine.held, theirs.held))


@ON_BOTH
@pytest.mark.parametrize("name", ["fold", "overlap", "window overlap"])
def test_as_operators(where: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, runs = CASES[name], [Run(CASES[name], where) for _ in range(2)]
    for traced in (False, True):
        run = runs[traced]
        with monkeypatch.context() as patch:
            if traced:
                through_operators(patch)
            run.compress(apart(tokens_of(case, 9, where.device)), run.plan((4, 5), 8))
    assert all(map(torch.equal, runs[0].held, runs[1].held))


@ON_BOTH
def test_without_a_gate_as_an_operator(where: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CompressorSpec(head_dim=32, ratio=1, rope_dim=8, has_ape=False, gate=False)
    tokens, made = torch.randn(6, 32, device=where.device), []
    for traced in (False, True):
        with monkeypatch.context() as patch:
            if traced:
                through_operators(patch)
            ints = {"dtype": torch.int32, "device": where.device}
            slots = torch.arange(6, device=where.device)
            plan = kvfold.StepPlan.build(1, torch.zeros(1, **ints), torch.tensor([0, 6], **ints), 6, entry_slots=slots)
            cache = kvfold.EntryCache.allocate("bf16", 2, 4, spec, device=where.device)
            latent = torch.zeros(6, 32, dtype=BF16, device=where.device)
            weight, rope = torch.ones(32, device=where.device), reference.rope_table(8, 8).to(where.device)
            kvfold.compress(tokens, plan, None, cache, spec=spec, ape=None, norm_weight=weight, rope=rope, latent=latent)
            made.append((cache.storage[:1], latent))
    assert all(map(torch.equal, *made)) and bool(made[0][1].any())


def test_errors() -> None:
    run = Run(CASES["overlap"], BACKENDS["torch"])
    plan, (value, score) = run.plan((4, 5), 8), apart(tokens_of(CASES["overlap"], 9, torch.device("cpu")))

    def refused(kind: type, words: str, *given: object, **changed: object) -> None:
        arguments = {"spec": OVERLAP, "ape": run.ape, "norm_weight": run.weight, "rope": run.rope} | changed
        with pytest.raises(kind, match=words):
            kvfold.compress(given if len(given) > 1 else given[0], plan, run.state, run.cache, **arguments)

    for wrong in (None, (), (value,), [value, score]):
        refused(TypeError, r"^kv_score must be a torch\.Tensor, or a tuple of two", wrong)
    refused(TypeError, r"^kv_score\[1\] must be a Tensor", value, None)
    refused(TypeError, r"^kv_score\[1\] must be torch\.bfloat16", value, score.float())
    refused(ValueError, r"^kv_score\[1\] must have shape \[9, 64\]", value, score[1:])
    refused(ValueError, r"^kv_score\[0\] must have shape \[any, 64\]", value[:, 1:], score)
    refused(ValueError, r"^kv_score\[1\] must be contiguous in its last dimension", value, score.repeat(1, 2)[:, ::2])
    refused(
        ValueError,
        r"^rows must not share memory with kv_score\[1\]",
        value,
        score,
        rows=score[:2, :32].as_strided((4, 32), (32, 1)),
    )
    refused(
        ValueError,
        r"^kv_score\[1\] must not share memory with state",
        value,
        run.state.rows.view(-1)[: 9 * 64].view(9, 64).view(BF16)[:, :64],
    )
