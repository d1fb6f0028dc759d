"""What a call may be given together: every failure names the argument and comes before anything is written.

What a layer passes in every step is checked when it is first seen, and each plan that it meets; what changes from step to step
is checked every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments.checks import (
    check_device,
    check_dtype,
    check_eager,
    check_numbers,
    check_real_memory,
    check_shape,
    check_tensor,
    check_type,
)
from ..arguments.overlap import NO_ROOM, Place, check_apart, extent, find_room
from ..contract import INT32_MAX, UnsupportedError
from ..spec import check_spec
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.mean_state import MeanState
from ..storage.remembered import Checked, Layer, Met, check_made, where
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor, Hits, Lengths, Outputs, Placed, PlanData, owner_of, plan_places
from ..storage.window_state import WindowState

BACKENDS = ("triton", "torch")
_UNKNOWN = object()  # for one that was not checked, or is none of ours: no layer is known by it
_FLOATS = (torch.bfloat16, torch.float32)
_INDICES = (torch.int32, torch.int64)
_Span = tuple[str, torch.Tensor, int, int]  # a tensor by its name, its first byte, and the one behind its last


def choose_backend(backend: str | None, name: str, tensor: torch.Tensor) -> str:
    """The backend to use for inputs like argument `name`; raises ValueError if it cannot take them."""
    if backend is not None and not (isinstance(backend, str) and backend in BACKENDS):
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name} must be on a CPU or a GPU, got the meta device")
    if backend is None:
        backend = "triton" if tensor.is_cuda else "torch"
    if backend == "torch":
        check_eager(name)
    elif not tensor.is_cuda:
        from ..backend_triton.build import INTERPRETED

        if tensor.device.type != "cpu" or not INTERPRETED:
            raise ValueError(
                f"backend='triton' takes CUDA or HIP tensors, and CPU tensors under Triton's interpreter (set "
                f"TRITON_INTERPRET=1 before importing kvfold), got {name} on {tensor.device}; or use backend='torch'"
            )
    return backend


def compressors_of(compressors: Sequence[Compressor | tuple]) -> list[Compressor]:
    """What `compress_many` is given, by name."""
    if not isinstance(compressors, Sequence):
        raise TypeError(f"compressors must be a sequence, got {type(compressors).__name__}")
    if not 1 <= len(compressors) <= 2:
        raise ValueError(f"compressors must hold one or two, got {len(compressors)}")
    return [compressor_of(f"compressors[{i}]", one) for i, one in enumerate(compressors)]


def compressor_of(name: str, given: Compressor | tuple) -> Compressor:
    """One of `compressors`, by name; its contents are checked later."""
    if not isinstance(given, tuple) or len(given) not in (len(Compressor._fields) - 1, len(Compressor._fields)):
        raise TypeError(f"{name} must be a tuple {Compressor._fields}, the last of which may be missing")
    return Compressor(*given)


def check_compress(c: Compressor, plan: PlanData, out: Outputs, backend: str | None) -> str:
    """Checks the arguments of `compress` and returns the backend to use."""
    chosen, met, parts = _check_one(c, plan, backend)
    if out.rows is not None or out.latent is not None:
        _check_outputs(c, plan, out, met, parts)
    return chosen


def _check_one(c: Compressor, plan: PlanData, backend: str | None) -> tuple[str, Met, list[_Span]]:
    """Checks all but `Outputs`; returns the backend, what is known of layer and plan, and where the tokens are."""
    parts, spec, chosen, spans = c.parts(), c.spec, "", []
    for name, x in parts:
        chosen = choose_backend(backend, name, x)
        check_spec("spec", spec)
        width = spec.head_dim << (spec.overlap + (spec.gate and len(parts) == 1))
        spans.append((name, x, *check_tokens(name, x, width)))
    if len(spans) == 2:
        _check_two(c)
    met = _known(c, plan) or _check_fixed(c, plan)
    for name, x, start, end in spans:
        if x.device != met.device:
            check_device(name, x, met.device)
        if met.rows_in_bf16 and x.dtype is not torch.bfloat16:
            why = "as state keeps input rows in bf16 without round_inputs"
            raise TypeError(f"{name} must be torch.bfloat16, {why}, got torch.float32")
        room = met.rooms.get(name, NO_ROOM)
        if start < room[0] or end > room[1]:
            check_room(name, x, False, start, end, c, plan, met)
    return chosen, met, spans


def _check_outputs(c: Compressor, plan: PlanData, out: Outputs, met: Met, parts: list[_Span]) -> None:
    """Checks what `compress` writes besides records. parts: where the tokens are."""
    if out.latent is not None and c.norm_weight is None:
        raise TypeError("norm_weight must be a torch.Tensor for latent, got NoneType")
    written: list[_Span] = []
    for name, x, dtypes in (("rows", out.rows, _FLOATS), ("latent", out.latent, (torch.bfloat16,))):
        if x is None:
            continue
        check_tensor(name, x, plan.rows_shape(c.spec), dtypes, met.device)
        start = x.data_ptr()
        end = start + x.nbytes
        check_room(name, x, True, start, end, c, plan, met)
        for spans, too in ((parts, False), (written, True)):
            for other, y, first, behind in spans:
                if start < behind and first < end:
                    check_apart((Place(other, y, too), Place(name, x, True)))
        written.append((name, x, start, end))


def check_tokens(name: str, x: torch.Tensor, width: int) -> tuple[int, int]:
    """Checks a tensor of a step's tokens; returns the address of its first byte, and the one behind its last."""
    check_real_memory(name, x)
    dtype, shape = x.dtype, x.shape
    if dtype not in _FLOATS:
        check_dtype(name, x, _FLOATS)
    if len(shape) != 2 or shape[1] != width:
        check_shape(name, x, (None, width))
    count = shape[0]
    if count > INT32_MAX:
        raise ValueError(f"{name} must have at most {INT32_MAX} rows, got {count}")
    stride, side_by_side = x.stride()
    if count and side_by_side != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {(stride, side_by_side)}")
    start = x.data_ptr()
    return start, start + ((count - 1) * stride + width) * (2 if dtype is torch.bfloat16 else 4)


