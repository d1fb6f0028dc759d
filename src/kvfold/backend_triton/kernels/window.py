"""A step over `WindowState`: stores the raw rows of new tokens, and pools every window that ends, in parallel.

A program has two kinds of work. It takes entries, or some slices of channels of one (`pool_slice`): old rows come from the
pages and new ones from kv_score, so that no program waits for what another one stores. And it takes work items, whose new rows
it stores on their pages. Entries are dealt from one end of the grid and work items from the other, so that a program has both
only if there is much of both. Where several programs share an entry, one of them finishes it (slices.py); which one it is
changes no bit.

Two kinds of new rows are stored only by the program that pools them: in a long step (PROMPT) those of windows that are all new,
so that they are read once (`all_rows_new`); in a short one (JOIN) the last rows of a window on one page (`last_rows_new`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..args import Output, Plan, Pool, Scratch, Tokens
from .finish import emit, entry_slot, load_finish, slot_valid
from .fold import spread
from .items import load_item
from .pdl import load_plan, wait_for_inputs
from .prefetch import prefetch_item, prefetch_tokens, prefetch_window
from .slices import draw_ticket, first_work, is_last, leave_slice, share_entries, take_slices
from .tokens import apart_from, gap
from .vectors import scalar
from .window_ring import holds_up, left_to_readers, readers_of, store_held_up
from .window_rows import Pages, Pools, Tiling, check_window, find_pages, pool_slice, store_rounded


class Launch(NamedTuple):
    """What one launch works on. entry_items: the work item of each entry of the plan."""

    plan: Any
    entry_items: Any
    tokens: Any
    pools: Any
    scratch: Any
    output: Any


class Faults(NamedTuple):
    """What is wrong with an entry: old rows with a bad page, old rows with no page, whether it is refused for its slot.

    wanted: an entry whose rows have no page counts as an error only if it is delivered to something.
    """

    bad: Any
    missing: Any
    wanted: Any
    refused: Any


class Shares(NamedTuple):
    """How entries are dealt out: each in `parts`, which are `tasks` in all, and of which one is `span` slices of channels."""

    parts: Any
    span: Any
    tasks: Any


@triton.jit
def write_rows(launch, item, begin, stop, halves, readers, AHEAD: tl.constexpr, SPEC: tl.constexpr, tiling):
    """Stores the rows of new positions `[begin, stop)`; returns how many have a bad page.

    halves: for rows with overlap, the lo ones (0), the hi ones (1) or both (2, or None). readers: only for a ring.
    """
    CHANNELS: tl.constexpr = SPEC.HEAD_DIM * (1 + SPEC.OVERLAP)
    pools = launch.pools
    kv_pool, score_pool, page_size, _null, _ring = pools
    tokens = launch.tokens
    c = tl.arange(0, CHANNELS)
    if tiling.ALIGNED:
        # Tells the compiler that the stride is a multiple of 16; the signature does not, as `pool_slice` is better told less.
        tokens = Tokens(tokens.kv_score, (tokens.stride // 16) * 16, tokens.count, tokens.ape, tokens.apart, tokens.skew)
    refused = tl.zeros((), tl.int32)
    for base in range(0, stop - begin, AHEAD):
        # Loads first, of rows and of pages; a load behind a store would wait for the load that the store waits for.
        ks = ()
        ss = ()
        places = ()
        for i in tl.static_range(AHEAD):
            x = begin + base + i
            there = spread(x < stop, CHANNELS)
            if halves is not None:
                there = there & (spread(halves == 2, CHANNELS) | (c // (CHANNELS // 2) == halves))
            token = item.token + x - item.start
            at = tokens.kv_score + token.to(tl.int64) * tokens.stride + c
            k = tl.load(at, mask=there, other=0.0).to(tl.float32)
            s = tl.load(at + gap(tokens, token, CHANNELS), mask=there, other=0.0).to(tl.float32)
            if tokens.ape is not None:
                s += tl.load(tokens.ape + (x % SPEC.RATIO) * CHANNELS + c, mask=there, other=0.0)
            kv_page, _, kv_bad = find_pages(pools, kv_pool, item.sequence, x, x < stop)
            score_page, _, score_bad = find_pages(pools, score_pool, item.sequence, x, x < stop)
            refused += (kv_bad | score_bad).to(tl.int32)
            ks = ks + (k,)
            ss = ss + (s,)
            places = places + (
                (kv_page, (x < stop) & (kv_bad == 0) & (kv_page >= 0), score_page,
                 (x < stop) & (score_bad == 0) & (score_page >= 0)),
            )  # fmt: skip
        for i in tl.static_range(AHEAD):
            kv_page, kv_kept, score_page, score_kept = places[i]
            kv_kept = spread(kv_kept, CHANNELS)
            score_kept = spread(score_kept, CHANNELS)
            if halves is not None:
                kv_kept = kv_kept & (spread(halves == 2, CHANNELS) | (c // (CHANNELS // 2) == halves))
                score_kept = score_kept & (spread(halves == 2, CHANNELS) | (c // (CHANNELS // 2) == halves))
            if readers is not None:
                free = left_to_readers(begin + base + i, c, item, readers, pools.ring, SPEC, CHANNELS) == 0
                kv_kept = kv_kept & free
                score_kept = score_kept & free
            row = ((begin + base + i) % page_size).to(tl.int64)
            at = kv_page * kv_pool.page_stride + row * kv_pool.row_stride + c
            store_rounded(kv_pool.rows, at, ks[i], kv_kept)
            at = score_page * score_pool.page_stride + row * score_pool.row_stride + c
            store_rounded(score_pool.rows, at, ss[i], score_kept)
    return refused


@triton.jit
def find_page(pools, pool, window, item, there, SPEC: tl.constexpr, ALWAYS: tl.constexpr):
    """The page of a window whose rows share one (-1: none, or not needed); whether an old row lacks it; whether it is bad.

    ALWAYS: it is needed for new rows, too.
    """
    x = window * SPEC.RATIO
    old = there & (item.start > x)
    page, missing, bad = find_pages(pools, pool, item.sequence, x, there if ALWAYS else old)
    return tl.where(bad, -1, page), old & (missing | bad), bad


@triton.jit
def load_entry(launch, number, there, SPEC: tl.constexpr, tiling):
    """An entry's work item, cache slot and, where windows lie on one page, `Pages`: nothing that a kernel in flight writes."""
    plan = launch.plan
    pools = launch.pools
    index = tl.load(launch.entry_items + number, mask=there, other=0, cache_modifier=".cg")
    slot = number.to(tl.int64)
    if plan.entry_slots is not None:
        slot = tl.load(plan.entry_slots + number, mask=there, other=-1, cache_modifier=".cg")
    # Where every window of a step ends, entry and item have one number: that item is not waited for twice.
    item = load_item(plan.items, number, there)
    moved = item.entry != number
    if launch.pools.kv.step is not None:  # entries may have places of the caller's
        moved = index != number
    if there & moved:
        item = load_item(plan.items, index, there)
    if launch.pools.kv.step is not None:
        slot = entry_slot(item.entry, plan)
    pages = ()
    if tiling.ONE_PAGE:
        kv, kv_absent, kv_bad = find_page(pools, pools.kv, item.window, item, there, SPEC, tiling.PROMPT)
        score, score_absent, score_bad = find_page(pools, pools.score, item.window, item, there, SPEC, tiling.PROMPT)
        kv_before = kv
        score_before = score
        absent = kv_absent | score_absent
        if SPEC.OVERLAP:
            before = tl.maximum(item.window - 1, 0)
            has_one = there & (item.window > 0)
            kv_before, kv_absent, _ = find_page(pools, pools.kv, before, item, has_one, SPEC, tiling.PROMPT)
            score_before, score_absent, _ = find_page(pools, pools.score, before, item, has_one, SPEC, tiling.PROMPT)
            absent = absent | kv_absent | score_absent
        pages = Pages(kv_before, kv, score_before, score, absent, kv_bad | score_bad)
    return item, slot, pages


