"""The calls as operators of torch, `torch.ops.kvfold.*`: what `torch.compile` and `FakeTensor`s see.

User code calls `kvfold.compress` and the other functions. While they are traced they call an operator; otherwise they go
straight to the launch. An operator takes tensors and plain values, builds the light objects around them and makes the eager
call, with all its checks. The schemas say what is mutated. Nothing is returned, so a fake call has nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice

import torch
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves

from .arguments.checks import check_type
from .calls.check_project import check_traced, with_room
from .calls.run import run_compress, run_many, run_placed, run_product, run_restore, run_store, run_update
from .spec import CompressorSpec, check_spec
from .storage.cache import EntryCache
from .storage.fold_state import FoldState
from .storage.mean_state import MeanState
from .storage.remembered import check_made
from .storage.snapshots import Snapshots
from .storage.step import LIVE, Compressor, Hits, Lengths, Outputs, Placed, PlanData, Projection
from .storage.weights import ScaledWeight
from .storage.window_state import WindowState

# Operators are global to a process: each copy of the package, loaded under a name of its own, has its own.
NAMESPACE = __package__.replace(".", "_")
OPS = getattr(torch.ops, NAMESPACE)

# Groups of arguments. A `!` marks what is mutated; `_define` gives each its own alias letter.
PLAN = (
    "Tensor items", "Tensor num_items", "Tensor? entry_slots", "Tensor! errors", "SymInt entry_capacity", "SymInt batch",
    "SymInt max_new_tokens", "SymInt ratio", "SymInt? entries_per_page", "bool reserved",
)  # fmt: skip
FOLD_PLAN = (*PLAN, "Tensor? state_slots", "Tensor? snapshot_table", "SymInt? snapshot_page_size")
TABLES = (
    "Tensor entry_items", "Tensor cu_entries", "Tensor? kv_table", "Tensor? score_table", "SymInt? page_size",
    "SymInt? null_page", "bool ring",
)  # fmt: skip
# In pages: these as `state_rows`, no `positions`, and what dtype rows are kept in. torch.compile takes no two views of one
# memory, both mutated, in two dtypes.
STATE = ("Tensor! state_rows", "Tensor!? positions", "SymInt rewind", "bool round_inputs", "ScalarType? kept")
SNAPSHOTS = ("Tensor!? snapshot_rows", "Tensor!? snapshot_positions", "SymInt? page_size")
SPEC = ("str spec",)
CACHE = ("Tensor!? storage", "Tensor!? scales", "str format", "SymInt rows_per_page", "Tensor? cache_scale")
WEIGHTS = ("Tensor? ape", "Tensor? norm_weight", "Tensor? rope")
ALSO = tuple(f"{kind} also_{name}" for kind, name in (text.split() for text in CACHE))  # a second cache
PLACES = ("Tensor rows", "Tensor slots", "Tensor? positions", "Tensor!? errors")
ONE = SPEC + CACHE + WEIGHTS
TOKENS = ("Tensor kv_score", "Tensor? scores")
FOLD = (*TOKENS, *STATE, *SNAPSHOTS, *ONE)
WINDOW = (*TOKENS, "Tensor! kv", "Tensor! score", *ONE)
MEAN = (*TOKENS, "Tensor! state_rows", *ONE)
UNGATED = (*TOKENS, *ONE)
OUTPUTS = ("Tensor!? rows", "Tensor!? latent")
HOW = ("str? backend", "bool? pdl")
KEPT = ("Tensor snapshot_rows", "Tensor snapshot_positions", "SymInt page_size")  # SNAPSHOTS that are there, and only read
HIDDEN = (
    "Tensor hidden", "Tensor[] weights", "Tensor[] weight_scales", "SymInt[] tensors", "Tensor![] kv_scores",
    "bool round_kv_score",
)  # fmt: skip
HITS = ("Tensor slots", "Tensor pages", "Tensor start_pos", "Tensor! errors", "str? backend")
WHOLE_PLAN = (
    "Tensor? state_slots", "Tensor? cache_block_table", "SymInt? rows_per_page", "Tensor! own_start_pos",
    "Tensor! own_cu_seqlens", "Tensor! cu_entries", "Tensor! items", "Tensor! num_items", "Tensor! entry_items",
    "Tensor!? entry_slots", "Tensor! errors", "SymInt batch", "SymInt max_new_tokens", "SymInt max_tokens", "SymInt ratio",
    "Tensor? token_slots", "Tensor? slots_given", "SymInt no_slot", "SymInt? null_page", "SymInt? null_slot",
    "Tensor? cu_rows", "bool reserved",
)  # fmt: skip

# Which argument of a call an operator's argument belongs to, where names differ.
OWNERS = {
    "scores": "kv_score", "storage": "cache", "scales": "cache", "cache_scale": "cache",
    "weights": "weight", "weight_scales": "weight", "kv_scores": "kv_score",
    "kv": "state", "score": "state", "positions": "state", "state_rows": "state",
    "snapshot_rows": "snapshots", "snapshot_positions": "snapshots",
    "also_storage": "also", "also_scales": "also", **{text.split()[-1]: "plan" for text in FOLD_PLAN + TABLES},
}  # fmt: skip
_RENAMED = {"entries_per_page": "rows_per_page", "own_start_pos": "start_pos", "own_cu_seqlens": "cu_seqlens"}


def _attributes(group: tuple[str, ...]) -> tuple[str, ...]:
    """The attributes of a plan that become these arguments."""
    names = [text.split()[-1] for text in group]
    return tuple(_RENAMED.get(name, name) for name in names)


_PLAN, _FOLD_PLAN, _WHOLE_PLAN = _attributes(PLAN), _attributes(FOLD_PLAN), _attributes(WHOLE_PLAN)


def compress(c: Compressor, plan: PlanData, out: Outputs, backend: str | None, pdl: bool | None) -> None:
    """`kvfold.compress` while it is traced."""
    check_spec("spec", c.spec)
    if isinstance(c.state, WindowState):
        _call(OPS.compress_window, *_plan(plan, _PLAN), *_tables(plan), *_window(c), *out, backend, pdl)
    elif isinstance(c.state, MeanState):
        _call(OPS.compress_mean, *_plan(plan, _FOLD_PLAN), *_mean(c), *out, backend, pdl)
    elif c.state is None and c.snapshots is None and not c.spec.gate:
        _call(OPS.compress_ungated, *_plan(plan, _PLAN), *_tokens(c), *_one(c), *out, backend, pdl)
    else:
        _call(OPS.compress, *_plan(plan, _FOLD_PLAN), *_fold(c), *out, backend, pdl)


def compress_many(compressors: Sequence[Compressor], plan: PlanData, backend: str | None, pdl: bool | None) -> None:
    """`kvfold.compress_many` while it is traced."""
    if len(compressors) == 1:
        compress(compressors[0], plan, Outputs(), backend, pdl)
        return
    first, second = compressors
    _call(OPS.compress_many, *_plan(plan, _FOLD_PLAN), *_fold(first), *_fold(second), backend, pdl)


def project(
    p: Projection, compressors: Sequence[Compressor], plan: PlanData, out: Outputs, backend: str | None, pdl: bool | None
) -> None:
    """`kvfold.project_compress`, or of several compressors, while it is traced: its product, and `compress` behind it."""
    check_traced(p, [c.spec.kv_score_width for c in compressors])
    made = with_room(p, compressors)
    weights, scales = [weight for weights in p.weights for weight in weights], []
    if p.scaled:
        scales, weights = [weight.scales for weight in weights], [weight.codes for weight in weights]
    lengths = [len(each) for each in p.weights]
    _call(OPS.project, p.hidden, weights, scales, lengths, [c.kv_score for c in made], p.round_kv_score, backend, pdl)
    if len(made) == 1:
        compress(made[0], plan, out, backend, pdl)
    else:
        compress_many(made, plan, backend, pdl)


def store(c: Compressor, plan: PlanData, backend: str | None, pdl: bool | None) -> None:
    """`kvfold.store` while it is traced."""
    check_type("cache", c.cache, EntryCache)
    _call(OPS.store, c.kv_score, *_plan(plan, _PLAN), *_to_cache(c), c.norm_weight, c.rope, backend, pdl)


def store_placed(p: Placed, backend: str | None, pdl: bool | None) -> None:
    """`kvfold.store` without a plan, while it is traced."""
    cache, also = (*p.caches, None)[:2]
    check_type("cache", cache, EntryCache)
    held = []
    for name, one in (("cache", cache), ("also[0]", also)):
        try:
            held.append(_to_cache(Compressor(p.rows, None, one, p.spec, None, None, None)))
        except (TypeError, ValueError) as error:
            raise type(error)(str(error) if name == "cache" else f"{name}: {error}") from None
    places = p.rows, p.slots, p.positions, p.errors
    _call(OPS.store_placed, *places, *held[0], *held[1][1:], p.norm_weight, p.rope, backend, pdl)


def restore(state: FoldState, snapshots: Snapshots, hits: Hits, backend: str | None) -> None:
    """`kvfold.restore` while it is traced."""
    check_type("state", state, FoldState)
    check_type("snapshots", snapshots, Snapshots)
    check_spec("spec", state.spec)
    _call(OPS.restore, state.spec._text, *_state(state), *_snapshots(snapshots, state.spec), *hits, backend)


def update(plan: PlanData, lengths: Lengths) -> None:
    """`StepPlan.update` while it is traced."""
    flat = _plan(plan, _WHOLE_PLAN)
    if not plan.fills_slots:
        flat[_WHOLE_PLAN.index("entry_slots")] = None  # the caller's, and only read
    if plan.cache_block_table is None:
        flat[_WHOLE_PLAN.index("null_page")] = None  # of the block tables, which `update` does not read
    _call(OPS.update, lengths.given, lengths.cu_seqlens, lengths.totals, *flat)


def mark_static(*things: FoldState | MeanState | WindowState | EntryCache | Snapshots | PlanData | torch.Tensor) -> None:
    """Promises that these keep their addresses while compiled code runs: `torch.compile(mode="reduce-overhead")` needs it.

    torch skips CUDA graphs, with a warning, if a graph mutates an input whose address may change before the next call. It
    trusts what belongs to the compiled `nn.Module`: parameters, buffers, and states and caches that are attributes. Arguments
    must be marked: plans that are updated in place, and states, caches, snapshots and `rows` that come with a call. If one
    moves all the same, the graph is recorded again.

    Raises:
        TypeError: naming the argument that is none of these.
    """
    for i, thing in enumerate(things):
        if not isinstance(thing, (FoldState, MeanState, WindowState, EntryCache, Snapshots, PlanData, torch.Tensor)):
            kinds = "a state, a cache, snapshots, a plan or a tensor"
            raise TypeError(f"things[{i}] must be {kinds}, got {type(thing).__name__}")
        for tensor in tree_leaves(thing if isinstance(thing, torch.Tensor) else vars(thing)):
            if isinstance(tensor, torch.Tensor):
                torch._dynamo.mark_static_address(tensor, guard=False)


def _call(operator: torch._ops.OpOverloadPacket, *args: object) -> None:
    """Calls an operator. Outside of torch.compile it is one over fake tensors, and takes no others unless their mode does."""
    fake = None if torch.compiler.is_compiling() else next((x for x in args if isinstance(x, FakeTensor)), None)
    if fake is not None and not fake.fake_mode.allow_non_fake_inputs:
        for argument, given in zip(operator.default._schema.arguments, args, strict=True):
            if any(isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) for x in tree_leaves(given)):
                name = OWNERS.get(argument.name, argument.name)
                raise TypeError(f"{name} must be of FakeTensors like the others, got a real one ({argument.name})")
    operator(*args)


# From objects to arguments. This much is traced: attribute reads, and the checks of what an operator cannot see.


def _plan(plan: PlanData, attributes: tuple[str, ...]) -> list:
    check_type("plan", plan, PlanData)
    return [getattr(plan, name) for name in attributes]


def _tables(plan: PlanData) -> tuple:
    kv_table, score_table = plan.block_tables if plan.block_tables is not None else (None, None)
    return plan.entry_items, plan.cu_entries, kv_table, score_table, plan.page_size, plan.null_page, plan.ring


def _fold(c: Compressor) -> tuple:
    _check_of("state", c.state, FoldState, c.spec)
    return *_tokens(c), *_state(c.state), *_snapshots(c.snapshots, c.spec), *_one(c)


def _mean(c: Compressor) -> tuple:
    if c.snapshots is not None:
        raise ValueError("snapshots must be None for a MeanState, whose one row goes on from the end of a sequence alone")
    _check_of("state", c.state, MeanState, c.spec)
    return *_tokens(c), c.state.rows, *_one(c)


def _window(c: Compressor) -> tuple:
    if c.snapshots is not None:
        raise ValueError("snapshots must be None for a WindowState, whose pages are shared as they are")
    return *_tokens(c), c.state.kv, c.state.score, *_one(c)


def _tokens(c: Compressor) -> tuple:
    c.parts()  # names what is no tensor
    return c.value, c.score


def _state(state: FoldState) -> tuple:
    if state.pages is not None:
        return state.pages, None, state.max_new_tokens, state.round_inputs, state.rows.dtype
    return state.rows, state.positions, state.max_new_tokens, state.round_inputs, None


def _snapshots(snapshots: Snapshots | None, spec: CompressorSpec) -> tuple:
    if snapshots is None:
        return None, None, None
    _check_of("snapshots", snapshots, Snapshots, spec)
    return snapshots.rows, snapshots.positions, snapshots.page_size


def _one(c: Compressor) -> tuple:
    return *_to_cache(c), c.ape, c.norm_weight, c.rope


def _to_cache(c: Compressor) -> tuple:
    cache, spec = c.cache, c.spec
    check_spec("spec", spec)
    if cache is None:
        return spec._text, None, None, "", 0, None
    _check_of("cache", cache, EntryCache, spec)
    if not cache._named:
        raise ValueError(
            f"cache must have a format of kvfold.storage.formats.FORMATS when it is traced, got {cache.format.name!r}"
        )
    return spec._text, cache.storage, cache.scales, cache.format.name, cache.rows_per_page, cache.scale_tensor


def _check_of(name: str, value: object, kind: type, spec: CompressorSpec) -> None:
    check_type(name, value, kind)
    check_spec("spec", spec)
    if value.spec._text != spec._text:
        raise ValueError(f"{name} must be for {spec}, got {value.spec}")


# From arguments to objects, which live for one call.


def _plan_of(attributes: tuple[str, ...], values: Sequence, whole: bool = False) -> PlanData:
    plan = PlanData()
    plan.state_slots = plan.block_tables = plan.page_size = plan.snapshot_table = plan.snapshot_page_size = None
    plan.cache_block_table, plan._whole = None, whole
    for name, value in zip(attributes, values, strict=True):
        setattr(plan, name, value)
    plan.item_capacity = plan.items.shape[0]
    return plan


@lru_cache(maxsize=256)
def spec_of(text: str) -> CompressorSpec:
    return CompressorSpec(*json.loads(text))


@lru_cache(maxsize=256)
def _memory(*asked: object) -> list[tuple]:
    """Where the launcher of the last call of a kind, on a device, is kept, as a user's state would keep it; no tensors."""
    return [None]


