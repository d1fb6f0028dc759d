"""What `warmup` and `aot` are asked to compile: their arguments, checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch

from ..arguments.checks import check_int, check_type
from ..spec import CompressorSpec
from ..storage.formats import FORMATS, RecordFormat

FLOATS = (torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)
MOST_WORKERS = 16  # unless more are asked for: each process of `aot` has torch and Triton in memory, about half a gigabyte


def defined_for(
    specs: tuple[CompressorSpec, ...], formats: tuple[RecordFormat | None, ...]
) -> list[tuple[CompressorSpec, RecordFormat | None]]:
    """The specs with the formats that are defined for them."""
    found = []
    for fmt in formats:
        fitting = [spec for spec in specs if fits(spec, fmt)]
        if specs and not fitting:
            raise ValueError(f"formats must be defined for one of the specs at least, got {fmt.name!r} for {list(specs)}")
        found += [(spec, fmt) for spec in fitting]
    return found


def fits(spec: CompressorSpec, fmt: RecordFormat | None) -> bool:
    """Whether a format is defined for a spec; None, pooled rows without a cache, is for any."""
    try:
        return fmt is None or fmt.check(spec) is None
    except ValueError:
        return False


def check_formats(name: str, formats: Iterable[str | None]) -> tuple[RecordFormat | None, ...]:
    names = check_choices(name, formats, (None, *FORMATS))
    return tuple(None if one is None else FORMATS[one] for one in names)


def check_all(name: str, values: Iterable, kind: type) -> tuple:
    values = several(name, values)
    for value in values:
        check_type(name, value, kind)
    return values


def several(name: str, values: Iterable) -> tuple:
    if isinstance(values, (str, torch.dtype, torch.Tensor)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be several values, such as a tuple, got {values!r}")
    return tuple(values)


def check_choices(name: str, values: Iterable, accepted: tuple) -> tuple:
    values = several(name, values)
    for value in values:
        if not any(value is one or (isinstance(value, str) and value == one) for one in accepted):
            raise ValueError(f"{name} must be among {', '.join(map(str, accepted))}, got {value!r}")
    return values


def check_workers(workers: int | None) -> int:
    """How many compile at once; None: as many as there are cores for this process, `MOST_WORKERS` at most."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, MOST_WORKERS)
    check_int("workers", workers, 1, 256)
    return workers


def check_progress(progress: Callable | None) -> None:
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function or None, got {type(progress).__name__}")
