"""From checked arguments to one kernel launch."""

from __future__ import annotations

import torch

from ..spec import CompressorSpec
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.formats import RecordFormat
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor
from ..storage.step import PlanData as StepPlan
from ..storage.window_state import WindowState
from .launcher import launcher_of, multiprocessors, pack, supports_pdl
from .table import ANY, item_bucket, pair_buckets
from .variants import Types, draws_items, pair_key, restore_key, slices_of, step_key, store_key, window_key


def compress_triton(c: Compressor, plan: StepPlan, rows: torch.Tensor | None, pdl: bool | None) -> None:
    """`compress` over a `FoldState`, after its arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    device = c.kv_score.device
    grid = _step_grid(plan, c.kv_score)
    met = c.state._layer.plans[id(plan)]
    asked = (item_bucket(grid, multiprocessors(device)), c.kv_score.dtype, None if rows is None else rows.dtype)
    if met.asked != asked:
        met.asked, met.chosen = asked, _choose(c, plan, rows, asked[0])
    launcher, most, slices, draws = met.chosen
    if slices > 1:
        shared = _workspace(c.state, plan.entry_capacity, c.spec.head_dim)
    else:
        shared = (None, _arrivals(c.state) if draws else None)
    own, bits = _plan(plan, False)
    table, more = _table(plan, c)
    step, most_bits = _step_arguments(c, rows, shared)
    launcher(min(grid * slices, most), own + table + step, bits | more | most_bits, use_pdl(pdl, plan, device))


def compress_pair_triton(pair: tuple[Compressor, Compressor], plan: StepPlan, pdl: bool | None) -> None:
    """`compress_many` of two, after their arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    first, second = pair
    device = first.kv_score.device
    grid = max(_step_grid(plan, first.kv_score), _step_grid(plan, second.kv_score))
    bucket = item_bucket(grid, multiprocessors(device), pair_buckets({first.state.kind, second.state.kind}))
    met = first.state._layer.plans[id(plan)]
    asked = (bucket, first.kv_score.dtype, second.kv_score.dtype, second.state._layer)
    if met.asked != asked:
        met.asked, met.chosen = asked, _choose_pair(first, second, plan, bucket)
    launcher, most, few, draws = met.chosen
    if few and grid <= 2 * most:  # so that the second compressor need not wait for the first one's last windows
        most = few
    parts = (
        _plan(plan, False),
        _table(plan, first if _snapshots(first) is not None else second),
        *(_step_arguments(c, None, (_arrivals(c.state) if drawn else None,)) for c, drawn in zip(pair, draws, strict=True)),
    )
    values = parts[0][0] + parts[1][0] + parts[2][0] + parts[3][0]
    bits = parts[0][1] | parts[1][1] | parts[2][1] | parts[3][1]
    launcher(2 * min(grid, most), values, bits, use_pdl(pdl, plan, device))


