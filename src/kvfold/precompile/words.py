"""Names of kernels: words that say all that kernels of one selection can differ in."""

from __future__ import annotations

import torch

from ..backend_triton.keys import (
    AddKey,
    DequantizeKey,
    Key,
    PairKey,
    PlanKey,
    ProjectKey,
    RestoreKey,
    StepKey,
    StoreKey,
    Types,
    WindowKey,
)
from ..backend_triton.table import ANY, Config
from ..spec import V4_HCA, CompressorSpec

SHORT = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "int32", torch.int64: "int64", None: "none"}


def spec_words(spec: CompressorSpec) -> list[str]:
    """What it is; of what V4 compressors have in common, only what is otherwise."""
    words = [f"hd{spec.head_dim}", f"R{spec.ratio}"]
    words += ["overlap"] * spec.overlap + ["hadamard"] * spec.hadamard + ["no_ape"] * (not spec.has_ape)
    words += [f"rope{spec.rope_dim}"] * (spec.rope_dim != V4_HCA.rope_dim)
    return words + [f"eps{spec.norm_eps}"] * (spec.norm_eps != V4_HCA.norm_eps)


def config_words(config: Config) -> list[str]:
    """The row of the table, by what rows for one spec differ in."""
    words = [f"ahead{config.ahead}", f"warps{config.num_warps}"]
    words += [f"n{config.max_new_tokens}"] if config.max_new_tokens < ANY else []
    return words + ([f"windows{config.bucket:g}"] if config.bucket < ANY else [])


def words_of(key: Key) -> list[str]:
    """A kernel's name, word by word."""
    if isinstance(key, PairKey):
        return ["pair", *_step(key.first)[1:], "and", *_step(key.second)[1:]]
    if isinstance(key, PlanKey):
        flags = {"no_slots": key.no_slots, "no_table": key.no_table, "engine": key.metadata}
        return ["plan", f"R{key.ratio}", f"windows{key.windows}", *(name for name, on in flags.items() if on)]
    if isinstance(key, RestoreKey):
        return ["restore", *spec_words(key.spec), f"state_{SHORT[key.state]}", f"rows{key.rows_per_page}"]
    if isinstance(key, ProjectKey):
        return _project(key)
    if isinstance(key, AddKey):
        return ["add", f"parts{key.parts}", f"sums_{SHORT[key.sums]}", *["rounded"] * key.rounded]
    if isinstance(key, DequantizeKey):
        return ["dequantize", f"h{key.hidden_dim}", f"tensors{key.tensors}"]
    if isinstance(key, StoreKey):
        places = [f"slots_{SHORT[key.slots]}", f"positions_{SHORT[key.positions]}"] if key.slots is not None else []
        also = ["also", key.also.name] if key.also is not None else []
        rows = [f"rows_{SHORT[key.rows]}", f"norm_{SHORT[key.norm_weight]}"]
        return ["store", *spec_words(key.spec), key.fmt.name, *rows, *places, *also]
    if isinstance(key, WindowKey):
        how = [f"{key.pages}_page"] + [key.tables] * (key.tables != "plain")
        return ["window", *spec_words(key.spec), _record(key), *config_words(key.config), *_types(key.types), *how]
    return _step(key)


def _step(key: StepKey) -> list[str]:
    kind = key.config.kind if key.spec.gate else "ungated"
    words = [kind, *spec_words(key.spec), _record(key), *config_words(key.config), *_types(key.types)]
    return words + ["snapshots"] * key.snapshots


def _record(key: StepKey | WindowKey) -> str:
    return key.fmt.name if key.fmt is not None else "no_cache"


def _types(types: Types) -> list[str]:
    words = [f"kv_{SHORT[types.kv_score]}"] + ([f"state_{SHORT[types.state]}"] if types.state is not None else [])
    words += [f"rows_{SHORT[types.rows]}"] if types.rows is not None else []
    words += [f"norm_{SHORT[types.norm_weight]}"] if types.norm_weight is not None else []
    flags = {"no_slots": not types.entry_slots, "latent": types.latent, "apart": types.apart}
    return [*words, *(name for name, on in flags.items() if on)]


def _project(key: ProjectKey) -> list[str]:
    row = key.config
    words = ["project", f"h{key.hidden_dim}", f"tensors{key.tensors}", f"tile{row.columns}x{row.tokens}x{row.depth}"]
    words += [f"parts{row.parts}", f"stages{row.stages}", f"warps{row.num_warps}"]
    return [*words, f"sums_{SHORT[key.sums]}", *["rounded"] * key.rounded, *["fp8"] * key.scaled]
