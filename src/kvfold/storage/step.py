"""The data of one step: what a plan holds, and what a call brings of one compressor. Backends are typed against these."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..arguments.checks import check_int, check_tensor, check_type, traced
from ..arguments.overlap import Place, check_apart
from ..contract import INT32_MAX, ITEM_FIELDS, MOST_ITEMS
from ..spec import CompressorSpec
from .cache import EntryCache
from .fold_state import FoldState
from .remembered import Checked, Layer, where
from .snapshots import MOST_PAGE, Snapshots
from .window_state import WindowState

# Plans in use by the address of their items, so that an operator (ops.py) can tell whose plan it was given the tensors of.
LIVE: weakref.WeakValueDictionary[int, PlanData] = weakref.WeakValueDictionary()


class Compressor(NamedTuple):
    """One compressor's part of a step, as `compress_many` takes it; the arguments are those of `compress`.

    Without a state are one whose spec has no gate, and that of a `store`, whose `kv_score` are the pooled rows.
    """

    kv_score: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    state: FoldState | WindowState | None
    cache: EntryCache | None
    spec: CompressorSpec
    ape: torch.Tensor | None
    norm_weight: torch.Tensor | None
    rope: torch.Tensor | None
    snapshots: Snapshots | None = None

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors of the step's tokens, by the names that errors have for them."""
        if isinstance(self.kv_score, torch.Tensor):
            return {"kv_score": self.kv_score}
        if not isinstance(self.kv_score, tuple) or len(self.kv_score) != 2:
            what = f"got {type(self.kv_score).__name__}"
            raise TypeError(f"kv_score must be a torch.Tensor, or a tuple of two, values and scores, {what}")
        value, score = self.kv_score
        for name, x in (("kv_score[0]", value), ("kv_score[1]", score)):
            check_type(name, x, torch.Tensor)
        return {"kv_score[0]": value, "kv_score[1]": score}

    @property
    def value(self) -> torch.Tensor:
        """The one that says dtype, device and how many tokens there are."""
        given = self.kv_score
        return given[0] if given.__class__ is tuple and given else given  # type: ignore[return-value]

    @property
    def score(self) -> torch.Tensor | None:
        """The scores, where they are a tensor of their own."""
        given = self.kv_score
        return given[1] if given.__class__ is tuple else None

    def joined(self) -> Compressor:
        """With values and scores in one tensor, which is new where they were two."""
        return self if self.score is None else self._replace(kv_score=torch.cat(self.kv_score, dim=1))

    @property
    def device(self) -> torch.device:
        return self.value.device


class Outputs(NamedTuple):
    """What `compress` writes of its entries besides their records; the arguments are its own."""

    rows: torch.Tensor | None = None
    latent: torch.Tensor | None = None


class Hits(NamedTuple):
    """What `restore` is to do, slot by slot; the arguments are its own."""

    slots: torch.Tensor
    pages: torch.Tensor
    start_pos: torch.Tensor
    errors: torch.Tensor


