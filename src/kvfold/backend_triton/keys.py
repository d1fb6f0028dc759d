"""Which kernel a call needs: keys, by which launchers are found. Launches make them from calls, `warmup` from calls to come.

A key names all that its kernel depends on, except the alignment of tensors and dependent launch. Keys of two kinds are never
equal: they differ in length, in types, or in the kind of the table's row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from ..contract import LANES
from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import RecordFormat
from .table import ANY, BUCKETS, Config, Tiling, choose, pair_buckets, tilings


class Types(NamedTuple):
    """Dtypes of a call's tensors, None for those that it lacks; whether its plan has entry slots, and the call latents.

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
    """For `compress` over a `FoldState` or a `MeanState`, or without a state. snapshots: whether it takes any."""

    spec: CompressorSpec
    fmt: RecordFormat | None
    config: Config
    types: Types
    snapshots: bool


class PairKey(NamedTuple):
    """For `compress_many`."""

    first: StepKey
    second: StepKey


class WindowKey(NamedTuple):
    """For `compress` over a `WindowState`.

    pages: one of `PAGES`. tables: one of `TABLES`.
    """

    spec: CompressorSpec
    fmt: RecordFormat | None
    config: Config
    types: Types
    pages: str
    tables: str = "plain"


# How the kernels of a `WindowState` read block tables: contiguous int32 of pages for entries that stand one behind the other;
# any that an engine has, for entries anywhere; or as the latter, as rings.
TABLES = ("plain", "engine", "ring")

# How the rows of a window of raw rows lie on pages: all on one; or each LANES of them on one; or anyhow.
PAGES = ("one", "lanes", "any")


class StoreKey(NamedTuple):
    """For `store`. rows: dtype of pooled rows. Without a plan: slots, positions: dtypes; also: the second cache's format."""

    spec: CompressorSpec
    fmt: RecordFormat
    config: Config
    rows: torch.dtype
    norm_weight: torch.dtype | None
    slots: torch.dtype | None = None
    positions: torch.dtype | None = None
    also: RecordFormat | None = None


class RestoreKey(NamedTuple):
    """For `restore`. state: dtype of its rows. rows_per_page: rows of a snapshot."""

    spec: CompressorSpec
    state: torch.dtype
    rows_per_page: int


class PlanKey(NamedTuple):
    """For `StepPlan.update`. windows: how many of a sequence one program takes. metadata: whether there is any
    (`args.Metadata`).
    """

    ratio: int
    windows: int
    no_slots: bool
    no_table: bool
    metadata: bool = False


class ProjectKey(NamedTuple):
    """For a projection. tensors: how many hold the weights, 1, 2 or 4.

    sums: the dtype of kv_score, or of its parts where it has several; rounded: to bf16 in any dtype. scaled: whether weights
    are in FP8.
    """

    hidden_dim: int
    config: Tiling
    tensors: int
    sums: torch.dtype
    rounded: bool = False
    scaled: bool = False


class AddKey(NamedTuple):
    """For the sum of a projection's parts. sums, rounded: as in `ProjectKey`."""

    parts: int
    sums: torch.dtype
    rounded: bool = False


class DequantizeKey(NamedTuple):
    """For the launch that makes bf16 of weights in FP8. tensors: as in `ProjectKey`."""

    hidden_dim: int
    tensors: int


Key = StepKey | PairKey | WindowKey | StoreKey | RestoreKey | PlanKey | ProjectKey | AddKey | DequantizeKey


def step_key(
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    kind: str,
    max_new_tokens: int,
    types: tuple,
    snapshots: bool = False,
    bucket: float = ANY,
) -> StepKey:
    """For a call whose windows are in this `bucket`, with a plan for `max_new_tokens`. kind: that of the state, or "store".
    types: as in `Types`.
    """
    # Snapshots take the row for many windows, which has whole rows. No item of fold rows is longer than a window.
    bound = max_new_tokens if kind == "rows" else min(max_new_tokens, spec.ratio)
    return StepKey(spec, fmt, choose(kind, spec, bound, ANY if snapshots else bucket), Types(*types), snapshots)


