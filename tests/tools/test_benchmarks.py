"""What of the benchmarks a CPU can check: cases, byte counts, the calls' tensors, and the naive kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from support.helpers import Weights, make_tokens, norm_error

import kvfold
from benchmarks.experiments import pages, parts, window_reduction
from benchmarks.lib import bounded, calls, floor, protocol, v41
from benchmarks.lib.constants import constants
from benchmarks.lib.protocol import Case, Variant
from benchmarks.run import decode, engine, launches, metadata, precompile, record, store

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes the kernels where there is no GPU
HIT = Case("decode", 512, 128, 16, 4, "hit")
CSA_HIT = Case("decode", 512, 4, 16, 4, "hit")


def test_every_peer_figure_belongs_to_a_case() -> None:
    names = {case.name for case in protocol.cases()}
    assert {row["case"] for row in protocol.peers()} <= names
    without = names - {row["case"] for row in protocol.peers()}
    assert without == {"dec hd128 r4 b64 n1 hit", "dec hd128 r4 b64 n4 hit"}


@pytest.mark.parametrize("case", protocol.cases(), ids=lambda case: case.name)
def test_starts_are_what_the_mode_says(case: Case) -> None:
    starts = case.start_positions()
    assert len(starts) == case.batch
    ended = [(start + case.new) // case.ratio - start // case.ratio for start in starts]
    if case.kind == "prefill":
        assert starts == [0] * case.batch
    elif case.mode == "hit":
        assert all((start + case.new) % case.ratio == 0 for start in starts) and ended == [1] * case.batch
    elif case.mode == "miss":
        assert starts == [4 * case.ratio] * case.batch and ended == [0] * case.batch
    else:
        assert starts == [4 * case.ratio + b * case.ratio // case.batch for b in range(case.batch)]


def test_raw_fp32_peers_are_there_for_every_ratio_128_case() -> None:
    for case in protocol.cases():
        if case.kind == "decode" and case.ratio == 128:
            assert protocol.best_peer(case, protocol.RAW_FP32) is not None
    assert protocol.best_peer(HIT) == (6.91, "sglang compress+normrope@s16")
    assert protocol.best_peer(HIT, protocol.RAW_FP32) == (8.01, "sglang compress+normrope")


@pytest.mark.parametrize("name", ["fold", "fold:nothing", "page:bf16", "many:bf16", "fold:bf16+bf16"])
def test_unknown_variants_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"variant|fmt"):
        Variant.parse(name)


def test_options_choose_cases_and_variants() -> None:
    args = decode.parse(
        ["--quick", "--only", "r4", "--variants", "fold:fp8_ds_mla,many:fp8_ds_mla+indexer_mxfp4", "--pdl", "off"]
    )
    chosen = decode.chosen(args)
    assert args.pdl == "off" and {case.batch for case, _ in chosen} == {16, 256}
    assert all(case.head_dim == 512 for case, _ in chosen)  # neither is defined for the indexer alone
    assert len(chosen) == 3 * 2 * 2
    with pytest.raises(SystemExit):
        decode.parse(["--variants", "fold:nothing"])


def test_bytes_of_a_fold_step() -> None:
    """HCA, 16 sequences at 636: 4 tokens, of which the last ends window 4. One work item each."""
    fold_row = 3 * 512 * 4
    plan = 4 + 16 * 32 + 16 * 8
    shared = 4 * 512 * 4 + 512 * 4 + 64 * 4  # ape of 4 places, norm weight, one rotation
    read = 16 * (4 * 1024 * 2 + fold_row + 4)
    write = 16 * (3 * fold_row + 4 * 4 + 584)
    assert floor.traffic(HIT, Variant.parse("fold:fp8_ds_mla")) == (plan + shared + read, write)


def test_bytes_of_a_window_step() -> None:
    """The same over fp32 pages of 128: 124 old rows, value and score, in one page; pooled rows in bf16 and no cache."""
    row = 2 * 512 * 4
    read = 4 + 16 * 32 + 4 * 512 * 4 + 16 * (4 * 1024 * 2 + 124 * row + 2 * 4)
    assert floor.traffic(HIT, Variant.parse("window:rows")) == (read, 16 * (4 * row + 512 * 2))


def test_bytes_of_main_and_indexer() -> None:
    """CSA, 16 sequences at 16: window 4 ends, and takes the lo rows of positions 12 to 15 from the state; 7 rows are kept."""

    def compressor(head_dim: int, record: int) -> tuple[int, int]:
        row = 2 * 2 * head_dim * 2
        shared = 4 * 2 * head_dim * 4 + head_dim * 4 + 64 * 4
        return shared + 16 * (4 * row + 4 * row // 2 + 4), 16 * (7 * row // 2 + 2 * 4 + record)

    main, indexer = compressor(512, 584), compressor(128, 128 + 4)
    got = floor.traffic(CSA_HIT, Variant.parse("many:fp8_ds_mla+indexer_fp8_vllm"))
    assert got == (4 + 16 * 32 + 16 * 8 + main[0] + indexer[0], main[1] + indexer[1])


def test_a_step_without_an_end_reads_no_window() -> None:
    miss = Case("decode", 512, 128, 16, 1, "miss")
    got = floor.traffic(miss, Variant.parse("window:fp8_ds_mla"))
    assert got == (4 + 16 * 32 + 512 * 4 + 16 * (1024 * 2 + 2 * 4), 16 * 2 * 512 * 4)


@pytest.mark.parametrize(("read", "write"), [(64, 64), (10_000, 2_000), (100, 9_000), (9_000, 0)])
def test_move_writes_as_many_bytes_as_asked(read: int, write: int) -> None:
    src = torch.randint(1, 1 << 30, (4096,), dtype=torch.int32, device=DEVICE)
    dst = torch.full((4096,), -1, dtype=torch.int32, device=DEVICE)
    floor.move(src, dst, read, write, 512, 4)()
    written = -(-write // 64) * 16
    assert bool((dst[:written] >= 0).all()) and bool((dst[written:] == -1).all())


@pytest.mark.parametrize("mode", ["hit", "spread", "miss"])
@pytest.mark.parametrize("name", ["fold:fp8_ds_mla", "fold:rows", "window:fp8_ds_mla", "window:rows"])
def test_calls_are_accepted(name: str, mode: str) -> None:
    step = calls.Step(Case("decode", 512, 128, 4, 4, mode), Variant.parse(name), DEVICE)
    step.check(step.call(step.buffers()))


@pytest.mark.parametrize("name", ["fold:fp8_ds_mla", "window:fp8_ds_mla", "many:fp8_ds_mla+indexer_mxfp4"])
def test_calls_with_overlap_are_accepted(name: str) -> None:
    step = calls.Step(Case("decode", 512, 4, 4, 1, "hit"), Variant.parse(name), DEVICE)
    step.check(step.call(step.buffers()))


def v41_cases(new: int, mode: str, batch: int = 4) -> dict[int, Case]:
    return {ratio: Case("decode", 512, ratio, batch, new, mode) for ratio in (2, 1)}


def test_bytes_of_a_layer_of_v41() -> None:
    """Ratio 2, 16 sequences at 9: one token, whose row a state need not keep, ends window 4. Rows of a ring are fp32."""
    case = v41_cases(1, "hit", 16)[2]
    plan, entry = 4 + 16 * 32 + 16 * 8, 528 + 512 * 2
    for state, old, new in (("fold", 2 * 512 * 2 + 4, 4), ("ring", 2 * 512 * 4 + 2 * 4, 2 * 512 * 4)):
        compress, key = v41.traffic(case, state)
        assert compress == (plan + 512 * 4 + 64 * 4 + 16 * (2 * 512 * 2 + old), 16 * (new + entry))
        assert key == (plan + 128 * 4 + 64 * 4 + 16 * 128 * 2, 16 * (64 + 4))
    compress, key = v41.traffic(v41_cases(4, "hit", 16)[1], "fold")  # ratio 1: four entries of a token each, and no state
    plan = 4 + 64 * 32 + 64 * 8
    assert compress == (plan + 512 * 4 + 4 * 64 * 4 + 64 * 512 * 2, 64 * entry)
    assert key == (plan + 128 * 4 + 4 * 64 * 4 + 64 * 128 * 2, 64 * 68)


@pytest.mark.parametrize("state", v41.STATES)
def test_the_layers_of_v41_are_two_launches_each_and_write_all_they_are_timed_for(state: str) -> None:
    for new, mode in v41.STEPS:
        step = v41.Step(v41_cases(new, mode), state, DEVICE)
        launches = step.launches()
        assert len(launches) == 8
        step.check(step.call(launches))
        for layer in step.made.values():
            own = layer.buffers()
            step.check(step.call(list(layer.calls(own))))
            ended = sum((at + new) // layer.case.ratio - at // layer.case.ratio for at in layer.case.start_positions())
            assert int(own.latent.any(1).sum()) == ended > 0
            for cache in (own.cache, own.key_cache):
                per_row = cache.read(torch.arange(4 * 64 + 64, device=DEVICE)).any(1)
                assert int(per_row.sum()) == ended


@pytest.mark.parametrize("at", range(len(metadata.CALLS)))
def test_reserved_places_change_no_record(at: int) -> None:
    case, variant = metadata.CALLS[at]
    case = Case(case.kind, 512, case.ratio, 3, min(case.new, 64), case.mode)
    for places in (False, True):
        (call,) = metadata.calls_of(case, variant, places, DEVICE, sets=1)
        call()
    step = calls.Step(case, variant, DEVICE)
    plain, more = step.plan, step.make_plan(**metadata.reserved(step))
    assert more.entry_capacity > plain.entry_capacity and int(plain.num_items) == int(more.num_items)


def test_updates_that_gather_cache_slots_differ_in_nothing_else() -> None:
    case = Case("decode", 512, 4, 20, 4, "hit")
    step, entries = calls.Step(case, Variant.parse("fold:bf16"), DEVICE), {}
    for name, options in metadata.ways(step).items():
        plan = step.make_plan(**options)
        assert int(plan.errors) == 0 and int((plan.entry_slots >= 0).sum()) == 20, name
        entries[name] = plan.cu_entries.tolist()
    assert all(found == entries["block table"] for found in entries.values())
    assert [len(made) for made in metadata.updates_of(case, DEVICE, plans=2).values()] == [2] * 4


@pytest.mark.parametrize(("spec", "fmt"), store.PLACED, ids=["main", "key"])
def test_rows_with_a_plan_and_by_slots_are_stored_alike(
    spec: kvfold.CompressorSpec, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "DEVICE", DEVICE)
    monkeypatch.setattr(protocol, "buffer_sets", lambda _: 1)
    caches, made = [], kvfold.EntryCache.allocate
    monkeypatch.setattr(kvfold.EntryCache, "allocate", lambda *a, **k: caches.append(made(*a, **k)) or caches[-1])
    for way in store.WAYS:
        torch.manual_seed(3)  # the rows are drawn last
        (call,) = store.placed_calls(spec, fmt, 48, way, rows_per_page=2)
        call()
    plan, ordered, anywhere = (cache.read(torch.arange(48, device=DEVICE)) for cache in caches)
    assert bool(plan.any(1).all()) and torch.equal(plan, ordered) and bool(anywhere.any(1).all())


def test_what_is_held_to_targets() -> None:
    def row(bench: str, case: str, variant: str, us: float, **more: float) -> dict:
        return {"bench": bench, "case": case, "variant": variant, "us": us, **more}

    layers = [row("v41", f"v41 4 layers b{b} n1 hit", s, 15.0, floor_us=10.0) for s in v41.STATES for b in (16, 64)]
    assert engine.judged_v41([layers[0] | {"launches": 2.0}, *layers[1:]]) == [
        ("launches of a layer, v41 4 layers b16 n1 hit fold", 2.0, 2), ("x floor, v41 4 layers b64 n1 hit", 1.5, 1.3),
    ]  # fmt: skip
    ways = [row("store_places", way, "store:bf16", us) for way, us in zip(store.WAYS, (100.0, 101.0, 120.0), strict=True)]
    assert engine.judged_places(ways) == [("x the form with a plan, store:bf16", 1.2, 1.1)]
    rows = [
        row("plan_metadata", "p", "block table", 3.0, more_us=0.0), row("plan_metadata", "p", "token slots", 4.5, more_us=1.5),
        row("reserved", "c", "fold:bf16", 3.0, more_us=0.0),
        row("reserved", "c", "fold:bf16, reserved places", 3.25, more_us=0.25),
    ]  # fmt: skip
    assert [(value, most) for _, value, most in engine.judged_metadata(rows)] == [
        (3.0, 5.0),
        (4.5, 5.0),
        (1.5, 1.0),
        (0.25, 0.2),
    ]


@pytest.mark.parametrize("case", [HIT, Case("prefill", 512, 4, 1, 24)], ids=lambda case: case.name)
def test_two_launches_store_what_one_does(case: Case) -> None:
    torch.manual_seed(7)
    step = calls.Step(case, launches.ONE, DEVICE)
    (one,) = step.buffers()
    step.check(step.call([one]))
    torch.manual_seed(7)
    step = calls.Step(case, launches.POOL, DEVICE)
    both, cache = launches.in_two(step)
    step.check(both)
    assert bool(cache.storage.any()) and torch.equal(cache.storage, one.cache.storage)


def test_pages_that_a_step_touches_are_its_own() -> None:
    case = Case("decode", 512, 128, 16, 4, "spread")
    value, score, pages = calls.window_tables(case)
    assert not torch.equal(value, score)
    for tables in (value, score):
        own = []
        for b, start in enumerate(case.start_positions()):
            first = (start // 128 - 1) * 128 // floor.PAGE_SIZE
            own += tables[b, first : (start + case.new - 1) // floor.PAGE_SIZE + 1].tolist()
        assert len(own) == len(set(own)) == pages - 1 and max(own) < pages


@pytest.mark.parametrize("new", [1, 4])
def test_one_warp_kernel_against_the_reference(new: int) -> None:
    spec = kvfold.CompressorSpec(head_dim=32, ratio=8, rope_dim=16)
    page, windows, batch = 4, 3, 2
    tokens = [make_tokens(spec, windows * spec.ratio, seed=b, dtype=torch.bfloat16) for b in range(batch)]
    ape = Weights.make(spec).ape
    assert ape is not None
    start = windows * spec.ratio - new
    draw = torch.Generator().manual_seed(1)
    pages = batch * windows * spec.ratio // page
    tables = [torch.randperm(pages, generator=draw).view(batch, -1).int() for _ in range(2)]
    pools = [torch.full((pages, page, spec.head_dim), torch.nan) for _ in range(2)]
    for b in range(batch):
        value, score = tokens[b].float().split(spec.channels, dim=1)
        for pool, table, stored in zip(pools, tables, (value, score + ape.repeat(windows, 1)), strict=True):
            for x in range(start):
                pool[table[b, x // page], x % page] = stored[x]
    live = torch.cat([rows[start:] for rows in tokens]).to(DEVICE)
    got = torch.full((batch, spec.head_dim), torch.nan, device=DEVICE)
    starts = torch.full((batch,), start, dtype=torch.int32, device=DEVICE)
    on_device = [pool.to(DEVICE) for pool in pools]
    window_reduction.one_warp_kernel[batch, 2](
        live, ape.to(DEVICE), *on_device, *(table.to(DEVICE) for table in tables), tables[0].shape[1], starts, new, got,
        RATIO=spec.ratio, PAGE=page, HEAD_DIM=spec.head_dim, COLUMNS=16, num_warps=1,
    )  # fmt: skip
    want = torch.stack([kvfold.reference.pooled(rows, spec, ape)[-1] for rows in tokens])
    assert norm_error(got.cpu(), want) < window_reduction.BOUND
    pools = [pool.cpu() for pool in on_device]
    for pool, table, half in zip(pools, tables, (0, spec.channels), strict=True):
        for b in range(batch):
            stored = torch.stack([pool[table[b, x // page], x % page] for x in range(start, start + new)])
            bias = ape[[x % spec.ratio for x in range(start, start + new)]] if half else 0
            assert torch.equal(stored, tokens[b][start:, half : half + spec.channels].float() + bias)


def test_record_runs_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for stage in record.STAGES:
        command = stage.line(tmp_path, "abc")
        assert command[1] == "-m" and importlib.util.find_spec(command[2])
        assert command.count("--out") == command.count("abc") == (stage.name != "precompile")
        if "--out" in command:
            assert command[command.index("--out") + 1] == str(tmp_path / f"{stage.name.split('-')[0]}.jsonl")
            assert command.index("abc") < (command.index("--") if "--" in command else len(command))
    args = record.parse(["--into", str(tmp_path), "--only", "decode,suite", "--logs", str(tmp_path)])
    assert [stage.name for stage in args.stages] == ["decode", "suite"]
    with pytest.raises(SystemExit):
        record.parse(["--into", str(tmp_path), "--only", "decod"])
    assert "decod" in capsys.readouterr().err
    for code, seconds, said in (
        ("raise SystemExit(3)", 60, "failed with 3"),
        ("1", 60, "done"),
        ("import time; time.sleep(9)", 1, "cut off"),
    ):
        assert record.run(record.Stage("x", ("-c", code), seconds), args, 60.0).startswith(said)


@pytest.mark.parametrize("seconds", [0, 5], ids=["whole", "cut off"])
def test_a_run_of_the_suite_says_what_failed_and_whether_it_came_to_its_end(
    tmp_path: Path, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_it.py").write_text(
        "import time, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 3 == 4, 'three'\n"
        "def test_absent(): pytest.skip()\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_broken(broken): pass\n"
        f"def test_long(): time.sleep({12 * bool(seconds)})\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(protocol.HERE.parent), os.environ.get("PYTHONPATH")))))
    out = tmp_path / "suite.jsonl"
    command = [sys.executable, "-m", "benchmarks.run.suite", "--out", str(out), "--commit", "abc"]
    command += ["--seconds", str(seconds), "--"]
    code, said = bounded.run([*command, "-p", "no:cacheprovider", "-p", "no:xdist", "test_it.py"], 60, cwd=tmp_path)
    assert code == (2 if seconds else 1) and "failures: test_it.py::test_bad" in said
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["failed"] == ["test_it.py::test_bad", "test_it.py::test_broken"]
    assert [row[key] for key in ("tests", "failures", "errors", "skipped")] == [5 - bool(seconds), 1, 1, 1]
    assert row["ran"] == {"test_it": 3 - bool(seconds)} and row["exit"] == (None if seconds else 1)


def test_what_outlives_its_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    parent = f"import subprocess, sys; print('here', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    assert bounded.run([sys.executable, "-c", parent], 1.0) == (None, "here\n")
    assert bounded.run([sys.executable, "-c", "print(1); raise SystemExit(3)"], 60) == (3, "1\n")
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_every_timed_call_has_its_kernel_compiled_before() -> None:
    keys = precompile.keys()
    assert len(set(keys)) == len(keys)
    asked = [(case, variant) for case, variant in decode.chosen(decode.parse([])) if case.kind == "decode"]
    assert asked and {precompile.key_of(case, variant) for case, variant in asked} <= set(keys)
    assert {precompile.key_of(case, launches.POOL, torch.float32) for case in launches.CASES} <= set(keys)
    assert set(precompile.engine_keys().values()) <= set(precompile.keys(engine.COMPILED)) <= set(keys)
    step = calls.Step(HIT, Variant.parse("window:fp8_ds_mla"), device="cpu")
    (buffers,) = step.buffers()
    assert precompile.key_of(HIT, step.variant).fmt is buffers.cache.format


@pytest.mark.parametrize(("fold", "write"), parts.PARTS.values(), ids=parts.PARTS)
def test_the_parts_of_a_prompt(fold: bool, write: bool) -> None:
    """Three windows by two programs: what is folded is the pooled row, and window 0 is left out."""
    torch.manual_seed(0)
    tokens, ape = torch.randn(16, 2048, device=DEVICE).bfloat16(), torch.randn(4, 1024, device=DEVICE)
    records = torch.full((4 * 144,), -7.0, device=DEVICE)
    if not write:
        tokens[:, :1024] = torch.inf  # the sum of what was read is written where it is infinite
    compiled_in = constants(kvfold.V4_CSA)
    parts.parts_kernel[(2,)](tokens, ape, records, 4, parts.WORDS, fold, write, **compiled_in, enable_fp_fusion=False)
    if not write:
        assert records[:512].isinf().all() and (records[512:] == -7).all()
        return
    if fold:
        want = kvfold.reference.pooled(tokens.cpu().float(), kvfold.V4_CSA, ape.cpu())[1:].float()
    else:
        k_lo, k_hi, s_lo, s_hi = tokens.cpu().float().view(4, 4, 4, 512).unbind(2)
        want = ((k_lo + s_lo).sum(1)[:-1] + (k_hi + s_hi).sum(1)[1:]).view(3, 512)
    words = want.view(3, 128, 4).amax(2)
    got = records.cpu().view(4, 144)
    assert (got[0] == -7).all()
    torch.testing.assert_close(got[1:, :128], words, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1:, 128:], words[:, :16], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("piece", "lanes"), pages.PIECES)
def test_the_pages_that_are_read_are_those_of_the_entries(piece: int, lanes: int) -> None:
    parts, pool = 512 // piece // 2 or 1, torch.full((6, 128, 512), float("nan"), device=DEVICE)
    kv, score = pool.clone(), pool.clone()
    kv[[4, 1]] = float("inf")
    score[[0, 3]] = float("inf")
    out = torch.zeros(128, 512, device=DEVICE)
    table = torch.tensor([4, 1, 0, 3], dtype=torch.int32, device=DEVICE)
    args = (kv, score, table, out, 2, parts, 512 // piece // parts, piece, lanes, pages.LOADS, False)
    pages.read_kernel[(3,)](*args)
    assert out[:lanes, :piece].isinf().all()  # a NaN among them would not be stored
    assert not out[lanes:].any() and not out[:, piece:].any()
