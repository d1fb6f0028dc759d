"""`verify` passes what is right, and fails what was broken on purpose, naming the place."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from kvfold import V4_CSA, V4_HCA
from kvfold.backend_torch import finish
from kvfold.backend_torch import fold as backend_torch
from kvfold.backend_torch import window as backend_window
from kvfold.backend_triton.table import CONFIGS, Config, choose
from kvfold.compress import compress
from kvfold.storage.formats import FORMATS
from kvfold.store import store
from kvfold.testing import drafts
from kvfold.testing import engine as testing_engine
from kvfold.verify import cases as job
from kvfold.verify.cases import Case, Result, list_cases, representative, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(only: str, quick: bool = True, backend: str = "torch", device: str = "cpu") -> list[Result]:
    found = list(verify(c for c in list_cases(device, backend=backend, quick=quick) if only in f"{c.group}: {c.name}"))
    assert found, "no such case"
    return found


def problem_of(only: str) -> str:
    (result,) = run(only)
    assert not result.passed and result.figure == ""
    return result.problem


def test_the_list_has_every_row_format_and_equivalence() -> None:
    full, quick = (list_cases("cpu", backend="torch", quick=q) for q in (False, True))
    names = [f"{c.group}: {c.name}" for c in full]
    assert len(set(names)) == len(names) and {c.name for c in quick} < {c.name for c in full}
    for cases in (full, quick):
        table = {int(c.name.partition(":")[0]) for c in cases if c.group == "table"}
        assert table == set(range(len(CONFIGS)))
        assert {c.name.split()[0] for c in cases if c.group == "format"} == set(FORMATS)
        assert sum(c.group == "same bits as prefill" for c in cases) == 4 * (2 * 6 + 2) + 4


def test_a_kernel_that_does_not_run_is_not_passed() -> None:
    """On the torch backend the rows of the kernels' table are skipped, and say why; with kernels none is."""
    cases = list_cases("cpu", backend="torch")
    skipped = [c for c in cases if c.skip]
    assert skipped and {c.skip for c in skipped} == {"no kernel runs on the torch backend"}
    assert {id(c) for c in skipped} == {id(c) for c in cases if c.group == "table"}
    (result,) = verify(skipped[:1])
    assert not result.passed and result.skipped == skipped[0].skip and not result.problem and result.figure == ""
    assert not any(c.skip for c in list_cases(DEVICE, backend="triton"))


def test_every_row_of_the_table_has_a_shape() -> None:
    for config in CONFIGS:
        spec, bound = representative(config)
        assert choose(config.kind, spec, bound, config.bucket) is config
    with pytest.raises(LookupError, match="no usual shape"):
        representative(Config("fold", (16, 16), (3, 3), 1, ahead=1, num_warps=1))


@pytest.mark.parametrize(
    "only",
    [
        "format: fp8_ds_mla hd",
        "csa: WindowState against FoldState",
        "indexer",
        "v41",
        "csa WindowState of rings",
        "in an engine's pages",
        "rounded by the state",
    ],
)
def test_what_is_right_passes(only: str) -> None:
    for result in run(only):
        assert result.passed, result
        assert "e-0" in result.figure or "equal" in result.figure


@pytest.mark.parametrize(
    "only",
    [
        "rows hd 16-128, 1-8 rows",
        "window hd 16-128, 1-16 rows, new <= 8",
        "store hd 16",
        "indexer WindowState of rings: an engine",
    ],
)
def test_the_kernels_pass(only: str) -> None:
    """Triton's interpreter, or a GPU."""
    assert all(result.passed for result in run(only, backend="triton", device=DEVICE))


def test_drafts_accept_every_number_of_tokens() -> None:
    kept = {(part.new, part.kept) for step in drafts([60, 60], 4, 5)[1:] for part in step.parts}
    assert {(4, k) for k in range(5)} <= kept
    assert {part.kept for step in drafts([9, 9], 1, 5)[1:] for part in step.parts if part.new} == {1}


@pytest.mark.parametrize(
    ("name", "case"), [("fold_step", "hca at ratio 32 FoldState: chunks"), ("fold_group", "csa FoldState: chunks")]
)
def test_a_wrong_fold_fails_against_fp64(monkeypatch: pytest.MonkeyPatch, name: str, case: str) -> None:
    real = getattr(backend_torch, name)

    def wrong(state, k, s):
        m, l, a = real(state, k, s)
        a = a.clone()
        a[:, 77] *= 1 + 1e-3
        return m, l, a

    monkeypatch.setattr(backend_torch, name, wrong)
    problem = problem_of(case)
    assert problem.startswith("pooled row: sequence 0, window 0, channel 77: got") and "fp64 has" in problem


