"""The command line from end to end, on a short text: what it prints, what it draws, and when it fails."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
from rich.console import Console
from support.debug_support import Call
from typer.testing import CliRunner

import kvfold
from kvfold import integrations
from kvfold.backend_torch import fold as backend_torch
from kvfold.demo import run as demo
from kvfold.integrations import switch
from kvfold.integrations.transformers import step as transformers_step
from kvfold.integrations.vllm import plugin as vllm_plugin
from kvfold.storage.formats import FORMATS
from kvfold.testing import Step
from kvfold.verify.cases import Result
from kvfold_cli import bench, info, show, verify
from kvfold_cli.app import app

SMALL = ["--tokens", "200", "--decode", "14"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Entries are means. " * 20, encoding="ascii")
    return path


def call(*args, columns=140):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": str(columns)})


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drafts", [0, 3])
def test_demo_end_to_end(text, tmp_path, device, drafts):
    out = tmp_path / "new" / "out"
    result = call("demo", "--text", text, "--device", device, "--drafts", drafts, "--seed", 5, "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert "bit-identical to the plain run" in " ".join(result.output.split())
    assert "all agree" in result.output
    assert (out / "kvfold-demo.png").read_bytes().startswith(b"\x89PNG") and (out / "kvfold-demo.png").stat().st_size > 20_000


def test_what_systems_keep_differs_in_state_alone(text):
    """Entries are counted in one format on all sides, which the table and the picture name."""
    tokens = demo.read_text(text, 200)[0]
    result = demo.run(tokens, device="cpu", drafts=1, seed=5, advance=lambda n: None, decoded=4)
    kept = demo.kept_bytes(result)
    assert len(kept) == 3 and len({one.entries(200) for one in kept.values()}) == 1
    rows = sum(4 * spec.head_dim * (200 // spec.ratio) for spec in result.specs.values())
    assert kept["kvfold"].entries(200) == rows and demo.ENTRY_FORMAT == "fp32"


def test_the_picture_of_the_readme_is_small():
    assert (Path(__file__).parents[2] / "docs" / "kvfold-demo.png").stat().st_size < 300_000


def test_disagreement_fails(text, tmp_path, monkeypatch):
    real = transformers_step.step_even
    monkeypatch.setattr(transformers_step, "step_even", lambda kv, gate, *args: real(kv, gate * 1.01, *args))
    result = call("demo", "--text", text, "--out", tmp_path, *SMALL)
    assert result.exit_code == 1
    assert "entries differ by more than 0.0001" in result.output
    assert "bit-identical" in result.output and "not bit-identical" in " ".join(result.output.split())
    assert (tmp_path / "kvfold-demo.png").exists()


def test_wrong_arguments(text, tmp_path):
    for args, words in (
        (["--text", tmp_path / "none.txt"], "must name a file"),
        (["--text", text], "1500 bytes"),
        (["--text", text, "--device", "tpu", *SMALL], "--device"),
        (["--text", text, "--drafts", "-1"], "--drafts"),
    ):
        result = call("demo", *args, "--out", tmp_path)
        assert result.exit_code == 2 and words in result.output, result.output


def test_default_text_is_the_design():
    tokens, path = demo.read_text(None)
    assert path.name == "DESIGN.md" and tokens.shape == (1, demo.MOST_TOKENS)


def test_default_text_where_the_repository_is_not(tmp_path, monkeypatch):
    """A wheel has no DESIGN.md; one that lies where a wheel is installed is not ours."""
    installed = tmp_path / "lib" / "site-packages" / "kvfold" / "demo.py"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(Path(demo.__file__).read_bytes())
    (tmp_path / "lib" / "DESIGN.md").write_text("not ours " * 1000)
    monkeypatch.setattr(demo, "__file__", str(installed))
    tokens, path = demo.read_text(None)
    assert path == installed and tokens.shape == (1, demo.MOST_TOKENS)


def test_differences_do_not_hide_a_nan():
    assert not demo.largest(torch.tensor([0.0, float("nan")]), torch.zeros(2)) <= demo.BOUND
    assert demo.largest(torch.empty(0), torch.empty(0)) == 0


def test_greedy_tokens_may_differ_only_in_ties():
    theirs = torch.tensor([[1.0, 1.0 - demo.BOUND, 0.0], [1.0, 0.5, 0.0]])
    assert demo.unexcused(torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.5, 0.0]]), theirs) == 0
    assert demo.unexcused(torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.5, 0.0]]), theirs) == 1


def test_info_names_every_format_and_is_short():
    result = call("info", columns=80)
    assert result.exit_code == 0 and len(result.output.splitlines()) <= 60, result.output
    assert {*FORMATS} <= set(result.output.split()) and torch.__version__.split("+")[0] in result.output


def test_info_says_who_writes_a_format():
    rows = dict(info._names())
    assert "fp8_ds_mla" in rows["vLLM V4"].split() and "v41_nvfp4_sglang" in rows["SGLang V4.1"].split()
    assert all("bf16" in rows[engine].split() for engine in ("vLLM V4", "SGLang V4"))  # both write it


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("arguments", [("info",), ("info", "--formats"), ("info", "--kernels")])
def test_tables_are_whole_at_any_width(arguments, columns):
    output = call(*arguments, columns=columns).output
    assert "\u2026" not in output and max(map(len, output.splitlines())) <= columns
    words = set(output.split())
    if "--kernels" not in arguments:
        assert {*FORMATS} <= words and any("TensorRT-LLM" in word for word in words)
    else:
        assert {"fold", "mean", "rows", "window", "store", "16"} <= words


def test_a_row_without_room_keeps_all_that_tells_it_from_others(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    columns = ("name", "same for all", "of one", "bound")
    show.print_table(show.make_console(), "Title", columns, [("a", "x" * 9, "-", "1 to 2"), ("b", "x" * 9, "deed", "3 to 4")])
    lines = ["Title", "in each row", "  same for all: xxxxxxxxx", "a  bound: 1 to 2", "b  of one: deed;", "  bound: 3 to 4"]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("width", [60, 80])
def test_the_bar_says_what_is_left_and_fits(width):
    out = io.StringIO()
    with show.make_progress(Console(file=out, force_terminal=True, width=width)) as progress:
        task = progress.add_task("", total=4)
        progress.update(task, advance=1, description="a case whose name is longer than what there is room for " * 2)
    said = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    bar = next(line for line in said if "a case" in line)
    assert re.search(r"━ 1/4 \d:\d\d:\d\d left \S:\S\S:\S\S a case", bar) and len(bar) <= width, bar


def test_a_pipe_has_no_width(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    cells = ["word " * 20, "word " * 15]
    show.print_table(show.make_console(), "", ("first", "second"), [cells])
    assert cells[0].strip() in capsys.readouterr().out  # in one line


def test_make_demo_reads_the_text_that_is_named():
    root = Path(bench.__file__).parents[2]
    make = ["make", "--dry-run", "--no-print-directory", "-o", ".venv/.ready", "demo"]
    said = subprocess.run([*make, "TEXT=a text.txt"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith('kvfold demo --out demo-out --text "a text.txt"'), said
    said = subprocess.run(make, cwd=root, capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("kvfold demo --out demo-out"), said


def test_version():
    result = call("--version")
    assert (result.exit_code, result.output) == (0, f"kvfold {kvfold.__version__}\n")


def test_python_m_kvfold_and_missing_extras():
    run = [sys.executable, "-m", "kvfold"]
    assert "demo" in subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    hide = "import sys; sys.modules['typer'] = None; from kvfold_cli.__main__ import main; main()"
    missing = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert missing.returncode == 2 and "pip install 'kvfold[cli]'" in missing.stderr and "Traceback" not in missing.stderr


HELP = """
import sys
from kvfold_cli.__main__ import main
sys.argv = ["kvfold", *sys.argv[1:]]
try:
    main()
