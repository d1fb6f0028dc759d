"""`kvfold replay`: a call from a file, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failures import stop, wrong_arguments
from .show import make_console


def replay(
    file: Annotated[Path, typer.Argument(help="A file that kvfold.dump wrote.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda where there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="triton or torch; default: as dumped, or the device's own.")] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Most memory for the call's tensors; default: as of kvfold.replay, from the file's size.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the torch backend and fp64; exit code 1 unless all of it is equal.")
    ] = False,
) -> None:
    """Makes a dumped call again and says what it was, and with --check whether and where it is wrong."""
    import torch

    from kvfold.debug.replay import replay as again

    console = make_console()
    try:
        with wrong_arguments(RuntimeError, TypeError, ValueError):
            if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
                raise ValueError(f"--device must be cpu (no GPU here), got {device!r}")
            made = again(file, device=device, backend=backend, max_bytes=max_bytes)
    except ImportError as error:  # the extra is missing
        raise stop(str(error), "kvfold replay") from None
    console.print(str(made), soft_wrap=True, highlight=False, markup=False)
    if check:
        report = made.check()
        console.print(str(report), soft_wrap=True, highlight=False, markup=False)
        if not report.equal:
            raise typer.Exit(1)
