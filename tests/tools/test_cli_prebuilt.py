"""`kvfold warmup`, `prebuild` and what `info` says of packages; the wheel that is made of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner, Result

from kvfold.backend_triton import prebuilt
from kvfold.precompile.combinations import TARGETS
from kvfold.precompile.sets import SETS
from kvfold_cli.app import app
from kvfold_cli.sets import NAMES

ROOT = Path(__file__).parents[2]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def package(folder: Path, **other: object) -> Path:
    """One that is whole, with a binary of no kernel; other: facts that differ from those here."""
    binary = b"binary"
    one = prebuilt.Binary(hashlib.sha256(binary).hexdigest(), "plan_kernel", {"shared": 16})
    facts = prebuilt.facts_of(TARGETS["sm_90"], 132)._replace(**other)
    folder.mkdir(parents=True)
    (folder / one.sha256).write_bytes(binary)
    manifest = prebuilt.manifest_of(facts, {"0" * 64: one}, {"kvfold": "1.2.3"})
    (folder / prebuilt.MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def put(*folders: Path) -> None:
        monkeypatch.setattr(prebuilt, "_folders", [])
        monkeypatch.setattr(prebuilt, "_installed", lambda: folders)

    return put


def test_info_says_which_packages_there_are(tmp_path: Path, installed: Callable[..., None]) -> None:
    installed()
    assert "Prebuilt kernels" not in call("info").output
    older, damaged = package(tmp_path / "older", triton="3.4.0", sources="0" * 64), package(tmp_path / "damaged")
    (damaged / prebuilt.MANIFEST).write_text("{}")
    installed(package(tmp_path / "right"), older, damaged)
    said = " ".join(call("info").output.split())
    assert "Prebuilt kernels" in said and "sm_90, 132 multiprocessors, Triton 3.4.0" in said
    for words in ("there '3.4.0'", "sources of kvfold's kernels are others", "is not of form 1"):
        assert all(word in said for word in words.split())
    assert said.count("no:") >= 2


@pytest.mark.parametrize("name", ["[bold]x[/y]", "\x1b[31m", os.fsdecode(b"\xff")], ids=["markup", "escape", "bytes"])
@pytest.mark.parametrize("width", [200, 40])
def test_info_prints_any_folder(tmp_path: Path, installed: Callable[..., None], name: str, width: int) -> None:
    installed(package(tmp_path / name))
    done = CliRunner().invoke(app, ["info"], env={"COLUMNS": str(width)})
    said = "".join(done.output.split())
    assert done.exit_code == 0 and ascii(name)[1:-1] in said.replace("│", "") and "\x1b" not in said


def test_warmup_says_what_it_did(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[dict] = []

    def warmup(**arguments: object) -> int:
        show = arguments.pop("progress")
        show(0, 2, "2 kernels, 1 of them prebuilt; the others take about 3 s")
        show(1, 2, "plan")
        given.append(arguments)
        return 2

    monkeypatch.setattr(sys.modules["kvfold.precompile.warmup"], "warmup", warmup)
    done = call("warmup", "--workers", 3)
    assert done.exit_code == 0, done.output
    assert "about 3 s\n1 of 2 kernels\n" in done.output and "4 kernels, 0 of them prebuilt" in done.output
    assert given == [{**calls, "device": None, "workers": 3} for calls in SETS["v4"]]
    failed = call("warmup", "--prebuilt", tmp_path)
    assert failed.exit_code == 2 and len(given) == 2


def test_prebuild_compiles_a_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[tuple] = []
    monkeypatch.setattr(
        sys.modules["kvfold.precompile.prebuild"], "prebuild", lambda *arguments, **more: given.append((*arguments, more)) or 7
    )
    done = call("prebuild", "sm_90", tmp_path, "--multiprocessors", 114)
    assert done.exit_code == 0 and "7 kernels in" in done.output
    target, folder, calls, more = given[0]
    assert (target, folder, calls, more["multiprocessors"]) == ("sm_90", tmp_path, SETS["v4"], 114)
    call("prebuild", "sm_90", tmp_path, "--set", "vllm", "--set", "v4", "--set", "vllm")
    assert given[1][2] == (*SETS["vllm"], *SETS["v4"])
    for command in (("warmup",), ("prebuild", "sm_90", tmp_path), ("aot", "sm_90", tmp_path)):
        failed = call(*command, "--set", "v5")
        assert failed.exit_code == 2 and "--set must be" in failed.output
    assert len(given) == 2


def test_help_names_the_sets_without_torch() -> None:
    assert NAMES.replace(" or ", ", ").split(", ") == list(SETS)
    assert all(name in " ".join(call("prebuild", "--help").output.split()) for name in SETS)


def wheel(folder: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "packaging" / "kernels.py"), str(folder), str(out)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_wheel_of_packages(tmp_path: Path) -> None:
    """Has their files and nothing that runs."""
    pytest.importorskip("hatchling")
    folders = [package(tmp_path / "built" / "a", triton="3.6.0"), package(tmp_path / "built" / "b", triton="3.9.0")]
    done = wheel(tmp_path / "built", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "out").iterdir()
    assert made.name.startswith("kvfold_kernels_sm_90") and made.name.endswith("-1.2.3-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {
            f"kvfold_kernels/sm_90-132-triton{version}/{path.name}"
            for version, folder in zip(("3.6.0", "3.9.0"), folders, strict=True)
            for path in folder.iterdir()
        }
        archive.extractall(tmp_path / "site")
    read = [prebuilt.read(path.parent) for path in sorted((tmp_path / "site").glob(f"*/*/{prebuilt.MANIFEST}"))]
    assert [one.facts.triton for one in read] == ["3.6.0", "3.9.0"] and not any(one.damaged for one in read)


def test_a_wheel_of_what_does_not_go_together(tmp_path: Path) -> None:
    assert "found none" in wheel(tmp_path, tmp_path / "out").stderr
    package(tmp_path / "a"), package(tmp_path / "b")
    assert "one package for each target and Triton" in wheel(tmp_path, tmp_path / "out").stderr
