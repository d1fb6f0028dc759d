"""The picture of what one launch does: docs/plots/architecture.svg.

python -m benchmarks.publish.architecture [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

FILE = Path(__file__).parents[2] / "docs" / "plots" / "architecture.svg"
BLUE, ORANGE, GREEN, GREY = "#1f6f8b", "#b5651d", "#3d8b40", "#555555"
STYLE = {"svg.hashsalt": "kvfold", "svg.fonttype": "path", "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"}


def box(axes, x: float, y: float, width: float, height: float, title: str, text: str, color: str) -> None:
    """A box with a title and lines of text below it, around the middle of the box."""
    from matplotlib.patches import FancyBboxPatch

    shape = f"round,pad=0,rounding_size={0.12}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, shape, facecolor="white", edgecolor=color, linewidth=1.8))
    lines = len(text.splitlines())
    top = y + height / 2 + 0.13 * lines
    axes.text(x + width / 2, top, title, ha="center", va="center", fontsize=13, fontweight="bold", color=color)
    axes.text(x + width / 2, top - 0.22, text, ha="center", va="top", fontsize=11, color="#222222", linespacing=1.35)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], color: str = GREY, style: str = "-|>") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": style, "color": color, "linewidth": 1.8, "mutation_scale": 16})


def draw(path: Path) -> None:
    """The same bytes for the same version of matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot
    from matplotlib.patches import FancyBboxPatch

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(12.4, 5.6), facecolor="white")
        axes.set(xlim=(0, 12.4), ylim=(0, 5.6))
        axes.axis("off")
        figure.subplots_adjust(0, 0, 1, 1)

        launch = FancyBboxPatch(
            (4.3, 1.75), 5.55, 3.55, "round,pad=0,rounding_size=0.2", facecolor="#eef5f7", edgecolor=BLUE, linewidth=2.2,
            linestyle=(0, (6, 3)),
        )  # fmt: skip
        axes.add_patch(launch)
        axes.text(7.075, 4.97, "one kernel launch: kvfold.compress", ha="center", va="center", fontsize=14, color=BLUE)

        box(axes, 0.2, 3.75, 1.75, 1.2, "Hidden states", "of the step's\nnew tokens", GREY)
        box(axes, 0.2, 2.05, 1.75, 1.2, "Projection", "a matrix\nproduct", GREY)
        box(axes, 2.3, 2.05, 1.65, 1.2, "[K | S]", "values and\nscores, bf16", GREY)
        arrow(axes, (1.075, 3.75), (1.075, 3.25))
        arrow(axes, (1.95, 2.65), (2.3, 2.65))

        box(
            axes,
            4.6,
            2.05,
            2.15,
            2.55,
            "Fold",
            "S + ape; softmax\nover the window,\nfor each channel;\nweighted mean of K\n(4 or 128 tokens)",
            BLUE,
        )
        box(axes, 7.4, 2.05, 2.15, 2.55, "Finish", "RMSNorm\nRoPE\nHadamard (indexer)\nquantize\nstore", BLUE)
        arrow(axes, (3.95, 2.65), (4.6, 2.65))
        arrow(axes, (6.75, 3.32), (7.4, 3.32), BLUE)

        box(axes, 10.2, 2.65, 2.0, 1.4, "Cache page", "fp8, fp4 or bf16\nentry in a slot", GREEN)
        arrow(axes, (9.55, 3.32), (10.2, 3.32))

        box(axes, 4.3, 0.15, 2.75, 1.1, "FoldState", "the open window of\neach sequence", ORANGE)
        box(axes, 7.4, 0.15, 2.45, 1.1, "Snapshots", "of page ends, for\na prefix cache", ORANGE)
        arrow(axes, (5.3, 1.25), (5.3, 2.05), ORANGE, "<|-|>")
        arrow(axes, (6.45, 2.05), (7.9, 1.25), ORANGE)
        arrow(axes, (7.4, 0.7), (7.05, 0.7), ORANGE)
        axes.text(10.05, 0.7, "kvfold.restore: a snapshot\nbecomes the state again", va="center", fontsize=11, color=ORANGE)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
        pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
