"""A long step over fold rows of a `FoldState`: programs that fit the device, each of which takes work items in turn.

They are folded token by token, so a window is as long as the instructions per token: no masks, the next stretch on its way, and
two windows side by side, which share the rows of ape. Where windows are few, several programs share one.
"""

import triton
import triton.language as tl

from .finish import aim_entry, aim_slot, emit, judge_slot, load_finish
from .fold import empty_fold, fold_step, minus_zero, quotient, spread
from .items import load_item
from .pdl import load_plan, wait_for_inputs
from .prefetch import prefetch_item
from .slices import draw_ticket, is_last, leave_slice, take_slices
from .slots import check_tags, keep_fold, load_tags, places_from, retire_rows
from .snapshot import next_page_end, snapshot_fold


@triton.jit
def open_window(item, there, c0, errors, tokens, st, SPEC: tl.constexpr, SLICE: tl.constexpr):
    """Channels `[c0, c0 + SLICE)` of a window to fold: `(m, l, a)` before its first new token, where these stand, and whose."""
    c = c0 + tl.arange(0, SLICE)
    window, start, end, token, slot, entry, sequence = item
    x0 = window * SPEC.RATIO
    first = there & (window == start // SPEC.RATIO)
    held = there & (slot < st.num_slots) & (token + end - start <= tokens.count)
    slot = tl.where(held, slot, 0)
    tags = st.tags + slot * (st.ring + SPEC.HISTORY)
    state = st.rows + slot * (st.ring + SPEC.HISTORY) * (3 * SPEC.HEAD_DIM)
    h0 = tl.where(start % SPEC.RATIO == 0, start, start - 1)
    m, l, a = empty_fold(SLICE)
    if held & (h0 < start):
        x, wanted, home, spare = load_tags(tags, h0, start, st.ring, SPEC.HISTORY)
        held, moved = check_tags(x, wanted, home, spare)
        if held & first:
            place = tl.where(moved, st.ring, (start - 1) % st.ring)
            row = state + place * (3 * SPEC.HEAD_DIM) + c
            m = tl.load(row)
            l = tl.load(row + SPEC.HEAD_DIM)
            a = tl.load(row + 2 * SPEC.HEAD_DIM)
    if first & (held == 0) & (c0 == 0):
        tl.atomic_add(errors, 1)
    # Tokens of the window by their place in it; none, where the sequence cannot go on.
    begin = tl.where(held, tl.maximum(start - x0, 0), SPEC.RATIO)
    stop = tl.where(held, tl.minimum(end - x0, SPEC.RATIO), 0)
    live = tokens.kv_score + (token + x0 - start).to(tl.int64) * tokens.stride + c
    entry = tl.where(held, entry, -1)
    return m, l, a, live, begin, stop, slot, x0, start, end, entry, sequence, held & first


@triton.jit
def load_stretch(at, kv_stride, ape, left, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr):
    """Rows of ape, values and scores, as they came, of the first `left` of AHEAD tokens; `at` and `ape` point at the first."""
    biases = ()
    ks = ()
    ss = ()
    for i in tl.static_range(AHEAD):
        there = spread(i < left, SLICE)
        bias = tl.zeros((SLICE,), tl.float32)
        if ape is not None:
            bias = tl.load(ape + (i * HEAD_DIM + tl.arange(0, SLICE)), mask=there, other=0.0)
        biases = biases + (bias,)
        ks = ks + (tl.load(at, mask=there, other=minus_zero()),)
        ss = ss + (tl.load(at + HEAD_DIM, mask=there, other=float("-inf")),)
        at += kv_stride
    return biases, ks, ss


@triton.jit
def no_tokens(kv_score, AHEAD: tl.constexpr, SLICE: tl.constexpr):
    """A stretch of zeros, of the types of `load_stretch`."""
    biases = ()
    rows = ()
    for _ in tl.static_range(AHEAD):
        biases = biases + (tl.zeros((SLICE,), tl.float32),)
        rows = rows + (tl.zeros((SLICE,), kv_score.dtype.element_ty),)
    return biases, rows, rows


@triton.jit
def load_tokens_ahead(
    ats, kv_stride, ape, j0, W: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """As `load_stretch`, of tokens that are all there: without masks, which were half of a long prompt's instructions.

    Past the L1 cache, which is better used for rows of ape: 37.6 instead of 38.2 us for a prompt of 64k tokens.
    """
    biases = ()
    ks = ()
    ss = ()
    for i in tl.static_range(AHEAD):
        bias = tl.zeros((SLICE,), tl.float32)
        if ape is not None:
            bias = tl.load(ape + j0 * HEAD_DIM + (i * HEAD_DIM + tl.arange(0, SLICE)))
        biases = biases + (bias,)
        new_ats = ()
        for w in tl.static_range(W):
            ks = ks + (tl.load(ats[w], cache_modifier=".cg"),)
            ss = ss + (tl.load(ats[w] + HEAD_DIM, cache_modifier=".cg"),)
            new_ats = new_ats + (ats[w] + kv_stride,)
        ats = new_ats
    return biases, ks, ss


@triton.jit
def fold_stretches(
    ms, ls, as_, lives, lo, stretches, more, kv_stride, ape, W: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Folds `stretches` (not 0) of AHEAD tokens from place `lo` on, in W windows side by side: a row of ape is loaded once.

    Returns what it came to, and the stretch behind the last, which is loaded where there are `more` tokens.
    """
    # 1, which the compiler may know of short stretches only. Prompts of 8k, 16k and 64k: 11.4, 14.7 and 40.0 us where it knows
    # of none, 11.7, 15.7 and 38.2 where it knows of all.
    once = 1
    if AHEAD >= 16:
        once = (kv_stride >= 0).to(tl.int32)
    ats = ()
    for w in tl.static_range(W):
        ats = ats + (lives[w] + lo.to(tl.int64) * kv_stride,)
    biases, ks, ss = load_tokens_ahead(ats, kv_stride, ape, lo, W, AHEAD, HEAD_DIM, SLICE)
    for n in range(1, stretches + 1):
        # The next stretch is on its way while this one is folded; it stays as it came till then, or the loop would wait for it.
        # Behind the last one comes the last one again where there are no more, which is cheaper than a mask.
        ahead = tl.minimum(n, stretches - 1 + more) * AHEAD
        next_ats = ()
        for w in tl.static_range(W):
            next_ats = next_ats + (ats[w] + ahead.to(tl.int64) * kv_stride,)
        next_biases, next_ks, next_ss = load_tokens_ahead(next_ats, kv_stride, ape, lo + ahead, W, AHEAD, HEAD_DIM, SLICE)
        # One turn, behind which the compiler cannot move the loads above, as it else does when registers are short.
        for _ in range(0, once):
            for i in tl.static_range(AHEAD):
                new_ms = ()
                new_ls = ()
                new_as = ()
                for w in tl.static_range(W):
                    m, l, a = fold_step(
                        ms[w],
                        ls[w],
                        as_[w],
                        ks[i * W + w].to(tl.float32),
                        ss[i * W + w].to(tl.float32) + biases[i],
                    )
                    new_ms = new_ms + (m,)
                    new_ls = new_ls + (l,)
                    new_as = new_as + (a,)
                ms = new_ms
                ls = new_ls
                as_ = new_as
        biases = next_biases
        ks = next_ks
        ss = next_ss
    return ms, ls, as_, biases, ks, ss  # flat, as tuples in tuples in a tuple are beyond Triton 3.3


@triton.jit
def fold_rest(
    m, l, a, loaded, early, live, begin, stop, state, tags, x0, h0, start, end, kv_stride, ape, ring, snap,
    HOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Folds tokens from place `begin` on, and stores the rows that the state or a snapshot keeps; returns the pooled row.

    loaded: the first stretch, if it is there `early`; or None.
    """
    due = next_page_end(snap, x0 + begin)
    for j0 in range(begin, stop, HOW.AHEAD):
        # Numbers of tokens from j0 on: positions of each would be compared in 64 bits, as the compiler widens the loop's index.
        left = stop - j0
        forgotten = end - ring - x0 - j0
        j = stop - left  # a tensor also where the interpreter has an int for j0
        row = ape
        if ape is not None:
            row = ape + j * SPEC.HEAD_DIM
        at = live + j.to(tl.int64) * kv_stride
        if loaded is None:
            biases, ks, ss = load_stretch(at, kv_stride, row, left, HOW.AHEAD, SPEC.HEAD_DIM, HOW.SLICE)
        else:
            biases, ks, ss = loaded
            if (early == 0) | (j > begin):
                biases, ks, ss = load_stretch(at, kv_stride, row, left, HOW.AHEAD, SPEC.HEAD_DIM, HOW.SLICE)
        places = places_from(tags, x0 + j0, h0, start, end, ring, SPEC.HISTORY, HOW.AHEAD)
        AHEAD: tl.constexpr = HOW.AHEAD
        for i in tl.static_range(AHEAD):
            m, l, a = fold_step(m, l, a, ks[i].to(tl.float32), ss[i].to(tl.float32) + biases[i])
            x = x0 + j0 + i
            due = snapshot_fold(m, l, a, x, due, x0 + stop, snap, SPEC)  # of whole rows: step_key
            keep_fold(m, l, a, x, places[i], (i < left) & (i >= forgotten), state, tags, SPEC, HOW.SLICE)
    return quotient(a, l, HOW.TARGET.FAST_DIVISION)


@triton.jit
def fold_last(
    m, l, a, loaded, leaves, workspace, entry, c0, begin, state, tags, x0, h0, start, end, ring, HOW: tl.constexpr,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Folds the loaded stretch with which a window ends, from place `begin` on, and leaves the slice where it `leaves`.

    Then come the rows that the state keeps, which nobody waits for: their programs ended 1.2 us behind the others of a prompt,
    and 0.5 so. 4k and 8k tokens in 8.5 and 9.8 instead of 8.85 and 9.95 us.
    """
    biases, ks, ss = loaded
    ms = ()
    ls = ()
    as_ = ()
    AHEAD: tl.constexpr = HOW.AHEAD
    for i in tl.static_range(AHEAD):
        m, l, a = fold_step(m, l, a, ks[i].to(tl.float32), ss[i].to(tl.float32) + biases[i])
        ms = ms + (m,)
        ls = ls + (l,)
        as_ = as_ + (a,)
    if leaves:
        leave_slice(
            workspace, quotient(a, l, HOW.TARGET.FAST_DIVISION), entry, c0, SPEC.HEAD_DIM, HOW.SLICE, HOW.TARGET.COHERENT_STORES
        )
    forgotten = end - ring - x0 - begin
    places = places_from(tags, x0 + begin, h0, start, end, ring, SPEC.HISTORY, HOW.AHEAD)
    for i in tl.static_range(AHEAD):
        if i >= forgotten:
            keep_fold(ms[i], ls[i], as_[i], x0 + begin + i, places[i], i >= forgotten, state, tags, SPEC, HOW.SLICE)


@triton.jit
def deliver_entry(
    y, entry, position, aim, ticket, c0, scratch, plan, cache, TARGET: tl.constexpr, SLICE: tl.constexpr,
    SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Finishes and stores an entry that is there and wanted, and counts one that is refused. `aim`: of `aim_entry`.

    y: the pooled row; None where programs that share it have left their slices.
    """
    cache_slot, weight, cos, sin = aim
    deliver, refused = judge_slot(entry, cache_slot, position, plan.entry_capacity, cache, SPEC.ROPE_DIM)
    # A step that only moves the state on finishes nothing; Triton 3.6 fails on slices that nobody has a use for.
    FINISHES: tl.constexpr = (cache.rows is not None) or (cache.pages is not None)
    finish = (entry >= 0) & deliver & FINISHES
    if SLICE < SPEC.HEAD_DIM:
        if finish:
            finish = is_last(ticket, SPEC.HEAD_DIM // SLICE)
    if finish:
        if SLICE < SPEC.HEAD_DIM:
            whole = take_slices(scratch.workspace, scratch.arrivals, entry, SPEC.HEAD_DIM)
        else:
            whole = y
        emit(whole, entry, cache_slot, weight, cos, sin, cache, SPEC, FMT, TARGET)
    if (entry >= 0) & refused & (c0 == 0):
        tl.atomic_add(plan.errors, 1)


@triton.jit
def prefill_fold(
    pid, programs, plan, snap_table, tokens, st, snaps, scratch, cache, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Program `pid` of `programs` over fold rows, in units of SLICE channels of a window."""
    SLICES: tl.constexpr = SPEC.HEAD_DIM // HOW.SLICE
    FINISHES: tl.constexpr = (cache.rows is not None) or (cache.pages is not None)  # as in `deliver_entry`
    total = load_plan(plan.num_items)
    # The first items are read before the wait: the plan is older than the launch before this one.
    index = pid // SLICES
    item = load_item(plan.items, index, index < total)
    if HOW.TOGETHER == 2:
        item_1 = load_item(plan.items, index + programs, index + programs < total)
    if HOW.SLICE < SPEC.HEAD_DIM:
        # Ahead of the lines below, behind which it would come 2 us later, and with it the first tokens.
        cache_slot = aim_slot(item[5], plan)
    if HOW.PDL and HOW.SLICE < SPEC.HEAD_DIM:
        prefetch_item(item, index < total, pid % SLICES * HOW.SLICE, tokens, SPEC, HOW.SLICE)
    wait_for_inputs(HOW.PDL)
    for unit in range(pid, total * SLICES, HOW.TOGETHER * programs):
        c0 = unit % SLICES * HOW.SLICE
        biases = tokens.ape
        if tokens.ape is not None:
            biases = tokens.ape + c0
        m, l, a, live, begin, stop, slot, x0, start, end, entry, sequence, first = open_window(
            item, index < total, c0, plan.errors, tokens, st, SPEC, HOW.SLICE,
        )  # fmt: skip
        both = 0
        count = 1
        if HOW.TOGETHER == 2:
            m_1, l_1, a_1, live_1, begin_1, stop_1, slot_1, x0_1, start_1, end_1, entry_1, sequence_1, first_1 = open_window(
                item_1, index + programs < total, c0, plan.errors, tokens, st, SPEC, HOW.SLICE,
            )  # fmt: skip
            count = tl.where(index + programs < total, 2, 1)
            if snaps.rows is None:
                # As far as both go, and up to the rows that are kept.
                limit = tl.minimum(tl.minimum(stop, end - st.ring - x0), tl.minimum(stop_1, end_1 - st.ring - x0_1))
                both = tl.where(begin == begin_1, tl.maximum(limit - begin, 0) // HOW.AHEAD, 0)
                if both > 0:
                    ms, ls, as_, _biases, _ks, _ss = fold_stretches(
                        (m, m_1), (l, l_1), (a, a_1), (live, live_1), begin, both, 0, tokens.stride, biases, 2, HOW.AHEAD,
                        SPEC.HEAD_DIM, HOW.SLICE,
                    )  # fmt: skip
                    m, m_1 = ms
                    l, l_1 = ls
                    a, a_1 = as_
        for w in range(0, count):
            if HOW.TOGETHER == 2:
                if w == 1:
                    m, l, a, live, begin, stop, slot, x0, start, end, entry, sequence, first = (
                        m_1, l_1, a_1, live_1, begin_1, stop_1, slot_1, x0_1, start_1, end_1, entry_1, sequence_1, first_1
                    )  # fmt: skip
            place = begin + both * HOW.AHEAD
            early = 0
            loaded = None
            if HOW.SLICE < SPEC.HEAD_DIM:  # under way while the window is folded; whole windows have no registers to spare
                weight, cos, sin = load_finish(x0, cache, SPEC)
                aim = (cache_slot, weight, cos, sin)
                due, _refused = judge_slot(entry, cache_slot, x0, plan.entry_capacity, cache, SPEC.ROPE_DIM)
                leaves = (entry >= 0) & due & FINISHES
                ticket = draw_ticket(scratch.arrivals, entry, leaves, 8 * HOW.TARGET.THREADS_PER_WARP)
            snap = None
            if snaps.rows is not None:
                table = snap_table.pages + sequence.to(tl.int64) * snap_table.width
                snap = (table, snap_table.width, snap_table.page_size, snaps.rows, snaps.tags, snaps.count, plan.errors)
            else:
                alone = tl.maximum(tl.minimum(stop, end - st.ring - x0) - place, 0) // HOW.AHEAD
                if HOW.SLICE < SPEC.HEAD_DIM:
                    early = ((alone > 0) & (place + (alone + 1) * HOW.AHEAD <= stop)).to(tl.int32)
                    loaded = no_tokens(tokens.kv_score, HOW.AHEAD, HOW.SLICE)
                if alone > 0:
                    one_m, one_l, one_a, behind, behind_ks, behind_ss = fold_stretches(
                        (m,), (l,), (a,), (live,), place, alone, early, tokens.stride, biases, 1, HOW.AHEAD,
                        SPEC.HEAD_DIM, HOW.SLICE,
                    )  # fmt: skip
                    if HOW.SLICE < SPEC.HEAD_DIM:
                        loaded = (behind, behind_ks, behind_ss)
                    m = one_m[0]
                    l = one_l[0]
                    a = one_a[0]
                place += alone * HOW.AHEAD  # not under the condition, which Triton 3.3 fails on: a loop begins at `place`
            tags = st.tags + slot * (st.ring + SPEC.HISTORY)
            state = st.rows + slot * (st.ring + SPEC.HISTORY) * (3 * SPEC.HEAD_DIM) + c0
            h0 = tl.where(start % SPEC.RATIO == 0, start, start - 1)
            if HOW.SLICE < SPEC.HEAD_DIM:
                if (early > 0) & (place + HOW.AHEAD == stop):
                    fold_last(
                        m, l, a, loaded, leaves, scratch.workspace, entry, c0, place, state, tags, x0, h0, start, end,
                        st.ring, HOW, SPEC,
                    )  # fmt: skip
                else:
                    y = fold_rest(
                        m, l, a, loaded, early, live, place, stop, state, tags, x0, h0, start, end, tokens.stride, biases,
                        st.ring, snap, HOW, SPEC,
                    )  # fmt: skip
                    if leaves:
                        leave_slice(scratch.workspace, y, entry, c0, SPEC.HEAD_DIM, HOW.SLICE, HOW.TARGET.COHERENT_STORES)
                y = None
            else:
                # Snapshots inside a window are rare (pages that are no multiple of the ratio): all their tokens are the rest.
                y = fold_rest(
                    m, l, a, loaded, early, live, place, stop, state, tags, x0, h0, start, end, tokens.stride, biases,
                    st.ring, snap, HOW, SPEC,
                )  # fmt: skip
                ticket = None
                aim = aim_entry(entry, x0, plan, cache, SPEC)
            deliver_entry(y, entry, x0, aim, ticket, c0, scratch, plan, cache, HOW.TARGET, HOW.SLICE, SPEC, FMT)
            if first:
                x, wanted, home, spare = load_tags(tags, h0, start, st.ring, SPEC.HISTORY)
                retire_rows(tags, x, wanted, home, spare, h0, start, end, st.ring, SPEC.HISTORY)
        index = (unit + HOW.TOGETHER * programs) // SLICES
        item = load_item(plan.items, index, index < total)
        if HOW.SLICE < SPEC.HEAD_DIM:
            cache_slot = aim_slot(item[5], plan)
        if HOW.TOGETHER == 2:
            item_1 = load_item(plan.items, index + programs, index + programs < total)
