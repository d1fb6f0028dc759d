"""What `prebuild` and `aot` are asked for by calls of `warmup`, described by their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..backend_triton.keys import Key
from .choices import several
from .wanted import keys_of
from .warmup import warmup


def asked_of(calls: Iterable[Mapping[str, Any]]) -> list[tuple[list[Key], Callable[[Key], bool]]]:
    """Of each call its keys, and which may be dependents. An error names the call that is wrong."""
    return [keys_of(_complete(i, call)) for i, call in enumerate(several("calls", calls))]


def _complete(i: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """One of `calls` with the defaults of `warmup`."""
    name = f"calls[{i}]"
    if not isinstance(call, Mapping):
        raise TypeError(f"{name} must have arguments of warmup by name, got {type(call).__name__}")
    if others := sorted(call.keys() & {"device", "workers", "progress"}):
        raise ValueError(f"{name} must say what calls will be, and not {', '.join(others)}")
    try:
        bound = inspect.signature(warmup).bind(**call)
    except TypeError as error:
        raise TypeError(f"{name} must have arguments of warmup: {error}") from None
    bound.apply_defaults()
    return bound.arguments
