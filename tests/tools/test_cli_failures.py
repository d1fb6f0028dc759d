"""Commands on full disks, closed pipes and wrong paths: one line on stderr, an exit code, and no file half-written."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from kvfold import aot as compile_all
from kvfold.arguments.files import check_writable, write_atomically
from kvfold.demo import plot as demo_plot
from kvfold.demo import run as demo
from kvfold.verify import run as verify_run
from kvfold_cli import bench, failures
from kvfold_cli.app import app

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": ""}
KVFOLD = [sys.executable, "-m", "kvfold"]


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def refused(*arguments: object) -> str:
    """What a command that cannot run says: one line."""
    code, _, said = call(*arguments)
    assert code == 2 and said.count("\n") == 1 and said.startswith(("kvfold", "root")), (code, said)
    return said


# write_atomically


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("x"), KeyboardInterrupt()])
def test_a_file_is_whole_or_as_it_was(tmp_path: Path, before: str | None, error: BaseException) -> None:
    path = tmp_path / "new" / "a.png" if before is None else tmp_path / "a.png"
    if before is not None:
        path.write_text(before)
        path.chmod(0o640)
    with pytest.raises(type(error)) as raised, write_atomically(path) as beside:
        assert beside.parent == path.parent and beside.suffix == ".png" and beside != path
        beside.write_text("half")
        raise error
    assert (path.read_text() if path.exists() else None) == before
    assert os.listdir(path.parent) == ([] if before is None else ["a.png"])
    if isinstance(error, OSError):
        assert raised.value.filename == str(path)  # which a full disk does not say
    with write_atomically(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["a.png"]
    if before is not None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_links_and_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with write_atomically(tmp_path / "link") as beside:
        beside.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    device = os.stat("/dev/null")
    with write_atomically("/dev/null") as beside:
        beside.write_text("x")
    assert os.path.samestat(device, os.stat("/dev/null")) and stat.S_ISCHR(device.st_mode)
    check_writable("/dev/null")
    for check in (check_writable, lambda path: write_atomically(path).__enter__()):
        with pytest.raises(IsADirectoryError, match="folder"):
            check(tmp_path)
        with pytest.raises(OSError, match="real/below"):
            check(tmp_path / "real" / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(PermissionError, match="real"):
        check_writable(tmp_path / "real")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


# In processes: what the interpreter does at its end belongs to it.


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [("info",), ("--help",)])
def test_a_full_disk_behind_the_output(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*KVFOLD, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and re.fullmatch(r".*kvfold.*: standard output: No space left on device\n", done.stderr)


def test_a_closed_pipe() -> None:
    """Ends it without a word, and not as a success: the pipeline got less than all."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*KVFOLD, "info"], stdout=write, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    os.close(write)
    assert (done.returncode, done.stderr) == (failures.PIPE_CLOSED, "")


def test_an_interrupt(tmp_path: Path) -> None:
    """Of a run that is under way; its file is not begun."""
    out = tmp_path / "new.json"
    command = [*KVFOLD, "verify", "--device", "cpu", "--backend", "torch", "--json", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits that it is ignored
    )  # fmt: skip
    assert process.stdout is not None and "cases" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == failures.INTERRUPTED and re.fullmatch(r".*kvfold verify: interrupted\n", said)
    assert os.listdir(tmp_path) == []


# In this process.


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Entries are means. " * 100)
    return path


