"""`kvfold explain`: what a step reads, makes and keeps, to the row and the byte."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .failures import wrong_arguments
from .show import make_console, print_table, print_text

if TYPE_CHECKING:
    from kvfold.explain import Explanation, Row, Span
    from kvfold.spec import CompressorSpec

SHOWN = 12  # rows of a table before its middle is left out
State = Enum("State", {"fold": "fold", "window": "window"})


def explain(
    spec: Annotated[
        str, typer.Argument(help="hca, csa, indexer, v41-r1, v41-r2, v41-index, or fields: ratio=4,head_dim=512,overlap=true")
    ],
    start: Annotated[int, typer.Option(min=0, help="Tokens that the sequence has, which came in one step.")],
    new: Annotated[int, typer.Option(min=1, help="Tokens of the step.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest step that can be rewound to anywhere (FoldState).")] = 4,
    fmt: Annotated[str | None, typer.Option("--format", help="Record format of the cache; default: no bytes.")] = None,
    rows_per_page: Annotated[int, typer.Option(min=1, help="Entries per page of the cache.")] = 64,
    state: Annotated[State, typer.Option(help="What the compressor keeps its state in.")] = State.fold,
    page_size: Annotated[int, typer.Option(min=1, help="Positions per page of a WindowState.")] = 128,
    ring: Annotated[int, typer.Option(min=0, help="Pages of each sequence's ring in a WindowState; 0: no rings.")] = 0,
) -> None:
    """Which positions make which entry, which state rows and bytes a step touches, and where one can rewind to."""
    from kvfold.explain import explain as find
    from kvfold.storage.formats import get_format

    with wrong_arguments(ValueError, option="--format"):
        known = None if fmt is None else get_format(fmt)
    how = {"max_new_tokens": max_new_tokens, "rows_per_page": rows_per_page}
    how |= {"state": state.value, "page_size": page_size, "ring": ring}
    with wrong_arguments(TypeError, ValueError):
        said = find(parse_spec(spec), start, new, fmt=known, **how)
    _show(said, fmt, make_console())


def parse_spec(text: str) -> CompressorSpec:
    """A preset's name, or fields of `CompressorSpec`. Raises ValueError or TypeError naming what is wrong."""
    from kvfold.spec import V4_CSA, V4_HCA, V4_INDEXER, V41_INDEX_K, V41_MAIN_R1, V41_MAIN_R2, CompressorSpec

    presets = {"hca": V4_HCA, "csa": V4_CSA, "indexer": V4_INDEXER}
    presets |= {"v41-r1": V41_MAIN_R1, "v41-r2": V41_MAIN_R2, "v41-index": V41_INDEX_K}
    if text in presets:
        return presets[text]
    kinds = dict.fromkeys(("head_dim", "ratio", "rope_dim"), int) | dict.fromkeys(
        ("overlap", "has_ape", "hadamard", "gate"), _flag
    )
    kinds["norm_eps"], fields = float, {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise ValueError(f"SPEC must be one of {sorted(presets)}, or fields among {sorted(kinds)}, got {part!r}")
        try:
            fields[name] = kinds[name](value)
        except ValueError:
            raise ValueError(f"{name} cannot be {value!r}") from None
    missing = {"head_dim", "ratio"} - fields.keys()
    if missing:
        raise ValueError(f"SPEC must give {' and '.join(sorted(missing))}, got {text!r}")
    return CompressorSpec(**fields)


def _flag(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(value)
    return value == "true"


def _show(said: Explanation, fmt: str | None, console: Console) -> None:
    end, spec = said.start + said.new, said.spec
    print_text(console, f"{spec}", indent=2)
    rings, (lo, hi) = f" of rings of {said.ring} rows" * (said.ring > 0), said.places
    kept = {
        "window": f"WindowState{rings}",
        "none": "no state",
        "fold": f"FoldState of fold rows, ring {said.ring}, 1 spare",
        "rows": f"FoldState of input rows, places for {f'lo rows of {lo} and hi rows of {hi}' if lo else hi} windows",
    }[said.kind]
    print_text(console, f"{kept}: {said.new} tokens, positions {said.start} to {end - 1}", indent=2)
    bytes_of = [f"bytes of the page, {fmt}"] if fmt else []
    overlap = ["lo half of"] if spec.overlap else []
    columns = ("entry", *overlap, "hi half of" if spec.overlap else "positions", "RoPE at", "page, row", *bytes_of)
    cells = []
    for e in said.entries:
        lo = [_span(e.lo) if e.lo else "none"] if spec.overlap else []
        spans = ["\n".join(map(_bytes, e.spans))] if fmt else []
        cells.append([str(e.window), *lo, _span(e.hi), str(e.position), f"{e.page}, {e.row}", *spans])
    _print(console, f"Entries: {len(said.entries)}", columns, cells)
    for title, rows in (("reads", said.reads), ("writes", said.writes), ("empties", said.emptied)):
        if rows or title != "empties":
            cells = [[str(row.position), _place(row)] for row in rows]
            _print(console, f"State rows that it {title}: {len(rows)}", ("position", "state row"), cells)
    starts = ", ".join(_runs(said.starts)) + (", or the first position of any window before" if said.any_window else "")
    print_text(console, f"The next step can start at: {starts}", indent=2)


def _bytes(span: Span) -> str:
    return f"{'scale page: ' * (span.buffer != 'page')}{span.what} {_span(range(span.start, span.stop))}"


def _place(row: Row) -> str:
    notes = ", ".join([row.half] * bool(row.half) + ["spare"] * row.spare)
    where = f"{row.row}" if row.page is None else f"page {row.page}, row {row.row}"
    return f"{where} ({notes})" if notes else where


def _span(positions: range) -> str:
    """From the first to the last, of positions or bytes."""
    return f"{positions.start}..{positions.stop - 1}" if len(positions) > 1 else f"{positions.start}"


def _runs(positions: Sequence[int]) -> list[str]:
    """Neighbours as one."""
    known = set(positions)
    firsts, lasts = ([p for p in positions if p + step not in known] for step in (-1, 1))
    return [str(a) if a == b else f"{a} to {b}" for a, b in zip(firsts, lasts, strict=True)]


def _print(console: Console, title: str, columns: Sequence[str], cells: list[list[str]]) -> None:
    half = SHOWN // 2
    console.print(title, highlight=False)
    if len(cells) > SHOWN:
        left = [f"... {len(cells) - SHOWN} more", *[""] * (len(columns) - 1)]
        cells = [*cells[:half], left, *cells[-half:]]
    if cells:
        print_table(console, "", columns, cells)