def _check_two(c: Compressor) -> None:
    """Checks that values and scores go together."""
    value, score = c.value, c.score
    if not c.spec.gate:
        raise ValueError("kv_score must be values alone, as spec has no gate, got two tensors")
    check_device("kv_score[1]", score, value.device)
    check_dtype("kv_score[1]", score, (value.dtype,))
    check_shape("kv_score[1]", score, tuple(value.shape))
    if (score.data_ptr() - value.data_ptr()) % value.element_size():
        raise ValueError("kv_score[1] must begin at a multiple of its element size, like kv_score[0]")


def check_many(compressors: Sequence[Compressor], plan: PlanData, backend: str | None) -> str:
    """Checks the arguments of `compress_many` and returns the backend to use."""
    found: list[tuple[str, Met, list[_Span]]] = []
    for i, c in enumerate(compressors):
        try:
            check_spec("spec", c.spec)
            if not c.spec.gate:
                raise UnsupportedError("spec must have a gate in compress_many: call compress for one without")
            check_type("state", c.state, FoldState)
            found.append(_check_one(c, plan, backend))
            if i == 1:
                check_device("kv_score", c.value, found[0][1].device)
                _check_pair(compressors[0], c, plan, found)
        except (TypeError, ValueError) as error:
            raise type(error)(f"compressors[{i}]: {error}") from None
    return found[0][0]


