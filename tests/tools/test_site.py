"""The sources of the static site (`make site`): links lead to its pages, and the API page has all that is public."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import kvfold
from kvfold import training

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("site_of_kvfold", ROOT / "packaging" / "make_site.py")
site = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site)


def test_links_stay_on_the_site(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    site.assemble(folder)
    pages = list(folder.rglob("*.md"))
    assert folder / "index.md" in pages and len(pages) > 20
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).is_file(), f"{page.relative_to(folder)}: {target}"


def test_lists_begin_behind_an_empty_line(tmp_path: Path) -> None:
    """Python's Markdown takes an item that follows a paragraph's line for a part of it."""
    text = "Words:\n- one\n  goes on\n- two\n\n  still\n- three\nMore\n1. first\n```\na\n- code\n```\n"
    wanted = "Words:\n\n- one\n  goes on\n- two\n\n  still\n- three\nMore\n\n1. first\n```\na\n- code\n```\n"
    assert site.spaced(text) == wanted == site.spaced(wanted)
    site.assemble(tmp_path / "docs")
    index = (tmp_path / "docs" / "index.md").read_text()
    assert "\n\n- [vLLM](vllm.md)" in index and index.replace("\n\n", "\n") == site.turned(
        (ROOT / "README.md").read_text(), ""
    ).replace("\n\n", "\n")


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "packaging" / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")} | set(site.PAGES.values()) | {"notes/README.md"}


def test_the_api_page_has_what_is_public() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    asked = re.findall(r"^::: kvfold\.([\w.]+)$", text, re.MULTILINE)
    named = {re.sub(r"^(\w+)\.\1$", r"\1", name) for name in asked} | set(re.findall(r"`(V4\w+)`", text))
    for name in asked:  # a function and not the module of its name, on whose page all of that module would stand
        *path, last = name.split(".")
        module = importlib.import_module(".".join(["kvfold", *path])) if len(path) == 1 and path[0] == last else None
        assert module is None or callable(getattr(module, last))
        assert name in ("parallel", "training", "reference", "ops") or f"kvfold.{name}" not in sys.modules, name
    public = set(kvfold.__all__) - {"__version__"} | {"parallel"} | {f"training.{name}" for name in training.__all__}
    public |= {"debug.check.Report", "debug.replay.Replay"}  # what `check` and `replay` return
    assert named == public, named ^ public
