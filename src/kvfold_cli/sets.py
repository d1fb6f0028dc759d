"""The option `--set`: calls that engines make, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import typer

NAMES = (  # known without torch
    "v4, v4-project, v4-project-fp8, vllm, vllm-fold, vllm-v41, sglang, sglang-fold, sglang-v41 or sglang-v41-fold"
)


def calls_of(names: Iterable[str]) -> tuple[dict[str, Any], ...]:
    """The arguments of calls of `warmup`; raises typer.BadParameter for a name that is none of them."""
    from kvfold.precompile.sets import SETS

    for name in names:
        if name not in SETS:
            raise typer.BadParameter(f"--set must be {NAMES}, got {name!r}")
    return tuple(call for name in dict.fromkeys(names) for call in SETS[name])
