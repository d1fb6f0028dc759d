"""Sequences cut over two GPUs, as docs/parallel.md shows them: what was measured, and more GPUs by arithmetic from that."""

from __future__ import annotations

from ..lib import measured
from ..lib.measured import Rows

MORE = (4, 8)  # GPUs, that nothing ran on
CASES = {"r128": "ratio 128", "r4": "ratio 4, main", "r4 many": "ratio 4, main and indexer"}
HEADER = (
    "case", "tokens", "layout", "one GPU", "two", "share", "messages", "bytes", "hand-over", "all-gather",
    *(f"{n}, calculated" for n in MORE),
)  # fmt: skip
EXPLAINED = """\
Microseconds; `share` is that of one GPU's time. *Calculated* is not measured: the time of one GPU divided by their number, and
what two GPUs take beyond half of it, as if that stayed the same. It is left out of calls that were not recorded in CUDA graphs,
whose times are partly the host's.
"""


def calculated(row: dict, gpus: int) -> float:
    """The time of more GPUs than two, from that of one and of two."""
    return row["one_us"] / gpus + (row["cut_us"] - row["one_us"] / 2)


def scaling(rows: Rows) -> str:
    """A line for each sequence, layout and way of launching; those in CUDA graphs first. Empty without rows."""

    def body(device: str) -> tuple[str, Rows]:
        used = [row for row in measured.of(rows, "parallel", device).values() if row["variant"].startswith("2 ")]
        used.sort(key=lambda row: (not _recorded(row), row["case"].startswith("train")))  # stable
        return measured.markdown(HEADER, [_line(row) for row in used]) + "\n" + EXPLAINED, used

    return measured.sections(rows, ("parallel",), body)


def _recorded(row: dict) -> bool:
    return row["variant"].endswith(" graph")


def _line(row: dict) -> tuple[str, ...]:
    name, _, tokens = row["case"].removeprefix("train ").rpartition(" s")
    words = CASES[name.removesuffix(" inside")] + ", cut in a window" * name.endswith(" inside")
    if row["case"].startswith("train"):
        words = f"training, {words}"
    layout = row["variant"].split()[1] + ("" if _recorded(row) else ", no graph")
    times = (f"{row[key]:.1f}" if key in row else "-" for key in ("exchange_us", "handover_us", "gather_us"))
    messages, hand_over, gathered = times
    more = (f"{calculated(row, n):.0f} ({calculated(row, n) / row['one_us']:.2f})" if _recorded(row) else "-" for n in MORE)
    return (
        words, f"{int(tokens):,}", layout, f"{row['one_us']:.0f}", f"{row['cut_us']:.0f}", f"{row['share']:.2f}", messages,
        f"{row['bytes']:,}", hand_over, gathered, *more,
    )  # fmt: skip
