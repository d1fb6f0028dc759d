"""One program of a short step over `FoldState`: one work item, which is one window of one sequence, all channels.

A decode step takes about one memory latency. So a program first reads what no kernel in flight can change, then waits for the
launch before, then issues all loads of state and tokens at once, and checks the tags meanwhile.
"""

import triton
import triton.language as tl

from ..args import Live
from .finish import emit, entry_address, slot_valid
from .fold import empty_fold, fold_step, minus_zero, quotient, spread
from .items import load_item
from .memory import in_turn, load_blocks
from .pdl import load_plan, wait_for_inputs
from .places import find_history, hi_home, home_back, home_before, home_of, keep_tags, load_tags, places_to_keep
from .prefetch import prefetch_fold, prefetch_rows
from .rows import keep_row, load_biases, load_rows, pool_window
from .slots import check_history, keep_fold, load_history, place_at, retire_row, sequence_of
from .snapshot import next_page_end, snap_of, snapshot_fold, snapshot_rows
from .tokens import apart_from, gap


@triton.jit
def token_addresses(live, tokens, x0, stop, SPEC: tl.constexpr, AHEAD: tl.constexpr):
    """Addresses of values at positions `[x0, x0 + AHEAD)`, the `gap` of each, which are there (before `stop`), and their ape.

    `live` points at position 0. Called before the wait, so that less is left to do after it.
    """
    c = tl.arange(0, SPEC.HEAD_DIM)
    ats = ()
    gaps = ()
    wanted = ()
    biases = ()
    for i in tl.static_range(AHEAD):
        x = x0 + i
        there = spread(x < stop, SPEC.HEAD_DIM)
        bias = tl.zeros((SPEC.HEAD_DIM,), tl.float32)
        if tokens.ape is not None:
            bias = tl.load(tokens.ape + (x % SPEC.RATIO) * SPEC.HEAD_DIM + c, mask=there, other=0.0)
        ats = ats + (live + x.to(tl.int64) * tokens.stride + c,)
        gaps = gaps + (gap(tokens, x, SPEC.HEAD_DIM),)
        wanted = wanted + (there,)
        biases = biases + (bias,)
    return ats, gaps, wanted, biases


@triton.jit
def load_tokens(ats, gaps, wanted, biases):
    """Values, and scores with ape, at what `token_addresses` found."""
    both = ()
    theres = ()
    for i in tl.static_range(len(ats)):
        both = both + (ats[i], ats[i] + gaps[i])
        theres = theres + (wanted[i], wanted[i])
    ks, ss = in_turn(load_blocks(both, theres, (minus_zero(), float("-inf")) * len(ats)))
    values = ()
    scores = ()
    for i in tl.static_range(len(ats)):
        values = values + (ks[i].to(tl.float32),)
        scores = scores + (ss[i].to(tl.float32) + biases[i],)
    return values, scores


@triton.jit
def fold_tokens(m, l, a, ks, ss, x0, stop, home, seq, snap, SPEC: tl.constexpr, AHEAD: tl.constexpr):
    """Folds positions `[x0, stop)`, AHEAD at most, and stores the rows that the state or a snapshot keeps. home: for `x0`."""
    due = next_page_end(snap, x0)
    for i in tl.static_range(AHEAD):
        m, l, a = fold_step(m, l, a, ks[i], ss[i])
        x = x0 + i
        due = snapshot_fold(m, l, a, x, due, stop, snap, SPEC)
        kept = (x < stop) & (x >= seq.end - seq.ring)
        # Masks let the tokens of a step overlap; one token has no other, and a branch is faster.
        if AHEAD > 1 or kept:
            place = place_at(seq, home)
            keep_fold(m, l, a, x, place, kept, seq, SPEC, SPEC.HEAD_DIM)
        home = tl.where(home + 1 == seq.ring, 0, home + 1)
    return m, l, a