def _check_pair(first: Compressor, second: Compressor, plan: PlanData, found: list[tuple[str, Met, list[_Span]]]) -> None:
    """Checks that two compressors of one launch share nothing that it writes; again only when their tensors are others.

    found: of both, what `_check_one` did.
    """
    for name, one, other in (
        ("state", first.state, second.state),
        ("cache", first.cache, second.cache),
        ("snapshots", first.snapshots, second.snapshots),
    ):
        if one is other and one is not None:
            raise ValueError(f"{name} must not be shared by two compressors")
    known, layers = first.state._pair, (first.state._layer, second.state._layer)
    if known[0] is not layers[0] or known[1] is not layers[1]:
        theirs = [place._replace(name=f"{place.name} of compressors[0]") for place in _places(first)]
        both = [*theirs, *_places(second)]
        # Slots of both are the plan's, so that pages of two states, or of two caches, are the same pages.
        for what in ("state", "cache"):
            alike = [place._replace(paged=False) for place in both if place.name.startswith(what)]
            if alike:
                check_apart(alike)
        check_apart(both)
        first.state._pair = layers
    (_, one_met, one_parts), (_, other_met, other_parts) = found
    for parts, other, met in ((one_parts, second, other_met), (other_parts, first, one_met)):
        for name, x, start, end in parts:
            room = met.rooms.get(f"the other {name}", NO_ROOM)
            if start < room[0] or end > room[1]:
                check_room(f"the other {name}", x, False, start, end, other, plan, met)


def _known(c: Compressor, plan: PlanData) -> Met | None:
    """What is known of a layer and a plan that were checked in an earlier call; None if something has changed since."""
    owner = owner_of(c, plan)
    layer = getattr(owner, "_layer", None) if isinstance(owner, Checked) and isinstance(plan, PlanData) else None
    met = None if layer is None else layer.met(plan)
    if met is None or layer.tokens != _tokens(c):  # of anything but a state, cache and plan of ours it differs
        return None
    held = [*plan._watched]
    for thing in (c.state, c.cache, c.snapshots):
        if thing is not None:
            held += thing._watched
    given = layer.given((c.ape, c.norm_weight, c.rope))
    if given is None:
        return None
    return met if met.where == where(held + given) else None  # where a weight died that is now None, their numbers differ


def _tokens(c: Compressor) -> tuple:
    """What the objects of a layer are known by."""
    cache, snapshots = c.cache, c.snapshots
    return (
        c.spec,
        c.state is not None and c.state._token,
        None if cache is None else (isinstance(cache, EntryCache) and cache._token) or _UNKNOWN,
        None if snapshots is None else (isinstance(snapshots, Snapshots) and snapshots._token) or _UNKNOWN,
    )


def _check_fixed(c: Compressor, plan: PlanData) -> Met:
    """Checks what a layer passes in every step, and the plan."""
    state = c.state
    if c.spec.gate:
        if not isinstance(state, (FoldState, MeanState, WindowState)):
            raise TypeError(f"state must be a FoldState, a MeanState or a WindowState, got {type(state).__name__}")
        check_made("state", state, type(state))
    else:
        for name, thing in (("state", state), ("snapshots", c.snapshots), ("ape", c.ape)):
            if thing is not None:
                why = "spec has no gate: a window is a single token, of which nothing is kept"
                raise ValueError(f"{name} must be None, as {why}, got {type(thing).__name__}")
    check_made("plan", plan, PlanData)
    for name, thing, kind in (("cache", c.cache, EntryCache), ("snapshots", c.snapshots, Snapshots)):
        if thing is not None:
            check_made(name, thing, kind)
    met = _meet(c, plan)
    held = [x for thing in (plan, state, c.cache, c.snapshots) if thing is not None for x in thing._watched]
    met.device, met.rows_in_bf16 = plan.items.device, state is not None and _takes_bf16_alone(state)
    met.where = where([*held, *(x for x in (c.ape, c.norm_weight, c.rope) if x is not None)])
    return met


def _takes_bf16_alone(state: FoldState | MeanState | WindowState) -> bool:
    return isinstance(state, FoldState) and state.rows.dtype is torch.bfloat16 and not state.round_inputs


