"""What is made once for tensors at the same addresses, so that a call allocates nothing and a CUDA graph may record it.

An operator is given tensors, not the states, plans and caches that kvfold makes of them. TensorRT-LLM passes the same buffers
in every step, or the same parts of them, so each of these objects is found again by the addresses of its tensors.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from ...plan import StepPlan
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.formats import RecordFormat
from ...storage.window_state import WindowState
from ..errors import Errors

MOST = 1024  # objects of calls that no graph has recorded; the one that was not used for longest goes first

T = TypeVar("T")
_kept: OrderedDict[Hashable, object] = OrderedDict()
_recorded: dict[Hashable, object] = {}  # a graph has their addresses, so they stay
_errors = Errors()
_steps = 0  # how often `step` was called


def once(key: Hashable, make: Callable[[], T], device: torch.device) -> T:
    """What `make` made for this key. It keeps the tensors that the key has the addresses of, so that no other has them."""
    found = _recorded.get(key)
    if found is None:
        found = _kept.get(key)
        if found is None:
            found = _kept[key] = make()
            if len(_kept) > MOST:
                _kept.popitem(last=False)
        _kept.move_to_end(key)
        if recorded(device):
            _recorded[key] = _kept.pop(key)
    return found  # type: ignore[return-value]


def recorded(device: torch.device) -> bool:
    """Whether a CUDA graph records what is called now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def forget() -> None:
    """Drops all states, plans and caches, and with them their buffers. Call it before an engine allocates its pools again.

    CUDA graphs that were recorded before must not be replayed after it. It is as if `step` had never been called.
    """
    global _steps
    _steps = 0
    _kept.clear()
    _recorded.clear()


@dataclass
class Shared:
    """A plan, and those of layers over the same memory.

    lengths: what it is updated from. updated: in which step it was, and if that was recorded in a graph.
    """

    plan: StepPlan
    lengths: Lengths
    layers: dict[tuple, StepPlan] = field(default_factory=dict)
    updated: tuple[int, bool] = (0, False)

    def of_layer(self, block_tables: tuple[torch.Tensor, torch.Tensor]) -> StepPlan:
        key = tuple(map(place, block_tables))
        if key not in self.layers:
            if len(self.layers) >= MOST:  # of tables that are made anew for each call
                self.layers.clear()
            self.layers[key] = copy.copy(self.plan)
            self.layers[key].block_tables = block_tables
        return self.layers[key]


def step() -> None:
    """Says that a step begins: until the next call, metadata at the same addresses does not change.

    Then one plan update serves all layers of a ratio. Call it at the top of the model's forward, where a CUDA graph records it
    too, and again after anything that changes metadata inside. Until it is called for the first time, every operator updates
    its plan.
    """
    global _steps
    _steps += 1


def errors(device: torch.device | str | int) -> torch.Tensor:
    """The count of all that was refused on a device, int32 `[1]`: what `plan.errors` is elsewhere. Zero it when it is read."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _errors[device]


def place(x: torch.Tensor) -> tuple:
    """Where a tensor is and how it lies there."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def bucket(count: int) -> int:
    """The power of two from `count` up, so that steps of many lengths share a plan."""
    return 1 << max(count - 1, 15).bit_length()


def state_of(paged_kv: torch.Tensor, paged_score: torch.Tensor, page_size: int, channels: int) -> WindowState:
    """The two pools as a state, whatever their shape: their rows are contiguous."""

    def make() -> WindowState:
        return WindowState(*(_pages(name, x, page_size, channels) for name, x in pools))

    pools = ("paged_kv", paged_kv), ("paged_score", paged_score)
    return once(("state", place(paged_kv), place(paged_score), page_size, channels), make, paged_kv.device)


def _pages(name: str, pool: torch.Tensor, page_size: int, channels: int) -> torch.Tensor:
    if pool.shape[1:] == (page_size, channels):
        return pool
    if not pool.is_contiguous() or pool.numel() % (page_size * channels):
        raise ValueError(
            f"{name} must be contiguous pages of {page_size} rows of {channels}, got shape {list(pool.shape)} and strides "
            f"{tuple(pool.stride())}"
        )
    return pool.view(-1, page_size, channels)


class Lengths(NamedTuple):
    """Lengths of a step. name: whether `given` are "start_pos" or "seq_lens"."""

    name: str
    given: torch.Tensor
    cu_seq_lens: torch.Tensor


def plan_of(
    spec: CompressorSpec,
    lengths: Lengths,
    max_new_tokens: int,
    block_tables: tuple[torch.Tensor, torch.Tensor],
    page_size: int,
    **more: torch.Tensor | int,
) -> StepPlan:
    """A plan for this step, updated: by one launch, or by none if another layer was given the same in the same step.

    All layers share what a plan has of a step; each has its own block tables, and so a plan of its own over the same memory.
    Layers of another width have other memory, as an engine may run an indexer's compressor on another stream than the main
    one's.
    """
    device, ratio, options = lengths.given.device, spec.ratio, {"page_size": page_size, **more}
    described = tuple((name, place(x) if isinstance(x, torch.Tensor) else x) for name, x in options.items())
    told = lengths.name, place(lengths.given), place(lengths.cu_seq_lens)
    given = {lengths.name: lengths.given, "cu_seqlens": lengths.cu_seq_lens}

    def make() -> Shared:
        known = {"start_pos": None, **given, **options, "block_tables": block_tables, "errors": errors(device)}
        return Shared(StepPlan.build(ratio, max_new_tokens=max_new_tokens, **known), lengths)

    shared = once(("plan", ratio, spec.head_dim, max_new_tokens, told, described), make, device)
    plan = shared.of_layer(block_tables)
    now = _steps, recorded(device)
    if shared.updated != now or not _steps:
        shared.plan.update(**given)
        plan.fresh = shared.plan.fresh  # the next launch reads what this one writes
        shared.updated = now
    return plan


def cache_of(
    kv_cache: torch.Tensor,
    fmt: RecordFormat,
    tokens_per_block: int,
    spec: CompressorSpec,
    scales: torch.Tensor | None,
    scale: float | torch.Tensor,
) -> EntryCache:
    """The blocks of a cache; in a format that keeps scales apart, these follow the values of each block, or are in `scales`."""

    def make() -> EntryCache:
        block = fmt.page_bytes(spec, tokens_per_block)  # of values, where scales are apart
        tails = tokens_per_block * fmt.tail_bytes(spec) if fmt.separate and scales is None else 0
        blocks = _blocks("kv_cache", kv_cache, block + tails)
        apart = blocks[:, block:] if tails else None
        if scales is not None:
            apart = _blocks("kv_cache_scale", scales, tokens_per_block * fmt.tail_bytes(spec))
        return EntryCache(blocks[:, :block], fmt, tokens_per_block, spec, scales=apart, scale=scale)

    more = (None if scales is None else place(scales), place(scale) if isinstance(scale, torch.Tensor) else scale)
    return once(("cache", place(kv_cache), fmt, tokens_per_block, spec, more), make, kv_cache.device)


def _blocks(name: str, x: torch.Tensor, size: int) -> torch.Tensor:
    """As bytes, `[blocks, size]`."""
    if not x.is_contiguous() or x.nbytes % size:
        raise ValueError(
            f"{name} must be contiguous blocks of {size} bytes, got shape {list(x.shape)}, strides {tuple(x.stride())} and "
            f"{x.dtype}"
        )
    return x.detach().view(-1).view(torch.uint8).view(-1, size)
