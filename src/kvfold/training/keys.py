"""Which kernels a training call needs: launches ask for them, and `warmup` and `aot` for those of calls to come."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import RecordFormat
from .problem import How, rounds_rows
from .table import choose, groups_for, groups_of
from .variants import TrainingKey, slices_of

_FORWARD = ("forward", "entries", "folded", "read")


def keys_of(how: How, types: tuple, capacity: int, runs: bool = False) -> dict[str, TrainingKey]:
    """The key of each launch of a call, by the name of its kernel; launches that are not made have none.

    types: dtype of kv_score, whether it is two tensors, dtype of norm_weight. runs: whether the backward is given `Runs`.
    """
    backward = ("finish", "spread") if how.keeps else ("again",)
    shared, reads = slices_of(choose("forward", how.spec, capacity), how.spec) > 1, how.fmt is not None
    cut = runs and how.spec.gate and state_kind(how.spec) == "fold"  # `Runs` are of windows on several GPUs
    names = "forward", *["entries"] * shared, *["tail", "folded"] * cut, *["read"] * reads, *backward, *["fold"] * runs, "sum"
    configs = {name: choose(name, how.spec, capacity) for name in names}
    groups = {name: groups_of(config, capacity) for name, config in configs.items()}
    found = {}
    for name, config in configs.items():
        counts = (groups[backward[-1]], groups[backward[0]]) if name == "sum" else (groups[name], 1)
        if name == "sum" and runs:  # of blocks
            counts = tuple(one.blocks for one in groups_for(how.keeps, how.spec, capacity))
        record = how.record if name in _FORWARD else how.way_back
        key = TrainingKey(how.spec, record, config, *types, how.out_dtype, how.latent, how.keeps, *counts)
        found[name] = key._replace(groups=1, runs=True) if runs and name in backward else key
    return found


class Calls(NamedTuple):
    """Training calls to come: all combinations of these.

    tokens: rows of kv_score. round_rows, out_dtypes: as `compress` is given them, so None for its default.
    """

    tokens: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    norms: tuple[torch.dtype, ...] = (torch.float32,)
    apart: tuple[bool, ...] = (False,)
    latents: tuple[bool, ...] = (False,)
    round_rows: tuple[bool | None, ...] = (None,)
    out_dtypes: tuple[torch.dtype | None, ...] = (None,)


def training_keys(spec: CompressorSpec, fmt: RecordFormat | None, calls: Calls) -> Iterator[TrainingKey]:
    """fmt: that of fake quantization, or None."""
    for dtype, norm, latent in product(calls.dtypes, calls.norms, calls.latents):
        for apart, rounds, out in product(calls.apart if spec.gate else (False,), calls.round_rows, calls.out_dtypes):
            how = How(spec, rounds_rows(rounds, fmt, dtype), out or dtype, fmt, latent, "triton")
            for tokens in calls.tokens:
                capacity = tokens // spec.ratio
                for name, key in keys_of(how, (dtype, apart, norm), capacity).items():
                    if capacity or name not in _FORWARD:  # nothing is launched for no entries
                        yield key
