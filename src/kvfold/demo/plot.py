"""The demo's picture: which bytes of the text an entry remembers, and what it costs to keep."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from PIL import Image

from .run import ENTRY_FORMAT, Result, kept_bytes

SHOWN_WINDOWS = 8
LONGEST = 1 << 20
COLOURS = {"transformers": "#b5651d", "raw fp32 rows": "#7a7a7a", "kvfold": "#1f6f8b"}


def window_weights(result: Result) -> torch.Tensor:
    """Softmax weight of each token in each window of the first HCA layer, fp32 `[windows, ratio, channels]`."""
    name, spec = next((name, spec) for name, spec in result.specs.items() if not spec.overlap)
    scores = result.rows[name][:, spec.channels :].float().cpu()
    whole = scores[: len(scores) // spec.ratio * spec.ratio].unflatten(0, (-1, spec.ratio))
    return (whole + result.biases[name].float().cpu()).softmax(1)


def draw(result: Result, path: Path) -> None:
    """Writes the PNG to `path`, whose directory must exist."""
    weights = window_weights(result)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15, 8.2), dpi=110, facecolor="white", layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1.0, 1.15), width_ratios=(1.0, 1.0))
        _draw_text(figure, figure.add_subplot(grid[0, :]), weights, result.tokens)
        _draw_channels(figure, figure.add_subplot(grid[1, 0]), weights[0].T)
        _draw_bytes(figure.add_subplot(grid[1, 1]), result)
        drawn = io.BytesIO()
        figure.savefig(drawn)
    # The colours of a palette are enough, and a third of the bytes.
    Image.open(drawn).convert("RGB").quantize(192).save(path, optimize=True)


def _draw_text(figure: Figure, axes, weights: torch.Tensor, tokens: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """The most selective channel: few tokens share the weight in every window, measured by entropy."""
    channel = int((weights * weights.clamp(min=1e-30).log()).sum(1).mean(0).argmax())
    shown, ratio = weights[:SHOWN_WINDOWS, :, channel], weights.shape[1]
    image = axes.imshow(shown.numpy(), aspect="auto", cmap="YlGnBu", vmin=0, vmax=float(shown.max()))
    for window in range(len(shown)):
        for place in range(ratio):
            value = int(tokens[window * ratio + place])
            text = chr(value) if 32 < value < 127 else {32: "", 10: "↵"}.get(value, "·")
            dark = float(shown[window, place]) > 0.55 * float(shown.max())
            axes.text(place, window, text, ha="center", va="center", fontsize=6.3, family="DejaVu Sans Mono",
                      color="white" if dark else "#222222")  # fmt: skip
    axes.set_title(
        f"What an entry remembers: weight of each byte in one channel ({channel}) of an HCA layer; one row is one window of"
        f" {ratio} tokens and becomes one entry", loc="left", fontsize=11,
    )  # fmt: skip
    axes.set_yticks(range(len(shown)), [f"entry {w}" for w in range(len(shown))], fontsize=8)
    axes.set_xticks([0, 31, 63, 95, 127][: ratio // 32 + 1], labels=["1", "32", "64", "96", "128"][: ratio // 32 + 1])
    axes.set_xlabel("token in its window")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axes, pad=0.005, fraction=0.012, label="weight (sum 1)")


def _draw_channels(figure: Figure, axes, weights: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    """weights: `[channels, ratio]`."""
    ordered = weights[weights.argmax(1).argsort()]
    image = axes.imshow(
        ordered.clamp(min=1e-4).log10().numpy(), aspect="auto", cmap="magma", vmin=-4, vmax=0, interpolation="nearest"
    )
    axes.set_title(f"Entry 0 in all {len(weights)} channels, ordered by the token that each favours", loc="left", fontsize=11)
    axes.set_xlabel("token in its window")
    axes.set_ylabel("channel")
    axes.set_yticks([])
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04, label="weight")
    bar.set_ticks([-4, -3, -2, -1, 0], labels=["≤ 0.0001", "0.001", "0.01", "0.1", "1"])


def _draw_bytes(axes, result: Result) -> None:  # type: ignore[no-untyped-def]
    contexts = sorted({int(2 ** (k / 4)) for k in range(4 * 5, 4 * 20 + 1)})
    for system, kept in kept_bytes(result).items():
        state = sum(kept.state.values())
        axes.plot(
            contexts,
            [kept.total(context) for context in contexts],
            color=COLOURS[system],
            linewidth=2.6 if system == "kvfold" else 1.8,
            label=f"{system}: state {_short(state)}B, with entries at 1M tokens {_short(kept.total(LONGEST))}B",
        )
        axes.axhline(state, color=COLOURS[system], linewidth=0.9, linestyle=(0, (2, 3)))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([2**k for k in (5, 8, 11, 14, 17, 20)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axes.yaxis.set_major_locator(FixedLocator([2**k for k in range(12, 32, 2)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{_short(y)}B"))
    axes.set_xlim(32, LONGEST)
    axes.set_ylim(bottom=axes.get_ylim()[0] / 4)  # room for the note
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    axes.set_title("Bytes kept per sequence, state and entries together", loc="left", fontsize=11)
    axes.set_xlabel("context length (tokens)")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    note = f"dotted: compressor state alone\nstate and entries in {ENTRY_FORMAT} on all sides"
    axes.text(0.99, 0.03, note, transform=axes.transAxes, ha="right", fontsize=8, color="#555555")


def _short(value: float) -> str:
    for unit in ("", "K", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1024
    return f"{value:.3g}G"