def _meet(c: Compressor, plan: PlanData) -> Met:
    """What is known of a layer and a plan, which are checked where they are not known as they are now."""
    owner = owner_of(c, plan)
    tokens, weights, layer = _tokens(c), (c.ape, c.norm_weight, c.rope), owner._layer
    if layer is None or not layer.same(tokens, weights):
        if c.state is not None:
            _check_state(c)
        _check_epilogue(c)
        layer = owner._layer = Layer(tokens, weights, _places(c))
    met = layer.met(plan)
    if met is None:
        _check_plan(c, plan)
        met = layer.meet(plan, lambda: [*_places(c), *plan_places(plan)])
    return met


def _check_state(c: Compressor) -> None:
    """Checks what a layer keeps of the tokens, and in what it keeps it."""
    spec, state, device = c.spec, c.state, c.device
    check_device("state", state._tensors[0], device)
    if isinstance(state, WindowState):
        if state.channels != spec.channels:
            raise ValueError(f"state must have {spec.channels} channels for {spec}, got {state.channels}")
    elif state.spec != spec:
        raise ValueError(f"state must be for {spec}, got {state.spec}")
    if spec.has_ape:
        check_tensor("ape", c.ape, (spec.ratio, spec.channels), (torch.float32,), device)
    elif c.ape is not None:
        raise ValueError("ape must be None, as spec.has_ape is False")
    if c.snapshots is not None:
        if isinstance(state, MeanState):
            raise ValueError("snapshots must be None for a MeanState, whose one row goes on from the end of a sequence alone")
        check_type("state", state, FoldState)  # the pages of a WindowState are shared as they are
        _check_snapshots(c.snapshots, state)


def _check_plan(c: Compressor, plan: PlanData) -> None:
    """Checks that a plan is for this layer."""
    if plan.ratio != c.spec.ratio:
        raise ValueError(f"plan must be for ratio {c.spec.ratio}, got ratio {plan.ratio}")
    check_device("plan", plan.items, c.device)
    if c.cache is not None:
        if plan.entry_slots is None:
            raise ValueError("plan must have entry_slots, token_slots or a cache_block_table when a cache is given, got none")
        # Without a table the caller made the slots, for pages that only the cache knows.
        have, want = plan.rows_per_page, c.cache.rows_per_page
        if have is not None and have != want:
            raise ValueError(f"plan must be for pages of {want} entries like cache, got rows_per_page={have}")
    if isinstance(c.state, (FoldState, MeanState)) and plan.state_slots is None:
        raise ValueError(f"plan must have state_slots for a {type(c.state).__name__}, got {plan.knows}")
    if isinstance(c.state, MeanState) and 0 < c.state.banks < plan.max_new_tokens:
        most = f"at most {c.state.banks} new tokens, the banks of state"
        raise ValueError(f"plan must be for {most}, got max_new_tokens={plan.max_new_tokens}")
    if isinstance(c.state, WindowState):
        have, want = plan.page_size, c.state.page_size
        if plan.block_tables is None:
            raise ValueError(f"plan must have block_tables for a WindowState, got {plan.knows}")
        if have != want:
            raise ValueError(f"plan must be for pages of {want} positions like state, got page_size={have}")
        if plan.ring and plan.ring_rows < c.spec.window_rows - 1:
            raise ValueError(
                f"plan must have rings of at least {c.spec.window_rows - 1} rows, as many old ones as a step may need of "
                f"{c.spec}, got {plan.ring_rows}"
            )
    if c.snapshots is not None and plan.snapshot_page_size != c.snapshots.page_size:
        have, want = plan.snapshot_page_size, c.snapshots.page_size
        raise ValueError(f"plan must have a snapshot_table with snapshot_page_size={want} for snapshots, got {have}")


def _check_snapshots(snapshots: Snapshots, state: FoldState) -> None:
    """Checks that snapshots are of this state."""
    check_made("snapshots", snapshots, Snapshots)
    if snapshots.spec != state.spec:
        raise ValueError(f"snapshots must be for {state.spec}, got {snapshots.spec}")
    check_dtype("snapshots", snapshots.rows, (state.rows.dtype,))
    check_device("snapshots", snapshots.rows, state.device)


