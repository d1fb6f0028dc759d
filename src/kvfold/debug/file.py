"""The file of `dump`: one call in safetensors, its numbers as JSON in the metadata.

A tensor is in the file as it is, or only the rows that the call touches, with their indices in `NAME.kept`. How it lay in
memory, which kernels are chosen by, is in the metadata.
"""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._version import __version__
from ..arguments.files import write_atomically
from ..backend_torch.items import Items
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.formats import RecordFormat
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor
from ..storage.window_state import WindowState
from . import bounds
from .call import Call, History, Places, check_history, laid_out, put

VERSION = 1  # grows when a file of this version can no longer be read as it was
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8}
_DAMAGES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # what a wrong field can cause
PLAN_TENSORS = [name for name in bounds.PLAN_SHAPES if name not in ("kv_table", "score_table")]
T = TypeVar("T")


def tensors_of(call: Call) -> dict[str, Tensor]:
    """All tensors of a call, by the names that they have in the file."""
    plan, found = call.plan, {"rows": call.rows, "latent": call.latent}
    if plan is not None:
        found |= {f"plan.{name}": getattr(plan, name) for name in PLAN_TENSORS}
        found["plan.kv_table"], found["plan.score_table"] = plan.block_tables or (None, None)
    if call.places is not None:
        found |= {name: getattr(call.places, name) for name in bounds.PLACES}
    for i, c in enumerate(call.compressors):
        if c.cache is not None and isinstance(c.cache.scale, Tensor):
            found[f"{i}.cache.scale"] = c.cache.scale_tensor
        if i and call.places is not None:  # the same rows go to another cache
            found |= {f"{i}.cache.{name}": getattr(c.cache, name) for name in ("pages", "scale_pages")}
            continue
        for name in bounds.TENSORS:
            part, _, field = name.rpartition(".")
            found[f"{i}.{name}"] = getattr(getattr(c, part) if part else c, field, None)
        found |= {f"{i}.kv_score": c.value, f"{i}.scores": c.score}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def write(path: str | os.PathLike, call: Call, history: History, whole: bool) -> None:
    safetensors, place = _safetensors(), Path(bounds.check_path(path, new=True))  # safetensors writes over devices, too
    named = tensors_of(call) | {f"history.{b}": x for b, x in enumerate(history or ()) if x is not None}
    touched, stored, layouts = {} if whole else _touched(call), {}, {}
    for name, tensor in named.items():
        layouts[name] = {"shape": [*tensor.shape], "stride": [*tensor.stride()], "address": tensor.data_ptr() % 16}
        if name in touched:  # what is no index of the tensor is refused by the call, and so is nothing to keep
            indices = touched[name]
            kept = indices[(indices >= 0) & (indices < len(tensor))].unique()
            stored[f"{name}.kept"], tensor = kept.cpu(), tensor[kept]
        stored[name] = tensor.detach().to("cpu", copy=True).contiguous()
    about = {
        "call": call.name,
        "backend": call.backend,
        "pdl": call.pdl,
        "device": _device(call.device),
        "versions": versions("torch", "triton"),
        "plan": None if call.plan is None else _plan_numbers(call.plan),
        "compressors": [_numbers(c) for c in call.compressors],
        "tensors": layouts,
        "crc32": {name: _sum(tensor) for name, tensor in stored.items()},
    }
    text = json.dumps(about)
    said = {"kvfold.dump": str(VERSION), "kvfold": about["versions"]["kvfold"], "about": text}
    try:
        if not place.parent.is_dir():
            raise OSError(f"path cannot be written, {place}: its folder is not there")
        with write_atomically(place) as beside:
            safetensors.torch.save_file(stored, beside, metadata=said | {"crc32": str(zlib.crc32(text.encode()))})
    except safetensors.SafetensorError as error:
        raise OSError(f"path cannot be written, {place}: {error}") from None


def read(path: str | os.PathLike, device: torch.device, max_bytes: int | None) -> tuple[Call, History, dict]:
    """The call with tensors of its own on `device`, its history, and the metadata; all checked before it is made use of."""
    text = bounds.check_path(path)
    if max_bytes is None:
        max_bytes = bounds.default_room(os.path.getsize(text), device)
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(text, framework="pt") as file:
            said = file.metadata() or {}
            _check_version(text, said)
            try:
                if said["crc32"] != str(zlib.crc32(said["about"].encode())):
                    raise ValueError("its numbers have changed")
                about = bounds.check_about(bounds.parse(said["about"]))
                return *_make(text, about, file, device, max_bytes), about
            except _DAMAGES as error:
                raise ValueError(f"path must name a whole file of kvfold.dump, {text} is damaged: {error}") from error
    except bounds.RoomError as error:
        raise ValueError(str(error)) from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"path must name a file of kvfold.dump, {text} is none or is damaged: {error}") from None


def _check_version(path: str, said: dict[str, str]) -> None:
    if "kvfold.dump" not in said:
        raise ValueError(f"path must name a file of kvfold.dump, {path} is another safetensors file")
    if said["kvfold.dump"] != str(VERSION):
        have = f"version {said['kvfold.dump'][:20]}, of kvfold {said.get('kvfold', '')[:20]}"
        raise ValueError(f"path must name a file of format version {VERSION}, {path} has {have}")