@triton.jit
def all_rows_new(window, start, entry, entry_capacity, SPEC: tl.constexpr):
    """Whether all rows that a window's entry is pooled from are new: then the program that pools them stores them."""
    return (entry >= 0) & (entry < entry_capacity) & (start <= tl.maximum(window - SPEC.OVERLAP, 0) * SPEC.RATIO)


@triton.jit
def last_rows_new(window, start, entry, entry_capacity, RATIO: tl.constexpr, LANES: tl.constexpr):
    """Whether a window ends here and only some of its last LANES rows are new: the program that pools it stores them.

    If their page is missing, they cannot be stored.
    """
    return (entry >= 0) & (entry < entry_capacity) & (start > window * RATIO) & (start >= window * RATIO + RATIO - LANES)


@triton.jit
def rows_left(item, entry_capacity, SPEC: tl.constexpr):
    """Whether the work item has to store a window's new rows (with overlap their hi halves), and whether their lo halves.

    The lo halves belong to the next window.
    """
    own = all_rows_new(item.window, item.start, item.entry, entry_capacity, SPEC) == 0
    lo = own
    if SPEC.OVERLAP:
        behind = tl.where((item.entry >= 0) & (item.end >= (item.window + 2) * SPEC.RATIO), item.entry + 1, -1)
        lo = all_rows_new(item.window + 1, item.start, behind, entry_capacity, SPEC) == 0
    return own, lo


