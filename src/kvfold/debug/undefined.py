"""What a step has no right to ask for and nobody counts: two sequences, windows or pages that are written to one place.

Programs of a launch run at once, so which of the two is kept is chance; so is what a third one reads. `kvfold.check` names it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..backend_torch.items import Items
from ..backend_torch.window import Pages, window_positions
from ..plan import StepPlan
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor
from ..storage.window_state import WindowState
from .compare import fields_of
from .refusals import Refusal, heads, sequences, snapshot_pages


def undefined_in_plan(plan: StepPlan) -> list[Refusal]:
    """Tokens that two sequences take, and windows for which the plan has no work item."""
    found, windows, taken = [], 0, []
    for b, start, token, behind, refused in sequences(plan):
        if refused:
            continue
        last = (start + behind - token - 1) // plan.ratio
        windows += last - start // plan.ratio + 1
        if windows > plan.item_capacity:
            reason = f"the step touches {windows} windows by then, and the plan has room for {plan.item_capacity}"
            first = max(last - (windows - plan.item_capacity) + 1, start // plan.ratio)
            found.append(Refusal(b, first, f"{reason}: all from here on are left out", counted=False))
        taken.append((token, behind, b))
    reach, whose = 0, -1
    for token, behind, b in sorted(taken):
        if token < reach:
            rows = f"row {token}" if min(reach, behind) == token + 1 else f"rows {token} to {min(reach, behind) - 1}"
            reason = f"its tokens, kv_score {rows}, are also those of sequence {whose}: cu_seqlens goes back"
            found.append(Refusal(b, -1, reason, counted=False))
        if behind > reach:
            reach, whose = behind, b
    return found


def undefined_in_call(c: Compressor, plan: StepPlan, room: int | None = None) -> list[Refusal]:
    """Places that two sequences, entries or pages of a step are written to, or that one reads and another writes.

    room: as of `call_refusals`.
    """
    items, found = Items.of(plan), []
    if isinstance(c.state, FoldState):
        slots = ((slot, b, -1, f"sequence {b}") for b, slot, _, _, _ in heads(items) if slot < c.state.num_slots)
        found += _shared(slots, "state slot {}")
    elif isinstance(c.state, WindowState):
        found += _shared_rows(c, plan, items)
    if c.snapshots is not None:
        found += _shared(_snapshot_rows(c.snapshots, plan, items), "row {} of the snapshots")
    if c.cache is not None and plan.entry_slots is not None:
        slots = _cache_slots(c.cache, plan, items, plan.entry_capacity if room is None else room)
        found += _shared(slots, "cache slot {}")
    return found


def undefined_between(compressors: Sequence[Compressor], plan: StepPlan) -> list[Refusal]:
    """Records of a step that lie on the state of one of its sequences, as where both are in one page of an engine."""
    items, found = Items.of(plan), []
    for i, c in enumerate(compressors):
        state, users = _state_bytes(c, plan, items)
        order = state[:, 0].argsort()
        begin, behind = state[order, 0], state[order, 1].cummax(0).values  # the furthest of all that begin before it
        for j, other in enumerate(compressors):
            if not users or other.cache is None or plan.entry_slots is None:
                continue
            records = _record_bytes(other.cache, plan, items)
            last = torch.searchsorted(begin, records[:, 1].contiguous()) - 1  # that begins before a record ends
            on = (last >= 0) & (behind[last.clamp(min=0)] > records[:, 0])
            whose = [f" of compressors[{n}]" * (len(compressors) > 1) for n in (i, j)]
            for first, end, slot, b, window in records[on].unique(dim=0).tolist():
                user = users[int(((state[:, 0] < end) & (state[:, 1] > first)).nonzero()[0])]
                reason = f"its entry goes to cache slot {slot}{whose[1]}, which lies on {user} of the state{whose[0]}"
                found.append(Refusal(b, window, reason, counted=False))
    return list(dict.fromkeys(found))


def _state_bytes(c: Compressor, plan: StepPlan, items: Items) -> tuple[torch.Tensor, list[str]]:
    """The addresses `[n, 2]` of what a step reads or writes of a state in an engine's pages, and words for each."""
    state, users = c.state, []
    spans = [torch.zeros(0, 2, dtype=torch.int64)]
    if isinstance(state, FoldState) and state.pages is not None:
        for b, slot, *_ in heads(items):
            for x in (state.rows[slot], state.positions[slot]) if slot < state.num_slots else ():
                spans.append(torch.tensor([[x.data_ptr(), x.data_ptr() + x.nbytes]]))
                users.append(f"slot {slot}, of sequence {b},")
    elif isinstance(state, WindowState):
        ratio, start, end = c.spec.ratio, items.start[:, None], items.end[:, None]
        position, old = window_positions(items, c.spec)
        new = (position >= torch.maximum(start, items.window[:, None] * ratio)) & (position < end)
        used = new | (old & (items.entry >= 0)[:, None])
        for pages in Pages.of(state, plan):
            page, _ = pages.find(items.slot[:, None], position.clamp(min=0))
            i, j = (used & (page >= 0)).nonzero(as_tuple=True)
            pool, at = pages.pool, (page[i, j], position[i, j] % state.page_size)
            first = pool.data_ptr() + pool.element_size() * (at[0] * pool.stride(0) + at[1] * pool.stride(1))
            spans.append(torch.stack((first, first + pool.element_size() * state.channels), dim=1).cpu())
            numbers = torch.stack((*at, items.sequence[i]), dim=1).tolist()
            users += [f"row {row} of page {page}, of sequence {b}," for page, row, b in numbers]
    return torch.cat(spans), users


