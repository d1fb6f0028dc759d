"""The benchmark of a whole step: shapes, bytes, others' sums, what is called, and what is said where a part is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kvfold
from benchmarks.lib import model_calls, models, protocol
from benchmarks.lib.models import Model, PromptCase, StepCase
from benchmarks.run import model_step, precompile, record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLASH, PRO = models.MODELS
TINY = Model("tiny", "Tiny", 64, (128, 4, 4))


def test_the_models_are_those_of_the_checkpoints() -> None:
    assert [(PRO.ratios.count(ratio), FLASH.ratios.count(ratio)) for ratio in (128, 4)] == [(31, 20), (30, 21)]
    assert PRO.ratios[:3] == (128, 128, 4) and FLASH.ratios[:2] == (4, 128) and PRO.ratios[-1] == FLASH.ratios[-1] == 4
    assert (models.columns(128), models.columns(4)) == (2 * 512, 2 * 1024 + 2 * 256)
    assert models.weight_bytes(StepCase(PRO, 1, 1)) == 7168 * (31 * 1024 + 30 * 2560) * 2 == 1_556_086_784
    assert models.weight_bytes(StepCase(FLASH, 1, 1)) == 4096 * (20 * 1024 + 21 * 2560) * 2
    assert [case.name for case in models.step_cases()][-4:] == [
        "v4-pro b1 n4",
        "v4-pro b16 n4",
        "v4-pro b64 n4",
        "v4-pro b256 n4",
    ]
    assert [case.name for case in models.prompt_cases()][-2:] == ["v4-pro r128 s65536", "v4-pro r4 s65536"]


def test_the_floor_is_weights_states_and_caches_without_kv_score() -> None:
    case = StepCase(TINY, 2, 4)
    weights, kv_score = 64 * (1024 + 2 * 2560) * 2, 8 * (1024 + 2 * 2560) * 2
    moved = models.compress_traffic(case).total
    assert models.floor_bytes(case, "projections") == weights and models.floor_bytes(case, "compressors") == moved
    assert models.floor_bytes(case, "fused") - models.floor_bytes(case, "fused-fp8") == weights // 2
    assert models.floor_bytes(case, "fused") == models.floor_bytes(case, "apart") == weights + moved - kv_score
    prompt = PromptCase(TINY, 128, 256)
    read = 256 * 64 * 2 + 64 * 1024 * 2
    assert models.floor_bytes(prompt, "projections") == read
    assert models.floor_bytes(prompt, "fused") == read + models.compress_traffic(prompt).total - 256 * 1024 * 2
    assert models.floor_us(StepCase(PRO, 1, 1), "projections") == pytest.approx(345.8, abs=0.05)


def test_engines_are_sums_of_their_fastest_recorded_pipelines() -> None:
    """By hand, from the rows of peers_h200.jsonl: 31 layers at phases, 30 of main and indexer that all end a window."""
    whole = models.engine_us(StepCase(PRO, 16, 4), "trtllm")
    assert whole == (pytest.approx(31 * 4.5 + 30 * (10.3 + 7.34)), True)
    vllm = models.engine_us(StepCase(FLASH, 256, 4), "vllm")
    assert vllm.whole and vllm.us == pytest.approx(20 * 22.29 + 21 * (14.04 + 9.18))
    # 64 sequences: no row of the indexer, so that of 16; one: none at all. Both are the least that it can be.
    assert models.engine_us(StepCase(PRO, 64, 4), "trtllm") == (pytest.approx(31 * 20.2 + 30 * (11.33 + 7.34)), False)
    assert models.engine_us(StepCase(PRO, 1, 4), "trtllm") == (pytest.approx(31 * 3.27 + 30 * 6.41), False)
    # One token: steps in which no window of 4 ends; of the indexer there is none.
    assert models.engine_us(StepCase(PRO, 16, 1), "trtllm") == (pytest.approx(31 * 2.76 + 30 * 2.76), False)


def test_the_share_of_the_step_that_was_reported() -> None:
    assert models.reported_us() == pytest.approx(31 * 2.88 + 30 * (6.11 + 3.73))
    assert models.share(models.reported_us()) == pytest.approx(0.6) and models.share(0) == 0
    half = models.share(models.reported_us() / 2)
    assert half == pytest.approx(100 * 0.3 / 99.7)
    assert f"{half:.2f} %" in models.share_text(models.reported_us() / 2)


def entries(step: model_calls.WholeStep, buffers: list[model_calls.LayerSet]) -> list[int]:
    """Stored ones, of each compressor of each layer."""
    rows = torch.arange(step.case.layers[0].batch, device=DEVICE)
    found = []
    for layer, own in zip(step.layers, buffers, strict=True):
        pages = step.steps[layer.ratio].rows_per_page * step.steps[layer.ratio].cache_pages
        found += [int(b.cache.read(torch.arange(len(rows) * pages, device=DEVICE)).any(1).sum()) for b in own.own]
    return found


def test_a_step_projects_and_stores_in_every_layer() -> None:
    torch.manual_seed(0)
    case = StepCase(TINY, 4, 4)
    step = model_calls.WholeStep(case, model_calls.projections(TINY, DEVICE), DEVICE)
    apart, alone = step.make_set(), step.make_set()
    assert len({own.kv_score.data_ptr() for own in (*apart, *alone)}) == 6  # layers share nothing that they write
    assert len({layer.compressors[0].ape.data_ptr() for layer in step.layers}) == 3
    before = [own.kv_score.clone() for own in alone]
    step.check(step.call("updates", apart))
    assert entries(step, apart) == [0] * 5
    step.check(step.call("apart", apart))
    for layer, own in zip(step.layers, apart, strict=True):
        torch.testing.assert_close(own.kv_score, step.hidden @ layer.projection.t(), rtol=0, atol=0)
    # Of 4 sequences at phases 0, 32, 64, 96 of 128 none ends a window with 4 tokens; of 4 each does, whatever its phase.
    assert entries(step, apart) == [0, 4, 4, 4, 4]
    step.check(step.call("compressors", alone))
    assert entries(step, alone) == [0, 4, 4, 4, 4]
    assert all(torch.equal(own.kv_score, old) for own, old in zip(alone, before, strict=True))
    step.check(step.call("projections", alone))
    assert all(torch.equal(a.kv_score, b.kv_score) for a, b in zip(apart, alone, strict=True))


def test_a_refused_step_is_no_figure() -> None:
    step = model_calls.WholeStep(StepCase(TINY, 2, 4), model_calls.projections(TINY, DEVICE), DEVICE)
    buffers = step.make_set()
    buffers[1].own[0].state.positions.fill_(-1)  # the history is gone
    with pytest.raises(RuntimeError, match=r"plan\.errors is \d+ after the ratio-4 layers"):
        step.check(step.call("apart", buffers))


def test_fused_hands_on_one_layer_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(kvfold, "project_compress", lambda *a, **k: calls.append((a, k)), raising=False)
    monkeypatch.setattr(kvfold, "project_compress_many", lambda *a, **k: calls.append((a, k)), raising=False)
    step = model_calls.WholeStep(StepCase(TINY, 2, 1), model_calls.projections(TINY, DEVICE), DEVICE)
    buffers = step.make_set()
    step.check(step.call("fused", buffers))
    assert len(calls) == 3 and model_calls.missing() == ""
    for (given, named), layer, own in zip(calls, step.layers, buffers, strict=True):
        plan = step.steps[layer.ratio].plan
        assert given[0] is step.hidden and given[1] is layer.projection
        if layer.ratio == 128:
            assert given[2:] == (plan, own.own[0].state, own.own[0].cache)
            assert named.keys() == {"spec", "ape", "norm_weight", "rope", "round_kv_score"}
        else:
            assert given[3] is plan and [one.state for one in given[2]] == [b.state for b in own.own]
            assert named.keys() == {"round_kv_score"}
        assert named["round_kv_score"] is True  # as torch.mm gives bf16


def step_and_sets() -> tuple[model_calls.WholeStep, list, list]:
    """A step of a small model, and two sets whose states have the same rows."""
    torch.manual_seed(0)
    wide = TINY._replace(hidden_dim=256)
    step = model_calls.WholeStep(StepCase(wide, 2, 4), model_calls.projections(wide, DEVICE), DEVICE)
    first, second = step.make_set(), step.make_set()
    for one, other in zip(first, second, strict=True):
        for mine, its in zip(one.own, other.own, strict=True):
            mine.state.rows.copy_(its.state.rows)
    return step, first, second


def test_fused_makes_the_step() -> None:
    """The calls themselves, whose states keep rows of bf16: what they fold is what `apart` folds, but for its order of sums."""
    step, fused, apart = step_and_sets()
    step.check(step.call("fused", fused))
    step.check(step.call("apart", apart))
    for one, other in zip(fused, apart, strict=True):
        for mine, its in zip(one.own, other.own, strict=True):
            torch.testing.assert_close(mine.state.rows, its.state.rows, rtol=0.02, atol=0.02)


def test_fused_in_fp8_makes_the_step_of_what_its_weights_stand_for() -> None:
    step, fp8, fused = step_and_sets()
    step.check(step.call("fused-fp8", fp8))
    for layer, scaled in zip(step.layers, step.scaled, strict=True):
        error = (scaled.dequantized() - layer.projection).norm() / layer.projection.norm()
        assert 0 < error < 0.04
        layer.projection.copy_(scaled.dequantized())
    step.check(step.call("fused", fused))
    for one, other in zip(fp8, fused, strict=True):
        assert all(torch.equal(mine.state.rows, its.state.rows) for mine, its in zip(one.own, other.own, strict=True))
        assert all(torch.equal(mine.cache.storage, its.cache.storage) for mine, its in zip(one.own, other.own, strict=True))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases of a small model; calls are made and take 2 us each."""
    monkeypatch.setattr(models, "step_cases", lambda: [StepCase(TINY, 2, 4)])
    monkeypatch.setattr(models, "prompt_cases", lambda: [PromptCase(TINY, 4, 64)])
    monkeypatch.setattr(protocol, "time_graph", lambda calls, rounds: [call() for call in calls] and 2.0 * len(calls))
    monkeypatch.setattr(protocol, "buffer_sets", lambda _: 2)
    monkeypatch.setattr(protocol, "device_name", lambda: models.FLOOR_DEVICE)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_rows_say_what_was_timed(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_calls, "missing", lambda: "not here")
    out = tmp_path / "step.jsonl"
    args = model_step.parse(["--out", str(out), "--commit", "abc"])
    rows, failed = model_step.run(args, DEVICE)
    assert failed == 0 and [(row["case"], row["variant"]) for row in rows] == [
        *(("tiny b2 n4", part) for part in ("updates", "compressors", "projections", "apart")),
        *(("tiny r4 s64", part) for part in ("compressors", "projections", "apart")),
    ]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row.items() >= {"bench": "step", "commit": "abc", "device": models.FLOOR_DEVICE}.items() for row in written)
    assert {row["us"] for row in rows[:4]} == {4.0} and {row["us"] for row in rows[4:]} == {2.0}
    assert "floor_us" not in rows[0] and rows[3]["bytes"] == models.floor_bytes(StepCase(TINY, 2, 4), "apart")
    assert len(model_step.cells(StepCase(TINY, 2, 4), rows[:4])) == len(model_step.HEADER)
    assert model_step.cells(StepCase(TINY, 2, 4), rows[:4])[-1].endswith("+")  # two sequences were not recorded


