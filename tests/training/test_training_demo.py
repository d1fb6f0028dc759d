"""`kvfold demo --train`: both sides learn the same, and a difference is told."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("matplotlib")
from typer.testing import CliRunner

from kvfold.demo import train
from kvfold_cli.app import app


def test_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "LENGTH", 160)
    result = CliRunner().invoke(app, ["demo", "--train", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "kvfold" in result.output and (tmp_path / "kvfold-train.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(train, "train", lambda *_, **__: sides([2.0, 1.5], [2.0, 1.2]))
    wrong = CliRunner().invoke(app, ["demo", "--train", "2", "--out", str(tmp_path)])
    assert wrong.exit_code == 1 and "a loss differs by 2.0e-01" in wrong.output


def sides(theirs: list[float], ours: list[float]) -> dict[str, train.Training]:
    return {side: train.Training(losses, [1.0, 1.0], 0) for side, losses in zip(train.SIDES, (theirs, ours), strict=True)}


def test_what_is_a_difference() -> None:
    assert not train.problems(sides([2.0, 1.5], [2.00001, 1.51]))
    assert train.problems(sides([2.0, 1.5], [2.0001, 1.5])) == ["the first loss differs by 5.0e-05, bound 1e-05"]
