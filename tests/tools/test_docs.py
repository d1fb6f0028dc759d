"""The documents are true: examples run as pasted, commands exist, links lead somewhere, named tests are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OF_ENGINES = re.compile(
    r"kvfold\.integrations\.(vllm|sglang) import .*\bregister\b|^import (vllm|sglang)\b", re.MULTILINE
)  # tests/engines
RUN = ("info", "explain")  # commands that take no time; of the others the arguments are read
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.DOTALL) if language in languages]


def run(page: Path, of_transformers: bool = False) -> dict:
    """The namespace that the Python blocks of a page leave, one after the other; those that need transformers apart."""
    scope: dict = {"__name__": page.stem}
    if of_transformers:
        from support.transformers_support import tiny

        scope["model"] = tiny()
    for number, text in enumerate(blocks(page, "python"), 1):
        if ("kvfold.integrations.transformers" in text) == of_transformers and not OF_ENGINES.search(text):
            exec(compile(text, f"{page.name}, block {number}", "exec"), scope)
    return scope


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs_as_pasted(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scope = run(page)
    if "print(" in page.read_text():
        assert capsys.readouterr().out
    if page == README:
        entries = scope["cache"].read(torch.arange(2))
        assert entries.shape == (2, 512)
        # RMSNorm with a weight of one: the mean square is one, up to the rounding of e4m3 (at most 2**-4 of a value).
        assert ((entries.square().mean(1).sqrt() - 1).abs() < 2**-4).all()
        assert int(scope["plan"].errors) == 0
    if page.name == "compile.md":
        made, absent = scope["layer"].cache.read(torch.tensor([0, 8]))
        assert made.any() and not absent.any() and int(scope["plan"].errors) == 0
        assert scope["layer"].state.positions[1].max() == 2


def test_a_model_is_patched_as_the_readme_says() -> None:
    pytest.importorskip("transformers", minversion="5.17")
    scope = run(README, of_transformers=True)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        patched = scope["model"](tokens).logits
        from kvfold.integrations.transformers import unpatch

        unpatch(scope["model"])
        torch.testing.assert_close(patched, scope["model"](tokens).logits, rtol=0, atol=1e-4)  # as in test_transformers.py


@pages
def test_commands_are_there(page: Path) -> None:
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from kvfold_cli.app import app

    for line in "".join(blocks(page, "console", "sh")).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] != ["kvfold"]:
            continue
        if words[1] in RUN:
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, result.output
        else:  # reads the arguments, and raises if one is not known
            command = typer.main.get_command(app).commands[words[1]]
            assert command.make_context(words[1], words[2:]).command is command


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_linked() -> None:
    linked = re.findall(r"\]\((docs/[^)]+\.md)\)", README.read_text())
    assert {ROOT / name for name in linked} == set(PAGES) - {README}


def test_lengths() -> None:
    assert len(README.read_text().splitlines()) < 120
    assert len((ROOT / "DESIGN.md").read_text().splitlines()) < 270
    for page in (*PAGES, ROOT / "DESIGN.md"):
        drawn = re.sub(r"<!-- made: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        long = [line for line in drawn.splitlines() if len(line) > 200 and not line.startswith("|")]
        assert not long, f"{page.name}: {long[0][:60]}"


def test_the_design_names_all_operators() -> None:
    defined = re.findall(r'^_define\("(\w+)"', (ROOT / "src" / "kvfold" / "ops.py").read_text(), re.MULTILINE)
    said = (ROOT / "DESIGN.md").read_text().split("\n## Operators\n")[1].partition("(`ops.py`")[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(defined) and len(defined) > 8


def test_tests_that_guard_are_collected(request: pytest.FixtureRequest) -> None:
    """Each mistake names a test, and pytest collects every one that is named."""
    parts = (ROOT / "docs" / "mistakes.md").read_text().split("\n## ")[1:]
    named = [re.findall(r"`tests/(\w+/test_\w+\.py)::(test_\w+)`", part) for part in parts]
    assert len(parts) == 10 and all(named)
    wanted = {pair for pairs in named for pair in pairs}
    collected = set()
    for name in sorted({name for name, _ in wanted}):
        module = pytest.Module.from_parent(request.session, path=ROOT / "tests" / name)
        collected |= {(name, getattr(item, "originalname", "")) for item in module.collect()}
    assert wanted <= collected, wanted - collected
