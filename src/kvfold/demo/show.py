"""Prints what the demo found: tables of differences, bytes and milliseconds, and the verdict."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from .run import BOUND, ENTRY_FORMAT, Result, kept_bytes, kind, largest, unexcused

READINGS = ("prefill", "chunks", "decode")


def show(result: Result, console: Console) -> None:
    """All tables, then `result.problems` or a line that says there are none."""
    for table in (_entries, _logits, _bytes, _times):
        console.print(table(result))
    _drafts(result, console)
    for problem in result.problems:
        console.print(f"[bold red]disagreement[/] {problem}")
    if not result.problems:
        console.print(f"[bold green]all agree[/] within {BOUND:g} (fp32), drafts to the bit")


def _number(value: float, bound: float = BOUND) -> str:
    return f"[{'green' if value <= bound else 'bold red'}]{value:.1e}[/]"


def _table(title: str, *columns: str, words: int = 0) -> Table:
    """A table of numbers but for the column `words`."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == words else "right", no_wrap=i == words)
    return table


def _entries(result: Result) -> Table:
    title = f"Entries: largest difference from transformers (root mean square 1, bound {BOUND:g})"
    table = _table(title, "layer", "compressor", "ratio", "width", "entries", *READINGS, words=1)
    for name, spec in result.specs.items():
        sides = [(result.ours[reading].entries[name], result.theirs[reading].entries[name]) for reading in READINGS]
        found = [_number(largest(a, b)) if len(a) == len(b) else "[bold red]count[/]" for a, b in sides]
        made = len(result.ours["decode"].entries[name])
        table.add_row(str(name[0]), kind(result, name), *map(str, (spec.ratio, spec.head_dim, made)), *found)
    return table


def _logits(result: Result) -> Table:
    title = f"Logits of {len(result.tokens)} tokens (bound {BOUND:g})"
    table = _table(title, "reading", "calls", "difference", "logits' spread", "same greedy token")
    for reading in READINGS:
        ours, theirs = result.ours[reading], result.theirs[reading]
        same = float((ours.logits.argmax(-1) == theirs.logits.argmax(-1)).float().mean())
        excuse = "" if same == 1 or unexcused(ours.logits, theirs.logits) else " (ties)"
        difference, spread = _number(largest(ours.logits, theirs.logits)), f"{float(theirs.logits.std()):.2f}"
        table.add_row(reading, str(len(ours.milliseconds)), difference, spread, f"{same:.2%}{excuse}")
    return table


def _bytes(result: Result) -> Table:
    length = len(result.tokens)
    title = f"Bytes per sequence, all compressors, at {length} tokens"
    table = _table(title, "kept by", "HCA layer", "CSA layer", "all state", "entries", "together")
    hca = next(name[0] for name in result.specs if kind(result, name) == "HCA")
    csa = next(name[0] for name in result.specs if kind(result, name) == "CSA")
    for system, kept in kept_bytes(result).items():
        state = (kept.state[hca], kept.state[csa], sum(kept.state.values()))
        table.add_row(system, *(f"{n:,}" for n in (*state, kept.entries(length), kept.total(length))))
    table.caption = (
        f"In {ENTRY_FORMAT} on all sides. State: of one layer, of all layers. transformers: measured, the most"
        " in decode; no rewind. Raw rows: K and S of a window, as engines keep them, no rewind. kvfold: enough to reject drafts"
    )
    return table


def _times(result: Result) -> Table:
    table = _table("Milliseconds per call of the whole model", "call", "transformers", "kvfold")
    sides = (result.theirs, result.ours)
    table.add_row(f"prefill of {len(result.tokens)} tokens", *(f"{side['prefill'].milliseconds[0]:.1f}" for side in sides))
    table.add_row("random chunks, mean call", *(f"{statistics.mean(side['chunks'].milliseconds):.1f}" for side in sides))
    table.add_row("decode of 1 token, median", *(f"{statistics.median(side['decode'].milliseconds[1:]):.2f}" for side in sides))
    return table


def _drafts(result: Result, console: Console) -> None:
    drafted = sum(new - 1 for _, new, _ in result.steps)
    rejected = sum(new - accepted for _, new, accepted in result.steps)
    if not drafted:
        console.print("No drafts asked for.")
    console.print(
        f"Drafts: {len(result.steps)} steps, {rejected} of {drafted} proposals rejected: the next step just"
        " starts at a smaller position. Logits of accepted tokens differ from plain decoding by"
        f" {_number(result.draft_logits)}."
    )
    entries = sum(len(result.ours["decode"].entries[name]) for name in result.identical)
    same = all(entries and state for entries, state in result.identical.values())
    verdict = "[green]bit-identical[/]" if same else "[bold red]not bit-identical[/]"
    console.print(
        f"Bits: {entries} entries of {len(result.identical)} compressors and their final state are {verdict} to the plain run."
        " (Bits are promised from the projected rows on: a matrix product itself rounds differently for another batch"
        " shape, so accepted tokens get the rows recorded in the plain run, rejected ones NaN.)"
    )