finally:
    print("imported:", *sorted({"torch", "triton", "kvfold"} & set(sys.modules)))
"""


@pytest.mark.parametrize("name", ["", "info", "verify", "explain", "replay", "bench", "warmup", "prebuild", "aot", "demo"])
def test_help_imports_no_torch(name):
    said = run_help(*filter(None, [name]), "--help")
    assert "Usage: kvfold" in said and said.endswith("imported:\n"), said


def test_the_version_imports_no_torch():
    assert run_help("--version") == f"kvfold {kvfold.__version__}\nimported:\n"


def test_other_commands_import_torch():
    assert re.search("^imported: kvfold torch", run_help("explain", "hca", "--start", "0", "--new", "1"), re.MULTILINE)


def run_help(*arguments):
    return subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=True).stdout


def test_info_shows_the_kernels_table():
    from kvfold.backend_triton.table import ROWS

    output = call("info", "--kernels", columns=200).output
    counts = {kind: sum(row[0].kind == kind for row in ROWS) for kind in ("fold", "mean", "rows", "window", "store")}
    assert {kind: output.count(f"│ {kind} ") for kind in counts} == counts and sum(counts.values()) == len(ROWS)
    narrow = call("info", "--kernels", columns=80).output
    assert {kind: len(re.findall(rf"^{kind}  \w", narrow, re.MULTILINE)) for kind in counts if kind != "store"} == {
        kind: count for kind, count in counts.items() if kind != "store"
    }


class Point:
    """The entry point of a plug-in, as an installed package has it."""

    name = "kvfold"

    def load(self):
        return vllm_plugin.load


def test_info_says_which_engines_run_on_kvfold(monkeypatch):
    monkeypatch.delenv("KVFOLD_ENGINES", raising=False)
    monkeypatch.setattr(integrations.metadata, "entry_points", lambda group: [Point()] if group.startswith("vllm") else [])
    lines = call("info", columns=200).output.splitlines()
    rows = {name: line for line in lines for name in ("vllm", "sglang") if line.startswith(f"│ {name} ")}
    assert "found" in rows["vllm"] and "missing" in rows["sglang"] and all("off" in row for row in rows.values())
    monkeypatch.setitem(switch.ON, "vllm", "all of it")
    assert "all of it" in call("info", columns=200).output


def test_info_says_why_an_engine_does_not(monkeypatch):
    monkeypatch.setenv("KVFOLD_ENGINES", "vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    monkeypatch.setattr(integrations.metadata, "entry_points", lambda group: [Point()] if group.startswith("vllm") else [])
    assert "not on: vllm must be installed" in call("info", columns=200).output
    monkeypatch.setattr(integrations.metadata, "entry_points", lambda group: [])
    assert "not loaded in this process" in call("info", columns=200).output


def test_verify_passes_and_fails(tmp_path, monkeypatch):
    out = tmp_path / "new" / "verify.json"
    arguments = ["verify", "--device", "cpu", "--backend", "torch", "--only", "indexer FoldState", "--json", out]
    result = call(*arguments)
    assert result.exit_code == 0 and "all 6 passed" in result.output, result.output
    rows = json.loads(out.read_text())
    assert rows["failed"] == 0 and len(rows["results"]) == 6
    assert all(row["passed"] and row["backend"] == "torch" for row in rows["results"])
    assert re.search(r"same bits as prefill +│ 6 +│ 0 +│ 0 +│ torch ", result.output), result.output
    real = backend_torch.fold_group
    monkeypatch.setattr(backend_torch, "fold_group", lambda *args: (*real(*args)[:2], real(*args)[2] * 1.01))
    result = call(*arguments)
    assert result.exit_code == 1 and "6 of 6 failed" in result.output
    assert "FAIL" in result.output and "sequence 0, window 0, channel" in result.output
    assert json.loads(out.read_text())["failed"] == 6


def test_verify_says_which_rows_ran_on_no_backend(tmp_path):
    """On the torch backend those of the kernels' table. In 80 columns figures are not torn."""
    out = tmp_path / "verify.json"
    arguments = ("--device", "cpu", "--backend", "torch", "--quick", "--only", "512", "--json", out)
    result = call("verify", *arguments, columns=80)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["results"]
    skipped = [row for row in found if row["skipped"]]
    assert 0 < len(skipped) < len(found) and {row["group"] for row in skipped} == {"table"}
    assert all(row["backend"] == ("" if row["skipped"] else "torch") for row in found)
    assert re.search(rf"rows of the kernels' table │ 0 +│ 0 +│ {len(skipped)} +│ none ", result.output), result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_a_line_of_verify_ends_before_its_figures(capsys, monkeypatch):
    for columns, lines in (("60", 2), ("120", 1)):
        monkeypatch.setenv("COLUMNS", columns)
        verify._show(show.make_console(), Result("format", "a name [of] some length", "9.4e-08, bits equal", 1.25), "torch")
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines and said[-1].endswith("9.4e-08, bits equal  1.2 s")
        assert said[0].startswith("pass format: a name [of] some length, torch")