def window_key(
    spec: CompressorSpec, fmt: RecordFormat | None, max_new_tokens: int, types: tuple, page_size: int, tables: str = "plain"
) -> WindowKey:
    return WindowKey(spec, fmt, choose("window", spec, max_new_tokens), Types(*types), pages_of(spec, page_size), tables)


def pages_of(spec: CompressorSpec, page_size: int) -> str:
    """One of `PAGES`. Windows with overlap are short, and begin with rows of the one before."""
    one, lanes, many = PAGES
    if page_size % spec.ratio == 0:
        return one
    return lanes if page_size % LANES == 0 and spec.ratio % LANES == 0 and not spec.overlap else many


def page_sizes(spec: CompressorSpec) -> tuple[int, ...]:
    """A page size for each of `PAGES` that a spec can have, the largest first."""
    found = {pages_of(spec, size): size for size in (LANES, 1, spec.ratio)}
    return tuple(sorted(found.values(), reverse=True))


def store_key(
    spec: CompressorSpec, fmt: RecordFormat, types: tuple[torch.dtype | None, ...], also: RecordFormat | None = None
) -> StoreKey:
    """types: those of the pooled rows and the norm weight; without a plan, of slots and positions as well."""
    return StoreKey(spec, fmt, choose("store", spec, 1), *(*types, None, None)[:4], also)


def kind_of(spec: CompressorSpec) -> str:
    """The kind of the table's row for a `FoldState`; without a gate "store", which is all that is left of a call."""
    return state_kind(spec) if spec.gate else "store"


def plan_key(ratio: int, windows_per_sequence: int, no_slots: bool, no_table: bool, metadata: bool = False) -> PlanKey:
    """With an engine's metadata, one kernel serves all that it may contain."""
    windows = windows_per_program(windows_per_sequence)
    return PlanKey(ratio, windows, False, False, True) if metadata else PlanKey(ratio, windows, no_slots, no_table)


def windows_per_program(windows_per_sequence: int) -> int:
    """Wide enough for a decode step, or for a long prompt."""
    return 8 if windows_per_sequence <= 8 else 64


class Wanted(NamedTuple):
    """What `warmup` makes keys for."""

    dtypes: tuple[torch.dtype, ...]
    steps: tuple[int, ...]
    state_dtypes: tuple[torch.dtype, ...]
    norms: tuple[torch.dtype | None, ...]
    snapshots: tuple[bool, ...]
    round_inputs: bool = False
    slots: tuple[torch.dtype, ...] = ()
    positions: tuple[torch.dtype, ...] = ()
    tables: tuple[str, ...] = ("plain",)
    latents: tuple[bool, ...] = (False,)
    apart: tuple[bool, ...] = (False,)

    def finishes(self, fmt: RecordFormat | None) -> list[tuple[torch.dtype | None, bool, bool]]:
        """Combinations of norm weight, entry slots and latents, as in `Types`.

        Without entry slots there can be no cache; without that only latents need the norm weight.
        """
        found, norms = [], tuple(norm for norm in self.norms if norm is not None)
        for latent, slots in product(self.latents, (True,) if fmt is not None else (True, False)):
            found += [(norm, slots, latent) for norm in (norms if fmt is not None or latent else (None,))]
        return found

    def tokens(self, spec: CompressorSpec) -> tuple[bool, ...]:
        """Whether values and scores are two tensors, if there are scores."""
        return self.apart if spec.gate else (False,)

    def states(self, spec: CompressorSpec) -> tuple[torch.dtype | None, ...]:
        """Dtypes of a `FoldState`: fold rows are always fp32."""
        if not spec.gate:
            return (None,)
        return self.state_dtypes if state_kind(spec) == "rows" else (torch.float32,)


def plan_keys(ratios: set[int], states: tuple[str, ...], tables: tuple[str, ...]) -> Iterator[PlanKey]:
    """Both widths of the kernel: a plan of any length has one of them. A ring needs no plan kernel of its own."""
    for ratio, windows, kind in product(sorted(ratios), (1, 1 << 20), tables):
        for state, no_table in product(states, (False, True)):
            yield plan_key(ratio, windows, state == "window", no_table, kind == "engine")


