"""Pictures of result rows: decode beside the other projects' figures, and prefill.

python -m benchmarks.publish.plot --rows FILE.jsonl --picture FILE.png     decode, of one file's rows

`documents.py` makes the pictures of docs/plots by these functions. The same rows give the same panels, and a picture carries
the fingerprint of its panels, by which it is compared: its bytes follow the version of matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from kvfold.arguments.files import write_atomically

from ..lib import measured, models, protocol, table
from ..lib.measured import PEERS_DEVICE, Rows
from ..lib.protocol import Case

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
GREY = {"marker": "x", "linestyle": "--"}
WHOLE = (  # of a whole step: its lines
    ("project_compress: projection and compressor of a layer in one call", "fused", {"color": "#3d8b40", "marker": "s"}),
    ("the same, weights in FP8", "fused-fp8", {"color": "#3d8b40", "marker": "s", "linestyle": "--"}),
    ("torch.mm, then kvfold", "apart", {"color": "#1f6f8b", "marker": "o"}),
    ("torch.mm alone", "projections", {"color": "#b5651d", "marker": "^"}),
    ("kvfold's plans and compressors alone", "compressors", {"color": "#1f6f8b", "marker": "o", "linestyle": "--"}),
)


class Series(NamedTuple):
    """A line: points of (place on the x axis, microseconds), and how matplotlib draws it."""

    label: str
    points: list[tuple[float, float]]
    style: dict


class Panel(NamedTuple):
    """ticks: places on the x axis, and their names."""

    title: str
    xlabel: str
    ylabel: str
    ticks: list[tuple[float, str]]
    series: list[Series]


def decode_panels(rows: Rows, device: str, peers: bool) -> list[Panel]:
    """Latency against batch, one panel for each layer, number of new tokens and mode."""
    ours = measured.of(rows, "decode", device)
    found = []
    for head_dim, ratio, new, mode in PANELS:
        wanted = ("decode", head_dim, ratio, new, mode)
        cases = [c for c in protocol.cases() if (c.kind, c.head_dim, c.ratio, c.new, c.mode) == wanted]
        places = {case.name: float(case.batch) for case in cases}
        title = f"{LAYERS[head_dim, ratio]}: {'1 token' if new == 1 else f'{new} tokens'}, {MODES[mode]}"
        ticks = [(float(case.batch), str(case.batch)) for case in cases]
        series = _ours(ours, places)
        if series:
            series += _peers(cases, list(places.values())) if peers else []
            found.append(Panel(title, "sequences", "microseconds", ticks, series))
    return found


def prefill_panels(rows: Rows, device: str, peers: bool) -> list[Panel]:
    """Nanoseconds per token, one panel for each ratio; cases by their number of tokens."""
    ours, found = measured.of(rows, "prefill", device), []
    for ratio in (128, 4):
        cases = [Case("prefill", 512, ratio, batch, new) for batch, new in _shapes(ours)]
        cases = [case for case in cases if any(name == case.name for name, _ in ours)]
        places = {case.name: float(i) for i, case in enumerate(cases)}
        series = _ours(ours, places) + (_peers(cases, list(places.values())) if peers else [])
        tokens = {places[case.name]: case.batch * case.new for case in cases}
        series = [s._replace(points=[(x, round(us * 1e3 / tokens[x], 4)) for x, us in s.points]) for s in series]
        ticks = [(places[case.name], f"{case.batch} x {case.new >> 10}k") for case in cases]
        found.append(Panel(LAYERS[512, ratio], "sequences x tokens", "nanoseconds per token", ticks, series))
    return found


def why_panels(rows: Rows, device: str) -> list[Panel]:
    """From one warp for a window of raw rows to a fold: steps of 4 tokens in which every sequence ends a window of 128."""
    cases = [Case("decode", 512, 128, batch, 4, "hit") for batch in (16, 64, 128, 256)]
    ticks, states = [(float(case.batch), str(case.batch)) for case in cases], measured.of(rows, "decode", device)
    reduced, orange, blue = measured.of(rows, "window_reduction", device), "#b5651d", "#1f6f8b"

    def line(label: str, found: dict, variant: str, key: str, **style: object) -> Series:
        own = [(float(case.batch), found.get((case.name, variant), {})) for case in cases]
        points = [(batch, row[key]) for batch, row in own if key in row]
        return Series(label, points, {"linewidth": 2, **style})

    dotted = {"linewidth": 1, "linestyle": ":"}
    first = [
        line("one warp for each window", reduced, "one_warp", "us", color="#555555", marker="x"),
        line("many programs for each window", reduced, "shipped", "us", color=orange, marker="^"),
        line("floor: reading the raw rows", reduced, "shipped", "floor_us", color=orange, **dotted),
    ]
    window, fold = "window:fp8_ds_mla", "fold:fp8_ds_mla"
    second = [
        line("many programs for each window", states, window, "us", color=orange, marker="^"),
        line("floor: reading the raw rows", states, window, "floor_us", color=orange, **dotted),
        line("fold rows", states, fold, "us", color=blue, marker="o"),
        line("floor: reading the fold rows", states, fold, "floor_us", color=blue, **dotted),
    ]
    titles = "1. The reduction of 128 raw rows", "2. What has to be read at all"
    panels = zip(titles, (first, second), strict=True)
    drawn = [Panel(title, "sequences", "microseconds", ticks, [s for s in lines if s.points]) for title, lines in panels]
    return [panel for panel in drawn if panel.series]


def step_panels(rows: Rows, device: str, peers: bool) -> list[Panel]:
    """A whole step of each model, 4 new tokens for each sequence; engines where all of their step was recorded."""
    ours, found = measured.of(rows, "step", device), []
    for model in reversed(models.MODELS):
        cases = [case for case in models.step_cases() if (case.model, case.new) == (model, 4)]
        ticks = [(float(case.batch), str(case.batch)) for case in cases]
        series = []
        for label, variant, style in WHOLE:
            own = [(float(case.batch), ours[case.name, variant]["us"]) for case in cases if (case.name, variant) in ours]
            series.append(Series(label, own, {"linewidth": 2, **style}))
        floors = [(float(case.batch), ours.get((case.name, "apart"), {}).get("floor_us")) for case in cases]
        dotted = {"linewidth": 1, "linestyle": ":", "color": "#555555"}
        series.append(Series("weights, states and caches moved once", [(x, us) for x, us in floors if us], dotted))
        if peers:
            grey = {"color": "#555555", **GREY}
            series.append(Series("torch.mm, then the fastest engine's kernels", _engines(ours, cases), grey))
        series = [one for one in series if one.points]
        if series:
            title = f"{model.title}: a whole step, 4 tokens, sequences at all phases"
            found.append(Panel(title, "sequences", "microseconds", ticks, series))
    return found


def _engines(ours: dict[tuple[str, str], dict], cases: list[models.StepCase]) -> list[tuple[float, float]]:
    points = []
    for case in cases:
        sums = [models.engine_us(case, peer) for peer in models.ENGINES]
        if (case.name, "projections") in ours and all(one.whole for one in sums):
            us = ours[case.name, "projections"]["us"] + min(one.us for one in sums)
            points.append((float(case.batch), round(us, 2)))
    return points


def _shapes(ours: dict[tuple[str, str], dict]) -> list[tuple[int, int]]:
    """Sequences and tokens of each, of the cases that are not mixed."""
    ends = {tuple(case.split()[-2:]) for case, _ in ours if case.startswith("pre ")}
    shapes = {(int(batch.removeprefix("b")), int(new.removeprefix("s"))) for batch, new in ends}
    return sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape[0]))


def _ours(ours: dict[tuple[str, str], dict], places: dict[str, float]) -> list[Series]:
    found = []
    for variant, style in STYLES.items():
        own = [(place, ours[name, variant]) for name, place in places.items() if (name, variant) in ours]
        found.append(Series(f"kvfold {variant}", [(x, row["us"]) for x, row in own], {"linewidth": 2, **style}))
        floors = [(x, row["floor_us"]) for x, row in own if "floor_us" in row]
        found.append(Series(f"floor of {variant}", floors, {"linewidth": 1, "linestyle": ":", "color": style["color"]}))
    return [series for series in found if series.points]


def _peers(cases: list[Case], places: list[float]) -> list[Series]:
    kinds = (("best of other projects, one compressor", None, "#555555"), ("with raw fp32 state", protocol.RAW_FP32, "#aaaaaa"))
    found = []
    for words, among, color in kinds:
        best = [(x, protocol.best_peer(case, among)) for x, case in zip(places, cases, strict=True)]
        label = f"{words} ({PEERS_DEVICE.removeprefix('NVIDIA ')})"
        found.append(Series(label, [(x, peer[0]) for x, peer in best if peer], {"color": color, **GREY}))
    return [series for series in found if series.points]


def fingerprint(panels: list[Panel]) -> str:
    """Of all that is drawn."""
    return "sha256 of panels: " + hashlib.sha256(json.dumps(panels, sort_keys=True).encode()).hexdigest()


def draw(panels: list[Panel], path: Path) -> None:
    """One grid of panels, with the legend behind the last."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.hashsalt": "kvfold", "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}
    down = -(-(len(panels) + 1) // 3)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(15, 4.25 * down), layout="constrained")
        grid = list(figure.subplots(down, 3).flat)
        labelled = {}
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, panel)
            handles, labels = axes.get_legend_handles_labels()
            labelled |= dict(zip(labels, handles, strict=True))
        for axes in grid[len(panels) :]:
            axes.axis("off")
        grid[len(panels)].legend(labelled.values(), labelled.keys(), loc="center", frameon=False, fontsize=9)
        with write_atomically(path) as beside:
            figure.savefig(beside, metadata={"Date": None, "Creator": None, "Description": fingerprint(panels)})


def _draw_panel(axes, panel: Panel) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    for series in panel.series:
        axes.plot(*zip(*series.points, strict=True), label=series.label, **series.style)
    axes.set_yscale("log", base=2)
    if panel.xlabel == "sequences":
        axes.set_xscale("log", base=2)
    axes.yaxis.set_major_locator(FixedLocator([2.0**k for k in range(-4, 14)]))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xticks([x for x, _ in panel.ticks], [name for _, name in panel.ticks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(panel.ylabel)
    axes.set_title(panel.title, loc="left", fontsize=10)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args(arguments)
    rows = measured.newest(args.rows)
    found = measured.devices(rows, "decode")
    if not found:
        parser.error(f"--rows must have decode rows, {args.rows} has none")
    known = [row for row in rows if row["case"] in table.CASES]
    draw(decode_panels(known, found[0], peers=True), args.picture)
    print(args.picture)


if __name__ == "__main__":
    main()
