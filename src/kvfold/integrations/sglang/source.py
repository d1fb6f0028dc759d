"""Where the state of the compressors of one ratio lies: in SGLang's own pools, or in `FoldStatePool`s."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from ...contract import UnsupportedError
from ..errors import Errors
from .pools import FoldStatePool

# Fold pools by the address of the buffer that SGLang hands to a compressor.
POOLS: weakref.WeakValueDictionary[int, FoldStatePool] = weakref.WeakValueDictionary()
_SOURCES: weakref.WeakKeyDictionary[Any, dict[int, Source]] = weakref.WeakKeyDictionary()
ERRORS = Errors()


@dataclass(frozen=True)
class Source:
    """How a step finds the state of one ratio.

    Attributes:
        kind: `"fold"`: a slot per request. `"mean"`: SGLang's online row per request. `"ring"`: raw rows in a ring per
            request. `"pages"`: raw rows in a ring per SWA page.
        ring: rows of a ring.
        page_size: tokens of an SWA page, which is also that of a prefix page.
        rows: of the pool, of which the last is nobody's.
    """

    kind: str
    ring: int
    page_size: int
    rows: int


def errors() -> int:
    """Sequences and entries that kvfold refused since the start, over all devices; synchronizes. Not 0 is a bug."""
    return ERRORS.total()


def source_of(pool: Any, ratio: int) -> Source:
    """That of SGLang's KV pool, checked once.

    Raises:
        UnsupportedError: naming what kvfold does not serve.
    """
    known = _SOURCES.setdefault(pool, {})
    if ratio not in known:
        known[ratio] = _find(pool, ratio)
    return known[ratio]


def _find(pool: Any, ratio: int) -> Source:
    if getattr(pool, "_unified_kv", False):
        raise UnsupportedError("SGLANG_HACK_FLASHMLA_BACKEND must not be unified_kv_triton, whose caches are of ROCm alone")
    if type(pool.kv_pools.get(4)).__name__ == "HiSparseC4DevicePool":
        raise UnsupportedError("enable_hisparse must be off: its slots are translated in every layer")
    state = next((p for p in pool.compress_state_pools if p is not None and p.ratio == ratio), None)
    if state is None:
        raise UnsupportedError(f"compression_ratios must have {ratio} on this pipeline stage, got {pool.compression_ratios}")
    buffer = state.kv_score_buffer.kv_score
    ERRORS[buffer.device]  # made now, and not in a graph
    if buffer.data_ptr() in POOLS:
        return Source("fold", 1, pool.swa_page_size, buffer.shape[0])
    if state.online:
        kind = "mean"
    else:
        kind = "ring" if state.request_scoped else "pages"
    if kind == "pages" and (state.ring_size % 4 or pool.swa_page_size % state.ring_size):
        raise UnsupportedError(f"swa_page_size must be whole rings of {state.ring_size}, got {pool.swa_page_size}")
    return Source(kind, state.ring_size, pool.swa_page_size, buffer.shape[0])