def _state_of(
    spec: CompressorSpec,
    rows: torch.Tensor,
    positions: torch.Tensor | None,
    most: int,
    round_inputs: bool,
    kept: torch.dtype | None,
) -> FoldState:
    if positions is None:
        return FoldState.over(rows, spec, most, dtype=kept, round_inputs=round_inputs)
    return FoldState(spec, rows, positions, most, round_inputs)


def _cache_of(spec: CompressorSpec, storage, scales, fmt: str, rows_per_page: int, scale) -> EntryCache | None:
    if storage is None:
        return None
    return EntryCache(storage, fmt, rows_per_page, spec, scales=scales, scale=1.0 if scale is None else scale)


def _run(plan: PlanData, call: Callable[[], None], *remembering: tuple[FoldState | MeanState | WindowState, list]) -> None:
    """Makes a call with a plan of one call, which is as fresh as the user's plan over the same items; see `use_pdl`.

    remembering: states of one call, and where each finds its launcher and leaves it for the next one.
    """
    user = LIVE.get(plan.items.data_ptr())
    plan.fresh = user is None or user.fresh
    for state, memory in remembering:
        state._chosen = memory[0]
    call()
    for state, memory in remembering:
        memory[0] = state._chosen
    if user is not None:
        user.fresh = plan.fresh


