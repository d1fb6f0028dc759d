"""Drawn cases: they cover what is supported, they pass, and what is broken on purpose is found, by the printed program too."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from support.helpers import Backend

from kvfold import Snapshots, StepPlan, compress
from kvfold.backend_torch import finish
from kvfold.backend_torch import fold as backend_torch
from kvfold.backend_torch import plan as backend_plan
from kvfold.backend_torch import window as backend_window
from kvfold.calls import run as calls_run
from kvfold.storage.formats import FORMATS
from kvfold.storage.step import Compressor
from kvfold.testing.told import PLAIN
from kvfold.verify import run as verify_run
from kvfold.verify.case import Mismatch
from kvfold.verify.program import Place, program
from kvfold.verify.random import BUDGETS, CASES_PER_SHAPE, VALUES, RandomCase, draw_case, draw_shape
from kvfold.verify.run import Outcome, labels, run_case, summary, verify_random

TORCH = Place("cpu", "torch")


def drawn(count: int, budget: str = "torch") -> list[RandomCase]:
    """A case of each of so many shapes."""
    return [draw_case(0, CASES_PER_SHAPE * i, BUDGETS[budget]) for i in range(count)]


def test_all_that_is_supported_is_drawn() -> None:
    cases = drawn(1000)
    shapes = [case.shape for case in cases]
    assert {s.fmt for s in shapes} == {None, *FORMATS} and {s.rows for s in shapes} == {None, "bfloat16", "float32"}
    assert {s.spec.head_dim for s in shapes} == {1 << n for n in range(4, 13)}
    ratios = {(s.state, s.spec.ratio) for s in shapes}
    assert {("fold", n) for n in range(1, 25)} | {("window", 1 << n) for n in range(10)} <= ratios
    long = {(s.state, s.spec.ratio) for s in (draw_shape(random.Random(i), BUDGETS["torch"]) for i in range(4000))}
    assert {("fold", 4096), ("window", 4096)} <= long and sum(ratio > 1024 for _, ratio in long) > 10
    assert {(s.state, s.state_dtype, s.kv_dtype, s.spec.overlap) for s in shapes} >= {
        (state, kept, came, overlap)
        for state in ("fold", "window") for kept in ("bfloat16", "float32") for came in ("bfloat16", "float32")
        for overlap in (False, True) if (state, kept, overlap) != ("fold", "bfloat16", False)
    }  # fmt: skip
    assert {s.norm_dtype for s in shapes} == {"bfloat16", "float32"}
    for on in ("has_ape", "hadamard", "overlap"):
        assert {getattr(s.spec, on) for s in shapes} == {False, True}
    ropes = {s.spec.rope_dim for s in shapes}
    assert 0 in ropes and len(ropes) > 50 and any(s.spec.rope_dim == s.spec.head_dim for s in shapes)
    ways, states = ("table", "slots", "tokens", "none"), ("fold", "window", "none")
    assert {(s.addressing, s.state) for s in shapes} == {(a, s) for a in ways for s in states}
    for state, on in product(states, ("latent", "two", "rounds", "in_pages", "ring", "scale_on_device", "also")):
        never = {"two": state == "none", "rounds": state != "fold", "in_pages": state != "fold", "ring": state != "window"}
        assert {bool(getattr(s, on)) for s in shapes if s.state == state} == ({False} if never.get(on) else {False, True}), on
    for state, (field, plain) in product(states, PLAIN._asdict().items()):
        assert {getattr(s.told, field) == plain for s in shapes if s.state == state} == {False, True}, (state, field)
    assert all(s.rounds == (s.state_dtype == "bfloat16" and s.kv_dtype == "float32") for s in shapes if s.state == "fold")
    assert not any(s.spec.gate for s in shapes if s.state == "none")
    kept_of_rings = {
        new - kept for c in cases if c.shape.ring for step in c.steps for _, start, new, kept in step.parts if start
    }
    assert {0, 1, 2} <= kept_of_rings
    assert all(s.spec.ratio & (s.spec.ratio - 1) == 0 for s in shapes if s.state == "window")
    pages = [(s.page_size, s.spec.ratio) for s in shapes if s.page_size]
    assert any(p % r and p > r for p, r in pages) and any(p < r for p, r in pages) and any(p == 1 for p, _ in pages)
    assert {c.values for c in cases} == set(VALUES) and any(s.other for s in shapes) and any(s.snapshot for s in shapes)
    for on in ("joined", "freed", "store", "gap", "blocks", "left", "right", "hit"):
        assert {bool(getattr(c, on)) for c in cases} == {False, True}, on
    assert any(len(set(c.slots)) < len(c.slots) for c in cases)  # a slot with an owner after another
    assert any(-1 in row for c in cases for row in c.entry_pages)
    words = Counter(word for c in cases for word in c.history.split(", "))
    assert set(words) == {"prefill", "decode", "short steps", "chunks", "rejected", "padding", "restore", "pair", "ring"}
    assert min(words.values()) > 20, words
    steps = [step for c in cases for step in c.steps]
    kept = {(new, some) for step in steps for _, _, new, some in step.parts}
    assert {(4, n) for n in range(5)} <= kept and any(step.absent for step in steps) and any(step.loose for step in steps)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_case_is_within_its_budget(budget: str) -> None:
    most = BUDGETS[budget]
    for case in drawn(200, budget):
        spec = case.shape.spec
        assert sum(case.lengths) <= most.tokens and sum(case.lengths) * spec.channels <= 2 * most.elements
        assert max(case.lengths) >= spec.ratio  # an entry at least
        ends = [0] * len(case.lengths)
        for step in case.steps:
            for b, start, new, kept in step.parts:
                assert 0 <= start <= ends[b] and 0 <= kept <= new <= step.bound and start + new <= case.lengths[b]
                ends[b] = start + kept
        assert ends == list(case.lengths)


def test_a_seed_and_an_index_are_a_case() -> None:
    texts = [program(draw_case(3, index, BUDGETS["torch"]), TORCH) for index in range(20)]
    assert texts == [program(draw_case(3, index, BUDGETS["torch"]), TORCH) for index in range(20)]
    assert len(set(texts)) == 20
    assert draw_case(3, 4, BUDGETS["torch"]).shape == draw_case(3, 0, BUDGETS["torch"]).shape


def test_random_cases_pass(backend: Backend) -> None:
    """Those of small windows, several shapes."""
    budget = BUDGETS["interpreted"]
    cases = [c for c in drawn(60, "interpreted") if c.shape.spec.ratio <= 16][: 5 if backend.slow else 24]
    for case in cases:
        outcome = run_case(draw_case(case.seed, case.index, budget), Place(str(backend.device), backend.name))
        assert outcome.passed, f"{outcome.problem}\n{outcome.program}"


# What may be broken, and how. Each is found among cases that it can show in.


def one_masked_row_is_plus_zero(patch: pytest.MonkeyPatch) -> None:
    """Only in a call of one window, so that the sign of a zero depends on the cut."""
    real = backend_torch.masked

    def masked(live, k, s):
        k, s = real(live, k, s)
        return (torch.where(live[:, None], k, 0.0) if len(live) == 1 else k), s

    patch.setattr(backend_torch, "masked", masked)


def one_byte_of_a_record(patch: pytest.MonkeyPatch) -> None:
    real = finish.pack_records

    def pack(cache, slots, y):
        real(cache, slots, y)
        cache.pages[slots // cache.rows_per_page, 0] ^= 1

    patch.setattr(finish, "pack_records", pack)


def a_byte_outside_of_records(patch: pytest.MonkeyPatch) -> None:
    real = finish.pack_records

    def pack(cache, slots, y):
        real(cache, slots, y)
        cache.storage.as_strided((cache.storage.untyped_storage().nbytes(),), (1,), 0)[-1] = 0

    patch.setattr(finish, "pack_records", pack)


def state_rows_go_astray(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend_torch.FoldRows, "place", lambda self, slot, x, h0, start: slot * self.per_slot)
    patch.setattr(backend_torch.Places, "choose", lambda self, slot, *_: (slot * self.per_slot, torch.full_like(slot, -1)))


def old_pages_are_not_read(patch: pytest.MonkeyPatch) -> None:
    real = backend_window._pool
    patch.setattr(backend_window, "_pool", lambda items, c, value, score: real(items, c, value, value))


def one_table_for_both_pools(patch: pytest.MonkeyPatch) -> None:
    build = StepPlan.build.__func__

    def wrong(cls, *args, block_tables=None, **options):
        tables = None if block_tables is None else (block_tables[0], block_tables[0])
        return build(cls, *args, block_tables=tables, **options)

    patch.setattr(StepPlan, "build", classmethod(wrong))


def a_wrong_weight(patch: pytest.MonkeyPatch) -> None:
    """By little, in every cut."""
    real = backend_torch.fold_step
    patch.setattr(backend_torch, "fold_step", lambda *a: (*real(*a)[:2], real(*a)[2] * (1 + 1e-5)))


def snapshots_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Snapshots, "of", lambda _, positions: positions != positions)


def a_restored_row_is_another(patch: pytest.MonkeyPatch) -> None:
    real = calls_run.restore_torch

    def wrong(state, snapshots, hits):
        real(state, snapshots, hits)
        state.rows[hits.slots] = -state.rows[hits.slots]

    patch.setattr(calls_run, "restore_torch", wrong)


def the_second_of_a_pair_is_left_out(patch: pytest.MonkeyPatch) -> None:
    module = sys.modules[compress.__module__]
    real = module.run_many
    patch.setattr(module, "run_many", lambda pair, *rest: real(pair[:1], *rest))


def latents_are_of_other_rows(patch: pytest.MonkeyPatch) -> None:
    real = finish.norm
    patch.setattr(finish, "norm", lambda y, *rest: real(y * 1.01, *rest) if len(y) == 1 else real(y, *rest))


def scores_apart_are_read_as_values(patch: pytest.MonkeyPatch) -> None:
    def joined(c):
        return c if c.score is None else c._replace(kv_score=torch.cat((c.value, c.value), dim=1))

    patch.setattr(Compressor, "joined", joined)


def rings_are_taken_for_tables(patch: pytest.MonkeyPatch) -> None:
    real = backend_window.Pages.find

    def find(pages, sequence, position):
        inside = position % (pages.table.shape[1] * pages.pool.shape[1] - 1)  # a row too short
        return real(pages, sequence, inside if pages.ring else position)

    patch.setattr(backend_window.Pages, "find", find)


def places_are_not_reserved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend_plan, "_first_places", lambda plan: plan.cu_entries.long()[:-1])


def a_slot_of_another_token(patch: pytest.MonkeyPatch) -> None:
    real = backend_plan._fill_entry_slots
    patch.setattr(backend_plan, "_fill_entry_slots", lambda plan, b, w, last, e: real(plan, b, w, (last - 1).clamp(min=0), e))


def the_second_cache_is_left_out(patch: pytest.MonkeyPatch) -> None:
    real = calls_run.store_placed_torch
    patch.setattr(calls_run, "store_placed_torch", lambda p: real(p._replace(caches=p.caches[:1])))


def inputs_are_not_rounded(patch: pytest.MonkeyPatch) -> None:
    """Those of the step itself, which then differ from what the state keeps of them."""
    patch.setattr(backend_torch, "to_bf16", lambda x: (x * 1.01).bfloat16())


def dropped_entries_are_written(patch: pytest.MonkeyPatch) -> None:
    real = backend_torch.emit

    def emit(pooled, items, plan, c, rows):
        if plan.entry_slots is not None and c.cache is not None:
            plan.entry_slots[plan.entry_slots == -1] = 0
        real(pooled, items, plan, c, rows)

    patch.setattr(backend_torch, "emit", emit)


Wanted = Callable[[RandomCase], bool]
BROKEN: list[tuple[Callable[[pytest.MonkeyPatch], None], Wanted]] = [
    (one_masked_row_is_plus_zero, lambda c: c.shape.state == "fold" and c.shape.spec.overlap and c.values == "zeros"),
    (one_byte_of_a_record, lambda c: c.shape.fmt is not None),
    (a_byte_outside_of_records, lambda c: c.gap > 0 and c.shape.fmt is not None and c.shape.fmt != "mxfp4"),
    (state_rows_go_astray, lambda c: c.shape.state == "fold"),
    (old_pages_are_not_read, lambda c: c.shape.state == "window"),
    (one_table_for_both_pools, lambda c: c.shape.state == "window"),
    (a_wrong_weight, lambda c: c.shape.state == "fold" and c.shape.spec.ratio > 8 and not c.shape.spec.overlap),
    (snapshots_are_forgotten, lambda c: c.hit is not None),
    (a_restored_row_is_another, lambda c: c.hit is not None),
    (the_second_of_a_pair_is_left_out, lambda c: c.shape.other is not None),
    (latents_are_of_other_rows, lambda c: c.shape.latent),
    (scores_apart_are_read_as_values, lambda c: c.shape.two),
    (rings_are_taken_for_tables, lambda c: c.shape.ring and len(c.kv_pages[0]) * c.shape.page_size > 2),
    (places_are_not_reserved, lambda c: c.shape.told.reserved > 0 and c.shape.rows is not None),
    (a_slot_of_another_token, lambda c: c.shape.addressing == "tokens" and c.shape.fmt is not None),
    (the_second_cache_is_left_out, lambda c: c.store and c.shape.also is not None),
    (inputs_are_not_rounded, lambda c: c.shape.rounds),
    (dropped_entries_are_written, lambda c: any(-1 in row for row in c.entry_pages)),
]


@pytest.mark.parametrize(("breaks", "wanted"), BROKEN, ids=[breaks.__name__ for breaks, _ in BROKEN])
def test_what_is_broken_is_found(breaks: Callable[[pytest.MonkeyPatch], None], wanted: Wanted) -> None:
    """The program of the first case that fails fails as it stands, and passes when nothing is broken."""
    cases = (case for i in range(2000) if wanted(case := draw_case(1, i, BUDGETS["interpreted"])))
    with pytest.MonkeyPatch.context() as patch:
        breaks(patch)
        found = next(o for o in (run_case(case, TORCH) for case, _ in zip(cases, range(40), strict=False)) if not o.passed)
        with pytest.raises((Mismatch, AssertionError)) as raised:
            exec(found.program, {})
        assert str(raised.value) == found.problem
    exec(found.program, {})


def test_a_program_runs_as_pasted(tmp_path: Path) -> None:
    """In a process that knows nothing else, where a fault that is still there shows again."""
    text = program(next(c for c in drawn(60) if c.shape.fmt and c.shape.spec.ratio <= 8), TORCH)
    assert max(map(len, text.splitlines())) < 200 and "seed" in text.splitlines()[0]
    path = tmp_path / "case.py"
    path.write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, str(path)], env=environment, capture_output=True).returncode == 0


def ends_its_process(seed: int, place: Place, indices: list[int]) -> list[Outcome]:
    if 4 in indices:
        os.kill(os.getpid(), signal.SIGKILL)
    return [Outcome(index, {}, 0.0) for index in indices]


def test_a_fault_ends_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that it took with it is replaced, and the case is reported with its program."""
    monkeypatch.setattr(verify_run, "_run_group", ends_its_process)
    found = list(verify_random(2, first=4, workers=1))
    assert [(o.index, o.problem) for o in found] == [(4, "a fault ended the process"), (5, "")]
    assert "Case 4" in found[0].program and found[1].program == ""