@triton.jit
def next_item(launch, index, total, programs, SPEC: tl.constexpr, PROMPT: tl.constexpr):
    """The first work item from `index` on, in steps of `programs`, that has rows left to store; `total` or more: none."""
    if PROMPT:
        # Of a long prompt hardly any has: 32 are looked at in the latency of one.
        found = total
        while (index < total) & (found == total):
            i = index + tl.arange(0, 32) * programs
            item = load_item(launch.plan.items, i, i < total)
            own, lo = rows_left(item, launch.plan.entry_capacity, SPEC)
            left = own | lo | (item.token + item.end - item.start > launch.tokens.count)
            found = tl.min(tl.where(left & (i < total), i, total), axis=0)
            index += 32 * programs
        index = found
    return index


@triton.jit
def check_item(item, there, launch, SPEC: tl.constexpr, tiling):
    """The `Faults` of a work item's entry, if it has one. Called before the wait: no kernel in flight writes what it reads."""
    plan = launch.plan
    missing = tl.zeros((), tl.int32)
    bad = tl.zeros((), tl.int32)
    wanted = item.entry < 0
    refused = item.entry < -1
    if there & (item.entry >= 0):
        missing, bad = check_window(launch.pools, item, SPEC, tiling)
        slot = tl.where(item.entry < plan.entry_capacity, item.entry, -1).to(tl.int64)
        if plan.entry_slots is not None:
            slot = tl.load(plan.entry_slots + item.entry, mask=item.entry < plan.entry_capacity, other=-1, cache_modifier=".cg")
        position = item.window * SPEC.RATIO
        _deliver, refused = slot_valid(item.entry, slot, position, plan.entry_capacity, launch.output, SPEC.ROPE_DIM)
        wanted = (item.entry >= plan.entry_capacity) | (slot != -1)
    return Faults(bad, missing, wanted, refused)


@triton.jit
def write_item(item, faults, readers, launch, HOW: tl.constexpr, SPEC: tl.constexpr, tiling):
    """Stores the new rows that are left to a work item, and counts what is wrong with it."""
    window, start, end, token, _slot, entry, _sequence = item
    bad, missing, wanted, wrong = faults
    capacity = launch.plan.entry_capacity
    count = tl.zeros((), tl.int32)
    if token + end - start <= launch.tokens.count:
        begin = tl.maximum(start, window * SPEC.RATIO)
        stop = begin + tl.minimum(end - begin, SPEC.RATIO - begin % SPEC.RATIO)
        halves = None
        own = window >= 0
        if tiling.PROMPT:
            own, lo = rows_left(item, capacity, SPEC)
            if SPEC.OVERLAP:
                halves = tl.where(own & lo, 2, own.to(tl.int32))
        if tiling.JOIN > 0:
            if last_rows_new(window, start, entry, capacity, SPEC.RATIO, tiling.JOIN) & (bad + missing == 0):
                stop = begin
        if readers is not None:  # what a longer step would overwrite is not stored
            begin = tl.maximum(begin, end - launch.pools.ring)
        refused = write_rows(launch, item, begin, stop, halves, readers, HOW.AHEAD, SPEC, tiling)
        if own:  # of other windows, who pools them counts what is wrong
            count = (refused > 0).to(tl.int32)
            if bad > 0:
                count = scalar(1)
            elif missing > 0:
                count = tl.maximum(count, wanted.to(tl.int32))
            else:
                count += wrong.to(tl.int32)
    elif window == start // SPEC.RATIO:
        count += 1
    if count > 0:
        tl.atomic_add(launch.plan.errors, count)


