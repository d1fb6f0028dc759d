"""The README is true: its example runs as pasted, and it stays short."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_example_runs_as_pasted(capsys) -> None:
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    scope: dict = {}
    exec(example, scope)
    assert "tensor(" in capsys.readouterr().out
    entries = scope["cache"].read(torch.arange(2))
    assert entries.shape == (2, 512)
    # RMSNorm with a weight of one: the mean square is one, up to the rounding of e4m3 (at most 2**-4 of a value).
    assert ((entries.square().mean(1).sqrt() - 1).abs() < 2**-4).all()
    assert int(scope["plan"].errors) == 0


def test_length() -> None:
    assert len(README.read_text().splitlines()) < 120