def test_verify_refuses_wrong_arguments():
    for args, words in (
        (["--device", "tpu"], "--device"),
        (["--only", "no such case"], "--only"),
        (["--backend", "c"], "backend"),
    ):
        result = call("verify", *args)
        assert result.exit_code == 2 and words in result.output, result.output


def test_explain_prints_entries_rows_and_bytes():
    result = call("explain", "csa", "--start", 9, "--new", 4, "--format", "fp8_ds_mla")
    assert result.exit_code == 0, result.output
    for words in ("4..7", "8..11", "values 1152..1599", "scales 36880..36886", "can start at: 0, 8 to 13"):
        assert words in result.output
    said = call("explain", "v41-r2", "--start", 7, "--new", 2, "--state", "window", "--page-size", 2, "--ring", 3).output
    assert "WindowState of rings of 6 rows: 2 tokens" in said and "The next step can start at: 7 to 9" in said, said
    result = call("explain", "ratio=16,head_dim=64,rope_dim=16", "--start", 0, "--new", 900, "--state", "window")
    assert result.exit_code == 0 and "more" in result.output and "page 7, row 3" in result.output, result.output
    for spec, words in (
        ("cca", "SPEC"),
        ("ratio=4", "head_dim"),
        ("ratio=x,head_dim=64", "ratio"),
        ("ratio=4,head_dim=60", "head_dim"),
        ("ratio=4,head_dim=64,overlap=1", "overlap"),
    ):
        result = call("explain", spec, "--start", 0, "--new", 1)
        assert result.exit_code == 2 and words in result.output, result.output
    step = ("explain", "hca", "--start", 0, "--new", 1)
    for option, value in (("--start", -1), ("--new", 0), ("--format", "nope"), ("--state", "x"), ("--rows-per-page", 0)):
        result = call(*step, option, value)
        assert result.exit_code == 2 and f"Invalid value for {option}:" in result.output.replace("'", ""), result.output