@triton.jit
def write_items(index, item, faults, total, programs, launch, HOW: tl.constexpr, SPEC: tl.constexpr, tiling):
    """Work item `index`, which is `item`, and those after it in steps of `programs`."""
    while index < total:
        readers = None
        if launch.pools.ring is not None:
            readers = readers_of(index, item, total, launch, SPEC)
        write_item(item, faults, readers, launch, HOW, SPEC, tiling)
        index = next_item(launch, index + programs, total, programs, SPEC, tiling.PROMPT)
        if index < total:
            item = load_item(launch.plan.items, index, index < total)
            faults = check_item(item, index < total, launch, SPEC, tiling)


@triton.jit
def prefetch_entry(item, pages, task, shares, launch, HOW: tl.constexpr, SPEC: tl.constexpr, tiling):
    """Fetches what the first part of an entry reads into the L2 cache (docs/notes/0033-before-the-wait.md)."""
    SLICES: tl.constexpr = SPEC.HEAD_DIM // HOW.SLICE
    if tiling.PROMPT and (SLICES == 1 or SPEC.OVERLAP == 0):
        prefetch_item(item, task < shares.tasks, task % shares.parts * HOW.SLICE, launch.tokens, SPEC, HOW.SLICE)
    if tiling.ONE_PAGE:
        # Slices of values in pieces, of scores in lines: pieces are asked for one after the other, lines all at once.
        if (task < shares.tasks) & (pages.absent == 0):
            c0 = task % shares.parts * HOW.SLICE
            kv_pool, score_pool, page_size, _null, _ring = launch.pools
            IN_PIECES: tl.constexpr = SLICES > 1 or tiling.PROMPT
            prefetch_window(kv_pool, page_size, item, c0, pages.kv_before, pages.kv, SPEC, HOW.SLICE, IN_PIECES)
            prefetch_window(score_pool, page_size, item, c0, pages.score_before, pages.score, SPEC, HOW.SLICE, tiling.PROMPT)