@triton.jit
def fold_item(live, tokens, seq, begin, stop, place, last, first, snap, HOW: tl.constexpr, SPEC: tl.constexpr):
    """State of fold rows: resumes from the row before the step, folds the window's new tokens, and stores their rows.

    place, last: the homes of `begin` and of the position before the step.
    Returns the pooled row, and whether the sequence could go on.
    """
    c = tl.arange(0, SPEC.HEAD_DIM)
    resumes = first & (seq.h0 < seq.start)
    row = seq.rows + last * (3 * SPEC.HEAD_DIM) + c
    old = spread(resumes, SPEC.HEAD_DIM)
    m, l, a = empty_fold(SPEC.HEAD_DIM)
    ats, gaps, theres, biases = token_addresses(live, tokens, begin, stop, SPEC, HOW.AHEAD)
    wait_for_inputs(HOW.PDL)
    history = load_history(seq, last)
    m = tl.load(row, mask=old, other=m)
    l = tl.load(row + SPEC.HEAD_DIM, mask=old, other=0.0)
    a = tl.load(row + 2 * SPEC.HEAD_DIM, mask=old, other=0.0)
    ks, ss = load_tokens(ats, gaps, theres, biases)
    held, moved = check_history(history, seq)
    if held:
        if resumes & moved:
            row = seq.rows + seq.ring * (3 * SPEC.HEAD_DIM) + c
            m = tl.load(row)
            l = tl.load(row + SPEC.HEAD_DIM)
            a = tl.load(row + 2 * SPEC.HEAD_DIM)
        m, l, a = fold_tokens(m, l, a, ks, ss, begin, stop, place, seq, snap, SPEC, HOW.AHEAD)
        if first:
            retire_row(seq, history)
    return quotient(a, l, HOW.TARGET.FAST_DIVISION), held


@triton.jit
def pool_item(live, tokens, seq, window, home, ends, HOW: tl.constexpr, SPEC: tl.constexpr):
    """State of input rows: pools all rows of a window, whose home is `home`, if it `ends` here, old ones from the state.

    Returns the pooled row, whether the sequence could go on, and the places of the rows that the step reads.
    """
    biases = load_biases(tokens.ape, 0, ends, SPEC, HOW.AHEAD)
    further = window - seq.start // SPEC.RATIO
    own = home_back(seq, home, further, SPEC)
    wait_for_inputs(HOW.PDL)
    tags = load_tags(seq, own, SPEC)
    lo = home_before(seq, home)
    hi = hi_home(seq, home)
    y = tl.zeros((SPEC.HEAD_DIM,), tl.float32)
    if ends:  # from the homes: to look at tags first would cost a memory latency
        y = pool_window(live, tokens, biases, seq, window, lo, hi, "old", HOW, SPEC)
    held, kept = find_history(tags, seq, own, SPEC)
    moved = (further == 0) & (kept.hi >= 0) & (kept.hi != hi)
    if SPEC.OVERLAP:
        found = tl.where(further == 0, kept.before, kept.lo)
        moved = moved | ((further <= 1) & (found >= 0) & (found != lo))
        lo = found
    if held & ends & moved:
        y = pool_window(live, tokens, biases, seq, window, lo, kept.hi, "old", HOW, SPEC)
    return y, held, kept


