"""From checked arguments to one kernel launch.

What a call of one layer with one plan launches, and all that is the same from call to call, is prepared once (`Prepared`) and
remembered by the layer (`storage/remembered.Met`); each call fills in its tokens and scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from ..arguments.checks import side_by_side
from ..spec import CompressorSpec
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.formats import RecordFormat
from ..storage.mean_state import MeanState
from ..storage.remembered import Met
from ..storage.snapshots import Snapshots
from ..storage.step import NO_OUTPUTS, Compressor, Hits, Outputs, Placed, PlanData, owner_of
from ..storage.window_state import WindowState
from . import args
from .args import flat
from .build import INTERPRETED, KERNELS
from .kernels.plan_items import SEQUENCES
from .kernels.plan_metadata import ENTRIES, TABLE, TOKENS
from .keys import (
    PairKey,
    RestoreKey,
    Types,
    kind_of,
    plan_key,
    step_key,
    store_key,
    window_key,
    windows_per_program,
)
from .launcher import Launcher, address, launcher_of, multiprocessors, pack, supports_pdl
from .table import ANY, BUCKETS, item_bucket, pair_buckets
from .variants import draws_items, slices_of

# What every call brings of itself, in order: how the names of such parameters of a kernel end.
_BROUGHT = (
    "plan_entry_capacity", "pooled", "tokens_kv_score", "tokens_stride", "tokens_count", "tokens_apart", "tokens_skew",
    "scratch_workspace", "scratch_arrivals", "output_rows", "output_latent",
)  # fmt: skip
_BROUGHT_PLACED = ("plan_errors", "places_slots", "places_positions", "pooled", "pooled_stride")  # `store` without a plan
_NO_CACHE = (None,) * len(args.Output._fields)


_TOTALS = KERNELS["plan"].arg_names.index("totals")


class Chosen(NamedTuple):
    """Which kernel calls launch, and how.

    A state remembers the last one, for calls with new plans and caches, as operators make them: hashing a key takes long.
    """

    wanted: tuple  # what its key was made of
    launcher: Launcher
    programs: int  # most of one compressor
    few: int = 0  # `Config.pair_programs`
    slices: int = 1  # programs that share an entry
    draws: tuple[bool, ...] = ()  # for each compressor, whether programs draw items


@dataclass(frozen=True)
class Prepared:
    """A call of one layer with one plan: its arguments as given, what it launches, and its arguments as packed."""

    asked: tuple
    chosen: Chosen
    values: list
    places: tuple[int, ...]  # in `values`, of what a call brings
    bits: int

    def launch(self, grid: int, brought: tuple, strides: int, pdl: bool) -> None:
        """brought: values for `places`, None for those that are None in `values`. strides: theirs, or-ed."""
        values, bits = self.values.copy(), self.bits | strides
        for place, value in zip(self.places, brought):  # noqa: B905 (every call comes here)
            if value is not None:
                if value.__class__ is not int and not INTERPRETED:  # what `pack` does
                    value = value.data_ptr()
                    bits |= value
                values[place] = value
        self.chosen.launcher(grid, values, bits, pdl)


def compress_triton(c: Compressor, plan: PlanData, out: Outputs, pdl: bool | None) -> None:
    """`compress`, except over a `WindowState`, after its arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    met, value = owner_of(c, plan)._layer.plans[id(plan)], c.value
    grid, bucket = _count(met, plan, value.shape[0])
    asked, call = (bucket, value.dtype, c.score is None, *_out_types(out)), met.prepared
    if call is None or call.asked != asked:
        wanted = _step_wanted(c, plan, out, bucket)
        chosen = _choose_step(wanted, c.device) if c.state is None else _choose(c.state, wanted, _choose_step)
        groups = _plan(plan), _snap_table(plan, c), _compressor(c, out)
        call = met.prepared = _prepare("step", asked, chosen, groups)
    chosen = call.chosen
    brought, strides = _brought(c, plan, out, chosen.slices, chosen.draws[0])
    brought = plan.room(*out), *brought
    call.launch(min(grid * chosen.slices, chosen.programs), brought, strides, use_pdl(pdl, plan, met.device))


