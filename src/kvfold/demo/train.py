"""`kvfold demo --train`: the demo's model learns the text, with transformers' compressors and with kvfold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from rich.table import Table

from ..integrations.transformers import patch
from .model import build_model

LENGTH, BATCH = 512, 2  # of a step's sequences
RATE = 3e-3
# fp32: each step's gradients agree to about 1e-5; what becomes of that in later steps is a matter of the training.
FIRST, LATER = 1e-5, 2e-2
SIDES = {"transformers": "#b5651d", "kvfold": "#1f6f8b"}


@dataclass
class Training:
    """Of one side: the loss and the milliseconds of each step, and the most bytes that were allocated (of a GPU alone)."""

    losses: list[float]
    milliseconds: list[float]
    peak: int


def train(tokens: torch.Tensor, steps: int, *, device: str, seed: int, advance: Callable[[], None]) -> dict[str, Training]:
    """`steps` steps of AdamW on pieces of `tokens` int64 `[1, n]`, the same pieces in the same order on both sides."""
    return {side: _one_side(tokens, steps, device, seed, side == "kvfold", advance) for side in SIDES}


def _one_side(tokens: torch.Tensor, steps: int, device: str, seed: int, patched: bool, advance: Callable[[], None]) -> Training:
    model, draw = build_model(seed, device).train(), torch.Generator().manual_seed(seed)
    if patched:
        patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses, times = [], []
    gpu = device == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        starts = torch.randint(0, tokens.shape[1] - LENGTH, (BATCH,), generator=draw).tolist()
        piece = torch.cat([tokens[:, start : start + LENGTH] for start in starts]).to(device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = model(piece, labels=piece, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))  # waits for the device
        times.append((time.perf_counter() - begin) * 1e3)
        advance()
    return Training(losses, times, torch.cuda.max_memory_allocated() if gpu else 0)


def problems(found: dict[str, Training]) -> list[str]:
    """Where losses differ by more than rounding does."""
    theirs, ours = (found[side].losses for side in SIDES)
    apart = [abs(a - b) / a for a, b in zip(theirs, ours, strict=True)]
    said = []
    if apart[0] > FIRST:
        said.append(f"the first loss differs by {apart[0]:.1e}, bound {FIRST:g}")
    if max(apart) > LATER:
        said.append(f"a loss differs by {max(apart):.1e}, bound {LATER:g}")
    return said


def table(found: dict[str, Training]) -> Table:
    made = Table(title=f"{len(found['kvfold'].losses)} steps of {BATCH} sequences of {LENGTH} bytes")
    for column in ("", "first loss", "last loss", "ms per step", "peak memory"):
        made.add_column(column, justify="right" if column else "left")
    for side, one in found.items():
        peak = f"{one.peak / 2**20:.0f} MB" if one.peak else "-"
        ms = f"{statistics.median(one.milliseconds):.1f}"
        made.add_row(side, f"{one.losses[0]:.4f}", f"{one.losses[-1]:.4f}", ms, peak)
    return made


def draw(found: dict[str, Training], path: Path) -> None:
    """Writes the PNG of both loss curves to `path`, whose directory must exist."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 4.2), dpi=110, facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        for (side, one), width in zip(found.items(), (4.5, 1.6), strict=True):  # the one below shows behind the other
            axes.plot(range(1, len(one.losses) + 1), one.losses, color=SIDES[side], linewidth=width, label=side)
        axes.set_title("A small DeepSeek-V4 learns the text: loss of each step", loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.legend(frameon=False)
        figure.savefig(path, format="png")
