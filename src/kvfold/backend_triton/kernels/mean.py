"""A step over a `MeanState`: one row of maximum, sum and mean for each sequence, read and written in place.

If a sequence continues an open window, only its first work item reads the row, and only the window that is open after the step
writes it. Where these are two windows, one program folds both, reading before it writes, so that no program waits for another.
With banks no step writes what it reads.
"""

import triton
import triton.language as tl

from ..args import Opened, Tokens
from .finish import emit, entry_address, slot_valid
from .fold import LOWEST, empty_fold, fold_step, minus_zero, quotient, spread
from .items import load_item
from .long_fold import deliver_entry, fold_stretches, load_stretch
from .memory import store_blocks
from .pdl import load_plan, wait_for_inputs
from .prefetch import prefetch_lines, prefetch_tokens
from .short import load_tokens, token_addresses
from .tokens import apart_from, gap_of


@triton.jit
def load_mean(row, resumes, SPEC: tl.constexpr):
    """`(m, l, a)` of the row where a window continues; that of no tokens where a window begins."""
    old = spread(resumes, SPEC.HEAD_DIM)
    m, l, _a = empty_fold(SPEC.HEAD_DIM)
    at = row + tl.arange(0, SPEC.HEAD_DIM)
    m = tl.load(at, mask=old, other=m)
    l = tl.load(at + SPEC.HEAD_DIM, mask=old, other=0.0)
    mean = tl.load(at + 2 * SPEC.HEAD_DIM, mask=old, other=0.0)
    return tl.where(m == float("-inf"), LOWEST, m), l, mean * l  # a cleared row has -inf


@triton.jit
def keep_mean(m, l, a, row, SPEC: tl.constexpr):
    """Stores a row; a cleared one where it has no tokens, or only masked ones."""
    tl.debug_barrier()  # where a row is narrow several threads have read a channel, of which one stores it
    empty = l == 0.0
    at = row + tl.arange(0, SPEC.HEAD_DIM)
    mean = tl.where(empty, 0.0, tl.div_rn(a, tl.where(empty, 1.0, l)))
    store_blocks((at, at + SPEC.HEAD_DIM, at + 2 * SPEC.HEAD_DIM), (tl.where(empty, float("-inf"), m), l, mean), None)


@triton.jit
def whose_windows(item, first, st, SPEC: tl.constexpr):
    """Whether a work item continues from the row; also folds the window that is open in the end; leaves it to another one."""
    window, start, end, _token, _slot, _entry, _sequence = item
    inside = start % SPEC.RATIO != 0
    open_window = end // SPEC.RATIO
    resumes = first & inside
    chains = resumes & (st.ring == 0) & (window < open_window) & (end % SPEC.RATIO != 0)
    leaves = (first == 0) & inside & (st.ring == 0) & (window == open_window)
    return resumes, chains, leaves


@triton.jit
def fold_new(m, l, a, ks, ss, x0, low, high, row, st, start, end, SPEC: tl.constexpr, AHEAD: tl.constexpr):
    """Folds those of positions `[x0, x0 + AHEAD)` that are in `[low, high)`; stores the row, or its banks."""
    for i in tl.static_range(AHEAD):
        x = x0 + i
        there = (x >= low) & (x < high)
        mine = spread(there, SPEC.HEAD_DIM)
        m, l, a = fold_step(m, l, a, tl.where(mine, ks[i], minus_zero()), tl.where(mine, ss[i], float("-inf")))
        # No step goes on from the end of a window.
        if there & (x % SPEC.RATIO != SPEC.RATIO - 1) & ((st.ring > 0) | (x == end - 1)):
            bank = tl.where(st.ring > 0, x - start + 1, 0)
            keep_mean(m, l, a, row + (bank * st.pitch).to(tl.int64) * st.stride, SPEC)
    return m, l, a


@triton.jit
def prefetch_mean(live, tokens, row, begin, stop, resumes, SPEC: tl.constexpr, AHEAD: tl.constexpr):
    """Fetches what a short step loads: the row, and positions `[begin, stop)`, AHEAD at most."""
    LINES: tl.constexpr = (SPEC.HEAD_DIM * 4 + 127) // 128
    STEP: tl.constexpr = 128 if SPEC.HEAD_DIM >= 32 else SPEC.HEAD_DIM * 4
    e = tl.arange(0, 4 * LINES)
    prefetch_lines(row.to(tl.int64, bitcast=True) + e * STEP, (e < 3 * LINES) & resumes)
    prefetch_tokens(live, tokens, begin, stop, AHEAD, SPEC.HEAD_DIM)


