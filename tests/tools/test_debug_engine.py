"""`check` of what engines do: `store` without a plan, reserved places, numbers that lie apart, records on a state's page."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from support.helpers import Backend

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, StepPlan, WindowState
from kvfold.debug.call import copy_plan

SPEC = CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8)


def weights(device: torch.device) -> dict[str, Any]:
    rope = kvfold.reference.rope_table(40, 8).to(device)
    return {"spec": SPEC, "norm_weight": torch.ones(16, device=device), "rope": rope}


class Placed:
    """Six rows for a cache of 12 slots and one of 20."""

    def __init__(self, device: torch.device) -> None:
        self.caches = [EntryCache.allocate(fmt, pages, 4, SPEC, device=device) for fmt, pages in (("fp32", 3), ("bf16", 5))]
        rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).to(device)
        slots = torch.tensor([4, 11, -1, 0, 7, 3], device=device)
        positions = torch.tensor([0, 39, 99, 8, 4, 12], dtype=torch.int32, device=device)
        self.args = rows, self.caches[0]
        self.named = weights(device) | {"slots": slots, "positions": positions, "also": self.caches[1:]}

    def check(self, backend: str = "torch", **options: Any) -> kvfold.debug.check.Report:
        return kvfold.check(*self.args, **self.named | options, backend=backend)


def test_rows_with_places_of_their_own(backend: Backend) -> None:
    call = Placed(backend.device)
    before = [cache.pages.clone() for cache in call.caches]
    report = call.check(backend.name)
    assert report.equal and (report.entries, report.rows, report.sequences, report.errors) == (5, 5, 0, 0)
    call.named["slots"][:4] = torch.tensor([20, 13, -1, 0])
    call.named["positions"][4:] = torch.tensor([-1, 40])
    report = call.check(backend.name)
    assert report.headline == "REFUSED: 4 of 5 rows" and [r.row for r in report.refusals] == [0, 1, 4, 5]
    assert report.notes == (
        "row 0 is refused: slots[0] is 20, and cache has 12 slots", "row 1 is refused: slots[1] is 13, and cache has 12 slots",
        "row 4 is refused: positions[4] is -1, below 0", "row 5 is refused: positions[5] is 40, and rope has 40 positions",
    )  # fmt: skip
    assert not report.differences  # row 1 is in the larger cache all the same
    assert call.check(slots=torch.full_like(call.named["slots"], -1)).headline == "nothing compared"
    assert all(torch.equal(x, cache.pages) for x, cache in zip(before, call.caches, strict=True)), "check has written"


def test_rows_that_are_wrong_or_share_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    call, module = Placed(torch.device("cpu")), sys.modules["kvfold.debug.call"]
    real = module.store

    def store(rows: torch.Tensor, cache: EntryCache, *, also: list[EntryCache], backend: str, **rest: Any) -> None:
        real(rows, cache, also=also, backend="torch", **rest)
        if backend == "triton":
            also[0].pages[1, 5 + 32 * 3] ^= 1  # of slot 7, row 4
            rest["errors"] += 1

    monkeypatch.setattr(module, "store", store)
    monkeypatch.setattr(sys.modules["kvfold.calls.checks"], "choose_backend", lambda backend, *_: backend)
    report = call.check("triton")
    assert report.headline == "DIFFERENT" and [d.stage for d in report.differences] == ["record bytes", "errors"]
    assert report.first.where == "also[0], row 4, slot 7, record byte 5" and report.first.channel == 2
    call.named["slots"][5] = 11
    report = call.check()
    assert report.headline == "NOT COMPARABLE"
    assert report.notes == ("row 5 is undefined: cache slot 11 is also that of row 1",)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"ape": torch.zeros(4, 32)}, "^ape must be left out for a store without a plan"),
        ({"cache": Placed(torch.device("cpu")).caches[0]}, "^cache must be left out"),
        ({"full_history": []}, "^full_history must be left out for store"),
        ({"also": [1, 2]}, "^also must hold one cache at most"),
        ({"slots": None}, "^slots must be"),
    ],
)
def test_mistakes(more: dict[str, Any], words: str, tmp_path) -> None:
    call = Placed(torch.device("cpu"))
    for name in ("check", "dump"):
        with pytest.raises((TypeError, ValueError), match=words):
            getattr(kvfold, name)(*[tmp_path / "x"] * (name == "dump"), *call.args, **call.named | more)
    with pytest.raises(TypeError, match=r"^positions must be left out with a plan"):
        kvfold.check(call.args[0], plan_of([[0]], [0]), call.caches[0], **weights("cpu"), positions=call.named["positions"])
    assert not list(tmp_path.iterdir())


def plan_of(tables: list[list[int]], slots: list[int], device: str | torch.device = "cpu", **more: Any) -> StepPlan:
    """Six tokens from 0 on of each sequence, of which four are an entry."""
    ints = {"dtype": torch.int32, "device": device}
    n, where = len(tables), {"state_slots": torch.tensor(slots, **ints)}
    if "block_tables" in more:
        where = {}
    return StepPlan.build(
        4, torch.zeros(n, **ints), torch.arange(0, 6 * n + 1, 6, **ints), 6,
        cache_block_table=torch.tensor(tables, **ints), rows_per_page=4, **where, **more,
    )  # fmt: skip


def test_records_on_the_state_of_the_step_are_named(backend: Backend) -> None:
    """Pages that are state and cache at once: whose page is which nobody can tell but the step's tables, which are wrong."""
    device, name = backend.device, backend.name
    named = weights(device) | {"ape": torch.zeros(4, 32, device=device)}
    size = FoldState.page_bytes(SPEC, 4)
    pages = torch.zeros(6, size + 128, dtype=torch.uint8, device=device)
    state, cache = FoldState.over(pages, SPEC, 4, fresh=True), EntryCache(pages[:, :128], "bf16", 4, SPEC)
    tokens = torch.randn(12, 64, device=device)

    def given(tables: list[list[int]], slots: list[int]) -> tuple:
        return tokens, plan_of(tables, slots, device), state, cache

    assert kvfold.check(*given([[3], [4]], [0, 1]), **named, backend=name).equal
    report = kvfold.check(*given([[3], [0]], [0, 1]), **named, backend=name)
    assert report.headline == "NOT COMPARABLE" and len(report.undefined) == 1
    assert str(report.undefined[0]) == (
        "window 0 of sequence 1 is undefined: its entry goes to cache slot 0, which lies on slot 0, of sequence 0, of the state"
    )
    behind = EntryCache(pages[:, size:], "bf16", 4, SPEC)  # of the same pages, no byte
    assert kvfold.check(tokens, plan_of([[0], [1]], [0, 1], device), state, behind, **named, backend=name).equal
    own, other = FoldState.allocate(SPEC, 6, 4, device=device), EntryCache.allocate("bf16", 6, 4, SPEC, device=device)
    pair = [(tokens, state, other, *(named[x] for x in ("spec", "ape", "norm_weight", "rope")))]
    pair += [(tokens, own, cache, *pair[0][3:])]
    report = kvfold.check(pair, plan_of([[3], [1]], [0, 1], device), backend=name)
    assert report.headline == "NOT COMPARABLE" and "of compressors[1], which lies on slot 1, of" in report.notes[0]
    assert kvfold.check(pair, plan_of([[3], [4]], [0, 1], device), backend=name).equal
    # A window's raw rows in the same bytes as records.
    raw = torch.zeros(6, 4, 64, device=device)
    window, records = WindowState(raw[..., :32], raw[..., 32:]), EntryCache(raw.view(6, -1)[:, :64], "fp32", 4, SPEC)
    tables = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    for page, headline in ((5, "equal"), (2, "NOT COMPARABLE")):
        plan = plan_of([[4], [page]], [], device, block_tables=(tables, tables), page_size=4)
        report = kvfold.check(tokens, plan, window, records, **named, backend=name)
        assert report.headline == headline, report
    assert "cache slot 8, which lies on row 0 of page 2, of sequence 1, of the state" in report.notes[0]


