"""What else an argument can be: wrong values, objects that were never built, and data that makes no sense."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold import CompressorSpec, EntryCache, FoldState, Snapshots, StepPlan, WindowState
from kvfold.storage.fold_state import state_kind
from kvfold.storage.formats import FORMATS, RecordFormat
from kvfold.storage.step import Compressor
from kvfold.training import Packing

KINDS = (StepPlan, EntryCache, FoldState, WindowState, Snapshots, CompressorSpec, RecordFormat, Packing)

# By the text that makes them, for a report. No number makes a call allocate much: what bounds cost is a caller's business.
VALUES: dict[str, Any] = {
    text: eval(text, {"torch": torch, "np": np})
    for text in (
        "None", "True", "False", "0", "-1", "1", "2", "3", "4", "5", "7", "64", "1 << 31", "1 << 63", "-(1 << 63)", "10**400",
        "0.5", "4.0", "float('nan')", "float('inf')", "-0.0", "1e-300", "''", "'4'", "b'4'", "'torch'", "'triton'", "'cuda'",
        "'bf16'", "'mxfp4'", "'fp32'", "'fp8_ds_mla'", "'fp8_tensor'", "[4]", "()", "{}", "{4}", "object()", "int", "print",
        "range(4)", "4j", "np.int32(4)", "np.int64(-1)", "np.float32(1)", "np.bool_(True)", "np.zeros(4)", "torch.tensor(4)",
        "torch.tensor(True)", "torch.zeros(0)", "torch.float32", "torch.float16", "torch.bfloat16", "torch.device('meta')",
        "torch.Size([4])",
    )
}  # fmt: skip
# Never built; of a dataclass not even its name can be printed, so these stand only where one is expected.
OBJECTS: dict[str, Callable[[], Any]] = {
    f"object.__new__({kind.__name__})": (lambda k=kind: object.__new__(k)) for kind in KINDS
}
OBJECTS |= {"StepPlan()": StepPlan} | {kind.__name__: (lambda k=kind: k) for kind in KINDS}

# From one good object to another, or to what only looks like one.
TWINS: dict[str, Callable[[Any], Any]] = {
    "a namespace of its attributes": lambda x: SimpleNamespace(**vars(x)) if hasattr(x, "__dict__") else x,
    "a copy": copy.copy,
    "a deep copy": copy.deepcopy,
    "a dict of its attributes": lambda x: dict(vars(x)) if hasattr(x, "__dict__") else x,
}

# Good specs that are not the one of the call.
SPECS: dict[str, dict[str, Any]] = {
    "head_dim=128": {"head_dim": 128},
    "ratio=8": {"ratio": 8},
    "ratio=1": {"ratio": 1},
    "overlap": {"overlap": True},
    "no overlap": {"overlap": False},
    "no ape": {"has_ape": False},
    "rope_dim=0": {"rope_dim": 0},
    "rope_dim=8": {"rope_dim": 8},
    "norm_eps=1e-3": {"norm_eps": 1e-3},
    "hadamard": {"hadamard": True},
    "no hadamard": {"hadamard": False},
}


def _pages(spec: CompressorSpec, *sizes: int, **options: Any) -> WindowState:
    """Full of zeros, as `allocate` leaves what was in the memory."""
    state = WindowState.allocate(spec, *sizes, **options)
    state.kv.zero_(), state.score.zero_()
    return state


def other_objects(name: str, spec: CompressorSpec, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Good objects that are not those of the call."""
    big = replace(spec, head_dim=2 * spec.head_dim)
    here, meta, rows = {"device": device}, {"device": "meta"}, state_kind(spec) == "rows"
    return {
        "state": {
            "of another spec": lambda: FoldState.allocate(big, 4, 8, **here),
            "on meta": lambda: FoldState.allocate(spec, 4, 8, **meta),
            "of no slots": lambda: FoldState.allocate(spec, 0, 8, **here),
            **({"of bf16 rows": lambda: FoldState.allocate(spec, 4, 8, dtype=torch.bfloat16, **here)} if rows else {}),
            "of pages": lambda: _pages(spec, 30, 4, **here),
            "of no pages": lambda: _pages(spec, 0, 4, **here),
            "of other pages": lambda: _pages(spec, 30, 8, dtype=torch.bfloat16, **here),
            "of wider pages": lambda: _pages(big, 30, 4, **here),
        },
        "cache": {
            "of another spec": lambda: EntryCache.allocate("bf16", 8, 4, big, **here),
            "on meta": lambda: EntryCache.allocate("bf16", 8, 4, spec, **meta),
            "of no pages": lambda: EntryCache.allocate("bf16", 0, 4, spec, **here),
            "of longer pages": lambda: EntryCache.allocate("bf16", 8, 8, spec, **here),
            "of another format": lambda: EntryCache.allocate("fp32", 8, 4, spec, **here),
            "of a format without name": lambda: EntryCache.allocate(replace(FORMATS["bf16"], name="mine"), 8, 4, spec, **here),
        },
        "snapshots": {
            "of another spec": lambda: Snapshots.allocate(big, 6, 8, **here),
            "on meta": lambda: Snapshots.allocate(spec, 6, 8, **meta),
            "of no pages": lambda: Snapshots.allocate(spec, 0, 8, **here),
            "of longer pages": lambda: Snapshots.allocate(spec, 6, 16, **here),
            **({"of bf16 rows": lambda: Snapshots.allocate(spec, 6, 8, dtype=torch.bfloat16, **here)} if rows else {}),
        },
    }[name]


