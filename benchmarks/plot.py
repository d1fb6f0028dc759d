"""Draws benchmarks/results/*.jsonl beside the other projects' figures: docs/plots/decode.svg and docs/tables/decode.md.

python benchmarks/plot.py [--results benchmarks/results] [--docs docs]
python benchmarks/plot.py --rows FILE.jsonl --picture FILE.png     only the picture, of one file's rows

The last row of a case and variant counts; rows of fold.jsonl, from before decode.py, count where there is no other. The same
rows give the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import protocol
import table
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter
from protocol import Case

HISTORY = "fold.jsonl"
PANELS = (
    *((512, 128, new, mode) for new in (1, 4) for mode in ("hit", "spread", "miss")),
    *((512, 4, new, mode) for new, mode in ((1, "hit"), (1, "miss"), (4, "hit"))),
    *((128, 4, new, "hit") for new in (1, 4)),
)
LAYERS = {(512, 128): "ratio 128, head_dim 512", (512, 4): "ratio 4, head_dim 512", (128, 4): "ratio 4, indexer"}
MODES = {"hit": "every sequence ends a window", "spread": "sequences at all phases", "miss": "no window ends"}
# Ours and their floors in the colour of the state, the others in grey.
STYLES = {
    "fold:fp8_ds_mla": {"color": "#1f6f8b", "marker": "o"},
    "fold:indexer_fp8_vllm": {"color": "#1f6f8b", "marker": "o"},
    "many:fp8_ds_mla+indexer_fp8_vllm": {"color": "#3d8b40", "marker": "s"},
    "window:fp8_ds_mla": {"color": "#b5651d", "marker": "^"},
    "window:indexer_fp8_vllm": {"color": "#b5651d", "marker": "^"},
}


def newest(source: Path) -> dict[tuple[str, str], dict]:
    """The decode row that counts of each case and variant, in a folder or a file; rows with dependent launch forced do not."""
    found = {}
    paths = source.glob("*.jsonl") if source.is_dir() else [source]
    for path in sorted(paths, key=lambda p: (p.name != HISTORY, p.name)):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["bench"] == "decode" and row["case"] in table.CASES and "pdl" not in row:
                found[row["case"], row["variant"]] = row
    return found


def draw(rows: dict[tuple[str, str], dict], path: Path) -> None:
    """Latency against batch, one panel for each layer, number of new tokens and mode."""
    style = {"svg.hashsalt": "kvfold", "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(15, 17), layout="constrained")
        grid = figure.subplots(4, 3)
        labelled = {}
        for axes, panel in zip(grid.flat, PANELS, strict=False):
            _draw_panel(axes, rows, *panel)
            handles, labels = axes.get_legend_handles_labels()
            labelled |= dict(zip(labels, handles, strict=True))
        last = grid.flat[len(PANELS)]
        last.axis("off")
        last.legend(labelled.values(), labelled.keys(), loc="center", frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _draw_panel(axes, rows: dict[tuple[str, str], dict], head_dim: int, ratio: int, new: int, mode: str) -> None:  # type: ignore[no-untyped-def]
    cases = [
        c for c in protocol.cases() if (c.kind, c.head_dim, c.ratio, c.new, c.mode) == ("decode", head_dim, ratio, new, mode)
    ]
    for variant, line in STYLES.items():
        ours = [(c.batch, rows[c.name, variant]) for c in cases if (c.name, variant) in rows]
        _line(axes, [(batch, row["us"]) for batch, row in ours], label=f"kvfold {variant}", linewidth=2, **line)
        floors = [(batch, row["floor_us"]) for batch, row in ours if "floor_us" in row]
        _line(axes, floors, label=f"floor of {variant}", linewidth=1, linestyle=":", color=line["color"])
    grey = {"marker": "x", "linestyle": "--"}
    _line(axes, _peers(cases, None), label="best peer pipeline, one compressor", color="#555555", **grey)
    _line(axes, _peers(cases, protocol.RAW_FP32), label="best of them with raw fp32 state", color="#aaaaaa", **grey)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([case.batch for case in cases]))
    axes.yaxis.set_major_locator(FixedLocator([2.0**k for k in range(-1, 9)]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_xlabel("sequences")
    axes.set_ylabel("microseconds")
    tokens = "1 token" if new == 1 else f"{new} tokens"
    axes.set_title(f"{LAYERS[head_dim, ratio]}: {tokens}, {MODES[mode]}", loc="left", fontsize=10)


def _peers(cases: list[Case], among: tuple[tuple[str, str], ...] | None) -> list[tuple[int, float]]:
    found = [(case.batch, protocol.best_peer(case, among)) for case in cases]
    return [(batch, best[0]) for batch, best in found if best]


def _line(axes, points: list[tuple[int, float]], **style: object) -> None:  # type: ignore[no-untyped-def]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def write_table(rows: dict[tuple[str, str], dict], path: Path) -> None:
    """The same figures as a Markdown table, in the order of the cases."""
    order = list(table.CASES)
    ours = sorted(rows.values(), key=lambda row: (order.index(row["case"]), row["variant"]))
    taken = sorted({f"{row['device']}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}" for row in ours})
    lines = ["# Decode, microseconds per call", "", "Made by benchmarks/plot.py. " + "; ".join(taken) + ".", ""]
    lines += [_markdown(table.HEADER), _markdown(["---"] * len(table.HEADER))]
    lines += [_markdown(table.cells(row)) for row in ours]
    path.write_text("\n".join(lines) + "\n")


def _markdown(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=protocol.HERE / "results")
    parser.add_argument("--docs", type=Path, default=protocol.HERE.parent / "docs")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(arguments)
    if (args.rows is None) != (args.picture is None):
        parser.error("--rows and --picture go together")
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(newest(args.rows), args.picture)
        print(args.picture)
        return
    rows = newest(args.results)
    for path, write in ((args.docs / "plots/decode.svg", draw), (args.docs / "tables/decode.md", write_table)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(rows, path)
        print(path)


if __name__ == "__main__":
    main()
