"""The kernels of calls that `warmup` describes, for `aot`, as `combinations.Combination`s are those of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..backend_triton.build import Variant
from ..backend_triton.keys import Key, PairKey, PlanKey, RestoreKey, WindowKey
from ..backend_triton.variants import variant_of
from ..training.variants import TrainingKey
from .words import words_of


@dataclass(frozen=True)
class CallKernel:
    """One kernel of some call. dependent: whether it is launched as one, where there are such launches."""

    key: Key
    dependent: bool

    @property
    def name(self) -> str:
        ordinary = not self.dependent and not isinstance(self.key, (PlanKey, RestoreKey))  # which always are
        return " ".join([*words_of(self.key), *["ordinary"] * ordinary])

    @property
    def spills(self) -> int:
        return spills_of(self.key)

    def variant(self, pdl: bool = False) -> Variant:
        return variant_of(self.key, True, pdl and self.dependent)


def spills_of(key: Key) -> int:
    """Bytes that a thread may spill on sm_90, by the row of the table."""
    if isinstance(key, PairKey):
        return key.first.config.pair_spills
    if isinstance(key, WindowKey) and key.tables != "plain":
        return key.config.engine_spills
    return getattr(getattr(key, "config", None), "spills", 0)


def kernels_of(asked: Iterable[tuple[list[Key], Callable[[Key], bool]]]) -> list[CallKernel]:
    """Each once. asked: as `asked.asked_of` gives it."""
    found: dict[Variant, CallKernel] = {}
    for keys, may in asked:
        for key in keys:
            if isinstance(key, TrainingKey):
                raise ValueError("calls must not have training, for which aot has an argument of that name")
            one = CallKernel(key, may(key))
            found.setdefault(one.variant(True), one)
    return list(found.values())
