"""`compress` and `compress_many`: check the arguments, choose the backend, launch once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .arguments.checks import (
    check_device,
    check_dtype,
    check_eager,
    check_real_memory,
    check_shape,
    check_switch,
    check_tensor,
    check_type,
    traced,
)
from .arguments.overlap import NO_ROOM, Place, check_apart, extent, find_room
from .backend_torch.fold import compress_torch
from .backend_torch.window import compress_window_torch
from .plan import StepPlan, plan_places
from .spec import CompressorSpec, check_spec
from .storage.fold_state import FoldState
from .storage.formats import EntryCache
from .storage.remembered import Layer, Met, check_made, where
from .storage.snapshots import Snapshots
from .storage.window_state import WindowState

BACKENDS = ("triton", "torch")
_UNKNOWN = object()  # for one that was not checked, or is none of ours: no layer is known by it
_FLOATS = (torch.bfloat16, torch.float32)
MOST_TOKENS = (1 << 31) - 1


class Compressor(NamedTuple):
    """One compressor's part of a step, as `compress_many` takes it; the arguments are those of `compress`."""

    kv_score: torch.Tensor
    state: FoldState | WindowState
    cache: EntryCache | None
    spec: CompressorSpec
    ape: torch.Tensor | None
    norm_weight: torch.Tensor | None
    rope: torch.Tensor | None
    snapshots: Snapshots | None = None


def compress(
    kv_score: torch.Tensor,
    plan: StepPlan,
    state: FoldState | WindowState,
    cache: EntryCache | None,
    *,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    rows: torch.Tensor | None = None,
    snapshots: Snapshots | None = None,
    backend: str | None = None,
    pdl: bool | None = None,
) -> None:
    """Folds a step's new tokens into the state and writes the entries of the windows that end in it.

    Prefill, chunks, decode with any number of new tokens, mixtures of these and padding are all this one call, and give
    the same bits. Everything after the projection happens here: pooling, RMSNorm, RoPE, Hadamard, quantization and store.
    There is no gradient: tensors that require one are taken as they are. What is mutated shares no byte with another argument.

    Args:
        kv_score: bf16 or fp32 `[T, 2 * channels]`, rows `[K | S]` (overlap: `[K.lo K.hi S.lo S.hi]`), sequence-major as
            `plan.cu_seqlens` says. The last dimension is contiguous, the row stride free. Rows behind the last sequence
            are not read.
        plan: of this step, for `spec.ratio`, with state slots for a `FoldState` and block tables for a `WindowState`.
        state: mutated. `FoldState`: the rows of the step's last `state.ring` positions. `WindowState`: the rows of all its
            positions. One call at a time may use a state object; to use pools on two streams at once, wrap them twice.
        cache: mutated: one record per entry, at `plan.entry_slots`. None leaves out all that follows the pooling.
        spec: the compressor; the one that `state` and `cache` were made for.
        ape: fp32 `[ratio, channels]`; None if and only if `spec.has_ape` is false.
        norm_weight: fp32 or bf16 `[head_dim]`; may be None without a cache.
        rope: fp32 `[max_pos, rope_dim]`, cosines then sines; an entry is rotated by the position of its window's first
            token. May be None without a cache or with `rope_dim` 0.
        rows: mutated if given: bf16 or fp32 `[E, head_dim]`, row e receives the pooled row of entry e before the norm. Rows of
            entries that do not exist or are dropped stay as they are.
        snapshots: mutated if given, for a `FoldState` and a plan with a `snapshot_table`: new rows of this step that belong to
            the snapshot of a page are written there too. A page whose end several steps reach gets its rows from all of them.
        backend: `"triton"` (CUDA or HIP tensors; CPU tensors under Triton's interpreter) or `"torch"` (any device).
            Default: triton for CUDA and HIP tensors, torch for others.
        pdl: whether the kernel may be launched while the one before it on the stream still runs (programmatic dependent
            launch, sm_90 and newer); it waits before it reads anything that one can have written but ape, norm_weight,
            rope and what the plan was built from. Same bits. Default: where it is known to help.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then. What depends on data (a slot beyond
            its pool, a state row that is not held) is skipped and counted in `plan.errors`.
    """
    check_type("kv_score", kv_score, torch.Tensor)
    c = Compressor(kv_score, state, cache, spec, ape, norm_weight, rope, snapshots)
    if traced(kv_score):
        from . import ops

        ops.compress(c, plan, rows, backend, pdl)
    else:
        run_compress(c, plan, rows, backend, pdl)


def run_compress(c: Compressor, plan: StepPlan, rows: torch.Tensor | None, backend: str | None, pdl: bool | None) -> None:
    """`compress` of real tensors: straight to the launch."""
    check_switch("pdl", pdl)
    chosen = check_compress(c, plan, rows, backend)
    if plan.batch == 0:
        return
    if chosen == "torch":
        _compress_torch(c, plan, rows)
    else:
        from .backend_triton import launch

        run = launch.compress_triton if isinstance(c.state, FoldState) else launch.compress_window_triton
        run(c, plan, rows, pdl)


