"""The documents as a static site: `python packaging/make_site.py FOLDER`, or `make site`; needs the extra `site`.

README.md is its first page, docs/ and DESIGN.md the others. The API reference is made of docstrings. A link that leads nowhere
is an error, and so is a public name whose docstring cannot be read.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "DESIGN.md": "DESIGN.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
}
ITEM = re.compile(r"(?:[-*]|\d+\.) ")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def assemble(folder: Path) -> None:
    """The site's sources: docs/ as it is, and the pages beside it with their links turned."""
    shutil.copytree(ROOT / "docs", folder)
    for source, target in PAGES.items():
        (folder / target).write_text(spaced(turned((ROOT / source).read_text(), "")))
    for page in folder.rglob("*.md"):
        if page.name not in PAGES.values():
            page.write_text(spaced(turned(page.read_text(), page.relative_to(folder).parent.as_posix())))


def spaced(text: str) -> str:
    """With an empty line before each list: forges begin one behind a paragraph's last line, this Markdown goes on with it."""
    lines: list[str] = []
    code = inside = False  # a fenced block; a list
    for line in text.split("\n"):
        code ^= line.lstrip().startswith("```")
        item = not code and ITEM.match(line) is not None
        if item and not inside and lines and lines[-1].strip():
            lines.append("")
        inside = item or (inside and (not line.strip() or line.startswith(" ")))
        lines.append(line)
    return "\n".join(lines)


def turned(text: str, place: str) -> str:
    """A page's links as the site has them, for a page of docs/`place`, or of the root's; what is not on the site is no link."""

    def one(found: re.Match[str]) -> str:
        image, words, target, part = found[1], found[2], found[3], found[4] or ""
        if "://" in target:
            return found[0]
        if place == "":
            if target not in PAGES and not target.startswith("docs/"):
                return words
            target = target.removeprefix("docs/")
        up = target.count("../")
        name = target.replace("../", "")
        if up == len(Path(place).parts) + 1:  # out of docs/
            if name not in PAGES:
                return words
            target = "../" * (up - 1) + PAGES[name]
        elif target in PAGES:
            target = PAGES[target]
        if target == "notes":
            target = "notes/README.md"
        return f"{image}[{words}]({target}{part})"

    return LINK.sub(one, text)


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        assemble(Path(place) / "docs")
        config = (ROOT / "packaging" / "mkdocs.yml").read_text().replace("SOURCE", str(ROOT / "src"))
        (Path(place) / "mkdocs.yml").write_text(config)
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(target.resolve())]
        quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        subprocess.run(command, cwd=place, check=True, env=quiet)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
