"""A step over `WindowState`: writes the raw rows of new tokens, and pools every window that ends, in parallel.

Two kinds of programs in one launch. Writers take work items in turn and store their new rows. The others take slices of
entries, SLICE channels of value and score of all rows of a window. A short window is one tile. A long one comes through shared
memory, tile by tile, with several on their way: with a whole window in registers, four programs fit a multiprocessor, too few
to hide what a slice costs beside its loads. Old rows come from the pages, new ones live, so nobody waits for a writer. Where
several programs share an entry, the one that brings the last slice finishes it; which one that is changes no bit.
"""

import triton
import triton.language as tl

from .epilogue import aim_entry, emit, judge_slot
from .fold import LOG2_E, LOWEST, fold_step, spread
from .pdl import load_plan, wait_for_inputs
from .record import bf16_bits, bf16_value
from .slices import bring_slice, take_slices


@triton.jit
def find_pages(table, width, num_pages, sequence, x, wanted, page_size):
    """Pages of positions `x`, and which of the wanted ones have none (-1) or a bad one (outside the table or the pool)."""
    column = x // page_size
    inside = column < width
    at = table + sequence.to(tl.int64) * width + column
    page = tl.load(at, mask=wanted & inside, other=-1, cache_modifier=".cg")
    bad = wanted & ((inside == 0) | (page < -1) | (page >= num_pages))
    return page.to(tl.int64), wanted & inside & (page == -1), bad


@triton.jit
def as_stored(x, BF16: tl.constexpr):
    """fp32 rounded as the state rounds it."""
    if BF16:
        x = bf16_value(bf16_bits(x))
    return x


@triton.jit
def store_rounded(pool, at, x, mask):
    if pool.dtype.element_ty == tl.bfloat16:
        tl.store(pool.to(tl.pointer_type(tl.int16)) + at, bf16_bits(x), mask=mask)
    else:
        tl.store(pool + at, x, mask=mask)


