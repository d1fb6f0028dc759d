"""What the kernels of training are compiled for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import gcd
from typing import Any, NamedTuple

import torch

from ..backend_triton import args
from ..backend_triton.args import Schedule, flat, types_of
from ..backend_triton.build import KERNELS, Variant
from ..backend_triton.variants import POINTERS, VARIANTS, format_of, spec_of
from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import RecordFormat
from .args import Incoming, Kept, Parts, Pieces
from .kernels.again import train_again_kernel
from .kernels.folded import train_folded_kernel, train_tail_kernel
from .kernels.forward import train_entries_kernel, train_forward_kernel
from .kernels.kept import train_finish_kernel, train_spread_kernel
from .kernels.records import train_read_kernel
from .kernels.sums import train_fold_kernel, train_sum_kernel
from .table import Config, blocks_of

KERNELS |= {
    "train_forward": train_forward_kernel,
    "train_entries": train_entries_kernel,
    "train_read": train_read_kernel,
    "train_again": train_again_kernel,
    "train_finish": train_finish_kernel,
    "train_spread": train_spread_kernel,
    "train_sum": train_sum_kernel,
    "train_fold": train_fold_kernel,
    "train_folded": train_folded_kernel,
    "train_tail": train_tail_kernel,
}


class TrainingKey(NamedTuple):
    """Of one launch of a training call.

    record: what finishing an entry goes by, and what the forward writes. config: the row of the table, which names the kernel.
    kv_score, norm_weight, out: dtypes; the last of gradients of entries, and of latents. apart: values and scores are two
    tensors. keeps: whether the fold is kept. groups, weight_groups: whose sums are added, for ape and for norm_weight. runs:
    whether windows are summed as `problem.Runs` say.
    """

    spec: CompressorSpec
    record: RecordFormat
    config: Config
    kv_score: torch.dtype
    apart: bool
    norm_weight: torch.dtype
    out: torch.dtype
    latent: bool
    keeps: bool
    groups: int = 1
    weight_groups: int = 1
    runs: bool = False


def training_variant(key: TrainingKey) -> Variant:
    return _VARIANTS[key.config.kernel](key)


def forward_variant(key: TrainingKey) -> Variant:
    spec = key.spec
    # Stretches of a window are whole ones.
    ahead = gcd(key.config.ahead, spec.ratio) if _kind(spec) == "fold" else min(key.config.ahead, spec.window_rows)
    how = Schedule(AHEAD=ahead, TOGETHER=1, SLICE=spec.head_dim // slices_of(key.config, spec))
    arguments = types_of(Pieces), _tokens(key), _output(key), types_of(Kept) if key.keeps else Kept()
    return _variant(key, arguments, how, FMT=format_of(key.record, spec))


def entries_variant(key: TrainingKey) -> Variant:
    arguments = types_of(Pieces), _output(key), types_of(Kept)
    return _variant(key, arguments, Schedule(), FMT=format_of(key.record, key.spec))


def folded_variant(key: TrainingKey) -> Variant:
    arguments = types_of(Pieces), _tokens(key), types_of(Kept).rows, _output(key), types_of(Kept)
    how = Schedule(AHEAD=key.config.ahead, SLICE=key.spec.head_dim)
    return _variant(key, arguments, how, FMT=format_of(key.record, key.spec))


def tail_variant(key: TrainingKey) -> Variant:
    folds = types_of(Kept).rows
    return _variant(key, (types_of(Pieces).rows, _tokens(key), folds, folds), Schedule(AHEAD=key.config.ahead))


def read_variant(key: TrainingKey) -> Variant:
    records = _output(key)._replace(norm_weight=None, rope=None, latent=None)
    return _variant(key, (types_of(Pieces), records, POINTERS[key.out]), Schedule(), FMT=format_of(key.record, key.spec))


def again_variant(key: TrainingKey) -> Variant:
    arguments = (
        types_of(Pieces),
        _tokens(key),
        *_finish(key),
        _incoming(key)._replace(pooled=None),
        _gradients(key),
        _parts(key),
    )
    return _variant(key, arguments, Schedule(), FMT=format_of(key.record, key.spec), FETCH=key.config.fetch)


def finish_variant(key: TrainingKey) -> Variant:
    parts = _parts(key)._replace(ape=None)
    arguments = types_of(Pieces), *_finish(key), types_of(Kept), _incoming(key), parts
    return _variant(key, arguments, Schedule(), FMT=format_of(key.record, key.spec))


def spread_variant(key: TrainingKey) -> Variant:
    incoming = Incoming(pooled=types_of(Incoming).pooled)
    parts = _parts(key)._replace(weight=None)
    arguments = types_of(Pieces), _tokens(key), types_of(Kept), incoming, _gradients(key), parts
    rows, columns = tile_of(key)
    return _variant(key, arguments, Schedule(), ROWS=rows, COLUMNS=columns, FETCH=key.config.fetch)


def sum_variant(key: TrainingKey) -> Variant:
    parts = _parts(key)
    tile, weight_tile = blocks_of(key.groups, key.config.rows), blocks_of(key.weight_groups)
    d_ape = parts.ape
    return _variant(
        key,
        (parts, d_ape, parts.weight),
        Schedule(),
        GROUPS=key.groups,
        TILE=tile,
        LOG2_TILE=tile.bit_length() - 1,
        WEIGHT_GROUPS=key.weight_groups,
        WEIGHT_TILE=weight_tile,
        LOG2_WEIGHT_TILE=weight_tile.bit_length() - 1,
        WIDTH=_ape_width(key.spec),
        COLUMNS=key.config.columns,
    )


def fold_variant(key: TrainingKey) -> Variant:
    sums, rows, number = types_of(Parts).weight, types_of(Parts).runs, types_of(Parts).groups
    return _variant(key, (sums, rows, rows, number, sums), Schedule(), COLUMNS=key.config.columns)


_VARIANTS: dict[str, Callable[[TrainingKey], Variant]] = {
    "forward": forward_variant,
    "entries": entries_variant,
    "read": read_variant,
    "again": again_variant,
    "finish": finish_variant,
    "spread": spread_variant,
    "sum": sum_variant,
    "fold": fold_variant,
    "folded": folded_variant,
    "tail": tail_variant,
}
VARIANTS[TrainingKey] = training_variant


def _variant(key: TrainingKey, arguments: tuple, how: Schedule, **constants: Any) -> Variant:
    spec = replace(spec_of(key.spec), OVERLAP=int(key.spec.overlap), KIND=_kind(key.spec))
    constants |= {"HOW": how, "SPEC": spec}
    config = key.config
    return Variant(
        f"train_{config.kernel}", tuple(flat(arguments)), tuple(constants.items()), config.num_warps, config.registers
    )


def _kind(spec: CompressorSpec) -> str:
    return state_kind(spec) if spec.gate else ""


def slices_of(config: Config, spec: CompressorSpec) -> int:
    """Programs of the forward that share a window."""
    return spec.head_dim // min(config.slice, spec.head_dim) if config.slice and _kind(spec) == "fold" else 1


def tile_of(key: TrainingKey) -> tuple[int, int]:
    """Tokens and channels of a program of `"spread"`."""
    return min(key.config.rows, 1 << (key.spec.ratio - 1).bit_length()), min(key.config.columns, key.spec.head_dim)


def tiles_of(key: TrainingKey) -> int:
    """Programs of an entry, of a group of windows, or of all sums."""
    spec, kernel = key.spec, key.config.kernel
    if kernel == "forward":
        return slices_of(key.config, spec)
    if kernel == "spread":
        rows, columns = tile_of(key)
        return -(-spec.ratio // rows) * (1 + spec.overlap) * (spec.head_dim // columns)
    if kernel == "fold":  # columns of a program, as how wide its rows are is told when it is launched
        return key.config.columns
    if kernel == "sum":
        return sum(-(-width // key.config.columns) for width in (_ape_width(spec), spec.head_dim))
    return 1


def _ape_width(spec: CompressorSpec) -> int:
    return spec.ratio * spec.channels if spec.has_ape else 0


def _output(key: TrainingKey) -> args.Output:
    """Records of all entries: plain rows are such, too."""
    fmt, output = key.record, types_of(args.Output, rows=None, norm_weight=POINTERS[key.norm_weight], latent=_latent(key))
    absent = ["scales"] * (not fmt.separate) + ["rope"] * (not key.spec.rope_dim) + ["scale"] * (not fmt.takes_scale)
    return output._replace(**dict.fromkeys(absent))


def _latent(key: TrainingKey) -> str | None:
    return POINTERS[key.out] if key.latent else None


def _tokens(key: TrainingKey) -> args.Tokens:
    absent = ["ape"] * (not key.spec.has_ape) + ["apart", "skew"] * (not key.apart)
    return types_of(args.Tokens, kv_score=POINTERS[key.kv_score])._replace(**dict.fromkeys(absent))


def _gradients(key: TrainingKey) -> args.Tokens:
    return _tokens(key)._replace(ape=None)


def _finish(key: TrainingKey) -> tuple[str | None, ...]:
    """Norm weight, RoPE table and its length."""
    return POINTERS[key.norm_weight], "*fp32" if key.spec.rope_dim else None, "i32"


def _incoming(key: TrainingKey) -> Incoming:
    return types_of(Incoming, entries=POINTERS[key.out], latent=_latent(key))


def _parts(key: TrainingKey) -> Parts:
    absent = ["ape"] * (not key.spec.has_ape) + ["runs"] * (not key.runs)
    return types_of(Parts)._replace(**dict.fromkeys(absent))
