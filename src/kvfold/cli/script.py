"""`python -m kvfold.commands.script FILE ...`: a script of benchmarks/ in a process of its own, which fails as commands do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import typer

from .failures import one_line


def main() -> None:
    """Runs the script as `python FILE ...` would."""
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        with one_line():
            runpy.run_path(sys.argv[0], run_name="__main__")
    except typer.Exit as left:
        sys.exit(left.exit_code)


if __name__ == "__main__":
    main()