def compress_window_triton(c: Compressor, plan: StepPlan, rows: torch.Tensor | None, pdl: bool | None) -> None:
    """`compress` over a `WindowState`, after its arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    spec, state, device = c.spec, c.state, c.kv_score.device
    met = state._layer.plans[id(plan)]
    asked = (c.kv_score.dtype, None if rows is None else rows.dtype)
    if met.asked != asked:
        met.asked, met.chosen = asked, _choose_window(c, plan, rows)
    launcher, most, slices = met.chosen
    pooled = plan.entry_capacity * slices if c.cache is not None or rows is not None else 0
    programs = min(_step_grid(plan, c.kv_score) + pooled, most)
    workspace, arrivals = _workspace(state, plan.entry_capacity, spec.head_dim) if slices > 1 else (None, None)
    kv_table, score_table = plan.block_tables
    own, bits = _plan(plan, True)
    kept, score, behind, fixed = _layer(c, state.kv, state.score)
    stride = c.kv_score.stride(0)
    values, more = pack(
        c.kv_score, stride, c.kv_score.shape[0], *kept, kv_table, kv_table.shape[1],
        *score, score_table, score_table.shape[1], plan.page_size, workspace, arrivals, rows,
    )  # fmt: skip
    launcher(programs, own + values + behind, bits | more | fixed | stride, use_pdl(pdl, plan, device))


# What a call of a layer and a plan launches is chosen once (`memory.Met`). To hash a key takes long, so a state keeps the last
# choice for whoever comes with other objects of the same kinds: new plans and caches in every step, or an operator.


def _choose(c: Compressor, plan: StepPlan, rows: torch.Tensor | None, bucket: float) -> tuple:
    """The launcher of a call, most programs, slices of an entry, and whether items are drawn."""
    asked = (plan.max_new_tokens, bucket, _format(c), _snapshots(c) is not None, *_types(c, c.state.rows.dtype, plan, rows))
    if c.state._last[0] != asked:
        key = _step_key(c, plan, rows, bucket)
        draws, most = draws_items(c.spec, key[3]), key[3].programs_on(multiprocessors(c.kv_score.device))
        made = launcher_of(key, c.kv_score.device), most or ANY, slices_of(c.spec, key[3]), draws
        c.state._last = asked, made
    return c.state._last[1]


def _choose_pair(first: Compressor, second: Compressor, plan: StepPlan, bucket: float) -> tuple:
    """The launcher, most programs, those where windows are few, and for each compressor whether its items are drawn."""
    pair = first, second
    asked = (plan.max_new_tokens, bucket, second.spec)
    asked += tuple(x for c in pair for x in (_format(c), _snapshots(c) is not None, *_types(c, c.state.rows.dtype, plan, None)))
    if first.state._last[0] != asked:
        key = pair_key(_step_key(first, plan, None, bucket), _step_key(second, plan, None, bucket))
        configs = key[1][2], key[2][2]
        long = all(config.programs for config in configs)
        draws = tuple(draws_items(c.spec, config) for c, config in zip(pair, configs, strict=True))
        count = multiprocessors(first.kv_score.device)
        most = configs[0].programs_on(count) if long else ANY
        few = configs[0].pair_programs_on(count) if long else 0
        first.state._last = asked, (launcher_of(key, first.kv_score.device), most, few, draws)
    return first.state._last[1]


def _choose_window(c: Compressor, plan: StepPlan, rows: torch.Tensor | None) -> tuple:
    """The launcher, most programs, and slices of an entry."""
    state, fmt = c.state, _format(c)
    asked = (plan.max_new_tokens, c.spec, fmt, *_types(c, state.dtype, plan, rows))
    if state._last[0] != asked:
        key = window_key(c.spec, fmt, plan.max_new_tokens, asked[3:], state.page_size)
        most = key[3].programs_on(multiprocessors(c.kv_score.device))
        state._last = asked, (launcher_of(key, c.kv_score.device), most, slices_of(c.spec, key[3]))
    return state._last[1]


def store_triton(
    pooled: torch.Tensor,
    plan: StepPlan,
    cache: EntryCache,
    spec: CompressorSpec,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    pdl: bool | None,
) -> None:
    """`store` after its arguments were checked: one launch on the current stream."""
    if plan.item_capacity == 0:
        return
    own, bits = _plan(plan, False)
    values, more = pack(pooled, *_epilogue_arguments(cache, spec, norm_weight, rope))
    launcher = launcher_of(store_key(spec, cache.format, (pooled.dtype, norm_weight.dtype)), pooled.device)
    launcher(plan.item_capacity, own + values, bits | more | _cache_strides(cache), use_pdl(pdl, plan, pooled.device))


def restore_triton(
    state: FoldState,
    snapshots: Snapshots,
    slots: torch.Tensor,
    pages: torch.Tensor,
    start_pos: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """`restore` after its arguments were checked: one launch on the current stream, ordinary and not a dependent."""
    count = snapshots.rows_per_page
    kept = (snapshots.rows, snapshots.positions, snapshots.num_pages) if count else (None, None, None)
    values, bits = pack(
        state.rows, state.positions, state.num_slots, state.ring, *kept, snapshots.page_size,
        slots, pages if count else None, start_pos, errors,
    )  # fmt: skip
    launcher_of(restore_key(state.spec, state.rows.dtype, count), state.device)(slots.shape[0] * max(count, 1), values, bits)


def use_pdl(wanted: bool | None, plan: StepPlan, device: torch.device) -> bool:
    """Whether to launch as a dependent: what is read before the wait, the plan, must be older than the launch before.

    The first launch after `plan.update` is an ordinary one, so every later one starts when the plan has long been written.
    """
    fresh = plan.fresh
    if fresh:
        plan.fresh = False
    return wanted is not False and not fresh and supports_pdl(device)


def _format(c: Compressor) -> RecordFormat | None:
    return c.cache.format if c.cache is not None else None


def _step_key(c: Compressor, plan: StepPlan, rows: torch.Tensor | None, bucket: float) -> tuple:
    state = c.state
    types = _types(c, state.rows.dtype, plan, rows)
    return step_key(c.spec, _format(c), state.kind, plan.max_new_tokens, types, _snapshots(c) is not None, bucket)


def _types(c: Compressor, state: torch.dtype, plan: StepPlan, rows: torch.Tensor | None) -> Types:
    return (
        c.kv_score.dtype,
        state,
        rows.dtype if rows is not None else None,
        c.norm_weight.dtype if c.cache is not None else None,
        plan.entry_slots is not None,
    )


def _snapshots(c: Compressor) -> Snapshots | None:
    """Those of a call, unless no page of theirs has anything to keep: then the kernel is the one without."""
    return c.snapshots if c.snapshots is not None and c.snapshots.rows_per_page else None


def _table(plan: StepPlan, c: Compressor) -> tuple[tuple[object, ...], int]:
    """The snapshot table of a plan, packed, where the call leaves snapshots."""
    if _snapshots(c) is None:
        return (None, None, None), 0
    assert plan.snapshot_table is not None
    return pack(plan.snapshot_table, plan.snapshot_table.shape[1], plan.snapshot_page_size)


def _step_grid(plan: StepPlan, kv_score: torch.Tensor) -> int:
    # At least one program, to count sequences whose tokens an empty kv_score does not have.
    return max(1, min(plan.item_capacity, plan.items_for(kv_score.shape[0])))


def _plan(plan: StepPlan, more: bool) -> tuple[tuple[object, ...], int]:
    """What a launch takes of a plan, packed, and its bits; with `more`, what the kernel over raw rows takes behind that too.

    Packed once for as long as its tensors are the same (`memory.check_made`): an engine has one plan for all layers and steps.
    """
    made = plan._packed.get(more)
    if made is not None:
        return made
    values: tuple[object, ...] = plan.items, plan.num_items, plan.entry_slots, plan.entry_capacity, plan.errors
    if more:
        values += plan.entry_items, plan.cu_entries, plan.batch
    made = plan._packed[more] = pack(*values)
    return made


def _step_arguments(c: Compressor, rows: torch.Tensor | None, shared: tuple = ()) -> tuple[tuple[object, ...], int]:
    """Of one compressor over a `FoldState`, packed, and the bits of its addresses and strides.

    shared: workspace and arrivals; the kernel of a pair has no workspace.
    """
    kv_score, state = c.kv_score, c.state
    assert isinstance(state, FoldState)
    kept, snapshots, behind, fixed = _layer(c, state.rows, state.positions)
    stride = kv_score.stride(0)
    own, bits = pack(kv_score, stride, kv_score.shape[0])
    more, more_bits = pack(*shared, rows)
    return own + kept + snapshots + more + behind, bits | more_bits | fixed | stride


def _layer(c: Compressor, one: torch.Tensor, other: torch.Tensor) -> tuple[tuple, tuple, tuple, int]:
    """What a layer passes in every step, packed once for as long as it is the same (`compress._check_fixed` looks).

    ape with the state's tensors `one`, then either snapshots or the score pool, then all that the epilogue takes; and the bits
    of their addresses and strides.
    """
    state, layer = c.state, c.state._layer
    if layer.packed is not None:
        return layer.packed
    strides = _cache_strides(c.cache) if c.cache is not None else 0
    if isinstance(state, FoldState):
        snapshots = _snapshots(c)
        kept, bits = pack(c.ape, one, other, one.shape[0], state.ring)
        between, more = (
            pack(None, None, None) if snapshots is None else pack(snapshots.rows, snapshots.positions, snapshots.num_pages)
        )
    else:
        kept, bits = pack(c.ape, one, one.stride(0), one.stride(1), one.shape[0])
        between, more = pack(other, other.stride(0), other.stride(1), other.shape[0])
        strides |= one.stride(0) | one.stride(1) | other.stride(0) | other.stride(1)
    behind, most = pack(*_epilogue_arguments(c.cache, c.spec, c.norm_weight, c.rope))
    layer.packed = kept, between, behind, bits | more | most | strides
    return layer.packed


def _epilogue_arguments(
    cache: EntryCache | None, spec: CompressorSpec, norm_weight: torch.Tensor | None, rope: torch.Tensor | None
) -> tuple[object, ...]:
    """From `norm_weight` to `cache_scale`, as every kernel takes them."""
    if cache is None:
        return (None, None, 0, None, 0, None, 0, 1, 0, 1.0)
    pages, scales = cache.pages, cache.scale_pages
    rotated = spec.rope_dim > 0 and rope is not None
    return (
        norm_weight,
        rope if rotated else None,
        rope.shape[0] if rotated else 0,
        pages,
        pages.stride(0),
        scales,
        scales.stride(0) if scales is not None else 0,
        cache.rows_per_page,
        pages.shape[0] * cache.rows_per_page,
        cache.scale,
    )


def _cache_strides(cache: EntryCache) -> int:
    scales = cache.scale_pages
    return cache.pages.stride(0) | (scales.stride(0) if scales is not None else 0)


def _arrivals(state: FoldState | WindowState) -> torch.Tensor:
    """The count of the items that were drawn (backend_triton/kernels/items.py): zero between calls."""
    return _workspace(state, 1, 0)[1]


def _workspace(state: FoldState | WindowState, entries: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled rows in the making, as words of 8 bytes, and tickets drawn for each (kernels/slices.py): zero between calls.

    Made by the first call of a size and kept by the state, outgrown ones too, as a CUDA graph may have recorded them.
    """
    last = state._workspaces[-1][1] if state._workspaces else None
    if last is None or last.shape[0] < entries or last.device != state.device:
        rows = torch.zeros(entries, head_dim, dtype=torch.int64, device=state.device)
        made = rows, torch.zeros(entries, dtype=torch.int32, device=state.device)
        if rows.is_cuda and torch.cuda.is_current_stream_capturing():
            state._recorded.append(made)  # zeroed by replays of the graph and by nothing else, so for this call in it alone
            return made
        state._workspaces.append(made)
    return state._workspaces[-1]
