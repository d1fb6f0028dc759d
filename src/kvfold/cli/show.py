"""How the commands print: tables that can be read at any width, in a terminal, a pipe or a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

FILE_WIDTH = 200  # of what is no terminal: no table is cut there


def make_console() -> Console:
    """The console on stdout. A file or a pipe has no width of its own; rich would take 80 columns and cut the tables."""
    known = sys.stdout is None or sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else FILE_WIDTH)


def make_progress(console: Console) -> Progress:
    """A bar that counts in a terminal, and leaves nothing behind."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def check_device(device: str) -> None:
    """Raises typer.BadParameter unless it is cpu, or cuda where there is one."""
    import torch

    accepted = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device not in accepted:
        have = "cpu or cuda" if len(accepted) > 1 else "cpu (no GPU here)"
        raise typer.BadParameter(f"--device must be {have}, got {device!r}")


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table where its cells fit in, otherwise each row as text under its first cell. Nothing is cut."""
    whole = list(zip(columns, *rows, strict=True))
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in whole]
    least = [max(len(word) for cell in column for word in cell.split() or [""]) for column in whole]
    room = console.width - 3 * len(columns) - 1  # what rich draws between cells
    if sum(least) <= room:
        while sum(widths) > room:  # rich itself would break words in one column before another is down to its longest
            most = max(range(len(widths)), key=lambda i: (widths[i] > least[i], widths[i]))
            widths[most] -= 1
        table = Table(title=title or None)
        for column, width in zip(columns, widths, strict=True):
            table.add_column(column, width=width)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    if title:
        console.print(f"[bold]{title}[/]", highlight=False)
    for row in rows:
        rest = "; ".join(f"{column}: {cell}" for column, cell in zip(columns[1:], row[1:], strict=True)).replace("\n", ", ")
        text = Text.assemble((row[0], "bold"), f"  {rest}")
        for i, line in enumerate(text.wrap(console, console.width - 2)):
            console.print(Text("  " if i else "") + line, highlight=False)