def test_replay_says_what_a_call_was(tmp_path, monkeypatch):
    made, path = Call("csa", "fp8_ds_mla"), tmp_path / "call.safetensors"
    kvfold.dump(path, *made.args, **made.weights, full_history=made.history)
    result = call("replay", path, "--device", "cpu", "--check")
    assert result.exit_code == 0, result.output
    for words in (
        "compress, dumped on cpu", f"torch {torch.__version__}",
        "2 of 2 sequences, 12 tokens, 4 to 8 each; 4 windows, 3 entries",
        "head_dim=512, ratio=4", "kv_score: float32 [12, 2048], strides [2048, 1]", "fp8_ds_mla, 8 rows per page",
        "made again on cpu, backend torch: 0 refused", "equal", "3 of them against fp64",
    ):  # fmt: skip
        assert words in result.output, result.output
    real = backend_torch.fold_group
    monkeypatch.setattr(backend_torch, "fold_group", lambda *args: (*real(*args)[:2], real(*args)[2] * 1.01))
    result = call("replay", path, "--device", "cpu", "--check")
    assert result.exit_code == 1 and "DIFFERENT" in result.output and "sequence 0, window 1, channel" in result.output
    assert call("replay", path, "--device", "cpu").exit_code == 0
    result = call("replay", path, "--device", "cpu", "--max-bytes", "1000")
    assert result.exit_code == 2 and "max_bytes must be at least" in result.output, result.output
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors", None)
        result = call("replay", path)
    need = "kvfold replay: kvfold.dump and kvfold.replay need safetensors and numpy: pip install 'kvfold[debug]'\n"
    assert (result.exit_code, result.stderr) == (2, need)
    gone = tmp_path / "none"
    assert call("replay", gone).stderr == f"kvfold replay: {gone}: No such file or directory\n"
    path.write_bytes(path.read_bytes()[:-1])
    for args, words in (([path], "is damaged"), ([tmp_path / "none"], "none"), ([path, "--device", "tpu"], "tpu")):
        result = call("replay", *args)
        assert result.exit_code == 2 and words in result.output, result.output


