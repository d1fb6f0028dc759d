"""The index of the notes and the notes agree."""

from __future__ import annotations

import re
from pathlib import Path

NOTES = Path(__file__).parents[2] / "docs" / "notes"
ROW = re.compile(r"^\| \[(\d{4})\]\((\d{4}-[a-z0-9-]+\.md)\) \| (.+?) \| (.+) \|$", re.MULTILINE)
FORM = re.compile(r"# (\d{4}): (.+)\n\n\*\*Verdict\.\*\* ((?:.+\n)+)\n((?:- .+\n(?:  .+\n)*)+)")


def test_index_and_notes_agree() -> None:
    """Each note is in the index once, in order of numbers, by its title and its verdict."""
    rows = ROW.findall((NOTES / "README.md").read_text())
    files = sorted(path.name for path in NOTES.glob("*.md") if path.name != "README.md")
    assert [name for _, name, _, _ in rows] == files and len({name[:4] for name in files}) == len(files) > 0
    for number, name, title, verdict in rows:
        found = FORM.match((NOTES / name).read_text())
        assert found, f"{name} is not of the form in README.md"
        assert number == name[:4] == found[1], name
        assert (title, verdict) == (found[2], " ".join(found[3].split())), name


def test_notes_say_what_was_asked_and_where() -> None:
    for path in NOTES.glob("[0-9]*.md"):
        found = FORM.match(path.read_text())
        assert found, path.name
        assert re.findall(r"^- (\w+):", found[4], re.MULTILINE) == ["Question", "Commit", "Device"], path.name


def test_code_names_notes_that_are_there() -> None:
    root = NOTES.parents[1]
    known = {path.name[:4] for path in NOTES.glob("[0-9]*.md")}
    paths = [
        *(root / "src").rglob("*.py"),
        *(root / "benchmarks").rglob("*.py"),
        root / "DESIGN.md",
        *(root / "docs").glob("*.md"),
    ]
    named = {number for path in paths for number in re.findall(r"\bnotes? (\d{4})\b", path.read_text())}
    assert named and named <= known, named - known
