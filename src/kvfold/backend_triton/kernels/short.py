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
    m, l, a, ks, ss, x0, stop, home, state, tags, h0, start, end, ring, snap,
    RATIO: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Folds a stretch and stores the rows of those of its positions that the state keeps, or a snapshot. home: of `x0`."""
    due = next_page_end(snap, x0)
    for i in tl.static_range(AHEAD):
        m, l, a = fold_step(m, l, a, ks[i], ss[i])
        x = x0 + i
        due = snapshot_fold(m, l, a, x, due, stop, snap, RATIO, HEAD_DIM)
        kept = (x < stop) & (x >= end - ring)
        # Masks let the tokens of a step overlap; one has no other, and by a branch takes 1.79 instead of 1.84 us at batch 16.
        if AHEAD > 1 or kept:
            place = place_at(tags, x, home, h0, start, end, ring, HISTORY)
            keep_fold(m, l, a, x, place, kept, state, tags, RATIO, HEAD_DIM, HEAD_DIM)
        home = tl.where(home + 1 == ring, 0, home + 1)
    return m, l, a


@triton.jit
def fold_item(
    live, kv_stride, ape, state, tags, ring, window, start, end, begin, stop, place, last, first, h0, snap,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """State of fold rows: resume from the row before the step, fold the window's new tokens, store their rows.

    place, last: the homes of `begin` and of the position before the step.
    Returns the pooled row, and whether the sequence could go on.
    """
    c = tl.arange(0, HEAD_DIM)
    resumes = first & (h0 < start)
    row = state + last * (3 * HEAD_DIM) + c
    old = spread(resumes, HEAD_DIM)
    m, l, a = empty_fold(HEAD_DIM)
    ats, theres, biases = aim_tokens(live, kv_stride, ape, begin, stop, RATIO, AHEAD, HEAD_DIM)
    x, wanted, home_at, spare_at = aim_tags(tags, h0, start, last, ring, HISTORY)
    wait_for_inputs(PDL)
    home = tl.load(home_at, mask=wanted, other=-1)
    spare = tl.load(spare_at)
    m = tl.load(row, mask=old, other=m)
    l = tl.load(row + HEAD_DIM, mask=old, other=0.0)
    a = tl.load(row + 2 * HEAD_DIM, mask=old, other=0.0)
    ks, ss = load_tokens(ats, theres, biases, HEAD_DIM)
    held, moved = check_tags(x, wanted, home, spare)
    if held:
        if resumes & moved:
            row = state + ring * (3 * HEAD_DIM) + c
            m = tl.load(row)
            l = tl.load(row + HEAD_DIM)
            a = tl.load(row + 2 * HEAD_DIM)
        m, l, a = fold_tokens(
            m, l, a, ks, ss, begin, stop, place, state, tags, h0, start, end, ring, snap, RATIO, HISTORY, AHEAD, HEAD_DIM
        )  # fmt: skip
        if first:
            retire_rows(tags, x, wanted, home, spare, h0, start, end, ring, HISTORY)
    return quotient(a, l, HARDWARE), held


@triton.jit
def rows_item(
    live, kv_stride, ape, state, tags, ring, window, start, this, last, ends, h0,
    PDL: tl.constexpr, SAME: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr,
    AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """State of input rows: fold all rows of a window that ends here, old ones from the state.

    this, last: the homes of the window's first position and of the position before the step. Returns the pooled row, whether
    the sequence could go on, and what `aim_tags` and the tags say.
    """
    biases = load_biases(ape, 0, ends, RATIO, OVERLAP, AHEAD, HEAD_DIM)
    x, wanted, home_at, spare_at = aim_tags(tags, h0, start, last, ring, HISTORY)
    wait_for_inputs(PDL)
    home = tl.load(home_at, mask=wanted, other=-1)
    spare = tl.load(spare_at)
    y = tl.zeros((HEAD_DIM,), tl.float32)
    if ends:
        y = pool_window(
            live, kv_stride, ape, biases, state, tags, window, start, ring, this, "home", SAME,
            RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM, HARDWARE,
        )  # fmt: skip
    held, moved = check_tags(x, wanted, home, spare)
    if held & ends & moved:
        y = pool_window(
            live, kv_stride, ape, biases, state, tags, window, start, ring, this, "find", SAME,
            RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM, HARDWARE,
        )  # fmt: skip
    return y, held, x, wanted, home, spare


@triton.jit
def decode_item(
    pid, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr,
    KIND: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """Work item `pid` of one compressor. All items of a sequence come to the same verdict on whether it can go on.

    KIND: of the state. No item has more than AHEAD new tokens (`fold`) or rows (`rows`): all are loaded at once.
    """
    total = load_plan(num_items)
    here = pid < total
    item = items + pid * 8
    window = load_plan(item)
    start = load_plan(item + 1)
    end = load_plan(item + 2)
    token = load_plan(item + 3)
    slot = load_plan(item + 4).to(tl.int64)
    entry = tl.where(here, load_plan(item + 5), -1)
    snap = None
    if snap_rows is not None:
        table = snap_table + load_plan(item + 6).to(tl.int64) * snap_width
        snap = (table, snap_width, snap_page_size, snap_rows, snap_tags, num_snaps, errors)
    first = here & (window == start // RATIO)
    cache_slot, weight, cos, sin = aim_entry(
        entry, window * RATIO, entry_slots, entry_capacity, norm_weight, rope, max_position, pages, HEAD_DIM, ROPE_DIM
    )  # fmt: skip
    usable = here & (slot < num_slots) & (token + end - start <= num_tokens)
    held = usable
    refused = False
    if usable:
        CHANNELS: tl.constexpr = HEAD_DIM * (1 + OVERLAP)
        tags = state_tags + slot * (ring + HISTORY)
        begin = tl.maximum(start, window * RATIO)
        stop = begin + tl.minimum(end - begin, RATIO - begin % RATIO)
        live = kv_score + (token - start).to(tl.int64) * kv_stride
        if KIND == "fold":
            h0 = tl.where(start % RATIO == 0, start, start - 1)
            state = state_rows + slot * (ring + HISTORY) * (3 * HEAD_DIM)
            # The one division that homes need, and before the wait: one token each of 16 sequences in 1.44 us where windows end
            # and 1.06 where none does. With one for each row, behind the wait, and a longer `a / l`: 1.60 and 1.19.
            place = start % ring
            last = tl.where(place == 0, ring, place) - 1
            place += begin - start
            while place >= ring:
                place -= ring
            if PDL:
                prefetch_fold(
                    live, kv_stride, state, tags, ring, last, begin, stop, first & (h0 < start), HISTORY, AHEAD, HEAD_DIM
                )  # fmt: skip
            y, held = fold_item(
                live, kv_stride, ape, state, tags, ring, window, start, end, begin, stop, place, last, first, h0, snap,
                PDL, HARDWARE, RATIO, HISTORY, AHEAD, HEAD_DIM,
            )  # fmt: skip
        else:
            SAME: tl.constexpr = state_rows.dtype.element_ty == kv_score.dtype.element_ty
            h0 = tl.maximum(start // RATIO - OVERLAP, 0) * RATIO
            state = state_rows + slot * (ring + HISTORY) * (2 * CHANNELS)
            # Where the ring is a multiple of the ratio, one division gives all homes: main and indexer, one token of 16, 64 and
            # 256 sequences each, in 2.29, 2.87 and 4.52 us; with a division for each use 2.43, 3.00 and 4.66.
            this = (window * RATIO) % ring
            if HISTORY % RATIO == 0:
                last = this + start - 1 - window * RATIO
                while last < 0:
                    last += ring
            else:
                last = tl.maximum(start - 1, 0) % ring
            if PDL:
                prefetch_rows(
                    live, kv_stride, state, window, start, begin, stop, ring, this, entry >= 0,
                    RATIO, OVERLAP, HISTORY, HEAD_DIM,
                )  # fmt: skip
            y, held, x, wanted, home, spare = rows_item(
                live, kv_stride, ape, state, tags, ring, window, start, this, last, entry >= 0, h0,
                PDL, SAME, RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM, HARDWARE,
            )  # fmt: skip
            oldest = tl.maximum(begin, end - ring)
            # Loaded before the entry is finished, stored after.
            copies = load_rows(live, kv_stride, window, oldest, stop, RATIO, CHANNELS)
        deliver, refused = judge_slot(
            entry, cache_slot, window * RATIO, entry_capacity, max_position, pages, cache_slots, ROPE_DIM
        )  # fmt: skip
        if held & deliver:
            emit(
                y, entry, cache_slot, weight, cos, sin,
                rows, pages, page_stride, scales, scales_stride, rows_per_page, cache_scale,
                HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE,
                ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES, HARDWARE,
            )  # fmt: skip
        if KIND != "fold":
            if held:
                # Where a step cannot come round to rows that it reads, its new rows stand one behind the other.
                if HISTORY % RATIO == 0:
                    if end - h0 <= ring:
                        keep_together(copies, state, tags, window, oldest, stop, this, RATIO, CHANNELS)
                    else:
                        keep_each(live, kv_stride, state, tags, oldest, h0, start, stop, end, ring, HISTORY, CHANNELS, 1)
                else:
                    keep_each(live, kv_stride, state, tags, oldest, h0, start, stop, end, ring, HISTORY, CHANNELS, 1)
                snapshot_rows(live, kv_stride, window, begin, stop, snap, RATIO, CHANNELS)
                if first:
                    retire_rows(tags, x, wanted, home, spare, h0, start, end, ring, HISTORY)
    else:
        # Whoever waits for this launch must have waited for the one before, also where no program has anything to do.
        wait_for_inputs(PDL)
    if (first & (held == 0)) | (held & refused):
        tl.atomic_add(errors, 1)


@triton.jit
def count_overflow(items, num_items, programs, errors, RATIO: tl.constexpr):
    """Counts the sequences whose first item has no program.

    The grid is sized by the rows of kv_score. More items than that means sequences that end behind them.
    """
    total = load_plan(num_items)
    for i in range(programs, total):
        item = items + i * 8
        if load_plan(item) == load_plan(item + 1) // RATIO:
            tl.atomic_add(errors, 1)