@triton.jit
def pool_part(
    item, slot, pages, task, turn, shares, launch, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr, tiling
):  # fmt: skip
    """Pools one slice of an entry, slice `turn` of part `task`, and finishes the entry if this was its last part."""
    SLICES: tl.constexpr = SPEC.HEAD_DIM // HOW.SLICE
    window, start, end, token, _slot, entry, _sequence = item
    plan = launch.plan
    scratch = launch.scratch
    position = window * SPEC.RATIO
    deliver, wrong = slot_valid(entry, slot, position, plan.entry_capacity, launch.output, SPEC.ROPE_DIM)
    mine = entry < 0
    if tiling.JOIN > 0:
        mine = last_rows_new(window, start, entry, plan.entry_capacity, SPEC.RATIO, tiling.JOIN) & (pages.absent == 0)
    if tiling.PROMPT:
        mine = all_rows_new(window, start, entry, plan.entry_capacity, SPEC)
        if mine & (turn + task % shares.parts == 0) & (token + end - start <= launch.tokens.count):
            count = pages.bad.to(tl.int32) + wrong.to(tl.int32)
            if count > 0:
                tl.atomic_add(plan.errors, count)
    wanted = deliver | mine
    if launch.pools.ring is not None:
        wanted = wanted | holds_up(item, launch, SPEC)
    if wanted & (token + end - start <= launch.tokens.count):
        # The parts of an entry side by side: memory has rows of 1 KiB open, and gives them slower slice by slice.
        c0 = (task % shares.parts + turn * shares.parts) * HOW.SLICE
        if SLICES > 1 and tiling.ONE_PAGE:  # known before the work: whether rows are absent
            ticket = draw_ticket(scratch.arrivals, entry, deliver & (turn == shares.span - 1) & (pages.absent == 0))
        y, absent = pool_slice(launch.tokens, launch.pools, item, c0, pages, mine, SPEC, tiling, HOW.TARGET.FAST_DIVISION)
        if launch.pools.ring is not None:
            if holds_up(item, launch, SPEC):
                store_held_up(item, c0, launch, SPEC, tiling)
        # Every slice sees the same rows, so either all slices are written or none.
        finish = deliver & (absent == 0)
        # Loads that the last of the parts needs are under way while it arrives.
        weight, cos, sin = load_finish(position, launch.output, SPEC)
        if SLICES > 1:
            if finish:
                leave_slice(scratch.workspace, y, entry, c0, SPEC.HEAD_DIM, HOW.SLICE, HOW.TARGET.COHERENT_STORES)
            finish = finish & (turn == shares.span - 1)
            if tiling.ONE_PAGE == 0:
                ticket = draw_ticket(scratch.arrivals, entry, finish)
            if finish:
                finish = is_last(ticket, shares.parts)
        if finish:
            whole = y if SLICES == 1 else take_slices(scratch.workspace, scratch.arrivals, entry, SPEC.HEAD_DIM)
            emit(whole, entry, slot, weight, cos, sin, launch.output, SPEC, FMT, HOW.TARGET)