def _make(path: str, about: dict, file: Any, device: torch.device, max_bytes: int) -> tuple[Call, History]:
    """The call and its history: first what is small and bounds the rest, then the rest."""
    specs = [_built(f"compressors[{i}].spec", CompressorSpec, **one["spec"]) for i, one in enumerate(about["compressors"])]
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no dict, it does not iterate)
    stored = {name: (_dtype(name, one), list(one.get_shape())) for name, one in slices.items()}
    bounds.check_stored(about, stored)
    plan, places = None if about["plan"] is None else _numbered(about["plan"]), None
    if plan is None:
        rows = stored["0.kv_score"][1][0]
    else:
        small = {name: _checked(name, about, file) for name in ("plan.items", "plan.num_items", "plan.entry_items")}
        rows = bounds.check_items(about["plan"], *small.values(), "plan.state_slots" not in about["tensors"])
    bounds.check_room(path, about, stored, rows, max_bytes)
    named = {name: _lay_out(name, about, file, name + ".kept" in stored, device) for name in about["tensors"]}
    if plan is None:
        places = Places(**{name: named.get(name) for name in bounds.PLACES})
        for name in ("kv_score", "norm_weight", "rope"):
            named[f"1.{name}"] = named.get(f"0.{name}")
    else:
        _tensors_of_plan(plan, named)
    compressors = tuple(_compressor(i, one, specs[i], named) for i, one in enumerate(about["compressors"]))
    outputs = named.get("rows"), named.get("latent")
    call = Call(about["call"], compressors, plan, outputs[0], about["backend"], about["pdl"], outputs[1], places)
    call.check("torch")
    history = [named.get(f"history.{b}") for b in range(0 if plan is None else plan.batch)]
    known = history if any(x is not None for x in history) else None
    check_history(known, call)
    return call, known


def _safetensors() -> Any:
    try:
        import numpy  # noqa: F401  for checksums
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("kvfold.dump and kvfold.replay need safetensors and numpy: pip install 'kvfold[debug]'") from error
    return safetensors


def _sum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


# What a call touches, so that a file need not hold the rest.


