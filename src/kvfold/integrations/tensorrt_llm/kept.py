"""What is made once for tensors at the same addresses, so that a call allocates nothing and a CUDA graph may record it.

An operator is given tensors, and not what kvfold makes of them: states, plans and caches. TensorRT-LLM passes the same buffers
in every step, or the same parts of them, so each of these objects is found again by where its tensors are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

from ...plan import StepPlan
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.formats import RecordFormat
from ...storage.window_state import WindowState

MOST = 1024  # objects of calls that no graph has recorded; the one that was not used for longest goes first

T = TypeVar("T")
_kept: OrderedDict[Hashable, object] = OrderedDict()
_recorded: dict[Hashable, object] = {}  # a graph has their addresses, so they stay
_errors: dict[torch.device, torch.Tensor] = {}


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
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _recorded[key] = _kept.pop(key)
    return found  # type: ignore[return-value]


def forget() -> None:
    """Lets go of all states, plans and caches, and of the buffers that they are of: before an engine makes its pools anew.

    CUDA graphs that were recorded before must not be replayed behind this.
    """
    _kept.clear()
    _recorded.clear()


def errors(device: torch.device | str | int) -> torch.Tensor:
    """The count of all that was refused on a device, int32 `[1]`: what `plan.errors` is elsewhere. Zero it when it is read."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _errors:
        _errors[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _errors[device]


def place(x: torch.Tensor) -> tuple:
    """Where a tensor is and how it lies there."""
    return x.data_ptr(), x.dtype, x.shape, x.stride()


def bucket(count: int) -> int:
    """The power of two from `count` up, so that steps of many lengths share a plan."""
    return 1 << max(count - 1, 15).bit_length()


def state_of(paged_kv: torch.Tensor, paged_score: torch.Tensor, page_size: int, channels: int) -> WindowState:
    """The two pools as a state, whatever shape they came in: their rows stand one behind the other."""

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


def plan_of(
    ratio: int,
    lengths: dict[str, torch.Tensor],
    cu_seq_lens: torch.Tensor,
    max_new_tokens: int,
    more: dict[str, torch.Tensor | int | tuple[torch.Tensor, ...]],
) -> StepPlan:
    """A plan for this step, updated: one launch. lengths: `start_pos` or `seq_lens`. more: arguments of `StepPlan.build`."""
    device = cu_seq_lens.device

    def described(value: object) -> Hashable:
        if isinstance(value, tuple):
            return tuple(map(described, value))
        return place(value) if isinstance(value, torch.Tensor) else value

    def make() -> StepPlan:
        start_pos = lengths.get("start_pos")
        total = {name: x for name, x in lengths.items() if name != "start_pos"}
        return StepPlan.build(ratio, start_pos, cu_seq_lens, max_new_tokens, **total, **more, errors=errors(device))

    shape = ("plan", ratio, *lengths, cu_seq_lens.shape[0], max_new_tokens, device)
    plan = once((*shape, *((name, described(value)) for name, value in more.items())), make, device)
    plan.update(**lengths, cu_seqlens=cu_seq_lens)
    return plan


def cache_of(
    kv_cache: torch.Tensor,
    fmt: RecordFormat,
    tokens_per_block: int,
    spec: CompressorSpec,
    scales: torch.Tensor | None,
    scale: float | torch.Tensor,
) -> EntryCache:
    """The blocks of a cache; in a format that keeps scales apart they stand behind the values of each block, or in `scales`."""

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