@triton.jit
def write_rows(
    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
    begin, stop, start, token, sequence,
    RATIO: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores the rows of new positions `[begin, stop)`; returns how many have a bad page."""
    c = tl.arange(0, CHANNELS)
    if ALIGNED:
        kv_stride = (kv_stride // 16) * 16  # says that it is a multiple, which the signature does not: see `pool_slice`
    refused = tl.zeros((), tl.int32)
    for base in range(0, stop - begin, AHEAD):
        # Loads first, of rows and of pages; a load behind a store would wait for the load that the store waits for.
        ks = ()
        ss = ()
        places = ()
        for i in tl.static_range(AHEAD):
            x = begin + base + i
            there = spread(x < stop, CHANNELS)
            at = kv_score + (token + x - start).to(tl.int64) * kv_stride + c
            k = tl.load(at, mask=there, other=0.0).to(tl.float32)
            s = tl.load(at + CHANNELS, mask=there, other=0.0).to(tl.float32)
            if ape is not None:
                s += tl.load(ape + (x % RATIO) * CHANNELS + c, mask=there, other=0.0)
            kv_page, _, kv_bad = find_pages(kv_table, kv_width, kv_pages, sequence, x, x < stop, page_size)
            score_page, _, score_bad = find_pages(
                score_table, score_width, score_pages, sequence, x, x < stop, page_size
            )  # fmt: skip
            refused += (kv_bad | score_bad).to(tl.int32)
            ks = ks + (k,)
            ss = ss + (s,)
            places = places + (
                (kv_page, (x < stop) & (kv_bad == 0) & (kv_page >= 0), score_page,
                 (x < stop) & (score_bad == 0) & (score_page >= 0)),
            )  # fmt: skip
        for i in tl.static_range(AHEAD):
            kv_page, kv_kept, score_page, score_kept = places[i]
            row = ((begin + base + i) % page_size).to(tl.int64)
            at = kv_page * kv_page_stride + row * kv_row_stride + c
            store_rounded(kv_pool, at, ks[i], spread(kv_kept, CHANNELS))
            at = score_page * score_page_stride + row * score_row_stride + c
            store_rounded(score_pool, at, ss[i], spread(score_kept, CHANNELS))
    return refused


@triton.jit
def check_window(
    kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size, window, start, sequence,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many old rows of a window have no page, and how many a bad one."""
    missing = tl.zeros((), tl.int32)
    bad = tl.zeros((), tl.int32)
    for j0 in range(0, RATIO * (1 + OVERLAP), TILE):
        j = j0 + tl.arange(0, TILE)
        x = (window - OVERLAP) * RATIO + j
        wanted = (x >= 0) & (x < start) & (j < RATIO * (1 + OVERLAP))
        x = tl.maximum(x, 0)
        _, kv_missing, kv_bad = find_pages(kv_table, kv_width, kv_pages, sequence, x, wanted, page_size)
        _, score_missing, score_bad = find_pages(score_table, score_width, score_pages, sequence, x, wanted, page_size)
        missing += tl.sum((kv_missing | score_missing).to(tl.int32), axis=0)
        bad += tl.sum((kv_bad | score_bad).to(tl.int32), axis=0)
    return missing, bad


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def load_live_rows(kv_score, kv_stride, ape, j, c, new, token, RATIO: tl.constexpr, CHANNELS: tl.constexpr):
    """Values, scores and ape of those rows `j` of a window that are new, as they come; the others weigh nothing."""
    news = (new.to(tl.int32)[:, None] + c.to(tl.int32) * 0) != 0
    live = kv_score + (token.to(tl.int64) * kv_stride)[:, None] + c
    k = tl.load(live, mask=news, other=-0.0)
    s = tl.load(live + CHANNELS, mask=news, other=float("-inf"))
    bias = tl.zeros(c.shape, tl.float32)
    if ape is not None:
        bias = tl.load(ape + ((j % RATIO) * CHANNELS)[:, None] + c, mask=news, other=0.0)
    return k, s, bias


@triton.jit
def round_live_rows(k, s, bias, BF16: tl.constexpr):
    """Of what `load_live_rows` returned: values and scores as they are stored."""
    return as_stored(k.to(tl.float32), BF16), as_stored(s.to(tl.float32) + bias, BF16)


@triton.jit
def find_rows(
    kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
    score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size, sequence, x, wanted,
):  # fmt: skip
    """Where the rows of positions `x` are in both pools, in elements, each looked up; which of those wanted are there, and how
    many are not."""
    kv_page, kv_missing, kv_bad = find_pages(kv_table, kv_width, kv_pages, sequence, x, wanted, page_size)
    score_page, score_missing, score_bad = find_pages(score_table, score_width, score_pages, sequence, x, wanted, page_size)
    lost = kv_missing | kv_bad | score_missing | score_bad
    row = (x % page_size).to(tl.int64)
    kv_at = kv_page * kv_page_stride + row * kv_row_stride
    score_at = score_page * score_page_stride + row * score_row_stride
    return kv_at, score_at, wanted & (lost == 0), tl.sum(lost.to(tl.int32), axis=0)


@triton.jit
def load_old_rows(kv_pool, score_pool, kv_at, score_at, there):
    """Values and scores of old rows that are there; the others weigh nothing."""
    theirs = (there.to(tl.int32)[:, None] + kv_at.to(tl.int32) * 0) != 0
    k = tl.load(kv_pool + kv_at, mask=theirs, other=-0.0).to(tl.float32)
    s = tl.load(score_pool + score_at, mask=theirs, other=float("-inf")).to(tl.float32)
    return k, s


@triton.jit
def pool_short(
    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
    window, start, token, sequence, c0, homes,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr, HEAD_DIM: tl.constexpr,
    ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """`pool_slice` of a window whose rows are all in flight at once, in ROWS rows of a tile."""
    BF16: tl.constexpr = kv_pool.dtype.element_ty == tl.bfloat16
    CHANNELS: tl.constexpr = HEAD_DIM * (1 + OVERLAP)
    j = tl.arange(0, ROWS)
    x = (window - OVERLAP) * RATIO + j
    there = x >= 0
    if ROWS > RATIO * (1 + OVERLAP):
        there = there & (j < RATIO * (1 + OVERLAP))
    old = there & (x < start)
    if ONE_PAGE:
        kv_before, kv_this, kv_lost, score_before, score_this, score_lost = homes
        before = j < RATIO * OVERLAP
        kv_page = tl.where(before, kv_before, kv_this)
        score_page = tl.where(before, score_before, score_this)
        row = ((window * RATIO) % page_size + j - RATIO * OVERLAP).to(tl.int64)
        if OVERLAP:
            row = tl.where(before, (tl.maximum(window - 1, 0) * RATIO) % page_size + j, row)
        kv_at = kv_page * kv_page_stride + row * kv_row_stride
        score_at = score_page * score_page_stride + row * score_row_stride
        lost = (kv_lost | score_lost).to(tl.int32)
        old = old & (lost == 0)
    else:
        kv_at, score_at, old, lost = find_rows(
            kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
            score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
            sequence, tl.maximum(x, 0), old,
        )  # fmt: skip
    # Overlap: the window before gives its lo half, this window its hi half.
    half = tl.where(j < RATIO * OVERLAP, 0, OVERLAP * HEAD_DIM)
    c = (half[:, None] + (c0 + tl.arange(0, SLICE))[None, :]).to(tl.int64)
    k, s = load_old_rows(kv_pool, score_pool, kv_at[:, None] + c, score_at[:, None] + c, old)
    new = there & (x >= start)
    live = load_live_rows(kv_score, kv_stride, ape, j, c, new, token + x - start, RATIO, CHANNELS)
    live_k, live_s = round_live_rows(live[0], live[1], live[2], BF16)
    news = (new.to(tl.int32)[:, None] + c.to(tl.int32) * 0) != 0
    k = tl.where(news, live_k, k)
    s = tl.where(news, live_s, s)
    top = tl.maximum(tl.max(s, axis=0), LOWEST)
    # One operation instead of two. What rounding -top * LOG2_E changes, it changes in all weights alike.
    e = tl.exp2(tl.fma(s, LOG2_E + tl.zeros_like(s), (top * -LOG2_E)[None, :] + tl.zeros_like(s)))
    l, a = tl.reduce((e, e * k), 0, add_pairs)
    return a / l, lost


@triton.jit
def pool_long(
    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
    window, start, token, sequence, c0, homes,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SLICE: tl.constexpr,
    HEAD_DIM: tl.constexpr, ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """`pool_slice` of a window of several tiles. STAGES: as many tiles of old rows but one are in flight, in shared memory.

    Row j goes to fold `j % TILE` of its channel, in the order of j; at the end the TILE folds of a channel become one. So the
    order of the sums does not follow which rows are old and which are new.
    """
    BF16: tl.constexpr = kv_pool.dtype.element_ty == tl.bfloat16
    CHANNELS: tl.constexpr = HEAD_DIM * (1 + OVERLAP)
    WINDOW_ROWS: tl.constexpr = RATIO * (1 + OVERLAP)
    x0 = (window - OVERLAP) * RATIO
    # Rows [none, olds) of the window stood there before the step; those before `none` are before the sequence.
    none = tl.maximum(-x0, 0)
    olds = tl.minimum(tl.maximum(start - x0, none), WINDOW_ROWS)
    i = tl.arange(0, TILE)
    c = tl.arange(0, SLICE)[None, :] + (i * 0)[:, None]
    lost = tl.zeros((), tl.int32)
    if ONE_PAGE:
        kv_before, kv_this, kv_lost, score_before, score_this, score_lost = homes
        lost = (kv_lost | score_lost).to(tl.int32)
    # The first new rows come while the old ones are folded, and are looked at behind them. A tile is of one window, so that
    # with overlap it has one half.
    first_new = (olds // TILE) * TILE
    j = first_new + i
    c_new = c0 + tl.where(first_new < RATIO * OVERLAP, 0, OVERLAP * HEAD_DIM) + c
    new_k, new_s, bias = load_live_rows(
        kv_score, kv_stride, ape, j, c_new, (j >= olds) & (j < WINDOW_ROWS), token + x0 + j - start, RATIO, CHANNELS
    )  # fmt: skip
    m = tl.full((TILE, SLICE), LOWEST, tl.float32)
    l = tl.zeros((TILE, SLICE), tl.float32)
    a = tl.zeros((TILE, SLICE), tl.float32)
    for j0 in tl.range(none, tl.where(lost == 0, olds, none), TILE, num_stages=STAGES):
        before = j0 < RATIO * OVERLAP
        at = (c0 + tl.where(before, 0, OVERLAP * HEAD_DIM)).to(tl.int64)
        there = j0 + i < olds
        if ONE_PAGE:
            kv_page = tl.where(before, kv_before, kv_this)
            score_page = tl.where(before, score_before, score_this)
            of_this = (window * RATIO) % page_size - RATIO * OVERLAP
            row = tl.where(before, (tl.maximum(window - 1, 0) * RATIO) % page_size, of_this) + j0
            # The rows stand one behind the other. A page spans less than 2**31 elements: one 32-bit offset for each row.
            kv_at = (i * kv_row_stride.to(tl.int32))[:, None] + c
            score_at = (i * score_row_stride.to(tl.int32))[:, None] + c
            k, s = load_old_rows(
                kv_pool + (kv_page * kv_page_stride + row * kv_row_stride + at),
                score_pool + (score_page * score_page_stride + row * score_row_stride + at),
                kv_at, score_at, there,
            )  # fmt: skip
        else:
            kv_at, score_at, there, missing = find_rows(
                kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
                score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
                sequence, x0 + j0 + i, there,
            )  # fmt: skip
            lost += missing
            k, s = load_old_rows(kv_pool, score_pool, kv_at[:, None] + at + c, score_at[:, None] + at + c, there)
        m, l, a = fold_step(m, l, a, k, s)
    k, s = round_live_rows(new_k, new_s, bias, BF16)
    m, l, a = fold_step(m, l, a, k, s)
    for j0 in range(first_new + TILE, WINDOW_ROWS, TILE):
        j = j0 + i
        c_new = c0 + tl.where(j0 < RATIO * OVERLAP, 0, OVERLAP * HEAD_DIM) + c
        new_k, new_s, bias = load_live_rows(
            kv_score, kv_stride, ape, j, c_new, j >= 0, token + x0 + j - start, RATIO, CHANNELS
        )  # fmt: skip
        k, s = round_live_rows(new_k, new_s, bias, BF16)
        m, l, a = fold_step(m, l, a, k, s)
    top = tl.max(m, axis=0)
    weight = tl.exp2((m - top[None, :]) * LOG2_E)
    l, a = tl.reduce((l * weight, a * weight), 0, add_pairs)
    return a / l, lost


@triton.jit
def pool_slice(
    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
    window, start, token, sequence, c0, homes,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SLICE: tl.constexpr,
    HEAD_DIM: tl.constexpr, ONE_PAGE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Channels `[c0, c0 + SLICE)` of a pooled row, and how many old rows it needs that are not there.

    Rows are summed in an order that follows from TILE, SLICE and the number of warps: one order for every call of a spec.
    """
    if ALIGNED:
        # Known to be a multiple of 4 and no more, so that a thread has 4 channels of kv_score as it has of an fp32 pool. With
        # 8, whatever meets the live rows gets 8 too, and one window of 128 rows took twice the shuffles.
        kv_stride = (kv_stride // 4) * 4
    if TILE >= RATIO * (1 + OVERLAP):
        y, lost = pool_short(
            kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
            score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
            window, start, token, sequence, c0, homes,
            RATIO, OVERLAP, TILE, SLICE, HEAD_DIM, ONE_PAGE,
        )  # fmt: skip
    else:
        y, lost = pool_long(
            kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
            score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
            window, start, token, sequence, c0, homes,
            RATIO, OVERLAP, TILE, STAGES, SLICE, HEAD_DIM, ONE_PAGE,
        )  # fmt: skip
    return y, lost


@triton.jit
def find_homes(
    table, width, num_pages, page_size, window, start, sequence, there, RATIO: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Pages of the window before and of this one, where each has its rows on one page, and whether one that is needed is not
    there."""
    x = window * RATIO
    this, missing, bad = find_pages(table, width, num_pages, sequence, x, there & (start > x), page_size)
    lost = missing | bad
    before = this
    if OVERLAP:
        x = tl.maximum(window - 1, 0) * RATIO
        wanted = there & (window > 0) & (start > x)
        before, missing, bad = find_pages(table, width, num_pages, sequence, x, wanted, page_size)
        lost = lost | missing | bad
    return before, this, lost


@triton.jit
def load_unit(
    items, entry_items, entry_slots, unit, num_units,
    kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, SLICES: tl.constexpr, ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """What a slice of an entry must know before it can load its rows: nothing that a kernel in flight writes."""
    there = unit < num_units
    index = tl.load(entry_items + unit // SLICES, mask=there, other=0, cache_modifier=".cg")
    slot = (unit // SLICES).to(tl.int64)
    if entry_slots is not None:
        slot = tl.load(entry_slots + unit // SLICES, mask=there, other=-1, cache_modifier=".cg")
    window, start, end, token, entry, sequence = load_item(items, index, there)
    homes = ()
    if ONE_PAGE:
        kv = find_homes(kv_table, kv_width, kv_pages, page_size, window, start, sequence, there, RATIO, OVERLAP)
        score = find_homes(score_table, score_width, score_pages, page_size, window, start, sequence, there, RATIO, OVERLAP)
        homes = kv + score
    return window, start, end, token, entry, sequence, slot, homes


@triton.jit
def load_item(items, index, there):
    item = items + index * 8
    window = tl.load(item, mask=there, other=0, cache_modifier=".cg")
    start = tl.load(item + 1, mask=there, other=0, cache_modifier=".cg")
    end = tl.load(item + 2, mask=there, other=0, cache_modifier=".cg")
    token = tl.load(item + 3, mask=there, other=0, cache_modifier=".cg")
    entry = tl.load(item + 5, mask=there, other=-1, cache_modifier=".cg")
    sequence = tl.load(item + 6, mask=there, other=0, cache_modifier=".cg")
    return window, start, end, token, entry, sequence


@triton.jit
def window_kernel(
    items, num_items, entry_slots, entry_capacity, errors, entry_items, cu_entries, batch,
    kv_score, kv_stride, num_tokens, ape,
    kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
    workspace, arrivals, num_writers,
    rows, norm_weight, rope, max_position, pages, page_stride, scales, scales_stride, rows_per_page, cache_slots, cache_scale,
    PDL: tl.constexpr, HARDWARE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, SLICE: tl.constexpr, AHEAD: tl.constexpr, ONE_PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEAD_DIM: tl.constexpr, LOG2: tl.constexpr, ROPE_DIM: tl.constexpr, EPS: tl.constexpr, HADAMARD: tl.constexpr,
    ROUND_ROWS: tl.constexpr, ELEMENT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr,
    FLOOR_ON_SCALE: tl.constexpr, DIVIDE: tl.constexpr, ROTATED_BF16: tl.constexpr, PAD: tl.constexpr,
    ROUND_VALUES: tl.constexpr, TIES_TO_ZERO: tl.constexpr, ROW_BYTES: tl.constexpr, TAIL_BYTES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    total = load_plan(num_items)
    num_entries = tl.minimum(load_plan(cu_entries + batch), entry_capacity)
    SLICES: tl.constexpr = HEAD_DIM // SLICE
    # The first item is read before the wait: the plan and what it was built from are older than the launch before this one.
    if pid < num_writers:
        index = pid
        window, start, end, token, entry, sequence = load_item(items, index, index < total)
        wait_for_inputs(PDL)
        while index < total:
            if token + end - start <= num_tokens:
                begin = tl.maximum(start, window * RATIO)
                stop = begin + tl.minimum(end - begin, RATIO - begin % RATIO)
                refused = write_rows(
                    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
                    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
                    begin, stop, start, token, sequence, RATIO, HEAD_DIM * (1 + OVERLAP), AHEAD, ALIGNED,
                )  # fmt: skip
                count = (refused > 0).to(tl.int32)
                if entry >= 0:
                    missing, bad = check_window(
                        kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size,
                        window, start, sequence, RATIO, OVERLAP, TILE,
                    )  # fmt: skip
                    slot = tl.where(entry < entry_capacity, entry, -1).to(tl.int64)
                    if entry_slots is not None:
                        slot = tl.load(entry_slots + entry, mask=entry < entry_capacity, other=-1, cache_modifier=".cg")
                    deliver, wrong = judge_slot(
                        entry, slot, window * RATIO, entry_capacity, max_position, pages, cache_slots, ROPE_DIM
                    )  # fmt: skip
                    wanted = (entry >= entry_capacity) | (slot != -1)
                    if bad > 0:
                        count = bad * 0 + 1
                    elif missing > 0:
                        count = tl.maximum(count, wanted.to(tl.int32))
                    else:
                        count += wrong.to(tl.int32)
                if count > 0:
                    tl.atomic_add(errors, count)
            else:
                if window == start // RATIO:
                    tl.atomic_add(errors, 1)
            index += num_writers
            window, start, end, token, entry, sequence = load_item(items, index, index < total)
    else:
        unit = pid - num_writers
        num_units = num_entries * SLICES
        window, start, end, token, entry, sequence, slot, homes = load_unit(
            items, entry_items, entry_slots, unit, num_units,
            kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size,
            RATIO, OVERLAP, SLICES, ONE_PAGE,
        )  # fmt: skip
        wait_for_inputs(PDL)
        while unit < num_units:
            c0 = (unit % SLICES) * SLICE
            deliver, refused = judge_slot(
                entry, slot, window * RATIO, entry_capacity, max_position, pages, cache_slots, ROPE_DIM
            )  # fmt: skip
            if deliver & (token + end - start <= num_tokens):
                y, absent = pool_slice(
                    kv_score, kv_stride, ape, kv_pool, kv_page_stride, kv_row_stride, kv_pages, kv_table, kv_width,
                    score_pool, score_page_stride, score_row_stride, score_pages, score_table, score_width, page_size,
                    window, start, token, sequence, c0, homes,
                    RATIO, OVERLAP, TILE, STAGES, SLICE, HEAD_DIM, ONE_PAGE, ALIGNED,
                )  # fmt: skip
                # Every slice sees the same rows, so either all of them bring theirs or none.
                finish = absent == 0
                if SLICES > 1:
                    finish = bring_slice(workspace, arrivals, y, entry, c0, finish, SLICES, SLICE)
                if finish:
                    _slot, weight, cos, sin = aim_entry(
                        entry, window * RATIO, None, entry_capacity, norm_weight, rope, max_position, pages,
                        HEAD_DIM, ROPE_DIM,
                    )  # fmt: skip
                    if SLICES > 1:
                        whole = take_slices(workspace, arrivals, entry, HEAD_DIM)
                    else:
                        whole = y
                    emit(
                        whole, entry, slot, weight, cos, sin,
                        rows, pages, page_stride, scales, scales_stride, rows_per_page, cache_scale,
                        HEAD_DIM, LOG2, ROPE_DIM, EPS, HADAMARD, ROUND_ROWS, ELEMENT, GROUP, SCALE, FLOOR, FLOOR_ON_SCALE,
                        DIVIDE, ROTATED_BF16, PAD, ROUND_VALUES, TIES_TO_ZERO, ROW_BYTES, TAIL_BYTES, HARDWARE,
                    )  # fmt: skip
            # Not before the work on this unit: that cost 150 of 1,300 instructions, and other programs hide the latency.
            unit += tl.num_programs(0) - num_writers
            window, start, end, token, entry, sequence, slot, homes = load_unit(
                items, entry_items, entry_slots, unit, num_units,
                kv_pages, kv_table, kv_width, score_pages, score_table, score_width, page_size,
                RATIO, OVERLAP, SLICES, ONE_PAGE,
            )  # fmt: skip