# What `compress_many` is given, from what it should be.
COMPRESSORS: dict[str, Callable[[list[tuple]], Any]] = {
    "a tuple": tuple,
    "by name": lambda both: [Compressor(*one) for one in both],
    "one": lambda both: both[:1],
    "none": lambda both: [],
    "three": lambda both: [*both, both[0]],
    "the same twice": lambda both: [both[0], both[0]],
    "lists": lambda both: [list(one) for one in both],
    "without snapshots": lambda both: [one[:7] for one in both],
    "too short": lambda both: [one[:6] for one in both],
    "too long": lambda both: [(*one, None) for one in both],
    "a generator": lambda both: (one for one in both),
    "a dict": lambda both: dict(enumerate(both)),
    "flat": lambda both: [*both[0], *both[1]],
    "text": lambda both: "ab",
    "None": lambda both: None,
}

NUMBERS = [0, 1, -1, -2, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 40, 100, 1 << 20, (1 << 30) - 1, 1 << 30, (1 << 31) - 1, -(1 << 31)]
LONG_NUMBERS = [*NUMBERS, 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 63)]
FLOATS = [0.0, -0.0, 1e-40, -1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]


def numbers_for(tensor: Tensor) -> list:
    return FLOATS if tensor.is_floating_point() else LONG_NUMBERS if tensor.dtype == torch.int64 else NUMBERS


def _shuffled(x: Tensor, seed: int) -> Tensor:
    return x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed)).to(x.device)].view(x.shape)


def _drawn(x: Tensor, seed: int) -> Tensor:
    return torch.randint(-3, 40, x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype).to(x.device)


# New contents of a tensor, in place.
CONTENTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "backwards": lambda x, seed: x.flip(0),
    "shuffled": _shuffled,
    "drawn": _drawn,
    "all the same": lambda x, seed: x.flatten()[seed % max(x.numel(), 1)].expand(x.shape) if x.numel() else x,
    "one more": lambda x, seed: x + 1,
    "negative": lambda x, seed: -x - 1,
}


def rewrite(tensor: Tensor, how: str, seed: int) -> None:
    """Writes such contents, or with `how` "one number" a number of `numbers_for` at one place."""
    if tensor.numel() == 0:
        return
    if how == "one number":
        rng = random.Random(seed)
        at, number = rng.randrange(tensor.numel()), rng.choice(numbers_for(tensor))
        tensor.view(-1)[at] = number
    else:
        tensor.copy_(CONTENTS[how](tensor.clone(), seed))


def objects_for(target: str) -> list[str]:
    """The objects that can stand in this argument's place."""
    unprintable = {"spec": "object.__new__(RecordFormat)", "fmt": "object.__new__(CompressorSpec)"}
    last = target.split(".")[-1]
    if last in unprintable:
        return [text for text in OBJECTS if text != unprintable[last]]
    return [text for text in OBJECTS if text not in unprintable.values()]