def _record_bytes(cache: EntryCache, plan: StepPlan, items: Items) -> torch.Tensor:
    """Of each part of each record of a step: its address and the one behind it, its slot, sequence and window."""
    made = items[(items.entry >= 0) & (items.entry < plan.entry_capacity)]
    slots = plan.entry_slots[made.entry]
    inside = (slots >= 0) & (slots < cache.num_slots)
    made, slots, found = made[inside], slots[inside], []
    for (pages, page, byte), width in fields_of(cache, slots):
        first = pages.data_ptr() + page * pages.stride(0) + byte
        columns = (first, first + width, slots, made.sequence, made.window)
        found += [torch.stack(columns, dim=1)] * (width > 0)
    return torch.cat(found).cpu()


def _shared(places: Iterable[tuple[int, int, int, str]], name: str) -> Iterator[Refusal]:
    """All users of a place but the first. places: each with the sequence, the window and words for its user."""
    first: dict[int, str] = {}
    for place, b, window, whose in places:
        other = first.setdefault(place, whose)
        if other != whose:
            yield Refusal(b, window, f"{name.format(place)} is also that of {other}", counted=False)


def _cache_slots(cache: EntryCache, plan: StepPlan, items: Items, room: int) -> Iterator[tuple[int, int, int, str]]:
    made = items[(items.entry >= 0) & (items.entry < room)]
    slots = plan.entry_slots[made.entry]
    for slot, b, window in torch.stack((slots, made.sequence, made.window), dim=1).tolist():
        if 0 <= slot < cache.num_slots:
            yield slot, b, window, f"window {window} of sequence {b}"


def _snapshot_rows(snapshots: Snapshots, plan: StepPlan, items: Items) -> Iterator[tuple[int, int, int, str]]:
    for b, _, start, end, _ in heads(items):
        for k, page in snapshot_pages(snapshots, plan, b, start, end):
            if 0 <= page < snapshots.num_pages:
                yield page, b, ((k + 1) * snapshots.page_size - 1) // plan.ratio, f"page {k} of sequence {b}"


def _shared_rows(c: Compressor, plan: StepPlan, items: Items) -> Iterator[Refusal]:
    """Rows of an engine's pools that two windows write, or that one window reads and another one writes."""
    state, start = c.state, items.start[:, None]
    position, old = window_positions(items, c.spec)
    reads = old & (items.entry >= 0)[:, None]
    writes = (position >= torch.maximum(start, items.window[:, None] * c.spec.ratio)) & (position < items.end[:, None])
    if plan.ring:  # what a step would overwrite is not written, and what it reads is read before it writes
        kept = position >= items.end[:, None] - plan.ring_rows
        reads, writes = reads & kept, writes & kept
    for name, pages in zip(("kv", "score"), Pages.of(state, plan), strict=True):
        page, _ = pages.find(items.slot[:, None], position.clamp(min=0))
        row = page * state.page_size + position % state.page_size
        written, read = writes & (page >= 0), reads & (page >= 0)
        places, counts = row[written].unique(return_counts=True)
        shared = torch.cat((places[counts > 1], places[torch.isin(places, row[read])]))
        held = torch.isin(row, shared) & (written | read)
        users, told = defaultdict(list), set()
        for i, j in held.nonzero().tolist():
            users[int(row[i, j])].append((i, j))
        for i, j in (held & written).nonzero().tolist():
            if i not in told:
                told.add(i)
                other, at = next(user for user in users[int(row[i, j])] if user != (i, j))
                place = f"row {int(position[i, j]) % state.page_size} of page {int(page[i, j])} of state.{name}"
                what = f"position {int(position[other, at])} of sequence {int(items.sequence[other])}"
                reason = f"{place} is that of its position {int(position[i, j])} and of {what}"
                yield Refusal(int(items.sequence[i]), int(items.window[i]), reason, counted=False)
