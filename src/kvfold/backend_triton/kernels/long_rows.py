"""A long step over input rows of a `FoldState`: programs that fit the device, each of which takes work items in turn.

A window is short, and all warps decode the item and finish the entry, so fewer warps are faster.
"""

import triton
import triton.language as tl

from ..args import Kept, Tokens
from .finish import entry_slot, load_finish
from .items import dealt_items, draw_item, item_after, load_item, next_index, pause
from .long_fold import deliver_entry
from .pdl import load_plan, wait_for_inputs
from .places import is_kept, look_up
from .prefetch import prefetch_item
from .rows import keep_window, load_biases, pool_window
from .slots import sequence_of
from .snapshot import snap_of, snapshot_rows
from .tokens import apart_from
from .vectors import scalar


@triton.jit
def take_item(
    item, biases, plan, snap_table, one, LIVE: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr
):
    """One work item. LIVE: whether windows without old rows are frequent, and get code of their own."""
    tokens, st, snaps, _scratch, cache = one
    window, start, end, token, slot, entry, sequence = item
    first = window == start // SPEC.RATIO
    held = (slot < st.num_slots) & (token + end - start <= tokens.count)
    live = tokens.kv_score + (token - start).to(tl.int64) * tokens.stride
    apart = apart_from(tokens, token - start)
    tokens = Tokens(tokens.kv_score, tokens.stride, tokens.count, tokens.ape, apart, tokens.skew)
    seq = sequence_of(st, slot, start, end, SPEC)
    kept = Kept(scalar(-1), scalar(-1), scalar(-1))
    if held & (seq.h0 < start):
        held, kept = look_up(seq, SPEC)
    if first & (held == 0):
        tl.atomic_add(plan.errors, 1)
    if held:
        if entry >= 0:
            # Loaded while the window is folded, which has no registers to spare for the rest of `entry_address`.
            cache_slot = entry_slot(entry, plan)
            if not LIVE or (window - SPEC.OVERLAP) * SPEC.RATIO < start:
                lo = tl.where(first, kept.before, kept.lo)
                y = pool_window(live, tokens, biases, seq, window, lo, kept.hi, "old", HOW, SPEC)
            else:
                y = pool_window(live, tokens, biases, seq, window, None, None, "live", HOW, SPEC)
            weight, cos, sin = load_finish(window * SPEC.RATIO, cache, SPEC)
            needs = (cache_slot, weight, cos, sin)
            deliver_entry(
                y, entry, window * SPEC.RATIO, needs, None, 0, None, plan, cache, HOW.TARGET, SPEC.HEAD_DIM, SPEC, FMT,
            )  # fmt: skip
        begin = tl.maximum(start, window * SPEC.RATIO)
        stop = tl.minimum(end, window * SPEC.RATIO + SPEC.RATIO)
        if is_kept(seq, window, SPEC):
            # All rows of a window of ratio 4, as a prompt waits for its last program; with snapshots, 4 would spill.
            COUNT: tl.constexpr = 4 if snaps.rows is None else 2
            keep_window(live, tokens, seq, window, begin, stop, SPEC, COUNT)
        if snaps.rows is not None:
            snap = snap_of(sequence, snap_table, snaps, plan)
            snapshot_rows(live, tokens, window, begin, stop, snap, SPEC)


@triton.jit
def long_rows_step(pid, programs, plan, snap_table, one, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Program `pid` of `programs`."""
    tokens = one.tokens
    arrivals = one.scratch.arrivals
    # Where not all rows of a window are loaded at once there are registers for the next item: sequences of a window or two,
    # beside a prompt, then find theirs there.
    ITEM_AHEAD: tl.constexpr = HOW.AHEAD < SPEC.RATIO * (1 + SPEC.OVERLAP)
    total = load_plan(plan.num_items)
    biases = None
    # Of wider entries they would take half of the registers, and are read from the L1 cache for each window instead.
    if HOW.AHEAD >= SPEC.RATIO * (1 + SPEC.OVERLAP) and SPEC.HEAD_DIM <= 256:
        biases = load_biases(tokens.ape, 0, total > 0, SPEC, HOW.AHEAD)
    item = load_item(plan.items, pid, pid < total)
    if HOW.PDL and ITEM_AHEAD:
        # All programs of a short prompt, which leaves room for the next launch; of a longer one only those that begin last,
        # when the launch before reads no more (docs/notes/0023).
        FEW: tl.constexpr = HOW.MULTIPROCESSORS * 9 // 2
        LAST: tl.constexpr = HOW.MULTIPROCESSORS * 7
        if (total <= FEW) | (pid >= LAST):
            prefetch_item(item, pid < total, 0, tokens, SPEC, SPEC.HEAD_DIM)
    wait_for_inputs(HOW.PDL)
    if HOW.TARGET.INLINE_PTX and ITEM_AHEAD:
        # Where programs have two windows, half of those of a multiprocessor begin later, so that loading and folding overlap
        # (docs/notes/0023). Not where the first window has old rows to look for.
        twice = (total > programs) & (total <= 2 * programs)
        if twice & (item.entry >= 0) & ((item.window - SPEC.OVERLAP) * SPEC.RATIO >= item.start):
            pause(pid // HOW.MULTIPROCESSORS % 2 * 3600)
    dealt = dealt_items(total, programs)
    index = pid
    while index < total:
        after = index + programs
        if ITEM_AHEAD:
            next_item = load_item(plan.items, after, after < total)
        if arrivals is not None:
            drawn, ticket = draw_item(arrivals, after, dealt, total)
        take_item(item, biases, plan, snap_table, one, True, HOW, SPEC, FMT)
        if arrivals is not None:
            after = next_index(arrivals, drawn, ticket, after, dealt, total, programs)
        if ITEM_AHEAD:
            item = next_item
        else:
            item = item_after(item, plan.items, after, after - index, total, SPEC.RATIO)
        index = after