def store_keys(
    spec: CompressorSpec, fmt: RecordFormat | None, w: Wanted, rows: torch.dtype | None, also: RecordFormat | None = None
) -> Iterator[StoreKey]:
    """also: the format of the second cache, which only a call without a plan has."""
    if fmt is None or rows is None:
        return
    for norm in w.norms:
        if norm is not None and also is None:
            yield store_key(spec, fmt, (rows, norm))
        for slots, positions in product(w.slots, w.positions if spec.rope_dim else (None,)):
            yield store_key(spec, fmt, (rows, norm, slots, positions), also)


def mean_keys(spec: CompressorSpec, fmt: RecordFormat | None, w: Wanted, rows: torch.dtype | None) -> Iterator[StepKey]:
    """Keys over a `MeanState`, for specs that can have one."""
    if not spec.gate or state_kind(spec) != "fold":
        return
    for dtype, bound, finish, apart, bucket in product(w.dtypes, w.steps, w.finishes(fmt), w.apart, BUCKETS):
        yield step_key(spec, fmt, "mean", bound, (dtype, torch.float32, rows, *finish, apart), False, bucket)


def step_keys(
    spec: CompressorSpec,
    fmt: RecordFormat | None,
    w: Wanted,
    rows: torch.dtype | None,
    buckets: tuple[float, ...] = BUCKETS,
) -> Iterator[StepKey]:
    """Input rows that are kept in bf16 are bf16 when they come, unless the state rounds them.

    Without a state all calls have one kernel.
    """
    kind = kind_of(spec)
    buckets = buckets if spec.gate else (ANY,)
    # A page may end with nothing to keep, which the call without snapshots serves.
    leaves = sorted({snap and count > 0 for snap in w.snapshots for count in snapshot_rows(spec)})
    for dtype, state, bound in product(w.dtypes, w.states(spec), w.steps):
        if dtype == torch.bfloat16 or state != torch.bfloat16 or w.round_inputs:
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
    """pages: sizes; None: any. What matters of one is how windows lie on it (`pages_of`)."""
    for dtype, state, bound, page in product(w.dtypes, w.state_dtypes, w.steps, pages or page_sizes(spec)):
        for finish, apart, tables in product(w.finishes(fmt), w.apart, w.tables):
            yield window_key(spec, fmt, bound, (dtype, state, rows, *finish, apart), page, tables)


def project_keys(
    columns: int, hidden_dims: Iterable[int], rounds: Iterable[bool], tensors: tuple[int, ...], weights: Iterable[str]
) -> Iterator[ProjectKey | AddKey | DequantizeKey]:
    """Keys for kv_score of so many columns. rounds: whether it is rounded to bf16. tensors: as in `ProjectKey`. weights: "bf16"
    and "fp8".
    """
    stored = [(torch.float32, rounded) for rounded in rounds] + [(torch.bfloat16, True) for rounded in rounds if rounded]
    for width, kept in product(hidden_dims, weights):
        for config, scaled in tilings(columns, kept == "fp8"):
            counts = tensors
            if kept == "fp8" and not scaled:
                yield from (DequantizeKey(width, count) for count in tensors)
                counts = (1,)  # what that makes
            if config.parts > 1:
                yield from (AddKey(config.parts, *kind) for kind in stored)
            kinds = stored if config.parts == 1 else [(torch.float32, False)]
            yield from (ProjectKey(width, config, count, *kind, scaled) for count, kind in product(counts, kinds))


def restore_keys(spec: CompressorSpec, w: Wanted) -> Iterator[RestoreKey]:
    for state, count in product(w.states(spec), snapshot_rows(spec)):
        yield RestoreKey(spec, state, count)


def snapshot_rows(spec: CompressorSpec) -> tuple[int, ...]:
    """Rows that a snapshot can have: of fold rows, with a page size that is a multiple of the ratio, and with any other."""
    if not spec.gate:
        return (0,)
    return (0, 1) if state_kind(spec) == "fold" else (spec.ratio * int(spec.overlap),)
