"""The file of `dump`: one call in safetensors, its numbers as JSON in the metadata.

A tensor is in the file as it is, or only the rows that the call touches, with their indices in `NAME.kept`. How it lay in
memory, which kernels are chosen by, is in the metadata.
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from .compress import Compressor
from .debug_call import PLAN_TENSORS, Call, laid_out
from .plan import StepPlan
from .records import EntryCache, RecordFormat
from .snapshots import Snapshots
from .spec import CompressorSpec
from .state import FoldState
from .window_state import WindowState

VERSION = 1  # grows when a file of this version can no longer be read as it was
PLAN_NUMBERS = (
    "ratio", "max_new_tokens", "batch", "max_tokens", "entry_capacity", "item_capacity", "rows_per_page", "page_size",
    "snapshot_page_size",
)  # fmt: skip


def tensors_of(call: Call) -> dict[str, torch.Tensor]:
    """All tensors of a call, by the names that they have in the file."""
    plan = call.plan
    found = {f"plan.{name}": getattr(plan, name) for name in PLAN_TENSORS}
    found["plan.kv_table"], found["plan.score_table"] = plan.block_tables or (None, None)
    found["rows"] = call.rows
    for i, c in enumerate(call.compressors):
        some = {"kv_score": c.kv_score, "ape": c.ape, "norm_weight": c.norm_weight, "rope": c.rope}
        parts = {"state": ("rows", "positions", "kv", "score"), "cache": ("pages", "scale_pages")}
        for what, names in (parts | {"snapshots": ("rows", "positions")}).items():
            some |= {f"{what}.{name}": getattr(getattr(c, what), name, None) for name in names}
        found |= {f"{i}.{name}": tensor for name, tensor in some.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def write(path: str | os.PathLike, call: Call, history: Sequence[torch.Tensor | None] | None, whole: bool) -> None:
    save_file = _safetensors("torch").save_file
    named = tensors_of(call) | {f"history.{b}": x for b, x in enumerate(history or ()) if x is not None}
    kept, stored, layouts = {} if whole else _touched(call), {}, {}
    for name, tensor in named.items():
        here = kept.get(name)
        stored[name] = (tensor if here is None else tensor[here]).detach().to("cpu", copy=True).contiguous()
        if here is not None:
            stored[f"{name}.kept"] = here.cpu()
        layouts[name] = {"shape": [*tensor.shape], "stride": [*tensor.stride()], "address": tensor.data_ptr() % 16}
    about = {
        "call": call.name,
        "backend": call.backend,
        "pdl": call.pdl,
        "device": _device(call.plan.items.device),
        "versions": _versions(),
        "plan": {name: getattr(call.plan, name) for name in PLAN_NUMBERS},
        "compressors": [_numbers(c) for c in call.compressors],
        "tensors": layouts,
        "crc32": {name: _sum(tensor) for name, tensor in stored.items()},
    }
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    text = json.dumps(about)
    said = {"kvfold.dump": str(VERSION), "kvfold": about["versions"]["kvfold"], "about": text}
    save_file(stored, part, metadata=said | {"crc32": str(zlib.crc32(text.encode()))})
    os.replace(part, path)


def read(path: str | os.PathLike, device: torch.device) -> tuple[Call, list[torch.Tensor | None] | None, dict]:
    """The call with tensors of its own on `device`, its history, and the metadata."""
    about, stored = _load(path)
    try:
        wrong = sorted(stored.keys() ^ about["crc32"].keys())
        wrong += [name for name, tensor in stored.items() if name not in wrong and _sum(tensor) != about["crc32"][name]]
        if wrong:
            raise ValueError(f"tensor {wrong[0]} is missing, new or changed")
        named = {name: _lay_out(name, stored, layout, device) for name, layout in about["tensors"].items()}
        plan = _plan(about["plan"], named)
        compressors = tuple(_compressor(i, one, named) for i, one in enumerate(about["compressors"]))
        call = Call(about["call"], compressors, plan, named.get("rows"), about["backend"], about["pdl"])
        history = [named.get(f"history.{b}") for b in range(plan.batch)]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"path must name a whole file of kvfold.dump, {path} is damaged: {error}") from error
    return call, history if any(x is not None for x in history) else None, about


def _load(path: str | os.PathLike) -> tuple[dict, dict[str, torch.Tensor]]:
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict, it does not iterate)
    except safetensors.SafetensorError as error:
        raise ValueError(f"path must name a file of kvfold.dump, {path} is none or is damaged: {error}") from None
    if "kvfold.dump" not in said:
        raise ValueError(f"path must name a file of kvfold.dump, {path} is another safetensors file")
    if said["kvfold.dump"] != str(VERSION):
        have = f"version {said['kvfold.dump']}, of kvfold {said.get('kvfold')}"
        raise ValueError(f"path must name a file of format version {VERSION}, {path} has {have}")
    try:
        if said["crc32"] != str(zlib.crc32(said["about"].encode())):
            raise ValueError("its numbers have changed")
        about = json.loads(said["about"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"path must name a whole file of kvfold.dump, {path} is damaged: {error}") from None
    return about, stored


def _safetensors(module: str = ""):
    try:
        import numpy  # noqa: F401  for checksums
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("kvfold.dump and kvfold.replay need safetensors and numpy: pip install 'kvfold[debug]'") from error
    return getattr(safetensors, module) if module else safetensors


def _sum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


# What a call touches, so that a file need not hold the rest.


def _touched(call: Call) -> dict[str, torch.Tensor]:
    """Of tensors that are larger than a step: the indices, along their first dimension, that the call reads or writes."""
    plan, found = call.plan, {}
    items = plan.items[: int(plan.num_items)].long()
    spans = items[:, [4, 6, 1, 2]].unique(dim=0)  # slot, sequence, start and end
    for i, c in enumerate(call.compressors):
        if isinstance(c.state, FoldState):
            slots = spans[:, 0] if plan.state_slots is None else torch.cat((spans[:, 0], plan.state_slots.long()))
            _put(found, c.state, f"{i}.state", ("rows", "positions"), slots)
        elif isinstance(c.state, WindowState):
            first = (spans[:, 2] // plan.ratio - int(c.spec.overlap)).clamp(min=0) * plan.ratio
            for name, table in zip(("kv", "score"), plan.block_tables, strict=True):
                pages = _pages(table, spans[:, 0], first, spans[:, 3], plan.page_size)
                _put(found, c.state, f"{i}.state", (name,), pages)
        if c.snapshots is not None:
            pages = _pages(plan.snapshot_table, spans[:, 1], spans[:, 2], spans[:, 3], plan.snapshot_page_size)
            _put(found, c.snapshots, f"{i}.snapshots", ("rows", "positions"), pages)
        if c.cache is not None:
            pages = plan.entry_slots.div(c.cache.rows_per_page, rounding_mode="floor")
            _put(found, c.cache, f"{i}.cache", ("pages", "scale_pages"), pages)
        _put(found, c, f"{i}", ("rope",), items[:, 0] * plan.ratio)
    return found


def _put(found: dict[str, torch.Tensor], of: object, prefix: str, names: tuple[str, ...], indices: torch.Tensor) -> None:
    """What is no index of the tensor is refused by the call, and so is nothing to keep."""
    for name in names:
        tensor = getattr(of, name)
        if tensor is not None:
            found[f"{prefix}.{name}"] = indices[(indices >= 0) & (indices < tensor.shape[0])].unique()


def _pages(table: torch.Tensor, row: torch.Tensor, first: torch.Tensor, end: torch.Tensor, size: int) -> torch.Tensor:
    """What a table says of the pages of positions `[first, end)` of each sequence, which has this row of the table."""
    inside = (row >= 0) & (row < table.shape[0])
    row, first, end = row[inside], first[inside, None], end[inside, None]
    column = torch.arange(table.shape[1], device=table.device)
    return table[row][(column >= first // size) & (column <= (end - 1) // size)].long()


# Numbers of the metadata, and objects from them.


def _numbers(c: Compressor) -> dict:
    state, cache = c.state, c.cache
    return {
        "spec": asdict(c.spec),
        "state": None if state is None else {"kind": type(state).__name__, "most": getattr(state, "max_new_tokens", None)},
        "cache": None
        if cache is None
        else {"format": asdict(cache.format), "rows_per_page": cache.rows_per_page, "scale": cache.scale},
        "snapshots": None if c.snapshots is None else {"page_size": c.snapshots.page_size},
    }


def _versions() -> dict[str, str]:
    from . import __version__

    found = {"kvfold": __version__, "python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _device(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"type": device.type, "name": platform.machine()}
    major, minor = torch.cuda.get_device_capability(device)
    return {"type": "cuda", "name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}


def _lay_out(name: str, stored: dict[str, torch.Tensor], layout: dict, device: torch.device) -> torch.Tensor:
    contents, kept, shape = stored[name], stored.get(f"{name}.kept"), layout["shape"]
    shape = shape if kept is None else [len(kept), *shape[1:]]
    if list(contents.shape) != shape:
        raise ValueError(f"tensor {name} must have shape {shape}, got {list(contents.shape)}")
    made = laid_out(layout["shape"], layout["stride"], layout["address"], contents.dtype, device)
    if kept is None:
        return made.copy_(contents)
    if name.endswith(".positions"):
        made.fill_(-1)  # nobody is there
    made[kept.to(device)] = contents.to(device)
    return made


def _plan(numbers: dict, named: dict[str, torch.Tensor]) -> StepPlan:
    plan = StepPlan()
    for name in PLAN_NUMBERS:
        setattr(plan, name, numbers[name])
    for name in PLAN_TENSORS:
        setattr(plan, name, named.get(f"plan.{name}"))
    tables = named.get("plan.kv_table"), named.get("plan.score_table")
    plan.block_tables, plan.fresh = None if tables[0] is None else tables, True
    return plan


def _compressor(i: int, numbers: dict, named: dict[str, torch.Tensor]) -> Compressor:
    spec = CompressorSpec(**numbers["spec"])

    def get(name: str) -> torch.Tensor | None:
        return named.get(f"{i}.{name}")

    state, cache, snapshots = numbers["state"], numbers["cache"], numbers["snapshots"]
    if state is not None and state["kind"] == "FoldState":
        state = FoldState(spec, get("state.rows"), get("state.positions"), state["most"])
    elif state is not None:
        state = WindowState(get("state.kv"), get("state.score"))
    if cache is not None:
        fields = cache["format"]
        fmt = RecordFormat(**fields | {"head_dims": tuple(fields["head_dims"])})
        pages, scales = get("cache.pages"), get("cache.scale_pages")
        cache = EntryCache(pages, fmt, cache["rows_per_page"], spec, scales=scales, scale=cache["scale"])
    if snapshots is not None:
        snapshots = Snapshots(spec, get("snapshots.rows"), get("snapshots.positions"), snapshots["page_size"])
    return Compressor(get("kv_score"), state, cache, spec, get("ape"), get("norm_weight"), get("rope"), snapshots)