def check_compress(c: Compressor, plan: StepPlan, rows: torch.Tensor | None, backend: str | None) -> str:
    """Checks the arguments of `compress` and returns the backend to use."""
    check_type("kv_score", c.kv_score, torch.Tensor)
    chosen = choose_backend(backend, "kv_score", c.kv_score)
    _check(c, plan, rows)
    return chosen


def compress_many(
    compressors: Sequence[Compressor | tuple], plan: StepPlan, *, backend: str | None = None, pdl: bool | None = None
) -> None:
    """`compress` for up to two compressors of a layer in one launch: a ratio-4 layer's main one and its indexer.

    The bits are those of one `compress` for each.

    Args:
        compressors: `(kv_score, state, cache, spec, ape, norm_weight, rope)` for each, and `snapshots` behind them where there
            are any; states all `FoldState`. They share the plan, and so the ratio, the state slots, the entry slots and the
            snapshot table; no two share a state, a cache or snapshots.
        plan, backend, pdl: as for `compress`.

    Raises:
        TypeError, ValueError: naming the argument, `compressors[i]` before it; nothing has been written then.
    """
    made = compressors_of(compressors)
    if not traced(made[0].kv_score):
        run_many(made, plan, backend, pdl)
        return
    from . import ops

    if len(made) == 1:
        ops.compress(made[0], plan, None, backend, pdl)
    else:
        ops.compress_many(made, plan, backend, pdl)


def compressors_of(compressors: Sequence[Compressor | tuple]) -> list[Compressor]:
    """What `compress_many` is given, by name."""
    if not isinstance(compressors, Sequence):
        raise TypeError(f"compressors must be a sequence, got {type(compressors).__name__}")
    if not 1 <= len(compressors) <= 2:
        raise ValueError(f"compressors must hold one or two, got {len(compressors)}")
    made = []
    for i, one in enumerate(compressors):
        if not isinstance(one, tuple) or len(one) not in (len(Compressor._fields) - 1, len(Compressor._fields)):
            raise TypeError(f"compressors[{i}] must be a tuple {Compressor._fields}, the last of which may be missing")
        made.append(Compressor(*one))
    return made


def run_many(compressors: Sequence[Compressor], plan: StepPlan, backend: str | None, pdl: bool | None) -> None:
    """`compress_many` of real tensors: straight to the launch."""
    check_switch("pdl", pdl)
    chosen = check_many(compressors, plan, backend)
    if plan.batch == 0:
        return
    if chosen == "torch":
        for c in compressors:
            _compress_torch(c, plan, None)
    else:
        from .backend_triton import launch

        if len(compressors) == 1:
            launch.compress_triton(compressors[0], plan, None, pdl)
        else:
            launch.compress_pair_triton((compressors[0], compressors[1]), plan, pdl)


def check_many(compressors: Sequence[Compressor], plan: StepPlan, backend: str | None) -> str:
    """Checks the arguments of `compress_many` and returns the backend to use."""
    found: list[Compressor] = []
    chosen = ""
    for i, c in enumerate(compressors):
        try:
            check_type("state", c.state, FoldState)
            chosen = check_compress(c, plan, None, backend)
            if found:
                check_device("kv_score", c.kv_score, found[0].kv_score.device)
                _check_pair(found[0], c, plan)
        except (TypeError, ValueError) as error:
            raise type(error)(f"compressors[{i}]: {error}") from None
        found.append(c)
    return chosen


def _check_pair(first: Compressor, second: Compressor, plan: StepPlan) -> None:
    """Checks that two compressors of one launch share nothing that it writes; again only when their tensors are others."""
    for name in ("state", "cache", "snapshots"):
        mine = getattr(second, name)
        if mine is not None and mine is getattr(first, name):
            raise ValueError(f"{name} must not be shared by two compressors")
    layers = first.state._layer, second.state._layer
    known = first.state._pair
    if known[0] is not layers[0] or known[1] is not layers[1]:
        theirs = [place._replace(name=f"{place.name} of compressors[0]", paged=False) for place in _places(first)]
        check_apart([*theirs, *(place._replace(paged=False) for place in _places(second))])
        first.state._pair = layers
    for c, other, layer in ((first, second, layers[1]), (second, first, layers[0])):
        met = layer.met(plan)
        start, end = extent(c.kv_score)
        if start < met.other[0] or end > met.other[1]:
            met.other = _find_room("the other kv_score", c.kv_score, start, end, other, plan, met)


