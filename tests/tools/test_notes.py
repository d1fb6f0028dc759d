"""The index of the notes and the notes agree, and code names no note that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTES = ROOT / "docs" / "notes"
FILES = sorted(path for path in NOTES.glob("*.md") if path.name != "README.md")
ROW = re.compile(r"^\| \[(\d{4})\]\((\S+)\) \| (.+?) \| (.+?) \|$", re.MULTILINE)


def test_index_and_notes_agree() -> None:
    """Each note is in the index once, in order of numbers, by its title."""
    rows = ROW.findall((NOTES / "README.md").read_text())
    assert [name for _, name, _, _ in rows] == [path.name for path in FILES]
    for number, name, title, _ in rows:
        assert re.fullmatch(rf"{number}-[a-z0-9-]+\.md", name)
        assert (NOTES / name).read_text().startswith(f"# {title}\n"), name
    numbers = [number for number, _, _, _ in rows]
    assert len(set(numbers)) == len(numbers) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_note_says_what_was_asked_and_what_came_of_it(path: Path) -> None:
    text = path.read_text()
    where = [re.search(rf"(^|\W){word}", text, re.MULTILINE) for word in ("Question:", "Device:", "Verdict:")]
    assert all(where), path.name
    assert where[0].start() < where[1].start() < where[2].start(), path.name
    assert re.search("commit", text, re.IGNORECASE), path.name


def test_code_names_notes_that_are_there() -> None:
    known = {path.name[:4] for path in FILES}
    paths = [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "DESIGN.md",
    ]
    named = {number for path in paths for number in re.findall(r"\bnotes? (\d{4})\b", path.read_text())}
    assert named and named <= known, named - known


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.name)
def test_prose_fits_a_screen(path: Path) -> None:
    """Lines of at most 128 columns, but for tables, code and what is printed from results."""
    text = re.sub(r"<!-- made: .*?<!-- end -->|^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    long = [line for line in text.splitlines() if len(line) > 128 and not line.startswith("|")]
    assert not long, long[0]
