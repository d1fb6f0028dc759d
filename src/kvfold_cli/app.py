"""The command line: registers the commands."""

from __future__ import annotations

import runpy
from typing import Annotated

try:
    import typer

    from . import aot, bench, demo, explain, info, replay, verify, warmup
    from .failures import Commands
except ImportError as error:
    if (error.name or "").partition(".")[0] not in ("typer", "rich"):
        raise
    raise ImportError(f"kvfold's command line needs {error.name}: pip install 'kvfold[cli]'") from error


def _version(asked: bool) -> None:
    if asked:
        known = runpy.run_path(str(bench.PACKAGE / "_version.py"))  # importing kvfold imports torch
        print(f"kvfold {known['__version__']}")
        raise typer.Exit


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False)
for command in (
    info.info,
    verify.verify,
    explain.explain,
    replay.replay,
    bench.bench,
    warmup.warmup,
    warmup.prebuild,
    aot.aot,
    demo.demo,
):
    app.command()(command)


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")] = False,
) -> None:
    """GPU kernels for DeepSeek-V4's KV-cache compressor."""