@torch.inference_mode()
def _compress_torch(c: Compressor, plan: StepPlan, rows: torch.Tensor | None) -> None:
    run = compress_torch if isinstance(c.state, FoldState) else compress_window_torch
    run(c, plan, rows)


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
        from .backend_triton.build import INTERPRETED

        if tensor.device.type != "cpu" or not INTERPRETED:
            raise ValueError(
                f"backend='triton' takes CUDA or HIP tensors, and CPU tensors under Triton's interpreter (set "
                f"TRITON_INTERPRET=1 before importing kvfold), got {name} on {tensor.device}; or use backend='torch'"
            )
    return backend


def _check(c: Compressor, plan: StepPlan, rows: torch.Tensor | None) -> None:
    kv_score, spec = c.kv_score, c.spec
    check_spec("spec", spec)
    check_real_memory("kv_score", kv_score)
    check_dtype("kv_score", kv_score, _FLOATS)
    shape = kv_score.shape
    if len(shape) != 2 or shape[1] != 2 * spec.channels:
        check_shape("kv_score", kv_score, (None, 2 * spec.channels))
    if shape[0] > MOST_TOKENS:
        raise ValueError(f"kv_score must have at most {MOST_TOKENS} rows, got {shape[0]}")
    stride, side_by_side = kv_score.stride()
    if shape[0] and side_by_side != 1:
        raise ValueError(f"kv_score must be contiguous in its last dimension, got strides {(stride, side_by_side)}")
    met = _known(c, plan) or _check_fixed(c, plan)
    if kv_score.device != met.device:
        check_device("kv_score", kv_score, met.device)
    if met.rows_in_bf16 and kv_score.dtype is not torch.bfloat16:
        raise TypeError("kv_score must be torch.bfloat16, as state keeps input rows in bf16, got torch.float32")
    # kv_score moves from step to step, but mostly within the same room between the tensors of layer and plan.
    start = kv_score.data_ptr()
    end = start + ((shape[0] - 1) * stride + shape[1]) * (2 if kv_score.dtype is torch.bfloat16 else 4)
    if start < met.kv_score[0] or end > met.kv_score[1]:
        met.kv_score = _find_room("kv_score", kv_score, start, end, c, plan, met)
    if rows is not None:
        check_tensor("rows", rows, (plan.entry_capacity, spec.head_dim), _FLOATS, kv_score.device)
        first = rows.data_ptr()
        behind = first + rows.nbytes
        if first < met.rows[0] or behind > met.rows[1]:
            met.rows = _find_room("rows", rows, first, behind, c, plan, met)
        if first < end and start < behind:
            check_apart((Place("kv_score", kv_score), Place("rows", rows, written=True)))


def _known(c: Compressor, plan: StepPlan) -> Met | None:
    """What is known of a layer and a plan that were checked in an earlier call; None if something has changed since."""
    layer = c.state._layer if isinstance(c.state, (FoldState, WindowState)) and isinstance(plan, StepPlan) else None
    met = None if layer is None else layer.met(plan)
    if met is None or layer.tokens != _tokens(c):
        return None
    held = [*c.state._watched, *plan._watched]
    for thing in (c.cache, c.snapshots):
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
        c.state._token,
        None if cache is None else (isinstance(cache, EntryCache) and cache._token) or _UNKNOWN,
        None if snapshots is None else (isinstance(snapshots, Snapshots) and snapshots._token) or _UNKNOWN,
    )


def _check_fixed(c: Compressor, plan: StepPlan) -> Met:
    """Checks what a layer passes in every step, and the plan."""
    state, cache, snapshots = c.state, c.cache, c.snapshots
    if not isinstance(state, (FoldState, WindowState)):
        raise TypeError(f"state must be a FoldState or a WindowState, got {type(state).__name__}")
    check_made("state", state, type(state))
    check_made("plan", plan, StepPlan)
    if cache is not None:
        check_made("cache", cache, EntryCache)
    if snapshots is not None:
        check_made("snapshots", snapshots, Snapshots)
    tokens, weights = _tokens(c), (c.ape, c.norm_weight, c.rope)
    layer = state._layer
    if layer is None or not layer.same(tokens, weights):
        check_plan(plan, c.spec, c.kv_score.device, None)
        _check_layer(c)
        layer = state._layer = Layer(tokens, weights, _places(c))
    met = layer.met(plan)
    if met is None:
        _check_plan(c, plan)
        met = layer.meet(plan, lambda: [*_places(c), *plan_places(plan)])
    held = [x for thing in (state, plan, cache, snapshots) if thing is not None for x in thing._watched]
    kept = state._tensors[0]
    met.device, met.rows_in_bf16 = kept.device, isinstance(state, FoldState) and kept.dtype is torch.bfloat16
    met.where = where([*held, *(x for x in weights if x is not None)])
    return met


