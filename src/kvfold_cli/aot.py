"""`kvfold aot`: compiles the kernels for a GPU that need not be here, and says what they take of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .explain import parse_spec
from .failures import stop, wrong_arguments
from .sets import calls_of
from .show import count_kernels, make_console, print_table


def aot(
    target: Annotated[str, typer.Argument(help="sm_80, sm_89, sm_90, sm_100, sm_103, sm_120, gfx942 or gfx950.")],
    out: Annotated[Path, typer.Argument(help="Folder for the binaries, kernels.json and kernels.txt.")],
    spec: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeated: hca, csa, indexer, fields, or table, one of each width; default: the first three, with --set none."
        ),
    ] = None,
    fmt: Annotated[
        list[str] | None,
        typer.Option("--format", help="Repeated: a record format, or rows for pooled rows without a cache; default: all."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Repeated: of kv_score, bf16 or fp32; default: bf16.")] = None,
    calls: Annotated[
        list[str] | None, typer.Option("--set", help="Repeated: an engine's calls, as of kvfold prebuild.")
    ] = None,
    train: Annotated[list[int] | None, typer.Option(help="Repeated: also for training, with so many rows of kv_score.")] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--no-strict", help="Any spill fails, or none; default: on sm_90 by Triton 3.6 what is not in the table."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that compile; default: one for each core, 16 at most.")] = None,
) -> None:
    """Compiles kernels to files, with registers, spills and shared memory of each; exit code 1 on spills and failures."""
    import torch

    from kvfold.precompile.aot import aot as compile_all
    from kvfold.precompile.report import COLUMNS
    from kvfold.storage.formats import FORMATS

    console = make_console()
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for name in dtype or ():
        if name not in dtypes:
            raise typer.BadParameter(f"--dtype must be bf16 or fp32, got {name!r}")
    default = () if calls else ("hca", "csa", "indexer")
    specs = [one for text in spec or default for one in _specs(text)]
    formats = [None if name == "rows" else name for name in fmt or ("rows", *FORMATS)]
    try:
        with wrong_arguments(TypeError, ValueError), count_kernels(console) as show:
            report = compile_all(
                target,
                out,
                specs,
                formats,
                dtypes=[dtypes[name] for name in dtype or ("bf16",)],
                training=train or (),
                calls=calls_of(calls or ()),
                strict=strict,
                workers=workers,
                progress=show,
            )
    except (ImportError, RuntimeError) as error:
        raise stop(str(error), "kvfold aot") from None
    print_table(console, f"Kernels for {report.target}", COLUMNS, [kernel.cells() for kernel in report.kernels])
    console.print(str(report), style=None if report.passed else "red", soft_wrap=True, highlight=False, markup=False)
    console.print(f"Files: {report.folder}", soft_wrap=True, highlight=False, markup=False)
    if not report.passed:
        raise typer.Exit(1)


def _specs(text: str) -> list:
    if text == "table":
        from kvfold.precompile.combinations import SPECS

        return list(SPECS)
    with wrong_arguments(TypeError, ValueError, option="--spec"):
        return [parse_spec(text)]
