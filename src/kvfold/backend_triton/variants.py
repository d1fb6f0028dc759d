"""What each call's kernel is compiled for: from a spec, a format, a row of the table and dtypes to a `Variant`."""

from __future__ import annotations

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.formats import FORMATS, RecordFormat
from .args import Fmt, How, Spec
from .build import POINTERS, Variant
from .kernels.plan import plan_variant, windows_per_program
from .table import ANY, LANES, ROWS_OF_A_LANE, Config, choose

# Of kv_score, state, rows and norm weight (None: absent), and whether the plan has entry slots.
Types = tuple[torch.dtype, torch.dtype, "torch.dtype | None", "torch.dtype | None", bool]


# Keys name a call's kernel: its kind, then what the function of that kind below takes before `aligned` and `pdl`. `launch`
# makes them of a call's arguments, `warmup` of what calls will be made of.


def variant_of(key: tuple, aligned: bool, pdl: bool) -> Variant:
    return _VARIANTS[key[0]](*key[1:], aligned, pdl)


def step_key(
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    kind: str,
    max_new_tokens: int,
    types: Types,
    snapshots: bool = False,
    items: int = ANY,
) -> tuple:
    """`kind`: of the state. `max_new_tokens`: the plan's bound; no item of fold rows is longer than a window. `items`: how many
    there may be; snapshots take the row for many, which has whole rows.
    """
    items = ANY if snapshots else items
    config = choose(kind, spec, max_new_tokens if kind == "rows" else min(max_new_tokens, spec.ratio), items)
    return "step", spec, fmt, config, types, snapshots


def pair_key(first: tuple, second: tuple) -> tuple:
    """Of two keys of steps."""
    return "pair", first[1:], second[1:]


def window_key(spec: CompressorSpec, fmt: RecordFormat | None, max_new_tokens: int, types: Types, page_size: int) -> tuple:
    return "window", spec, fmt, choose("window", spec, max_new_tokens), types, page_size % spec.ratio == 0


def store_key(spec: CompressorSpec, fmt: RecordFormat, types: tuple[torch.dtype, torch.dtype]) -> tuple:
    return "store", spec, fmt, choose("store", spec, 1), types


def restore_key(spec: CompressorSpec, state: torch.dtype, rows_per_page: int) -> tuple:
    """`state`: dtype of its rows."""
    return "restore", spec, state, rows_per_page


def plan_key(ratio: int, windows_per_sequence: int, no_slots: bool, no_table: bool) -> tuple:
    return "plan", ratio, windows_per_program(windows_per_sequence), no_slots, no_table


