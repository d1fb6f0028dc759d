"""The folder of `aot`: only what it wrote is removed or replaced, whatever else is there and whatever its report says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.aot_support import fake, run

import kvfold
from kvfold import V4_INDEXER
from kvfold.precompile import combinations as kernels


def test_files_of_an_earlier_report_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, {})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".aot-left").mkdir()  # by a run that was killed
    (tmp_path / ".aot-left" / "x.cubin").write_bytes(b"half")
    kvfold.aot("sm_90", tmp_path, [V4_INDEXER], ["bf16"], workers=1)
    report = run("sm_90", tmp_path)
    written = {kernel.file for kernel in report.kernels}
    assert {path.name for path in tmp_path.iterdir()} == written | {"kernels.json", "kernels.txt", "notes.txt"}
    with pytest.raises(ValueError, match=r"\bout_dir\b.*sm_90"):
        run("sm_80", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= written
    for text in ("{", "[]", '{"target": "sm_90", "kernels": [{}]}'):
        (tmp_path / "kernels.json").write_text(text)
        with pytest.raises(ValueError, match=r"\bout_dir\b.*kernels\.json"):
            run("sm_90", tmp_path)


# Each makes something of a folder that `aot` wrote, and says which of the paths in it or beside it must be as they were.


def _foreign_names(folder: Path) -> None:
    outside = folder.parent / "outside.cubin"
    outside.write_bytes(b"binary")
    (folder / "notes.txt").write_bytes(b"binary")
    (folder / "under").mkdir()
    (folder / "under" / "x.cubin").write_bytes(b"binary")
    (folder / ".hidden.cubin").write_bytes(b"binary")
    names = [
        "../outside.cubin",
        str(outside),
        "under/x.cubin",
        "notes.txt",
        "under",
        ".",
        "..",
        "",
        ".hidden.cubin",
        "a\\b.cubin",
    ]
    _list(folder, *names)


def _list(folder: Path, *names: str) -> None:
    """Has `kernels.json` say that these were written, with the hash that they have."""
    report = json.loads((folder / "kernels.json").read_text())
    row = {"sha256": hashlib.sha256(b"binary").hexdigest()}
    report["kernels"] += [{**row, "file": name} for name in names]
    (folder / "kernels.json").write_text(json.dumps(report))


def _links(folder: Path) -> None:
    """To a file, to a folder, and to nothing; what the first leads to has the right hash."""
    (folder.parent / "target.cubin").write_bytes(b"binary")
    (folder.parent / "place").mkdir()
    (folder / "a.cubin").symlink_to(folder.parent / "target.cubin")
    (folder / "b.cubin").symlink_to(folder.parent / "place")
    (folder / "c.cubin").symlink_to(folder.parent / "nothing")
    _list(folder, "a.cubin", "b.cubin", "c.cubin")


def _edited(folder: Path) -> None:
    (folder / "mine.cubin").write_bytes(b"binary and more")
    _list(folder, "mine.cubin")


def _a_folder_where_a_file_was(folder: Path) -> None:
    (folder / "mine.cubin").mkdir()
    (folder / "mine.cubin" / "x").write_text("x")
    _list(folder, "mine.cubin")


def everything(folder: Path) -> dict[str, object]:
    """All that there is, links not followed."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        found[str(path.relative_to(folder))] = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        )
    return found


@pytest.mark.parametrize("change", [_foreign_names, _links, _edited, _a_folder_where_a_file_was])
def test_only_files_that_aot_wrote_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """Whatever `kernels.json` lists: by name and hash, inside of the folder, no links. What was changed is named."""
    fake(monkeypatch, {})
    folder = tmp_path / "out"
    kvfold.aot("sm_90", folder, [V4_INDEXER], ["bf16"], workers=1)
    first = set(everything(folder))
    change(folder)
    before = {name: what for name, what in everything(tmp_path).items() if name.removeprefix("out/") not in first}
    report = run("sm_90", folder)
    after = everything(tmp_path)
    assert {name: after.get(name, "gone") for name in before} == before
    written = {f"out/{k.file}" for k in report.kernels} | {"out/kernels.json", "out/kernels.txt", "out"}
    assert set(after) == set(before) | written  # of the first report nothing is left, nor of the work
    kept = {_links: ("a.cubin", "b.cubin", "c.cubin"), _foreign_names: ()}.get(change, ("mine.cubin",))
    assert report.kept == kept and all(f"{name} was changed since aot wrote it" in str(report) for name in kept)


@pytest.mark.parametrize("what", ["link", "huge", "deep", "pipe", "folder", "no table", "number"])
def test_a_kernels_json_that_aot_did_not_write_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Before anything is compiled or removed."""
    fake(monkeypatch, {})
    folder = tmp_path / "out"
    run("sm_90", folder)
    path, text = folder / "kernels.json", (folder / "kernels.json").read_text()
    path.unlink()
    match what:
        case "link":
            (tmp_path / "other.json").write_text(text)
            path.symlink_to(tmp_path / "other.json")
        case "huge":
            with path.open("wb") as file:
                file.truncate((1 << 26) + 1)
        case "deep":
            path.write_text("[" * 200_000)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "no table":
            path.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "table"}))
        case "number":
            path.write_text(json.dumps({**json.loads(text), "kernels": [{"file": 5, "sha256": "0"}]}))
    before = sorted(os.listdir(folder))
    with pytest.raises(ValueError, match=r"\bout_dir\b.*kernels\.json.*aot did not write"):
        run("sm_90", folder)
    assert sorted(os.listdir(folder)) == before


def test_a_file_of_another_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, {})
    report = run("sm_90", tmp_path / "sample")
    name = report.kernels[0].file
    for taken in (name, "kernels.txt"):
        folder = tmp_path / f"with {taken}"
        folder.mkdir()
        (tmp_path / "elsewhere").write_text("mine")
        for make in (lambda p: p.write_text("mine"), lambda p: p.symlink_to(tmp_path / "elsewhere"), Path.mkdir):
            make(folder / taken)
            before = everything(tmp_path)
            with pytest.raises(ValueError, match=rf"\bout_dir\b.*{name.split('.')[0] if taken == name else 'kernels.txt'}"):
                run("sm_90", folder)
            assert everything(tmp_path) == before
            (folder / taken).rmdir() if (folder / taken).is_dir() else (folder / taken).unlink()
    (tmp_path / "sample" / name).write_text("edited")  # one of ours, as it is not any more
    with pytest.raises(ValueError, match="changed since"):
        run("sm_90", tmp_path / "sample")
    assert (tmp_path / "sample" / name).read_text() == "edited"


def test_a_folder_that_is_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is the caller's way to say where files go: they go there, and the link stays."""
    fake(monkeypatch, {})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        report = run("sm_90", tmp_path / "link")
    assert report.folder == tmp_path / "real" and (tmp_path / "link").is_symlink()
    assert {path.name for path in report.folder.iterdir()} == {k.file for k in report.kernels} | {"kernels.json", "kernels.txt"}


def test_an_earlier_report_stays_until_all_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, {})
    run("sm_90", tmp_path)
    before = everything(tmp_path)

    def full(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "build", full)
    with pytest.raises(KeyboardInterrupt):
        run("sm_90", tmp_path)
    assert everything(tmp_path) == before