def _compressor_of(args: Sequence, kind: str) -> tuple[Compressor, list]:
    """A `Compressor` from the arguments of its state, spec, cache and weights, and the memory of its launcher."""
    value, score, *held = args[: -len(ONE)]
    kv_score = value if score is None else (value, score)
    (text,), flat_cache, weights = _cut(args[-len(ONE) :], SPEC, CACHE, WEIGHTS)
    spec = spec_of(text)
    cache, memory = _cache_of(spec, *flat_cache), _memory(kind, text, flat_cache[2], value.device)
    if kind == "window":
        # It makes the scratch of its one call, where it needs any: a CUDA graph then has it in its own memory.
        return Compressor(kv_score, WindowState(*held), cache, spec, *weights), memory
    if kind == "mean":
        return Compressor(kv_score, MeanState(spec, *held), cache, spec, *weights), memory
    state, (rows, positions, page_size) = _cut(held, STATE, SNAPSHOTS)
    snapshots = None if rows is None else Snapshots(spec, rows, positions, page_size)
    return Compressor(kv_score, _state_of(spec, *state), cache, spec, *weights, snapshots), memory


def _cut(args: Sequence, *groups: tuple[str, ...]) -> list[list]:
    rest = iter(args)
    return [list(islice(rest, len(group))) for group in groups]


