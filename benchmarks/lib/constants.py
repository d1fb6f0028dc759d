"""What the kernels of experiments are compiled for, where they call functions of kvfold's kernels."""

from __future__ import annotations

from dataclasses import replace

import triton

from kvfold import CompressorSpec
from kvfold.backend_triton.args import Schedule, Target
from kvfold.backend_triton.build import INTERPRETED, facts_of, wrapped
from kvfold.backend_triton.variants import format_of, spec_of
from kvfold.storage.formats import RecordFormat


def constants(spec: CompressorSpec, fmt: RecordFormat | None = None, pdl: bool = False) -> dict[str, object]:
    """`HOW` and `SPEC`, and `FMT` where there is a format, for the current device."""
    target = Target() if INTERPRETED else facts_of(triton.runtime.driver.active.get_current_target())
    made = {"HOW": Schedule(PDL=pdl, TARGET=target), "SPEC": replace(spec_of(spec), OVERLAP=int(spec.overlap))}
    if fmt is not None:
        made["FMT"] = format_of(fmt, spec)
    return made if INTERPRETED else {name: wrapped(value) for name, value in made.items()}
