"""Kernels compiled for GPUs that are not here: a sample of the table to files, what is said of them, and spills."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, is_dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
import triton
from support.aot_support import fake, of_run, run

import kvfold
from kvfold import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec
from kvfold.backend_triton import build
from kvfold.backend_triton.build import KERNELS
from kvfold.backend_triton.table import CONFIGS, SPILLS_TRITON, choose
from kvfold.precompile.aot import is_measured_triton
from kvfold.precompile.combinations import SPECS, TARGETS, Combination, combinations
from kvfold.precompile.report import AotReport
from kvfold.precompile.resources import _stored
from kvfold.storage.formats import FORMATS

KINDS = {"fold", "mean", "rows", "window", "store", "ungated", "pair", "plan", "restore"}
EXACT = is_measured_triton()


def sample() -> list[tuple[Combination, str]]:
    """A combination and a target for each format, and more: every kernel, format and target at least once."""
    every, targets = list(combinations()), list(TARGETS)
    chosen = [(next(c for c in every if c.kind == "fold" and c.fmt is None), "sm_80")]
    few = {
        "plan": ("sm_90", "gfx942"),
        "window": ("sm_80", "gfx950"),
        "pair": ("sm_90",),
        "restore": ("sm_80", "gfx950"),
    }
    for kind, wanted in few.items():
        some = [c for c in every if c.kind == kind]
        chosen += [(some[i * (len(some) - 1) // max(len(wanted) - 1, 1)], target) for i, target in enumerate(wanted)]
    # Each target has a step over a FoldState: of both kinds, short and long ones, and where it is the same code the short one
    # over fold rows, which compiles in a fifth of the time; the other formats `store`, which finishes entries as they do.
    # test_configs.py has every row of the table.
    costly = {1: ("rows", False), 3: ("rows", True), 5: ("fold", True), 7: ("rows", False)}
    for i, name in enumerate(FORMATS):
        kind, long = costly.get(i, ("fold", False)) if i < len(targets) else ("store", False)
        fitting = [c for c in every if c.kind == kind and c.fmt is not None and c.fmt.name == name]
        fitting = [c for c in fitting if bool(c.config.programs) == long and c.config.ahead <= 8]
        chosen.append((fitting[i % len(fitting)], targets[i % len(targets)]))
    return chosen


def plain(constants: dict[str, object], options: dict[str, object]) -> dict[str, object]:
    """Compile-time arguments as the report has them, of a kernel that was compiled as its options say."""
    found = {name: asdict(value) if is_dataclass(value) else value for name, value in constants.items()}
    for name in found:
        if name.startswith("HOW"):
            found[name]["PDL"] = bool(options["launch_pdl"])  # AMD's options have none
    return found


def python(folder: Path, text: str, *arguments: object) -> str:
    """What a script says that runs in a process of its own, where Triton compiles, with an empty cache."""
    script = folder / "script.py"
    script.write_text(text)
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_row_of_the_tables_is_compiled() -> None:
    every = list(combinations())
    assert len({c.key() for c in every}) == len({c.name for c in every}) == len(every)
    # Training and TensorRT-LLM are asked for by arguments of their own; `aot` does not know projections, `prebuild` does.
    others = ("train_", "trtllm_", "project", "dequantize")
    assert {c.kind for c in every} == KINDS
    assert {c.variant().kernel for c in every} == {k for k in KERNELS if not k.startswith(others)}
    assert {c.config for c in every} == {*CONFIGS, None}
    with_cache = {(c.fmt.name, c.kind) for c in every if c.fmt and c.other is None and c.spec.gate}
    assert with_cache == {(f, k) for f in FORMATS for k in ("fold", "rows", "window", "store")}
    assert {(c.fmt, c.latent) for c in every if c.kind == "ungated"} >= set(
        product((None, FORMATS["fp8_ds_mla"]), (True, False))
    )
    indexers = {name for name in FORMATS if name.startswith("indexer")}
    assert {(c.fmt.name, c.other[1].name) for c in every if c.kind == "pair"} == {("fp8_ds_mla", name) for name in indexers}
    for c in every:
        if c.config is not None:
            assert choose(c.config.kind, c.spec, c.config.max_new_tokens, c.config.bucket) == c.config
            # The name and the allowance are those of the row that the kernel is compiled for.
            assert c.variant().registers == c.config.registers
            assert c.variant().num_warps == c.config.num_warps or c.other
    assert {dict(c.variant().constants)["ONE_PAGE"] for c in every if c.kind == "window"} == {True, False}
    for fmt in FORMATS.values():  # each preset with each format that it can have
        for spec in SPECS[:3]:
            if not fmt.head_dims or spec.head_dim in fmt.head_dims:
                assert any(c.spec == spec and c.fmt == fmt and c.kind != "store" for c in every), (fmt.name, spec)


def test_what_is_asked_for_is_compiled() -> None:
    v4, both = (V4_HCA, V4_CSA, V4_INDEXER), (torch.bfloat16, torch.float32)
    engine = [FORMATS["fp8_ds_mla_sglang"], FORMATS["indexer_fp8_sglang"]]
    found = list(combinations(v4, tuple(engine), both))
    assert len({c.name for c in found}) == len(found) and {c.spec for c in found} == set(v4)
    assert {c.fmt for c in found if c.config} == {c.fmt for c in found if c.snapshots} == set(engine)
    assert {(c.fmt, c.other[1]) for c in found if c.kind == "pair"} == {tuple(engine)}
    assert {c.dtype for c in found if c.kind in ("fold", "rows", "window", "pair")} == set(both)
    plain = [FORMATS["bf16"]]
    assert {(c.fmt, c.other[1]) for c in combinations(v4, tuple(plain)) if c.kind == "pair"} == {(plain[0], plain[0])}
    assert not any(c.kind == "pair" for c in combinations((V4_CSA,)))
    # A spec is in the name with all that it has: files of two specs are two files.
    likes = [{"rope_dim": 0}, {"norm_eps": 1e-5}, {"hadamard": True}, {"has_ape": False}, {"overlap": True}, {"ratio": 8}]
    specs = (CompressorSpec(128, 4), *(replace(CompressorSpec(128, 4), **like) for like in likes))
    found = list(combinations(specs, (None, FORMATS["bf16"])))
    assert len({c.name for c in found}) == len(found) == len({c.key() for c in found})
    assert not any(c.kind == "window" for c in combinations((CompressorSpec(128, 3),)))  # no kernel is configured for that


SAMPLE = """
import sys
from pathlib import Path
from test_aot import sample
from kvfold import aot
from kvfold.precompile import combinations as kernels