def _check_epilogue(c: Compressor, needs_norm: bool = True) -> None:
    """Checks what everything behind the pooling takes."""
    cache, spec, device = c.cache, c.spec, c.device
    if c.norm_weight is not None or (cache is not None and needs_norm):
        check_tensor("norm_weight", c.norm_weight, (spec.head_dim,), _FLOATS, device)
    if c.rope is not None or (cache is not None and spec.rope_dim):
        check_tensor("rope", c.rope, (None, spec.rope_dim), (torch.float32,), device)
    if cache is not None:
        if cache.spec is not spec and cache.spec != spec:
            raise ValueError(f"cache must be for {spec}, got {cache.spec}")
        check_device("cache", cache.storage, device)


def _places(c: Compressor) -> list[Place]:
    """What a layer passes in every step."""
    paged = isinstance(c.state, WindowState) or (isinstance(c.state, FoldState) and c.state.pages is not None)
    held = (("state", c.state, paged), ("cache", c.cache, True), ("snapshots", c.snapshots, False))
    written = [Place(name, x, True, paged) for name, thing, paged in held if thing is not None for x in thing._tensors]
    scale = getattr(c.cache, "scale_tensor", None)
    weights = (("ape", c.ape), ("norm_weight", c.norm_weight), ("rope", c.rope), ("scale", scale))
    return written + [Place(name, weight) for name, weight in weights if weight is not None]


def check_room(
    name: str, x: torch.Tensor, written: bool, start: int, end: int, c: Compressor, plan: PlanData, met: Met
) -> None:
    """Checks that a tensor, from `start` to `end`, shares nothing with layer and plan.

    It moves from step to step, but mostly within the same room between theirs, which is remembered by its name.
    """
    room = met.rooms.get(name, NO_ROOM)
    if start < room[0] or end > room[1]:
        room = find_room(met.bounds, start, end)
        if room == NO_ROOM:
            check_apart([*_places(c), *plan_places(plan), Place(name, x, written)])
        met.rooms[name] = room


def check_store(c: Compressor, plan: PlanData, backend: str | None) -> str:
    """Checks the arguments of `store`, whose pooled rows are `c.kv_score`, and returns the backend to use."""
    rows, cache = c.kv_score, c.cache
    check_type("rows", rows, torch.Tensor)
    chosen = choose_backend(backend, "rows", rows)
    check_spec("spec", c.spec)
    check_made("plan", plan, PlanData)
    check_made("cache", cache, EntryCache)
    met = _meet(c, plan)
    check_tensor("rows", rows, plan.rows_shape(c.spec), _FLOATS, cache.device)
    start = rows.data_ptr()
    check_room("rows", rows, False, start, start + rows.nbytes, c, plan, met)
    return chosen


def check_placed(p: Placed, backend: str | None) -> str:
    """Checks the arguments of `store` without a plan and returns the backend to use."""
    rows, spec, caches = p.rows, p.spec, p.caches
    check_type("rows", rows, torch.Tensor)
    chosen = choose_backend(backend, "rows", rows)
    check_spec("spec", spec)
    check_real_memory("rows", rows)
    check_dtype("rows", rows, _FLOATS)
    check_shape("rows", rows, (None, spec.head_dim))
    names = ("cache", "also[0]")[: len(caches)]
    for name, cache in zip(names, caches, strict=True):
        check_made(name, cache, EntryCache)
    tokens, weights, layer = (spec, *(cache._token for cache in caches)), (None, p.norm_weight, p.rope), caches[0]._layer
    if layer is None or not layer.same(tokens, weights):
        both = [Compressor(rows, None, cache, spec, *weights) for cache in caches]
        for name, c in zip(names, both, strict=True):
            try:
                _check_epilogue(c, needs_norm=False)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}" if name != "cache" else str(error)) from None
        layer = caches[0]._layer = Layer(tokens, weights, _placed_places(p))
    device, count = caches[0].device, rows.shape[:1]
    check_device("rows", rows, device)
    if count[0] > INT32_MAX:
        raise ValueError(f"rows must be at most {INT32_MAX}, got {count[0]}")
    if count[0] and rows.stride(1) != 1:
        raise ValueError(f"rows must be contiguous in its last dimension, got strides {rows.stride()}")
    for name, x in (("slots", p.slots), ("positions", p.positions)):
        if x is not None or name == "slots" or spec.rope_dim:
            check_tensor(name, x, (None,), _INDICES, device)
            if x.shape != count:
                raise ValueError(f"{name} must have shape {list(count)}, one for each of rows, got {list(x.shape)}")
    if p.errors is not None:
        check_tensor("errors", p.errors, (1,), (torch.int32,), device)
    _check_rows_apart(p, layer)
    return chosen