def _compress(*args: object) -> None:
    flat, one, out, how = _cut(args, FOLD_PLAN, FOLD, OUTPUTS, HOW)
    plan, (c, memory) = _plan_of(_FOLD_PLAN, flat), _compressor_of(one, "fold")
    _run(plan, lambda: run_compress(c, plan, Outputs(*out), *how), (c.state, memory))


def _compress_ungated(*args: object) -> None:
    flat, tokens, (text,), cache, weights, out, how = _cut(args, PLAN, TOKENS, SPEC, CACHE, WEIGHTS, OUTPUTS, HOW)
    plan, spec = _plan_of(_PLAN, flat), spec_of(text)
    c = Compressor(tokens[0] if tokens[1] is None else tuple(tokens), None, _cache_of(spec, *cache), spec, *weights)
    _run(plan, lambda: run_compress(c, plan, Outputs(*out), *how))


def _compress_window(*args: object) -> None:
    flat, tables, one, out, how = _cut(args, PLAN, TABLES, WINDOW, OUTPUTS, HOW)
    plan, (c, memory) = _plan_of(_PLAN, flat), _compressor_of(one, "window")
    plan.entry_items, plan.cu_entries, kv_table, score_table, plan.page_size, plan.null_page, plan.ring = tables
    plan.block_tables = None if kv_table is None else (kv_table, score_table)
    _run(plan, lambda: run_compress(c, plan, Outputs(*out), *how), (c.state, memory))


