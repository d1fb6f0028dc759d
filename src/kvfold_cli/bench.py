"""`kvfold bench`: runs modules of benchmarks/, which a wheel has as `kvfold.benchmarks`."""

from __future__ import annotations

import subprocess
import sys
from enum import Enum
from importlib import util
from pathlib import Path
from typing import Annotated

import typer

from .failures import stop

PACKAGE = Path(__file__).parents[1] / "kvfold"
MODULES = {
    "decode": "run.decode",
    "prefill": "run.prefill",
    "step": "run.model_step",
    "store": "run.store",
    "plan": "run.overhead",
    "train": "run.training",
}
# What is left out of a first look. The others have few cases, or none to spare.
QUICK = {
    "decode": ("--quick",),
    "prefill": ("--only", "b1 s8192"),
    "step": ("--only", "v4-pro b16"),
    "train": ("--only", "b1 s8192"),
}
What = Enum("What", {name: name for name in MODULES})


def bench(
    what: Annotated[
        What, typer.Argument(help="What to time; step: of a whole model; plan: StepPlan.update and the host's part.")
    ],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases (decode, prefill, step, train).")] = False,
    out: Annotated[Path | None, typer.Option(help="File that result rows are added to, as JSON lines.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture beside other projects' figures (decode; needs --out).")] = None,
) -> None:
    """Times kvfold on this GPU, under the protocol that the recorded figures of other projects were taken by."""
    import torch

    from kvfold import __version__
    from kvfold.arguments.files import check_writable

    if plot is not None and (what is not What.decode or out is None):
        raise typer.BadParameter("--plot is drawn from decode rows: it needs `bench decode --out FILE`")
    if plot is not None and util.find_spec("matplotlib") is None:
        raise stop("--plot needs matplotlib: pip install 'kvfold[demo]'", "kvfold bench")
    if quick and what.value not in QUICK:
        raise typer.BadParameter(f"--quick is for {' and '.join(QUICK)}, got {what.value}")
    if not torch.cuda.is_available():
        raise stop("needs a GPU, and torch finds none", "kvfold bench")
    for path in filter(None, (out, plot)):
        check_writable(path)
    arguments = list(QUICK[what.value]) if quick else []
    if folder().parent == PACKAGE:  # installed: git would name the commit of whatever repository the user stands in
        arguments += ["--commit", f"kvfold {__version__}"]
    code = run(MODULES[what.value], *arguments, *(["--out", str(out)] if out else []))
    if code == 0 and plot is not None:
        code = run("publish.plot", "--rows", str(out), "--picture", str(plot))
    if code:
        raise typer.Exit(code)


def folder() -> Path:
    """The folder `benchmarks`: inside an installed package, or at the root of a checkout."""
    for place in (PACKAGE / "benchmarks", PACKAGE.parents[1] / "benchmarks"):
        if (place / "lib" / "protocol.py").is_file():
            return place
    raise FileNotFoundError("kvfold's benchmarks are missing from this installation")


def run(module: str, *arguments: str) -> int:
    """Runs a module of the benchmarks in a process of its own; its exit code."""
    place = folder()
    root, package = (PACKAGE.parent, "kvfold.benchmarks") if place.parent == PACKAGE else (place.parent, "benchmarks")
    command = [sys.executable, "-m", "kvfold_cli.script", str(root), f"{package}.{module}", *arguments]
    return subprocess.run(command, check=False).returncode