def test_what_fails_is_counted_and_the_rest_goes_on(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("weight must be something else")

    monkeypatch.setattr(kvfold, "project_compress", broken, raising=False)
    monkeypatch.setattr(kvfold, "project_compress_many", broken, raising=False)
    rows, failed = model_step.run(model_step.parse([]), DEVICE)
    assert failed == 4 and len(rows) == 7


def test_it_is_said_that_fused_is_missing(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model_calls, "missing", lambda: "no project_compress here")
    with pytest.raises(SystemExit):
        model_step.parse(["--variants", "fused"])
    assert "no project_compress here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        model_step.parse(["--variants", "fast"])
    monkeypatch.setattr(model_step, "run", lambda args: ([], 0))
    monkeypatch.setattr("sys.argv", ["model_step"])
    assert model_step.main() == 0 and "fused is not timed: no project_compress here" in capsys.readouterr().out


def test_words_choose_cases() -> None:
    chosen = model_step.chosen(model_step.parse(["--only", "flash b16,pro r4"]))
    assert [case.name for case in chosen] == ["v4-flash b16 n1", "v4-flash b16 n4", "v4-pro r4 s65536"]


def test_without_other_projects_figures_it_goes_on(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol.peers.cache_clear()
    monkeypatch.setattr(protocol, "PEERS", tmp_path / "absent.jsonl")
    try:
        rows = [{"case": "tiny b2 n4", "variant": "projections", "us": 3.0}]
        assert protocol.peers() == () and model_step.cells(StepCase(TINY, 2, 4), rows)[-3:] == ["", "", ""]
        assert model_step.share_of([{"case": models.REPORTED_CASE.name, "variant": "compressors", "us": 150.0}]) == ""
    finally:
        protocol.peers.cache_clear()


def test_every_kernel_of_a_step_is_compiled_before() -> None:
    keys = set(precompile.keys("step "))
    for case in (*models.step_cases(), *models.prompt_cases()):
        assert {precompile.key_of(layer, models.VARIANTS[layer.ratio]) for layer in case.layers} <= keys


def test_every_row_of_other_projects_says_whose_it_is() -> None:
    projects = {row["peer"]: row["project"] for row in protocol.peers()}
    assert projects == models.ENGINES
    assert all(row["version"] and row["date"].count("-") == 2 for row in protocol.peers())


def test_record_leaves_out_what_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (record.Stage("good", ("-c", "1"), 60), record.Stage("far", ("-c", "1"), 60, lambda: "a rocket"))
    monkeypatch.setattr(record, "STAGES", stages)
    for only, code in (([], 0), (["--only", "far"], 1)):
        monkeypatch.setattr("sys.argv", ["record", "--into", str(tmp_path), *only])
        assert record.main() == code and "far: left out, needs a rocket" in capsys.readouterr().out
