"""`kvfold demo`: a small DeepSeek-V4 reads a text, through transformers and through kvfold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failures import MOST_SEED, stop, wrong_arguments
from .show import check_device, make_console, make_progress

if TYPE_CHECKING:
    import torch
    from rich.console import Console


def demo(
    text: Annotated[Path | None, typer.Option(help="File to read as bytes; default: kvfold's DESIGN.md, or a module.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    drafts: Annotated[int, typer.Option(min=0, max=64, help="Proposed tokens per step in the draft run.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of weights, chunk sizes and rejected drafts.")] = 0,
    train: Annotated[int, typer.Option(min=0, help="Steps of training to compare instead of reading; try 50.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for the picture.")] = Path("demo-out"),
    tokens: Annotated[int | None, typer.Option(hidden=True, min=64, help="Most bytes to read.")] = None,
    decode: Annotated[int | None, typer.Option(hidden=True, min=1, help="Of these, decoded one by one.")] = None,
) -> None:
    """Runs a small DeepSeek-V4 on a text, with transformers' compressors and with kvfold, and compares everything."""
    console = make_console()
    try:
        from kvfold.arguments.files import check_writable, write_atomically
        from kvfold.demo import run as job
        from kvfold.demo.plot import draw
        from kvfold.demo.show import show
    except ImportError as error:
        raise stop(f"needs {error.name}: pip install 'kvfold[demo]'", "kvfold demo") from None
    check_device(device)
    with wrong_arguments(ValueError):
        ids, path = job.read_text(text, tokens or job.MOST_TOKENS)
    if train:
        _train(console, ids, train, device, seed, out / "kvfold-train.png")
        return
    picture = out / "kvfold-demo.png"
    check_writable(picture)
    console.print(f"{ids.shape[1]} bytes of {path.name} through 2 HCA and 2 CSA layers, fp32 on {device}, seed {seed}")
    with make_progress(console) as progress:
        task = progress.add_task("tokens read", total=job.work(ids.shape[1]))
        how = {"device": device, "drafts": drafts, "seed": seed, "decoded": decode or job.DECODED}
        result = job.run(ids, advance=lambda done: progress.advance(task, done), **how)
    show(result, console)
    with write_atomically(picture) as beside:
        draw(result, beside)
    console.print(f"Picture: {picture}", soft_wrap=True)
    if result.problems:
        raise typer.Exit(1)


def _train(console: Console, ids: torch.Tensor, steps: int, device: str, seed: int, picture: Path) -> None:
    """The other part of the demo: gradients in place of entries."""
    from kvfold.arguments.files import check_writable, write_atomically
    from kvfold.demo import train as job

    check_writable(picture)
    console.print(f"{steps} steps on {ids.shape[1]} bytes, with transformers' compressors and with kvfold, fp32 on {device}")
    with make_progress(console) as progress:
        task = progress.add_task("steps", total=2 * steps)
        found = job.train(ids, steps, device=device, seed=seed, advance=lambda: progress.advance(task, 1))
    console.print(job.table(found))
    with write_atomically(picture) as beside:
        job.draw(found, beside)
    console.print(f"Picture: {picture}", soft_wrap=True)
    said = job.problems(found)
    for problem in said:
        console.print(f"[bold red]disagreement[/] {problem}")
    if said:
        raise typer.Exit(1)
