"""The command line from end to end, on a short text: what it prints, what it draws, and when it fails."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
from typer.testing import CliRunner

from kvfold import demo
from kvfold.cli import app
from kvfold.integrations import transformers_cache
from kvfold.records import FORMATS

SMALL = ["--tokens", "200", "--decode", "14"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Entries are means. " * 20, encoding="ascii")
    return path


def call(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "140"})


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


def test_disagreement_fails(text, tmp_path, monkeypatch):
    real = transformers_cache.compress
    monkeypatch.setattr(transformers_cache, "compress", lambda rows, *args, **kwargs: real(rows * 1.01, *args, **kwargs))
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


def test_differences_do_not_hide_a_nan():
    assert not demo.largest(torch.tensor([0.0, float("nan")]), torch.zeros(2)) <= demo.BOUND
    assert demo.largest(torch.empty(0), torch.empty(0)) == 0


def test_greedy_tokens_may_differ_only_in_ties():
    theirs = torch.tensor([[1.0, 1.0 - demo.BOUND, 0.0], [1.0, 0.5, 0.0]])
    assert demo.unexcused(torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.5, 0.0]]), theirs) == 0
    assert demo.unexcused(torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.5, 0.0]]), theirs) == 1


def test_info_names_every_format():
    result = call("info")
    assert result.exit_code == 0
    assert all(name in result.output for name in FORMATS) and torch.__version__.split("+")[0] in result.output


def test_python_m_kvfold_and_missing_extras():
    run = [sys.executable, "-m", "kvfold"]
    assert "demo" in subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    hide = "import sys; sys.modules['typer'] = None; from kvfold.__main__ import main; main()"
    missing = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True)
    assert missing.returncode == 1 and "pip install 'kvfold[cli]'" in missing.stderr and "Traceback" not in missing.stderr
