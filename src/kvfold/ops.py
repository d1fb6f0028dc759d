"""The calls as operators of torch, `torch.ops.kvfold.*`: what `torch.compile` and `FakeTensor`s see of them.

User code calls `kvfold.compress` and the others; while they are traced they come here, at all other times they go straight
to the launch. An operator takes tensors and plain values, builds the light objects round them and makes the eager call, with
all its checks. What is mutated is in the schemas; nothing is returned, so a fake call has nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch._subclasses import FakeTensor

from .arguments.checks import check_type
from .calls.run import run_compress, run_many, run_restore, run_store, run_update
from .spec import CompressorSpec, check_spec
from .storage.cache import EntryCache
from .storage.fold_state import FoldState
from .storage.remembered import check_made
from .storage.snapshots import Snapshots
from .storage.step import LIVE, Compressor, PlanData
from .storage.window_state import WindowState

# Operators are global to a process: each copy of the package, loaded under a name of its own, has its own.
NAMESPACE = __package__.replace(".", "_")
OPS = getattr(torch.ops, NAMESPACE)

# Groups of arguments. A `!` marks what is mutated; `_define` gives each its own alias letter.
PLAN = (
    "Tensor items", "Tensor num_items", "Tensor? entry_slots", "Tensor! errors", "SymInt entry_capacity", "SymInt batch",
    "SymInt max_new_tokens", "SymInt ratio", "SymInt? entries_per_page",
)  # fmt: skip
FOLD_PLAN = ("Tensor? state_slots", "Tensor? snapshot_table", "SymInt? snapshot_page_size")
WINDOW_PLAN = ("Tensor entry_items", "Tensor cu_entries", "Tensor? kv_table", "Tensor? score_table", "SymInt? page_size")
SPEC = ("str spec",)
STATE = ("Tensor! state_rows", "Tensor! positions", "SymInt rewind")
SNAPSHOTS = ("Tensor!? snapshot_rows", "Tensor!? snapshot_positions", "SymInt? page_size")
FOLD = ("Tensor kv_score", *STATE, *SNAPSHOTS)
WINDOW = ("Tensor kv_score", "Tensor! kv", "Tensor! score")
CACHE = ("Tensor!? storage", "Tensor!? scales", "str format", "SymInt rows_per_page", "float cache_scale")
WEIGHTS = ("Tensor? ape", "Tensor? norm_weight", "Tensor? rope")
HOW = ("str? backend", "bool? pdl")
KEPT = ("Tensor snapshot_rows", "Tensor snapshot_positions", "SymInt page_size")  # SNAPSHOTS that are there, and only read
HITS = ("Tensor slots", "Tensor pages", "Tensor start_pos", "Tensor! errors", "str? backend")
_PLANNED = {text.split()[-1] for text in (*PLAN, *FOLD_PLAN, *WINDOW_PLAN)}
UPDATE = (
    "Tensor start_pos", "Tensor cu_seqlens", "Tensor? state_slots", "Tensor? cache_block_table", "SymInt? rows_per_page",
    "Tensor! own_start_pos", "Tensor! own_cu_seqlens", "Tensor! cu_entries", "Tensor! items", "Tensor! num_items",
    "Tensor! entry_items", "Tensor!? entry_slots", "Tensor! errors", "SymInt batch", "SymInt max_new_tokens",
    "SymInt max_tokens", "SymInt ratio",
)  # fmt: skip


def compress(c: Compressor, plan: PlanData, rows: torch.Tensor | None, backend: str | None, pdl: bool | None) -> None:
    """`kvfold.compress` while it is traced."""
    common = (_text(c.spec), *_cache(c.cache, c.spec), c.ape, c.norm_weight, c.rope, rows, backend, pdl)
    if isinstance(c.state, WindowState):
        _call(OPS.compress_window, *_plan(plan), *_window_plan(plan), *_window_state(c), *common)
    else:
        _call(OPS.compress, *_plan(plan), *_fold_plan(plan), *_fold(c), *common)


def compress_many(compressors: Sequence[Compressor], plan: PlanData, backend: str | None, pdl: bool | None) -> None:
    """`kvfold.compress_many` while it is traced."""
    if len(compressors) == 1:
        compress(compressors[0], plan, None, backend, pdl)
        return
    flat = []
    for c in compressors:
        flat += [*_fold(c), _text(c.spec), *_cache(c.cache, c.spec), c.ape, c.norm_weight, c.rope]
    _call(OPS.compress_many, *_plan(plan), *_fold_plan(plan), *flat, backend, pdl)


def store(c: Compressor, plan: PlanData, backend: str | None, pdl: bool | None) -> None:
    """`kvfold.store` while it is traced."""
    check_type("cache", c.cache, EntryCache)
    _call(OPS.store, c.kv_score, *_plan(plan), _text(c.spec), *_cache(c.cache, c.spec), c.norm_weight, c.rope, backend, pdl)


def restore(state: FoldState, snapshots: Snapshots, *hits: object) -> None:
    """`kvfold.restore` while it is traced; `hits` are its other arguments, as in `HITS`."""
    check_type("snapshots", snapshots, Snapshots)
    _call(OPS.restore, _text(state.spec), *_state(state), *_snapshots(snapshots, state.spec), *hits)


def update(plan: PlanData, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    """`StepPlan.update` while it is traced."""
    given = plan.state_slots, plan.cache_block_table, plan.rows_per_page
    own = plan.start_pos, plan.cu_seqlens, plan.cu_entries, plan.items, plan.num_items, plan.entry_items
    slots = None if plan.cache_block_table is None else plan.entry_slots  # without a table the caller's, and only read
    sizes = plan.batch, plan.max_new_tokens, plan.max_tokens, plan.ratio
    _call(OPS.update, start_pos, cu_seqlens, *given, *own, slots, plan.errors, *sizes)


def mark_static(*things: FoldState | WindowState | EntryCache | Snapshots | PlanData | torch.Tensor) -> None:
    """Says that these live as long as the compiled code: `torch.compile(mode="reduce-overhead")` needs it.

    CUDA graphs are left out by torch, with a warning, when a graph mutates an input that may be elsewhere at the next call.
    What hangs on the compiled `nn.Module`, its parameters and buffers and also states and caches that are attributes, is known
    to stay. Arguments are not until they are marked: plans that are updated in place, and states, caches, snapshots and
    `rows` that come with a call. One that moves all the same costs a new recording.
    """
    for i, thing in enumerate(things):
        if not isinstance(thing, (FoldState, WindowState, EntryCache, Snapshots, PlanData, torch.Tensor)):
            kinds = "a state, a cache, snapshots, a plan or a tensor"
            raise TypeError(f"things[{i}] must be {kinds}, got {type(thing).__name__}")
        held = [thing] if isinstance(thing, torch.Tensor) else vars(thing).values()
        for value in held:
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, torch.Tensor):
                    torch._dynamo.mark_static_address(tensor, guard=False)


# Which argument of a call an operator's argument belongs to, where names differ.
OWNERS = {
    "storage": "cache", "scales": "cache", "kv": "state", "score": "state", "positions": "state", "state_rows": "state",
    "snapshot_rows": "snapshots", "snapshot_positions": "snapshots", **dict.fromkeys(_PLANNED, "plan"),
}  # fmt: skip


def _call(operator: torch._ops.OpOverloadPacket, *args: object) -> None:
    """Calls an operator. Outside of torch.compile it is one over fake tensors, and takes no others unless their mode does."""
    fake = None if torch.compiler.is_compiling() else next((x for x in args if isinstance(x, FakeTensor)), None)
    if fake is not None and not fake.fake_mode.allow_non_fake_inputs:
        for argument, x in zip(operator.default._schema.arguments, args, strict=True):
            if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor):
                name = OWNERS.get(argument.name, argument.name)
                raise TypeError(f"{name} must be of FakeTensors like the others, got a real one ({argument.name})")
    operator(*args)


# From objects to arguments. This much is traced: attribute reads, and the checks of what an operator cannot see.


def _plan(plan: PlanData) -> tuple:
    check_type("plan", plan, PlanData)
    return (
        plan.items, plan.num_items, plan.entry_slots, plan.errors, plan.entry_capacity, plan.batch, plan.max_new_tokens,
        plan.ratio, plan.rows_per_page,
    )  # fmt: skip


def _fold_plan(plan: PlanData) -> tuple:
    return plan.state_slots, plan.snapshot_table, plan.snapshot_page_size


def _window_plan(plan: PlanData) -> tuple:
    kv_table, score_table = plan.block_tables if plan.block_tables is not None else (None, None)
    return plan.entry_items, plan.cu_entries, kv_table, score_table, plan.page_size


def _text(spec: CompressorSpec) -> str:
    check_spec("spec", spec)
    return spec._text


def _fold(c: Compressor) -> tuple:
    check_type("state", c.state, FoldState)
    check_spec("spec", c.spec)
    if c.state.spec._text != c.spec._text:
        raise ValueError(f"state must be for {c.spec}, got {c.state.spec}")
    return c.kv_score, *_state(c.state), *_snapshots(c.snapshots, c.spec)


def _state(state: FoldState) -> tuple:
    return state.rows, state.positions, state.max_new_tokens


def _snapshots(snapshots: Snapshots | None, spec: CompressorSpec) -> tuple:
    if snapshots is None:
        return None, None, None
    check_type("snapshots", snapshots, Snapshots)
    if snapshots.spec._text != spec._text:
        raise ValueError(f"snapshots must be for {spec}, got {snapshots.spec}")
    return snapshots.rows, snapshots.positions, snapshots.page_size


def _window_state(c: Compressor) -> tuple:
    if c.snapshots is not None:
        raise ValueError("snapshots must be None for a WindowState, whose pages are shared as they are")
    return c.kv_score, c.state.kv, c.state.score


def _cache(cache: EntryCache | None, spec: CompressorSpec) -> tuple:
    if cache is None:
        return None, None, "", 0, 1.0
    check_type("cache", cache, EntryCache)
    if cache.spec._text != spec._text:
        raise ValueError(f"cache must be for {spec}, got {cache.spec}")
    if not cache._named:
        raise ValueError(
            f"cache must have a format of kvfold.storage.formats.FORMATS when it is traced, got {cache.format.name!r}"
        )
    return cache.storage, cache.scales, cache.format.name, cache.rows_per_page, cache.scale


# From arguments to objects, which live for one call.


def _plan_of(
    items, num_items, entry_slots, errors, entry_capacity, batch, max_new_tokens, ratio, rows_per_page
) -> PlanData:  # fmt: skip
    plan = PlanData()
    plan.ratio, plan.max_new_tokens, plan.batch = ratio, max_new_tokens, batch
    plan.items, plan.num_items, plan.entry_slots, plan.errors = items, num_items, entry_slots, errors
    plan.item_capacity, plan.entry_capacity = items.shape[0], entry_capacity
    plan.cache_block_table, plan.rows_per_page = None, rows_per_page
    plan.state_slots = plan.block_tables = plan.page_size = plan.snapshot_table = plan.snapshot_page_size = None
    plan._whole = False
    return plan


@lru_cache(maxsize=256)
def _spec_of(text: str) -> CompressorSpec:
    return CompressorSpec(*json.loads(text))


@lru_cache(maxsize=256)
def _memory(*asked: object) -> list[tuple]:
    """Where the launcher of the last call of a kind, on a device, is kept, as a user's state would keep it; no tensors."""
    return [None]