if __name__ == "__main__":
    jobs = sample()
    for target in kernels.TARGETS:
        kernels.combinations = lambda *_: [c for c, wanted in jobs if wanted == target]
        # With two, processes that are spawned.
        aot(target, Path(sys.argv[1]) / target, strict=False, workers=2 if target == "gfx942" else 1)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the sample for each target."""
    folder = tmp_path_factory.mktemp("aot")
    python(folder, SAMPLE, folder)
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_sample_compiles(target: str, built: Path) -> None:
    """To a file for each kernel, and a report that is true of it."""
    folder = built / target
    report = json.loads((folder / "kernels.json").read_text())
    wanted = [c for c, t in sample() if t == target]
    assert report["target"] == target and report["passed"] and not report["failed"]
    assert [kernel["name"] for kernel in report["kernels"]] == [c.name for c in wanted]
    versions = {"kvfold": kvfold.__version__, "torch": torch.__version__, "triton": triton.__version__}
    nvidia = target.startswith("sm_")
    assert report["versions"].items() >= versions.items() and ("ptxas" in report["versions"]) == nvidia
    files = {kernel["file"] for kernel in report["kernels"]} | {"kernels.json", "kernels.txt"}
    assert {path.name for path in folder.iterdir()} == files
    table = (folder / "kernels.txt").read_text().splitlines()
    for c, kernel, line in zip(wanted, report["kernels"], table[1:], strict=True):
        binary = (folder / kernel["file"]).read_bytes()
        assert kernel["file"].endswith(".cubin" if nvidia else ".hsaco") and binary.startswith(b"\x7fELF")
        assert kernel["bytes"] == len(binary) > 1000 and kernel["sha256"] == hashlib.sha256(binary).hexdigest()
        assert kernel["entry"].encode() in binary
        r, arguments = kernel["resources"], KERNELS[c.variant().kernel].arg_names
        assert 8 <= r["registers"] <= (255 if nvidia else 512) and r["warps"] == kernel["options"]["num_warps"]
        assert (r["scalar_registers"] > 0) == (not nvidia)
        assert r["stack"] or not r["spilled"]
        assert set(kernel["constants"]) | set(kernel["signature"]) == set(arguments)
        assert kernel["constants"].items() >= plain(c.variant().constants_for(TARGETS[target]), kernel["options"]).items()
        assert kernel["options"]["maxnreg"] == (c.variant().registers or None) or not nvidia
        assert line.startswith(kernel["name"]) and line.split()[-1] == str(len(binary))
        assert str(r["registers"]) in line.split()


STARVED = """
import sys
from dataclasses import asdict, replace
import json
import triton
from kvfold import CompressorSpec, aot
from kvfold.precompile import combinations as kernels
from kvfold.backend_triton import table as configs