def test_paths_that_cannot_be(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder where a file is meant, and a file where a folder is: before any work is done."""
    for module, name in ((verify_run, "verify_random"), (demo, "run"), (bench, "run")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work was begun"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for arguments in (
        ("verify", "--json", tmp_path),
        ("verify", "--json", text / "below.json"),
        ("verify", "--random", 2, "--json", tmp_path),
        ("demo", "--text", text, "--tokens", 200, "--decode", 14, "--out", text),
        ("demo", "--text", text, "--tokens", 200, "--decode", 14, "--out", text / "below"),
        ("demo", "--text", tmp_path),
        ("replay", tmp_path),
        ("replay", text / "below"),
        ("replay", tmp_path / "none"),
        ("replay", text),
    ):
        assert str(tmp_path) in refused(*arguments), arguments
    monkeypatch.setattr("kvfold.backend_triton.build.INTERPRETED", False)
    assert str(text) in refused("aot", "sm_90", text, "--spec", "hca", "--format", "bf16")
    assert str(text) in refused("aot", "sm_90", text / "below", "--spec", "hca", "--format", "bf16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert str(tmp_path) in refused("bench", "decode", "--out", tmp_path)
    assert str(text) in refused("bench", "decode", "--out", text / "below")
    assert os.listdir(tmp_path) == ["text.txt"]


def test_files_that_may_not_be_read(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    for name in ("open", "read_bytes", "read_text"):
        monkeypatch.setattr(Path, name, denied)
    assert f"{text}: Permission denied" in refused("demo", "--text", text)
    assert str(text) in refused("replay", text)


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_becomes_full(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays, and nothing is left beside it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "verify.json").write_text("old")
    (out / "kvfold-demo.png").write_text("old")
    monkeypatch.setattr(demo_plot, "draw", _full)
    said = refused("demo", "--text", text, "--tokens", 200, "--decode", 14, "--out", out)
    assert f"{out / 'kvfold-demo.png'}: No space left" in said
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", _full)
        said = refused("verify", "--device", "cpu", "--backend", "torch", "--only", "csa FoldState: chunks", "--json",
                       out / "verify.json")  # fmt: skip
        assert f"{out / 'verify.json'}: No space left" in said
        patch.setattr("kvfold.backend_triton.build.INTERPRETED", False)
        module = sys.modules[compile_all.__module__]
        patch.setattr(module, "_compile", lambda wanted, *_: iter(["does not compile"] * len(wanted)))
        refused("aot", "sm_90", out, "--spec", "hca", "--format", "bf16")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"verify.json": "old", "kvfold-demo.png": "old"}


def test_nonsense_is_refused_by_name(tmp_path: Path, text: Path) -> None:
    """Each option with each value that it cannot have."""
    explain = ("explain", "csa", "--start", 0, "--new", 1)
    numbers = ("-1", "nan", "1e400", "x", "", "9" * 30)
    spoiled: list[tuple[tuple[object, ...], str, tuple[str, ...]]] = [
        (("demo", "--text", text), "--drafts", (*numbers, "65")),
        (("demo", "--text", text), "--seed", numbers),
        (("demo", "--text", text), "--device", ("tpu", "", "cuda:99")),
        (("verify",), "--device", ("tpu", "", "meta")),
        (("verify",), "--backend", ("c", "")),
        (("verify",), "--random", (*numbers, "0")),
        (("verify", "--random", 1), "--seed", numbers),
        (("verify", "--random", 1), "--first", numbers),
        (("verify", "--random", 1), "--workers", (*numbers, "0", "257")),
        (("verify",), "--only", ("no such case",)),
        (explain, "--start", numbers),
        (explain, "--new", (*numbers, "0")),
        (explain, "--max-new-tokens", (*numbers, "0")),
        (explain, "--rows-per-page", (*numbers, "0")),
        ((*explain, "--state", "window"), "--page-size", (*numbers, "0")),
        ((*explain, "--state", "window"), "--ring", numbers),
        (explain, "--format", ("fp9", "")),
        (explain, "--state", ("x", "")),
        (("aot", "sm_90", tmp_path / "new"), "--workers", (*numbers, "0", "257")),
        (("aot", "sm_90", tmp_path / "new"), "--dtype", ("fp16", "")),
        (("aot", "sm_90", tmp_path / "new"), "--format", ("fp9", "")),
        (("aot", "sm_90", tmp_path / "new"), "--spec", ("cca", "", "ratio=nan,head_dim=64", f"ratio={'9' * 5000},head_dim=64")),
        (("info",), "--nonsense", ("1",)),
    ]  # fmt: skip
    for good, option, values in spoiled:
        for value in values:
            said = refused(*good, option, value)
            assert option.lstrip("-").replace("-", "_") in said.replace("-", "_"), (option, value, said)
    for good in (("explain", "", "--start", 0, "--new", 1), ("bench", "fly"), ("aot", "sm_70", tmp_path / "new"), ("nope",)):
        refused(*good)
    assert os.listdir(tmp_path) == ["text.txt"]
