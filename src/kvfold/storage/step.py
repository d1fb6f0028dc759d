"""The data of one step: what a plan holds, and what a call brings of one compressor. Backends are typed against these."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..arguments.checks import check_int, check_numbers, check_switch, check_tensor, check_type, side_by_side, traced
from ..arguments.overlap import Place, check_apart
from ..contract import INT32_MAX, ITEM_FIELDS, MOST_ITEMS, MOST_POSITIONS
from ..spec import CompressorSpec
from .cache import EntryCache
from .fold_state import FoldState
from .mean_state import MeanState
from .remembered import Checked, Layer, where
from .snapshots import MOST_PAGE, Snapshots
from .weights import ScaledWeight, Weight
from .window_state import WindowState

# Plans in use by the address of their items, so that an operator (ops.py) can tell whose plan it was given the tensors of.
LIVE: weakref.WeakValueDictionary[int, PlanData] = weakref.WeakValueDictionary()


class Compressor(NamedTuple):
    """One compressor's part of a step, as `compress_many` takes it; the fields are the arguments of `compress`.

    It has no state if its spec has no gate, or if it stands for a `store`, whose pooled rows are in `kv_score`. `kv_score` may
    be None only for `project_compress_many`.
    """

    kv_score: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
    state: FoldState | MeanState | WindowState | None
    cache: EntryCache | None
    spec: CompressorSpec
    ape: torch.Tensor | None
    norm_weight: torch.Tensor | None
    rope: torch.Tensor | None
    snapshots: Snapshots | None = None

    def parts(self) -> tuple[tuple[str, torch.Tensor], ...]:
        """The tensors of the step's tokens, with the names that errors have for them."""
        if isinstance(self.kv_score, torch.Tensor):
            return (("kv_score", self.kv_score),)
        if not isinstance(self.kv_score, tuple) or len(self.kv_score) != 2:
            what = f"got {type(self.kv_score).__name__}"
            raise TypeError(f"kv_score must be a torch.Tensor, or a tuple of two, values and scores, {what}")
        parts = tuple(zip(("kv_score[0]", "kv_score[1]"), self.kv_score, strict=True))
        for name, x in parts:
            check_type(name, x, torch.Tensor)
        return parts

    @property
    def value(self) -> torch.Tensor:
        """The tensor with the values (and often the scores): it has the tokens' dtype, device and number."""
        given = self.kv_score
        return given[0] if given.__class__ is tuple and given else given  # type: ignore[return-value]

    @property
    def score(self) -> torch.Tensor | None:
        """The scores, where they are a tensor of their own."""
        given = self.kv_score
        return given[1] if given.__class__ is tuple else None

    def joined(self) -> Compressor:
        """The same with values and scores in one tensor; a new one if they were two."""
        return self if self.score is None else self._replace(kv_score=torch.cat(self.kv_score, dim=1))

    @property
    def device(self) -> torch.device:
        return self.value.device


class Outputs(NamedTuple):
    """What `compress` writes besides records; the fields are its arguments."""

    rows: torch.Tensor | None = None
    latent: torch.Tensor | None = None


NO_OUTPUTS = Outputs()


class Projection(NamedTuple):
    """What kv_score is made from, and whether it is rounded; the fields are arguments of `project_compress`.

    weights: for each compressor its one or two weights, all in bf16 or all in FP8. stacked: the weight that holds those of all
    compressors, if there is one.
    """

    hidden: torch.Tensor
    weights: tuple[tuple[Weight, ...], ...]
    round_kv_score: bool
    stacked: Weight | None = None

    @property
    def scaled(self) -> bool:
        """Whether weights are in FP8."""
        return isinstance(self.weights[0][0], ScaledWeight)

    @property
    def sums_in(self) -> torch.dtype:
        """The dtype of a kv_score that the caller did not give."""
        return torch.bfloat16 if self.round_kv_score else torch.float32


class Hits(NamedTuple):
    """What `restore` is to do, slot by slot; the fields are its arguments."""

    slots: torch.Tensor
    pages: torch.Tensor
    start_pos: torch.Tensor
    errors: torch.Tensor


