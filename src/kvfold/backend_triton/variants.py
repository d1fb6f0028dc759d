"""What the kernel of a key is compiled for: the types of its arguments, and its constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..contract import LANES, ROWS_OF_A_LANE, SCALE_BLOCK, chunk_of_hidden
from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import FORMATS, RecordFormat
from . import args
from .args import LOOSE, Format, Product, Schedule, Spec, flat, types_of
from .build import Variant
from .kernels.plan import NUM_WARPS, SCAN
from .kernels.plan_items import SEQUENCES
from .kernels.plan_metadata import SCAN_METADATA, WARPS_METADATA
from .keys import AddKey, DequantizeKey, Key, PairKey, PlanKey, ProjectKey, RestoreKey, StepKey, StoreKey, Types, WindowKey
from .table import MULTIPROCESSORS, Config

INDICES = {torch.int32: LOOSE + "*i32", torch.int64: LOOSE + "*i64", None: None}
ADDED_AT_ONCE = 512  # numbers of kv_score whose parts a program adds up
DEQUANTIZED_AT_ONCE = 2048  # numbers of a weight's row that a program makes
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", None: None}


def variant_of(key: Key, aligned: bool, pdl: bool, multiprocessors: int = MULTIPROCESSORS) -> Variant:
    return replace(VARIANTS[type(key)](key), aligned=aligned, pdl=pdl, multiprocessors=multiprocessors)


def step_variant(key: StepKey) -> Variant:
    slices = slices_of(key.spec, key.config)
    arguments = _plan(key.types), _snap_table(key.snapshots), _compressor(key, slices)
    return _variant("step", arguments, key.config.num_warps, key.config.registers, **_constants(key, slices))


def pair_variant(key: PairKey) -> Variant:
    compressors = [_compressor(one, 1) for one in key]  # whose programs share no entries
    arguments = _plan(key.first.types), _snap_table(key.first.snapshots or key.second.snapshots), *compressors
    constants = {f"{name}_{i}": value for i, one in enumerate(key) for name, value in _constants(one, 1).items()}
    return _variant("pair", arguments, max(one.config.num_warps for one in key), key.first.config.registers, **constants)


def window_variant(key: WindowKey) -> Variant:
    spec, config, types = key.spec, key.config, key.types
    # Powers of two that the window fills: no row that is loaded lies behind it.
    lanes = min(LANES, spec.window_rows)
    together = min(ROWS_OF_A_LANE, spec.window_rows // lanes)
    slices = slices_of(spec, config)
    pool = types_of(args.Pool, rows=POINTERS[types.state])
    ring = key.tables == "ring"
    absent = ["null_page"] * (key.tables == "plain") + ["ring"] * (not ring)
    if key.tables == "plain":
        pool = pool._replace(step=None)
    arguments = types_of(
        args.WindowArguments,
        **dict.fromkeys(absent),
        plan=_plan(types),
        # Of the rows of kv_score the kernel says itself where they are aligned (`window_rows.pool_slice`).
        tokens=_tokens(spec, types)._replace(stride="i64"),
        kv_pool=pool,
        score_pool=pool,
        output=_output(spec, key.fmt, types.rows, types.norm_weight, types.latent),
        scratch=types_of(args.Scratch) if slices > 1 else args.Scratch(),
    )
    return _variant(
        "window",
        arguments,
        config.num_warps,
        config.registers,
        HOW=Schedule(config.ahead, together, spec.head_dim // slices),
        SPEC=replace(spec_of(spec), OVERLAP=int(spec.overlap)),
        FMT=format_of(key.fmt, spec),
        TILE=max(lanes * together, min(config.tile, spec.window_rows)),
        LANES=lanes,
        ONE_PAGE=key.pages == "one",
        LANE_PAGES=key.pages == "lanes",
        PROMPT=config.prompt
        and key.pages == "one"
        and not ring
        and (key.fmt is not None or types.rows is not None or types.latent),
        ALIGNED=False,
    )


def store_variant(key: StoreKey) -> Variant:
    spec, config = key.spec, key.config
    plan, places, stride, also = types_of(args.Plan), args.Places(), None, (None,) * len(args.Output._fields)
    if key.slots is not None:
        plan = args.Plan(None, None, None, None, LOOSE + "*i32")
        places, stride = args.Places(INDICES[key.slots], INDICES[key.positions]), args.STRIDE
    if key.also is not None:
        also = _output(spec, key.also, None, key.norm_weight)
    output = _output(spec, key.fmt, None, key.norm_weight)
    return _variant(
        "store",
        (plan, places, POINTERS[key.rows], stride, output, also),
        config.num_warps,
        config.registers,
        HOW=Schedule(),
        SPEC=spec_of(spec),
        FMT=format_of(key.fmt, spec),
        ALSO=format_of(key.also, spec),
    )


def restore_variant(key: RestoreKey) -> Variant:
    kind, pointer = state_kind(key.spec), POINTERS[key.state]
    arguments = types_of(args.RestoreArguments, state=types_of(args.State, rows=pointer), snapshots=_snapshots(pointer))
    if not key.rows_per_page:
        arguments = arguments._replace(snapshots=_snapshots(None), pages=None)
    return _variant(
        "restore",
        arguments,
        4,
        KIND=kind,
        RATIO=key.spec.ratio,
        OVERLAP=int(key.spec.overlap),
        ROWS=key.rows_per_page,
        PARTS=3 if kind == "fold" else 2,
        PART=key.spec.head_dim,
        BLOCK=32,
    )


def plan_variant(key: PlanKey) -> Variant:
    arguments = types_of(args.PlanArguments)
    if not key.metadata:
        plain = args.Numbers("*i32")
        arguments = arguments._replace(
            lengths=plain,
            cu_seqlens=plain,
            state_slots=args.Numbers() if key.no_slots else plain,
            table=args.Numbers() if key.no_table else plain,
            entry_slots=None if key.no_table else arguments.entry_slots,
            metadata=args.Metadata(),
        )
    warps, scan = (WARPS_METADATA, SCAN_METADATA) if key.metadata else (NUM_WARPS, SCAN)
    return _variant("plan", arguments, warps, RATIO=key.ratio, SEQUENCES=SEQUENCES, WINDOWS=key.windows, SCAN=scan)


def project_variant(key: ProjectKey) -> Variant:
    config, chunk = key.config, chunk_of_hidden(key.hidden_dim)
    sums = types_of(args.Sums, rows=POINTERS[key.sums])
    arguments = args.ProjectArguments(
        types_of(args.Hidden),
        _weights(key.tensors, key.scaled),
        sums if config.parts > 1 else sums._replace(step=None),
    )
    depth = config.depth_for(chunk)
    stages = config.stages * (config.depth // depth)
    made = Product(key.hidden_dim, chunk, config.columns, config.tokens, depth, config.parts, stages, config.group, key.scaled)
    return _variant("project", arguments, config.num_warps, HOW=Schedule(ROUNDED=key.rounded), P=made)


def _weights(tensors: int, scaled: bool) -> args.Weights:
    absent = ["cut_1", "gap_1", "scales_1"] * (tensors < 2)
    absent += ["cut_2", "gap_2", "scales_2", "cut_3", "gap_3", "scales_3"] * (tensors < 4)
    absent += ["scales", "scales_1", "scales_2", "scales_3"] * (not scaled)
    return types_of(args.Weights, rows="*u8" if scaled else "*bf16")._replace(**dict.fromkeys(absent))


def dequantize_variant(key: DequantizeKey) -> Variant:
    arguments = (_weights(key.tensors, True), "*bf16")
    return _variant(
        "dequantize", arguments, 4, HOW=Schedule(), HIDDEN_DIM=key.hidden_dim, BLOCKS=DEQUANTIZED_AT_ONCE // SCALE_BLOCK
    )


def add_variant(key: AddKey) -> Variant:
    arguments = types_of(args.AddArguments, kv_score=types_of(args.Sums, rows=POINTERS[key.sums])._replace(step=None))
    return _variant("project_add", arguments, 4, HOW=Schedule(ROUNDED=key.rounded), PARTS=key.parts, SIZE=ADDED_AT_ONCE)


# By the kind of key; training adds its own (training/variants.py).
VARIANTS: dict[type, Callable[[Any], Variant]] = {
    StepKey: step_variant,
    PairKey: pair_variant,
    WindowKey: window_variant,
    StoreKey: store_variant,
    RestoreKey: restore_variant,
    PlanKey: plan_variant,
    ProjectKey: project_variant,
    AddKey: add_variant,
    DequantizeKey: dequantize_variant,
}


def _variant(kernel: str, arguments: tuple, num_warps: int, registers: int = 0, **constants: object) -> Variant:
    return Variant(kernel, tuple(flat(arguments)), tuple(constants.items()), num_warps, registers)


def _plan(types: Types) -> args.Plan:
    plan = types_of(args.Plan)
    return plan if types.entry_slots else plan._replace(entry_slots=None)


def _snap_table(wanted: bool) -> args.SnapshotTable:
    return types_of(args.SnapshotTable) if wanted else args.SnapshotTable()


def _snapshots(pointer: str | None) -> args.Snapshots:
    return args.Snapshots() if pointer is None else types_of(args.Snapshots, rows=pointer)


def _tokens(spec: CompressorSpec, types: Types) -> args.Tokens:
    tokens = types_of(args.Tokens, kv_score=POINTERS[types.kv_score])
    absent = ["ape"] * (not spec.has_ape) + ["apart", "skew"] * (not types.apart)
    return tokens._replace(**dict.fromkeys(absent))


def _compressor(key: StepKey, slices: int) -> args.Compressor:
    """slices: how many programs share an entry."""
    pointer = POINTERS[key.types.state]
    scratch = types_of(args.Scratch)
    if slices == 1:
        scratch = args.Scratch(arrivals=scratch.arrivals if draws_items(key.spec, key.config) else None)
    state = types_of(args.State, rows=pointer) if key.spec.gate else args.State()
    return types_of(
        args.Compressor,
        tokens=_tokens(key.spec, key.types),
        state=state._replace(tags=None) if key.config.kind == "mean" else state,
        snapshots=_snapshots(pointer if key.snapshots else None),
        scratch=scratch,
        output=_output(key.spec, key.fmt, key.types.rows, key.types.norm_weight, key.types.latent),
    )


def _output(
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    rows: torch.dtype | None,
    norm_weight: torch.dtype | None,
    latent: bool = False,
) -> args.Output:
    output = types_of(args.Output, rows=POINTERS[rows], norm_weight=POINTERS[norm_weight])
    if not latent:
        output = output._replace(latent=None)
    if fmt is None:
        output = output._replace(norm_weight=output.norm_weight if latent else None)
        return output._replace(rope=None, pages=None, scales=None, scale=None)
    absent = ["scales"] * (not fmt.separate) + ["rope"] * (not spec.rope_dim) + ["scale"] * (not fmt.takes_scale)
    return output._replace(**dict.fromkeys(absent))


def _constants(key: StepKey, slices: int) -> dict[str, object]:
    """Constants of one compressor over a `FoldState` or a `MeanState`, or without a state."""
    spec, config, kind = key.spec, key.config, key.config.kind if key.spec.gate else ""
    ahead = config.ahead if kind in ("fold", "mean") else min(config.ahead, spec.window_rows)
    together = config.together if kind == "fold" or draws_items(spec, config) else 1
    return {
        "HOW": Schedule(ahead, together if config.programs else 0, spec.head_dim // slices),
        "SPEC": replace(spec_of(spec), OVERLAP=int(spec.overlap), KIND=kind),
        "FMT": format_of(key.fmt, spec),
    }


def spec_of(spec: CompressorSpec) -> Spec:
    """What finishing an entry is compiled for."""
    return Spec(spec.ratio, spec.head_dim, spec.head_dim.bit_length() - 1, spec.rope_dim, spec.norm_eps, spec.hadamard)


def format_of(fmt: RecordFormat | None, spec: CompressorSpec) -> Format:
    """Without a cache nothing of a format is compiled in; any value would do, and a fixed one means one kernel."""
    return Format(**(fmt or FORMATS["bf16"]).constants(spec))


def draws_items(spec: CompressorSpec, config: Config) -> bool:
    """Whether programs draw the last of their items (kernels/items.py): in long steps whose rows are all ahead."""
    return config.kind == "rows" and config.programs > 0 and config.ahead >= spec.window_rows


def slices_of(spec: CompressorSpec, config: Config) -> int:
    """Programs that share the channels of an entry."""
    return spec.head_dim // min(config.slice, spec.head_dim) if config.slice else 1