def compress_pair_triton(pair: tuple[Compressor, Compressor], plan: PlanData, pdl: bool | None) -> None:
    """`compress_many` of two, after their arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    first, second = pair
    met, one, other = first.state._layer.plans[id(plan)], first.value, second.value
    grid, bucket = _count(met, plan, max(one.shape[0], other.shape[0]), (first.state.kind, second.state.kind))
    asked = bucket, one.dtype, first.score is None, other.dtype, second.score is None, second.state._layer
    call = met.prepared
    if call is None or call.asked != asked:
        chosen = _choose(first.state, tuple(_step_wanted(c, plan, NO_OUTPUTS, bucket) for c in pair), _choose_pair)
        groups = _plan(plan), _snap_table(plan, *pair), *(_compressor(c, NO_OUTPUTS) for c in pair)
        call = met.prepared = _prepare("pair", asked, chosen, groups)
    chosen = call.chosen
    most = chosen.programs
    if chosen.few and grid <= 2 * most:  # so that the second compressor need not wait for the first one's last windows
        most = chosen.few
    brought, strides = _brought(first, plan, NO_OUTPUTS, 1, chosen.draws[0])
    more, its_strides = _brought(second, plan, NO_OUTPUTS, 1, chosen.draws[1])
    brought = plan.entry_capacity, *brought, *more
    call.launch(2 * min(grid, most), brought, strides | its_strides, use_pdl(pdl, plan, met.device))


def compress_window_triton(c: Compressor, plan: PlanData, out: Outputs, pdl: bool | None) -> None:
    """`compress` over a `WindowState`, after its arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    spec, state, met = c.spec, c.state, c.state._layer.plans[id(plan)]
    value = c.value
    asked, call = (value.dtype, c.score is None, *_out_types(out)), met.prepared
    if call is None or call.asked != asked:
        types, tables = _types(c, state.dtype, plan, out), plan.tables
        wanted = spec, _format(c), plan.max_new_tokens, types, state.page_size, tables
        pools = (
            args.Pool(
                pool,
                pool.stride(0),
                pool.stride(1),
                pool.shape[0],
                table,
                table.shape[1],
                None if tables == "plain" else _numbers(table).step,
            )
            for pool, table in zip((state.kv, state.score), plan.block_tables, strict=True)
        )
        null_page = -1 if plan.null_page is None else plan.null_page
        paging = plan.page_size, None if tables == "plain" else null_page, plan.ring_rows or None
        step = plan.entry_items, plan.cu_entries, plan.batch, args.Tokens(ape=c.ape)
        output = _output(c.cache, spec, c.norm_weight, c.rope, out)
        groups = _plan(plan), *step, *pools, *paging, args.Scratch(), output
        call = met.prepared = _prepare("window", asked, _choose(state, wanted, _choose_window), groups)
    chosen, (programs, _) = call.chosen, _count(met, plan, value.shape[0])
    if c.cache is not None or out.rows is not None or out.latent is not None:
        programs += plan.entry_capacity * chosen.slices
    brought, strides = _brought(c, plan, out, chosen.slices, False)
    brought = plan.room(*out), *brought
    call.launch(min(programs, chosen.programs), brought, strides, use_pdl(pdl, plan, met.device))


