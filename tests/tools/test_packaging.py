"""What a wheel and a source distribution hold, built here by hatchling. `make wheel` also installs one and uses it."""

from __future__ import annotations

import email
import email.message
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import kvfold

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "kvfold"
COMMAND = ROOT / "src" / "kvfold_cli"


def build(target: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


def test_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path)) as wheel:
        names = set(wheel.namelist())
        about = f"kvfold-{kvfold.__version__}.dist-info"
        metadata = email.message_from_bytes(wheel.read(f"{about}/METADATA"))
        assert "kvfold = kvfold_cli.__main__:main" in wheel.read(f"{about}/entry_points.txt").decode()
        assert wheel.read(f"{about}/licenses/LICENSE").decode() == (ROOT / "LICENSE").read_text()
    modules = {f"kvfold/{path.relative_to(PACKAGE).as_posix()}" for path in PACKAGE.rglob("*.py")}
    listed = set(re.findall(r'^"benchmarks/(\S+)" = ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    benchmarks = {f"kvfold/benchmarks/{name}" for name in listed}
    assert len(benchmarks) > 5
    assert {name for name in names if name.startswith("kvfold/")} == modules | benchmarks | {"kvfold/py.typed"}
    command = {f"kvfold_cli/{path.name}" for path in COMMAND.rglob("*.py")}
    assert {name for name in names if name.startswith("kvfold_cli/")} == command and "kvfold_cli/app.py" in command
    assert {name.partition("/")[0] for name in names} == {"kvfold", "kvfold_cli", about}
    check_metadata(metadata)


def check_metadata(metadata: email.message.Message) -> None:
    needed = metadata.get_all("Requires-Dist")
    always = sorted(re.match(r"\w+", requirement)[0] for requirement in needed if "extra ==" not in requirement)
    assert always == ["torch", "triton"], "everything else is an extra"
    assert set(metadata.get_all("Provides-Extra")) == {"cli", "debug", "demo", "dev", "site", "test", "transformers"}
    assert metadata["Version"] == kvfold.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    page = metadata.get_payload()
    assert page.startswith("# kvfold\n\nFiles that this page names are in the source distribution")
    assert not re.findall(r"\]\((?!https?://)", page) and "![" not in page and len(page.splitlines()) > 80
    assert metadata.get_all("Project-URL") is None  # no address that is not there


def test_a_page_elsewhere_has_links_where_there_is_an_address() -> None:
    sys.path.insert(0, str(ROOT / "packaging"))
    try:
        from description import described
    finally:
        sys.path.pop(0)
    text = "# name\n\nOf [a page](docs/a.md#b), [here](#c) and [there](https://there/x).\n\n![picture](docs/p.svg)\n\nEnd\n"
    assert described(text, "").endswith("\n\nOf a page, here and [there](https://there/x).\n\nEnd\n")
    found = described(text, "https://forge/")
    for link in ("[a page](https://forge/docs/a.md#b)", "![picture](https://forge/docs/p.svg)", "(https://forge/README.md#c)"):
        assert link in found


def test_every_folder_of_tests_is_run() -> None:
    """`make test` runs all but the engines' own classes."""
    listed = set(re.findall(r'"tests/(\w+)"', (ROOT / "pyproject.toml").read_text()))
    assert listed == {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")} - {"engines"}


def test_source_distribution_holds_what_git_does(tmp_path: Path) -> None:
    """The suite, the benchmarks and the packaging run from it: nothing that is tracked is left out."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked.stdout.split()) - names == set()
    assert "PKG-INFO" in names
