"""`check` finds nothing in a right call, names the place where a wrong one goes wrong, and writes nothing of the caller's."""

from __future__ import annotations

import sys

import pytest
import torch
from support.debug_support import Call, Snapped, two, wrong
from support.helpers import SPECS, Backend, bits

import kvfold
from kvfold.backend_triton import launch
from kvfold.debug import call as debug_call
from kvfold.debug.check import check
from kvfold.debug.compare import bytes_of, explained
from kvfold.storage.formats import FORMATS

HD = {"indexer": "indexer_mxfp4", "csa": "fp8_ds_mla", "hca": "fp8_ds_mla"}


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_a_right_call_is_equal_in_every_format(fmt: str) -> None:
    name = "indexer" if FORMATS[fmt].head_dims == (128,) else "csa"
    call = Call(name, fmt)
    report = call.check(full_history=call.history)
    assert report.equal, report
    assert (bool(report), report.entries, report.referenced, report.errors) == (True, 3, 3, 0)


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_right_call_is_equal_with_every_state(name: str, window: bool) -> None:
    call = Call(name, HD[name], window=window)
    report = call.check()
    assert report.equal, report
    assert (report.entries, report.referenced) == (3, 1)  # the second sequence starts at 0
    assert "equal" in str(report)


def test_bf16_rows_of_a_window_state_are_compared_as_stored() -> None:
    call = Call("csa", "bf16", window=True, dtype=torch.bfloat16)
    assert call.check(full_history=call.history).equal


def test_the_interpreter_is_compared_with_torch() -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton compiles in this process, so it does not interpret")
    report = Call("indexer", "indexer_mxfp4").check(backend="triton")
    assert report.equal and report.backend == "triton", report


SNAPPED = {"rows": (SPECS["indexer"], 4), "fold": (kvfold.CompressorSpec(head_dim=64, ratio=16), 5)}