class Placed(NamedTuple):
    """Rows, each with its slot in one cache or two: what `store` takes without a plan; the fields are its arguments."""

    rows: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor | None
    caches: tuple[EntryCache, ...]
    spec: CompressorSpec
    norm_weight: torch.Tensor | None
    rope: torch.Tensor | None
    errors: torch.Tensor | None


class Lengths(NamedTuple):
    """What a step adds. given: the length of each sequence before the step, or after it with `totals`."""

    given: torch.Tensor
    cu_seqlens: torch.Tensor
    totals: bool = False

    @property
    def name(self) -> str:
        """The argument that `given` came as."""
        return "seq_lens" if self.totals else "start_pos"

    @classmethod
    def of(cls, start_pos: torch.Tensor | None, cu_seqlens: torch.Tensor, seq_lens: torch.Tensor | None) -> Lengths:
        if (start_pos is None) == (seq_lens is None):
            got = "neither" if start_pos is None else "both"
            raise ValueError(f"start_pos or seq_lens must be given, and not both, got {got}")
        return cls(start_pos, cu_seqlens) if seq_lens is None else cls(seq_lens, cu_seqlens, True)


class PlanData(Checked):
    """The bounds and tensors of a `StepPlan`, documented there. An operator makes one of these for its single call (ops.py)."""

    ratio: int
    max_new_tokens: int
    batch: int
    max_tokens: int
    entry_capacity: int
    item_capacity: int
    rows_per_page: int | None
    start_pos: torch.Tensor
    cu_seqlens: torch.Tensor
    page_size: int | None
    fresh: bool = False  # no kernel that reads the plan was launched since `update`: backend_triton/launch.py, use_pdl
    state_slots: torch.Tensor | None
    block_tables: tuple[torch.Tensor, torch.Tensor] | None
    cache_block_table: torch.Tensor | None
    entry_slots: torch.Tensor | None
    snapshot_table: torch.Tensor | None
    snapshot_page_size: int | None
    token_slots: torch.Tensor | None = None
    slots_given: torch.Tensor | None = None  # entry slots that `update` copies, as kernels do not read them as they are
    no_slot: int = -1
    null_page: int | None = None
    null_slot: int | None = None
    ring: bool = False
    cu_rows: torch.Tensor | None = None
    reserved: bool = False  # entries have the places of `cu_rows`
    cu_entries: torch.Tensor
    items: torch.Tensor
    num_items: torch.Tensor
    entry_items: torch.Tensor
    errors: torch.Tensor

    _called = "StepPlan"  # in messages
    _made_by = "build"
    _unchecked = ("fresh",)
    _watched_on_gpu = False  # `update` looks for its tensors, once for all layers of the step
    _whole = True  # an operator's plan of one call is not: it has no tensors of `update` (ops.py)

    _launcher: tuple[bool, Callable[..., None]] | None = None  # of the last `update` on a GPU, and if for an engine's metadata
    _prepared: tuple | None = None  # the arguments of the last `update` on a GPU: backend_triton/launch.py
    _came: tuple | None = None  # the addresses of what the last `update` was given
    _layer: Layer | None = None  # what the last call of a layer with neither a state nor a cache got with this plan
    _bounds: list[int]  # what its tensors span, as `check_apart` returns it
    _where: list  # where they were

    def _facts(self) -> Iterator[tuple[str, object]]:
        for name in ("ratio", "batch", "max_new_tokens", "max_tokens", "entry_capacity", "item_capacity"):
            yield name, getattr(self, name)
        yield "device", self.items.device
        for name in ("page_size", "ring", "rows_per_page", "null_page", "null_slot", "snapshot_page_size"):
            value = getattr(self, name)
            if value is not None and value is not False:
                yield name, value
        tables = ("state_slots", "block_tables", "entry_slots", "cache_block_table", "token_slots", "cu_rows", "snapshot_table")
        given = [name for name in tables if getattr(self, name) is not None]
        if "entry_slots" in given and (self.cache_block_table is not None or self.token_slots is not None):
            given.remove("entry_slots")  # the plan's own
        yield "given", "+".join(given) or "lengths alone"

    def _allocate(self, lengths: Lengths, max_rows: int | None, errors: torch.Tensor | None) -> None:
        """Checks what `StepPlan.build` was given, which set the rest as attributes, and makes the plan's own tensors."""
        check_int("ratio", self.ratio, 1, 4096)
        check_int("max_new_tokens", self.max_new_tokens, 1, INT32_MAX)
        device = getattr(lengths.given, "device", None)
        check_numbers(lengths.name, lengths.given, (None,), device, fake=True)
        batch = self.batch = lengths.given.shape[0]
        check_numbers("cu_seqlens", lengths.cu_seqlens, (batch + 1,), device, fake=True)
        if self.state_slots is None and self.block_tables is None and self.ratio > 1:
            raise ValueError("state_slots or block_tables must be given, got neither")
        of_entries = [name for name in ("entry_slots", "cache_block_table", "token_slots") if getattr(self, name) is not None]
        if len(of_entries) > 1:
            raise ValueError(f"{of_entries[0]} and {of_entries[1]} exclude each other, got both")
        if self.entry_slots is not None:
            check_numbers("entry_slots", self.entry_slots, (None,), device, fake=True)
        if self.max_tokens is None:
            self.max_tokens = INT32_MAX
        check_int("max_tokens", self.max_tokens, 0, INT32_MAX)
        self.max_tokens = min(self.max_tokens, batch * self.max_new_tokens)
        self.reserved = self.cu_rows is not None
        self._check_places(device)
        self._set_capacities(max_rows)
        if not side_by_side(self.entry_slots, torch.int64):
            self.slots_given = self.entry_slots
        if self.fills_slots:
            self.entry_slots = torch.full((self.entry_capacity,), -1, dtype=torch.int64, device=device)
        for name, shape in self._shapes().items():
            setattr(self, name, torch.zeros(shape, dtype=torch.int32, device=device))
        self.entry_items.fill_(-1)
        if errors is not None:
            check_tensor("errors", errors, (1,), (torch.int32,), device, fake=True)
            self.errors = errors

    def _set_capacities(self, max_rows: int | None) -> None:
        """Most work items and entries of a step; entries are those that the caller has slots for, or as many as can be."""
        batch, ratio, windows = self.batch, self.ratio, self.batch * self.windows_per_sequence
        self.item_capacity = self.items_for(self.max_tokens)
        if max_rows is not None:
            check_int("max_rows", max_rows, 0, MOST_POSITIONS)
            if not self.reserved or self.entry_slots is not None:
                raise ValueError(f"max_rows must be None without cu_rows, and with entry_slots, got {max_rows}")
        if self.entry_slots is not None:
            self.entry_capacity = self.entry_slots.shape[0]
        elif self.reserved:
            self.entry_capacity = batch * -(-self.max_new_tokens // ratio) if max_rows is None else max_rows
        else:
            self.entry_capacity = min(batch * -(-self.max_new_tokens // ratio), self.max_tokens // ratio + batch)
        if self.item_capacity:
            # Lengths that overlap in kv_score, as with offsets that go back, end more windows than max_tokens can: every entry
            # that has a place then still has an item, which comes at most B behind it.
            self.item_capacity = max(self.item_capacity, min(windows, self.entry_capacity + batch))
        if windows > INT32_MAX or self.item_capacity > MOST_ITEMS or (self.reserved and self.entry_capacity > MOST_POSITIONS):
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and max_tokens={self.max_tokens} must mean at most {MOST_ITEMS} windows "
                f"of {ratio} in {batch} sequences"
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the int32 tensors that are the plan's own."""
        shapes = {"items": (self.item_capacity, len(ITEM_FIELDS)), "num_items": (1,), "errors": (1,)}
        if self._whole:
            shapes |= {"start_pos": (self.batch,), "cu_seqlens": (self.batch + 1,)}
        if self._whole or self.block_tables is not None:
            shapes |= {"cu_entries": (self.batch + 1,), "entry_items": (self.entry_capacity,)}
        return shapes

    def _check(self) -> None:
        for name in ("ratio", "max_new_tokens", "batch", "entry_capacity", "item_capacity", *["max_tokens"] * self._whole):
            check_int(name, getattr(self, name), 0, INT32_MAX)
        device = getattr(self.items, "device", None)
        for name, shape in self._shapes().items():
            check_tensor(name, getattr(self, name), shape, (torch.int32,), device, fake=True)
        if self.entry_slots is not None or self.fills_slots:
            check_tensor("entry_slots", self.entry_slots, (self.entry_capacity,), (torch.int64,), device, fake=True)
        if self._whole and self.reserved != (self.cu_rows is not None):
            raise ValueError("cu_rows must be set where StepPlan.build got one, and not elsewhere")
        self._check_places(device)
        self._launcher = self._came = self._prepared = None
        places = plan_places(self, updating=True)
        self._bounds = check_apart(places)
        self._tensors = tuple(place.tensor for place in places)
        self._where = [] if traced(self.items) else where(self._tensors)

    def _check_places(self, device: torch.device) -> None:
        """Checks what says where snapshots and entries are, and, in one way at most, where the state is."""
        tables, batch = self.block_tables, self.batch
        paged = {} if self.cache_block_table is None else {"cache_block_table": self.cache_block_table}
        if self.state_slots is not None:
            if tables is not None:
                raise ValueError("state_slots and block_tables exclude each other, got both")
            check_numbers("state_slots", self.state_slots, (batch,), device, fake=True)
        if tables is not None:
            if not isinstance(tables, tuple) or len(tables) != 2:
                raise TypeError("block_tables must be a tuple of two tensors, of value pages and of score pages")
            if self.snapshot_table is not None:
                raise ValueError("snapshot_table must be None with block_tables, whose pages are shared as they are")
            paged |= {f"block_tables[{i}]": table for i, table in enumerate(tables)}
        for name, table in paged.items():
            check_numbers(name, table, (batch, None), device, fake=True)
        if self.snapshot_table is not None:
            check_tensor("snapshot_table", self.snapshot_table, (batch, None), (torch.int32,), device, fake=True)
        for name, numbers, count in (
            ("token_slots", self.token_slots, None),
            ("entry_slots", self.slots_given, None),
            ("cu_rows", self.cu_rows, batch + 1),
        ):
            if numbers is not None:
                check_numbers(name, numbers, (count,), device, fake=True)
        self._check_size("page_size", INT32_MAX, "block_tables")
        self._check_size("snapshot_page_size", MOST_PAGE, "snapshot_table")
        if self.rows_per_page is not None:
            check_int("rows_per_page", self.rows_per_page, 1, 1 << 20)
        elif self.cache_block_table is not None:
            raise ValueError("rows_per_page must be given with cache_block_table, got None")
        self._check_nulls()

    def _check_nulls(self) -> None:
        """Checks which numbers mean "none", and whether tables are rings."""
        tables, no_slot = self.block_tables, self.no_slot
        paged = tables is not None or self.cache_block_table is not None
        for name, null, there, of in (
            ("null_page", self.null_page, paged, "block_tables or cache_block_table"),
            ("null_slot", self.null_slot, self.state_slots is not None, "state_slots"),
        ):
            if null is not None:
                check_int(name, null, 0, INT32_MAX)
                if not there:
                    raise ValueError(f"{name} must be None without {of}, got {null}")
        check_int("no_slot", no_slot, -1, 0)
        if no_slot == 0 and self.token_slots is None:
            raise ValueError("no_slot must be -1 without token_slots, got 0")
        check_switch("ring", self.ring)
        if self.ring:
            if tables is None:
                raise ValueError("ring must be False without block_tables, got True")
            widths = [table.shape[1] for table in tables]
            if widths[0] != widths[1] or not 1 <= widths[0] * self.page_size <= INT32_MAX:
                raise ValueError(f"block_tables must be equally wide with ring, from 1 page to 2**31 rows, got widths {widths}")

    def _check_size(self, name: str, most: int, tables: str) -> None:
        """The size of pages is given with their tables, and not without."""
        size, there = getattr(self, name), getattr(self, tables) is not None
        if there and size is None:
            raise ValueError(f"{name} must be given with {tables}, got None")
        if not there and size is not None:
            raise ValueError(f"{name} must be None without {tables}, got {size!r}")
        if there:
            check_int(name, size, 1, most)

    def rows_shape(self, spec: CompressorSpec) -> tuple[int | None, int]:
        """The shape that pooled rows must have: a row for each possible entry, or, with `cu_rows`, of any length."""
        return None if self.reserved else self.entry_capacity, spec.head_dim

    def room(self, *outputs: torch.Tensor | None) -> int:
        """How many places for entries a call with these outputs has (None: no such output); an entry beyond is refused."""
        room = self.entry_capacity
        for x in outputs:  # every call comes here: no generators
            if x is not None:
                room = min(room, x.shape[0])
        return room

    @property
    def fills_slots(self) -> bool:
        """Whether `update` writes `entry_slots`. If not, they are the caller's, or there are none."""
        return self.cache_block_table is not None or self.token_slots is not None or self.slots_given is not None

    @property
    def metadata(self) -> bool:
        """Whether `update` needs the kernel that reads an engine's metadata: other dtypes, strides and sources of slots."""
        more = (self.token_slots, self.slots_given, self.cu_rows, self.null_page, self.null_slot)
        return any(x is not None for x in more) or not (side_by_side(self.state_slots) and side_by_side(self.cache_block_table))

    @property
    def ring_rows(self) -> int:
        """Positions of a sequence that its ring holds; 0 where the tables are none."""
        return self.page_size * self.block_tables[0].shape[1] if self.ring else 0

    @property
    def tables(self) -> str:
        """How the kernels of a `WindowState` read the block tables: `keys.TABLES`."""
        if self.ring:
            return "ring"
        engine = self.reserved or self.null_page is not None or not all(map(side_by_side, self.block_tables))
        return "engine" if engine else "plain"

    def items_for(self, tokens: int) -> int:
        """Most windows that a step with this many tokens in all can touch; known to the host."""
        if self.batch == 0 or tokens == 0:
            return 0
        return min(self.batch * self.windows_per_sequence, tokens // self.ratio + 2 * self.batch)

    @property
    def knows(self) -> str:
        """How the plan addresses the state, for error messages."""
        return next((x for x in ("state_slots", "block_tables") if getattr(self, x) is not None), "neither")

    @property
    def windows_per_sequence(self) -> int:
        """Most windows that one sequence can touch in a step."""
        return (self.max_new_tokens + self.ratio - 2) // self.ratio + 1


def owner_of(c: Compressor, plan: PlanData) -> FoldState | MeanState | WindowState | EntryCache | PlanData:
    """What remembers the calls of a layer: its state; where it has none its cache, and without that the plan."""
    if c.state is not None:
        return c.state
    return plan if c.cache is None else c.cache


# What calls read of a plan, as far as it is there, and what `update` writes.
_READ = (
    "items", "num_items", "entry_items", "cu_entries", "entry_slots", "state_slots", "snapshot_table", "start_pos",
    "cu_seqlens", "cache_block_table", "token_slots", "slots_given", "cu_rows",
)  # fmt: skip
_OWN = ("start_pos", "cu_seqlens", "cu_entries", "items", "num_items", "entry_items")


def plan_places(plan: PlanData, updating: bool = False) -> list[Place]:
    """The tensors of a plan: all but `errors` are read by calls. updating: as `update` takes them, which writes its own."""
    own = _OWN if updating else ()
    if updating and plan.fills_slots:
        own = (*own, "entry_slots")
    found = [(name, getattr(plan, name, None)) for name in _READ]
    found += [("block_tables", table) for table in plan.block_tables or ()]
    places = [Place(f"plan.{name}", x, written=name in own) for name, x in found if x is not None]
    return [Place("plan.errors", plan.errors, written=True), *places]
