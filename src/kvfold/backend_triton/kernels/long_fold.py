"""A long step over fold rows of a `FoldState`: programs that fit the device, each of which takes work items in turn.

A window is folded token by token, so its time is the instructions per token: hence no masks, the next stretch loaded ahead,
and two windows side by side, which share the rows of ape. Where windows are few, several programs share one.
"""

import triton
import triton.language as tl

from ..args import Opened, Tokens
from .finish import emit, entry_address, entry_slot, load_finish, slot_valid
from .fold import empty_fold, fold_step, minus_zero, quotient, spread
from .items import load_item
from .memory import in_turn, load_blocks, move_blocks
from .pdl import load_plan, wait_for_inputs
from .prefetch import prefetch_item
from .slices import draw_ticket, is_last, leave_slice, take_slices
from .slots import check_history, keep_fold, last_home, load_history, places_from, retire_row, sequence_of
from .snapshot import next_page_end, snap_of, snapshot_fold
from .tokens import apart_from, gap_of


@triton.jit
def open_window(item, there, c0, errors, tokens, st, SPEC: tl.constexpr, SLICE: tl.constexpr):
    """Channels `[c0, c0 + SLICE)` of a window to fold: `(m, l, a)` before its first new token, and where its tokens stand."""
    c = c0 + tl.arange(0, SLICE)
    window, start, end, token, slot, entry, sequence = item
    x0 = window * SPEC.RATIO
    first = there & (window == start // SPEC.RATIO)
    held = there & (slot < st.num_slots) & (token + end - start <= tokens.count)
    slot = tl.where(held, slot, 0)
    seq = sequence_of(st, slot, start, end, SPEC)
    m, l, a = empty_fold(SLICE)
    if held & (seq.h0 < start):
        last = last_home(seq)
        held, moved = check_history(load_history(seq, last), seq)
        if held & first:
            place = tl.where(moved, st.ring, last)
            row = seq.rows + place * (3 * SPEC.HEAD_DIM) + c
            m = tl.load(row)
            l = tl.load(row + SPEC.HEAD_DIM)
            a = tl.load(row + 2 * SPEC.HEAD_DIM)
    if first & (held == 0) & (c0 == 0):
        tl.atomic_add(errors, 1)
    # Tokens of the window by their place in it; none, where the sequence cannot go on.
    begin = tl.where(held, tl.maximum(start - x0, 0), SPEC.RATIO)
    stop = tl.where(held, tl.minimum(end - x0, SPEC.RATIO), 0)
    live = tokens.kv_score + (token + x0 - start).to(tl.int64) * tokens.stride + c
    apart = apart_from(tokens, token + x0 - start)
    entry = tl.where(held, entry, -1)
    return m, l, a, Opened(live, apart, begin, stop, slot, x0, start, end, entry, sequence, held & first)


@triton.jit
def load_stretch(at, apart, tokens, ape, left, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr):
    """Rows of ape, values and scores, unconverted, of the first `left` of AHEAD tokens; addresses are those of the first."""
    theres = ()
    twice = ()
    ats = ()
    for i in tl.static_range(AHEAD):
        there = spread(i < left, SLICE)
        theres = theres + (there,)
        twice = twice + (there, there)
        ats = ats + (at, at + gap_of(apart, tokens.skew, i, HEAD_DIM))
        at += tokens.stride
    biases = load_ape(ape, theres, AHEAD, HEAD_DIM, SLICE)
    ks, ss = in_turn(load_blocks(ats, twice, (minus_zero(), float("-inf")) * AHEAD))
    return biases, ks, ss


@triton.jit
def load_ape(ape, theres, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr, SLICE: tl.constexpr):
    """AHEAD rows of ape, which points at the first; zeros without ape. theres: whether each row is there, or None for all."""
    ats = ()
    rows = ()
    for i in tl.static_range(AHEAD):
        row = tl.zeros((SLICE,), tl.float32)
        if ape is not None:
            at = ape + (i * HEAD_DIM + tl.arange(0, SLICE))
            ats = ats + (at,)
            if SLICE > 512:  # 8 channels to a thread
                row = tl.load(at) if theres is None else tl.load(at, theres[i], 0.0)
        rows = rows + (row,)
    if SLICE <= 512 and ape is not None:
        rows = load_blocks(ats, theres, (0.0,) * AHEAD)
    return rows


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
def load_tokens_ahead(ats, windows, tokens, j0, HOW: tl.constexpr, SPEC: tl.constexpr):
    """As `load_stretch`, for tokens that are all there: without masks, which were half of a long prompt's instructions.

    ats, windows: one of each window. j0: the first token's place; `ape` points at place 0, and `apart` counts from there.

    Loads past the L1 cache, which is better used for rows of ape.
    """
    AHEAD: tl.constexpr = HOW.AHEAD
    both = ()
    for i in tl.static_range(AHEAD):
        for w in tl.static_range(len(ats)):
            both = both + (ats[w], ats[w] + gap_of(windows[w].apart, tokens.skew, j0 + i, SPEC.HEAD_DIM))
        ats = move_blocks(ats, tokens.stride)
    ape = None if tokens.ape is None else tokens.ape + j0 * SPEC.HEAD_DIM
    biases = load_ape(ape, None, AHEAD, SPEC.HEAD_DIM, HOW.SLICE)
    ks, ss = in_turn(load_blocks(both, None, None, PAST_L1=True))
    return biases, ks, ss


@triton.jit
def fold_stretches(ms, ls, as_, windows, lo, stretches, more, tokens, HOW: tl.constexpr, SPEC: tl.constexpr):
    """Folds `stretches` (at least 1) of AHEAD tokens from place `lo` on, in all of `windows` side by side: ape is loaded once.

    Returns the folds, and the next stretch, which is loaded if there are `more` tokens.
    """
    AHEAD: tl.constexpr = HOW.AHEAD
    W: tl.constexpr = len(windows)
    # 1, which the compiler may not know where stretches are long (docs/notes/0021).
    once = (tokens.stride >= 0).to(tl.int32) if AHEAD >= 16 else 1
    ats = ()
    for w in tl.static_range(W):
        ats = ats + (windows[w].live + lo.to(tl.int64) * tokens.stride,)
    biases, ks, ss = load_tokens_ahead(ats, windows, tokens, lo, HOW, SPEC)
    for n in range(1, stretches + 1):
        # The next stretch is loaded while this one is folded, and converted only then, or the loop would wait for it.
        # Past the end, reload the last stretch: cheaper than a mask.
        ahead = tl.minimum(n, stretches - 1 + more) * AHEAD
        next_ats = ()
        for w in tl.static_range(W):
            next_ats = next_ats + (ats[w] + ahead.to(tl.int64) * tokens.stride,)
        next_biases, next_ks, next_ss = load_tokens_ahead(next_ats, windows, tokens, lo + ahead, HOW, SPEC)
        # A loop of one turn, as the compiler moves no load behind a loop; without it, it does when registers are short.
        for _ in range(0, once):
            for i in tl.static_range(AHEAD):
                new_ms = ()
                new_ls = ()
                new_as = ()
                for w in tl.static_range(W):
                    k = ks[i * W + w].to(tl.float32)
                    s = ss[i * W + w].to(tl.float32) + biases[i]
                    m, l, a = fold_step(ms[w], ls[w], as_[w], k, s)
                    new_ms = new_ms + (m,)
                    new_ls = new_ls + (l,)
                    new_as = new_as + (a,)
                ms = new_ms
                ls = new_ls
                as_ = new_as
        biases = next_biases
        ks = next_ks
        ss = next_ss
    return ms, ls, as_, (biases, ks, ss)


@triton.jit
def fold_rest(m, l, a, loaded, early, mine, begin, seq, tokens, snap, HOW: tl.constexpr, SPEC: tl.constexpr):
    """Folds tokens from place `begin` on, and stores the rows that the state or a snapshot keeps; returns the pooled row.

    loaded: the first stretch, valid if `early`; or None.
    """
    AHEAD: tl.constexpr = HOW.AHEAD
    due = next_page_end(snap, mine.x0 + begin)
    for j0 in range(begin, mine.stop, AHEAD):
        # Numbers of tokens from j0 on: positions of each would be compared in 64 bits, as the compiler widens the loop's index.
        left = mine.stop - j0
        forgotten = mine.end - seq.ring - mine.x0 - j0
        j = mine.stop - left  # a tensor also where the interpreter has an int for j0
        row = None if tokens.ape is None else tokens.ape + j * SPEC.HEAD_DIM
        at = mine.live + j.to(tl.int64) * tokens.stride
        if loaded is not None:
            biases, ks, ss = loaded
        if loaded is None or ((early == 0) | (j > begin)):
            apart = gap_of(mine.apart, tokens.skew, j, 0)
            biases, ks, ss = load_stretch(at, apart, tokens, row, left, AHEAD, SPEC.HEAD_DIM, HOW.SLICE)
        places = places_from(seq, mine.x0 + j0, AHEAD)
        for i in tl.static_range(AHEAD):
            m, l, a = fold_step(m, l, a, ks[i].to(tl.float32), ss[i].to(tl.float32) + biases[i])
            x = mine.x0 + j0 + i
            due = snapshot_fold(m, l, a, x, due, mine.x0 + mine.stop, snap, SPEC)  # whole rows: keys.step_key
            keep_fold(m, l, a, x, places[i], (i < left) & (i >= forgotten), seq, SPEC, HOW.SLICE)
    return quotient(a, l, HOW.TARGET.FAST_DIVISION)


@triton.jit
def deliver_entry(
    y, entry, position, needs, ticket, c0, scratch, plan, cache, TARGET: tl.constexpr, SLICE: tl.constexpr,
    SPEC: tl.constexpr, FMT: tl.constexpr,
):  # fmt: skip
    """Finishes and stores an entry that exists and is wanted, and counts one that is refused.

    y: the pooled row; None where the programs that share it have written their slices. needs: what `entry_address` gave.
    """
    cache_slot, weight, cos, sin = needs
    deliver, refused = slot_valid(entry, cache_slot, position, plan.entry_capacity, cache, SPEC.ROPE_DIM)
    # A step that only moves the state on finishes nothing; Triton 3.6 fails on slices that nobody uses.
    FINISHES: tl.constexpr = (cache.rows is not None) or (cache.norm_weight is not None)
    finish = (entry >= 0) & deliver & FINISHES
    if SLICE < SPEC.HEAD_DIM and finish:
        finish = is_last(ticket, SPEC.HEAD_DIM // SLICE)
    if finish:
        whole = y if y is not None else take_slices(scratch.workspace, scratch.arrivals, entry, SPEC.HEAD_DIM)
        emit(whole, entry, cache_slot, weight, cos, sin, cache, SPEC, FMT, TARGET)
    if (entry >= 0) & refused & (c0 == 0):
        tl.atomic_add(plan.errors, 1)


@triton.jit
def long_fold_step(pid, programs, plan, snap_table, one, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Program `pid` of `programs` over fold rows, in units of SLICE channels of a window."""
    tokens, st, snaps, scratch, cache = one
    SLICES: tl.constexpr = SPEC.HEAD_DIM // HOW.SLICE
    FINISHES: tl.constexpr = (cache.rows is not None) or (cache.norm_weight is not None)  # as in `deliver_entry`
    total = load_plan(plan.num_items)
    # The first items are read before the wait: the plan is older than the launch before this one.
    index = pid // SLICES
    item = load_item(plan.items, index, index < total)
    if HOW.TOGETHER == 2:
        item_1 = load_item(plan.items, index + programs, index + programs < total)
    if HOW.SLICE < SPEC.HEAD_DIM:
        cache_slot = entry_slot(item.entry, plan)  # ahead of the prefetches, which would delay it
    if HOW.PDL and HOW.SLICE < SPEC.HEAD_DIM:
        prefetch_item(item, index < total, pid % SLICES * HOW.SLICE, tokens, SPEC, HOW.SLICE)
    wait_for_inputs(HOW.PDL)
    for unit in range(pid, total * SLICES, HOW.TOGETHER * programs):
        c0 = unit % SLICES * HOW.SLICE
        ape = None if tokens.ape is None else tokens.ape + c0
        slice_of = Tokens(tokens.kv_score, tokens.stride, tokens.count, ape, tokens.apart, tokens.skew)
        m, l, a, mine = open_window(item, index < total, c0, plan.errors, tokens, st, SPEC, HOW.SLICE)
        both = 0
        count = 1
        if HOW.TOGETHER == 2:
            m_1, l_1, a_1, mine_1 = open_window(
                item_1, index + programs < total, c0, plan.errors, tokens, st, SPEC, HOW.SLICE,
            )  # fmt: skip
            count = tl.where(index + programs < total, 2, 1)
            if snaps.rows is None:
                # As far as both go, and up to the rows that are kept.
                limit = tl.minimum(
                    tl.minimum(mine.stop, mine.end - st.ring - mine.x0),
                    tl.minimum(mine_1.stop, mine_1.end - st.ring - mine_1.x0),
                )
                both = tl.where(mine.begin == mine_1.begin, tl.maximum(limit - mine.begin, 0) // HOW.AHEAD, 0)
                if both > 0:
                    ms, ls, as_, _behind = fold_stretches(
                        (m, m_1), (l, l_1), (a, a_1), (mine, mine_1), mine.begin, both, 0, slice_of, HOW, SPEC,
                    )  # fmt: skip
                    m, m_1 = ms
                    l, l_1 = ls
                    a, a_1 = as_
        for w in range(0, count):
            if HOW.TOGETHER == 2 and w == 1:
                m, l, a, mine = m_1, l_1, a_1, mine_1
            place = mine.begin + both * HOW.AHEAD
            early = 0
            loaded = None
            if HOW.SLICE < SPEC.HEAD_DIM:  # loaded while the window is folded; whole windows have no registers to spare
                weight, cos, sin = load_finish(mine.x0, cache, SPEC)
                needs = (cache_slot, weight, cos, sin)
                due, _refused = slot_valid(mine.entry, cache_slot, mine.x0, plan.entry_capacity, cache, SPEC.ROPE_DIM)
                leaves = (mine.entry >= 0) & due & FINISHES
                ticket = draw_ticket(scratch.arrivals, mine.entry, leaves, 8 * HOW.TARGET.THREADS_PER_WARP)
            snap = None
            if snaps.rows is not None:
                snap = snap_of(mine.sequence, snap_table, snaps, plan)
            else:
                alone = tl.maximum(tl.minimum(mine.stop, mine.end - st.ring - mine.x0) - place, 0) // HOW.AHEAD
                if HOW.SLICE < SPEC.HEAD_DIM:
                    early = ((alone > 0) & (place + (alone + 1) * HOW.AHEAD <= mine.stop)).to(tl.int32)
                    loaded = no_tokens(tokens.kv_score, HOW.AHEAD, HOW.SLICE)
                if alone > 0:
                    one_m, one_l, one_a, behind = fold_stretches(
                        (m,), (l,), (a,), (mine,), place, alone, early, slice_of, HOW, SPEC,
                    )  # fmt: skip
                    if HOW.SLICE < SPEC.HEAD_DIM:
                        loaded = behind
                    m = one_m[0]
                    l = one_l[0]
                    a = one_a[0]
                place += alone * HOW.AHEAD
            seq = sequence_of(st, mine.slot, mine.start, mine.end, SPEC, c0)
            # Snapshots inside a window are rare (pages that are no multiple of the ratio): all their tokens are the rest.
            y = fold_rest(m, l, a, loaded, early, mine, place, seq, slice_of, snap, HOW, SPEC)
            if HOW.SLICE < SPEC.HEAD_DIM:
                if leaves:
                    leave_slice(scratch.workspace, y, mine.entry, c0, SPEC.HEAD_DIM, HOW.SLICE, HOW.TARGET.COHERENT_STORES)
                y = None
            else:
                ticket = None
                needs = entry_address(mine.entry, mine.x0, plan, cache, SPEC)
            deliver_entry(
                y, mine.entry, mine.x0, needs, ticket, c0, scratch, plan, cache, HOW.TARGET, HOW.SLICE, SPEC, FMT,
            )  # fmt: skip
            if mine.first:
                retire_row(seq, load_history(seq, last_home(seq)))
        index = (unit + HOW.TOGETHER * programs) // SLICES
        item = load_item(plan.items, index, index < total)
        if HOW.SLICE < SPEC.HEAD_DIM:
            cache_slot = entry_slot(item.entry, plan)
        if HOW.TOGETHER == 2:
            item_1 = load_item(plan.items, index + programs, index + programs < total)
