"""`StepPlan`: what depends on the step and not on the layer, computed once on the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from .arguments.checks import check_eager, check_int, check_tensor, traced
from .arguments.overlap import NO_ROOM, Place, check_apart, extent, find_room
from .storage.remembered import Remembering, check_made, where
from .storage.snapshots import MOST_PAGE

ITEM_FIELDS = ("window", "start", "end", "token", "slot", "entry", "sequence", "unused")
_INT32_MAX = (1 << 31) - 1
MOST_ITEMS = (1 << 28) - 1  # kernels find an item by an int32 of its numbers
MOST_POSITIONS = 1 << 30  # of a sequence: what kernels add to a position then stays an int32

# Plans in use by the address of their items, so that an operator (ops.py) can tell whose plan it was given the tensors of.
LIVE: weakref.WeakValueDictionary[int, StepPlan] = weakref.WeakValueDictionary()


class StepPlan(Remembering):
    """Who adds which tokens in a step, and which windows that touches. Build it with `StepPlan.build`.

    Attributes:
        start_pos: int32 `[B]`, tokens that each sequence had before the step. The plan's own copy.
        cu_seqlens: int32 `[B + 1]`, offsets of each sequence's new tokens in `kv_score`. The plan's own copy.
        state_slots: int32 `[B]`, the caller's tensor; None with block tables.
        block_tables: the caller's tensors, of value and of score pages; None with state slots.
        page_size: rows per page of the state; None with state slots.
        snapshot_table: int32 `[B, S]`, the caller's tensor, or None: where the snapshots of pages go.
        snapshot_page_size: positions per page of `snapshot_table`; None without one.
        entry_slots: int64 `[E]`, cache slot of each entry: the caller's tensor, or computed from `cache_block_table`; None if
            neither was given.
        cu_entries: int32 `[B + 1]`: entry `cu_entries[b] + i` is window `start_pos[b] // ratio + i` of sequence `b`.
        items: int32 `[I, 8]`, one row for each window touched (`ITEM_FIELDS`); the first `num_items[0]` rows count. With block
            tables `slot` is the sequence index, the row of the tables.
        entry_items: int32 `[E]`, the index in `items` of each entry of the step, -1 behind the last one.
        errors: int32 `[1]`, sequences and entries refused since the caller last zeroed it (DESIGN.md, Plan).
        entry_capacity, item_capacity: E and I, known to the host.
    """

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

    _made_by = "build"
    _unchecked = ("fresh",)
    _whole = True  # an operator's plan of one call is not: it has no tensors of `update` (ops.py)

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._launcher: Callable[..., None] | None = None  # of `update` on a GPU, made by the first one
        self._came: tuple[int, int] | None = None  # the addresses of what the last `update` was given
        self._bounds: list[int] = []  # what its tensors span, as `check_apart` returns it
        self._where: list[int] = []  # where they were

    @classmethod
    def build(
        cls,
        ratio: int,
        start_pos: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_new_tokens: int,
        *,
        state_slots: torch.Tensor | None = None,
        block_tables: tuple[torch.Tensor, torch.Tensor] | None = None,
        page_size: int | None = None,
        entry_slots: torch.Tensor | None = None,
        cache_block_table: torch.Tensor | None = None,
        rows_per_page: int | None = None,
        max_tokens: int | None = None,
        snapshot_table: torch.Tensor | None = None,
        snapshot_page_size: int | None = None,
    ) -> StepPlan:
        """Plans one step for all layers whose compressor has this ratio.

        `start_pos`, `cu_seqlens`, `state_slots`, `block_tables`, `entry_slots`, `cache_block_table` and `snapshot_table` must
        be written before this call or `update`, and all but the first two, which are copied, left alone until the last call of
        the step is done.

        Args:
            ratio: tokens per window.
            start_pos: int32 `[B]`, tokens that each sequence already has; drafts are rejected by making it smaller.
            cu_seqlens: int32 `[B + 1]`, from 0, not decreasing. Equal neighbours make a sequence absent from the step.
            max_new_tokens: host bound on any sequence's new tokens.
            state_slots: int32 `[B]`, the slot of each sequence in a `FoldState`; -1 makes it absent. No two of a step share a
                slot: nothing counts that, results are undefined, and `kvfold.check` names it.
            block_tables: for a `WindowState`, instead of `state_slots`: int32 `[B, P1]` of value pages and int32 `[B, P2]` of
                score pages. Position p of a sequence is row `p % page_size` of page `table[b, p // page_size]`; -1 where there
                is no page.
            page_size: with `block_tables`: positions per page.
            entry_slots: int64 `[E]`, the cache slot for each entry of the step, in the order of `cu_entries`; -1 drops it.
            cache_block_table: int32 `[B, Q]`, instead of `entry_slots`: entry w of a sequence is row `w % rows_per_page` of
                page `table[b, w // rows_per_page]`; a page of -1 drops the entry.
            rows_per_page: with `cache_block_table`: entries per page, the same as the cache's.
            max_tokens: host bound on the new tokens of all sequences together (default `B * max_new_tokens`); it sizes
                the plan, so give it when one prompt is long and the rest are short.
            snapshot_table: int32 `[B, S]`: page k of a sequence, which has positions `[k, k + 1) * snapshot_page_size`, leaves
                its snapshot in row `table[b, k]` of the `Snapshots` that a call gets; -1 or a page beyond S leaves none. No two
                pages of a step leave it in the same row.
            snapshot_page_size: with `snapshot_table`: positions per page.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_int("ratio", ratio, 1, 4096)
        check_int("max_new_tokens", max_new_tokens, 1, _INT32_MAX)
        device = getattr(start_pos, "device", None)
        check_tensor("start_pos", start_pos, (None,), (torch.int32,), device, fake=True)
        batch = start_pos.shape[0]
        check_tensor("cu_seqlens", cu_seqlens, (batch + 1,), (torch.int32,), device, fake=True)
        if state_slots is None and block_tables is None:
            raise ValueError("state_slots or block_tables must be given, got neither")
        if entry_slots is not None:
            if cache_block_table is not None:
                raise ValueError("entry_slots and cache_block_table exclude each other, got both")
            check_tensor("entry_slots", entry_slots, (None,), (torch.int64,), device, fake=True)
        if max_tokens is not None:
            check_int("max_tokens", max_tokens, 0, _INT32_MAX)
        most = min(batch * max_new_tokens, _INT32_MAX)

        plan = cls()
        plan.ratio, plan.max_new_tokens, plan.batch = ratio, max_new_tokens, batch
        plan.max_tokens = most if max_tokens is None else min(max_tokens, most)
        plan.state_slots, plan.block_tables, plan.page_size = state_slots, block_tables, page_size
        plan.cache_block_table, plan.rows_per_page = cache_block_table, rows_per_page
        plan.snapshot_table, plan.snapshot_page_size = snapshot_table, snapshot_page_size
        plan._check_places(device)
        plan._set_capacities(None if entry_slots is None else entry_slots.shape[0])
        if cache_block_table is not None:
            entry_slots = torch.empty(plan.entry_capacity, dtype=torch.int64, device=device)
        plan.entry_slots = entry_slots
        plan.start_pos = torch.empty_like(start_pos)
        plan.cu_seqlens = torch.empty_like(cu_seqlens)
        plan.cu_entries = torch.zeros_like(cu_seqlens)
        plan.items = torch.zeros(plan.item_capacity, len(ITEM_FIELDS), dtype=torch.int32, device=device)
        plan.num_items = torch.zeros(1, dtype=torch.int32, device=device)
        plan.entry_items = torch.full((plan.entry_capacity,), -1, dtype=torch.int32, device=device)
        plan.errors = torch.zeros(1, dtype=torch.int32, device=device)
        plan.update(start_pos, cu_seqlens)
        if plan.item_capacity and not traced(plan.items):  # without items there is no address
            LIVE[plan.items.data_ptr()] = plan
        return plan

    def _set_capacities(self, entries: int | None) -> None:
        """Most work items and entries of a step. entries: those that the caller has slots for; None: as many as can be."""
        batch, ratio = self.batch, self.ratio
        self.item_capacity = self.items_for(self.max_tokens)
        if entries is None:
            self.entry_capacity = min(batch * -(-self.max_new_tokens // ratio), self.max_tokens // ratio + batch)
        else:
            self.entry_capacity = entries
            if self.item_capacity:
                # Lengths that overlap in kv_score, as with offsets that go back, end more windows than max_tokens can: every
                # entry that has a place then still has an item, which comes at most B behind it.
                enough = min(batch * self.windows_per_sequence, entries + batch)
                self.item_capacity = max(self.item_capacity, enough)
        if batch * self.windows_per_sequence > _INT32_MAX or self.item_capacity > MOST_ITEMS:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and max_tokens={self.max_tokens} must mean at most {MOST_ITEMS} windows "
                f"of {ratio} in {batch} sequences"
            )

    def _check(self) -> None:
        for name in ("ratio", "max_new_tokens", "batch", "entry_capacity", "item_capacity", *["max_tokens"] * self._whole):
            check_int(name, getattr(self, name), 0, _INT32_MAX)
        device, ints = getattr(self.items, "device", None), (torch.int32,)
        shapes = {"items": (self.item_capacity, len(ITEM_FIELDS)), "num_items": (1,), "errors": (1,)}
        if self._whole:
            shapes |= {"start_pos": (self.batch,), "cu_seqlens": (self.batch + 1,)}
        if self._whole or self.block_tables is not None:
            shapes |= {"cu_entries": (self.batch + 1,), "entry_items": (self.entry_capacity,)}
        for name, shape in shapes.items():
            check_tensor(name, getattr(self, name), shape, ints, device, fake=True)
        if self.entry_slots is not None or self.cache_block_table is not None:
            check_tensor("entry_slots", self.entry_slots, (self.entry_capacity,), (torch.int64,), device, fake=True)
        self._check_places(device)
        self._forget()
        places = plan_places(self, updating=True)
        self._bounds = check_apart(places)
        self._tensors = tuple(place.tensor for place in places)
        self._where = [] if traced(self.items) else where(self._tensors)

    def _watch(self) -> tuple[torch.Tensor, ...]:
        """None on a GPU, where `update` looks for them once for all layers of the step."""
        return () if self.items.is_cuda else self._tensors

    def _check_places(self, device: torch.device) -> None:
        """Checks what says where state, snapshots and entries are."""
        self._check_state(device)
        if self.cache_block_table is not None:
            check_tensor("cache_block_table", self.cache_block_table, (self.batch, None), (torch.int32,), device, fake=True)
            if self.rows_per_page is None:
                raise ValueError("rows_per_page must be given with cache_block_table, got None")
        if self.rows_per_page is not None:
            check_int("rows_per_page", self.rows_per_page, 1, 1 << 20)
        if self.snapshot_table is not None:
            if self.block_tables is not None:
                raise ValueError("snapshot_table must be None with block_tables, whose pages are shared as they are")
            check_tensor("snapshot_table", self.snapshot_table, (self.batch, None), (torch.int32,), device, fake=True)
            if self.snapshot_page_size is None:
                raise ValueError("snapshot_page_size must be given with snapshot_table, got None")
            check_int("snapshot_page_size", self.snapshot_page_size, 1, MOST_PAGE)
        elif self.snapshot_page_size is not None:
            raise ValueError(f"snapshot_page_size must be None without snapshot_table, got {self.snapshot_page_size!r}")

    def _check_state(self, device: torch.device) -> None:
        """Checks that the plan is told, in one way at most, where the sequences keep their state."""
        tables = self.block_tables
        if self.state_slots is not None:
            if tables is not None:
                raise ValueError("state_slots and block_tables exclude each other, got both")
            check_tensor("state_slots", self.state_slots, (self.batch,), (torch.int32,), device, fake=True)
        if tables is None:
            if self.page_size is not None:
                raise ValueError(f"page_size must be None without block_tables, got {self.page_size!r}")
            return
        if not isinstance(tables, tuple) or len(tables) != 2:
            raise TypeError("block_tables must be a tuple of two tensors, of value pages and of score pages")
        for i, table in enumerate(tables):
            check_tensor(f"block_tables[{i}]", table, (self.batch, None), (torch.int32,), device, fake=True)
        if self.page_size is None:
            raise ValueError("page_size must be given with block_tables, got None")
        check_int("page_size", self.page_size, 1, _INT32_MAX)

    def items_for(self, tokens: int) -> int:
        """Most windows that a step with this many tokens in all can touch; known to the host."""
        if self.batch == 0 or tokens == 0:
            return 0
        return min(self.batch * self.windows_per_sequence, tokens // self.ratio + 2 * self.batch)

    @property
    def windows_per_sequence(self) -> int:
        """Most windows that one sequence can touch in a step."""
        return (self.max_new_tokens + self.ratio - 2) // self.ratio + 1

    def update(self, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """Plans another step in place: same batch size and bounds, other lengths, slots and pages.

        Runs on the device without synchronizing, so it can be captured in a CUDA graph. What `build` was given is read again:
        write new contents into `state_slots` or `block_tables`, `entry_slots` or `cache_block_table`, and `snapshot_table`
        before the call, and leave them until the last call of the step is done. Data that makes no sense is counted in
        `errors`.

        Args:
            start_pos: int32 `[B]`; cu_seqlens: int32 `[B + 1]`, as for `build`. Copied, so free again after the call.
        """
        if traced(start_pos):
            from . import ops

            ops.update(self, start_pos, cu_seqlens)
        else:
            self.run_update(start_pos, cu_seqlens)

    def run_update(self, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """`update` of real tensors: straight to the launch."""
        check_made("plan", self, StepPlan)
        if self._where != where(self._tensors):
            self._validate()
        device = self.start_pos.device
        check_tensor("start_pos", start_pos, (self.batch,), (torch.int32,), device)
        check_tensor("cu_seqlens", cu_seqlens, (self.batch + 1,), (torch.int32,), device)
        came = start_pos.data_ptr(), cu_seqlens.data_ptr()
        if came != self._came:
            self._check_apart(start_pos, cu_seqlens)
            self._came = came
        if self.batch == 0:
            self.cu_seqlens.copy_(cu_seqlens)
        elif self.start_pos.is_cuda:
            self.fresh = True
            from .backend_triton.launch import update_on_gpu  # one launch; the same values, see tests/test_plan.py

            update_on_gpu(self, start_pos, cu_seqlens)
        else:
            check_eager("start_pos")
            self._update(start_pos, cu_seqlens)

    def _check_apart(self, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """What `update` reads must not be what it writes, but for the plan's own copies under their names."""
        own = [("start_pos", start_pos), ("cu_seqlens", cu_seqlens)]
        for name, x in own:
            if x.data_ptr() != getattr(self, name).data_ptr() and find_room(self._bounds, *extent(x)) == NO_ROOM:
                check_apart([*plan_places(self, updating=True), Place(name, x)])

    @torch.inference_mode()
    def _update(self, start_pos: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        """`update` in plain torch, which defines what the kernel must compute."""
        self.start_pos.copy_(start_pos)
        self.cu_seqlens.copy_(cu_seqlens)
        ratio, device = self.ratio, self.start_pos.device
        start, offsets = self.start_pos.long(), self.cu_seqlens.long()
        token, length = offsets[:-1], offsets[1:] - offsets[:-1]
        end = start + length
        # With block tables a sequence is its own slot, which is never absent and never wrong.
        slots = torch.arange(self.batch, device=device) if self.state_slots is None else self.state_slots
        absent = (slots == -1) | (length == 0)
        wrong = ~absent & (
            (slots < -1)
            | (start < 0)
            | (length < 0)
            | (length > self.max_new_tokens)
            | (token < 0)
            | (token + length > self.max_tokens)
            | (end > MOST_POSITIONS)
        )
        live = ~(absent | wrong)
        first = start.div(ratio, rounding_mode="floor")
        windows = torch.where(live, (end - 1).div(ratio, rounding_mode="floor") - first + 1, 0)
        entries = torch.where(live, end.div(ratio, rounding_mode="floor") - first, 0)
        self.cu_entries[1:] = entries.cumsum(0)
        cu_items = windows.cumsum(0)
        self.num_items.copy_(cu_items[-1:].clamp(max=self.item_capacity))
        self.errors.add_(wrong.sum().int())

        index = torch.arange(self.item_capacity, device=device)
        sequence = torch.searchsorted(cu_items, index, right=True).clamp(max=self.batch - 1)
        ordinal = index - (cu_items - windows)[sequence]
        window = first[sequence] + ordinal
        entry = torch.where((window + 1) * ratio <= end[sequence], self.cu_entries.long()[sequence] + ordinal, -1)
        fields = (window, start[sequence], end[sequence], token[sequence], slots[sequence], entry, sequence)
        used = index < self.num_items
        for column, values in enumerate(fields):
            # Kernels look at an item before they know that it counts.
            self.items[:, column] = torch.where(used, values, 0).int()
        known = used & (entry >= 0) & (entry < self.entry_capacity)
        found = torch.full((self.entry_capacity + 1,), -1, dtype=torch.int32, device=device)  # its last is for the others
        found[torch.where(known, entry, self.entry_capacity)] = index.int()
        self.entry_items.copy_(found[:-1])
        if self.cache_block_table is not None:
            self._fill_entry_slots(first, entries)

    def _fill_entry_slots(self, first: torch.Tensor, entries: torch.Tensor) -> None:
        table, rows = self.cache_block_table, self.rows_per_page
        assert table is not None and rows is not None and self.entry_slots is not None
        if table.shape[1] == 0:
            self.entry_slots.fill_(-1)
            self.errors.add_(self.cu_entries[-1:])
            return
        ends = self.cu_entries[1:].long()
        index = torch.arange(self.entry_capacity, device=table.device)
        sequence = torch.searchsorted(ends, index, right=True)
        used = sequence < self.batch
        sequence = sequence.clamp(max=self.batch - 1)
        window = first[sequence] + index - (ends - entries)[sequence]
        column = window.div(rows, rounding_mode="floor")
        held = used & (column < table.shape[1])
        page = table[sequence, column.clamp(0, table.shape[1] - 1)].long()
        self.entry_slots.copy_(torch.where(held & (page >= 0), page * rows + window % rows, -1))
        self.errors.add_((used & ((column >= table.shape[1]) | (page < -1))).sum().int())


READ = ("items", "num_items", "entry_items", "cu_entries", "entry_slots", "state_slots", "snapshot_table")
OWN = ("start_pos", "cu_seqlens", "cu_entries", "items", "num_items", "entry_items")


def plan_places(plan: StepPlan, updating: bool = False) -> list[Place]:
    """The tensors of a plan: all but `errors` are read by calls. updating: as `update` takes them, which writes its own."""
    names = (*READ, "start_pos", "cu_seqlens", "cache_block_table") if plan._whole else READ
    own = OWN if updating else ()
    if updating and plan._whole and plan.cache_block_table is not None:
        own = (*own, "entry_slots")
    found = [(name, getattr(plan, name, None)) for name in names]
    found += [("block_tables", table) for table in plan.block_tables or ()]
    places = [Place(f"plan.{name}", x, written=name in own) for name, x in found if x is not None]
    return [Place("plan.errors", plan.errors, written=True), *places]