def _placed_places(p: Placed) -> list[Place]:
    """What a layer passes in every step. Both caches have the same slots, so that no byte may be of both."""
    held = [Place(name, x, written=True) for name, cache in zip(("cache", "also[0]"), p.caches) for x in cache._tensors]  # noqa: B905
    scales = [("scale", cache.scale_tensor) for cache in p.caches]
    read = [("norm_weight", p.norm_weight), ("rope", p.rope), *scales]
    return held + [Place(name, x) for name, x in read if x is not None]


def _check_rows_apart(p: Placed, layer: Layer) -> None:
    """Checks that what changes from call to call shares nothing with what is written."""
    read = [Place(name, x) for name in ("rows", "slots", "positions") if (x := getattr(p, name)) is not None]
    spans = [extent(place.tensor) for place in read]
    if p.errors is not None:
        first, behind = extent(p.errors)
        meets = any(first < end and start < behind for start, end in spans)
        spans.append((first, behind))
        read.append(Place("errors", p.errors, written=True))
    else:
        meets = False
    if meets or any(find_room(layer.bounds, *span) == NO_ROOM for span in spans if span[0] < span[1]):
        check_apart([*_placed_places(p), *read])


def check_restore(state: FoldState, snapshots: Snapshots, hits: Hits, backend: str | None) -> str:
    """Checks the arguments of `restore` and returns the backend to use."""
    check_made("state", state, FoldState)
    chosen = choose_backend(backend, "state", state.rows)
    _check_snapshots(snapshots, state)
    check_tensor("slots", hits.slots, (None,), (torch.int32,), state.device)
    count = hits.slots.shape[0]
    for name, size in (("pages", count), ("start_pos", count), ("errors", 1)):
        check_tensor(name, getattr(hits, name), (size,), (torch.int32,), state.device)
    places = [Place("state", x, written=True) for x in state._tensors]
    places += [Place("errors", hits.errors, written=True), *(Place("snapshots", x) for x in snapshots._tensors)]
    places += [Place(name, getattr(hits, name)) for name in ("slots", "pages", "start_pos")]
    check_apart(places)
    return chosen


def check_update(plan: PlanData, lengths: Lengths) -> None:
    """Checks the arguments of `StepPlan.update`, and the plan where its tensors are elsewhere than at the last one."""
    check_made("plan", plan, PlanData)
    if plan._where != where(plan._tensors):
        plan._validate()
    device, (given, cu_seqlens, totals) = plan.start_pos.device, lengths
    check_numbers(lengths.name, given, (plan.batch,), device)
    check_numbers("cu_seqlens", cu_seqlens, (plan.batch + 1,), device)
    came = totals, given.data_ptr(), cu_seqlens.data_ptr()
    if came == plan._came:
        return
    # What `update` reads must not be what it writes, but for the plan's own copies under their names.
    for name, x in ((lengths.name, given), ("cu_seqlens", cu_seqlens)):
        own = getattr(plan, name, None)
        if (own is None or x.data_ptr() != own.data_ptr()) and find_room(plan._bounds, *extent(x)) == NO_ROOM:
            check_apart([*plan_places(plan, updating=True), Place(name, x)])
    plan._came = came
