"""A long step over input rows of a `FoldState`: programs that fit the device, each of which takes work items in turn.

A window is short, and all warps decode the item and finish the entry, so fewer warps are faster.
"""

import triton
import triton.language as tl

from .finish import aim_slot, load_finish
from .items import dealt_items, draw_item, item_after, load_item, next_index, pause
from .long_fold import deliver_entry
from .pdl import load_plan, wait_for_inputs
from .prefetch import prefetch_item
from .rows import keep_each, load_biases, pool_window
from .slots import check_tags, load_tags, retire_rows
from .snapshot import snapshot_rows


@triton.jit
def rows_item(
    item, biases, plan, snap_table, tokens, st, snaps, cache, LIVE: tl.constexpr, TARGET: tl.constexpr, SPEC: tl.constexpr,
    AHEAD: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """One work item. LIVE: whether windows all of whose rows are live are many, and have instructions of their own."""
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    SAME: tl.constexpr = st.rows.dtype.element_ty == tokens.kv_score.dtype.element_ty
    window, start, end, token, slot, entry, sequence = item
    first = window == start // SPEC.RATIO
    held = (slot < st.num_slots) & (token + end - start <= tokens.count)
    tags = st.tags + slot * (st.ring + SPEC.HISTORY)
    state = st.rows + slot * (st.ring + SPEC.HISTORY) * (2 * CHANNELS)
    live = tokens.kv_score + (token - start).to(tl.int64) * tokens.stride
    h0 = tl.maximum(start // SPEC.RATIO - SPEC.OVERLAP, 0) * SPEC.RATIO
    if held & (h0 < start):
        x, wanted, home, spare = load_tags(tags, h0, start, st.ring, SPEC.HISTORY)
        held, _moved = check_tags(x, wanted, home, spare)
    if first & (held == 0):
        tl.atomic_add(plan.errors, 1)
    if held:
        if entry >= 0:
            # Under way while the window is folded, which has no registers to spare for the rest of `aim_entry`.
            cache_slot = aim_slot(entry, plan)
            if not LIVE or (window - SPEC.OVERLAP) * SPEC.RATIO < start:
                y = pool_window(
                    live, tokens.stride, tokens.ape, biases, state, tags, window, start, st.ring, None, "find", SAME,
                    SPEC, AHEAD, TARGET,
                )  # fmt: skip
            else:
                y = pool_window(
                    live, tokens.stride, tokens.ape, biases, state, tags, window, start, st.ring, None, "live", SAME,
                    SPEC, AHEAD, TARGET,
                )  # fmt: skip
            weight, cos, sin = load_finish(window * SPEC.RATIO, cache, SPEC)
            deliver_entry(
                y, entry, window * SPEC.RATIO, (cache_slot, weight, cos, sin), None, 0, None, plan, cache, TARGET,
                SPEC.HEAD_DIM, SPEC, FMT,
            )  # fmt: skip
        begin = tl.maximum(start, window * SPEC.RATIO)
        stop = tl.minimum(end, window * SPEC.RATIO + SPEC.RATIO)
        oldest = tl.maximum(begin, end - st.ring)
        if oldest < stop:
            # All that a window of ratio 4 has: its program is the last one of a prompt. With snapshots, 4 would spill.
            KEPT: tl.constexpr = 4 if snaps.rows is None else 2
            keep_each(
                live,
                tokens.stride,
                state,
                tags,
                oldest,
                h0,
                start,
                stop,
                end,
                st.ring,
                SPEC.HISTORY,
                CHANNELS,
                KEPT,
            )
        if snaps.rows is not None:
            table = snap_table.pages + sequence.to(tl.int64) * snap_table.width
            snap = (table, snap_table.width, snap_table.page_size, snaps.rows, snaps.tags, snaps.count, plan.errors)
            snapshot_rows(live, tokens.stride, window, begin, stop, snap, SPEC.RATIO, CHANNELS)
        if first:
            x, wanted, home, spare = load_tags(tags, h0, start, st.ring, SPEC.HISTORY)
            retire_rows(tags, x, wanted, home, spare, h0, start, end, st.ring, SPEC.HISTORY)


@triton.jit
def prefill_rows(
    pid, programs, plan, snap_table, tokens, st, snaps, arrivals, cache, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Program `pid` of `programs`."""
    # Where not all rows of a window are under way at once there are registers for the next item: sequences of a window or two,
    # beside a prompt, then find theirs there.
    ITEM_AHEAD: tl.constexpr = HOW.AHEAD < SPEC.RATIO * (1 + SPEC.OVERLAP)
    total = load_plan(plan.num_items)
    biases = None
    # Wider, they would take 64 registers of 128, and are read from the L1 cache for each window instead.
    if HOW.AHEAD >= SPEC.RATIO * (1 + SPEC.OVERLAP) and SPEC.HEAD_DIM <= 256:
        biases = load_biases(tokens.ape, 0, total > 0, SPEC, HOW.AHEAD)
    item = load_item(plan.items, pid, pid < total)
    if HOW.PDL and ITEM_AHEAD:
        # 1k and 2k tokens in 4.5 and 5.6 us, and without it in 5.2 and 6.2, as these leave half of an H200 to the next launch.
        # Of more windows only programs that begin last, when the launch before reads no more: 4k and 8k 7.9 and 13.7 instead of
        # 8.6 and 14.1. All of them, beside what is still read: 9.6 and 15.7.
        if (total <= 594) | (pid >= 924):
            prefetch_item(item, pid < total, 0, tokens, SPEC, SPEC.HEAD_DIM)
    wait_for_inputs(HOW.PDL)
    if HOW.TARGET.INLINE_PTX and ITEM_AHEAD:
        # Where programs have two windows, half of those of a multiprocessor begin 1.8 us later: else all wait for memory at the
        # same time, and then memory for all. 5k, 8k and 9k tokens in 9.2, 11.7 and 15.8 instead of 9.9, 12.8 and 16.8 us; with
        # 1.2 or 2.5 us a third or two thirds of that. Not where the first window has old rows to look for.
        window, start, _end, _token, _slot, entry, _sequence = item
        twice = (total > programs) & (total <= 2 * programs)
        if twice & (entry >= 0) & ((window - SPEC.OVERLAP) * SPEC.RATIO >= start):
            pause(pid // 132 % 2 * 3600)
    dealt = dealt_items(total, programs)
    index = pid
    while index < total:
        after = index + programs
        if ITEM_AHEAD:
            next_item = load_item(plan.items, after, after < total)
        if arrivals is not None:
            drawn, ticket = draw_item(arrivals, after, dealt, total)
        rows_item(item, biases, plan, snap_table, tokens, st, snaps, cache, True, HOW.TARGET, SPEC, HOW.AHEAD, FMT)
        if arrivals is not None:
            after = next_index(arrivals, drawn, ticket, after, dealt, total, programs)
        if ITEM_AHEAD:
            item = next_item
        else:
            item = item_after(item, plan.items, after, after - index, total, SPEC.RATIO)
        index = after