def step_variant(
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    config: Config,
    types: Types,
    snapshots: bool,
    aligned: bool = True,
    pdl: bool = False,
) -> Variant:
    """One compressor over a `FoldState`. snapshots: whether it leaves any."""
    constants, pointers = _step(spec, fmt, config, types, snapshots)
    constants |= {"RATIO": spec.ratio, **({} if types[4] else {"entry_slots": None})}
    constants |= {} if snapshots else dict.fromkeys(_SNAPSHOT_TABLE)
    slices = slices_of(spec, config)
    constants |= {"SLICE": spec.head_dim // slices, **({} if slices > 1 else {"workspace": None})}
    constants |= {} if slices > 1 or draws_items(spec, config) else {"arrivals": None}
    constants = grouped(constants)
    return Variant("step", tuple(constants.items()), config.num_warps, tuple(pointers.items()), aligned, pdl, config.registers)


def pair_variant(first: tuple, second: tuple, aligned: bool = True, pdl: bool = False) -> Variant:
    """Two compressors over FoldStates, each given as the arguments of `step_variant`."""
    constants: dict[str, object] = {"RATIO": first[0].ratio, **({} if first[3][4] else {"entry_slots": None})}
    constants |= {} if first[4] or second[4] else dict.fromkeys(_SNAPSHOT_TABLE)
    pointers: dict[str, str] = {}
    for end, one in (("_0", first), ("_1", second)):
        some, others = _step(*one)
        some |= {} if draws_items(one[0], one[2]) else {"arrivals": None}
        constants |= {name + end: value for name, value in some.items()}
        pointers |= {name + end: value for name, value in others.items()}
    warps = max(first[2].num_warps, second[2].num_warps)
    ratio = constants.pop("RATIO")
    for end in ("_0", "_1"):
        mine = {k.removesuffix(end): v for k, v in constants.items() if k.endswith(end)}
        constants = {k: v for k, v in constants.items() if not k.endswith(end)}
        mine = grouped(mine | {"RATIO": ratio, "SLICE": mine["HEAD_DIM"]})
        constants |= {k + end: v for k, v in mine.items()}
    return Variant("pair", tuple(constants.items()), warps, tuple(pointers.items()), aligned, pdl, first[2].registers)


def _step(
    spec: CompressorSpec, fmt: RecordFormat | None, config: Config, types: Types, snapshots: bool
) -> tuple[dict[str, object], dict[str, str]]:
    """Constants and pointer types of one compressor of a step kernel, but for what two of them share."""
    state = FoldState.allocate(spec, 0, 1, device="meta")
    constants = {
        "KIND": state.kind,
        "OVERLAP": int(spec.overlap),
        "HISTORY": state.history,
        "AHEAD": config.ahead if state.kind == "fold" else min(config.ahead, spec.window_rows),
        "TOGETHER": windows_together(spec, config),
        **({} if spec.has_ape else {"ape": None}),
    }
    pointers = {"kv_score": POINTERS[types[0]], "state_rows": POINTERS[types[1]]}
    if snapshots:
        pointers["snap_rows"] = POINTERS[types[1]]
    else:
        constants |= dict.fromkeys(("snap_rows", "snap_tags", "num_snaps"))
    return _with_epilogue(constants, pointers, spec, fmt, types[2], types[3])


def window_variant(
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    config: Config,
    types: Types,
    one_page: bool,
    aligned: bool = True,
    pdl: bool = False,
) -> Variant:
    """One compressor over a `WindowState`. one_page: the page size is a multiple of the ratio."""
    slices = slices_of(spec, config)
    # Powers of two that the window fills: no row that is loaded lies behind it.
    lanes = min(LANES, spec.window_rows)
    together = min(ROWS_OF_A_LANE, spec.window_rows // lanes)
    constants = {
        "RATIO": spec.ratio,
        "OVERLAP": int(spec.overlap),
        "TILE": max(lanes * together, min(config.tile, spec.window_rows)),
        "LANES": lanes,
        "TOGETHER": together,
        "SLICE": spec.head_dim // slices,
        "AHEAD": config.ahead,
        "ONE_PAGE": one_page,
        "PROMPT": config.prompt and one_page and (fmt is not None or types[2] is not None),
        **({} if spec.has_ape else {"ape": None}),
        **({} if types[4] else {"entry_slots": None}),
        **({} if slices > 1 else {"workspace": None, "arrivals": None}),
    }
    pointers = {"kv_score": POINTERS[types[0]], "kv_pool": POINTERS[types[1]], "score_pool": POINTERS[types[1]]}
    constants, pointers = _with_epilogue(constants, pointers, spec, fmt, types[2], types[3])
    constants = grouped(constants)
    return Variant(
        "window", tuple(constants.items()), config.num_warps, tuple(pointers.items()), aligned, pdl, config.registers
    )


def draws_items(spec: CompressorSpec, config: Config) -> bool:
    """Whether programs draw the last of their items (kernels/items.py): in long steps over rows that are all ahead."""
    return config.kind == "rows" and config.programs > 0 and config.ahead >= spec.window_rows


def windows_together(spec: CompressorSpec, config: Config) -> int:
    """Windows that a program of a long step folds side by side; 0 for a short step."""
    if not config.programs:
        return 0
    return config.together if config.kind == "fold" or draws_items(spec, config) else 1


def slices_of(spec: CompressorSpec, config: Config) -> int:
    """Programs that share the channels of an entry."""
    return spec.head_dim // min(config.slice, spec.head_dim) if config.slice else 1


def store_variant(
    spec: CompressorSpec,
    fmt: RecordFormat,
    config: Config,
    types: tuple[torch.dtype, torch.dtype],
    aligned: bool = True,
    pdl: bool = False,
) -> Variant:
    """The store kernel. `types`: of the pooled rows and the norm weight."""
    constants, pointers = _with_epilogue({"RATIO": spec.ratio}, {"pooled": POINTERS[types[0]]}, spec, fmt, None, types[1])
    del constants["rows"]
    constants = grouped(constants)
    return Variant("store", tuple(constants.items()), config.num_warps, tuple(pointers.items()), aligned, pdl, config.registers)


def restore_variant(
    spec: CompressorSpec, state: torch.dtype, rows_per_page: int, aligned: bool = True, pdl: bool = False
) -> Variant:
    """`restore`. `state`: dtype of its rows."""
    like = FoldState.allocate(spec, 0, 1, device="meta")
    constants = {
        "KIND": like.kind,
        "RATIO": spec.ratio,
        "HISTORY": like.history,
        "ROWS": rows_per_page,
        "PARTS": 3 if like.kind == "fold" else 2 * spec.channels // spec.head_dim,
        "PART": spec.head_dim,
        "BLOCK": 32,
        **({} if rows_per_page else dict.fromkeys(("snap_rows", "snap_tags", "num_snaps", "snap_ids"))),
    }
    pointers = {"state_rows": POINTERS[state], **({"snap_rows": POINTERS[state]} if rows_per_page else {})}
    return Variant("restore", tuple(constants.items()), 4, tuple(pointers.items()), aligned, pdl)


def _with_epilogue(
    constants: dict[str, object],
    pointers: dict[str, str],
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    rows: torch.dtype | None,
    norm_weight: torch.dtype | None,
) -> tuple[dict[str, object], dict[str, str]]:
    constants |= epilogue_constants(fmt, spec)
    if rows is None:
        constants["rows"] = None
    else:
        pointers["rows"] = POINTERS[rows]
    if fmt is None:
        constants |= dict.fromkeys(("norm_weight", "rope", "pages", "scales"))
    else:
        assert norm_weight is not None
        pointers["norm_weight"] = POINTERS[norm_weight]
        constants |= {} if fmt.separate else {"scales": None}
        constants |= {} if spec.rope_dim else {"rope": None}
    return constants, pointers


_SNAPSHOT_TABLE = ("snap_table", "snap_width", "snap_page_size")  # of the plan, left out where no compressor needs it
_VARIANTS = {
    "step": step_variant,
    "pair": pair_variant,
    "window": window_variant,
    "store": store_variant,
    "plan": plan_variant,
    "restore": restore_variant,
}


def epilogue_constants(fmt: RecordFormat | None, spec: CompressorSpec) -> dict[str, object]:
    """What the epilogue is compiled for."""
    # Without a cache nothing of a format is compiled in; any value serves, and one value means one kernel.
    fmt = fmt or FORMATS["bf16"]
    return {
        "HEAD_DIM": spec.head_dim,
        "LOG2": spec.head_dim.bit_length() - 1,
        "ROPE_DIM": spec.rope_dim,
        "EPS": spec.norm_eps,
        "HADAMARD": spec.hadamard,
        **fmt.constants(spec),
    }


def grouped(constants):
    from dataclasses import MISSING, fields

    found = {}
    rest = dict(constants)
    for name, kind in (("SPEC", Spec), ("FMT", Fmt), ("HOW", How)):
        import triton.language as tl

        given = {f.name: tl.constexpr(rest.pop(f.name, 0)) for f in fields(kind) if f.default is MISSING}  # the rest: the target's
        found[name] = kind(**given)
    return found | rest