def test_a_cut_that_changes_a_bit_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error far below the bound, in steps of one token."""

    def wrong(kv_score, plan, *args, **options):
        compress(kv_score, plan, *args, **options)
        if kv_score.shape[0] == plan.batch and options["rows"].numel():
            rows = options["rows"]
            rows *= torch.where(rows == testing_engine.UNWRITTEN, 1.0, 1 + 2.0**-23)  # those of no entry must stay

    monkeypatch.setattr(testing_engine, "compress", wrong)
    problem = problem_of("csa FoldState: decode")
    assert "bits" in problem and "one prefill has" in problem


@pytest.mark.parametrize("kind", ["FoldState", "WindowState"])
def test_state_rows_that_are_not_written_fail(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "FoldState":
        monkeypatch.setattr(backend_torch.Places, "choose", lambda self, slot, *_: (slot * self.per_slot, slot - slot - 1))
        assert "were refused" in problem_of(f"csa {kind}: decode")
    else:
        monkeypatch.setattr(backend_window, "_write", lambda items, *_: torch.zeros_like(items.window, dtype=torch.bool))
        assert "got nan" in problem_of(f"csa {kind}: decode")


def test_reading_what_a_former_owner_left_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A history that does not stop at the first token of a sequence."""
    real = backend_torch.masked
    monkeypatch.setattr(backend_torch, "masked", lambda live, k, s: real(torch.ones_like(live), k, s))
    assert "sequence 0, window 0" in problem_of("csa FoldState: slots of an owner")


def test_wrong_bytes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = finish.pack_records

    def wrong(cache, slots, entries):
        real(cache, slots, entries)
        cache.pages[slots // cache.rows_per_page, -1] ^= 1

    monkeypatch.setattr(finish, "pack_records", lambda cache, slots, y: real(cache, slots, y * 1.25))
    assert problem_of("format: fp8_ds_mla hd").find("first: read-back value: sequence") > 0
    monkeypatch.setattr(finish, "pack_records", real)
    monkeypatch.setattr(testing_engine, "store", lambda rows, *args, **options: store(rows + 1, *args, **options))
    assert problem_of("format: fp8_ds_mla hd").startswith("record bytes: sequence 0, window 0")
    monkeypatch.setattr(testing_engine, "store", store)
    monkeypatch.setattr(finish, "pack_records", wrong)
    assert "outside of all records" in problem_of("format: fp8_ds_mla hd")


def test_a_backend_that_breaks_is_a_result_and_the_others_run() -> None:
    def broken() -> str:
        raise RuntimeError("does not compile")

    found = list(verify([Case("a", "b", broken), Case("a", "c", lambda: "1.0e-07")]))
    assert [r.passed for r in found] == [False, True]
    assert found[0].problem == "RuntimeError: does not compile" and found[0].seconds >= 0


def test_a_case_that_leaves_has_failed_and_an_interrupt_ends_all() -> None:
    def leaves() -> str:
        sys.exit("out of patience")

    def interrupted() -> str:
        raise KeyboardInterrupt

    cases = [Case("a", "b", leaves), Case("a", "c", str), Case("a", "d", interrupted), Case("a", "e", str)]
    with pytest.raises(KeyboardInterrupt):
        list(verify(cases[2:]))
    assert [(r.name, r.problem) for r in verify(cases[:2])] == [("b", "SystemExit: out of patience"), ("c", "")]


def test_other_states_and_pairs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend_window._pool
    monkeypatch.setattr(backend_window, "_pool", lambda *args: real(*args) * (1 + 1e-4))
    assert "fp64 has" in problem_of("csa: WindowState against FoldState")
    many = testing_engine.compress_many
    monkeypatch.setattr(testing_engine, "compress_many", lambda pair, plan, **options: many(pair[:1], plan, **options))
    assert "record bytes: sequence 0, window 0" in problem_of("one launch against two")


def test_shapes_on_a_cpu_keep_the_kind_of_state() -> None:
    lab = job.Lab(torch.device("cpu"), "torch")
    assert lab.spec(V4_HCA) == replace(V4_HCA, ratio=32) and lab.spec(V4_CSA) == V4_CSA
    assert job.Lab(torch.device("cuda"), "triton").spec(V4_HCA) == V4_HCA