def test_a_case_that_leaves_has_failed_and_an_interrupt_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {1: "raise SystemExit(3)", 2: "raise KeyboardInterrupt"}
    monkeypatch.setattr(verify_run, "program", lambda case, place: texts.get(case.index, ""))
    assert [(o.problem, o.program) for o in verify_random(2)] == [("", ""), ("SystemExit: 3", texts[1])]
    with pytest.raises(KeyboardInterrupt):
        list(verify_random(3))


def test_nothing_follows_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(case: RandomCase, place: Place) -> Outcome:
        return Outcome(case.index, labels(case), 0.0, "RuntimeError: CUDA error: an illegal memory access" * (case.index == 2))

    monkeypatch.setattr(verify_run, "run_case", run)
    found = list(verify_random(9))
    assert len(found) == 3 and summary(found, 0, 9)["not run"] == 6 and summary(found, 0, 9)["failed"] == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"cases": 0}, "cases"), ({"seed": 0.5}, "seed"), ({"first": -1}, "first"), ({"workers": -1}, "workers"),
     ({"workers": True}, "workers"), ({"backend": "c"}, "backend")],
)  # fmt: skip
def test_wrong_arguments(arguments: dict, named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"\b{named}\b"):
        verify_random(**{"cases": 1, **arguments})


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from kvfold_cli.app import app

    def call(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["verify", "--device", "cpu", "--backend", "torch", *map(str, arguments)])
        return done.exit_code, done.output

    real = verify_run.verify_random  # in this process, where what is broken is
    monkeypatch.setattr(verify_run, "verify_random", lambda cases, seed, **rest: real(cases, seed, **{**rest, "workers": 0}))
    out = tmp_path / "new" / "random.json"
    code, said = call("--random", 3, "--seed", 2, "--json", out)
    assert code == 0 and "3 random cases of seed 2 on cpu, backend torch" in said and "all 3 passed on backend torch" in said
    made = json.loads(out.read_text())
    assert (made["seed"], made["cases"], made["failed"], made["backend"]) == (2, 3, 0, "torch")
    assert all(sum(counts.values()) == 3 for counts in made["counts"].values()) and len(made["counts"]) == 13
    one_byte_of_a_record(monkeypatch)
    index = next(c.index for c in (draw_case(2, i, BUDGETS["torch"]) for i in range(50)) if c.shape.fmt)
    code, said = call("--random", 1, "--seed", 2, "--first", index, "--json", out)
    made = json.loads(out.read_text())
    assert code == 1 and made["failed"] == 1 and made["failures"][0]["case"] == index
    assert made["failures"][0]["program"] in said and made["failures"][0]["problem"] in said
    for wrong, words in (
        (("--seed", 1), "--random"),
        (("--random", 0), "--random"),
        (("--random", "x"), "--random"),
        (("--random", 1, "--quick"), "--quick"),
        (("--random", 1, "--workers", 0), "--workers"),
        (("--random", 1, "--seed", 10**30), "--seed"),
    ):
        code, said = call(*wrong)
        assert code == 2 and words in said and said.count("\n") == 1, said