@triton.jit
def short_mean_step(pid, plan, one, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Work item `pid`: no step has more than AHEAD new tokens of a sequence, which are all loaded at once."""
    tokens, st, _snaps, _scratch, cache = one
    total = load_plan(plan.num_items)
    here = pid < total
    item = load_item(plan.items, pid)
    window, start, end, token, slot, entry, _sequence = item
    entry = tl.where(here, entry, -1)
    first = here & (window == start // SPEC.RATIO)
    resumes, chains, leaves = whose_windows(item, first, st, SPEC)
    cache_slot, weight, cos, sin = entry_address(entry, window * SPEC.RATIO, plan, cache, SPEC)
    usable = here & (slot < st.num_slots) & (token + end - start <= tokens.count)
    refused = False
    if usable & (leaves == 0):
        begin = tl.maximum(start, window * SPEC.RATIO)
        stop = begin + tl.minimum(end - begin, SPEC.RATIO - begin % SPEC.RATIO)
        upto = tl.where(chains, end, stop)
        live = tokens.kv_score + (token - start).to(tl.int64) * tokens.stride
        apart = apart_from(tokens, token - start)
        own = Tokens(tokens.kv_score, tokens.stride, tokens.count, tokens.ape, apart, tokens.skew)
        row = st.rows + slot * st.stride
        ats, gaps, theres, biases = token_addresses(live, own, begin, upto, SPEC, HOW.AHEAD)
        if HOW.PDL:
            prefetch_mean(live, own, row, begin, upto, resumes, SPEC, HOW.AHEAD)
        wait_for_inputs(HOW.PDL)
        m, l, a = load_mean(row, resumes, SPEC)
        ks, ss = load_tokens(ats, gaps, theres, biases)
        m, l, a = fold_new(m, l, a, ks, ss, begin, begin, stop, row, st, start, end, SPEC, HOW.AHEAD)
        y = quotient(a, l, HOW.TARGET.FAST_DIVISION)
        if HOW.AHEAD > 1 and chains:
            m, l, a = empty_fold(SPEC.HEAD_DIM)
            fold_new(m, l, a, ks, ss, begin, stop, end, row, st, start, end, SPEC, HOW.AHEAD)
        deliver, refused = slot_valid(entry, cache_slot, window * SPEC.RATIO, plan.entry_capacity, cache, SPEC.ROPE_DIM)
        if deliver:
            emit(y, entry, cache_slot, weight, cos, sin, cache, SPEC, FMT, HOW.TARGET)
    else:
        # The next launch waits for this one alone, so this one must end after the one before it, also where it does nothing.
        wait_for_inputs(HOW.PDL)
    if (first & (usable == 0)) | refused:
        tl.atomic_add(plan.errors, 1)


@triton.jit
def fold_window(m, l, a, mine, tokens, HOW: tl.constexpr, SPEC: tl.constexpr):
    """Folds all new tokens of a window, in full stretches and a partial last one."""
    stretches = tl.maximum(mine.stop - mine.begin, 0) // HOW.AHEAD
    if stretches > 0:
        ms, ls, as_, _behind = fold_stretches((m,), (l,), (a,), (mine,), mine.begin, stretches, 0, tokens, HOW, SPEC)
        m = ms[0]
        l = ls[0]
        a = as_[0]
    j = mine.begin + stretches * HOW.AHEAD
    left = mine.stop - j
    if left > 0:
        row = None if tokens.ape is None else tokens.ape + j * SPEC.HEAD_DIM
        at = mine.live + j.to(tl.int64) * tokens.stride
        apart = gap_of(mine.apart, tokens.skew, j, 0)
        biases, ks, ss = load_stretch(at, apart, tokens, row, left, HOW.AHEAD, SPEC.HEAD_DIM, HOW.SLICE)
        for i in tl.static_range(HOW.AHEAD):
            m, l, a = fold_step(m, l, a, ks[i].to(tl.float32), ss[i].to(tl.float32) + biases[i])
    return m, l, a


@triton.jit
def long_mean_step(pid, programs, plan, one, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Program `pid` of `programs`, each of which takes work items in turn. Steps over banks are short ones."""
    tokens, st, _snaps, scratch, cache = one
    total = load_plan(plan.num_items)
    item = load_item(plan.items, pid, pid < total)
    wait_for_inputs(HOW.PDL)
    for index in range(pid, total, programs):
        window, start, end, token, slot, entry, sequence = item
        x0 = window * SPEC.RATIO
        first = window == start // SPEC.RATIO
        resumes, chains, leaves = whose_windows(item, first, st, SPEC)
        usable = (slot < st.num_slots) & (token + end - start <= tokens.count)
        if first & (usable == 0):
            tl.atomic_add(plan.errors, 1)
        mine = usable & (leaves == 0)
        row = st.rows + tl.where(usable, slot, 0) * st.stride
        m, l, a = load_mean(row, usable & resumes, SPEC)
        begin = tl.where(mine, tl.maximum(start - x0, 0), SPEC.RATIO)
        stop = tl.where(mine, tl.minimum(end - x0, SPEC.RATIO), 0)
        entry = tl.where(mine, entry, -1)
        for _ in range(0, tl.where(usable & chains, 2, 1)):
            live = tokens.kv_score + (token + x0 - start).to(tl.int64) * tokens.stride + tl.arange(0, SPEC.HEAD_DIM)
            apart = apart_from(tokens, token + x0 - start)
            opened = Opened(live, apart, begin, stop, slot, x0, start, end, entry, sequence, first)
            m, l, a = fold_window(m, l, a, opened, tokens, HOW, SPEC)
            if mine & (x0 + stop == end) & (stop < SPEC.RATIO):
                keep_mean(m, l, a, row, SPEC)
            y = quotient(a, l, HOW.TARGET.FAST_DIVISION)
            needs = entry_address(entry, x0, plan, cache, SPEC)
            deliver_entry(
                y, entry, x0, needs, None, 0, scratch, plan, cache, HOW.TARGET, SPEC.HEAD_DIM, SPEC, FMT,
            )  # fmt: skip
            # Of a second turn: the window that is open after the step.
            x0 = end - end % SPEC.RATIO
            begin = begin * 0
            stop = end - x0
            entry = entry * 0 - 1
            m, l, a = empty_fold(SPEC.HEAD_DIM)
        item = load_item(plan.items, index + programs, index + programs < total)
