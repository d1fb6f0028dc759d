"""What a file of `dump` may say: it is anybody's, so types, names, ranges and sizes are checked before anything is made of it.

Every error is a ValueError that names the field. The file's checksums are for accidents and no protection.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch

from ..calls.checks import BACKENDS
from ..contract import INT32_MAX, ITEM_FIELDS, MOST_ITEMS, MOST_POSITIONS
from ..spec import CompressorSpec
from ..storage.formats import RecordFormat
from ..storage.snapshots import MOST_PAGE
from .call import spread_of

ROOM, ROOM_PER_BYTE = 2 << 30, 1024  # the default of `max_bytes`
WORK = 12  # bytes that the torch backend takes for a channel of a row of a window
LONGEST = 200  # characters of a name
_SAID = (str,)
_MAYBE = (dict, type(None))
ABOUT = {
    "call": _SAID, "backend": _SAID, "pdl": (bool, type(None)), "device": (dict,), "versions": (dict,), "plan": _MAYBE,
    "compressors": (list,), "tensors": (dict,), "crc32": (dict,),
}  # fmt: skip
COMPRESSOR = {"spec": (dict,), "state": _MAYBE, "cache": _MAYBE, "snapshots": _MAYBE}
NUMBERS = {  # of a plan, and what each may be
    "ratio": (1, 4096), "max_new_tokens": (1, INT32_MAX), "batch": (0, INT32_MAX), "max_tokens": (0, INT32_MAX),
    "entry_capacity": (0, INT32_MAX), "item_capacity": (0, MOST_ITEMS), "rows_per_page": (1, 1 << 20),
    "page_size": (1, INT32_MAX), "snapshot_page_size": (1, MOST_PAGE),
}  # fmt: skip
METADATA = {  # of plans of an engine's metadata, where one has it
    "no_slot": (-1, 0), "null_page": (0, INT32_MAX), "null_slot": (0, INT32_MAX), "ring": (False, True),
}  # fmt: skip
LEFT_OUT = ("rows_per_page", "page_size", "snapshot_page_size")
PLAN_SHAPES = {  # in numbers of the plan; None for any
    "start_pos": ("batch",), "cu_seqlens": ("batch + 1",), "state_slots": ("batch",), "cache_block_table": ("batch", None),
    "entry_slots": ("entry_capacity",), "snapshot_table": ("batch", None), "cu_entries": ("batch + 1",),
    "items": ("item_capacity", "8"), "num_items": ("1",), "entry_items": ("entry_capacity",), "errors": ("1",),
    "kv_table": ("batch", None), "score_table": ("batch", None), "token_slots": (None,), "slots_given": ("entry_capacity",),
    "cu_rows": ("batch + 1",),
}  # fmt: skip
PLAN_OPTIONAL = ("state_slots", "cache_block_table", "entry_slots", "snapshot_table", "kv_table", "score_table", "token_slots",
                 "slots_given", "cu_rows")  # fmt: skip
PLACES = ("slots", "positions", "errors")  # of a `store` without a plan
# What is only read may say one thing at several places: rows of kv_score, and an engine's numbers, as after `expand`.
SHARED = (".kv_score", ".scores", "plan.state_slots", "plan.cache_block_table", "plan.kv_table", "plan.score_table",
          "plan.token_slots", "plan.slots_given", "plan.cu_rows")  # fmt: skip
_ANNOTATED = {  # how a field is written, and what JSON makes of it
    "bool": (bool,), "int": (int,), "float": (int, float), "str": _SAID, "int | None": (int, type(None)),
    "tuple[int, ...]": (list,),
}  # fmt: skip
STATES = {None: (), "FoldState": ("state.rows", "state.positions"), "WindowState": ("state.kv", "state.score")}
# A compressor's tensors; of pools a file may have only some rows.
POOLS = ("rope", "state.rows", "state.positions", "state.kv", "state.score", "cache.pages", "cache.scale_pages",
         "snapshots.rows", "snapshots.positions")  # fmt: skip
TENSORS = ("kv_score", "scores", "ape", "norm_weight", *POOLS)


class RoomError(Exception):
    """A call needs more memory than `max_bytes`. The file is not damaged: `replay` raises a ValueError with this text."""


def check_path(path: str | os.PathLike, *, new: bool = False) -> str:
    """A path that may be read as a file: neither a folder nor a pipe, which would block. new: or at which one may come."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or an os.PathLike of one, got {type(text).__name__}")
    try:
        kind = os.stat(text).st_mode
    except FileNotFoundError:
        if new:
            return text
        raise
    except ValueError as error:
        raise ValueError(f"path must name a file, got {text!r}: {error}") from None
    if not stat.S_ISREG(kind):
        raise ValueError(f"path must name a file, {text} is {'a folder' if stat.S_ISDIR(kind) else 'a pipe or a device'}")
    return text