class PlanData(Checked):
    """The bounds and tensors of a `StepPlan`, which says what they are; an operator's plan of one call is this alone."""

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

    _launcher: Callable[..., None] | None = None  # of `update` on a GPU, made by the first one
    _layer: Layer | None = None  # what the last call of a layer with neither a state nor a cache got with this plan
    _came: tuple[int, int] | None = None  # the addresses of what the last `update` was given
    _bounds: list[int]  # what its tensors span, as `check_apart` returns it
    _where: list  # where they were

    def _allocate(self, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """Checks what `StepPlan.build` was given, which set it as attributes, and makes the plan's own tensors."""
        check_int("ratio", self.ratio, 1, 4096)
        check_int("max_new_tokens", self.max_new_tokens, 1, INT32_MAX)
        device = getattr(start_pos, "device", None)
        check_tensor("start_pos", start_pos, (None,), (torch.int32,), device, fake=True)
        batch = self.batch = start_pos.shape[0]
        check_tensor("cu_seqlens", cu_seqlens, (batch + 1,), (torch.int32,), device, fake=True)
        if self.state_slots is None and self.block_tables is None and self.ratio > 1:
            raise ValueError("state_slots or block_tables must be given, got neither")
        if self.entry_slots is not None:
            if self.cache_block_table is not None:
                raise ValueError("entry_slots and cache_block_table exclude each other, got both")
            check_tensor("entry_slots", self.entry_slots, (None,), (torch.int64,), device, fake=True)
        if self.max_tokens is None:
            self.max_tokens = INT32_MAX
        check_int("max_tokens", self.max_tokens, 0, INT32_MAX)
        self.max_tokens = min(self.max_tokens, batch * self.max_new_tokens)
        self._check_places(device)
        self._set_capacities()
        if self.cache_block_table is not None:
            self.entry_slots = torch.empty(self.entry_capacity, dtype=torch.int64, device=device)
        for name, shape in self._shapes().items():
            setattr(self, name, torch.zeros(shape, dtype=torch.int32, device=device))
        self.entry_items.fill_(-1)

    def _set_capacities(self) -> None:
        """Most work items and entries of a step; entries are those that the caller has slots for, or as many as can be."""
        batch, ratio, windows = self.batch, self.ratio, self.batch * self.windows_per_sequence
        self.item_capacity = self.items_for(self.max_tokens)
        if self.entry_slots is None:
            self.entry_capacity = min(batch * -(-self.max_new_tokens // ratio), self.max_tokens // ratio + batch)
        else:
            self.entry_capacity = self.entry_slots.shape[0]
            if self.item_capacity:
                # Lengths that overlap in kv_score, as with offsets that go back, end more windows than max_tokens can: every
                # entry that has a place then still has an item, which comes at most B behind it.
                self.item_capacity = max(self.item_capacity, min(windows, self.entry_capacity + batch))
        if windows > INT32_MAX or self.item_capacity > MOST_ITEMS:
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
        if self.entry_slots is not None or self.cache_block_table is not None:
            check_tensor("entry_slots", self.entry_slots, (self.entry_capacity,), (torch.int64,), device, fake=True)
        self._check_places(device)
        self._launcher = self._came = None
        places = plan_places(self, updating=True)
        self._bounds = check_apart(places)
        self._tensors = tuple(place.tensor for place in places)
        self._where = [] if traced(self.items) else where(self._tensors)

    def _check_places(self, device: torch.device) -> None:
        """Checks what says where snapshots and entries are, and, in one way at most, where the state is."""
        tables, batch, ints = self.block_tables, self.batch, (torch.int32,)
        named = ("cache_block_table", self.cache_block_table), ("snapshot_table", self.snapshot_table)
        paged = {name: table for name, table in named if table is not None}
        if self.state_slots is not None:
            if tables is not None:
                raise ValueError("state_slots and block_tables exclude each other, got both")
            check_tensor("state_slots", self.state_slots, (batch,), ints, device, fake=True)
        if tables is not None:
            if not isinstance(tables, tuple) or len(tables) != 2:
                raise TypeError("block_tables must be a tuple of two tensors, of value pages and of score pages")
            if self.snapshot_table is not None:
                raise ValueError("snapshot_table must be None with block_tables, whose pages are shared as they are")
            paged |= {f"block_tables[{i}]": table for i, table in enumerate(tables)}
        for name, table in paged.items():
            check_tensor(name, table, (batch, None), ints, device, fake=True)
        self._check_size("page_size", INT32_MAX, "block_tables")
        self._check_size("snapshot_page_size", MOST_PAGE, "snapshot_table")
        if self.rows_per_page is not None:
            check_int("rows_per_page", self.rows_per_page, 1, 1 << 20)
        elif self.cache_block_table is not None:
            raise ValueError("rows_per_page must be given with cache_block_table, got None")

    def _check_size(self, name: str, most: int, tables: str) -> None:
        """The size of pages is given with their tables, and not without."""
        size, there = getattr(self, name), getattr(self, tables) is not None
        if there and size is None:
            raise ValueError(f"{name} must be given with {tables}, got None")
        if not there and size is not None:
            raise ValueError(f"{name} must be None without {tables}, got {size!r}")
        if there:
            check_int(name, size, 1, most)

    def items_for(self, tokens: int) -> int:
        """Most windows that a step with this many tokens in all can touch; known to the host."""
        if self.batch == 0 or tokens == 0:
            return 0
        return min(self.batch * self.windows_per_sequence, tokens // self.ratio + 2 * self.batch)

    @property
    def knows(self) -> str:
        """What it knows of where the state is, for messages."""
        return next((x for x in ("state_slots", "block_tables") if getattr(self, x) is not None), "neither")

    @property
    def windows_per_sequence(self) -> int:
        """Most windows that one sequence can touch in a step."""
        return (self.max_new_tokens + self.ratio - 2) // self.ratio + 1


def owner_of(c: Compressor, plan: PlanData) -> FoldState | WindowState | EntryCache | PlanData:
    """What remembers the calls of a layer: its state; where it has none its cache, and without that the plan."""
    if c.state is not None:
        return c.state
    return plan if c.cache is None else c.cache


# What calls read of a plan, as far as it is there, and what `update` writes.
_READ = (
    "items", "num_items", "entry_items", "cu_entries", "entry_slots", "state_slots", "snapshot_table", "start_pos",
    "cu_seqlens", "cache_block_table",
)  # fmt: skip
_OWN = ("start_pos", "cu_seqlens", "cu_entries", "items", "num_items", "entry_items")


def plan_places(plan: PlanData, updating: bool = False) -> list[Place]:
    """The tensors of a plan: all but `errors` are read by calls. updating: as `update` takes them, which writes its own."""
    own = _OWN if updating else ()
    if updating and plan.cache_block_table is not None:
        own = (*own, "entry_slots")
    found = [(name, getattr(plan, name, None)) for name in _READ]
    found += [("block_tables", table) for table in plan.block_tables or ()]
    places = [Place(f"plan.{name}", x, written=name in own) for name, x in found if x is not None]
    return [Place("plan.errors", plan.errors, written=True), *places]
