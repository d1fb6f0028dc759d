"""What a step has no right to ask for and nobody counts: two sequences, windows or pages that are written to one place.

Programs of a launch run at once, so which of the two is kept is chance; so is what a third one reads. `kvfold.check` names it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from ..backend_torch.items import Items
from ..backend_torch.window import Pages, window_positions
from ..plan import StepPlan
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor
from ..storage.window_state import WindowState
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


def undefined_in_call(c: Compressor, plan: StepPlan) -> list[Refusal]:
    """Places that two sequences, entries or pages of a step are written to, or that one reads and another writes."""
    items, found = Items.of(plan), []
    if isinstance(c.state, FoldState):
        slots = ((slot, b, -1, f"sequence {b}") for b, slot, _, _, _ in heads(items) if slot < c.state.num_slots)
        found += _shared(slots, "state slot {}")
    elif isinstance(c.state, WindowState):
        found += _shared_rows(c, plan, items)
    if c.snapshots is not None:
        found += _shared(_snapshot_rows(c.snapshots, plan, items), "row {} of the snapshots")
    if c.cache is not None and plan.entry_slots is not None:
        found += _shared(_cache_slots(c.cache, plan, items), "cache slot {}")
    return found


def _shared(places: Iterable[tuple[int, int, int, str]], name: str) -> Iterator[Refusal]:
    """All users of a place but the first. places: each with the sequence, the window and words for its user."""
    first: dict[int, str] = {}
    for place, b, window, whose in places:
        other = first.setdefault(place, whose)
        if other != whose:
            yield Refusal(b, window, f"{name.format(place)} is also that of {other}", counted=False)


def _cache_slots(cache: EntryCache, plan: StepPlan, items: Items) -> Iterator[tuple[int, int, int, str]]:
    made = items[(items.entry >= 0) & (items.entry < plan.entry_capacity)]
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
