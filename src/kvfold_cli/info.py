"""`kvfold info`: versions, the GPU, engines that kvfold is plugged into, the record formats and the kernels' table."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from .show import make_console, print_table, print_text

Rows = list[tuple[str, ...]]
ENGINES = ("vLLM", "SGLang", "TensorRT-LLM", "FlashInfer")
KINDS = {
    "fold": "fold rows",
    "mean": "rows of maximum, sum and mean",
    "rows": "kept input rows",
    "window": "raw rows in pages",
    "store": "pooled rows that are stored",
}
FORMAT_COLUMNS = (
    "format", "head_dim", "bytes", "element", "scales", "source", "page of 64", "tail at", "floor", "pad", "bf16 first",
    "e2m1 ties",
)  # fmt: skip


def info(
    kernels: Annotated[bool, typer.Option("--kernels", help="Only the kernels' table: which row serves which call.")] = False,
    formats: Annotated[bool, typer.Option("--formats", help="Only the record formats, with every field.")] = False,
) -> None:
    """Versions, the GPU, engines (those of KVFOLD_ENGINES are tried), and the names of the record formats."""
    console = make_console()
    if not kernels and not formats:
        from kvfold.integrations import status

        print_table(console, "Versions", ("what", "version"), _versions())
        print_table(console, "Integrations", ("engine", "version", "entry point", "replaced"), status(load=True))
        if packages := _packages():
            print_table(console, "Prebuilt kernels", ("folder", "kernels", "for", "used here"), packages)
        print_table(console, "Record formats", ("written by", "formats"), _names())
        print_text(console, "More: kvfold info --formats, kvfold info --kernels")
    if kernels:
        _print_kernels(console)
    if formats:
        print_table(console, "Record formats", FORMAT_COLUMNS, _formats())


def _print_kernels(console: Console) -> None:
    from kvfold.backend_triton.table import COLUMNS, in_words

    print_text(console, "The first row that serves a call is taken. Windows and programs are per multiprocessor.")
    rows = in_words()
    for kind in dict.fromkeys(row[0] for row in rows):
        print_table(console, f"Kernels for {KINDS[kind]}", COLUMNS, [row for row in rows if row[0] == kind])


def _names() -> Rows:
    """Who writes which formats; one that several write is said of each."""
    from kvfold.storage.formats import FORMATS

    found: dict[str, list[str]] = {engine + version: [] for engine in ENGINES for version in (" V4", " V4.1")} | {
        "any engine": []
    }
    for fmt in FORMATS.values():
        version = " V4.1" if "V4.1" in fmt.source or "V41" in fmt.source else " V4"
        for engine in [name + version for name in ENGINES if name in fmt.source] or ["any engine"]:
            found[engine].append(fmt.name)
    return [(engine, " ".join(names)) for engine, names in found.items() if names]


def _versions() -> Rows:
    import torch

    from kvfold.debug.file import versions

    rows = list(versions("torch", "triton", "transformers").items())
    if torch.cuda.is_available():
        from kvfold.backend_triton.launcher import supports_pdl

        rows.append(("GPU", torch.cuda.get_device_name()))
        rows.append(("capability", ".".join(map(str, torch.cuda.get_device_capability()))))
        pdl = supports_pdl(torch.device("cuda", torch.cuda.current_device()))
        rows.append(("dependent launch", "yes" if pdl else "no: needs sm_90 and triton 3.5"))
    else:
        rows.append(("GPU", "none found; kvfold runs on its torch backend"))
    return rows


def _packages() -> Rows:
    """Packages of prebuilt kernels that are installed, and why one is refused."""
    from importlib.util import find_spec

    import torch

    if find_spec("triton") is None:
        return []
    from kvfold.backend_triton import prebuilt
    from kvfold.backend_triton.launcher import multiprocessors

    rows, here = [], None
    if torch.cuda.is_available():
        import triton

        target = triton.runtime.driver.active.get_current_target()
        here = prebuilt.facts_of(target, multiprocessors(torch.device("cuda", torch.cuda.current_device())))
    for package in prebuilt.packages():
        facts, why = package.facts, package.damaged
        made_for = "-" if facts is None else f"{facts.target}, {facts.multiprocessors} multiprocessors, Triton {facts.triton}"
        if not why and facts is not None:
            # Without a GPU the rest may still be told.
            why = package.refused(here or prebuilt.without_gpu(facts))
            why = why or ("" if here else "there is no GPU")
        rows.append((str(package.folder), str(len(package.kernels)), made_for, f"no: {why}" if why else "yes"))
    return rows


def _formats() -> Rows:
    from kvfold.spec import V4_HCA, V4_INDEXER
    from kvfold.storage.formats import FORMATS

    rows = []
    for fmt in FORMATS.values():
        spec = V4_HCA if not fmt.head_dims or 512 in fmt.head_dims else V4_INDEXER
        element = f"{fmt.element}, rotated bf16" if fmt.rotated_bf16 else fmt.element
        scales = {"none": "none", "static": "one per cache"}.get(fmt.scale, f"{fmt.scale} per {fmt.group}")
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
