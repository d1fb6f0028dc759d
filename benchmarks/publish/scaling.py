"""Sequences cut over GPUs, as docs/parallel.md shows them: what was measured, and more by arithmetic from that."""

from __future__ import annotations

from ..lib import measured
from ..lib.measured import Rows

MORE = (4, 8)  # GPUs, that nothing ran on
CASES = {"r128": "ratio 128", "r4": "ratio 4, main", "r4 many": "ratio 4, main and indexer"}
HEADER = (
    "case", "tokens", "layout", "one GPU", "two", "share", "messages", "bytes", "hand-over", "all-gather",
    *(f"{n}, calculated" for n in MORE),
)  # fmt: skip
PARTS_HEADER = (
    "case", "tokens", "GPUs", "layout", "one GPU", "a rank's part", "share", "messages", "with messages, calculated", "share",
    "sums of weights, KB",
)  # fmt: skip
PARTS_EXPLAINED = """\
Microseconds; a part is that of the slowest rank, and shares are of one GPU's time. *Calculated* is not measured: to the part
are added {us:.1f} us for each message, the most that one took between two GPUs in the table above, also those of 25 KB. Sums of
weights, in KB that a rank sends in the all-gather of a backward, are not in it: that all-gather was not timed between GPUs.
"""
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


def parts(rows: Rows) -> str:
    """A line for each sequence, number of ranks and layout, of which each rank was timed on one GPU. Empty without rows."""

    def body(device: str) -> tuple[str, Rows]:
        two = [row for row in measured.of(rows, "parallel", device).values() if _recorded(row)]
        most = max((row.get("exchange_us", 0.0) for row in two), default=0.0)
        used = [*measured.of(rows, "parallel_alone", device).values()]
        used.sort(key=lambda row: (row["variant"].endswith("no graph"), row["case"].startswith("train")))  # stable
        lines = [_part_line(row, most) for row in used]
        return measured.markdown(PARTS_HEADER, lines) + "\n" + PARTS_EXPLAINED.format(us=most), used

    return measured.sections(rows, ("parallel_alone",), body)


def _part_line(row: dict, message_us: float) -> tuple[str, ...]:
    words, tokens = _words(row)
    gpus, _, layout = row["variant"].partition(" ")
    whole, part = row["one_us"], row["part_us"]
    more = part + row["messages"] * message_us
    gathered = f"{row['gathered'] / 1e3:,.0f}" if row["gathered"] else "-"
    return (
        words, tokens, gpus, layout, f"{whole:.0f}", f"{part:.0f}", f"{part / whole:.2f}", str(row["messages"]), f"{more:.0f}",
        f"{more / whole:.2f}", gathered,
    )  # fmt: skip


def _words(row: dict) -> tuple[str, str]:
    """What was cut, and how many tokens."""
    name, _, tokens = row["case"].removeprefix("train ").rpartition(" s")
    words = CASES[name.removesuffix(" inside")] + ", cut in a window" * name.endswith(" inside")
    return f"training, {words}" if row["case"].startswith("train") else words, f"{int(tokens):,}"


def _recorded(row: dict) -> bool:
    return row["variant"].endswith(" graph")


def _line(row: dict) -> tuple[str, ...]:
    words, tokens = _words(row)
    layout = row["variant"].split()[1] + ("" if _recorded(row) else ", no graph")
    times = (f"{row[key]:.1f}" if key in row else "-" for key in ("exchange_us", "handover_us", "gather_us"))
    messages, hand_over, gathered = times
    more = (f"{calculated(row, n):.0f} ({calculated(row, n) / row['one_us']:.2f})" if _recorded(row) else "-" for n in MORE)
    return (
        words, tokens, layout, f"{row['one_us']:.0f}", f"{row['cut_us']:.0f}", f"{row['share']:.2f}", messages,
        f"{row['bytes']:,}", hand_over, gathered, *more,
    )  # fmt: skip