def parse(text: str) -> object:
    """JSON. No name may come twice, and numbers are finite."""
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its numbers are nested too deeply") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{_short(twice)} is there twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"a number must be finite, got {name}")


def _short(value: object) -> str:
    """What stood in the file, for a message: printable, and not longer than a line."""
    text = ascii(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def check_fields(name: str, value: object, kinds: Mapping[str, tuple[type, ...]], optional: tuple[str, ...] = ()) -> None:
    """An object with exactly these fields, each of one of its types."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, got {_short(value)}")
    prefix = f"{name}." if name else ""
    for key in kinds.keys() - value.keys():
        if key not in optional:
            raise ValueError(f"{prefix}{key} is missing")
    for key, one in value.items():
        if key not in kinds:
            raise ValueError(f"{prefix}{_short(key)} is unknown")
        if type(one) not in kinds[key]:  # a bool is no int here
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds[key])
            raise ValueError(f"{prefix}{key} must be of type {names}, got {_short(one)}")
        if isinstance(one, str) and not (one.isprintable() and len(one) <= LONGEST):
            raise ValueError(f"{prefix}{key} must be printable and not longer than {LONGEST}, got {_short(one)}")


def check_number(name: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} must be an int from {low} to {high}, got {_short(value)}")
    return value


def check_about(about: Any) -> dict:
    """Checks all of the metadata but what objects check when they are made of it, and returns it."""
    check_fields("", about, ABOUT)
    if about["call"] not in ("compress", "compress_many", "store"):
        raise ValueError(f"call must be compress, compress_many or store, got {_short(about['call'])}")
    if about["backend"] not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {_short(about['backend'])}")
    check_fields("device", about["device"], dict.fromkeys(("type", "name", "capability"), _SAID), ("capability",))
    check_fields("versions", about["versions"], dict.fromkeys(("kvfold", "python", "torch", "triton"), _SAID))
    plan = about["plan"]
    if plan is not None:
        _check_plan(plan)
    elif about["call"] != "store":
        raise ValueError(f"plan must be given for {about['call']}, got null")
    most = 2 if about["call"] == "compress_many" or plan is None else 1
    if not 1 <= len(about["compressors"]) <= most:
        raise ValueError(f"compressors must be from 1 to {most} for {about['call']}, got {len(about['compressors'])}")
    for i, one in enumerate(about["compressors"]):
        _check_compressor(f"compressors[{i}]", one, about["call"] == "store")
    needed, optional = _names(about)
    check_fields("tensors", about["tensors"], dict.fromkeys((*needed, *optional), (dict,)), tuple(optional))
    for name, layout in about["tensors"].items():
        _check_layout(f"tensors.{name}", layout)
    for name, number in about["crc32"].items():
        check_number(f"crc32.{_short(name)}", number, 0, (1 << 32) - 1)
    return about


def _check_plan(plan: dict) -> None:
    kinds = {name: (int, type(None)) if name in LEFT_OUT else (int,) for name in NUMBERS}
    kinds |= {name: (type(low),) for name, (low, _) in METADATA.items()}
    check_fields("plan", plan, kinds, tuple(METADATA))
    for name, (low, high) in (NUMBERS | METADATA).items():
        if plan.get(name) is not None and type(plan[name]) is int:
            check_number(f"plan.{name}", plan[name], low, high)


def _check_compressor(name: str, one: Any, is_store: bool) -> None:
    check_fields(name, one, COMPRESSOR)
    none = is_store or one["spec"].get("gate") is False
    if (one["state"] is None) != none:
        raise ValueError(f"{name}.state must be {'null here' if none else 'given'}, got {_short(one['state'])}")
    if is_store and (one["cache"] is None or one["snapshots"] is not None):
        raise ValueError(f"{name}.cache must be given for a store, and {name}.snapshots null")
    _check_dataclass(f"{name}.spec", one["spec"], CompressorSpec)
    if one["state"] is not None:
        kind = one["state"].get("kind")
        if kind not in ("FoldState", "WindowState"):
            raise ValueError(f"{name}.state.kind must be FoldState or WindowState, got {_short(kind)}")
        fields = {"kind": _SAID, "most": (int,) if kind == "FoldState" else (type(None),)}
        more = {"round_inputs": (bool,)} if kind == "FoldState" else {}
        check_fields(f"{name}.state", one["state"], fields | more, tuple(more))
    if one["cache"] is not None:
        check_fields(f"{name}.cache", one["cache"], {"format": (dict,), "rows_per_page": (int,), "scale": (int, float)})
        _check_dataclass(f"{name}.cache.format", one["cache"]["format"], RecordFormat)
    if one["snapshots"] is not None:
        check_fields(f"{name}.snapshots", one["snapshots"], {"page_size": (int,)})


def _check_dataclass(name: str, value: Any, kind: type) -> None:
    """The fields by name, and those that are numbers or text by type; the object itself checks what they are."""
    known = {field.name: _ANNOTATED[str(field.type)] for field in fields(kind)}
    check_fields(name, value, known, tuple(f.name for f in fields(kind) if f.default is not MISSING))
    for key, one in value.items():
        if isinstance(one, list) and not all(type(x) is int and 0 < x <= 1 << 20 for x in one):
            raise ValueError(f"{name}.{key} must be a list of sizes, got {_short(one)}")
        if type(one) is int:
            check_number(f"{name}.{key}", one, 0, 1 << 30)


def _names(about: dict) -> tuple[list[str], list[str]]:
    """The tensors that such a call has, and those that it may have."""
    if about["plan"] is None:
        needed = ["slots", "0.kv_score", *(f"{i}.cache.pages" for i in range(len(about["compressors"])))]
        scales = [f"{i}.cache.{name}" for i in range(len(about["compressors"])) for name in ("scale_pages", "scale")]
        return needed, ["positions", "errors", "0.norm_weight", "0.rope", *scales]
    needed = [f"plan.{name}" for name in PLAN_SHAPES if name not in PLAN_OPTIONAL]
    optional = [f"plan.{name}" for name in PLAN_OPTIONAL] + ["rows", "latent"] * (about["call"] == "compress")
    for i, one in enumerate(about["compressors"]):
        names = ["kv_score", *STATES[one["state"] and one["state"]["kind"]]]
        names += ["cache.pages"] * (one["cache"] is not None)
        names += ["snapshots.rows", "snapshots.positions"] * (one["snapshots"] is not None)
        needed += [f"{i}.{name}" for name in names]
        weights = ["scores", "ape", "norm_weight", "rope"] + ["cache.scale_pages", "cache.scale"] * (one["cache"] is not None)
        optional += [f"{i}.{name}" for name in weights]
    # Only those that the file has: its `batch` may be any number.
    return needed, optional + [name for name in about["tensors"] if _is_history(name, about["plan"]["batch"])]


def _is_history(name: str, batch: int) -> bool:
    what, _, number = name.partition(".")
    return what == "history" and number.isascii() and number.isdigit() and len(number) < 11 and int(number) < batch


def _check_layout(name: str, layout: dict) -> None:
    check_fields(name, layout, {"shape": (list,), "stride": (list,), "address": (int,)})
    shape, stride = layout["shape"], layout["stride"]
    if not 1 <= len(shape) <= 4 or len(stride) != len(shape):
        raise ValueError(f"{name} must have from 1 to 4 sizes and as many strides, got {len(shape)} and {len(stride)}")
    for what, numbers in (("shape", shape), ("stride", stride)):
        for i, number in enumerate(numbers):
            check_number(f"{name}.{what}[{i}]", number, 0, 1 << 48)
    check_number(f"{name}.address", layout["address"], 0, 15)


def check_stored(about: dict, stored: Mapping[str, tuple[torch.dtype, list[int]]]) -> None:
    """Names and shapes of the tensors in the file against the metadata, before any is read; the call checks their dtypes."""
    layouts, plan = about["tensors"], about["plan"]
    for name in sorted(stored.keys() | layouts.keys() | about["crc32"].keys()):
        whose = name.removesuffix(".kept")
        pool = whose.partition(".")[2] in POOLS
        if name not in stored or name not in about["crc32"] or whose not in layouts or (whose != name and not pool):
            raise ValueError(f"tensor {_short(name)[1:-1]} is missing, new or changed")
    for name, layout in layouts.items():
        (dtype, shape), kept = stored[name], stored.get(f"{name}.kept")
        due, stride = layout["shape"], layout["stride"]
        inner = 1 if name.endswith(SHARED) or name.startswith("history.") else 0
        if _overlap(due[inner:], stride[inner:]):
            raise ValueError(f"tensors.{name}.stride must keep its elements apart, got {stride} for {due}")
        if layout["address"] % dtype.itemsize:
            raise ValueError(f"tensors.{name}.address must be a multiple of {dtype.itemsize}, got {layout['address']}")
        if kept is not None:
            if kept[0] != torch.int64 or len(kept[1]) != 1 or kept[1][0] > due[0]:
                raise ValueError(f"tensor {name}.kept must be torch.int64 [{due[0]}] at most, got {kept[0]} {kept[1]}")
            due = [*kept[1], *due[1:]]
        if shape != due:
            raise ValueError(f"tensor {name} must have shape {due}, got {shape}")
    if plan is None:
        return
    known = ("plan.kv_table" in layouts) + ("plan.state_slots" in layouts)
    if known == 2 or (known == 0 and plan["ratio"] > 1):  # what else goes together `StepPlan` checks
        raise ValueError("tensors must have either plan.state_slots or plan.kv_table")
    sizes = plan | {"batch + 1": plan["batch"] + 1, "8": len(ITEM_FIELDS), "1": 1, None: None}
    for name, symbols in PLAN_SHAPES.items():
        if f"plan.{name}" in layouts:
            want, have = [sizes[symbol] for symbol in symbols], layouts[f"plan.{name}"]["shape"]
            if len(have) != len(want) or any(size not in (None, n) for size, n in zip(want, have, strict=True)):
                raise ValueError(f"tensors.plan.{name}.shape must be {want} by the plan's numbers, got {have}")


def _overlap(shape: list[int], stride: list[int]) -> bool:
    span = 1
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size > 1):
        if step < span:
            return 0 not in shape
        span += step * (size - 1)
    return False


def check_items(plan: dict, items: torch.Tensor, num_items: torch.Tensor, entry_items: torch.Tensor, paged: bool) -> int:
    """Work items that `StepPlan.update` could have made: kernels take them as they are. Returns rows that windows have."""
    count = check_number("plan.num_items", int(num_items), 0, len(items))
    window, start, end, token, slot, entry, sequence, _ = items[:count].long().unbind(1)
    ratio, length = plan["ratio"], end - start
    first, ends = start.clamp(min=0) // ratio, (window + 1) * ratio <= end
    before = min(token.tolist(), default=0)  # rows of kv_score that the step may not have
    rules = (
        ("start", (start >= 0) & (start < MOST_POSITIONS)),
        ("end", (length > 0) & (length <= plan["max_new_tokens"]) & (end <= MOST_POSITIONS)),
        ("window", (window >= first) & (window <= (end - 1).clamp(min=0) // ratio)),
        ("token", (token >= 0) & (token - before + length <= plan["max_tokens"])),
        ("sequence", (sequence >= 0) & (sequence < plan["batch"])),
        ("slot", slot == sequence if paged else slot >= 0),
        ("entry", torch.where(ends, entry >= 0, entry == -1)),
    )
    for field, right in rules:
        if not bool(right.all()):
            row = int((~right).nonzero()[0, 0])
            have = f"{field} {int(items[row, ITEM_FIELDS.index(field)])}"
            raise ValueError(f"plan.items[{row}] must be what an update of the plan can make, got {have}")
    check_within("plan.entry_items", entry_items, -1, max(count, 1) - 1)
    return max(count * 2 * ratio, int(torch.stack((sequence, length), dim=1).unique(dim=0)[:, 1].sum()))


def check_within(name: str, values: torch.Tensor, low: int, high: int) -> None:
    if values.numel() and not low <= int(values.min()) <= int(values.max()) <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {int(values.min())} to {int(values.max())}")


def check_room(path: str, about: dict, stored: Mapping[str, tuple[torch.dtype, list[int]]], rows: int, most: int) -> None:
    """Bounds the memory of the call's tensors, and what the torch backend makes of so many rows of windows."""
    need = {}
    for name, layout in about["tensors"].items():
        size = 16 + spread_of(layout["shape"], layout["stride"])[1] * stored[name][0].itemsize
        need[f"tensors.{name} of shape {layout['shape']} and strides {layout['stride']}"] = size
    for i, one in enumerate(about["compressors"]):
        need[f"{'rows' if about['plan'] is None else 'plan.items'} for compressors[{i}]"] = (
            WORK * rows * one["spec"]["head_dim"]
        )
    total = sum(need.values())
    if total > most:
        what = max(need, key=need.__getitem__)
        raise RoomError(f"max_bytes must be at least {total} for {path}, got {most}: {what}, takes {need[what]} bytes")


def default_room(size: int, device: torch.device) -> int:
    """`max_bytes` for a file of so many bytes."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):  # not of every system
            memory = 2 * (ROOM + ROOM_PER_BYTE * size)
    return min(memory // 2, ROOM + ROOM_PER_BYTE * size)