def _cache_of(spec: CompressorSpec, storage, scales, fmt: str, rows_per_page: int, scale: float) -> EntryCache | None:
    return None if storage is None else EntryCache(storage, fmt, rows_per_page, spec, scales=scales, scale=scale)


def _run(plan: PlanData, call: Callable[[], None]) -> None:
    """Makes a call with a plan of one call, which is as fresh as the user's plan over the same items; see `use_pdl`."""
    user = LIVE.get(plan.items.data_ptr())
    plan.fresh = user is None or user.fresh
    call()
    if user is not None:
        user.fresh = plan.fresh


def _call_compress(plan: PlanData, states: list, made: Sequence, backend: str | None, pdl: bool | None, rows=None) -> None:
    """The eager call for compressors whose states remember their launchers in `states`."""
    for c, memory in zip(made, states, strict=True):
        c.state._chosen = memory[0]
    if len(made) == 1:
        _run(plan, lambda: run_compress(made[0], plan, rows, backend, pdl))
    else:
        _run(plan, lambda: run_many(made, plan, backend, pdl))
    for c, memory in zip(made, states, strict=True):
        memory[0] = c.state._chosen


def _compressor_of(args: Sequence, kind: str) -> tuple[Compressor, list[tuple]]:
    """A `Compressor` from the arguments of its state, spec, cache and weights, and the memory of its launcher."""
    kv_score, *held = args[: -len(ONE)]
    (text,), flat_cache, weights = _cut(args[-len(ONE) :], SPEC, CACHE, WEIGHTS)
    spec = _spec_of(text)
    cache, memory = _cache_of(spec, *flat_cache), _memory(kind, text, flat_cache[2], kv_score.device)
    if kind == "window":
        # It makes the scratch of its one call, where it needs any: a CUDA graph then has it in its own memory.
        return Compressor(kv_score, WindowState(*held), cache, spec, *weights), memory
    state, (rows, positions, page_size) = _cut(held, STATE, SNAPSHOTS)
    snapshots = None if rows is None else Snapshots(spec, rows, positions, page_size)
    return Compressor(kv_score, FoldState(spec, *state), cache, spec, *weights, snapshots), memory