@pytest.mark.parametrize("kind", SNAPPED)
def test_snapshots_are_compared(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Snapped(*SNAPPED[kind])
    before = [call.snapshots.rows.clone(), call.snapshots.positions.clone()]
    report = call.check(backend=None if torch.cuda.is_available() else "triton")
    assert report.equal and report.errors == 0, report
    assert torch.equal(before[0], call.snapshots.rows) and torch.equal(before[1], call.snapshots.positions)
    last = call.snapshots.rows_per_page - 1

    def row(state, cache, rows, snapshots) -> None:
        snapshots.rows[3, last, 70] += 1

    def tag(state, cache, rows, snapshots) -> None:
        snapshots.positions[4, last] += 1

    ends, part, channel = 3 * call.snapshots.page_size, ", l" if kind == "fold" else "", 6 if kind == "fold" else 70
    for spoil, *place, where in (
        (row, 0, (ends - 1) // call.spec.ratio, channel, f"page 3, snapshots.rows row {last}, position {ends - 1}{part}"),
        (tag, 1, -1, None, f"page 4, snapshots.positions row {last}"),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            wrong(patch, spoil)
            first = call.check(backend="triton").first
        assert first is not None and first.stage == "snapshot row"
        assert [first.sequence, first.window, first.channel, first.where] == [*place, where]


def test_snapshots_of_pages_that_keep_nothing() -> None:
    assert Snapped(SNAPPED["fold"][0], 16).check().equal


def test_two_compressors_are_compared(backend: Backend) -> None:
    calls, plan = two(backend.device)
    report = check(calls, plan, backend=backend.name)
    assert report.equal and (report.entries, report.referenced, report.errors) == (2 * 3, 2 * 1, 0), report


def test_the_wrong_one_of_two_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plan = two("cpu")
    real = debug_call.compress_many

    def compress_many(compressors, plan, **how) -> None:
        real(compressors, plan, **how)
        compressors[1].cache.pages[3, 128 * 2 + 3] ^= 128  # the sign of window 2 of sequence 0
        compressors[1].snapshots.positions[5] = -1
        plan.errors += 1

    monkeypatch.setattr(debug_call, "compress_many", compress_many)
    report = check(calls, plan)
    assert report.errors == 1 and "errors: call: got 1" in str(report)
    found = [(d.stage, d.sequence, d.window) for d in report.differences]
    assert found == [("errors", -1, -1), *[("snapshot row", 0, -1)] * 3, ("record bytes", 0, 2)]
    assert all(d.where.startswith("compressors[1], ") for d in report.differences[1:])


def test_a_store_is_compared(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Snapped(SPECS["indexer"], 4, backend.device)
    pooled = torch.randn(call.plan.entry_capacity, 128, device=backend.device)
    weights = {name: call.weights[name] for name in ("spec", "norm_weight", "rope")}
    report = check(pooled, call.plan, call.cache, **weights, backend=backend.name)
    assert report.equal and (report.entries, report.referenced, report.errors) == (3, 0, 0), report
    monkeypatch.setattr(sys.modules["kvfold.calls.checks"], "choose_backend", lambda backend, *_: backend)
    monkeypatch.setattr(launch, "store_triton", lambda *_: None)
    report = check(pooled, call.plan, call.cache, **weights, backend="triton")
    found = [(d.stage, d.sequence, d.window) for d in report.differences]
    assert found == [("record bytes", 0, 1), ("record bytes", 0, 2), ("record bytes", 1, 0)], report


@pytest.mark.gpu
@pytest.mark.parametrize("window", [False, True])
def test_a_gpu_is_compared_with_torch(window: bool) -> None:
    call = Call("csa", "fp8_ds_mla", window=window, device="cuda")
    assert call.check(full_history=call.history).equal


@pytest.mark.parametrize("window", [False, True])
def test_nothing_of_the_caller_is_written(window: bool) -> None:
    call = Call("csa", "fp8_ds_mla", window=window)
    state = [value for value in vars(call.state).values() if isinstance(value, torch.Tensor)]
    rows = torch.full((call.plan.entry_capacity, 512), torch.nan)
    tensors = [*state, call.cache.storage, call.plan.errors, call.plan.items, call.plan.entry_slots, rows]
    before = [tensor.clone() for tensor in tensors]
    assert call.check(rows=rows).equal
    for tensor, was in zip(tensors, before, strict=True):
        same = torch.equal(bits(tensor), bits(was)) if tensor.is_floating_point() else torch.equal(tensor, was)
        assert same


def spoil_row(state, cache, rows, _) -> None:
    if rows is not None:
        rows[1, 77] += 1


def spoil_record(state, cache, rows, _) -> None:
    cache.pages[1, 576 + 5] ^= 1  # row 1 of page 1: window 1 of sequence 0


def spoil_scale(state, cache, rows, _) -> None:
    cache.pages[1, 8 * 576 + 8 + 3] += 1  # its fourth scale, twice as large


def spoil_page(state, cache, rows, _) -> None:
    cache.pages[0, 9] = 1


def spoil_tag(state, cache, rows, _) -> None:
    state.positions[0, 1] = 99  # the slot of sequence 1


def spoil_state(state, cache, rows, _) -> None:
    held = int((state.held()[2] == 13).nonzero()[0])  # the last position of sequence 0
    state.rows[2, held, 5] += 1


@pytest.mark.parametrize(
    "spoil, stage, sequence, window, channel",
    [
        (spoil_row, "pooled row", 0, 2, 77),
        (spoil_record, "record bytes", 0, 1, 5),
        (spoil_scale, "record bytes", 0, 1, 192),
        (spoil_page, "record bytes", -1, -1, None),
        (spoil_tag, "state row", 1, -1, None),
        (spoil_state, "state row", 0, 3, 5),
    ],
)
def test_the_first_wrong_place_is_named(monkeypatch: pytest.MonkeyPatch, spoil, stage, sequence, window, channel) -> None:
    call = Call("csa", "fp8_ds_mla")
    wrong(monkeypatch, spoil)
    report = call.check(backend="triton")
    assert report.first is not None
    assert (report.first.stage, report.first.sequence, report.first.window, report.first.channel) == (
        stage,
        sequence,
        window,
        channel,
    )
    assert "DIFFERENT" in str(report) and stage in str(report)


def test_the_reference_finds_what_all_backends_get_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("csa", "fp8_ds_mla")
    other = [call.old + 1, None]  # not the history that the state is of
    report = call.check(full_history=other)
    assert {d.against for d in report.differences} == {"fp64"}
    assert report.first is not None and (report.first.sequence, report.first.window) == (0, 1)
    assert {d.stage for d in report.differences} == {"pooled row", "read-back value"}


def test_a_plan_that_is_out_of_date() -> None:
    call = Call("csa", "fp8_ds_mla")
    call.plan.state_slots[0] = 1
    report = call.check()
    assert report.first is not None and report.first.stage == "plan"


def test_errors_name_the_argument() -> None:
    call = Call("csa", "fp8_ds_mla")
    with pytest.raises(ValueError, match=r"^full_history must have"):
        call.check(full_history=[call.old])
    with pytest.raises(ValueError, match=r"^full_history\[0\] must be \[6, 2048\]"):
        call.check(full_history=[call.old[1:], None])
    with pytest.raises(TypeError, match=r"^full_history\[0\] must be a Tensor"):
        call.check(full_history=[3, None])
    with pytest.raises(ValueError, match=r"^backend must be"):
        call.check(backend="cuda")
    one = (call.new, call.state, call.cache, *call.weights.values())
    for args, options, message in (
        (([one], call.plan, call.state), {}, r"^state must be left out when compressors are given"),
        (([one], call.plan), {"rope": call.weights["rope"]}, r"^rope must be left out"),
        (([one], call.plan), {"full_history": [None, None]}, r"^full_history must be left out for compress_many"),
        (([one[1:]], call.plan), {}, r"^compressors\[0\] must be a tuple"),
        (("tokens", call.plan, call.state), {}, r"^kv_score must be a"),
        ((call.new, None, call.state, call.cache), call.weights, r"^plan must be a StepPlan"),
        ((call.new, call.plan, call.cache), {"ape": one[4]}, r"^ape must be left out for a store"),
        ((call.new, call.plan, call.state, call.cache), {}, r"^spec must be a CompressorSpec"),
    ):
        with pytest.raises(TypeError, match=message):
            check(*args, **options)


def test_no_records_at_all() -> None:
    """Of every format, where a step makes no entry."""
    for fmt in FORMATS.values():
        spec = kvfold.V4_INDEXER if 128 in fmt.head_dims else kvfold.V4_CSA
        cache = kvfold.EntryCache.allocate(fmt.name, 1, 4, spec)
        none = torch.zeros(0, spec.head_dim)
        assert explained(cache, bytes_of(cache, torch.zeros(0, dtype=torch.int64)), none, none[:, :1]).shape == none.shape
