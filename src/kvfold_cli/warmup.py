"""`kvfold warmup` and `kvfold prebuild`: compile before the first call, for this machine or for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failures import stop, wrong_arguments
from .sets import NAMES, calls_of
from .show import count_kernels, make_console, print_text

SET = typer.Option("--set", help=f"Repeated: whose calls, {NAMES}; default: v4.")


def warmup(
    calls: Annotated[list[str] | None, SET] = None,
    prebuilt: Annotated[list[Path] | None, typer.Option(help="Repeated: a folder of kvfold prebuild.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: the current GPU.")] = None,
    workers: Annotated[int | None, typer.Option(help="Threads that compile; default: one for each core, 16 at most.")] = None,
) -> None:
    """Compiles the kernels of an engine's calls into Triton's cache, so that processes on this machine find them there."""
    from kvfold.precompile.prebuild import use_prebuilt
    from kvfold.precompile.warmup import warmup as compile_and_load

    console, built = make_console(), 0
    try:
        with wrong_arguments(TypeError, ValueError):
            for folder in prebuilt or ():
                use_prebuilt(folder)
            for what in calls_of(calls or ["v4"]):
                with count_kernels(console) as show:
                    built += compile_and_load(**what, device=device, workers=workers, progress=show)
    except RuntimeError as error:
        raise stop(str(error), "kvfold warmup") from None
    from kvfold.backend_triton import prebuilt as packages

    print_text(console, f"{built} kernels, {packages.loaded} of them prebuilt")


def prebuild(
    target: Annotated[str, typer.Argument(help="sm_80, sm_89, sm_90, sm_100, sm_103, sm_120, gfx942 or gfx950.")],
    out: Annotated[Path, typer.Argument(help="Folder for the package.")],
    calls: Annotated[list[str] | None, SET] = None,
    multiprocessors: Annotated[int, typer.Option(help="Of the GPU; 132 are those of an H100 SXM and an H200.")] = 132,
    workers: Annotated[int | None, typer.Option(help="Processes that compile; default: one for each core, 16 at most.")] = None,
) -> None:
    """Compiles the kernels of an engine's calls into a package for other machines with this GPU and this Triton."""
    from kvfold.precompile.prebuild import prebuild as compile_all

    console = make_console()
    try:
        with wrong_arguments(TypeError, ValueError), count_kernels(console) as show:
            count = compile_all(
                target, out, calls_of(calls or ["v4"]), multiprocessors=multiprocessors, workers=workers, progress=show
            )
    except RuntimeError as error:
        raise stop(str(error), "kvfold prebuild") from None
    print_text(console, f"{count} kernels in {out}")
