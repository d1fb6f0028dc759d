"""The public functions that take no tensors, and constructors on the meta device: their good arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from support.fuzz_support import KINDS

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, MeanState, Snapshots, WindowState
from kvfold.storage.formats import FORMATS, RecordFormat

SPEC = KINDS["rows"][0]
# Encodings, layouts and choices by name: what is a good value of one argument is a wrong one of another.
WORDS = ("bf16", "fp32", "e4m3", "e2m1", "none", "static", "ue8m0", "pow2", "amax", "scale", "fold", "window", "rows", "sm_90",
         "fp8_ds_mla", "indexer_mxfp4", "nothing")  # fmt: skip


def _record(**given: Any) -> None:
    """A format of a caller's own, and a step with a cache of it."""
    fmt = RecordFormat(**given)
    fmt.check(SPEC)
    if fmt.page_bytes(SPEC, 4) > 1 << 20:  # what it costs is the caller's business
        EntryCache.allocate(fmt, 2, 4, SPEC, device="meta")
        return
    cache = EntryCache.allocate(fmt, 2, 4, SPEC)
    zero, ends = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    plan = kvfold.StepPlan.build(4, zero, ends, 5, state_slots=zero, cache_block_table=zero[None], rows_per_page=4)
    weights = {"ape": torch.zeros(4, 128), "norm_weight": torch.ones(64), "rope": torch.ones(8, 16)}
    state = FoldState.allocate(SPEC, 1, 4)
    kvfold.compress(torch.ones(5, 256), plan, state, cache, spec=SPEC, **weights, backend="torch")
    cache.read(torch.tensor([0]))
    cache.raw(0)


def _on_meta(allocate: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: allocate(**{"device": "meta", **given})


_RECORD = {field.name: getattr(FORMATS["mxfp4"], field.name) for field in fields(RecordFormat)}
_WARM = {
    "specs": [SPEC], "formats": ["mxfp4"], "dtypes": (torch.bfloat16,), "max_new_tokens": (1,), "states": ("fold",),
    "state_dtypes": (torch.float32,), "norm_weight_dtypes": (torch.float32,), "rows": (None,), "page_sizes": (4,),
    "many": (((SPEC, "mxfp4"), (SPEC, None)),), "snapshots": (False,), "pdl": None, "workers": None,
}  # fmt: skip
PLAIN: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "CompressorSpec": (CompressorSpec, {field.name: getattr(SPEC, field.name) for field in fields(CompressorSpec)}),
    "RecordFormat": (_record, _RECORD),
    "carry_bytes": (kvfold.carry_bytes, {"spec": SPEC, "position": 6, "dtype": torch.float32}),
    "FoldState.allocate": (
        _on_meta(FoldState.allocate),
        {"spec": SPEC, "num_slots": 2, "max_new_tokens": 4, "dtype": torch.float32},
    ),
    "MeanState.allocate": (_on_meta(MeanState.allocate), {"spec": kvfold.V4_HCA, "num_slots": 2, "banks": 4}),
    "WindowState.allocate": (
        _on_meta(WindowState.allocate),
        {"spec": SPEC, "num_pages": 2, "page_size": 4, "dtype": torch.bfloat16},
    ),
    "EntryCache.allocate": (
        _on_meta(EntryCache.allocate),
        {"fmt": "mxfp4", "num_pages": 2, "rows_per_page": 4, "spec": SPEC, "scale": 1.0},
    ),
    "Snapshots.allocate": (
        _on_meta(Snapshots.allocate),
        {"spec": SPEC, "num_pages": 2, "page_size": 8, "dtype": torch.float32},
    ),
    "allocate on a device": (FoldState.allocate, {"spec": SPEC, "num_slots": 1, "max_new_tokens": 1, "device": "cpu"}),
    "warmup": (kvfold.warmup, _WARM),
    "aot": (
        kvfold.aot,
        {"target": "sm_90", "out_dir": "/nowhere", "specs": [SPEC], "formats": ["mxfp4"], "dtypes": (torch.bfloat16,),
         "strict": None, "workers": None},
    ),
}  # fmt: skip
# What these raise when all arguments were accepted: nothing here has a GPU, and kernels are interpreted.
ACCEPTED = {"warmup": "compiles for", "aot": "aot compiles for a GPU"}
# Words that an error may use for an argument, beside its own name.
ALIASES = {
    "scale": ("fmt", "group", "element"),
    "formats": ("specs",),
    "specs": ("formats",),
    "dtype": ("dtypes",),
    "rope_dim": ("head_dim",),
    "head_dims": ("head_dim", "spec"),
    "name": ("fmt",),
    "fmt": ("head_dim", "rope_dim", "scale", "format"),
    "spec": ("head_dim", "page_size", "rope_dim"),
    "page_size": ("spec",),
    "max_new_tokens": ("ratio",),
    "head_dim": ("rope_dim",),
    "element": ("group", "scale", "storage"),
    "group": ("element", "scale", "head_dim"),
    "separate": ("scales", "scale"),
}
