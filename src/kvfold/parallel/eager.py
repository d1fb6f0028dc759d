"""Calls that torch.compile leaves as they are: what ranks send each other, and when, is no part of a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(method: Callable[P, R]) -> Callable[P, R]:
    """The same; where it is traced the graph is broken around it, and torch refuses it with `fullgraph=True`."""
    untraced: list[Callable[P, R]] = []

    @wraps(method)
    def call(*given: P.args, **options: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            return method(*given, **options)
        if not untraced:  # only now, as this imports the compiler
            untraced.append(torch.compiler.disable(method))
        return untraced[0](*given, **options)

    return call