def _check_layer(c: Compressor) -> None:
    """Checks what does not change from step to step."""
    spec, state, device = c.spec, c.state, c.kv_score.device
    check_device("state", state._tensors[0], device)
    if isinstance(state, FoldState):
        if state.spec != spec:
            raise ValueError(f"state must be for {spec}, got {state.spec}")
    elif state.channels != spec.channels:
        raise ValueError(f"state must have {spec.channels} channels for {spec}, got {state.channels}")
    if spec.has_ape:
        check_tensor("ape", c.ape, (spec.ratio, spec.channels), (torch.float32,), device)
    elif c.ape is not None:
        raise ValueError("ape must be None, as spec.has_ape is False")
    check_epilogue(c.cache, spec, c.norm_weight, c.rope, device)
    if c.snapshots is not None:
        check_type("state", state, FoldState)  # the pages of a WindowState are shared as they are
        check_snapshots(c.snapshots, state)


def _check_plan(c: Compressor, plan: StepPlan) -> None:
    """Checks that a plan is for this layer."""
    check_plan(plan, c.spec, c.kv_score.device, c.cache)
    if isinstance(c.state, FoldState):
        if plan.state_slots is None:
            raise ValueError("plan must have state_slots for a FoldState, got block_tables")
    elif plan.block_tables is None:
        raise ValueError("plan must have block_tables for a WindowState, got state_slots")
    elif plan.page_size != c.state.page_size:
        raise ValueError(f"plan must be for pages of {c.state.page_size} positions like state, got page_size={plan.page_size}")
    if c.snapshots is not None and plan.snapshot_page_size != c.snapshots.page_size:
        have, want = plan.snapshot_page_size, c.snapshots.page_size
        raise ValueError(f"plan must have a snapshot_table with snapshot_page_size={want} for snapshots, got {have}")


def _places(c: Compressor) -> list[Place]:
    """What a layer passes in every step."""
    paged = isinstance(c.state, WindowState)
    places = [Place("state", x, written=True, paged=paged) for x in c.state._tensors]
    if c.cache is not None:
        places += cache_places(c.cache)
    if c.snapshots is not None:
        places += [Place("snapshots", x, written=True) for x in c.snapshots._tensors]
    weights = (("ape", c.ape), ("norm_weight", c.norm_weight), ("rope", c.rope))
    return places + [Place(name, weight) for name, weight in weights if weight is not None]


def cache_places(cache: EntryCache) -> list[Place]:
    return [Place("cache", x, written=True, paged=True) for x in (cache.pages, cache.scale_pages) if x is not None]


def _find_room(
    name: str, tensor: torch.Tensor, start: int, end: int, c: Compressor, plan: StepPlan, met: Met
) -> tuple[int, int]:
    """Checks that a tensor, from `start` to `end`, shares nothing with layer and plan; returns the room between them."""
    room = find_room(met.bounds, start, end)
    if room == NO_ROOM:
        check_apart([*_places(c), *plan_places(plan), Place(name, tensor, written=name == "rows")])
    return room


def check_snapshots(snapshots: Snapshots, state: FoldState) -> None:
    """Checks that snapshots are of this state."""
    check_made("snapshots", snapshots, Snapshots)
    if snapshots.spec != state.spec:
        raise ValueError(f"snapshots must be for {state.spec}, got {snapshots.spec}")
    check_dtype("snapshots", snapshots.rows, (state.rows.dtype,))
    check_device("snapshots", snapshots.rows, state.device)


def check_plan(plan: StepPlan, spec: CompressorSpec, device: torch.device, cache: EntryCache | None) -> None:
    """Checks that a plan is for this compressor, on this device and for this cache."""
    if plan.ratio != spec.ratio:
        raise ValueError(f"plan must be for ratio {spec.ratio}, got ratio {plan.ratio}")
    check_device("plan", plan.items, device)
    if cache is None:
        return
    if plan.entry_slots is None:
        raise ValueError("plan must have entry_slots or a cache_block_table when a cache is given, got neither")
    # Without a table the caller made the slots, for pages that only the cache knows.
    if plan.rows_per_page is not None and plan.rows_per_page != cache.rows_per_page:
        raise ValueError(
            f"plan must be for pages of {cache.rows_per_page} entries like cache, got rows_per_page={plan.rows_per_page}"
        )


def check_epilogue(
    cache: EntryCache | None,
    spec: CompressorSpec,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    device: torch.device,
) -> None:
    """Checks what everything behind the pooling takes."""
    if norm_weight is not None or cache is not None:
        check_tensor("norm_weight", norm_weight, (spec.head_dim,), _FLOATS, device)
    if rope is not None or (cache is not None and spec.rope_dim):
        check_tensor("rope", rope, (None, spec.rope_dim), (torch.float32,), device)
    if cache is not None:
        if cache.spec is not spec and cache.spec != spec:
            raise ValueError(f"cache must be for {spec}, got {cache.spec}")
        check_device("cache", cache.storage, device)
