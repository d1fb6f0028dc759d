"""How the commands print: tables that can be read at any width, in a terminal, a pipe or a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

FILE_WIDTH = 200  # of what is no terminal: no table is cut there


def make_console() -> Console:
    """The console on stdout. A file or a pipe has no width of its own; rich would take 80 columns and cut the tables."""
    known = sys.stdout is None or sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else FILE_WIDTH)


def make_progress(console: Console) -> Progress:
    """A bar that counts in a terminal, says how long it took and will take, and leaves nothing behind."""
    counts = (BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    room = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # a long name would push the others out
    what = TextColumn("{task.description}", table_column=room)
    return Progress(*counts, what, console=console, transient=True, expand=True, disable=not console.is_terminal)


@contextmanager
def count_kernels(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """What `progress=` of the calls that compile is given: a bar; in a file or a pipe a line for kernel 1 and each tenth.

    What is said before the first kernel stays.
    """
    with make_progress(console) as progress:
        task = progress.add_task("", total=None)

        def show(done: int, total: int, words: str) -> None:
            if not done:
                print_text(console, words)
            elif not console.is_terminal and (done == 1 or done * 10 // total > (done - 1) * 10 // total):
                print_text(console, f"{done} of {total} kernels")
            progress.update(task, completed=done, total=total, description=escape(words if done else ""))

        yield show


def check_device(device: str) -> None:
    """Raises typer.BadParameter unless it is cpu, or cuda where there is one."""
    import torch

    accepted = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device not in accepted:
        have = "cpu or cuda" if len(accepted) > 1 else "cpu (no GPU here)"
        raise typer.BadParameter(f"--device must be {have}, got {device!r}")


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table where its cells fit in, otherwise each row as text behind its first cell.

    Nothing is cut. The text says once what is the same in all rows, and leaves out "-", which is for nothing.
    """
    rows = [[_printable(cell) for cell in row] for row in rows]
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
            table.add_row(*map(Text, row))
        console.print(table)
        return
    if title:
        console.print(f"[bold]{title}[/]", highlight=False)
    same = {column: cells[0] for column, *cells in whole[1:] if len(cells) > 1 and len(set(cells)) == 1}
    if said := [f"{column}: {cell}" for column, cell in same.items() if cell != "-"]:
        _print_items(console, "in each row", said)
    for row in rows:
        cells = [f"{c}: {cell}" for c, cell in zip(columns[1:], row[1:], strict=True) if c not in same and cell != "-"]
        _print_items(console, row[0], [cell.replace("\n", ", ") for cell in cells], style="bold")


def _printable(cell: str) -> str:
    """With escapes for what a terminal would act on, or a file could not have: names of folders may be anything."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in cell)


def _print_items(console: Console, head: str, items: Sequence[str], style: str = "") -> None:
    """Items behind a head; a line ends between two of them if it can."""
    lines = [head]
    for i, item in enumerate(items):
        part, joint = item + ";" * (i + 1 < len(items)), " " if i else "  "
        if len(lines[-1] + joint + part) <= console.width - 2:
            lines[-1] += joint + part
        else:
            lines.append(part)
    for i, line in enumerate(lines):
        text = Text(line)
        text.stylize(style, 0, 0 if i else len(head))
        print_text(console, text, indent=2, further=i > 0)


def print_text(console: Console, text: str | Text, indent: int = 0, further: bool = False) -> None:
    """Text, broken between words where the console ends; lines after the first, or all that go further, are indented."""
    text = Text(text) if isinstance(text, str) else text
    for i, line in enumerate(text.wrap(console, console.width - indent)):
        console.print(Text(" " * indent if i or further else "") + line, highlight=False, soft_wrap=True)
