"""Decode results beside the peers' figures and the floor: the columns that the benchmark prints and the document shows."""

from __future__ import annotations

from . import protocol
from .protocol import Case

CASES = {case.name: case for case in protocol.cases()}
HEADER = ("case", "variant", "us", "floor", "x floor", "best peer", "faster", "whose", "raw fp32 peer", "faster", "whose")


def peer_of(case: Case, variant: str, raw_fp32: bool = False) -> tuple[float, str] | None:
    """The peer that a variant is measured against, None where none does the same.

    `many` is measured against the best main pipeline and the best indexer pipeline, one after the other, as a ratio-4 layer
    pays for both. Pooled rows alone are no pipeline. `raw_fp32` is for variants over `WindowState`.
    """
    state, _, output = variant.partition(":")
    if output == "rows" or (raw_fp32 and state != "window"):
        return None
    best = protocol.best_peer(case, protocol.RAW_FP32 if raw_fp32 else None)
    if state != "many" or best is None:
        return best
    indexer = protocol.best_peer(Case(case.kind, 128, case.ratio, case.batch, case.new, case.mode))
    return (best[0] + indexer[0], f"{best[1]} + {indexer[1]}") if indexer else None


def cells(row: dict) -> list[str]:
    """The cells under HEADER of one result row."""
    case, us, floor_us = CASES.get(row["case"]), row["us"], row.get("floor_us")
    pdl = f" (pdl {row['pdl']})" if "pdl" in row else ""
    found = [row["case"], row["variant"] + pdl, f"{us:.2f}"]
    found += [f"{floor_us:.2f}", f"{us / floor_us:.2f}"] if floor_us else ["", ""]
    for raw_fp32 in (False, True):
        peer = peer_of(case, row["variant"], raw_fp32) if case else None
        found += [f"{peer[0]:.2f}", f"{peer[0] / us:.2f}x", peer[1]] if peer else ["", "", ""]
    return found


def show(title: str, header: tuple[str, ...], rows: list[list[str]]) -> None:
    """Prints a table, with rich where it is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a machine that has only what the kernels need
        print(title)
        for row in (list(header), *rows):
            print("  ".join(f"{cell:>{_width(header, rows, i)}}" for i, cell in enumerate(row)))
        return
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for i, name in enumerate(header):
        text = any(row[i] and not row[i].rstrip("x").replace(".", "").isdigit() for row in rows)
        table.add_column(name, justify="left" if text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # Into a file rich would fold the table to 80 columns.
    (console if console.is_terminal else Console(width=240)).print(table)


def _width(header: tuple[str, ...], rows: list[list[str]], column: int) -> int:
    return max(len(row[column]) for row in (header, *rows))
