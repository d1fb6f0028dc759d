"""One program of a short step over `FoldState`: one work item, which is one window of one sequence, all channels.

Order within a program: what no kernel in flight can change is read, then comes the wait for what was launched before, then all
loads of state and tokens are issued at once, home rows before it is known whether they hold what is wanted. A decode step is
one memory latency long, and the tags are checked in its shadow. What is left is a chain of instructions with one warp on each
scheduler, 4 to 6 cycles apart, so decode is as fast as that chain is short.
"""

import triton
import triton.language as tl

from .finish import aim_entry, emit, judge_slot
from .fold import empty_fold, fold_step, minus_zero, quotient, spread
from .pdl import load_plan, wait_for_inputs
from .prefetch import prefetch_fold, prefetch_rows
from .rows import keep_each, keep_together, load_biases, load_rows, pool_window
from .slots import aim_tags, check_tags, keep_fold, place_at, retire_rows
from .snapshot import next_page_end, snapshot_fold, snapshot_rows


@triton.jit
def aim_tokens(live, kv_stride, ape, x0, stop, RATIO: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where values of positions `[x0, x0 + AHEAD)` are, and from `stop` on that they are not there, and the positions' ape.

    `live` points at position 0. For before the wait: 16 and 256 sequences of 4 tokens, all of which end a window, take 1.95 and
    3.68 us, and 2.04 and 3.85 with all of it, and ape, behind the wait.
    """
    c = tl.arange(0, HEAD_DIM)
    ats = ()
    wanted = ()
    biases = ()
    for i in tl.static_range(AHEAD):
        x = x0 + i
        there = spread(x < stop, HEAD_DIM)
        bias = tl.zeros((HEAD_DIM,), tl.float32)
        if ape is not None:
            bias = tl.load(ape + (x % RATIO) * HEAD_DIM + c, mask=there, other=0.0)
        ats = ats + (live + x.to(tl.int64) * kv_stride + c,)
        wanted = wanted + (there,)
        biases = biases + (bias,)
    return ats, wanted, biases


@triton.jit
def load_tokens(ats, wanted, biases, HEAD_DIM: tl.constexpr):
    """Values and scores, with ape, of what `aim_tokens` found."""
    ks = ()
    ss = ()
    for i in tl.static_range(len(ats)):
        ks = ks + (tl.load(ats[i], mask=wanted[i], other=minus_zero()).to(tl.float32),)
        s = tl.load(ats[i] + HEAD_DIM, mask=wanted[i], other=float("-inf")).to(tl.float32)
        ss = ss + (s + biases[i],)
    return ks, ss


@triton.jit
def fold_tokens(
    m, l, a, ks, ss, x0, stop, home, state, tags, h0, start, end, ring, snap, SPEC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Folds a stretch and stores the rows of those of its positions that the state keeps, or a snapshot. home: of `x0`."""
    due = next_page_end(snap, x0)
    for i in tl.static_range(AHEAD):
        m, l, a = fold_step(m, l, a, ks[i], ss[i])
        x = x0 + i
        due = snapshot_fold(m, l, a, x, due, stop, snap, SPEC)
        kept = (x < stop) & (x >= end - ring)
        # Masks let the tokens of a step overlap; one has no other, and by a branch takes 1.79 instead of 1.84 us at batch 16.
        if AHEAD > 1 or kept:
            place = place_at(tags, x, home, h0, start, end, ring, SPEC.HISTORY)
            keep_fold(m, l, a, x, place, kept, state, tags, SPEC, SPEC.HEAD_DIM)
        home = tl.where(home + 1 == ring, 0, home + 1)
    return m, l, a


@triton.jit
def fold_item(
    live, kv_stride, ape, state, tags, ring, window, start, end, begin, stop, place, last, first, h0, snap,
    HOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """State of fold rows: resume from the row before the step, fold the window's new tokens, store their rows.

    place, last: the homes of `begin` and of the position before the step.
    Returns the pooled row, and whether the sequence could go on.
    """
    c = tl.arange(0, SPEC.HEAD_DIM)
    resumes = first & (h0 < start)
    row = state + last * (3 * SPEC.HEAD_DIM) + c
    old = spread(resumes, SPEC.HEAD_DIM)
    m, l, a = empty_fold(SPEC.HEAD_DIM)
    ats, theres, biases = aim_tokens(live, kv_stride, ape, begin, stop, SPEC.RATIO, HOW.AHEAD, SPEC.HEAD_DIM)
    x, wanted, home_at, spare_at = aim_tags(tags, h0, start, last, ring, SPEC.HISTORY)
    wait_for_inputs(HOW.PDL)
    home = tl.load(home_at, mask=wanted, other=-1)
    spare = tl.load(spare_at)
    m = tl.load(row, mask=old, other=m)
    l = tl.load(row + SPEC.HEAD_DIM, mask=old, other=0.0)
    a = tl.load(row + 2 * SPEC.HEAD_DIM, mask=old, other=0.0)
    ks, ss = load_tokens(ats, theres, biases, SPEC.HEAD_DIM)
    held, moved = check_tags(x, wanted, home, spare)
    if held:
        if resumes & moved:
            row = state + ring * (3 * SPEC.HEAD_DIM) + c
            m = tl.load(row)
            l = tl.load(row + SPEC.HEAD_DIM)
            a = tl.load(row + 2 * SPEC.HEAD_DIM)
        m, l, a = fold_tokens(m, l, a, ks, ss, begin, stop, place, state, tags, h0, start, end, ring, snap, SPEC, HOW.AHEAD)
        if first:
            retire_rows(tags, x, wanted, home, spare, h0, start, end, ring, SPEC.HISTORY)
    return quotient(a, l, HOW.TARGET.FAST_DIVISION), held


@triton.jit
def rows_item(
    live, kv_stride, ape, state, tags, ring, window, start, this, last, ends, h0, HOW: tl.constexpr, SAME: tl.constexpr,
    SPEC: tl.constexpr,
):  # fmt: skip
    """State of input rows: fold all rows of a window that ends here, old ones from the state.

    this, last: the homes of the window's first position and of the position before the step. Returns the pooled row, whether
    the sequence could go on, and what `aim_tags` and the tags say.
    """
    biases = load_biases(ape, 0, ends, SPEC, HOW.AHEAD)
    x, wanted, home_at, spare_at = aim_tags(tags, h0, start, last, ring, SPEC.HISTORY)
    wait_for_inputs(HOW.PDL)
    home = tl.load(home_at, mask=wanted, other=-1)
    spare = tl.load(spare_at)
    y = tl.zeros((SPEC.HEAD_DIM,), tl.float32)
    if ends:
        y = pool_window(
            live, kv_stride, ape, biases, state, tags, window, start, ring, this, "home", SAME, SPEC, HOW.AHEAD,
            HOW.TARGET,
        )  # fmt: skip
    held, moved = check_tags(x, wanted, home, spare)
    if held & ends & moved:
        y = pool_window(
            live, kv_stride, ape, biases, state, tags, window, start, ring, this, "find", SAME, SPEC, HOW.AHEAD,
            HOW.TARGET,
        )  # fmt: skip
    return y, held, x, wanted, home, spare


@triton.jit
def decode_item(pid, plan, snap_table, tokens, st, snaps, cache, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Work item `pid` of one compressor. All items of a sequence come to the same verdict on whether it can go on.

    KIND: of the state. No item has more than AHEAD new tokens (`fold`) or rows (`rows`): all are loaded at once.
    """
    total = load_plan(plan.num_items)
    here = pid < total
    item = plan.items + pid * 8
    window = load_plan(item)
    start = load_plan(item + 1)
    end = load_plan(item + 2)
    token = load_plan(item + 3)
    slot = load_plan(item + 4).to(tl.int64)
    entry = tl.where(here, load_plan(item + 5), -1)
    snap = None
    if snaps.rows is not None:
        table = snap_table.pages + load_plan(item + 6).to(tl.int64) * snap_table.width
        snap = (table, snap_table.width, snap_table.page_size, snaps.rows, snaps.tags, snaps.count, plan.errors)
    first = here & (window == start // SPEC.RATIO)
    cache_slot, weight, cos, sin = aim_entry(entry, window * SPEC.RATIO, plan, cache, SPEC)
    usable = here & (slot < st.num_slots) & (token + end - start <= tokens.count)
    held = usable
    refused = False
    if usable:
        CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
        tags = st.tags + slot * (st.ring + SPEC.HISTORY)
        begin = tl.maximum(start, window * SPEC.RATIO)
        stop = begin + tl.minimum(end - begin, SPEC.RATIO - begin % SPEC.RATIO)
        live = tokens.kv_score + (token - start).to(tl.int64) * tokens.stride
        if SPEC.KIND == "fold":
            h0 = tl.where(start % SPEC.RATIO == 0, start, start - 1)
            state = st.rows + slot * (st.ring + SPEC.HISTORY) * (3 * SPEC.HEAD_DIM)
            # The one division that homes need, and before the wait: one token each of 16 sequences in 1.44 us where windows end
            # and 1.06 where none does. With one for each row, behind the wait, and a longer `a / l`: 1.60 and 1.19.
            place = start % st.ring
            last = tl.where(place == 0, st.ring, place) - 1
            place += begin - start
            while place >= st.ring:
                place -= st.ring
            if HOW.PDL:
                prefetch_fold(
                    live, tokens.stride, state, tags, st.ring, last, begin, stop, first & (h0 < start), SPEC, HOW.AHEAD,
                )  # fmt: skip
            y, held = fold_item(
                live, tokens.stride, tokens.ape, state, tags, st.ring, window, start, end, begin, stop, place, last,
                first, h0, snap, HOW, SPEC,
            )  # fmt: skip
        else:
            SAME: tl.constexpr = st.rows.dtype.element_ty == tokens.kv_score.dtype.element_ty
            h0 = tl.maximum(start // SPEC.RATIO - SPEC.OVERLAP, 0) * SPEC.RATIO
            state = st.rows + slot * (st.ring + SPEC.HISTORY) * (2 * CHANNELS)
            # Where the ring is a multiple of the ratio, one division gives all homes: main and indexer, one token of 16, 64 and
            # 256 sequences each, in 2.29, 2.87 and 4.52 us; with a division for each use 2.43, 3.00 and 4.66.
            this = (window * SPEC.RATIO) % st.ring
            if SPEC.HISTORY % SPEC.RATIO == 0:
                last = this + start - 1 - window * SPEC.RATIO
                while last < 0:
                    last += st.ring
            else:
                last = tl.maximum(start - 1, 0) % st.ring
            if HOW.PDL:
                prefetch_rows(live, tokens.stride, state, window, start, begin, stop, st.ring, this, entry >= 0, SPEC)
            y, held, x, wanted, home, spare = rows_item(
                live, tokens.stride, tokens.ape, state, tags, st.ring, window, start, this, last, entry >= 0, h0, HOW,
                SAME, SPEC,
            )  # fmt: skip
            oldest = tl.maximum(begin, end - st.ring)
            # Loaded before the entry is finished, stored after.
            copies = load_rows(live, tokens.stride, window, oldest, stop, SPEC.RATIO, CHANNELS)
        deliver, refused = judge_slot(entry, cache_slot, window * SPEC.RATIO, plan.entry_capacity, cache, SPEC.ROPE_DIM)
        if held & deliver:
            emit(y, entry, cache_slot, weight, cos, sin, cache, SPEC, FMT, HOW.TARGET)
        if SPEC.KIND != "fold":
            if held:
                # Where a step cannot come round to rows that it reads, its new rows stand one behind the other.
                if SPEC.HISTORY % SPEC.RATIO == 0:
                    if end - h0 <= st.ring:
                        keep_together(copies, state, tags, window, oldest, stop, this, SPEC.RATIO, CHANNELS)
                    else:
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
                            1,
                        )
                else:
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
                        1,
                    )
                snapshot_rows(live, tokens.stride, window, begin, stop, snap, SPEC.RATIO, CHANNELS)
                if first:
                    retire_rows(tags, x, wanted, home, spare, h0, start, end, st.ring, SPEC.HISTORY)
    else:
        # Whoever waits for this launch must have waited for the one before, also where no program has anything to do.
        wait_for_inputs(HOW.PDL)
    if (first & (held == 0)) | (held & refused):
        tl.atomic_add(plan.errors, 1)


@triton.jit
def count_overflow(plan, programs, RATIO: tl.constexpr):
    """Counts the sequences whose first item has no program.

    The grid is sized by the rows of kv_score. More items than that means sequences that end behind them.
    """
    total = load_plan(plan.num_items)
    for i in range(programs, total):
        item = plan.items + i * 8
        if load_plan(item) == load_plan(item + 1) // RATIO:
            tl.atomic_add(plan.errors, 1)
