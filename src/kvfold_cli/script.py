"""`python -m kvfold_cli.script FOLDER MODULE ...`: a benchmark in a process of its own, which fails as commands do."""

from __future__ import annotations

import runpy
import sys

import typer

from .failures import one_line


def main() -> None:
    """Runs the module as `python -m MODULE ...` would in FOLDER."""
    sys.path[0], *sys.argv = sys.argv[1:]
    try:
        with one_line():
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except typer.Exit as left:
        sys.exit(left.exit_code)


if __name__ == "__main__":
    main()
