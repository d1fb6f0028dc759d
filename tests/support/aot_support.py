"""`aot` without a compiler."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import kvfold
from kvfold import V4_HCA
from kvfold.backend_triton import build
from kvfold.precompile import combinations as kernels
from kvfold.precompile.combinations import Combination, combinations
from kvfold.precompile.report import AotKernel, AotReport, Resources
from kvfold.storage.formats import FORMATS


def fake(monkeypatch: pytest.MonkeyPatch, spilled: dict[str, int], broken: str | None = None) -> None:
    """Compiles nothing: writes a file, and says that kernels of these formats spill and that one does not compile."""

    def build_one(one: Combination, target: str, folder: Path, allowed: int | None) -> AotKernel:
        if one.fmt is not None and one.fmt.name == broken:
            raise RuntimeError("no such instruction")
        path = folder / f"{one.name.replace(' ', '-')}.cubin"
        path.write_bytes(b"binary")
        digest = hashlib.sha256(b"binary").hexdigest()
        bytes_spilled = spilled.get(one.fmt.name, 0) if one.fmt is not None else 0
        used = Resources(registers=64, spilled=bytes_spilled, stack=bytes_spilled, shared=0, warps=4)
        return AotKernel(one.name, path.name, digest, 6, "kernel", used, allowed, {}, {}, {})

    monkeypatch.setattr(build, "INTERPRETED", False)
    monkeypatch.setattr(kernels, "build", build_one)


RUN = "bf16", "mxfp4"


def run(target: str, folder: Path, **arguments: object) -> AotReport:
    return kvfold.aot(target, folder, [V4_HCA], RUN, workers=1, **arguments)


def of_run() -> tuple[Combination, ...]:
    """The kernels that `run` compiles."""
    return tuple(combinations((V4_HCA,), tuple(FORMATS[name] for name in RUN)))
