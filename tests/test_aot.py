"""Ahead-of-time compilation for GPUs that are not here: a sample of what `make aot` compiles in full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.kernels.aot import SPECS, TARGETS, combinations, sample
from kvfold.kernels.build import KERNELS
from kvfold.kernels.configs import CONFIGS, choose
from kvfold.records import FORMATS

KINDS = {"fold", "rows", "window", "store", "pair", "plan", "restore"}


def run(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where Triton compiles, and with an empty cache."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "kvfold.kernels.aot", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def test_every_row_of_the_tables_is_compiled() -> None:
    every = list(combinations())
    assert len(set(every)) == len({c.name for c in every}) == len(every)
    assert {c.kind for c in every} == KINDS and {c.variant().kernel for c in every} == set(KERNELS)
    assert {c.config for c in every} == {*CONFIGS, None}
    with_cache = {(c.fmt.name, c.kind) for c in every if c.fmt and c.other is None}
    assert with_cache == {(f, k) for f in FORMATS for k in ("fold", "rows", "window", "store")}
    indexers = {name for name in FORMATS if name.startswith("indexer")}
    assert {(c.fmt.name, c.other[1].name) for c in every if c.other} == {("fp8_ds_mla", name) for name in indexers}
    for c in every:
        if c.config is not None:
            assert choose(c.config.kind, c.spec, c.config.max_new_tokens, c.config.most_items) == c.config
    assert {dict(c.variant().constants)["ONE_PAGE"] for c in every if c.kind == "window"} == {True, False}
    for fmt in FORMATS.values():  # each preset with each format that it can have
        for spec in SPECS[:3]:
            if not fmt.head_dims or spec.head_dim in fmt.head_dims:
                assert any(c.spec == spec and c.fmt == fmt and c.kind != "store" for c in every), (fmt.name, spec)


def test_sample_compiles(tmp_path: Path) -> None:
    """Every target, every format and every kernel, each to a binary."""
    done = run([], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()[:-1]]
    assert sorted((target, name) for target, name, _, _ in lines) == sorted((t, c.name) for c, t in sample())
    assert {target for target, *_ in lines} == set(TARGETS)
    words = {word for _, name, *_ in lines for word in name.split()}
    assert words >= {*FORMATS, *KINDS}
    for _, name, size, _ in lines:
        assert int(size.split()[0]) > 1000, name


def test_command_line(tmp_path: Path) -> None:
    done = run(["sm_70"], tmp_path)
    assert done.returncode != 0 and "sm_70" in done.stderr and "sm_120" in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "kvfold.kernels.aot"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and "TRITON_INTERPRET" in done.stderr


def test_failures_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A kernel that does not compile makes the command fail and is named."""
    from kvfold.kernels import aot

    class Inline:
        """An executor that runs jobs here, so that the replaced function is the one that runs."""

        def __enter__(self) -> Inline:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, function: object, job: object) -> object:
            from concurrent.futures import Future

            future: Future[object] = Future()
            try:
                future.set_result(function(job))  # type: ignore[operator]
            except Exception as error:
                future.set_exception(error)
            return future

    def compile_one(combination: aot.Combination, target: str) -> int:
        if combination.fmt is FORMATS["mxfp4"]:
            raise RuntimeError("no such instruction")
        return 4096

    monkeypatch.setattr(aot, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(aot, "compile_one", compile_one)
    monkeypatch.setattr(aot, "INTERPRETED", False)
    assert aot.main([]) == 1
    out = capsys.readouterr().out
    assert "mxfp4" in next(line for line in out.splitlines() if "failed: RuntimeError: no such instruction" in line)
    assert f"{len(sample()) - 1} of {len(sample())} compiled" in out
