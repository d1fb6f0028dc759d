"""One program of a step over `FoldState`: one work item, which is one window of one sequence, all channels.

Order within a program: what no kernel in flight can change is read, then comes the wait for what was launched before, then all
loads of state and tokens are issued at once, home rows before it is known whether they hold what is wanted. A decode step is
one memory latency long, and the tags are checked in its shadow. What is left is a chain of instructions with one warp on each
scheduler, 4 to 6 cycles apart, so decode is as fast as that chain is short.
"""

import triton
import triton.language as tl

from .epilogue import aim_entry, emit, judge_slot
from .fold import empty_fold, fold_step, spread
from .pdl import load_plan, wait_for_inputs
from .slots import check_tags, load_tags, place_row, retire_rows
from .snapshot import next_page_end, snapshot_fold, snapshot_rows


@triton.jit
def load_tokens(live, kv_stride, ape, x0, stop, RATIO: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Values and scores (ape added) of positions `[x0, x0 + AHEAD)`, masked from `stop` on; `live` points at position 0."""
    c = tl.arange(0, HEAD_DIM)
    ks = ()
    ss = ()
    for i in tl.static_range(AHEAD):
        x = x0 + i
        there = spread(x < stop, HEAD_DIM)
        # Addresses are formed token by token: hoisting them out of the stretch cost 5 us of 23 in a prefill of 8k.
        at = live + x.to(tl.int64) * kv_stride + c
        k = tl.load(at, mask=there, other=-0.0).to(tl.float32)
        s = tl.load(at + HEAD_DIM, mask=there, other=float("-inf")).to(tl.float32)
        if ape is not None:
            s += tl.load(ape + (x % RATIO) * HEAD_DIM + c, mask=there, other=0.0)
        ks = ks + (k,)
        ss = ss + (s,)
    return ks, ss


@triton.jit
def fold_tokens(
    m, l, a, ks, ss, x0, stop, state, tags, h0, start, end, ring, snap,
    RATIO: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Folds a stretch and stores the rows of those of its positions that the state keeps, or a snapshot."""
    c = tl.arange(0, HEAD_DIM)
    due = next_page_end(snap, x0)
    for i in tl.static_range(AHEAD):
        m, l, a = fold_step(m, l, a, ks[i], ss[i])
        x = x0 + i
        due = snapshot_fold(m, l, a, x, due, stop, snap, RATIO, HEAD_DIM)
        if (x < stop) & (x >= end - ring):
            place = place_row(tags, x, h0, start, end, ring, HISTORY)
            # No step resumes from the end of a window: that row is not kept, only what stood there is gone.
            kept = x % RATIO != RATIO - 1
            if kept:
                row = state + place * (3 * HEAD_DIM) + c
                tl.store(row, m)
                tl.store(row + HEAD_DIM, l)
                tl.store(row + 2 * HEAD_DIM, a)
            tl.store(tags + place, tl.where(kept, x, -1))
    return m, l, a


@triton.jit
def fold_item(
    live, kv_stride, ape, state, tags, ring, window, start, end, begin, stop, first, h0, snap,
    PDL: tl.constexpr, RATIO: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, ONCE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """State of fold rows: resume from the row before the step, fold the window's new tokens, store their rows.

    Returns the pooled row, and whether the sequence could go on.
    """
    c = tl.arange(0, HEAD_DIM)
    resumes = first & (h0 < start)
    row = state + (tl.maximum(start - 1, 0) % ring) * (3 * HEAD_DIM) + c
    old = spread(resumes, HEAD_DIM)
    m, l, a = empty_fold(HEAD_DIM)
    wait_for_inputs(PDL)
    x, wanted, home, spare = load_tags(tags, h0, start, ring, HISTORY)
    m = tl.load(row, mask=old, other=m)
    l = tl.load(row + HEAD_DIM, mask=old, other=0.0)
    a = tl.load(row + 2 * HEAD_DIM, mask=old, other=0.0)
    ks, ss = load_tokens(live, kv_stride, ape, begin, stop, RATIO, AHEAD, HEAD_DIM)
    held, moved = check_tags(x, wanted, home, spare)
    if held:
        if resumes & moved:
            row = state + ring * (3 * HEAD_DIM) + c
            m = tl.load(row)
            l = tl.load(row + HEAD_DIM)
            a = tl.load(row + 2 * HEAD_DIM)
        if ONCE:
            m, l, a = fold_tokens(
                m, l, a, ks, ss, begin, stop, state, tags, h0, start, end, ring, snap, RATIO, HISTORY, AHEAD, HEAD_DIM
            )  # fmt: skip
        else:
            for base in range(0, stop - begin, AHEAD):
                # The next stretch is on its way while this one is folded.
                next_ks, next_ss = load_tokens(
                    live, kv_stride, ape, begin + base + AHEAD, stop, RATIO, AHEAD, HEAD_DIM
                )  # fmt: skip
                m, l, a = fold_tokens(
                    m, l, a, ks, ss, begin + base, stop, state, tags, h0, start, end, ring, snap,
                    RATIO, HISTORY, AHEAD, HEAD_DIM,
                )  # fmt: skip
                ks = next_ks
                ss = next_ss
        if first:
            retire_rows(tags, x, wanted, home, spare, h0, start, end, ring, HISTORY)
    return a / l, held


@triton.jit
def load_biases(ape, j0, wanted, RATIO: tl.constexpr, OVERLAP: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr):
    """ape of rows `[j0, j0 + AHEAD)` of a window. With overlap the window before gives its lo half, this one its hi half."""
    biases = ()
    for i in tl.static_range(AHEAD):
        bias = tl.zeros((HEAD_DIM,), tl.float32)
        if ape is not None:
            j = wanted.to(tl.int32) * 0 + j0 + i  # a tensor also where the interpreter has an int for j0
            half = tl.where(j < RATIO * OVERLAP, 0, OVERLAP * HEAD_DIM)
            at = ape + (j % RATIO) * (HEAD_DIM * (1 + OVERLAP)) + half + tl.arange(0, HEAD_DIM)
            bias = tl.load(at, mask=spread(wanted & (j < RATIO * (1 + OVERLAP)), HEAD_DIM), other=0.0)
        biases = biases + (bias,)
    return biases


@triton.jit
def load_window(
    live, kv_stride, state, tags, window, start, ring, j0, SOURCE: tl.constexpr, SAME: tl.constexpr,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Values and raw scores of rows `[j0, j0 + AHEAD)` of a window that ends here: old ones from the state, new ones live.

    SOURCE: "home" takes it that old rows are at home, "find" looks for each, "live" knows of none. SAME: one dtype for both.
    """
    CHANNELS: tl.constexpr = HEAD_DIM * (1 + OVERLAP)
    WINDOW_ROWS: tl.constexpr = RATIO * (1 + OVERLAP)
    ks = ()
    ss = ()
    x0 = (window - OVERLAP) * RATIO
    c = tl.arange(0, HEAD_DIM)
    # Pointers go from row to row: a multiplication for each was a third of a decode step's instructions.
    at = live + (x0 + j0).to(tl.int64) * kv_stride + c
    # Where the ring is a multiple of the ratio, the rows of a window stand one behind the other.
    this = (window * RATIO) % ring
    before = tl.where(this >= RATIO, this, this + ring) - RATIO
    this_rows = state + (this - RATIO * OVERLAP) * (2 * CHANNELS) + c
    rows_before = state + before * (2 * CHANNELS) + c
    for i in tl.static_range(AHEAD):
        x = x0 + j0 + i
        j = x - x0  # a tensor also where the interpreter has an int for j0
        # Overlap: the window before gives its lo half, this window its hi half.
        half = tl.where(j < RATIO * OVERLAP, 0, OVERLAP * HEAD_DIM)
        there = x >= 0
        if WINDOW_ROWS % AHEAD != 0:
            there = there & (j < WINDOW_ROWS)
        if SOURCE == "live":
            there = spread(there, HEAD_DIM)
            k = tl.load(at + half, mask=there, other=-0.0).to(tl.float32)
            s = tl.load(at + half + CHANNELS, mask=there, other=float("-inf")).to(tl.float32)
        else:
            if SOURCE == "home" and HISTORY % RATIO == 0:
                kept = tl.where(j < RATIO * OVERLAP, rows_before, this_rows) + j * (2 * CHANNELS)
            else:
                place = tl.maximum(x, 0) % ring
                if SOURCE == "find":
                    home = tl.load(tags + place, mask=there & (x < start), other=x)
                    place = tl.where(home == x, place, ring + x % HISTORY)
                kept = state + place * (2 * CHANNELS) + c
            if SAME:
                row = tl.where(x < start, kept, at) + half
                there = spread(there, HEAD_DIM)
                k = tl.load(row, mask=there, other=-0.0).to(tl.float32)
                s = tl.load(row + CHANNELS, mask=there, other=float("-inf")).to(tl.float32)
            else:
                old = spread(there & (x < start), HEAD_DIM)
                new = spread(there & (x >= start), HEAD_DIM)
                k_old = tl.load(kept + half, mask=old, other=0.0).to(tl.float32)
                k_new = tl.load(at + half, mask=new, other=-0.0).to(tl.float32)
                s_old = tl.load(kept + half + CHANNELS, mask=old, other=0.0).to(tl.float32)
                s_new = tl.load(at + half + CHANNELS, mask=new, other=float("-inf")).to(tl.float32)
                k = tl.where(old, k_old, k_new)
                s = tl.where(old, s_old, s_new)
        ks = ks + (k,)
        ss = ss + (s,)
        at += kv_stride
    return ks, ss


@triton.jit
def pool_window(
    live, kv_stride, ape, biases, state, tags, window, start, ring, SOURCE: tl.constexpr, SAME: tl.constexpr,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The pooled row of a window. `biases` are those of its first AHEAD rows."""
    m, l, a = empty_fold(HEAD_DIM)
    for j0 in range(0, RATIO * (1 + OVERLAP), AHEAD):
        if AHEAD < RATIO * (1 + OVERLAP):
            biases = load_biases(ape, j0, window >= 0, RATIO, OVERLAP, AHEAD, HEAD_DIM)
        ks, ss = load_window(
            live, kv_stride, state, tags, window, start, ring, j0, SOURCE, SAME, RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM
        )  # fmt: skip
        for i in tl.static_range(AHEAD):
            m, l, a = fold_step(m, l, a, ks[i], ss[i] + biases[i])
    return a / l


@triton.jit
def load_rows(live, kv_stride, window, oldest, stop, RATIO: tl.constexpr, CHANNELS: tl.constexpr):
    """Input rows of `[oldest, stop)`, as they came, one for each position of the window."""
    at = live + (window * RATIO).to(tl.int64) * kv_stride + tl.arange(0, 2 * CHANNELS)
    copies = ()
    for i in tl.static_range(RATIO):
        x = window * RATIO + i
        copies = copies + (tl.load(at, mask=spread((x >= oldest) & (x < stop), 2 * CHANNELS), other=0.0),)
        at += kv_stride
    return copies


@triton.jit
def keep_together(copies, state, tags, window, oldest, stop, ring, RATIO: tl.constexpr, CHANNELS: tl.constexpr):
    """Stores the input rows of `[oldest, stop)`, loaded before, in one run of homes."""
    c = tl.arange(0, 2 * CHANNELS)
    place = (window * RATIO) % ring
    for i in tl.static_range(RATIO):
        at = window * RATIO + i
        if (at >= oldest) & (at < stop):
            tl.store(state + (place + i) * (2 * CHANNELS) + c, copies[i].to(state.dtype.element_ty))
            tl.store(tags + place + i, at)


@triton.jit
def keep_each(
    live, kv_stride, state, tags, oldest, h0, start, stop, end, ring, HISTORY: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Stores the input rows of `[oldest, stop)`, each where there is room for it."""
    c = tl.arange(0, 2 * CHANNELS)
    for n in range(0, stop - oldest):
        x = oldest + n
        place = place_row(tags, x, h0, start, end, ring, HISTORY)
        value = tl.load(live + x.to(tl.int64) * kv_stride + c)
        tl.store(state + place * (2 * CHANNELS) + c, value.to(state.dtype.element_ty))
        tl.store(tags + place, x)


@triton.jit
def rows_item(
    live, kv_stride, ape, state, tags, ring, window, start, ends, h0,
    PDL: tl.constexpr, SAME: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr,
    AHEAD: tl.constexpr, ONCE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """State of input rows: fold all rows of a window that ends here, old ones from the state.

    Returns the pooled row, whether the sequence could go on, and what `load_tags` found.
    """
    biases = load_biases(ape, 0, ends, RATIO, OVERLAP, AHEAD, HEAD_DIM)
    wait_for_inputs(PDL)
    x, wanted, home, spare = load_tags(tags, h0, start, ring, HISTORY)
    y = tl.zeros((HEAD_DIM,), tl.float32)
    old = (window - OVERLAP) * RATIO < start
    if ends:
        if ONCE:
            y = pool_window(
                live, kv_stride, ape, biases, state, tags, window, start, ring, "home", SAME,
                RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM,
            )  # fmt: skip
        elif old == 0:
            y = pool_window(
                live, kv_stride, ape, biases, state, tags, window, start, ring, "live", SAME,
                RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM,
            )  # fmt: skip
    held, moved = check_tags(x, wanted, home, spare)
    look = old
    if ONCE:
        look = moved
    if held & ends & look:
        y = pool_window(
            live, kv_stride, ape, biases, state, tags, window, start, ring, "find", SAME,
            RATIO, OVERLAP, HISTORY, AHEAD, HEAD_DIM,
        )  # fmt: skip
    return y, held, x, wanted, home, spare


@triton.jit
def step_item(
    pid, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr,
    KIND: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, ONCE: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """Work item `pid` of one compressor. All items of a sequence come to the same verdict on whether it can go on.

    KIND: of the state. ONCE: no item has more than AHEAD new tokens (`fold`) or rows (`rows`), so that all are loaded at once.
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
            y, held = fold_item(
                live, kv_stride, ape, state, tags, ring, window, start, end, begin, stop, first, h0, snap,
                PDL, RATIO, HISTORY, AHEAD, ONCE, HEAD_DIM,
            )  # fmt: skip
        else:
            SAME: tl.constexpr = state_rows.dtype.element_ty == kv_score.dtype.element_ty
            h0 = tl.maximum(start // RATIO - OVERLAP, 0) * RATIO
            state = state_rows + slot * (ring + HISTORY) * (2 * CHANNELS)
            y, held, x, wanted, home, spare = rows_item(
                live, kv_stride, ape, state, tags, ring, window, start, entry >= 0, h0,
                PDL, SAME, RATIO, OVERLAP, HISTORY, AHEAD, ONCE, HEAD_DIM,
            )  # fmt: skip
            oldest = tl.maximum(begin, end - ring)
            copies = ()
            if ONCE:
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
                if ONCE and HISTORY % RATIO == 0:
                    if end - h0 <= ring:
                        keep_together(copies, state, tags, window, oldest, stop, ring, RATIO, CHANNELS)
                    else:
                        keep_each(live, kv_stride, state, tags, oldest, h0, start, stop, end, ring, HISTORY, CHANNELS)
                else:
                    keep_each(live, kv_stride, state, tags, oldest, h0, start, stop, end, ring, HISTORY, CHANNELS)
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


@triton.jit
def step_kernel(
    items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
    kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
    rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr,
    KIND: tl.constexpr, OVERLAP: tl.constexpr, HISTORY: tl.constexpr, AHEAD: tl.constexpr, ONCE: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    """`compress`: one program per work item."""
    pid = tl.program_id(0)
    step_item(
        pid, items, num_items, entry_slots, entry_capacity, errors, snap_table, snap_width, snap_page_size,
        kv_score, kv_stride, num_tokens, ape, state_rows, state_tags, num_slots, ring, snap_rows, snap_tags, num_snaps,
        rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots,
        cache_scale,
        PDL, HARDWARE, RATIO, KIND, OVERLAP, HISTORY, AHEAD, ONCE, HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS,
        ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE, DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES,
        TAIL_BYTES,
    )  # fmt: skip
    if pid == tl.num_programs(0) - 1:
        count_overflow(items, num_items, tl.num_programs(0), errors, RATIO)
