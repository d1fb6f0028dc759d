"""Which kernel a call needs: keys, by which launchers are found. Launches make them of calls, `warmup` of what calls will be.

A key names all that its kernel depends on, but for the alignment of tensors and dependent launch. Keys of two kinds are never
equal: they differ in length, in types, or in the kind of the table's row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import RecordFormat
from .table import ANY, BUCKETS, Config, choose, pair_buckets


class Types(NamedTuple):
    """Dtypes of a call's tensors, None for those that it has not; whether its plan has entry slots, and it latents.

    apart: values and scores are two tensors.
    """

    kv_score: torch.dtype
    state: torch.dtype | None
    rows: torch.dtype | None
    norm_weight: torch.dtype | None
    entry_slots: bool
    latent: bool = False
    apart: bool = False


class StepKey(NamedTuple):
    """Of `compress` over a `FoldState`, or without a state. snapshots: whether it leaves any."""

    spec: CompressorSpec
    fmt: RecordFormat | None
    config: Config
    types: Types
    snapshots: bool


class PairKey(NamedTuple):
    """Of `compress_many`."""

    first: StepKey
    second: StepKey


class WindowKey(NamedTuple):
    """Of `compress` over a `WindowState`. one_page: a window has its rows on one page, as the ratio divides the page size."""

    spec: CompressorSpec
    fmt: RecordFormat | None
    config: Config
    types: Types
    one_page: bool


class StoreKey(NamedTuple):
    """Of `store`. rows: dtype of the pooled rows."""

    spec: CompressorSpec
    fmt: RecordFormat
    config: Config
    rows: torch.dtype
    norm_weight: torch.dtype


class RestoreKey(NamedTuple):
    """Of `restore`. state: dtype of its rows. rows_per_page: of a snapshot."""

    spec: CompressorSpec
    state: torch.dtype
    rows_per_page: int


class PlanKey(NamedTuple):
    """Of `StepPlan.update`. windows: of a sequence that one program takes."""

    ratio: int
    windows: int
    no_slots: bool
    no_table: bool


Key = StepKey | PairKey | WindowKey | StoreKey | RestoreKey | PlanKey


def step_key(
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    kind: str,
    max_new_tokens: int,
    types: tuple,
    snapshots: bool = False,
    bucket: float = ANY,
) -> StepKey:
    """Of a call whose windows are of this `bucket`, of a plan for `max_new_tokens`. kind: of the state, or "store". types: as
    `Types`."""
    # Snapshots take the row for many windows, which has whole rows. No item of fold rows is longer than a window.
    bound = max_new_tokens if kind == "rows" else min(max_new_tokens, spec.ratio)
    return StepKey(spec, fmt, choose(kind, spec, bound, ANY if snapshots else bucket), Types(*types), snapshots)


def window_key(spec: CompressorSpec, fmt: RecordFormat | None, max_new_tokens: int, types: tuple, page_size: int) -> WindowKey:
    return WindowKey(spec, fmt, choose("window", spec, max_new_tokens), Types(*types), page_size % spec.ratio == 0)


def store_key(spec: CompressorSpec, fmt: RecordFormat, types: tuple[torch.dtype, torch.dtype]) -> StoreKey:
    """types: of the pooled rows and the norm weight."""
    return StoreKey(spec, fmt, choose("store", spec, 1), *types)


def kind_of(spec: CompressorSpec) -> str:
    """Of the row of the table for a `FoldState`; without a gate for what is left of a call then."""
    return state_kind(spec) if spec.gate else "store"


def plan_key(ratio: int, windows_per_sequence: int, no_slots: bool, no_table: bool) -> PlanKey:
    return PlanKey(ratio, windows_per_program(windows_per_sequence), no_slots, no_table)


def windows_per_program(windows_per_sequence: int) -> int:
    """Wide enough for a decode step, or for a long prompt."""
    return 8 if windows_per_sequence <= 8 else 64


class Wanted(NamedTuple):
    """What `warmup` makes keys of all kinds for."""

    dtypes: tuple[torch.dtype, ...]
    steps: tuple[int, ...]
    state_dtypes: tuple[torch.dtype, ...]
    norms: tuple[torch.dtype, ...]
    snapshots: tuple[bool, ...]
    latents: tuple[bool, ...] = (False,)
    apart: tuple[bool, ...] = (False,)

    def finishes(self, fmt: RecordFormat | None) -> list[tuple[torch.dtype | None, bool, bool]]:
        """Of `Types` norm weight, entry slots and latents.

        Without entry slots there can be no cache; without that only latents need the norm weight.
        """
        found = []
        for latent, slots in product(self.latents, (True,) if fmt is not None else (True, False)):
            found += [(norm, slots, latent) for norm in (self.norms if fmt is not None or latent else (None,))]
        return found

    def tokens(self, spec: CompressorSpec) -> tuple[bool, ...]:
        """Whether values and scores are two tensors, if there are scores."""
        return self.apart if spec.gate else (False,)

    def states(self, spec: CompressorSpec) -> tuple[torch.dtype | None, ...]:
        """Dtypes of a `FoldState`: fold rows are always fp32."""
        if not spec.gate:
            return (None,)
        return self.state_dtypes if state_kind(spec) == "rows" else (torch.float32,)


def plan_keys(ratios: set[int], states: tuple[str, ...]) -> Iterator[PlanKey]:
    """For both widths of the kernel: a plan of any length has one of them."""
    for ratio, windows, state, no_table in product(sorted(ratios), (1, 1 << 20), states, (False, True)):
        yield plan_key(ratio, windows, state == "window", no_table)


def store_keys(spec: CompressorSpec, fmt: RecordFormat | None, w: Wanted, rows: torch.dtype | None) -> Iterator[StoreKey]:
    if fmt is not None and rows is not None:
        for norm in w.norms:
            yield store_key(spec, fmt, (rows, norm))


def step_keys(
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    w: Wanted,
    rows: torch.dtype | None,
    buckets: tuple[float, ...] = BUCKETS,
) -> Iterator[StepKey]:
    """Input rows that are kept in bf16 are bf16 when they come. Without a state all calls have one kernel."""
    kind = kind_of(spec)
    buckets = buckets if spec.gate else (ANY,)
    # A page may end with nothing to keep, which the call without snapshots serves.
    leaves = sorted({snap and count > 0 for snap in w.snapshots for count in snapshot_rows(spec)})
    for dtype, state, bound in product(w.dtypes, w.states(spec), w.steps):
        if dtype == torch.bfloat16 or state != torch.bfloat16:
            for finish, apart, snap, bucket in product(w.finishes(fmt), w.tokens(spec), leaves, buckets):
                yield step_key(spec, fmt, kind, bound, (dtype, state, rows, *finish, apart), snap, bucket)


def pair_keys(pair: tuple[tuple[CompressorSpec, RecordFormat | None], ...], w: Wanted) -> Iterator[PairKey]:
    """The two may differ in dtypes, but their plan is one."""
    for bound, bucket in product(w.steps, pair_buckets({state_kind(spec) for spec, _ in pair})):
        one_step = w._replace(steps=(bound,), latents=(False,))
        first, second = ([*step_keys(spec, fmt, one_step, None, (bucket,))] for spec, fmt in pair)
        for one, other in product(first, second):
            if one.types.entry_slots == other.types.entry_slots:  # which the plan has or not
                yield PairKey(one, other)


def window_keys(
    spec: CompressorSpec, fmt: RecordFormat | None, w: Wanted, rows: torch.dtype | None, pages: tuple[int, ...] | None
) -> Iterator[WindowKey]:
    """pages: sizes; None: any. What matters of one is whether the ratio divides it."""
    for dtype, state, bound, page in product(w.dtypes, w.state_dtypes, w.steps, pages or (spec.ratio, 1)):
        for finish, apart in product(w.finishes(fmt), w.apart):
            yield window_key(spec, fmt, bound, (dtype, state, rows, *finish, apart), page)


def restore_keys(spec: CompressorSpec, w: Wanted) -> Iterator[RestoreKey]:
    for state, count in product(w.states(spec), snapshot_rows(spec)):
        yield RestoreKey(spec, state, count)


def snapshot_rows(spec: CompressorSpec) -> tuple[int, ...]:
    """Rows that a snapshot can have: of fold rows, with a page size that is a multiple of the ratio, and with any other."""
    if not spec.gate:
        return (0,)
    return (0, 1) if state_kind(spec) == "fold" else (spec.ratio * int(spec.overlap),)
