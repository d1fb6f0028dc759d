"""The command line: `kvfold demo` and `kvfold info`."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    raise ImportError(f"kvfold's command line needs {error.name}: pip install 'kvfold[demo]'") from error

app = typer.Typer(help="GPU kernels for DeepSeek-V4's KV-cache compressor.", no_args_is_help=True, add_completion=False)


@app.command()
def demo(
    text: Annotated[Path | None, typer.Option(help="File to read as bytes; default: the repository's DESIGN.md.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    drafts: Annotated[int, typer.Option(min=0, max=64, help="Proposed tokens per step in the draft run.")] = 4,
    seed: Annotated[int, typer.Option(help="Of weights, chunk sizes and rejected drafts.")] = 0,
    out: Annotated[Path, typer.Option(help="Directory for the picture.")] = Path("demo-out"),
    tokens: Annotated[int | None, typer.Option(hidden=True, min=64, help="Most bytes to read.")] = None,
    decode: Annotated[int | None, typer.Option(hidden=True, min=1, help="Of these, decoded one by one.")] = None,
) -> None:
    """Runs a small DeepSeek-V4 on a text, with transformers' compressors and with kvfold, and compares everything."""
    console = Console()
    try:
        from . import demo as job
        from .demo_plot import draw
        from .demo_show import show
    except ImportError as error:
        console.print(f"kvfold demo needs {error.name}: pip install 'kvfold\\[demo]'", style="red", soft_wrap=True)
        raise typer.Exit(2) from None
    import torch

    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        have = "cpu or cuda" if torch.cuda.is_available() else "cpu (no GPU here)"
        raise typer.BadParameter(f"--device must be {have}, got {device!r}")
    try:
        ids, path = job.read_text(text, tokens or job.MOST_TOKENS)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    console.print(f"{ids.shape[1]} bytes of {path.name} through 2 HCA and 2 CSA layers, fp32 on {device}, seed {seed}")
    columns = (TextColumn("reading"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading", total=job.work(ids.shape[1]))
        result = job.run(
            ids, device=device, drafts=drafts, seed=seed, decoded=decode or job.DECODED,
            advance=lambda done: progress.advance(task, done),
        )  # fmt: skip
    show(result, console)
    picture = out / "kvfold-demo.png"
    draw(result, picture)
    console.print(f"Picture: {picture}", soft_wrap=True)
    if result.problems:
        raise typer.Exit(1)


@app.command()
def info(
    formats: Annotated[bool, typer.Option("--formats", help="Only the record formats, with every field.")] = False,
) -> None:
    """Versions, the GPU, and the record formats that entries can be kept in."""
    console = Console()
    if not formats:
        console.print(_versions())
    console.print(_formats(every_field=formats))


def _versions() -> Table:
    import torch

    from . import __version__

    table = Table("what", "version", title="Versions")
    table.add_row("python", platform.python_version())
    table.add_row("kvfold", __version__)
    for package in ("torch", "triton", "transformers"):
        try:
            table.add_row(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            table.add_row(package, "not installed")
    if torch.cuda.is_available():
        table.add_row("GPU", torch.cuda.get_device_name())
    else:
        table.add_row("GPU", "none found; kvfold runs on its torch backend")
    return table


def _formats(every_field: bool) -> Table:
    from .records import FORMATS
    from .spec import V4_HCA, V4_INDEXER

    more = ("page of 64", "tail at", "floor", "pad", "bf16 first", "e2m1 ties") if every_field else ()
    table = Table("format", "head_dim", "bytes", "element", "scales", *more, "source", title="Record formats")
    for fmt in FORMATS.values():
        spec = V4_HCA if not fmt.head_dims or 512 in fmt.head_dims else V4_INDEXER
        element = f"{fmt.element}, rotated bf16" if fmt.rotated_bf16 else fmt.element
        scales = {"none": "none", "static": "one per cache"}.get(fmt.scale, f"{fmt.scale} per {fmt.group}")
        fields: tuple[str, ...] = ()
        if every_field:
            where = "own buffer" if fmt.separate else f"{fmt.row_bytes(spec)}*N" if fmt.scale_bytes else "-"
            floor = f"{fmt.floor:.3g} on {fmt.floor_on}" if fmt.floor else "-"
            pad = "-" if not fmt.pad else "zeroed" if fmt.pad_written else "left alone"
            first = ", ".join(name for name, on in (("rows", fmt.round_rows), ("values", fmt.round_values)) if on) or "-"
            ties = "-" if fmt.element != "e2m1" else "to zero, no -0" if fmt.ties_to_zero else "to even"
            fields = (str(fmt.page_bytes(spec, 64)), where, floor, pad, first, ties)
        width = " or ".join(map(str, fmt.head_dims)) or "any"
        table.add_row(fmt.name, width, str(fmt.record_bytes(spec)), element, scales, *fields, fmt.source)
    return table
