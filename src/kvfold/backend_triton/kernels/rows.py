"""Windows of input rows, which a `FoldState` keeps where that is cheaper: pooling one, and keeping new rows."""

import triton
import triton.language as tl

from .fold import ROWS_AT_ONCE, empty_group, fold_group, minus_zero, quotient, spread, widen
from .places import hi_row, home_of, keep_tags, lo_row, look_up, places_to_keep
from .record import bf16_bits, bf16_value
from .tokens import gap, whole_row
from .vectors import channels, scalar


@triton.jit
def as_kept(x, KEPT: tl.constexpr, BF16_CONVERSION: tl.constexpr = False):
    """New numbers as a state of dtype KEPT keeps them: rounded where it holds bf16 and they are fp32, else as they came."""
    if x.dtype == tl.float32 and tl.bfloat16 == KEPT:
        x = bf16_value(bf16_bits(x, BF16_CONVERSION))
    return x


@triton.jit
def load_biases(ape, j0, wanted, SPEC: tl.constexpr, AHEAD: tl.constexpr, COUNT: tl.constexpr = 1):
    """ape of rows `[j0, j0 + AHEAD)` of a window. With overlap the window before gives its lo half, this one its hi half.

    wanted: if false nothing is read; None means true.
    """
    ROWS: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP)
    biases = ()
    for i in tl.static_range(AHEAD):
        bias = tl.zeros((COUNT * SPEC.HEAD_DIM,), tl.float32)
        if ape is not None:
            j = scalar(j0) + i
            half = tl.where(j < SPEC.RATIO * SPEC.OVERLAP, 0, SPEC.OVERLAP * SPEC.HEAD_DIM)
            at = ape + (j % SPEC.RATIO) * (SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)) + half + channels(SPEC.HEAD_DIM, COUNT)
            if wanted is not None:
                bias = tl.load(at, mask=spread(wanted & (j < ROWS), COUNT * SPEC.HEAD_DIM), other=0.0)
            elif ROWS // AHEAD * AHEAD != ROWS:  # the interpreter has no % of a number and a constant of a module
                bias = tl.load(at, mask=spread(j < ROWS, COUNT * SPEC.HEAD_DIM), other=0.0)
            else:
                bias = tl.load(at)
        biases = biases + (bias,)
    return biases


@triton.jit
def load_window(
    live, tokens, seq, window, lo, hi, j0, SOURCE: tl.constexpr, SPEC: tl.constexpr, AHEAD: tl.constexpr,
    BF16_CONVERSION: tl.constexpr,
):  # fmt: skip
    """Values and raw scores of rows `[j0, j0 + AHEAD)` of a window that ends here: old ones from the state, new ones live.

    SOURCE: "live" for windows without old rows, "old" for others. lo, hi: the places of old lo rows of the window before, and
    of old hi or whole rows of the window itself; any number where there are none.
    """
    KEPT: tl.constexpr = seq.rows.dtype.element_ty
    SAME: tl.constexpr = tokens.kv_score.dtype.element_ty == KEPT
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    WINDOW_ROWS: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP)
    ks = ()
    ss = ()
    x0 = (window - SPEC.OVERLAP) * SPEC.RATIO
    c = tl.arange(0, SPEC.HEAD_DIM)
    # Pointers go from row to row, as a multiplication for each costs a decode step a third of its instructions.
    at = live + (x0 + j0).to(tl.int64) * tokens.stride + c
    if SOURCE == "old":
        lo_rows = seq.rows + lo_row(lo, SPEC) * (2 * SPEC.HEAD_DIM) + c
        hi_rows = seq.rows + (hi_row(seq, hi, SPEC) - SPEC.RATIO * SPEC.OVERLAP) * (2 * SPEC.HEAD_DIM) + c
    for i in tl.static_range(AHEAD):
        x = x0 + j0 + i
        j = x - x0  # a tensor also where the interpreter has an int for j0
        # Overlap: the window before gives its lo half, this window its hi half.
        half = tl.where(j < SPEC.RATIO * SPEC.OVERLAP, 0, SPEC.OVERLAP * SPEC.HEAD_DIM)
        there = x >= 0
        if WINDOW_ROWS % AHEAD != 0:
            there = there & (j < WINDOW_ROWS)
        if SOURCE == "live":
            there = spread(there, SPEC.HEAD_DIM)
            # The mask is always true, but without it the compiler moves each load to its use. Past L1: see `load_live`.
            k = tl.load(at + half, mask=there, other=minus_zero(), cache_modifier=".cg")
            score_at = at + half + gap(tokens, x, CHANNELS)
            s = tl.load(score_at, mask=there, other=float("-inf"), cache_modifier=".cg")
            k = widen(as_kept(k, KEPT, BF16_CONVERSION))
            s = widen(as_kept(s, KEPT, BF16_CONVERSION))
        else:
            kept = tl.where(j < SPEC.RATIO * SPEC.OVERLAP, lo_rows, hi_rows) + j * (2 * SPEC.HEAD_DIM)
            if SAME:
                row = tl.where(x < seq.start, kept, at + half)
                there = spread(there, SPEC.HEAD_DIM)
                k = tl.load(row, mask=there, other=minus_zero()).to(tl.float32)
                if tokens.skew is not None or SPEC.OVERLAP:
                    row += tl.where(x < seq.start, 0, gap(tokens, x, CHANNELS) - SPEC.HEAD_DIM)
                s = tl.load(row + SPEC.HEAD_DIM, mask=there, other=float("-inf")).to(tl.float32)
            else:
                old = spread(there & (x < seq.start), SPEC.HEAD_DIM)
                new = spread(there & (x >= seq.start), SPEC.HEAD_DIM)
                k_old = tl.load(kept, mask=old, other=0.0).to(tl.float32)
                k_new = as_kept(tl.load(at + half, mask=new, other=minus_zero()), KEPT, BF16_CONVERSION).to(tl.float32)
                s_old = tl.load(kept + SPEC.HEAD_DIM, mask=old, other=0.0).to(tl.float32)
                s_new = tl.load(at + half + gap(tokens, x, CHANNELS), mask=new, other=float("-inf"))
                s_new = as_kept(s_new, KEPT, BF16_CONVERSION).to(tl.float32)
                k = tl.where(old, k_old, k_new)
                s = tl.where(old, s_old, s_new)
        ks = ks + (k,)
        ss = ss + (s,)
        at += tokens.stride
    return ks, ss