def _touched(call: Call) -> dict[str, Tensor]:
    """Of tensors that are larger than a step: the indices, along their first dimension, that the call reads or writes."""
    if call.places is not None:
        return _touched_places(call)
    plan, found, items = call.plan, {}, Items.of(call.plan)
    slot, sequence, start, end = torch.stack((items.slot, items.sequence, items.start, items.end)).unique(dim=1)
    for i, c in enumerate(call.compressors):
        here = {"rope": items.window * plan.ratio}
        if isinstance(c.state, FoldState):
            here["state.rows"] = here["state.positions"] = torch.cat((slot, plan.state_slots.long()))
        elif isinstance(c.state, WindowState):
            first = (start // plan.ratio - int(c.spec.overlap)).clamp(min=0) * plan.ratio
            for name, table in zip(("kv", "score"), plan.block_tables, strict=True):
                pages = _pages(table, slot, first, end, plan.page_size, plan.ring)
                here[f"state.{name}"] = pages if plan.null_page is None else pages[pages != plan.null_page]
        if c.snapshots is not None:
            pages = _pages(plan.snapshot_table, sequence, start, end, plan.snapshot_page_size)
            here["snapshots.rows"] = here["snapshots.positions"] = pages
        if c.cache is not None:
            entries = items.entry[(items.entry >= 0) & (items.entry < plan.entry_capacity)]
            pages = plan.entry_slots[entries].div(c.cache.rows_per_page, rounding_mode="floor")
            here["cache.pages"] = here["cache.scale_pages"] = pages
        found |= {f"{i}.{name}": indices for name, indices in here.items()}
    return found


def _touched_places(call: Call) -> dict[str, Tensor]:
    """The same of a `store` without a plan."""
    slots, positions = call.places.slots.long(), call.places.positions
    found = {} if positions is None else {"0.rope": positions.long()}
    for i, c in enumerate(call.compressors):
        pages = slots.div(c.cache.rows_per_page, rounding_mode="floor")
        found |= {f"{i}.cache.pages": pages, f"{i}.cache.scale_pages": pages}
    return found


def _pages(table: Tensor, row: Tensor, first: Tensor, end: Tensor, size: int, ring: bool = False) -> Tensor:
    """What a table says of the pages of positions `[first, end)` of each sequence, which has this row of the table."""
    inside, width = (row >= 0) & (row < table.shape[0]), table.shape[1]
    row, first, last = row[inside], first[inside, None] // size, (end[inside, None] - 1) // size
    column = torch.arange(width, device=table.device)
    if ring:  # a column is the first one from `first` on that it stands for
        column = first + (column - first) % width
    return table[row][(column >= first) & (column <= last)].long()


# Numbers of the metadata, and objects from them.


def _numbers(c: Compressor) -> dict:
    state, cache = c.state, c.cache
    return {
        "spec": asdict(c.spec),
        "state": None if state is None else _state_numbers(state),
        "cache": None
        if cache is None
        else {"format": asdict(cache.format), "rows_per_page": cache.rows_per_page, "scale": _scale(cache)},
        "snapshots": None if c.snapshots is None else {"page_size": c.snapshots.page_size},
    }


def _scale(cache: EntryCache) -> float:
    """A number; one on a device is a tensor of the file, and may be anything."""
    return 1.0 if isinstance(cache.scale, Tensor) else float(cache.scale)


def _plan_numbers(plan: StepPlan) -> dict:
    """What few plans have only where one has it, so that older versions read the files of all others."""
    found = {name: getattr(plan, name) for name in bounds.NUMBERS}
    return found | {name: x for name in bounds.METADATA if (x := getattr(plan, name)) != getattr(StepPlan, name)}


def _state_numbers(state: FoldState | WindowState) -> dict:
    """Rounding only where it is asked for, so that older versions read all other files."""
    found = {"kind": type(state).__name__, "most": getattr(state, "max_new_tokens", None)}
    return found | ({"round_inputs": True} if getattr(state, "round_inputs", False) else {})


def versions(*packages: str) -> dict[str, str]:
    """Of Python, kvfold and these packages."""
    found = {"python": platform.python_version(), "kvfold": __version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _device(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"type": device.type, "name": platform.machine()}
    major, minor = torch.cuda.get_device_capability(device)
    return {"type": "cuda", "name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}


def _dtype(name: str, one: Any) -> torch.dtype:
    if one.get_dtype() not in _DTYPES:
        raise ValueError(f"tensor {name!a} must be of one of {list(_DTYPES)}, got {one.get_dtype()}")
    return _DTYPES[one.get_dtype()]


def _checked(name: str, about: dict, file: Any) -> Tensor:
    tensor = file.get_tensor(name)
    if _sum(tensor) != about["crc32"][name]:
        raise ValueError(f"tensor {name} is missing, new or changed")
    return tensor


def _lay_out(name: str, about: dict, file: Any, partly: bool, device: torch.device) -> Tensor:
    layout, contents = about["tensors"][name], _checked(name, about, file)
    made = laid_out(layout["shape"], layout["stride"], layout["address"], contents.dtype, device)
    if partly:
        kept = _checked(f"{name}.kept", about, file)
        bounds.check_within(f"tensor {name}.kept", kept, 0, len(made) - 1)
        if name.endswith(".positions"):
            made.fill_(-1)  # no row is held
        made[kept.to(device)] = contents.to(device)
    else:
        put(made, contents)
    return made


def _built(whose: str, kind: Callable[..., T], /, *args: Any, **fields: Any) -> T:
    """An object, whose errors name it."""
    try:
        return kind(*args, **fields)
    except _DAMAGES as error:
        raise ValueError(f"{whose}: {error}") from None


def _numbered(numbers: dict) -> StepPlan:
    """The plan, of which the tensors are still missing."""
    plan = StepPlan()
    for name, number in numbers.items():
        setattr(plan, name, number)
    least = plan.items_for(plan.max_tokens)
    if plan.item_capacity < least:
        raise ValueError(f"plan.item_capacity must be at least {least} by the plan's other numbers, got {plan.item_capacity}")
    return plan


def _tensors_of_plan(plan: StepPlan, named: dict[str, Tensor]) -> None:
    for name in PLAN_TENSORS:
        setattr(plan, name, named.get(f"plan.{name}"))
    tables = named.get("plan.kv_table"), named.get("plan.score_table")
    plan.block_tables, plan.fresh = tables if any(x is not None for x in tables) else None, True
    plan.reserved = plan.cu_rows is not None


def _compressor(i: int, numbers: dict, spec: CompressorSpec, named: dict[str, Tensor]) -> Compressor:
    def get(name: str) -> Tensor | None:
        return named.get(f"{i}.{name}")

    state, cache, snapshots, whose = numbers["state"], numbers["cache"], numbers["snapshots"], f"compressors[{i}]"
    if state is not None and state["kind"] == "FoldState":
        state = _built(
            f"{whose}.state",
            FoldState,
            spec,
            get("state.rows"),
            get("state.positions"),
            state["most"],
            state.get("round_inputs", False),
        )
    elif state is not None:
        state = _built(f"{whose}.state", WindowState, get("state.kv"), get("state.score"))
    if cache is not None:
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in cache["format"].items()}
        fmt = _built(f"{whose}.cache.format", RecordFormat, **given)
        pages, scales = get("cache.pages"), get("cache.scale_pages")
        own = get("cache.scale")
        rest = {"scales": scales, "scale": cache["scale"] if own is None else own}
        cache = _built(f"{whose}.cache", EntryCache, pages, fmt, cache["rows_per_page"], spec, **rest)
    if snapshots is not None:
        rows = get("snapshots.rows"), get("snapshots.positions")
        snapshots = _built(f"{whose}.snapshots", Snapshots, spec, *rows, snapshots["page_size"])
    tokens = get("kv_score") if get("scores") is None else (get("kv_score"), get("scores"))
    return Compressor(tokens, state, cache, spec, get("ape"), get("norm_weight"), get("rope"), snapshots)
