"""`kvfold info`: versions, the GPU, engines that kvfold is plugged into, the kernels' table and the record formats."""

from __future__ import annotations

from typing import Annotated

import typer

from .show import make_console, print_table

Rows = list[tuple[str, ...]]


def info(
    formats: Annotated[bool, typer.Option("--formats", help="Only the record formats, with every field.")] = False,
) -> None:
    """Versions, the GPU, engines (those of KVFOLD_ENGINES are tried), what kernels are configured for, and record formats."""
    from ..backend_triton.table import COLUMNS, in_words
    from ..integrations import status

    console = make_console()
    if not formats:
        print_table(console, "Versions", ("what", "version"), _versions())
        print_table(console, "Integrations", ("engine", "version", "entry point", "replaced"), status(load=True))
        title = "Kernels: the first row that serves a call; windows and programs per multiprocessor"
        print_table(console, title, COLUMNS, in_words())
    print_table(console, "Record formats", FORMATS + MORE if formats else FORMATS, _formats(every_field=formats))


FORMATS = ("format", "head_dim", "bytes", "element", "scales", "source")
MORE = ("page of 64", "tail at", "floor", "pad", "bf16 first", "e2m1 ties")


def _versions() -> Rows:
    import torch

    from ..debug.file import versions

    rows = list(versions("torch", "triton", "transformers").items())
    if torch.cuda.is_available():
        from ..backend_triton.launcher import supports_pdl

        rows.append(("GPU", torch.cuda.get_device_name()))
        rows.append(("capability", ".".join(map(str, torch.cuda.get_device_capability()))))
        pdl = supports_pdl(torch.device("cuda", torch.cuda.current_device()))
        rows.append(("dependent launch", "yes" if pdl else "no: needs sm_90 and triton 3.5"))
    else:
        rows.append(("GPU", "none found; kvfold runs on its torch backend"))
    return rows


def _formats(every_field: bool) -> Rows:
    from ..spec import V4_HCA, V4_INDEXER
    from ..storage.formats import FORMATS as formats

    rows = []
    for fmt in formats.values():
        spec = V4_HCA if not fmt.head_dims or 512 in fmt.head_dims else V4_INDEXER
        element = f"{fmt.element}, rotated bf16" if fmt.rotated_bf16 else fmt.element
        scales = {"none": "none", "static": "one per cache"}.get(fmt.scale, f"{fmt.scale} per {fmt.group}")
        fields: tuple[str, ...] = ()
        if every_field:
            inside = "in each record" if fmt.interleaved else f"{fmt.row_bytes(spec)}*N" if fmt.scale_bytes else "-"
            where = "own buffer" if fmt.separate else inside
            floor = f"{fmt.floor:.3g} on {fmt.floor_on}" if fmt.floor else "-"
            pad = "-" if not fmt.pad else "zeroed" if fmt.pad_written else "left alone"
            first = [name for name in ("rows", "normed", "values") if getattr(fmt, f"round_{name}")]
            first = ", ".join([*first, *[f"{fmt.fp4_first} and back"] * bool(fmt.fp4_first)]) or "-"
            ties = "to zero, no -0" if fmt.ties_to_zero else "to even, no -0" if fmt.unsigned_zero else "to even"
            ties = ties if fmt.element == "e2m1" else "-"
            fields = (str(fmt.page_bytes(spec, 64)), where, floor, pad, first, ties)
        width = " or ".join(map(str, fmt.head_dims)) or "any"
        rows.append((fmt.name, width, str(fmt.record_bytes(spec)), element, scales, fmt.source, *fields))
    return rows