@triton.jit
def load_live(
    live, tokens, window, J0: tl.constexpr, ROWS: tl.constexpr, KEPT: tl.constexpr, SPEC: tl.constexpr,
    INLINE_PTX: tl.constexpr, COUNT: tl.constexpr = 1,
):  # fmt: skip
    """Values and raw scores, not yet converted, of rows `[J0, J0 + ROWS)` of a window whose rows are all new, at once.

    KEPT: as in `as_kept`. COUNT: how many windows, from `window` on, side by side.
    """
    ks = ()
    ss = ()
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    x = (window - SPEC.OVERLAP) * SPEC.RATIO
    at = live + (x + J0).to(tl.int64) * tokens.stride + channels(SPEC.HEAD_DIM, COUNT)
    if COUNT > 1:
        behind = tl.arange(0, COUNT * SPEC.HEAD_DIM) // SPEC.HEAD_DIM * SPEC.RATIO
        at += behind.to(tl.int64) * tokens.stride
        x += behind
    for j in tl.static_range(J0, J0 + ROWS):
        half = 0 if j < SPEC.RATIO * SPEC.OVERLAP else SPEC.OVERLAP * SPEC.HEAD_DIM
        # Past the L1 cache, which is better used for rows of ape.
        ks = ks + (as_kept(tl.load(at + half, cache_modifier=".cg"), KEPT, INLINE_PTX),)
        s = tl.load(at + half + gap(tokens, x + j, CHANNELS), cache_modifier=".cg")
        ss = ss + (as_kept(s, KEPT, INLINE_PTX),)
        at += tokens.stride
    if INLINE_PTX:
        # A barrier for the compiler, which would move the last two loads to their use.
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.b32 $0, 0;",
            "=r,r", [tl.full((), 0, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return ks, ss


@triton.jit
def fold_some(
    m, l, a, ks, ss, ape, biases, j0, FIRST: tl.constexpr, AT: tl.constexpr, ROWS: tl.constexpr, SPEC: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Folds the group of rows `[AT, AT + ROWS)` of `ks` and `ss`, which are those of a window from `j0` on."""
    if biases is None:
        own = load_biases(ape, j0 + AT, None, SPEC, ROWS, COUNT)
    group_ks = ()
    group_ss = ()
    for i in tl.static_range(ROWS):
        bias = own[i] if biases is None else biases[AT + i]
        group_ks = group_ks + (widen(ks[AT + i]),)
        group_ss = group_ss + (widen(ss[AT + i]) + bias,)
    return fold_group(m, l, a, group_ks, group_ss, ROWS, FIRST)


@triton.jit
def fold_part(
    m, l, a, ks, ss, ape, biases, j0, FIRST: tl.constexpr, SPEC: tl.constexpr, AHEAD: tl.constexpr, COUNT: tl.constexpr = 1,
):  # fmt: skip
    """Folds rows `[j0, j0 + AHEAD)` of a window, a group at a time. FIRST: no row has been folded yet."""
    for g in tl.static_range(0, AHEAD, ROWS_AT_ONCE):
        m, l, a = fold_some(
            m, l, a, ks, ss, ape, biases, j0, FIRST and g == 0, g, ROWS_AT_ONCE if g + ROWS_AT_ONCE <= AHEAD else AHEAD - g,
            SPEC, COUNT,
        )  # fmt: skip
    return m, l, a


@triton.jit
def pool_window(
    live, tokens, biases, seq, window, lo, hi, SOURCE: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """The pooled row of a window. biases: ape of its rows, if it has at most AHEAD; None: not loaded yet.

    lo, hi, SOURCE: as in `load_window`.
    """
    AHEAD: tl.constexpr = HOW.AHEAD
    m, l, a = empty_group(SPEC.HEAD_DIM)
    ROWS: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP)
    # The second half is loaded as the first one's registers become free.
    if SOURCE == "live" and (ROWS == AHEAD or ROWS == 2 * AHEAD):
        for j0 in tl.static_range(0, ROWS, AHEAD):
            ks, ss = load_live(live, tokens, window, j0, AHEAD, seq.rows.dtype.element_ty, SPEC, HOW.TARGET.INLINE_PTX)
            m, l, a = fold_part(m, l, a, ks, ss, tokens.ape, biases, j0, j0 == 0, SPEC, AHEAD)
    elif ROWS <= 2 * AHEAD:
        for j0 in tl.static_range(0, ROWS, AHEAD):
            own = biases
            if biases is None:  # ahead of the rows, so that both are waited for at once
                own = load_biases(tokens.ape, j0, None, SPEC, AHEAD)
            ks, ss = load_window(live, tokens, seq, window, lo, hi, j0, SOURCE, SPEC, AHEAD, HOW.TARGET.BF16_CONVERSION)
            m, l, a = fold_part(m, l, a, ks, ss, tokens.ape, own, j0, j0 == 0, SPEC, AHEAD)
    else:
        for j0 in range(0, ROWS, AHEAD):
            ks, ss = load_window(live, tokens, seq, window, lo, hi, j0, SOURCE, SPEC, AHEAD, HOW.TARGET.BF16_CONVERSION)
            m, l, a = fold_part(m, l, a, ks, ss, tokens.ape, biases, j0, False, SPEC, AHEAD)
    return quotient(a, l, HOW.TARGET.FAST_DIVISION)


@triton.jit
def load_rows(live, tokens, window, begin, stop, SPEC: tl.constexpr):
    """Input rows of `[begin, stop)`, not yet converted, one for each position of the window."""
    LENGTH: tl.constexpr = 2 * SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    at = live + (window * SPEC.RATIO).to(tl.int64) * tokens.stride + tl.arange(0, LENGTH)
    copies = ()
    for i in tl.static_range(SPEC.RATIO):
        x = window * SPEC.RATIO + i
        there = spread((x >= begin) & (x < stop), LENGTH)
        copies = copies + (tl.load(whole_row(at, tokens, x, LENGTH // 2), mask=there, other=0.0),)
        at += tokens.stride
    return copies


@triton.jit
def keep_row(copy, seq, i, wanted, lo_place, hi_place, SPEC: tl.constexpr):
    """Stores the input row of position i of a window, loaded before, half by half, where it is `wanted` and has a place."""
    KEPT: tl.constexpr = seq.rows.dtype.element_ty
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    c = tl.arange(0, 2 * CHANNELS)
    row = hi_row(seq, hi_place, SPEC) + i
    there = spread(wanted & (hi_place >= 0) & (i < SPEC.RATIO - 1), 2 * CHANNELS)
    if SPEC.OVERLAP:
        lo = c % CHANNELS < SPEC.HEAD_DIM
        row = tl.where(lo, lo_row(lo_place, SPEC) + i, row)
        there = tl.where(lo, spread(wanted & (lo_place >= 0), 2 * CHANNELS), there)
    at = row * (2 * SPEC.HEAD_DIM) + c // CHANNELS * SPEC.HEAD_DIM + c % SPEC.HEAD_DIM
    tl.store(seq.rows + at, as_kept(copy, KEPT).to(KEPT), mask=there)


@triton.jit
def keep_window(live, tokens, seq, window, begin, stop, SPEC: tl.constexpr, COUNT: tl.constexpr):
    """Keeps what the state wants of new positions `[begin, stop)` of a window; COUNT rows are loaded at once.

    Looks the history up again: few windows are kept, and keeping what was found before would cost all of them registers.
    """
    LENGTH: tl.constexpr = 2 * SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    _held, kept = look_up(seq, SPEC)
    lo_place, hi_place, lo_empty, hi_empty = places_to_keep(seq, window, home_of(seq, window, SPEC), kept, SPEC)
    keep_tags(seq, lo_place, hi_place, lo_empty, hi_empty, stop - 1, SPEC)
    if (lo_place >= 0) | (hi_place >= 0):
        for base in range(begin, stop, COUNT):
            copies = ()
            for i in tl.static_range(COUNT):
                x = base + i
                at = whole_row(live + x.to(tl.int64) * tokens.stride + tl.arange(0, LENGTH), tokens, x, LENGTH // 2)
                copies = copies + (tl.load(at, mask=spread(x < stop, LENGTH), other=0.0),)
            for i in tl.static_range(COUNT):
                x = base + i
                keep_row(copies[i], seq, x - window * SPEC.RATIO, x < stop, lo_place, hi_place, SPEC)
