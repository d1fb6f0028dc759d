"""The plug-in where it is not asked for, and where SGLang is missing or another version. Nothing of SGLang runs here."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvfold import UnsupportedError
from kvfold.integrations import sglang as plugin
from kvfold.integrations import switch


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("KVFOLD_ENGINES", raising=False)
    yield
    assert "sglang" not in switch.ON


def without_sglang(monkeypatch: pytest.MonkeyPatch, version: str | None = None) -> None:
    """What `importlib.metadata` says of SGLang, whether it is installed here or not."""

    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)


def test_entry_point() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    points = project.split('[project.entry-points."sglang.srt.plugins"]')[1].split("[")[0]
    assert 'kvfold = "kvfold.integrations.sglang.plugin:load"' in points
    assert callable(plugin.load) and plugin.load.__module__ == "kvfold.integrations.sglang.plugin"


def test_inert_when_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    without_sglang(monkeypatch)
    plugin.load()
    monkeypatch.setenv("KVFOLD_ENGINES", "vllm")
    plugin.load()


def test_importing_it_imports_nothing_of_sglang() -> None:
    code = (
        "import sys, kvfold.integrations.sglang as s; s.load(); sys.exit(any(m.split('.')[0] == 'sglang' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode == 0


def test_asked_for_without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    without_sglang(monkeypatch)
    monkeypatch.setenv("KVFOLD_ENGINES", "vllm,sglang")
    with pytest.raises(ImportError, match=r"sglang must be installed to plug kvfold into it; version 0\.5\.23"):
        plugin.load()


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    without_sglang(monkeypatch, "0.5.24")
    with pytest.raises(UnsupportedError, match=r"sglang must be version 0\.5\.23, .* got 0\.5\.24"):
        plugin.register()


@pytest.mark.parametrize("platform", ["hip", "npu", "xpu"])
def test_another_platform(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    without_sglang(monkeypatch, "0.5.23")
    utils = types.ModuleType("sglang.srt.utils")
    for name in ("hip", "npu", "xpu"):
        setattr(utils, f"is_{name}", lambda name=name: name == platform)
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.utils", utils)
    with pytest.raises(UnsupportedError, match="sglang must run on CUDA"):
        plugin.register()


def test_names_of_states(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="state must be one of pools, fold, got 'window'"):
        plugin.register("window")
    monkeypatch.setenv("KVFOLD_ENGINES", "vllm,sglang:ring")
    with pytest.raises(ValueError, match="KVFOLD_ENGINES must have one of pools, fold behind sglang:, got 'ring'"):
        plugin.load()


def test_a_wrong_engine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_ENGINES", "sgland")
    with pytest.raises(ValueError, match="sgland"):
        plugin.load()
