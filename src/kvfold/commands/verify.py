"""`kvfold verify`: is kvfold right on this machine?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def verify(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="triton or torch; default: triton where it runs.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One pair of dtypes for each row of the kernels' table.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose line has this in it.")] = "",
    out: Annotated[Path | None, typer.Option("--json", help="File for all results.")] = None,
) -> None:
    """Checks every configuration and record format against fp64, and every equivalence, on this machine."""
    import torch

    from .. import __version__
    from ..verify import list_cases
    from ..verify import verify as run

    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        have = "cpu or cuda" if torch.cuda.is_available() else "cpu (no GPU here)"
        raise typer.BadParameter(f"--device must be {have}, got {device!r}")
    if backend is None:
        backend = "triton" if device == "cuda" or _interpreted() else "torch"
    try:
        cases = [case for case in list_cases(device, backend=backend, quick=quick) if only in f"{case.group}: {case.name}"]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if not cases:
        raise typer.BadParameter(f"--only must be in the line of some case, got {only!r}")
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    console.print(f"{len(cases)} cases on {where}, backend {backend}, torch {torch.__version__}, kvfold {__version__}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for result in run(cases):
            results.append(result)
            verdict = "[green]pass[/]" if result.passed else "[bold red]FAIL[/]"
            line = f"{verdict} {escape(f'{result.group}: {result.name}')}  {result.figure}  {result.seconds:.1f} s"
            progress.console.print(line, soft_wrap=True, highlight=False)
            if not result.passed:
                progress.console.print(escape(f"     {result.problem}"), style="red", soft_wrap=True, highlight=False)
            progress.update(task, advance=1, description=escape(result.name))
    failed = sum(not result.passed for result in results)
    if out is not None:
        rows = [asdict(result) | {"passed": result.passed} for result in results]
        about = {"device": where, "backend": backend, "torch": torch.__version__, "kvfold": __version__, "failed": failed}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")
    seconds = sum(result.seconds for result in results)
    console.print(f"[bold red]{failed} of {len(results)} failed[/]" if failed else f"[green]all {len(results)} passed[/]",
                  f"in {seconds:.0f} s", highlight=False)  # fmt: skip
    if failed:
        raise typer.Exit(1)


def _interpreted() -> bool:
    try:
        from ..kernels.build import INTERPRETED
    except ImportError:  # no triton: the torch backend needs none
        return False
    return bool(INTERPRETED)
