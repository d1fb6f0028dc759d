"""`kvfold info`: versions, the GPU, the kernels' table and the record formats."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def info(
    formats: Annotated[bool, typer.Option("--formats", help="Only the record formats, with every field.")] = False,
) -> None:
    """Versions, the GPU, what kernels are configured for, and the record formats that entries can be kept in."""
    console = Console()
    if not formats:
        console.print(_versions())
        console.print(_kernels())
    console.print(_formats(every_field=formats))


def _versions() -> Table:
    import torch

    from .. import __version__

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
        table.add_row("capability", ".".join(map(str, torch.cuda.get_device_capability())))
        table.add_row("dependent launch", _dependent_launch())
    else:
        table.add_row("GPU", "none found; kvfold runs on its torch backend")
    return table


def _dependent_launch() -> str:
    import torch

    from ..kernels.dispatch import supports_pdl

    return "yes" if supports_pdl(torch.device("cuda", torch.cuda.current_device())) else "no: needs sm_90 and triton 3.4"


def _kernels() -> Table:
    """The table that kernels are chosen by, as it is in kernels/configs.py."""
    from ..kernels.configs import ANY, CONFIGS

    table = Table(
        "state", "head_dim", "tokens of an entry", "new tokens", "windows", "warps", "in flight", "slice", "registers",
        "programs",
        title="Kernels: of the rows that serve a call, the first",
    )  # fmt: skip
    for c in CONFIGS:
        bounds = (f"{low} to {high}" if low != high else str(low) for low, high in (c.head_dims, c.window_rows))
        most = "any" if c.max_new_tokens == ANY else f"up to {c.max_new_tokens}"
        table.add_row(
            c.kind, *bounds, most, "any" if c.most_items == ANY else f"up to {c.most_items}", str(c.num_warps), str(c.ahead),
            str(c.slice or "whole"), str(c.registers or "unbound"), str(c.programs or "one each"),
        )  # fmt: skip
    return table


def _formats(every_field: bool) -> Table:
    from ..records import FORMATS
    from ..spec import V4_HCA, V4_INDEXER

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