@triton.jit
def pool_entries(
    task, item, slot, pages, shares, programs, launch, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr, tiling
):  # fmt: skip
    """Pools part `task`, whose entry has this item, slot and pages, and those after it in steps of `programs`.

    How the loop is written decides registers and instructions (docs/notes/0031-the-loop-over-entries.md).
    """
    # Slices are turns of this loop and not of one inside it, out of which the compiler would take all addresses.
    turn = scalar(0)
    while task < shares.tasks:
        wait_for_inputs(HOW.PDL)
        pool_part(item, slot, pages, task, turn, shares, launch, HOW, SPEC, FMT, tiling)
        turn += 1
        if turn >= shares.span:
            # The next entry is looked up only now: other programs hide the latency.
            turn = scalar(0)
            task += programs
            # A branch: behind the last entry there is nothing to load.
            if task < shares.tasks:
                item, slot, pages = load_entry(launch, task // shares.parts, task < shares.tasks, SPEC, tiling)


@triton.jit
def run_program(
    front, total, task, shares, programs, launch, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr, tiling,
    POOLS: tl.constexpr,
):  # fmt: skip
    """A program whose first work item is `front` of `total`, and whose first part of an entry is `task`, if it POOLS."""
    SLICES: tl.constexpr = SPEC.HEAD_DIM // HOW.SLICE
    tokens = launch.tokens
    index = next_item(launch, front, total, programs, SPEC, tiling.PROMPT)
    first = load_item(launch.plan.items, index, index < total)
    if POOLS:
        item, slot, pages = load_entry(launch, task // shares.parts, task < shares.tasks, SPEC, tiling)
        if HOW.PDL:
            prefetch_entry(item, pages, task, shares, launch, HOW, SPEC, tiling)
    faults = check_item(first, index < total, launch, SPEC, tiling)
    if HOW.PDL:
        if (index < total) & (first.token + first.end - first.start <= tokens.count):
            live = tokens.kv_score + (first.token - first.start).to(tl.int64) * tokens.stride
            begin = tl.maximum(first.start, first.window * SPEC.RATIO)
            apart = apart_from(tokens, first.token - first.start)
            here = Tokens(tokens.kv_score, tokens.stride, tokens.count, tokens.ape, apart, tokens.skew)
            prefetch_tokens(live, here, begin, first.end, HOW.AHEAD, SPEC.HEAD_DIM * (1 + SPEC.OVERLAP))
    # Every program that is left waits; each where its work begins, so that what it needs for that is worked out before.
    if index < total:
        wait_for_inputs(HOW.PDL)
        write_items(index, first, faults, total, programs, launch, HOW, SPEC, tiling)
        if POOLS and ((SLICES > 1 or tiling.PROMPT) or tiling.ONE_PAGE == 0):
            # Again: kept in registers meanwhile, these would spill. In a short step over whole rows they do not.
            item, slot, pages = load_entry(launch, task // shares.parts, task < shares.tasks, SPEC, tiling)
    if POOLS:
        pool_entries(task, item, slot, pages, shares, programs, launch, HOW, SPEC, FMT, tiling)
    wait_for_inputs(HOW.PDL)


@triton.jit
def window_kernel(
    plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors,
    entry_items, cu_entries, batch,
    tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew,
    kv_pool_rows, kv_pool_page_stride, kv_pool_row_stride, kv_pool_num_pages, kv_pool_table, kv_pool_width,
    kv_pool_step, score_pool_rows, score_pool_page_stride, score_pool_row_stride, score_pool_num_pages, score_pool_table,
    score_pool_width, score_pool_step,
    page_size, null_page, ring,
    scratch_workspace, scratch_arrivals,
    output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
    output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    ONE_PAGE: tl.constexpr, LANE_PAGES: tl.constexpr, PROMPT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """`compress` over a `WindowState`."""
    plan = Plan(plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors)
    tokens = Tokens(tokens_kv_score, tokens_stride, tokens_count, tokens_ape, tokens_apart, tokens_skew)
    kv_pool = Pool(
        kv_pool_rows, kv_pool_page_stride, kv_pool_row_stride, kv_pool_num_pages, kv_pool_table, kv_pool_width, kv_pool_step
    )  # fmt: skip
    score_pool = Pool(
        score_pool_rows, score_pool_page_stride, score_pool_row_stride, score_pool_num_pages, score_pool_table,
        score_pool_width, score_pool_step,
    )  # fmt: skip
    output = Output(
        output_rows, output_latent, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride,
        output_scales, output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    scratch = Scratch(scratch_workspace, scratch_arrivals)
    launch = Launch(plan, entry_items, tokens, Pools(kv_pool, score_pool, page_size, null_page, ring), scratch, output)
    POOLS: tl.constexpr = (output.norm_weight is not None) or (output.rows is not None)
    # Programs that first stored a row and then pooled would end last (docs/notes/0032-who-stores-the-last-rows.md).
    WHOLE: tl.constexpr = (POOLS and ONE_PAGE) and (ring is None and not PROMPT)
    JOIN: tl.constexpr = LANES if WHOLE and (SPEC.OVERLAP == 0 and HOW.TOGETHER > 1) else 0
    SLICES: tl.constexpr = SPEC.HEAD_DIM // HOW.SLICE
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    # What is read before the wait, the plan and what it was built from, is older than the launch before this one. Loads that
    # do not need each other stand side by side: one behind the other, they take longer than a short step.
    total = load_plan(plan.num_items)
    front = pid
    task = pid
    shares = ()
    if POOLS:
        num_entries = tl.minimum(load_plan(cu_entries + batch), plan.entry_capacity)
        parts, span = share_entries(num_entries, programs, SLICES)
        task, front = first_work(pid, programs, num_entries, parts, SLICES)
    idle = front >= total
    if POOLS:
        shares = Shares(parts, span, num_entries * parts)
        idle = idle & (task >= shares.tasks)
    # Programs with nothing to do make room for the next launch, which starts sooner. If program 0 waits, that is enough for
    # the launch to end behind the one before it.
    if idle & (pid > 0):
        return
    # The tiling is built in the call: assigned to a variable, its constants would be tensors.
    run_program(
        front, total, task, shares, programs, launch, HOW, SPEC, FMT,
        Tiling(TILE, LANES, HOW.TOGETHER, HOW.SLICE, ONE_PAGE, LANE_PAGES, PROMPT, ALIGNED, JOIN), POOLS,
    )  # fmt: skip
