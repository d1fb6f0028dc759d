"""How plans learn where entries go.

The slots of entries are computed by the metadata builder of the caches, which is another one than that of the states, and vLLM
has both build in the order of its groups of layers, the same in every step. A plan is updated when the later one has built.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from .plans import Batch, Limits, Plans, StateIn


class Compressed(NamedTuple):
    """What a compressor says when it is made: of how many tokens its windows are, and the name of the layer of its cache."""

    ratio: int
    cache: str


COMPRESSORS: dict[str, Compressed] = {}  # by the name of the state's layer
_groups: weakref.WeakSet[Group] = weakref.WeakSet()


class _Cache(NamedTuple):
    builder: Any
    plans: Plans
    state_first: bool  # whether the states' builder builds before this one


class Group:
    """The compressors whose states share a metadata builder."""

    def __init__(self, layer_names: list[str], limits: Limits, state: StateIn) -> None:
        made = [COMPRESSORS[name] for name in layer_names]
        self.limits, self.state = limits, state
        self._ratio, self._names = made[0].ratio, {one.cache for one in made}
        self._plans: dict[str, Plans] = {}
        self._caches: dict[int, _Cache] = {}
        self._batch: Batch | None = None
        _groups.add(self)

    def plans_of(self, cache: str) -> Plans:
        """The plans of the compressor whose cache is of the layer of this name."""
        if cache not in self._plans:
            raise RuntimeError(f"kvfold knows no slots of {cache}: its attention backend builds metadata in a class of its own")
        return self._plans[cache]

    def states_built(self, batch: Batch) -> None:
        """The states' builder has built for a step."""
        self._batch = batch
        for cache in self._caches.values():
            if not cache.state_first:
                cache.plans.update(batch)

    def cache_built(self, builder: Any, requests: int, tokens: int) -> None:
        """The builder of some caches, maybe of ours, has built for a step."""
        cache = self._caches.get(id(builder)) or self._meet(builder)
        if cache is not None and cache.state_first and self._batch[:2] == (requests, tokens):
            cache.plans.update(self._batch)

    def _meet(self, builder: Any) -> _Cache | None:
        names = self._names.intersection(builder.layer_names)
        if not names:
            return None
        plans = Plans(self._ratio, self.limits, self.state, builder.compressed_slot_mapping_buffer)
        self._plans.update(dict.fromkeys(names, plans))
        cache = self._caches[id(builder)] = _Cache(builder, plans, self._batch is not None)
        return cache


def tell_slots(build: Callable) -> Callable:
    """`build` of a metadata builder of caches, which then tells the groups of compressors that store into these."""

    @functools.wraps(build)
    def told(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        metadata = build(self, common_prefix_len, common_attn_metadata, fast_build)
        for group in tuple(_groups):
            group.cache_built(self, common_attn_metadata.num_reqs, common_attn_metadata.num_actual_tokens)
        return metadata

    return told
