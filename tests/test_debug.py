"""`check` finds nothing in a right call, names the place where a wrong one goes wrong, and writes nothing of the caller's."""

from __future__ import annotations

import pytest
import torch
from helpers import SPECS, Weights, bits, make_tokens

import kvfold
from kvfold import debug_copies
from kvfold.debug import check
from kvfold.records import FORMATS

HD = {"indexer": "indexer_mxfp4", "csa": "fp8_ds_mla", "hca": "fp8_ds_mla"}


class Call:
    """A step of two sequences, of which the first has a history; `args` are those of `compress`."""

    def __init__(self, name: str, fmt: str, *, window: bool = False, dtype: torch.dtype = torch.float32) -> None:
        spec = self.spec = SPECS[name]
        self.old, self.new = make_tokens(spec, spec.ratio + 2, 1), make_tokens(spec, 3 * spec.ratio, 2)
        w = Weights.make(spec)
        self.weights = {"spec": spec, "ape": w.ape, "norm_weight": w.norm_weight, "rope": w.rope}
        self.cache = kvfold.EntryCache.allocate(fmt, 3, 8, spec)
        if window:
            self.state: kvfold.FoldState | kvfold.WindowState = kvfold.WindowState.allocate(spec, 40, spec.ratio, dtype=dtype)
            table = torch.arange(20, dtype=torch.int32).view(2, 10)
            self.where = {"block_tables": (table, table + 20), "page_size": spec.ratio}
        else:
            self.state = kvfold.FoldState.allocate(spec, 3, 4, dtype=dtype)
            self.where = {"state_slots": torch.tensor([2, 0], dtype=torch.int32)}
        kvfold.compress(self.old, self.step([0, 0], [len(self.old), 0]), self.state, self.cache, **self.weights)
        self.plan = self.step([len(self.old), 0], [2 * spec.ratio, spec.ratio])

    def step(self, starts: list[int], lengths: list[int]) -> kvfold.StepPlan:
        cu = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        start, pages = torch.tensor(starts, dtype=torch.int32), torch.tensor([[1], [2]], dtype=torch.int32)
        return kvfold.StepPlan.build(
            self.spec.ratio, start, cu, max(lengths), **self.where, cache_block_table=pages, rows_per_page=8
        )

    def check(self, **options: object) -> kvfold.debug.Report:
        return check(self.new, self.plan, self.state, self.cache, **self.weights, **options)

    @property
    def history(self) -> list[torch.Tensor | None]:
        return [self.old, None]


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_a_right_call_is_equal_in_every_format(fmt: str) -> None:
    name = "indexer" if FORMATS[fmt].head_dims == (128,) else "csa"
    call = Call(name, fmt)
    report = call.check(full_history=call.history)
    assert report.equal, report
    assert (report.entries, report.referenced, report.errors) == (3, 3, 0)


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


@pytest.mark.gpu
@pytest.mark.parametrize("window", [False, True])
def test_a_gpu_is_compared_with_torch(window: bool) -> None:
    call = Call("csa", "fp8_ds_mla", window=window)
    device = torch.device("cuda", 0)
    for part in (call, call.state, call.plan, call.cache):
        for key, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, key, value.to(device))
    call.cache = kvfold.EntryCache(call.cache.storage, "fp8_ds_mla", 8, call.spec)
    if call.plan.block_tables is not None:
        call.plan.block_tables = tuple(table.to(device) for table in call.plan.block_tables)
    call.weights = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.weights.items()}
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


def wrong(monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    """A triton backend that is the torch backend, spoiled by `spoil(state, cache, rows)` after the call."""
    real = debug_copies.compress

    def compress(kv_score, plan, state, cache, *, rows, backend, **weights):
        real(kv_score, plan, state, cache, rows=rows, backend="torch", **weights)
        if backend == "triton":
            spoil(state, cache, rows)

    monkeypatch.setattr(debug_copies, "compress", compress)
    monkeypatch.setattr("kvfold.debug.choose_backend", lambda backend, *_: backend)


def spoil_row(state, cache, rows) -> None:
    if rows is not None:
        rows[1, 77] += 1


def spoil_record(state, cache, rows) -> None:
    cache.pages[1, 576 + 5] ^= 1  # row 1 of page 1: window 1 of sequence 0


def spoil_scale(state, cache, rows) -> None:
    cache.pages[1, 8 * 576 + 8 + 3] += 1  # its fourth scale, twice as large


def spoil_page(state, cache, rows) -> None:
    cache.pages[0, 9] = 1


def spoil_tag(state, cache, rows) -> None:
    state.positions[0, 1] = 99  # the slot of sequence 1


def spoil_state(state, cache, rows) -> None:
    held = int((state.positions[2] == 13).nonzero()[0])  # the last position of sequence 0
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


def test_a_refusal_is_explained() -> None:
    call = Call("hca", "fp8_ds_mla")
    call.state.positions.fill_(-1)
    report = call.check()
    assert report.equal and report.errors == 1 and report.entries == 1
    assert "sequence 0 is refused: slot 2 holds no row of position 129" in str(report)


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