configs.SPILLS_TRITON = ".".join(triton.__version__.split(".")[:2])
spec = CompressorSpec(128, 128)
row = configs.choose("fold", spec, 8)
made = []
for registers in (0, 32):
    starved = replace(row, registers=registers)
    configs.CONFIGS = tuple(starved if config == row else config for config in configs.CONFIGS)
    chosen = [c for c in kernels.combinations((spec,), (None,)) if c.config == starved and not (c.snapshots or c.apart)]
    kernels_of, kernels.combinations = kernels.combinations, lambda *_: chosen
    for strict in (None, True, False):
        report = aot("sm_90", sys.argv[1], strict=strict, workers=1)
        made.append((report.passed, [(k.allowed, k.resources.registers, k.resources.spilled) for k in report.kernels]))
    kernels.combinations, row = kernels_of, starved
print(json.dumps(made))
"""


def test_a_kernel_without_registers_is_found_spilling(tmp_path: Path) -> None:
    made = json.loads(python(tmp_path, STARVED, tmp_path / "out"))
    for strict, (passed, [(allowed, registers, spilled)]) in zip((None, True, False), made[:3], strict=True):
        assert passed and spilled == 0 and registers > 32 and allowed == (None if strict is False else 0)
    for strict, (passed, [(allowed, registers, spilled)]) in zip((None, True, False), made[3:], strict=True):
        assert spilled > 0 and registers <= 32 and passed == (strict is False) and allowed == (None if strict is False else 0)


def test_stores_to_the_stack_are_counted() -> None:
    sass = """
        /*0070*/  STL [R1+0x4], R5 ;             /*0080*/  @P0 STL.64 [R1], R4 ;      /*0090*/  STL.S16 [R1+0x10], R104 ;
        /*00a0*/  STL.128 [R1+0x20], R8 ;        /*00b0*/  LDL.LU R0, [R1] ;          /*00c0*/  STG.E.128 [R2], R8 ;
    """
    assert _stored(sass) == 4 + 8 + 2 + 16 and _stored("LDL R1, [R1] ;") == 0


def test_failures_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not compile is named, and the others are written."""
    fake(monkeypatch, {}, broken="mxfp4")
    told = []
    report = run("sm_90", tmp_path, progress=lambda *line: told.append(line))
    assert not report and not report.passed and set(report.failed) == {c.name for c in of_run() if "mxfp4" in c.name}
    assert set(report.failed.values()) == {"RuntimeError: no such instruction"} and "no such instruction" in str(report)
    assert [done for done, _, _ in told] == list(range(1, told[0][1] + 1)) and len(told) == told[0][1]
    table, saved = (tmp_path / "kernels.txt").read_text(), json.loads((tmp_path / "kernels.json").read_text())
    assert saved["failed"] == report.failed and not saved["passed"] and all(name in table for name in report.failed)
    assert len(list(tmp_path.glob("*.cubin"))) == len(report.kernels) == len(saved["kernels"]) > 3


