"""`prebuild`: compiles kernels into a package, for machines that then need not compile them; `use_prebuilt` loads one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..arguments.checks import check_int, check_type
from ..backend_triton.table import MULTIPROCESSORS
from .asked import asked_of
from .choices import check_progress, check_workers
from .files import has_digest, unfinished
from .workers import processes

if TYPE_CHECKING:
    from ..backend_triton.build import Variant
    from ..backend_triton.prebuilt import Binary

OURS = re.compile(r"[0-9a-f]{64}|prebuilt\.json")  # names of a package's files


def prebuild(
    target: str,
    out_dir: str | os.PathLike[str],
    calls: Iterable[Mapping[str, Any]],
    *,
    multiprocessors: int = MULTIPROCESSORS,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Compiles what `warmup` would compile into a package, a folder of data, without a GPU.

    A package is for one target, one number of multiprocessors, one version of Triton with its assembler, and one version of
    kvfold's device code. If any of these differs, nothing of it is loaded: a warning says what differs, and kernels are
    compiled. Machines find a package by `use_prebuilt`, or installed as a wheel (docs/commands.md). Load only packages that you
    trust: a kernel is code that the GPU runs, with the rights of the process.

    Args:
        target: as of `aot`.
        out_dir: the folder, created if missing. An earlier package in it is replaced when everything is compiled. What a
            killed run left in `.prebuild-*` is removed. Other files are left alone.
        calls: for each call of `warmup` its arguments by name, without `device`, `workers` and `progress`.
        multiprocessors: of the GPU; kernels for many windows are compiled for it. Default: 132, as an H100 SXM, an H200 and a
            GH200 have.
        workers: processes that compile at once, as of `aot`. They are spawned: a script calls this under `if __name__ ==
            "__main__"`.
        progress: called after each kernel with the number done, the total, and the kernel's name.

    Returns:
        How many kernels the package has.

    Raises:
        TypeError, ValueError: naming the argument, before anything is compiled or written.
        RuntimeError: kernels are interpreted, or a compiling process was killed. And whatever Triton raises for a kernel that
            does not compile; the folder is then as it was.
        OSError: a file cannot be written.
    """
    check_type("target", target, str)
    if not isinstance(out_dir, (str, os.PathLike)):
        raise TypeError(f"out_dir must be a path, got {type(out_dir).__name__}")
    check_int("multiprocessors", multiprocessors, 1, 1 << 16)
    workers = check_workers(workers)
    check_progress(progress)
    asked = asked_of(calls)

    from ..backend_triton import prebuilt
    from ..backend_triton.build import INTERPRETED
    from ..backend_triton.prepare import ways
    from ..backend_triton.variants import variant_of
    from .combinations import TARGETS, dependent

    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if INTERPRETED:
        raise RuntimeError("prebuild compiles for a GPU, but TRITON_INTERPRET is set and kernels are interpreted")
    folder = Path(os.path.realpath(out_dir))
    before = _earlier(folder)
    wanted: dict[Variant, None] = {}
    for keys, may in asked:
        for key in keys:
            for aligned, pdl in ways(dependent(target) and may(key)):
                wanted[variant_of(key, aligned, pdl, multiprocessors)] = None
    if not wanted:
        raise ValueError("calls must have one kernel at least, got none")
    folder.mkdir(parents=True, exist_ok=True)
    with unfinished(folder, ".prebuild-", OURS) as beside:
        found: dict[str, Binary] = {}
        for variant, made in _compile(list(wanted), target, beside, workers):
            found |= made
            if progress is not None:
                progress(len(found), len(wanted), variant.kernel)
        facts = prebuilt.facts_of(TARGETS[target], multiprocessors)
        manifest = prebuilt.manifest_of(facts, dict(sorted(found.items())), {"kvfold": __version__})
        (beside / prebuilt.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (*{kernel.sha256 for kernel in found.values()}, prebuilt.MANIFEST):
            os.replace(beside / name, folder / name)
    for name in before - {kernel.sha256 for kernel in found.values()}:
        (folder / name).unlink(missing_ok=True)
    return len(found)


def use_prebuilt(folder: str | os.PathLike[str]) -> int:
    """Adds a package of `prebuild` to this process: kernels needed from now on come from it, if it is for this GPU.

    Packages installed as wheels need no call. Load only packages that you trust: a kernel is code that the GPU runs. If the
    package is for another machine, or the file of a kernel was changed, kernels are compiled; a warning says so, once.

    Args:
        folder: the folder of the package, with `prebuilt.json` in it. It must stay in place.

    Returns:
        How many kernels the package has. `kvfold info` says whether they are for this GPU.

    Raises:
        TypeError, ValueError: the folder is not a package, or a damaged one.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder must be a path, got {type(folder).__name__}")
    if "\0" in os.fsdecode(folder):
        raise ValueError(f"folder must be a path, got one with a zero character: {os.fsdecode(folder)!r}")
    from ..backend_triton import prebuilt

    package = prebuilt.use(folder)
    if package.damaged:
        raise ValueError(f"folder must be a package of prebuild, got {package.folder}: {package.damaged}")
    return len(package.kernels)


def _earlier(folder: Path) -> set[str]:
    """Binaries of a package that is replaced: by their names, which are their hashes."""
    from ..backend_triton import prebuilt

    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out_dir must be a folder, got the file {folder}")
    if not os.path.lexists(folder / prebuilt.MANIFEST):
        return set()
    package = prebuilt.read(folder)
    if package.damaged:
        raise ValueError(f"out_dir must be a folder without other {prebuilt.MANIFEST}, got {folder}: {package.damaged}")
    return {kernel.sha256 for kernel in package.kernels.values() if has_digest(folder / kernel.sha256, kernel.sha256)}


def _compile(wanted: list[Variant], target: str, folder: Path, workers: int) -> Iterator[tuple[Variant, dict[str, Binary]]]:
    """What each became, as they come."""
    build, workers = partial(_build, target, folder), min(workers, len(wanted))
    if workers == 1:
        yield from ((variant, build(variant)) for variant in wanted)
        return
    with processes(workers) as pool:
        jobs = {pool.submit(build, variant): variant for variant in wanted}
        try:
            yield from ((jobs[job], job.result()) for job in as_completed(jobs))
        finally:
            pool.shutdown(cancel_futures=True)


def _build(target: str, folder: Path, variant: Variant) -> dict[str, Binary]:
    """Compiles one kernel and writes its binary."""
    from ..backend_triton import prebuilt
    from .combinations import TARGETS

    gpu = TARGETS[target]
    kernel, binary = prebuilt.binary_of(variant.compile(gpu), variant, gpu)
    (folder / kernel.sha256).write_bytes(binary)
    return {prebuilt.key_of(variant, gpu): kernel}
