"""What a product's kernels add to what, read from Triton's intermediate form: every chain of instructions begins from zero.

Triton makes `a + b` the chain of `a`, begun from `b`, where it sees that `a` is one instruction's: bits would then depend on
how many tiles a chunk has.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.backend_triton import table

WIDTHS = (256, 512, 1024, 7168)  # with chunks that are empty, of one step, of one tile, and of many
# Sums of whole tiles, besides those of instructions: none of a chunk, one of a pair, and the pairs in turn.
ADDED = {8: 0, 4: 1, 1: 2}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    program = Path(__file__).parents[1] / "support" / "project_texts.py"
    done = subprocess.run([sys.executable, program, *map(str, WIDTHS)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def chains(text: str) -> list[bool]:
    """Of each product of tiles, whether its chain begins from zero."""
    zero = set(re.findall(r"(%\S+) = arith\.constant dense<0\.0+e\+00> : tensor<[\dx]+xf32>", text))
    carried: dict[str, str] = {}
    for loop in re.findall(r"iter_args\(([^)]*)\)", text):
        carried |= dict(part.split(" = ") for part in loop.split(", "))

    def is_zero(name: str) -> bool:
        return name in zero or (name in carried and is_zero(carried[name]))

    return [is_zero(name) for name in re.findall(r"tt\.dot %\S+, %\S+, (%[^\s,]+)", text)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("row", "parts"),
    [(f"{i}", row.parts) for i, row in enumerate(table.TILINGS)]
    + [(f"fp8 {i}", row.parts) for i, row in enumerate(table.SCALED)],
)
def test_every_chain_begins_from_zero(row: str, parts: int, width: int, texts: dict[str, str]) -> None:
    text = texts[f"{row} {width}"]
    found = chains(text)
    assert len(found) == (1 if parts == 8 else 2) and all(found)
    assert len(re.findall(r"(?:arith\.addf|math\.fma) .*: tensor<\d+x\d+xf32>", text)) == ADDED[parts]


def test_it_can_fail(texts: dict[str, str]) -> None:
    """With a sum that is written as `+` the second chain begins from the first."""
    assert chains(texts["plus"]) == [True, False]


@pytest.mark.parametrize("parts", [8, 4])
def test_parts_are_added_in_that_order(parts: int, texts: dict[str, str]) -> None:
    """Chunks in pairs, where parts are chunks; and each pair to the sum of those before, from zero on."""
    text = texts[f"sum of {parts}"]
    loaded = re.findall(r"(%\S+) = tt\.load", text)
    sums = re.findall(r"(%\S+) = arith\.addf (%\S+), (%\S+) :", text)
    assert len(loaded) == parts and len(sums) == (8 if parts == 8 else 4)
    (zero,) = re.findall(r"(%\S+) = arith\.constant dense<0\.0+e\+00> : tensor<\d+xf32>", text)
    made: dict[str, object] = {zero: 0} | {name: f"part {i}" for i, name in enumerate(loaded)}
    for name, one, other in sums:
        made[name] = frozenset((made[one], made[other]))  # in either order
    wanted: object = 0
    for i in range(4):
        pair = frozenset((f"part {2 * i}", f"part {2 * i + 1}")) if parts == 8 else f"part {i}"
        wanted = frozenset((wanted, pair))
    assert made[sums[-1][0]] == wanted