def _compress_mean(*args: object) -> None:
    flat, one, out, how = _cut(args, FOLD_PLAN, MEAN, OUTPUTS, HOW)
    plan, (c, memory) = _plan_of(_FOLD_PLAN, flat), _compressor_of(one, "mean")
    _run(plan, lambda: run_compress(c, plan, Outputs(*out), *how), (c.state, memory))


def _compress_many(*args: object) -> None:
    flat, *both, how = _cut(args, FOLD_PLAN, FOLD, FOLD, HOW)
    plan = _plan_of(_FOLD_PLAN, flat)
    (first, _), (second, memory) = (_compressor_of(one, "fold") for one in both)
    of_both = _memory("pair", first.spec, second.spec, first.device)
    _run(plan, lambda: run_many((first, second), plan, *how), (first.state, of_both), (second.state, memory))


def _store(rows: torch.Tensor, *args: object) -> None:
    flat, (text,), cache, weights, how = _cut(args, PLAN, SPEC, CACHE, WEIGHTS[1:], HOW)
    plan, spec = _plan_of(_PLAN, flat), spec_of(text)
    c = Compressor(rows, None, _cache_of(spec, *cache), spec, None, *weights)
    _run(plan, lambda: run_store(c, plan, *how))


def _store_placed(*args: object) -> None:
    places, (text,), cache, second, weights, how = _cut(args, PLACES, SPEC, CACHE, CACHE, WEIGHTS[1:], HOW)
    (rows, slots, positions, errors), spec = places, spec_of(text)
    also = _cache_of(spec, *second)
    caches = (_cache_of(spec, *cache), also)[: 1 if also is None else 2]
    run_placed(Placed(rows, slots, positions, caches, spec, *weights, errors), *how)


