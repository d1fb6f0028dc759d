"""Pooling a window of raw rows: where its rows come from, and the order in which they are summed."""

import triton
import triton.language as tl

from ..args import Tokens
from .fold import LOG2_E, LOWEST, quotient, spread
from .record import bf16_bits, bf16_value


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
def add_live_tile(k, s, tokens, j, c, new, token, x, start, RATIO: tl.constexpr, CHANNELS: tl.constexpr, BF16: tl.constexpr):
    """Puts the new rows of a tile into it, any number of them."""
    news = (new.to(tl.int32)[:, None] + c.to(tl.int32) * 0) != 0
    live = tokens.kv_score + ((token + x - start).to(tl.int64) * tokens.stride)[:, None] + c
    new_k = tl.load(live, mask=news, other=0.0).to(tl.float32)
    new_s = tl.load(live + CHANNELS, mask=news, other=float("-inf")).to(tl.float32)
    if tokens.ape is not None:
        new_s += tl.load(tokens.ape + ((j % RATIO) * CHANNELS)[:, None] + c, mask=news, other=0.0)
    return tl.where(news, as_stored(new_k, BF16), k), tl.where(news, as_stored(new_s, BF16), s)


@triton.jit
def load_page_rows(
    tokens, kv_pool, score_pool, page_size, window, start, token, c0, j0, homes, mine, SPEC: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, SLICE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Rows `[j0, j0 + TILE)` of a window of which all but some of the last LANES rows are old, one behind the other on a page.

    The common case by far in decoding. All are loaded, new ones too, over which the live ones are put: a tile that knows no
    masks takes half the instructions. mine: the new ones are written.
    """
    c = c0 + tl.arange(0, SLICE)[None, :]
    lane = tl.arange(0, LANES)
    first = (window * SPEC.RATIO) % page_size + j0
    kv_rows = kv_pool.rows + homes[1] * kv_pool.page_stride + first * kv_pool.row_stride
    score_rows = score_pool.rows + homes[3] * score_pool.page_stride + first * score_pool.row_stride
    # A page spans less than 2**31 elements: one 32-bit offset for each row.
    kv_at = (lane * kv_pool.row_stride.to(tl.int32))[:, None] + c
    score_at = (lane * score_pool.row_stride.to(tl.int32))[:, None] + c
    ks = ()
    ss = ()
    for i in tl.static_range(TILE // LANES):
        # Nobody reads them again: 128 and 256 windows in 20.0 and 36.0 us, and in 21.5 and 39.4 without the hint; where buffers
        # are 16 times the L2 cache and not 4 times, so that nothing of them is left in it, in 20.6 and 38.2, and 21.5 and 39.3.
        k = tl.load(kv_rows + kv_at, eviction_policy="evict_first").to(tl.float32)
        s = tl.load(score_rows + score_at, eviction_policy="evict_first").to(tl.float32)
        if i == TILE // LANES - 1:
            # A branch, behind the loads of a tile: new rows waited for earlier held up the loads that no register was free for.
            if start < window * SPEC.RATIO + j0 + TILE:
                j = lane + j0 + i * LANES  # a tensor first: the interpreter has numbers for the others
                x = window * SPEC.RATIO + j
                k, s = add_live_tile(
                    k, s, tokens, j, c.to(tl.int64) + (j * 0)[:, None], x >= start, token, x, start, SPEC.RATIO,
                    SPEC.HEAD_DIM, BF16,
                )  # fmt: skip
                if mine:
                    news = ((x >= start).to(tl.int32)[:, None] + c * 0) != 0
                    store_rounded(kv_rows, kv_at, k, news)
                    store_rounded(score_rows, score_at, s, news)
        ks = ks + (k,)
        ss = ss + (s,)
        kv_rows += LANES * kv_pool.row_stride
        score_rows += LANES * score_pool.row_stride
    return ks, ss


@triton.jit
def load_live_rows(
    tokens, window, start, token, c0, j0, SPEC: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr, SLICE: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """Rows `[j0, j0 + TILE)` of a window that is all new: the common case in a prompt."""
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    c = c0 + tl.arange(0, SLICE)[None, :]
    lane = tl.arange(0, LANES)
    live = tokens.kv_score + (token + (window - SPEC.OVERLAP) * SPEC.RATIO + j0 - start).to(tl.int64) * tokens.stride
    ks = ()
    ss = ()
    for i in tl.static_range(TILE // LANES):
        j = lane + j0 + i * LANES
        bias = c + ((j % SPEC.RATIO) * CHANNELS)[:, None]
        at = lane.to(tl.int64)[:, None] * tokens.stride + c
        if SPEC.OVERLAP:
            # The window before gives its lo half, this window its hi half; before window 0 there is nothing.
            half = tl.where(j < SPEC.RATIO, 0, SPEC.HEAD_DIM)[:, None]
            at += half
            bias += half
            there = ((window * SPEC.RATIO + j >= SPEC.RATIO).to(tl.int32)[:, None] + c * 0) != 0
            k = tl.load(live + at, mask=there, other=0.0).to(tl.float32)
            s = tl.load(live + CHANNELS + at, mask=there, other=float("-inf")).to(tl.float32)
        else:
            k = tl.load(live + at).to(tl.float32)
            s = tl.load(live + CHANNELS + at).to(tl.float32)
        if tokens.ape is not None:
            s += tl.load(tokens.ape + bias)
        ks = ks + (as_stored(k, BF16),)
        ss = ss + (as_stored(s, BF16),)
        live += LANES * tokens.stride
    return ks, ss


@triton.jit
def store_live_rows(
    pool, page_stride, row_stride, page_size, before, this, xs, window, c0, j0, SPEC: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Writes what `load_live_rows` loaded to its pages, `this` and that of the window `before`, of which either may be -1."""
    c = c0 + tl.arange(0, SLICE)[None, :]
    lane = tl.arange(0, LANES)
    if SPEC.OVERLAP == 0:
        there = (spread(this >= 0, LANES).to(tl.int32)[:, None] + c * 0) != 0
        rows = pool + this * page_stride + ((window * SPEC.RATIO) % page_size + j0).to(tl.int64) * row_stride
        at = (lane * row_stride.to(tl.int32))[:, None] + c  # a page spans less than 2**31 elements
        for i in tl.static_range(TILE // LANES):
            store_rounded(rows, at, xs[i], there)
            rows += LANES * row_stride
    else:
        for i in tl.static_range(TILE // LANES):
            j = lane + j0 + i * LANES
            x = window * SPEC.RATIO + j - SPEC.RATIO
            lo = j < SPEC.RATIO
            page = tl.where(lo, before, this)
            at = page * page_stride + (tl.maximum(x, 0) % page_size).to(tl.int64) * row_stride + tl.where(lo, 0, SPEC.HEAD_DIM)
            there = (((x >= 0) & (page >= 0)).to(tl.int32)[:, None] + c * 0) != 0
            store_rounded(pool, at[:, None] + c, xs[i], there)


@triton.jit
def load_any_rows(
    tokens, kv_pool, score_pool, page_size, window, start, token, sequence, c0, j0, homes, SPEC: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, SLICE: tl.constexpr, ONE_PAGE: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Rows `[j0, j0 + TILE)` of a window, wherever they are, and how many old ones are not there."""
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    absent = tl.zeros((), tl.int32)
    ks = ()
    ss = ()
    for i in tl.static_range(TILE // LANES):
        j = tl.arange(0, LANES) + j0 + i * LANES
        x = (window - SPEC.OVERLAP) * SPEC.RATIO + j
        old = (x >= 0) & (x < start)
        at = tl.maximum(x, 0)
        if ONE_PAGE:
            kv_before, kv_this, score_before, score_this, lost, _bad = homes
            before = j < SPEC.RATIO * SPEC.OVERLAP
            kv_page = tl.where(before, kv_before, kv_this)
            score_page = tl.where(before, score_before, score_this)
            row = ((window * SPEC.RATIO) % page_size + j - SPEC.RATIO * SPEC.OVERLAP).to(tl.int64)
            if SPEC.OVERLAP:
                row = tl.where(before, (tl.maximum(window - 1, 0) * SPEC.RATIO) % page_size + j, row)
            absent = lost.to(tl.int32)
            old = old & (absent == 0)
        else:
            kv_page, kv_missing, kv_bad = find_pages(
                kv_pool.table, kv_pool.width, kv_pool.num_pages, sequence, at, old, page_size
            )
            score_page, score_missing, score_bad = find_pages(
                score_pool.table, score_pool.width, score_pool.num_pages, sequence, at, old, page_size,
            )  # fmt: skip
            lost = kv_missing | kv_bad | score_missing | score_bad
            absent += tl.sum(lost.to(tl.int32), axis=0)
            old = old & (lost == 0)
            row = (at % page_size).to(tl.int64)
        # Overlap: the window before gives its lo half, this window its hi half.
        half = tl.where(j < SPEC.RATIO * SPEC.OVERLAP, 0, SPEC.OVERLAP * SPEC.HEAD_DIM)
        c = (half[:, None] + (c0 + tl.arange(0, SLICE))[None, :]).to(tl.int64)
        olds = (old.to(tl.int32)[:, None] + c.to(tl.int32) * 0) != 0
        k = tl.load(
            kv_pool.rows + (kv_page * kv_pool.page_stride + row * kv_pool.row_stride)[:, None] + c, mask=olds, other=0.0
        ).to(tl.float32)  # fmt: skip
        s = tl.load(
            score_pool.rows + (score_page * score_pool.page_stride + row * score_pool.row_stride)[:, None] + c,
            mask=olds,
            other=float("-inf"),
        ).to(tl.float32)  # fmt: skip
        if start < (window - SPEC.OVERLAP) * SPEC.RATIO + j0 + (i + 1) * LANES:
            k, s = add_live_tile(k, s, tokens, j, c, (x >= 0) & (x >= start), token, x, start, SPEC.RATIO, CHANNELS, BF16)
        ks = ks + (k,)
        ss = ss + (s,)
    return ks, ss, absent


@triton.jit
def weigh_rows(r, l, a, ks, ss, GROUP: tl.constexpr):
    """Takes rows, GROUP at a time, into each lane's sums: `l` of weights `exp2(s * LOG2_E - r)`, `a` of weighted values.

    `r`, the largest score in units of the exponent, is rounded; that changes nothing, as lanes are compared by it as it is.
    """
    for first in tl.static_range(0, len(ks), GROUP):
        top = ss[first]
        for i in tl.static_range(1, GROUP):
            top = tl.maximum(top, ss[first + i])
        new_r = tl.maximum(r, top * LOG2_E)
        before = tl.exp2(r - new_r)
        l *= before
        a *= before
        for i in tl.static_range(GROUP):
            e = tl.exp2(tl.fma(ss[first + i], LOG2_E + tl.zeros_like(r), -new_r))
            l += e
            a = tl.fma(e, ks[first + i], a)
        r = new_r
    return r, l, a


@triton.jit
def add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_lanes(r, l, a, r_1, l_1, a_1):
    """Two lanes in one. Which is which changes no bit, as products are not fused into sums."""
    top = tl.maximum(r, r_1)
    e = tl.exp2(r - top)
    e_1 = tl.exp2(r_1 - top)
    return top, l * e + l_1 * e_1, a * e + a_1 * e_1


@triton.jit
def sum_lanes(r, l, a, LANES: tl.constexpr, SLICE: tl.constexpr):
    """Sums of `[LANES, SLICE]` over lanes, by pairing neighbours: the same bits however threads share the work.

    r: as in `weigh_rows`; None where all lanes have the same.
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
    tokens, kv_pool, score_pool, page_size, window, start, token, sequence, c0, homes, mine, SPEC: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, SLICE: tl.constexpr, ONE_PAGE: tl.constexpr, PROMPT: tl.constexpr,
    ALIGNED: tl.constexpr, FAST_DIVISION: tl.constexpr,
):  # fmt: skip
    """Channels `[c0, c0 + SLICE)` of a pooled row, and how many old rows it needs that are not there.

    Row j belongs to lane j % LANES, which sums its rows one after the other, GROUP of them with one maximum; then the lanes
    are summed, and nothing crosses threads before that. LANES and GROUP are the order of the sums, one for every call of a
    spec; TILE, rows that are in flight at once, SLICE and the number of warps change no bit.

    mine: the new rows are written here, of a window that `claims` or `joins` says that of (window.py).
    """
    BF16: tl.constexpr = kv_pool.rows.dtype.element_ty == tl.bfloat16
    WINDOW_ROWS: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP)
    # Where pages hold whole windows, rows that are wherever are rare. By 16 instead of 8 groups of them, their addresses, which
    # do not change from entry to entry, took 40 registers and were worked out in front of every step: 4,100 instructions
    # instead of 3,000, and 0.1 us more where no window ends.
    ANY_TILE: tl.constexpr = LANES * GROUP if ONE_PAGE else TILE
    r = tl.full((LANES, SLICE), LOWEST, tl.float32)
    l = tl.zeros((LANES, SLICE), tl.float32)
    a = tl.zeros((LANES, SLICE), tl.float32)
    absent = tl.zeros((), tl.int32)
    if ALIGNED:
        # Known to be a multiple of 4 and no more, so that a thread has 4 channels of kv_score as it has of an fp32 pool.
        tokens = Tokens(tokens.kv_score, (tokens.stride // 4) * 4, tokens.count, tokens.ape)
    x0 = window * SPEC.RATIO
    way = tl.zeros((), tl.int32)
    if (ONE_PAGE and SPEC.OVERLAP == 0) and GROUP > 1:
        absent = homes[4].to(tl.int32)
        way = tl.where((start >= x0 + SPEC.RATIO - LANES) & (absent == 0), 1, 0)
    if PROMPT:
        way = tl.where(mine, 2, way)
    if way == 1:
        if (ONE_PAGE and SPEC.OVERLAP == 0) and GROUP > 1:
            for j0 in range(0, WINDOW_ROWS, TILE):
                ks, ss = load_page_rows(
                    tokens, kv_pool, score_pool, page_size, window, start, token, c0, j0, homes, mine, SPEC, TILE, LANES, SLICE, BF16,
                )  # fmt: skip
                r, l, a = weigh_rows(r, l, a, ks, ss, GROUP)
    elif way == 2:
        if PROMPT:
            for j0 in range(0, WINDOW_ROWS, TILE):
                ks, ss = load_live_rows(tokens, window, start, token, c0, j0, SPEC, TILE, LANES, SLICE, BF16)
                store_live_rows(
                    kv_pool.rows, kv_pool.page_stride, kv_pool.row_stride, page_size, homes[0], homes[1], ks, window, c0, j0,
                    SPEC, TILE, LANES, SLICE,
                )  # fmt: skip
                store_live_rows(
                    score_pool.rows, score_pool.page_stride, score_pool.row_stride, page_size, homes[2], homes[3], ss, window,
                    c0, j0, SPEC, TILE, LANES, SLICE,
                )  # fmt: skip
                if GROUP > 1:
                    r, l, a = weigh_rows(r, l, a, ks, ss, GROUP)
                else:
                    r = ss[0]
                    a = ks[0]
    else:
        for j0 in range(0, WINDOW_ROWS, ANY_TILE):
            ks, ss, lost = load_any_rows(
                tokens, kv_pool, score_pool, page_size, window, start, token, sequence, c0, j0, homes, SPEC, ANY_TILE, LANES, SLICE,
                ONE_PAGE, BF16,
            )  # fmt: skip
            absent += lost
            if GROUP > 1:
                r, l, a = weigh_rows(r, l, a, ks, ss, GROUP)
            else:
                r = ss[0]
                a = ks[0]
    if GROUP > 1:
        l, a = sum_lanes(r, l, a, LANES, SLICE)
    else:  # the window is one tile
        top = tl.maximum(tl.max(r, axis=0), LOWEST)
        # One operation instead of two. What rounding -top * LOG2_E changes, it changes in all weights alike.
        e = tl.exp2(tl.fma(r, LOG2_E + tl.zeros_like(r), (top * -LOG2_E)[None, :] + tl.zeros_like(r)))
        l, a = sum_lanes(None, e, e * a, LANES, SLICE)
    return quotient(a, l, FAST_DIVISION), absent