def test_rows_that_are_shorter_than_the_plan(backend: Backend) -> None:
    """Reserved places: an entry behind `rows` is refused, and all others are compared in theirs."""
    device, ints = backend.device, {"device": backend.device}
    named = weights(device) | {"ape": torch.zeros(4, 32, device=device)}
    plan = plan_of([[0], [1]], [0, 1], device, cu_rows=torch.tensor([1, 4, 9], **ints), max_rows=20)
    given = torch.randn(12, 64, device=device), plan, FoldState.allocate(SPEC, 2, 6, device=device)
    cache = EntryCache.allocate("fp32", 2, 4, SPEC, device=device)
    for count, headline in ((5, "equal"), (4, "REFUSED: 1 window")):
        rows = torch.zeros(count, 16, device=device)
        report = kvfold.check(*given, cache, **named, rows=rows, backend=backend.name)
        assert (report.headline, report.entries, report.referenced) == (headline, count - 3, count - 3), report
    assert report.notes == ("window 0 of sequence 1 is refused: it is entry 4 of the step, and rows has 4 places",)
    pooled = torch.randn(4, 16, device=device)
    report = kvfold.check(pooled, plan, cache, **weights(device), backend=backend.name)
    assert report.headline == "REFUSED: 1 window" and report.entries == 1


def test_a_copy_of_a_plan_lies_as_the_plan_does() -> None:
    """Tables whose rows lie apart have kernels of their own, so that a copy without gaps would be another call."""
    tables = torch.arange(48, dtype=torch.int32).view(3, 16)
    for table in (tables[:, :8], tables, tables[:1, :2].expand(3, 2)):
        plan = StepPlan.build(
            4, torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), 1, block_tables=(table, table), page_size=4
        )
        copy = copy_plan(plan)
        assert copy.tables == plan.tables and torch.equal(copy.block_tables[1], table)
        assert (copy.block_tables[0].stride(0) - table.stride(0)) % 16 == 0