def _project(
    hidden: torch.Tensor, weights: list, scales: list, tensors: list, kv_scores: list, round_kv_score: bool, *how: object
) -> None:
    """scales: of weights in FP8, which are codes then."""
    given = list(map(ScaledWeight, weights, scales)) if scales else weights
    parts = _cut(given, *(range(count) for count in tensors))
    run_product(Projection(hidden, tuple(tuple(part) for part in parts), round_kv_score), kv_scores, *how)


def _restore(*args: object) -> None:
    (text,), state, kept, (*hits, backend) = _cut(args, SPEC, STATE, KEPT, HITS)
    spec = spec_of(text)
    run_restore(_state_of(spec, *state), Snapshots(spec, *kept), Hits(*hits), backend)


def _update(given: torch.Tensor, cu_seqlens: torch.Tensor, totals: bool, *flat: object) -> None:
    plan = _plan_of(_WHOLE_PLAN, flat, whole=True)
    plan.entry_capacity = plan.entry_items.shape[0]
    check_made("plan", plan, PlanData)
    user = LIVE.get(plan.items.data_ptr())
    if user is not None:
        user.fresh, plan._launcher = True, user._launcher
    run_update(plan, Lengths(given, cu_seqlens, totals))


def _define(name: str, arguments: tuple[str, ...], run: Callable[..., None]) -> None:
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    schema = [text.replace("!", f"({next(letters)}!)") if "!" in text else text for text in arguments]
    name = f"{NAMESPACE}::{name}"
    torch.library.define(name, f"({', '.join(schema)}) -> ()", tags=(torch.Tag.pt2_compliant_tag,), lib=_LIBRARY)
    torch.library.impl(name, "CompositeExplicitAutograd", run, lib=_LIBRARY)
    torch.library.register_fake(name, lambda *args: None, lib=_LIBRARY)


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_define("compress", FOLD_PLAN + FOLD + OUTPUTS + HOW, _compress)
_define("compress_ungated", PLAN + UNGATED + OUTPUTS + HOW, _compress_ungated)
_define("compress_mean", FOLD_PLAN + MEAN + OUTPUTS + HOW, _compress_mean)
_define("compress_window", PLAN + TABLES + WINDOW + OUTPUTS + HOW, _compress_window)
_define("compress_many", (*FOLD_PLAN, *(f"{argument}_{i}" for i in (0, 1) for argument in FOLD), *HOW), _compress_many)
_define("store", ("Tensor rows", *PLAN, *SPEC, *CACHE, *WEIGHTS[1:], *HOW), _store)
_define("store_placed", PLACES + SPEC + CACHE + ALSO + WEIGHTS[1:] + HOW, _store_placed)
_define("project", (*HIDDEN, *HOW), _project)
_define("restore", SPEC + STATE + KEPT + HITS, _restore)
_define("update", ("Tensor start_pos", "Tensor cu_seqlens", "bool totals", *WHOLE_PLAN), _update)
