"""`aot`: compiles kernels for a GPU that need not be there, into files, and says what each takes of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..arguments.checks import check_int, check_switch, check_type
from ..contract import INT32_MAX
from ..spec import V4_CSA, V4_HCA, V4_INDEXER, CompressorSpec
from ..storage.formats import FORMATS
from .asked import asked_of
from .choices import FLOATS, check_all, check_choices, check_formats, check_workers, defined_for, several
from .files import has_digest, is_file, unfinished
from .report import AotKernel, AotReport
from .workers import processes

if TYPE_CHECKING:
    from .combinations import Kernel

JSON, TABLE = "kernels.json", "kernels.txt"
OURS = re.compile(r"kernels\.txt|\w[\w.+-]*\.(cubin|hsaco)")  # names that `aot` gives, and no paths
MADE = re.compile(rf"{OURS.pattern}|kernels\.json")
MOST_JSON = 1 << 26  # bytes; of all kernels of V4 it has half a megabyte
MEASURED = "sm_90"  # where rows of the table were chosen by measurement, and so what they spill


def aot(
    target: str,
    out_dir: str | os.PathLike[str],
    specs: Iterable[CompressorSpec] = (V4_HCA, V4_CSA, V4_INDEXER),
    formats: Iterable[str | None] = (None, *FORMATS),
    *,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    training: Iterable[int] = (),
    calls: Iterable[Mapping[str, Any]] = (),
    strict: bool | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> AotReport:
    """Compiles every kernel of the table that calls over these can get, writes the binaries and a report, and finds spills.

    Use it to look into kernels (`cuobjdump -sass`, `nvdisasm`), to compare versions of kvfold and Triton, and to know before
    deployment that every kernel compiles and none spills. It needs no GPU. The files are not for loading: for that `prebuild`
    makes a package, with every way in which kernels are launched.

    What is compiled, by default all that DeepSeek-V4 has (about 1,000 kernels, half an hour on two cores):

    - every row of the table of configurations that a spec can reach, so any `max_new_tokens` and any number of windows, over
      `FoldState`, and over `WindowState` with pages of any size;
    - `store`, `restore` and `StepPlan.update`. `store` without a plan has int64 slots and positions, and one cache, or that
      and a second one of plain rows;
    - `compress_many`, if `specs` has both `V4_CSA` and `V4_INDEXER`: each indexer format with `fp8_ds_mla`, or with every main
      format if `formats` lacks that one;
    - steps with snapshots, with values and scores in two tensors, or (specs without ape) with latents; and rings and an
      engine's tables: without a cache if None is among the formats, else with each format;
    - without a gate, for each format a kernel with latents and one without.

    All of these have fp32 state, weights and pooled rows, plans with entry slots, addresses that are multiples of 16 and, on
    sm_90 and newer, dependent launches. Not compiled: other dtypes and launches, other combinations of the above,
    `project_compress`, and a second `store` for a spec that differs only in the ratio. `calls` adds any of these, and names
    exactly what an engine needs.

    Args:
        target: sm_80, sm_89, sm_90, sm_100, sm_103, sm_120, gfx942 or gfx950.
        out_dir: the folder for the files, created if missing. Files appear only when everything is compiled: a `.cubin` or
            `.hsaco` for each kernel, under its name, `kernels.json` (`AotReport.to_json`) and `kernels.txt`, the table. Names
            and numbers are stable. For profilers a cubin contains line numbers and the folder of kvfold's sources, so its
            sha256 is the same only for the same sources in the same folder. Files of an earlier call for this target are
            removed, by the names and hashes in its `kernels.json`. Those that were changed since are kept and reported
            (`kept`).
        specs: the compressors.
        formats: names of record formats, or None for pooled rows without a cache, each for every spec that it is defined for.
        dtypes: of `kv_score`: bf16, fp32 or both.
        training: numbers of kv_score rows for which `training.compress` is compiled too, forward and backward, with `formats`
            as fake quantization. Without a format it is compiled for values and scores in one tensor and in two. Weights are
            fp32; other arguments have their defaults.
        calls: arguments of calls of `warmup`, as for `prebuild`, without `training`. What such calls need is compiled too (or
            alone, with `specs=()`), for addresses that are multiples of 16 and as dependent launches where possible.
        strict: True allows no spills (`Resources.spilled`), False any. Default: on sm_90 under Triton 3.6 as many bytes as the
            kernel's row of the table was measured with (`Config.spills`; 0 for most), for any dtype; on other targets and
            under another Triton, where no row was measured, any.
        workers: processes that compile at once, from 1 to 256; with 1 it is this process. Default: the cores that this process
            may use, 16 at most. They are spawned: a script calls this under `if __name__ == "__main__"`.
        progress: called after each kernel with the number done, the total, and the kernel's name.

    Returns:
        The report: `passed`, `spilling`, `failed`, and all kernels. A kernel that does not compile is in `failed`; the
        others are written.

    Raises:
        TypeError, ValueError: naming the argument, before anything is compiled or written; also if a file would have to be
            replaced that `aot` did not write, or that was changed since.
        OSError: a file cannot be written. The folder is then as it was, unless the disk became full between two files.
        RuntimeError: kernels are interpreted, or a compiling process was killed, for example for lack of memory.
    """
    check_type("target", target, str)
    if not isinstance(out_dir, (str, os.PathLike)):
        raise TypeError(f"out_dir must be a path, got {type(out_dir).__name__}")
    specs, names = check_all("specs", specs, CompressorSpec), check_formats("formats", formats)
    dtypes = check_choices("dtypes", dtypes, FLOATS)
    asked = asked_of(calls)
    for name, given in (("specs", specs or asked), ("formats", names or not specs), ("dtypes", dtypes or not specs)):
        if not given:
            raise ValueError(f"{name} must have one at least, got none")
    defined_for(specs, names)
    tokens = several("training", training)
    for count in tokens:
        check_int("training", count, 0, INT32_MAX)
    check_switch("strict", strict)
    workers = check_workers(workers)

    from ..backend_triton.build import INTERPRETED
    from . import combinations as kernels
    from .calls import kernels_of

    if target not in kernels.TARGETS:
        raise ValueError(f"target must be one of {', '.join(kernels.TARGETS)}, got {target!r}")
    if INTERPRETED:
        raise RuntimeError("aot compiles for a GPU, but TRITON_INTERPRET is set and kernels are interpreted")
    folder = Path(os.path.realpath(out_dir))
    old, kept = _earlier(folder, target)
    wanted = [*kernels.combinations(specs, names, dtypes), *kernels.of_training(specs, names, dtypes, tokens)]
    wanted += kernels_of(asked)
    for name in (*(kernels.file_of(one, target) for one in wanted), TABLE):
        if name not in old and os.path.lexists(folder / name):
            raise ValueError(f"out_dir must not have a {name} that aot did not write or that was changed since, got {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with unfinished(folder, ".aot-", MADE) as beside:
        became: dict[str, AotKernel | str] = {}
        for one, found in zip(wanted, _compile(wanted, target, beside, strict, workers), strict=True):
            became[one.name] = found
            if progress is not None:
                progress(len(became), len(wanted), one.name)
        made = tuple(found for found in became.values() if isinstance(found, AotKernel))
        failed = {name: found for name, found in became.items() if isinstance(found, str)}
        report = AotReport(target, folder, kernels.versions(target), made, failed, tuple(kept))
        (beside / TABLE).write_text(report.table() + "\n", encoding="utf-8")
        (beside / JSON).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
        for name in old:
            (folder / name).unlink(missing_ok=True)
        for name in (*(kernel.file for kernel in made), TABLE, JSON):
            os.replace(beside / name, folder / name)  # takes the place of a link, and follows none
    return report


def _compile(wanted: list[Kernel], target: str, folder: Path, strict: bool | None, workers: int) -> Iterator[AotKernel | str]:
    """What each became, in order."""
    attempt, workers = partial(_attempt, target, folder, strict), min(workers, len(wanted))
    if workers == 1:
        yield from map(attempt, wanted)
        return
    with processes(workers) as pool:
        yield from pool.map(attempt, wanted)


def _attempt(target: str, folder: Path, strict: bool | None, one: Kernel) -> AotKernel | str:
    """The kernel, or why it did not compile."""
    from . import combinations as kernels

    allowed = 0 if strict else None
    if strict is None and target == MEASURED and is_measured_triton():
        allowed = one.spills
    try:
        return kernels.build(one, target, folder, allowed)
    except Exception as error:  # whatever a compiler raises: the others shall be compiled
        return f"{type(error).__name__}: {error}"


def is_measured_triton() -> bool:
    """Whether rows of the table say what the Triton that is installed spills."""
    import triton

    from ..backend_triton.table import SPILLS_TRITON

    return triton.__version__.startswith(f"{SPILLS_TRITON}.")


def _earlier(folder: Path, target: str) -> tuple[list[str], list[str]]:
    """Files of an earlier report: those that are as it says, which may be removed, and those that were changed since."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out_dir must be a folder, got the file {folder}")
    if not os.path.lexists(folder / JSON):
        return [], []
    foreign = f"out_dir must be a folder without other {JSON}, got {folder} with one that aot did not write"
    if not is_file(folder / JSON) or (folder / JSON).stat().st_size > MOST_JSON:
        raise ValueError(foreign)
    try:
        report = json.loads((folder / JSON).read_text())
        was, rows = report["target"], [*report["kernels"], report["table"]]
        recorded = {row["file"]: row["sha256"] for row in rows}
        if not all(isinstance(x, str) for x in (was, *recorded, *recorded.values())):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(foreign) from error
    if was != target:
        raise ValueError(f"out_dir must be another for each target, got {folder}, where the kernels of {was} are")
    there = [name for name in recorded if OURS.fullmatch(name) and os.path.lexists(folder / name)]
    same = [name for name in there if has_digest(folder / name, recorded[name])]
    return same, [name for name in there if name not in same]