@triton.jit
def short_step(pid, plan, snap_table, one, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Work item `pid` of one compressor. All items of a sequence agree on whether it can go on.

    No item has more than AHEAD new tokens (state of fold rows) or rows (of input rows): all are loaded at once.
    """
    tokens, st, snaps, _scratch, cache = one
    total = load_plan(plan.num_items)
    here = pid < total
    item = load_item(plan.items, pid)  # not masked by `here`, for which it would wait
    window, start, end, token, slot, entry, sequence = item
    entry = tl.where(here, entry, -1)
    snap = None if snaps.rows is None else snap_of(sequence, snap_table, snaps, plan)
    first = here & (window == start // SPEC.RATIO)
    cache_slot, weight, cos, sin = entry_address(entry, window * SPEC.RATIO, plan, cache, SPEC)
    usable = here & (slot < st.num_slots) & (token + end - start <= tokens.count)
    held = usable
    refused = False
    if usable:
        begin = tl.maximum(start, window * SPEC.RATIO)
        stop = begin + tl.minimum(end - begin, SPEC.RATIO - begin % SPEC.RATIO)
        live = tokens.kv_score + (token - start).to(tl.int64) * tokens.stride
        apart = apart_from(tokens, token - start)
        own = Live(tokens.kv_score, tokens.stride, tokens.count, tokens.ape, apart, tokens.skew)
        seq = sequence_of(st, slot, start, end, SPEC)
        if SPEC.KIND == "fold":
            # The one division that homes need, before the wait; all other homes follow from it.
            place = start % st.ring
            last = tl.where(place == 0, st.ring, place) - 1
            place += begin - start
            while place >= st.ring:
                place -= st.ring
            if HOW.PDL:
                prefetch_fold(live, own, seq, last, begin, stop, first & (seq.h0 < start), HOW, SPEC)
            y, held = fold_item(live, own, seq, begin, stop, place, last, first, snap, HOW, SPEC)
        else:
            home = home_of(seq, window, SPEC)
            if HOW.PDL:
                prefetch_rows(live, own, seq, window, begin, stop, home, entry >= 0, SPEC)
            y, held, kept = pool_item(live, own, seq, window, home, entry >= 0, HOW, SPEC)
            # Loaded before the entry is finished, stored after.
            copies = load_rows(live, own, window, begin, stop, SPEC)
        deliver, refused = slot_valid(entry, cache_slot, window * SPEC.RATIO, plan.entry_capacity, cache, SPEC.ROPE_DIM)
        if held & deliver:
            emit(y, entry, cache_slot, weight, cos, sin, cache, SPEC, FMT, HOW.TARGET)
        if SPEC.KIND != "fold" and held:
            lo_place, hi_place, lo_empty, hi_empty = places_to_keep(seq, window, home, kept, SPEC)
            keep_tags(seq, lo_place, hi_place, lo_empty, hi_empty, stop - 1, SPEC)
            for i in tl.static_range(SPEC.RATIO):
                at = window * SPEC.RATIO + i
                if (at >= begin) & (at < stop):
                    keep_row(copies[i], seq, i, at < stop, lo_place, hi_place, SPEC)
            snapshot_rows(live, own, window, begin, stop, snap, SPEC)
    else:
        # The next launch waits for this one alone, so this one must end after the one before it, also where it does nothing.
        wait_for_inputs(HOW.PDL)
    if (first & (held == 0)) | (held & refused):
        tl.atomic_add(plan.errors, 1)


@triton.jit
def ungated_step(pid, plan, tokens, cache, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Work item `pid` of a compressor without a gate: its window is a token, whose values are the pooled row."""
    here = pid < load_plan(plan.num_items)
    window, start, end, token, _, entry, _ = load_item(plan.items, pid)
    usable = here & (token + end - start <= tokens.count)
    entry = tl.where(usable, entry, -1)
    cache_slot, weight, cos, sin = entry_address(entry, window, plan, cache, SPEC)
    at = tokens.kv_score + (token + window - start).to(tl.int64) * tokens.stride + tl.arange(0, SPEC.HEAD_DIM)
    wait_for_inputs(HOW.PDL)
    deliver, refused = slot_valid(entry, cache_slot, window, plan.entry_capacity, cache, SPEC.ROPE_DIM)
    if deliver:
        emit(tl.load(at).to(tl.float32), entry, cache_slot, weight, cos, sin, cache, SPEC, FMT, HOW.TARGET)
    if refused | (here & (window == start) & (usable == 0)):
        tl.atomic_add(plan.errors, 1)


@triton.jit
def count_overflow(plan, programs, RATIO: tl.constexpr):
    """Counts the sequences whose first item has no program.

    The grid is sized by the rows of kv_score. More items than that means sequences that end beyond those rows.
    """
    total = load_plan(plan.num_items)
    for i in range(programs, total):
        item = load_item(plan.items, i)
        if item.window == item.start // RATIO:
            tl.atomic_add(plan.errors, 1)
