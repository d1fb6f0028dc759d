"""No function of Triton is handed `CONSTANT + tensor`, which its interpreter up to 3.8 wraps as a constant and then refuses.

Those versions are not the one that tests run on, so kernels are read and not run.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "kvfold"
KERNELS = sorted([*ROOT.glob("backend_triton/kernels/*.py"), *ROOT.glob("training/kernels/*.py")])


def constants_first(source: str) -> list[int]:
    """Lines of calls of `tl.` functions with an argument that combines a constant, on the left, with what a call returns."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "tl":
            for given in (*call.args, *(keyword.value for keyword in call.keywords)):
                if isinstance(given, ast.BinOp) and isinstance(given.left, ast.Name) and given.left.id.isupper():
                    found += [given.lineno for part in ast.walk(given.right) if isinstance(part, ast.Call)][:1]
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_tensors_come_before_constants(path: Path) -> None:
    assert constants_first(path.read_text()) == []


def test_such_a_call_is_found() -> None:
    assert constants_first("e = tl.fma(r, LOG2_E + tl.zeros_like(r), -top)") == [1]
    assert constants_first("e = tl.fma(r, tl.zeros_like(r) + LOG2_E, -top)") == []