def test_a_check_that_is_not_equal_is_no_success(tmp_path):
    """A call of which nothing is wrong but that a sequence was refused, and one that has only padding."""
    made, path = Call("csa", "fp8_ds_mla"), tmp_path / "call.safetensors"
    made.state.positions[2] = -1
    kvfold.dump(path, *made.args, **made.weights)
    result = call("replay", path, "--device", "cpu", "--check")
    assert result.exit_code == 1 and "REFUSED: 1 of 2 sequences" in result.output, result.output
    reason = "state slot 2 holds no row of positions 0 to 5, which a start at 6 needs; it is empty"
    assert f"sequence 0 is refused: {reason}" in result.output
    args, named = made.engine.arguments(Step(4, (), absent=(4, 4)))
    kvfold.dump(path, *args, **named)
    result = call("replay", path, "--device", "cpu", "--check")
    assert result.exit_code == 1 and "nothing compared" in result.output, result.output


def test_bench_needs_a_gpu_and_runs_the_scripts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("bench", "decode")
    assert result.exit_code == 2 and "needs a GPU" in result.output
    assert call("bench", "fly").exit_code == 2
    assert "--out" in call("bench", "decode", "--plot", tmp_path / "x.png").output
    assert "--quick is for" in call("bench", "store", "--quick").output
    assert all((bench.folder() / file_of(name)).is_file() for name in bench.MODULES.values())
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "run", lambda *args: ran.append(args) or len(ran) // 3)
    out, picture = tmp_path / "x.jsonl", tmp_path / "x.png"
    assert call("bench", "decode", "--quick", "--out", out, "--plot", picture).exit_code == 0
    assert ran == [
        ("run.decode", "--quick", "--out", str(out)),
        ("publish.plot", "--rows", str(out), "--picture", str(picture)),
    ]
    assert call("bench", "plan").exit_code == 1 and ran[-1] == ("run.overhead",)
    monkeypatch.setattr(bench, "PACKAGE", bench.folder().parent)  # as in a wheel, whose rows name the version
    call("bench", "store")
    assert ran[-1][:2] == ("run.store", "--commit") and ran[-1][2].startswith("kvfold 0.")


def test_bench_draws_rows_and_hands_on_the_exit_code(tmp_path):
    results = bench.folder() / "results" / "decode.jsonl"
    assert bench.run("publish.plot", "--rows", str(results), "--picture", str(tmp_path / "a" / "x.png")) == 0
    assert (tmp_path / "a" / "x.png").read_bytes().startswith(b"\x89PNG")
    assert bench.run("publish.plot", "--rows", str(results)) == 2


def file_of(module: str) -> str:
    """Where a module is below benchmarks/."""
    return f"{module.replace('.', '/')}.py"


def test_the_wheel_carries_what_the_benchmarks_import():
    """The list in pyproject.toml has each module that is run, its packages, and all that it imports of benchmarks/."""
    text = (Path(bench.__file__).parents[2] / "pyproject.toml").read_text()
    carried = set(re.findall(r'^"benchmarks/(\S+)" = "kvfold/benchmarks/\1"$', text, re.MULTILINE))
    assert carried >= {*map(file_of, bench.MODULES.values()), file_of("publish.plot"), "peers_h200.jsonl", "__init__.py"}
    there = {path.relative_to(bench.folder()).as_posix() for path in bench.folder().rglob("*.py")}
    for name in carried - {"peers_h200.jsonl"}:
        own = name.split("/")[:-1]
        assert "/".join((*own, "__init__.py")) in carried, name
        imports = re.findall(r"^from (\.+)([\w.]*) import (.+)", (bench.folder() / name).read_text(), re.MULTILINE)
        for dots, module, names in imports:
            start = [*own[: len(own) - len(dots) + 1], *filter(None, module.split("."))]
            wanted = {file_of(".".join(start)), *(file_of(".".join((*start, word))) for word in names.split(", "))}
            assert wanted & there and wanted & there <= carried, (name, module, names)
