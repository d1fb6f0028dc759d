"""`packaging/engines.py`, which makes the folders of `make engines`: what it unpacks and installs, without a network."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("engines", ROOT / "packaging" / "engines.py")
engines = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(engines)

FILES = ("vllm/a.py", "vllm/b.json", "vllm/_C.abi3.so", "vllm/c.cu", "sglang/kernels/d.cuh", "vllm-1.dist-info/METADATA")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "wheels" / "vllm-1-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name in FILES:
            archive.writestr(name, name)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The calls of pip that would be made."""
    found: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> None:
        found.append(arguments)
        for name in ("--dest", "--target"):
            if name in arguments:
                Path(arguments[arguments.index(name) + 1]).mkdir(exist_ok=True)

    monkeypatch.setattr(engines, "pip", pip)
    return found


def test_no_binaries(wheel: Path, tmp_path: Path) -> None:
    engines.unpack(wheel, tmp_path / "vllm")
    found = {path.relative_to(tmp_path / "vllm").as_posix() for path in (tmp_path / "vllm").rglob("*") if path.is_file()}
    assert found == {*FILES, ".wheel"} - {"vllm/_C.abi3.so", "vllm/c.cu"}
    (tmp_path / "vllm" / "vllm" / "a.py").write_text("changed")
    engines.unpack(wheel, tmp_path / "vllm")  # the same wheel: nothing to do
    assert (tmp_path / "vllm" / "vllm" / "a.py").read_text() == "changed"


def test_a_wheel_is_downloaded_once(wheel: Path, calls: list[tuple[str, ...]]) -> None:
    assert engines.find_wheel("vllm", "1", wheel.parent) == wheel and not calls
    with pytest.raises(StopIteration):
        engines.find_wheel("vllm", "2", wheel.parent)
    assert calls[0][0] == "download" and "--no-deps" in calls[0] and calls[0][-1] == "vllm==2"


def test_packages_are_installed_once(tmp_path: Path, calls: list[tuple[str, ...]]) -> None:
    for _ in range(2):
        engines.install(tmp_path / "packages")
    assert len(calls) == 1 and "--no-deps" in calls[0] and "msgspec==0.23.0" in calls[0]
    named = engines.PACKAGES.split()
    assert all(name.count("==") == 1 for name in named) and named == sorted(set(named))
    assert not {"torch", "triton", "transformers"} & {name.partition("==")[0] for name in named}