def _cut(args: Sequence, *groups: tuple[str, ...]) -> list[Sequence]:
    found, at = [], 0
    for group in groups:
        found.append(args[at : at + len(group)])
        at += len(group)
    return found


ONE = SPEC + CACHE + WEIGHTS
ROWS = ("Tensor!? rows",)


def _compress(*args: object) -> None:
    flat, more, c, (rows,), how = _cut(args, PLAN, FOLD_PLAN, FOLD + ONE, ROWS, HOW)
    plan = _plan_of(*flat)
    plan.state_slots, plan.snapshot_table, plan.snapshot_page_size = more
    made, memory = _compressor_of(c, "fold")
    _call_compress(plan, [memory], [made], *how, rows=rows)


def _compress_window(*args: object) -> None:
    flat, more, c, (rows,), how = _cut(args, PLAN, WINDOW_PLAN, WINDOW + ONE, ROWS, HOW)
    plan = _plan_of(*flat)
    plan.entry_items, plan.cu_entries, kv_table, score_table, plan.page_size = more
    plan.block_tables = None if kv_table is None else (kv_table, score_table)
    made, memory = _compressor_of(c, "window")
    _call_compress(plan, [memory], [made], *how, rows=rows)


def _compress_many(*args: object) -> None:
    flat, more, first, second, how = _cut(args, PLAN, FOLD_PLAN, FOLD + ONE, FOLD + ONE, HOW)
    plan = _plan_of(*flat)
    plan.state_slots, plan.snapshot_table, plan.snapshot_page_size = more
    made, memories = zip(*(_compressor_of(c, "fold") for c in (first, second)), strict=True)
    _call_compress(plan, [_memory("pair", *(c.spec for c in made), made[0].kv_score.device), memories[1]], made, *how)