def test_what_may_spill_is_of_a_row_and_sm_90(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = {c.name: c.spills for c in of_run()}
    assert {0} < set(allowed.values())
    monkeypatch.setattr(triton, "__version__", f"{SPILLS_TRITON}.1")
    for spills in sorted({*allowed.values(), max(allowed.values()) + 1}):
        fake(monkeypatch, {"mxfp4": spills})
        over = {name for name, most in allowed.items() if spills > most and "mxfp4" in name}
        report = run("sm_90", tmp_path / "sm_90")
        assert {k.name for k in report.spilling} == over and report.passed == (not over)
        assert all(name in str(report) for name in over)
        assert run("sm_80", tmp_path / "sm_80").passed  # no row was measured there
        assert run("sm_80", tmp_path / "sm_80", strict=True).passed == run("sm_90", tmp_path / "sm_90", strict=True).passed
        assert run("sm_90", tmp_path / "sm_90", strict=True).passed == (spills == 0)
        assert run("sm_90", tmp_path / "sm_90", strict=False)


@pytest.mark.parametrize("version", ["3.5.1", "3.60.0", "3.9.0", "4.3.6"])
def test_under_another_triton_spills_are_told_and_fail_nothing(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    fake(monkeypatch, {"mxfp4": 5000})
    report = run("sm_90", tmp_path)
    assert report.passed and any(kernel.resources.spilled == 5000 for kernel in report.kernels)
    assert "which fails nothing here" in str(report)
    assert not run("sm_90", tmp_path, strict=True)


def test_a_report_of_nothing_that_compiled(tmp_path: Path) -> None:
    """It does not say that spills fail nothing, where nothing says so."""
    report = AotReport("sm_90", tmp_path, {}, (), {"one": "it does not compile"})
    assert not report and str(report).splitlines() == [
        "sm_90: 0 of 1 kernels compiled, 0 spill, 0 of them more than they may",
        "one failed: it does not compile",
    ]


def test_only_rows_that_bound_registers_may_spill() -> None:
    for config in CONFIGS:
        assert config.registers or config.spills == config.pair_spills == config.engine_spills == 0
        assert config.pair_spills == 0 or config.kind == "rows"
        assert config.engine_spills == 0 or config.kind == "window"


WORST = """
import json, sys
from kvfold import aot
from kvfold.precompile import combinations as kernels
from kvfold.storage.formats import FORMATS

if __name__ == "__main__":
    every = [*kernels.combinations(), *kernels.combinations(formats=tuple(FORMATS.values()))]
    chosen = [c for c in dict.fromkeys(every) if c.name in sys.argv[2:]]
    kernels.combinations = lambda *_: chosen
    print(json.dumps({k.name: (k.resources.spilled, k.allowed) for k in aot("sm_90", sys.argv[1]).kernels}))
"""
# Of each row that may spill the kernel that spills most, alone, in a pair, and with an engine's tables.
_PAIR = "pair hd512 R4 overlap fp8_ds_mla {} hd128 R4 overlap hadamard {}"
MOST = (
    "fold hd512 R128 fp8_block128 ahead8 warps8 windows2",
    "fold hd512 R128 nvfp4_trtllm ahead4 warps4 apart",
    "mean hd512 R128 fp8_tensor ahead4 warps4 apart",
    "rows hd512 R4 overlap fp8_ds_mla ahead4 warps2 windows18",
    "rows hd512 R4 overlap mxfp4 ahead8 warps2 snapshots",
    _PAIR.format("ahead8 warps4 n8", "indexer_mxfp4_v41_sglang apart"),
    _PAIR.format("ahead4 warps2 windows18", "indexer_fp8_sglang"),
    _PAIR.format("ahead8 warps2", "indexer_mxfp4_v41_sglang apart"),
    "rows hd128 R4 overlap hadamard mxfp4 ahead8 warps1 apart",
    "window hd128 R4 overlap hadamard fp32 ahead4 warps1 n8 page4 apart",
    "window hd256 R4 overlap hadamard bf16 ahead4 warps2 n8 page4 apart",
    "window hd128 R4 overlap hadamard fp8_block128 ahead4 warps1 page4 apart",
    "window hd256 R4 overlap hadamard bf16 ahead4 warps2 page4",
    "window hd512 R4 overlap bf16 ahead4 warps4 page4",
    "window hd128 R128 indexer_mxfp4_v41_sglang ahead4 warps4 n8 page1 apart",
    "window hd256 R128 mxfp4 ahead4 warps4 n8 page1 apart",
    "window hd512 R128 v41_nvfp4_sglang ahead4 warps4 n8 page1 apart",
    "window hd128 R128 bf16_v41 ahead4 warps4 page1",
    "window hd256 R128 fp8_tensor_v41 ahead4 warps4 page1 apart",
    "window hd512 R128 v41_mxfp8_interleaved_sglang_fp4 ahead4 warps4 page1",
    "window hd128 R4 overlap hadamard rows ahead4 warps1 n8 page4 engine apart",
    "window hd256 R4 overlap hadamard fp8_tensor_v41 ahead4 warps2 n8 page4 ring apart",
    "window hd512 R4 overlap v41_mxfp8 ahead4 warps4 n8 page4 ring apart",
    "window hd128 R4 overlap hadamard indexer_fp8_vllm ahead4 warps1 page4 ring apart",
    "window hd256 R4 overlap hadamard fp8_tensor_v41 ahead4 warps2 page4 ring apart",
    "window hd512 R4 overlap v41_mxfp8_sglang ahead4 warps4 page4 ring apart",
    "window hd128 R128 indexer_mxfp4_v41_sglang ahead4 warps4 n8 page1 ring apart",
    "window hd256 R128 mxfp4 ahead4 warps4 n8 page1 ring apart",
    "window hd512 R128 mxfp4 ahead4 warps4 n8 page1 ring apart",
    "window hd128 R128 bf16_v41 ahead4 warps4 page1 ring apart",
    "window hd256 R128 mxfp4 ahead4 warps4 page1 ring apart",
    "window hd512 R128 v41_mxfp8_interleaved_sglang_fp4 ahead4 warps4 page1 ring apart",
)


@pytest.mark.skipif(not EXACT, reason=f"rows of the table say what Triton {SPILLS_TRITON} spills")
def test_rows_spill_what_the_table_says(tmp_path: Path) -> None:
    found = json.loads(python(tmp_path, WORST, tmp_path / "out", *MOST))
    assert set(found) == set(MOST) and all(spilled == allowed > 0 for spilled, allowed in found.values()), found
    assert sorted(allowed for _, allowed in found.values()) == sorted(
        spills for c in CONFIGS for spills in (c.spills, c.pair_spills, c.engine_spills) if spills
    )


DEPENDENT = """
import torch
from kvfold import CompressorSpec
from kvfold.precompile.combinations import TARGETS
from kvfold.backend_triton.table import ANY
from kvfold.backend_triton.keys import step_key
from kvfold.backend_triton.variants import variant_of
from kvfold.storage.formats import FORMATS
from kvfold.storage.fold_state import state_kind

types = (torch.bfloat16, torch.float32, None, torch.float32, True)
for head_dim, ratio, overlap, new, bucket in (
    (128, 1, False, 1, ANY), (128, 3, True, 4, ANY), (128, 5, False, 8, ANY), (128, 7, False, 64, ANY),
    (512, 48, False, 4, ANY), (512, 129, False, 129, 0.5),
):
    spec = CompressorSpec(head_dim, ratio, overlap)
    key = step_key(spec, FORMATS["bf16"], state_kind(spec), new, types, False, bucket)
    found = variant_of(key, True, True).compile(TARGETS["sm_90"]).asm["ptx"]
    fetches = "prefetch.global.L2" in found or "bulk.prefetch.L2" in found  # lines, or pieces
    print(found.count("griddepcontrol.wait") > 0, fetches)
"""


def test_dependent_launches_compile_for_any_ratio(tmp_path: Path) -> None:
    """What they fetch before they wait is counted by the ratio, and Triton's ranges are powers of two."""
    lines = [line.split() for line in python(tmp_path, DEPENDENT).splitlines()]
    assert [waits for waits, _ in lines] == ["True"] * 6
    assert [fetches for _, fetches in lines] == ["True", "True", "True", "False", "True", "True"]


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named, and nothing is written."""
    fake(monkeypatch, {})
    out = tmp_path / "out"
    for error, match, arguments in (
        (ValueError, r"\btarget\b.*sm_120.*gfx942.*'sm_70'", {"target": "sm_70"}),
        (TypeError, r"\btarget\b.*int", {"target": 90}),
        (TypeError, r"\bout_dir\b.*int", {"out_dir": 5}),
        (ValueError, r"\bformats\b.*'fp9'", {"formats": ["fp9"]}),
        (TypeError, r"\bformats\b.*'bf16'", {"formats": "bf16"}),
        (ValueError, r"\bformats\b.*indexer_mxfp4", {"formats": ["indexer_mxfp4"], "specs": [V4_HCA]}),
        (ValueError, r"\bformats\b.*none", {"formats": []}),
        (ValueError, r"\bspecs\b.*none", {"specs": []}),
        (TypeError, r"\bspecs\b.*str", {"specs": ["hca"]}),
        (ValueError, r"\bdtypes\b.*float16", {"dtypes": [torch.float16]}),
        (TypeError, r"\bstrict\b.*int", {"strict": 1}),
        (ValueError, r"\bworkers\b.*0", {"workers": 0}),
    ):
        with pytest.raises(error, match=match):
            kvfold.aot(**{"target": "sm_90", "out_dir": out, "specs": [V4_HCA], "formats": ["bf16"], **arguments})
    out.write_text("a file")
    with pytest.raises(ValueError, match=r"\bout_dir\b.*file"):
        run("sm_90", out)
    monkeypatch.setattr(build, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        run("sm_90", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and out.read_text() == "a file"


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from kvfold_cli.app import app

    def call(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["aot", *map(str, arguments), "--workers", "1"], env={"COLUMNS": "250"})
        return done.exit_code, done.output

    fake(monkeypatch, {"fp32": 400})
    monkeypatch.setattr(triton, "__version__", f"{SPILLS_TRITON}.1")
    code, said = call("sm_90", tmp_path / "a", "--spec", "hca", "--format", "bf16", "--format", "rows", "--dtype", "fp32")
    assert code == 0 and "fold hd512 R128 bf16 ahead1 warps4 n1 kv_fp32" in said and "registers" in said
    counts = [int(done) for done in re.findall(r"^(\d+) of \d+ kernels$", said, re.MULTILINE)]  # of a file there is no bar
    assert counts[0] == 1 and len(counts) == 11 and counts == sorted(counts), said
    assert (tmp_path / "a" / "fold-hd512-R128-rows-ahead1-warps4-n1-kv_fp32.cubin").exists()
    code, said = call("sm_90", tmp_path / "b", "--spec", "ratio=128,head_dim=64", "--format", "fp32")
    assert code == 1 and "fold hd64 R128 fp32 ahead1 warps1 n1 spills 400 bytes, 0 are allowed" in said
    assert call("sm_90", tmp_path / "b", "--spec", "hca", "--format", "fp32", "--no-strict")[0] == 0
    assert call("gfx942", tmp_path / "c", "--spec", "table", "--format", "fp32")[0] == 0
    assert call("gfx942", tmp_path / "c", "--spec", "hca", "--format", "fp32", "--strict")[0] == 1
    for arguments, words in (
        (("sm_70",), "sm_70"),
        (("sm_90", "--format", "fp9"), "fp9"),
        (("sm_90", "--spec", "cca"), "cca"),
        (("sm_90", "--dtype", "fp16"), "fp16"),
    ):
        code, said = call(arguments[0], tmp_path / "d", *arguments[1:])
        assert code == 2 and words in said
    monkeypatch.setattr(build, "INTERPRETED", True)
    code, said = call("sm_90", tmp_path / "d")
    assert code == 2 and "TRITON_INTERPRET" in said and not (tmp_path / "d").exists()
