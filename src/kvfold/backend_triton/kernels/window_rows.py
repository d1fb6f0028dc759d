"""Pooling a window of raw rows: where its rows come from, and the order in which they are summed."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..args import Numbers, Tokens
from .fold import LOG2_E, LOWEST, quotient, spread
from .numbers import load_row_numbers
from .record import bf16_bits, bf16_value
from .tokens import gaps


class Pools(NamedTuple):
    """A `WindowState`: the `Pool` of values and that of scores, whose pages hold `page_size` positions each.

    null_page, ring: as in `args.WindowArguments`.
    """

    kv: Any
    score: Any
    page_size: Any
    null_page: Any
    ring: Any


class Pages(NamedTuple):
    """The pages, in both pools, of a window whose rows share a page, and of the window before it; -1: none.

    absent: an old row has no page. bad: a row of this window has a page outside its pool or table.
    """

    kv_before: Any
    kv: Any
    score_before: Any
    score: Any
    absent: Any
    bad: Any


class Tiling(NamedTuple):
    """Constants of how rows are pooled. LANES and GROUP are the order of the sums; the others change no bit.

    TILE: rows in flight at once. LANES: sums side by side; row j belongs to lane j % LANES. GROUP: rows of a lane that are
    weighed against one maximum. SLICE: channels of a part of an entry. ONE_PAGE: a window lies on one page. LANE_PAGES: it does
    not, but each LANES of its rows do. PROMPT: for long steps, where windows that are all new are common. ALIGNED: rows of
    kv_score begin at multiples of 16 bytes. JOIN: among how many last rows of a window the program that pools it stores the new
    ones; 0 for none.
    """

    TILE: Any
    LANES: Any
    GROUP: Any
    SLICE: Any
    ONE_PAGE: Any
    LANE_PAGES: Any
    PROMPT: Any
    ALIGNED: Any
    JOIN: Any


@triton.jit
def find_pages(pools, pool, sequence, x, wanted):
    """Pages of positions `x`, and which of the wanted ones have none (-1) or a bad one (outside the table or the pool)."""
    column = x // pools.page_size
    if pools.ring is not None:
        column = column % pool.width
    inside = column < pool.width
    if pool.step is None:
        at = pool.table + sequence.to(tl.int64) * pool.width + column
        page = tl.load(at, mask=wanted & inside, other=-1, cache_modifier=".cg")
    else:
        page = load_row_numbers(Numbers(pool.table, pool.step), sequence, column, wanted & inside, -1, ".cg")
        page = tl.where(page == pools.null_page, -1, page)
    bad = wanted & ((inside == 0) | (page < -1) | (page >= pool.num_pages))
    return page.to(tl.int64), wanted & inside & (page == -1), bad


@triton.jit
def check_window(pools, item, SPEC: tl.constexpr, tiling):
    """How many old rows of a window have no page, and how many a bad one; for a window on one page, whether there are any."""
    missing = tl.zeros((), tl.int32)
    bad = tl.zeros((), tl.int32)
    STEP: tl.constexpr = SPEC.RATIO if tiling.ONE_PAGE else tiling.LANES if tiling.LANE_PAGES else 1
    ROWS: tl.constexpr = (1 + SPEC.OVERLAP) if tiling.ONE_PAGE else tiling.TILE // STEP
    for j0 in range(0, SPEC.RATIO * (1 + SPEC.OVERLAP), ROWS * STEP):
        j = j0 + tl.arange(0, ROWS) * STEP
        x = (item.window - SPEC.OVERLAP) * SPEC.RATIO + j
        wanted = (x >= 0) & (x < item.start) & (j < SPEC.RATIO * (1 + SPEC.OVERLAP))
        x = tl.maximum(x, 0)
        _, kv_missing, kv_bad = find_pages(pools, pools.kv, item.sequence, x, wanted)
        _, score_missing, score_bad = find_pages(pools, pools.score, item.sequence, x, wanted)
        missing += tl.sum((kv_missing | score_missing).to(tl.int32), axis=0)
        bad += tl.sum((kv_bad | score_bad).to(tl.int32), axis=0)
    return missing, bad


@triton.jit
def as_stored(x, BF16: tl.constexpr):
    """fp32 rounded as the state rounds it."""
    return bf16_value(bf16_bits(x)) if BF16 else x


@triton.jit
def store_rounded(pool, at, x, mask):
    if pool.dtype.element_ty == tl.bfloat16:
        tl.store(pool.to(tl.pointer_type(tl.int16)) + at, bf16_bits(x), mask=mask)
    else:
        tl.store(pool + at, x, mask=mask)


@triton.jit
def put_new_rows(k, s, tokens, item, j, x, c, new, RATIO: tl.constexpr, CHANNELS: tl.constexpr, BF16: tl.constexpr):
    """A tile of old rows with the `new` ones put in, any number of them."""
    news = (new.to(tl.int32)[:, None] + c.to(tl.int32) * 0) != 0
    token = item.token + x - item.start
    live = tokens.kv_score + (token.to(tl.int64) * tokens.stride)[:, None] + c
    new_k = tl.load(live, mask=news, other=0.0).to(tl.float32)
    new_s = tl.load(live + gaps(tokens, token, CHANNELS), mask=news, other=float("-inf")).to(tl.float32)
    if tokens.ape is not None:
        new_s += tl.load(tokens.ape + ((j % RATIO) * CHANNELS)[:, None] + c, mask=news, other=0.0)
    return tl.where(news, as_stored(new_k, BF16), k), tl.where(news, as_stored(new_s, BF16), s)


@triton.jit
def load_lane_pages(pools, pool, sequence, x0, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The table's pages for each LANES rows from position `x0` on, which share a page, as int32; beyond the table those of its
    last column. They are scalars, all loaded before the first is used.
    """
    words = pool.table + sequence.to(tl.int64) * pool.width
    apart = 1
    if pool.step is not None:
        words = pool.table.to(tl.pointer_type(tl.int32)) + sequence.to(tl.int64) * (pool.step // 2)
        apart = 1 + (pool.step % 2).to(tl.int32)  # int64: the low word, and `check_window` looks at both
    column = x0 // pools.page_size
    row = x0 - column * pools.page_size
    found = ()
    for _i in tl.static_range(COUNT):
        at = tl.minimum(column, pool.width - 1) if pools.ring is None else column % pool.width
        found = found + (tl.load(words + at * apart, cache_modifier=".cg"),)
        row += LANES
        column += (row >= pools.page_size).to(tl.int32)
        row = tl.where(row >= pools.page_size, 0, row)
    return found


@triton.jit
def lane_rows(pool, page, row):
    """Where row `row` of a page of `load_lane_pages` begins; of page 0 if that page is not in the pool."""
    page = tl.where(page.to(tl.uint32) < pool.num_pages.to(tl.uint32), page, 0)
    # A page spans less than 2**31 elements.
    return pool.rows + page.to(tl.int64) * pool.page_stride + row * pool.row_stride.to(tl.int32)


@triton.jit
def load_page_rows(
    tokens, pools, item, c0, j0, pages, mine, SPEC: tl.constexpr, tiling, BF16: tl.constexpr
):  # fmt: skip
    """Rows `[j0, j0 + TILE)` of a window, of which only some of the last LANES are new: the usual decode.

    The window lies on one page, or each LANES of its rows do; rows without a page are read from page 0. All are loaded, and new
    ones replace what was there: without masks a tile takes half the instructions.

    mine: the new rows are stored as well, on the one page.
    """
    LANES: tl.constexpr = tiling.LANES
    c = c0 + tl.arange(0, tiling.SLICE)[None, :]
    lane = tl.arange(0, LANES)
    COUNT: tl.constexpr = tiling.TILE // LANES
    x0 = item.window * SPEC.RATIO + j0
    if tiling.ONE_PAGE:
        first = (item.window * SPEC.RATIO) % pools.page_size + j0
        kv_rows = pools.kv.rows + pages.kv * pools.kv.page_stride + first * pools.kv.row_stride
        score_rows = pools.score.rows + pages.score * pools.score.page_stride + first * pools.score.row_stride
    else:
        kv_pages = load_lane_pages(pools, pools.kv, item.sequence, x0, COUNT, LANES)
        score_pages = load_lane_pages(pools, pools.score, item.sequence, x0, COUNT, LANES)
        row = x0 % pools.page_size
    # A page spans less than 2**31 elements: one 32-bit offset for each row.
    kv_at = (lane * pools.kv.row_stride.to(tl.int32))[:, None] + c
    score_at = (lane * pools.score.row_stride.to(tl.int32))[:, None] + c
    ks = ()
    ss = ()
    for i in tl.static_range(COUNT):
        if not tiling.ONE_PAGE:
            kv_rows = lane_rows(pools.kv, kv_pages[i], row)
            score_rows = lane_rows(pools.score, score_pages[i], row)
            row = tl.where(row + LANES >= pools.page_size, 0, row + LANES)
        # Nobody reads them again in this step (docs/notes/0030-old-rows-leave-the-cache.md).
        k = tl.load(kv_rows + kv_at, eviction_policy="evict_first").to(tl.float32)
        s = tl.load(score_rows + score_at, eviction_policy="evict_first").to(tl.float32)
        if i == COUNT - 1:
            # Behind the loads of a tile: waiting for new rows earlier holds up loads that have no register yet.
            if item.start < x0 + tiling.TILE:
                j = lane + j0 + i * LANES  # a tensor first: the interpreter has numbers for the others
                x = item.window * SPEC.RATIO + j
                at = c.to(tl.int64) + (j * 0)[:, None]
                k, s = put_new_rows(k, s, tokens, item, j, x, at, x >= item.start, SPEC.RATIO, SPEC.HEAD_DIM, BF16)
                if tiling.ONE_PAGE:
                    if mine:
                        news = ((x >= item.start).to(tl.int32)[:, None] + c * 0) != 0
                        store_rounded(kv_rows, kv_at, k, news)
                        store_rounded(score_rows, score_at, s, news)
        ks = ks + (k,)
        ss = ss + (s,)
        if tiling.ONE_PAGE:
            kv_rows += LANES * pools.kv.row_stride
            score_rows += LANES * pools.score.row_stride
    return ks, ss


@triton.jit
def load_new_rows(tokens, item, c0, j0, SPEC: tl.constexpr, tiling, BF16: tl.constexpr):
    """Rows `[j0, j0 + TILE)` of a window that is all new: the usual case in a prompt."""
    LANES: tl.constexpr = tiling.LANES
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    c = c0 + tl.arange(0, tiling.SLICE)[None, :]
    lane = tl.arange(0, LANES)
    first = item.token + (item.window - SPEC.OVERLAP) * SPEC.RATIO + j0 - item.start
    live = tokens.kv_score + first.to(tl.int64) * tokens.stride
    ks = ()
    ss = ()
    for i in tl.static_range(tiling.TILE // LANES):
        j = lane + j0 + i * LANES
        bias = c + ((j % SPEC.RATIO) * CHANNELS)[:, None]
        at = lane.to(tl.int64)[:, None] * tokens.stride + c
        if SPEC.OVERLAP:
            # The window before gives its lo half, this window its hi half; before window 0 there is nothing.
            half = tl.where(j < SPEC.RATIO, 0, SPEC.HEAD_DIM)[:, None]
            at += half
            bias += half
            there = ((item.window * SPEC.RATIO + j >= SPEC.RATIO).to(tl.int32)[:, None] + c * 0) != 0
            k = tl.load(live + at, mask=there, other=0.0).to(tl.float32)
            s = tl.load(live + gaps(tokens, first + j - j0, CHANNELS) + at, mask=there, other=float("-inf")).to(tl.float32)
        else:
            k = tl.load(live + at).to(tl.float32)
            s = tl.load(live + gaps(tokens, first + j - j0, CHANNELS) + at).to(tl.float32)
        if tokens.ape is not None:
            s += tl.load(tokens.ape + bias)
        ks = ks + (as_stored(k, BF16),)
        ss = ss + (as_stored(s, BF16),)
        live += LANES * tokens.stride
    return ks, ss


@triton.jit
def store_new_rows(pool, page_size, before, this, xs, window, c0, j0, SPEC: tl.constexpr, tiling):
    """Stores what `load_new_rows` loaded on its pages: `this`, and that of the window `before`. Either may be -1."""
    LANES: tl.constexpr = tiling.LANES
    c = c0 + tl.arange(0, tiling.SLICE)[None, :]
    lane = tl.arange(0, LANES)
    if SPEC.OVERLAP == 0:
        there = (spread(this >= 0, LANES).to(tl.int32)[:, None] + c * 0) != 0
        rows = pool.rows + this * pool.page_stride + ((window * SPEC.RATIO) % page_size + j0).to(tl.int64) * pool.row_stride
        at = (lane * pool.row_stride.to(tl.int32))[:, None] + c  # a page spans less than 2**31 elements
        for i in tl.static_range(tiling.TILE // LANES):
            store_rounded(rows, at, xs[i], there)
            rows += LANES * pool.row_stride
    else:
        for i in tl.static_range(tiling.TILE // LANES):
            j = lane + j0 + i * LANES
            x = window * SPEC.RATIO + j - SPEC.RATIO
            lo = j < SPEC.RATIO
            page = tl.where(lo, before, this)
            at = page * pool.page_stride + (tl.maximum(x, 0) % page_size).to(tl.int64) * pool.row_stride
            at += tl.where(lo, 0, SPEC.HEAD_DIM)
            there = (((x >= 0) & (page >= 0)).to(tl.int32)[:, None] + c * 0) != 0
            store_rounded(pool.rows, at[:, None] + c, xs[i], there)


@triton.jit
def load_any_rows(
    tokens, pools, item, c0, j0, pages, SPEC: tl.constexpr, tiling, TILE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Rows `[j0, j0 + TILE)` of a window, wherever they are, and how many old ones are not there."""
    LANES: tl.constexpr = tiling.LANES
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    kv_pool, score_pool, page_size, _null, _ring = pools
    absent = tl.zeros((), tl.int32)
    ks = ()
    ss = ()
    for i in tl.static_range(TILE // LANES):
        j = tl.arange(0, LANES) + j0 + i * LANES
        x = (item.window - SPEC.OVERLAP) * SPEC.RATIO + j
        old = (x >= 0) & (x < item.start)
        at = tl.maximum(x, 0)
        if tiling.ONE_PAGE:
            before = j < SPEC.RATIO * SPEC.OVERLAP
            kv_page = tl.where(before, pages.kv_before, pages.kv)
            score_page = tl.where(before, pages.score_before, pages.score)
            row = ((item.window * SPEC.RATIO) % page_size + j - SPEC.RATIO * SPEC.OVERLAP).to(tl.int64)
            if SPEC.OVERLAP:
                row = tl.where(before, (tl.maximum(item.window - 1, 0) * SPEC.RATIO) % page_size + j, row)
            absent = pages.absent.to(tl.int32)
            old = old & (absent == 0)
        else:
            kv_page, kv_missing, kv_bad = find_pages(pools, kv_pool, item.sequence, at, old)
            score_page, score_missing, score_bad = find_pages(pools, score_pool, item.sequence, at, old)
            lost = kv_missing | kv_bad | score_missing | score_bad
            absent += tl.sum(lost.to(tl.int32), axis=0)
            old = old & (lost == 0)
            row = (at % page_size).to(tl.int64)
        # Overlap: the window before gives its lo half, this window its hi half.
        half = tl.where(j < SPEC.RATIO * SPEC.OVERLAP, 0, SPEC.OVERLAP * SPEC.HEAD_DIM)
        c = (half[:, None] + (c0 + tl.arange(0, tiling.SLICE))[None, :]).to(tl.int64)
        olds = (old.to(tl.int32)[:, None] + c.to(tl.int32) * 0) != 0
        kv_row = kv_pool.rows + (kv_page * kv_pool.page_stride + row * kv_pool.row_stride)[:, None]
        k = tl.load(kv_row + c, mask=olds, other=0.0).to(tl.float32)
        score_row = score_pool.rows + (score_page * score_pool.page_stride + row * score_pool.row_stride)[:, None]
        s = tl.load(score_row + c, mask=olds, other=float("-inf")).to(tl.float32)
        if item.start < (item.window - SPEC.OVERLAP) * SPEC.RATIO + j0 + (i + 1) * LANES:
            new = (x >= 0) & (x >= item.start)
            k, s = put_new_rows(k, s, tokens, item, j, x, c, new, SPEC.RATIO, CHANNELS, BF16)
        ks = ks + (k,)
        ss = ss + (s,)
    return ks, ss, absent


@triton.jit
def weigh_rows(r, l, a, ks, ss, GROUP: tl.constexpr):
    """Takes rows, GROUP at a time, into each lane's sums: `l` of weights `exp2(s * LOG2_E - r)`, `a` of weighted values.

    `r`, the largest score in units of the exponent, is rounded. That is harmless, as lanes are compared by the rounded `r`.
    """
    if GROUP == 1:  # the window is one tile, which `pool_slice` weighs as a whole
        r = ss[0]
        a = ks[0]
    else:
        for first in tl.static_range(0, len(ks), GROUP):
            top = ss[first]
            for i in tl.static_range(1, GROUP):
                top = tl.maximum(top, ss[first + i])
            new_r = tl.maximum(r, top * LOG2_E)
            before = tl.exp2(r - new_r)
            l *= before
            a *= before
            for i in tl.static_range(GROUP):
                e = tl.exp2(tl.fma(ss[first + i], tl.zeros_like(r) + LOG2_E, -new_r))
                l += e
                a = tl.fma(e, ks[first + i], a)
            r = new_r
    return r, l, a


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_lanes(r, l, a, r_1, l_1, a_1):
    """Adds two lanes. Their order changes no bit, as products are not fused into sums."""
    top = tl.maximum(r, r_1)
    e = tl.exp2(r - top)
    e_1 = tl.exp2(r_1 - top)
    return top, l * e + l_1 * e_1, a * e + a_1 * e_1


@triton.jit
def sum_lanes(r, l, a, LANES: tl.constexpr, SLICE: tl.constexpr):
    """Sums of `[LANES, SLICE]` over lanes, by pairing neighbours: the same bits however threads share the work.

    r: as in `weigh_rows`; None if all lanes have the same.
    """
    for i in tl.static_range(10):
        if (LANES >> i) > 1:
            l = tl.reshape(l, (LANES >> (i + 1), 2, SLICE))
            a = tl.reshape(a, (LANES >> (i + 1), 2, SLICE))
            if r is None:
                l, a = tl.reduce((l, a), 1, add_pairs)
            else:
                r = tl.reshape(r, (LANES >> (i + 1), 2, SLICE))
                r, l, a = tl.reduce((r, l, a), 1, add_lanes)
    return tl.reshape(l, (SLICE,)), tl.reshape(a, (SLICE,))


@triton.jit
def pool_slice(
    tokens, pools, item, c0, pages, mine, SPEC: tl.constexpr, tiling, FAST_DIVISION: tl.constexpr,
):  # fmt: skip
    """Channels `[c0, c0 + SLICE)` of a pooled row, and how many old rows it needs that are not there.

    Each lane sums its rows one after the other; then the lanes are summed, and nothing crosses threads before that.

    mine: the new rows of the window are stored here, too (window.py says when).
    """
    LANES: tl.constexpr = tiling.LANES
    GROUP: tl.constexpr = tiling.GROUP
    SLICE: tl.constexpr = tiling.SLICE
    TILE: tl.constexpr = tiling.TILE
    PROMPT: tl.constexpr = tiling.PROMPT
    BF16: tl.constexpr = pools.kv.rows.dtype.element_ty == tl.bfloat16
    WINDOW_ROWS: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP)
    PAGE_ROWS: tl.constexpr = ((tiling.ONE_PAGE and SPEC.OVERLAP == 0) or tiling.LANE_PAGES) and GROUP > 1
    # Where `load_page_rows` serves, other rows are rare, and larger tiles of them cost registers (docs/notes/0031).
    ANY_TILE: tl.constexpr = LANES * GROUP if tiling.ONE_PAGE or PAGE_ROWS else TILE
    r = tl.full((LANES, SLICE), LOWEST, tl.float32)
    l = tl.zeros((LANES, SLICE), tl.float32)
    a = tl.zeros((LANES, SLICE), tl.float32)
    absent = tl.zeros((), tl.int32)
    if tiling.ALIGNED:
        # Known to be a multiple of 4 and no more, so that a thread has 4 channels of kv_score as it has of an fp32 pool.
        tokens = Tokens(tokens.kv_score, (tokens.stride // 4) * 4, tokens.count, tokens.ape, tokens.apart, tokens.skew)
    x0 = item.window * SPEC.RATIO
    way = tl.zeros((), tl.int32)
    if PAGE_ROWS:
        if tiling.ONE_PAGE:
            absent = pages.absent.to(tl.int32)
            usable = absent == 0
        else:  # there is a page that may be read
            pages_there = tl.minimum(pools.kv.num_pages, pools.score.num_pages)
            usable = tl.minimum(pages_there, tl.minimum(pools.kv.width, pools.score.width)) > 0
        way = tl.where((item.start >= x0 + SPEC.RATIO - LANES) & usable, 1, 0)
    if PROMPT:
        way = tl.where(mine, 2, way)
    if way == 1:
        if PAGE_ROWS:
            for j0 in range(0, WINDOW_ROWS, TILE):
                ks, ss = load_page_rows(tokens, pools, item, c0, j0, pages, mine, SPEC, tiling, BF16)
                if j0 == 0:
                    if tiling.LANE_PAGES:  # behind the loads of rows
                        missing, bad = check_window(pools, item, SPEC, tiling)
                        absent = missing + bad
                r, l, a = weigh_rows(r, l, a, ks, ss, GROUP)
    elif way == 2:
        if PROMPT:
            for j0 in range(0, WINDOW_ROWS, TILE):
                ks, ss = load_new_rows(tokens, item, c0, j0, SPEC, tiling, BF16)
                store_new_rows(pools.kv, pools.page_size, pages.kv_before, pages.kv, ks, item.window, c0, j0, SPEC, tiling)
                store_new_rows(
                    pools.score, pools.page_size, pages.score_before, pages.score, ss, item.window, c0, j0, SPEC, tiling
                )  # fmt: skip
                r, l, a = weigh_rows(r, l, a, ks, ss, GROUP)
    else:
        for j0 in range(0, WINDOW_ROWS, ANY_TILE):
            ks, ss, lost = load_any_rows(tokens, pools, item, c0, j0, pages, SPEC, tiling, ANY_TILE, BF16)
            absent += lost
            r, l, a = weigh_rows(r, l, a, ks, ss, GROUP)
    if GROUP > 1:
        l, a = sum_lanes(r, l, a, LANES, SLICE)
    else:  # the window is one tile
        top = tl.maximum(tl.max(r, axis=0), LOWEST)
        # One operation instead of two. What rounding -top * LOG2_E changes, it changes in all weights alike.
        e = tl.exp2(tl.fma(r, tl.zeros_like(r) + LOG2_E, (top * -LOG2_E)[None, :] + tl.zeros_like(r)))
        l, a = sum_lanes(None, e, e * a, LANES, SLICE)
    return quotient(a, l, FAST_DIVISION), absent