def _store(rows: torch.Tensor, *args: object) -> None:
    flat, (text,), cache, weights, how = _cut(args, PLAN, SPEC, CACHE, WEIGHTS[1:], HOW)
    plan, spec = _plan_of(*flat), _spec_of(text)
    c = Compressor(rows, None, _cache_of(spec, *cache), spec, None, *weights)
    _run(plan, lambda: run_store(c, plan, *how))


def _restore(*args: object) -> None:
    (text,), state, kept, hits = _cut(args, SPEC, STATE, KEPT, HITS)
    spec = _spec_of(text)
    run_restore(FoldState(spec, *state), Snapshots(spec, *kept), *hits)


def _update(
    start_pos, cu_seqlens, state_slots, table, rows_per_page, own_start_pos, own_cu_seqlens, cu_entries, items, num_items,
    entry_items, entry_slots, errors, batch, max_new_tokens, max_tokens, ratio,
) -> None:  # fmt: skip
    sizes = entry_items.shape[0], batch, max_new_tokens, ratio, rows_per_page
    plan = _plan_of(items, num_items, entry_slots, errors, *sizes)
    plan._whole, plan.state_slots, plan.cache_block_table, plan.max_tokens = True, state_slots, table, max_tokens
    plan.start_pos, plan.cu_seqlens, plan.cu_entries, plan.entry_items = own_start_pos, own_cu_seqlens, cu_entries, entry_items
    check_made("plan", plan, PlanData)
    user = LIVE.get(items.data_ptr())
    if user is not None:
        user.fresh, plan._launcher = True, user._launcher
    run_update(plan, start_pos, cu_seqlens)


def _define(name: str, arguments: tuple[str, ...], run: Callable[..., None]) -> None:
    schema, letters = [], iter("abcdefghijklmnopqrstuvwxyz")
    for argument in arguments:
        schema.append(argument.replace("!", f"({next(letters)}!)") if "!" in argument else argument)
    name = f"{NAMESPACE}::{name}"
    torch.library.define(name, f"({', '.join(schema)}) -> ()", tags=(torch.Tag.pt2_compliant_tag,), lib=_LIBRARY)
    torch.library.impl(name, "CompositeExplicitAutograd", run, lib=_LIBRARY)
    torch.library.register_fake(name, lambda *args: None, lib=_LIBRARY)


def _named(group: tuple[str, ...], i: int) -> tuple[str, ...]:
    return tuple(f"{argument}_{i}" for argument in group)


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_define("compress", PLAN + FOLD_PLAN + FOLD + ONE + ROWS + HOW, _compress)
_define("compress_window", PLAN + WINDOW_PLAN + WINDOW + ONE + ROWS + HOW, _compress_window)
_define("compress_many", PLAN + FOLD_PLAN + _named(FOLD + ONE, 0) + _named(FOLD + ONE, 1) + HOW, _compress_many)
_define("store", ("Tensor rows", *PLAN, *SPEC, *CACHE, *WEIGHTS[1:], *HOW), _store)
_define("restore", SPEC + STATE + KEPT + HITS, _restore)
_define("update", UPDATE, _update)