def store_triton(c: Compressor, plan: PlanData, pdl: bool | None) -> None:
    """`store` after its arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    pooled, cache = c.kv_score, c.cache
    met = cache._layer.plans[id(plan)]
    asked = pooled.dtype, c.norm_weight.dtype
    call = met.prepared
    if call is None or call.asked != asked:
        launcher = launcher_of(store_key(c.spec, cache.format, asked), pooled.device)
        output = _output(cache, c.spec, c.norm_weight, c.rope, NO_OUTPUTS)
        groups = _plan(plan), args.Places(), None, None, output, _NO_CACHE
        call = met.prepared = _prepare("store", asked, Chosen(asked, launcher, ANY), groups)
    call.launch(plan.item_capacity, (plan.room(pooled), pooled, *NO_OUTPUTS), 0, use_pdl(pdl, plan, pooled.device))


def store_placed_triton(p: Placed, pdl: bool | None) -> None:
    """`store` without a plan, after its arguments were checked: one launch on the current stream."""
    cache, *also = p.caches
    positions = p.positions if p.spec.rope_dim else None
    asked = tuple(None if x is None else x.dtype for x in (p.rows, p.norm_weight, p.slots, positions))
    call = cache._layer.prepared
    if call is None or call.asked != asked:
        launcher = launcher_of(store_key(p.spec, cache.format, asked, *(one.format for one in also)), p.rows.device)
        output, *second = (_output(one, p.spec, p.norm_weight, p.rope, NO_OUTPUTS) for one in p.caches)
        groups = args.Plan(*[None] * 5), args.Places(), None, None, output, *(second or [_NO_CACHE])
        call = cache._layer.prepared = _prepare("store", asked, Chosen(asked, launcher, ANY), groups, _BROUGHT_PLACED)
    stride = p.rows.stride(0)
    brought = address(p.errors), address(p.slots), address(positions), p.rows, stride
    call.launch(p.rows.shape[0], brought, stride, pdl is not False and supports_pdl(p.rows.device))


def restore_triton(state: FoldState, snapshots: Snapshots, hits: Hits) -> None:
    """`restore` after its arguments were checked: one launch on the current stream, ordinary and not a dependent."""
    count = snapshots.rows_per_page
    if not count:
        hits = hits._replace(pages=None)
    groups = args.RestoreArguments(_state(state), _snapshots(snapshots), snapshots.page_size, *hits)
    key = RestoreKey(state.spec, state.rows.dtype, count)
    values, bits = pack(*flat(groups))
    bits |= groups.state.stride | (groups.snapshots.stride or 0)
    launcher_of(key, state.device)(hits.slots.shape[0] * max(count, 1), values, bits)


def update_on_gpu(plan: PlanData, given: torch.Tensor, cu_seqlens: torch.Tensor, totals: bool = False) -> None:
    """`StepPlan.update` after its arguments were checked, for a batch that is not empty. given, totals: as in `Lengths`."""
    of_engine = totals or not (side_by_side(given) and side_by_side(cu_seqlens)) or plan.metadata
    known = plan._prepared
    if known is None or known[0] is not plan._token or known[1] != of_engine or plan._token is None:
        windows = windows_per_program(plan.windows_per_sequence)
        grid = -(-plan.batch // SEQUENCES) * max(1, -(-plan.windows_per_sequence // windows))
        known = plan._prepared = plan._token, of_engine, grid, *pack(*_update_arguments(plan, of_engine))
    grid, values, fixed = known[2:]
    found, bits = pack(given, cu_seqlens)
    steps = (_numbers(given).step, _numbers(cu_seqlens).step) if of_engine else (None, None)
    values = [found[0], steps[0], found[1], steps[1], *values[4:]]
    if of_engine:
        values[_TOTALS] = int(totals)
    if plan._launcher is None or plan._launcher[0] != of_engine:
        no_table = plan.cache_block_table is None
        key = plan_key(plan.ratio, plan.windows_per_sequence, plan.state_slots is None, no_table, of_engine)
        plan._launcher = of_engine, launcher_of(key, given.device)
    plan._launcher[1](grid, values, fixed | bits)


def _update_arguments(plan: PlanData, of_engine: bool) -> list:
    """All arguments but the lengths, which each update brings. What an engine's plan lacks still gets an address."""
    table, entry_slots, metadata = plan.cache_block_table, plan.entry_slots, args.Metadata()
    if of_engine:
        entry_slots, metadata = plan.errors if entry_slots is None else entry_slots, _metadata(plan)
    elif table is None:
        entry_slots = None  # the caller's

    def numbers(x: torch.Tensor | None) -> args.Numbers:
        return _numbers(plan.errors if x is None else x) if of_engine else args.Numbers(x)

    return flat(
        args.PlanArguments(
            lengths=args.Numbers(),
            cu_seqlens=args.Numbers(),
            state_slots=numbers(plan.state_slots),
            batch=plan.batch,
            max_new_tokens=plan.max_new_tokens,
            max_tokens=plan.max_tokens,
            own_start_pos=plan.start_pos,
            own_cu_seqlens=plan.cu_seqlens,
            cu_entries=plan.cu_entries,
            items=plan.items,
            num_items=plan.num_items,
            errors=plan.errors,
            item_capacity=plan.item_capacity,
            entry_items=plan.entry_items,
            entry_capacity=plan.entry_capacity,
            table=numbers(table),
            table_width=table.shape[1] if table is not None else 0,
            rows_per_page=plan.rows_per_page or 1,
            entry_slots=entry_slots,
            num_chunks=-(-plan.batch // SEQUENCES),
            metadata=metadata,
        )
    )


def _metadata(plan: PlanData) -> args.Metadata:
    """What an engine's metadata says, except `totals`; -1 for numbers that mean none, where there are none."""
    sources = (plan.cache_block_table, TABLE), (plan.token_slots, TOKENS), (plan.slots_given, ENTRIES)
    source = next((kind.value for tensor, kind in sources if tensor is not None), 0)
    slots = plan.slots_given if plan.token_slots is None else plan.token_slots
    return args.Metadata(
        totals=0,
        by_slot=int(plan.state_slots is not None),
        null_slot=-1 if plan.null_slot is None else plan.null_slot,
        null_page=-1 if plan.null_page is None else plan.null_page,
        source=source,
        slots=_numbers(plan.errors if slots is None else slots),
        num_slots=0 if slots is None else slots.shape[0],
        no_slot=plan.no_slot,
        reserved=int(plan.reserved),
        cu_rows=_numbers(plan.errors if plan.cu_rows is None else plan.cu_rows),
    )


def _numbers(x: torch.Tensor) -> args.Numbers:
    """Numbers, or rows of numbers, of any dtype and stride that `checks.check_numbers` accepts."""
    wide = x.dtype == torch.int64
    return args.Numbers(x, 2 * x.stride(0) * (1 + wide) + wide)


def use_pdl(wanted: bool | None, plan: PlanData, device: torch.device) -> bool:
    """Whether to launch as a dependent: what is read before the wait, the plan, must be older than the launch before.

    The first launch after `plan.update` is an ordinary one, so every later one starts when the plan has long been written.
    """
    fresh = plan.fresh
    if fresh:
        plan.fresh = False
    return wanted is not False and not fresh and supports_pdl(device)


def _choose(state: FoldState | MeanState | WindowState, wanted: tuple, choose: Callable[..., Chosen]) -> Chosen:
    if state._chosen is None or state._chosen.wanted != wanted:
        state._chosen = choose(wanted, state.device)
    return state._chosen


def _choose_step(wanted: tuple, device: torch.device) -> Chosen:
    key = step_key(*wanted)
    most, slices = key.config.programs_on(multiprocessors(device)) or ANY, slices_of(key.spec, key.config)
    return Chosen(wanted, launcher_of(key, device), most, 0, slices, (draws_items(key.spec, key.config),))


def _choose_pair(wanted: tuple, device: torch.device) -> Chosen:
    key = PairKey(*(step_key(*one) for one in wanted))
    config = key.first.config
    long = config.programs > 0 and key.second.config.programs > 0
    count = multiprocessors(device)
    most, few = (config.programs_on(count), config.pair_programs_on(count)) if long else (ANY, 0)
    return Chosen(wanted, launcher_of(key, device), most, few, 1, tuple(draws_items(one.spec, one.config) for one in key))


def _choose_window(wanted: tuple, device: torch.device) -> Chosen:
    key = window_key(*wanted)
    most = key.config.programs_on(multiprocessors(device))
    return Chosen(wanted, launcher_of(key, device), most, slices=slices_of(key.spec, key.config))


def _step_wanted(c: Compressor, plan: PlanData, out: Outputs, bucket: float) -> tuple:
    """Arguments of `step_key`."""
    types = _types(c, None if c.state is None else c.state.rows.dtype, plan, out)
    kind = kind_of(c.spec) if c.state is None else c.state.kind
    return c.spec, _format(c), kind, plan.max_new_tokens, types, _keeps(c.snapshots), bucket


def _out_types(out: Outputs) -> tuple[torch.dtype | None, bool]:
    return None if out.rows is None else out.rows.dtype, out.latent is not None


def _types(c: Compressor, state: torch.dtype | None, plan: PlanData, out: Outputs) -> Types:
    rows, latent = _out_types(out)
    return Types(
        kv_score=c.value.dtype,
        state=state,
        rows=rows,
        norm_weight=c.norm_weight.dtype if latent or c.cache is not None else None,
        entry_slots=plan.entry_slots is not None,
        latent=latent,
        apart=c.score is not None,
    )


def _format(c: Compressor) -> RecordFormat | None:
    return c.cache.format if c.cache is not None else None


def _keeps(snapshots: Snapshots | None) -> bool:
    """Whether a page has anything to keep; if not, the kernel is the one without snapshots."""
    return snapshots is not None and snapshots.rows_per_page > 0


def _count(met: Met, plan: PlanData, tokens: int, kinds: tuple[str, ...] = ()) -> tuple[int, float]:
    """The most windows of a call with so many tokens, and their bucket; remembered. kinds: those of its states, if two."""
    known = met.counted
    if known[0] != tokens or known[1] != kinds:
        grid = most_windows(plan, tokens)
        buckets = pair_buckets({*kinds}) if kinds else BUCKETS
        known = met.counted = tokens, kinds, grid, item_bucket(grid, multiprocessors(met.device), buckets)
    return known[2], known[3]


def most_windows(plan: PlanData, tokens: int) -> int:
    """At least one, as a program has to count sequences whose tokens are missing from an empty kv_score."""
    return max(1, min(plan.item_capacity, plan.items_for(tokens)))


def _prepare(kernel: str, asked: tuple, chosen: Chosen, groups: tuple, brought: tuple[str, ...] = _BROUGHT) -> Prepared:
    found, bits = pack(*flat(groups))
    places, strides = argument_places(kernel, brought)
    for i in strides:
        bits |= found[i] or 0
    return Prepared(asked, chosen, list(found), places, bits)


@cache
def argument_places(kernel: str, brought: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of a kernel's run-time arguments a call brings, and which are strides."""
    names = KERNELS[kernel].arg_names  # the constants stand behind, under other names
    return tuple(tuple(i for i, name in enumerate(names) if name.endswith(ends)) for ends in (brought, "stride"))


def _brought(c: Compressor, plan: PlanData, out: Outputs, slices: int, draws: bool) -> tuple[tuple, int]:
    """What a call of one compressor brings: its tokens, the scratch that its programs need, and where rows go; its strides."""
    workspace, arrivals = scratch_of(c.state, slices, draws, plan.entry_capacity, c.spec.head_dim)
    value, score, apart, skew = c.value, c.score, None, None
    strides = stride = value.stride(0)
    if score is not None:
        apart = (score.data_ptr() - value.data_ptr()) // value.element_size()
        skew = score.stride(0) - stride
        strides |= apart | skew
    return (value, stride, value.shape[0], apart, skew, workspace, arrivals, *out), strides


def _plan(plan: PlanData) -> args.Plan:
    return args.Plan(plan.items, plan.num_items, plan.entry_slots, plan.entry_capacity, plan.errors)


def _snap_table(plan: PlanData, *compressors: Compressor) -> args.SnapshotTable:
    """The plan's table of snapshots, if one of these compressors takes any."""
    if not any(_keeps(c.snapshots) for c in compressors):
        return args.SnapshotTable()
    return args.SnapshotTable(plan.snapshot_table, plan.snapshot_table.shape[1], plan.snapshot_page_size)


def _compressor(c: Compressor, out: Outputs) -> args.Compressor:
    """All of it but what a call brings."""
    output = _output(c.cache, c.spec, c.norm_weight, c.rope, out)
    return args.Compressor(args.Tokens(ape=c.ape), _state(c.state), _snapshots(c.snapshots), args.Scratch(), output)


def _state(state: FoldState | MeanState | None) -> args.State:
    if state is None:
        return args.State()
    if isinstance(state, MeanState):
        return args.State(state.rows, None, state.num_slots, state.banks, state.row_stride, state.bank_step)
    return args.State(state.rows, state.positions, state.num_slots, state.ring, *_steps(state.rows, state.positions))


def _snapshots(snapshots: Snapshots | None) -> args.Snapshots:
    if not _keeps(snapshots):
        return args.Snapshots()
    steps = _steps(snapshots.rows, snapshots.positions)
    return args.Snapshots(snapshots.rows, snapshots.positions, snapshots.num_pages, *steps)


def _steps(*pools: torch.Tensor) -> list[int]:
    """Strides from slot to slot or page to page; 0 for a single one, whose stride in torch may be no multiple of 16."""
    return [pool.stride(0) if pool.shape[0] > 1 else 0 for pool in pools]


def _output(
    cache: EntryCache | None,
    spec: CompressorSpec,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    out: Outputs,
) -> args.Output:
    """All of it but `out`, which a call brings; the norm weight is there for the cache, and for latents."""
    if cache is None:
        return args.Output(norm_weight=None if out.latent is None else norm_weight)
    rope = rope if spec.rope_dim > 0 else None
    pages, scales = cache.pages, cache.scale_pages
    return args.Output(
        norm_weight=norm_weight,
        rope=rope,
        max_position=rope.shape[0] if rope is not None else 0,
        pages=pages,
        page_stride=pages.stride(0),
        scales=scales,
        scales_stride=scales.stride(0) if scales is not None else 0,
        rows_per_page=cache.rows_per_page,
        num_slots=pages.shape[0] * cache.rows_per_page,
        scale=cache.scale_tensor.data_ptr() if cache.scale_tensor is not None else None,
    )


def scratch_of(
    state: FoldState | WindowState | None, slices: int, draws: bool, entries: int, head_dim: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Memory by which a call's programs communicate, zero between calls; None for what they do not need.

    With several `slices` to an entry: its pooled row so far, as words of 8 bytes, and the tickets drawn for it
    (kernels/slices.py). Where programs draw items: how many were drawn (kernels/items.py).

    Made by the first call of a size and kept by the state, outgrown ones too, as a CUDA graph may have recorded them. Calls of
    several widths may share it (`again.Scratch`), so it is as large as the largest of each.
    """
    if slices == 1 and not draws:
        return None, None
    sizes = (entries * head_dim, entries) if slices > 1 else (0, 1)
    found = state._workspaces[-1] if state._workspaces else None
    if found is None or found[0].numel() < sizes[0] or found[1].numel() < sizes[1] or found[0].device != state.device:
        words, tickets = sizes if found is None else (max(x.numel(), n) for x, n in zip(found, sizes, strict=True))
        rows = torch.zeros(words, dtype=torch.int64, device=state.device)
        found = rows, torch.zeros(tickets, dtype=torch.int32, device=state.device)
        # What a graph records is zeroed by its replays and by nothing else, so it is for this call in the graph alone.
        recorded = rows.is_cuda and torch.cuda.is_current_stream_capturing()
        (state._recorded if recorded else state._workspaces).append(found)
    return found[0] if slices > 1 else None, found[1]
