"""A step over `WindowState`: writes the raw rows of new tokens, and pools every window that ends, in parallel.

A program has two kinds of work. It takes entries, or parts of them: some slices of channels, pooled one after the other
(`pool_slice`), with old rows from the pages and new ones live, so that nobody waits for what another program writes. And it
takes work items, whose new rows it writes to their pages. Who begins with the one comes last with the other, so that a program
has both only where there is much of both. Where several programs share an entry, one of them finishes it (slices.py); which one
that is changes no bit.

Who pools a row that is new writes it, and nobody else, where that is simple: in a long step (PROMPT) in a window whose rows are
all new (`claims`), which is so read once; in a short one (JOIN) in a window that lies on one page (`joins`).
"""

import triton
import triton.language as tl

from ..args import Cache, Plan, Pool, Scratch, Tokens
from .finish import aim_entry, emit, judge_slot
from .fold import spread
from .items import load_item
from .pdl import load_plan, wait_for_inputs
from .prefetch import prefetch_item, prefetch_tokens, prefetch_window
from .slices import draw_ticket, is_last, leave_slice, take_slices
from .window_rows import find_pages, pool_slice, store_rounded


@triton.jit
def write_rows(
    tokens, kv_pool, score_pool, page_size, begin, stop, start, token, sequence, halves, RATIO: tl.constexpr, CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Stores the rows of new positions `[begin, stop)`; returns how many have a bad page.

    halves: of rows with overlap, the lo ones (0), the hi ones (1) or both (2); None is both too.
    """
    c = tl.arange(0, CHANNELS)
    if ALIGNED:
        tokens = Tokens(
            tokens.kv_score, (tokens.stride // 16) * 16, tokens.count, tokens.ape
        )  # says that it is a multiple, which the signature does not: see `pool_slice`
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
            at = tokens.kv_score + (token + x - start).to(tl.int64) * tokens.stride + c
            k = tl.load(at, mask=there, other=0.0).to(tl.float32)
            s = tl.load(at + CHANNELS, mask=there, other=0.0).to(tl.float32)
            if tokens.ape is not None:
                s += tl.load(tokens.ape + (x % RATIO) * CHANNELS + c, mask=there, other=0.0)
            kv_page, _, kv_bad = find_pages(kv_pool.table, kv_pool.width, kv_pool.num_pages, sequence, x, x < stop, page_size)
            score_page, _, score_bad = find_pages(
                score_pool.table, score_pool.width, score_pool.num_pages, sequence, x, x < stop, page_size,
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
            kv_kept = spread(kv_kept, CHANNELS)
            score_kept = spread(score_kept, CHANNELS)
            if halves is not None:
                kv_kept = kv_kept & (spread(halves == 2, CHANNELS) | (c // (CHANNELS // 2) == halves))
                score_kept = score_kept & (spread(halves == 2, CHANNELS) | (c // (CHANNELS // 2) == halves))
            row = ((begin + base + i) % page_size).to(tl.int64)
            at = kv_page * kv_pool.page_stride + row * kv_pool.row_stride + c
            store_rounded(kv_pool.rows, at, ks[i], kv_kept)
            at = score_page * score_pool.page_stride + row * score_pool.row_stride + c
            store_rounded(score_pool.rows, at, ss[i], score_kept)
    return refused


@triton.jit
def check_window(
    kv_pool, score_pool, page_size, window, start, sequence, SPEC: tl.constexpr, TILE: tl.constexpr, ONE_PAGE: tl.constexpr,
):  # fmt: skip
    """How many old rows of a window have no page, and how many a bad one; of a window on one page, whether it has any such."""
    missing = tl.zeros((), tl.int32)
    bad = tl.zeros((), tl.int32)
    STEP: tl.constexpr = SPEC.RATIO if ONE_PAGE else 1
    ROWS: tl.constexpr = (1 + SPEC.OVERLAP) if ONE_PAGE else TILE
    for j0 in range(0, SPEC.RATIO * (1 + SPEC.OVERLAP), ROWS * STEP):
        j = j0 + tl.arange(0, ROWS) * STEP
        x = (window - SPEC.OVERLAP) * SPEC.RATIO + j
        wanted = (x >= 0) & (x < start) & (j < SPEC.RATIO * (1 + SPEC.OVERLAP))
        x = tl.maximum(x, 0)
        _, kv_missing, kv_bad = find_pages(kv_pool.table, kv_pool.width, kv_pool.num_pages, sequence, x, wanted, page_size)
        _, score_missing, score_bad = find_pages(
            score_pool.table,
            score_pool.width,
            score_pool.num_pages,
            sequence,
            x,
            wanted,
            page_size,
        )
        missing += tl.sum((kv_missing | score_missing).to(tl.int32), axis=0)
        bad += tl.sum((kv_bad | score_bad).to(tl.int32), axis=0)
    return missing, bad


@triton.jit
def find_home(table, width, num_pages, page_size, window, start, sequence, there, RATIO: tl.constexpr, ALWAYS: tl.constexpr):
    """The page of a window that has its rows on one: -1 where there is none, or it is not needed; whether an old row lacks it;
    and whether it is a bad one.

    ALWAYS: needed for new rows too.
    """
    x = window * RATIO
    old = there & (start > x)
    page, missing, bad = find_pages(table, width, num_pages, sequence, x, there if ALWAYS else old, page_size)
    return tl.where(bad, -1, page), old & (missing | bad), bad


@triton.jit
def load_entry(
    plan, entry_items, number, there, kv_pool, score_pool, page_size, SPEC: tl.constexpr, ONE_PAGE: tl.constexpr, PROMPT: tl.constexpr,
):  # fmt: skip
    """Its work item, its cache slot, and the pages of its rows: nothing that a kernel in flight writes.

    The pages, if a window has its rows on one: of values before and in this window, then of scores; whether an old row has
    none, and whether a row of this window has a bad one.
    """
    index = tl.load(entry_items + number, mask=there, other=0, cache_modifier=".cg")
    slot = number.to(tl.int64)
    if plan.entry_slots is not None:
        slot = tl.load(plan.entry_slots + number, mask=there, other=-1, cache_modifier=".cg")
    # Where every window of a step ends, entry and item have one number: that item is not waited for twice.
    window, start, end, token, state_slot, entry, sequence = load_item(plan.items, number, there)
    if there & (entry != number):
        window, start, end, token, state_slot, entry, sequence = load_item(plan.items, index, there)
    item = (window, start, end, token, state_slot, entry, sequence)
    homes = ()
    if ONE_PAGE:
        kv, kv_lost, kv_bad = find_home(
            kv_pool.table, kv_pool.width, kv_pool.num_pages, page_size, window, start, sequence, there, SPEC.RATIO, PROMPT,
        )  # fmt: skip
        score, score_lost, score_bad = find_home(
            score_pool.table, score_pool.width, score_pool.num_pages, page_size, window, start, sequence, there, SPEC.RATIO, PROMPT,
        )  # fmt: skip
        kv_before = kv
        score_before = score
        lost = kv_lost | score_lost
        if SPEC.OVERLAP:
            before = tl.maximum(window - 1, 0)
            kv_before, kv_lost, _ = find_home(
                kv_pool.table, kv_pool.width, kv_pool.num_pages, page_size, before, start, sequence, there & (window > 0),
                SPEC.RATIO, PROMPT,
            )  # fmt: skip
            score_before, score_lost, _ = find_home(
                score_pool.table, score_pool.width, score_pool.num_pages, page_size, before, start, sequence, there & (window > 0),
                SPEC.RATIO, PROMPT,
            )  # fmt: skip
            lost = lost | kv_lost | score_lost
        homes = (kv_before, kv, score_before, score, lost, kv_bad | score_bad)
    return item, slot, homes


@triton.jit
def claims(window, start, entry, entry_capacity, SPEC: tl.constexpr):
    """Whether all rows that the entry of a window is pooled of are new, so that the program that pools it writes them."""
    return (entry >= 0) & (entry < entry_capacity) & (start <= tl.maximum(window - SPEC.OVERLAP, 0) * SPEC.RATIO)


@triton.jit
def joins(window, start, entry, entry_capacity, RATIO: tl.constexpr, LANES: tl.constexpr):
    """Whether of a window that ends, old and new rows on one page, no more than the last LANES are new.

    If that page is missing, nobody can write them.
    """
    return (entry >= 0) & (entry < entry_capacity) & (start > window * RATIO) & (start >= window * RATIO + RATIO - LANES)


@triton.jit
def unclaimed(window, start, end, entry, entry_capacity, SPEC: tl.constexpr):
    """Whether the rows of a window that are new, or the hi halves of them, and whether the lo halves, are left to be written.

    The lo halves belong to the window behind it.
    """
    own = claims(window, start, entry, entry_capacity, SPEC) == 0
    lo = own
    if SPEC.OVERLAP:
        behind = tl.where((entry >= 0) & (end >= (window + 2) * SPEC.RATIO), entry + 1, -1)
        lo = claims(window + 1, start, behind, entry_capacity, SPEC) == 0
    return own, lo


@triton.jit
def next_item(items, index, total, programs, entry_capacity, num_tokens, SPEC: tl.constexpr, PROMPT: tl.constexpr):
    """The first work item from `index` on, in steps of `programs`, that has rows left to write; `total` or more: none."""
    if PROMPT:
        # Of a long prompt hardly any: 32 are looked at in the latency of one.
        found = total
        while (index < total) & (found == total):
            i = index + tl.arange(0, 32) * programs
            window, start, end, token, _slot, entry, _sequence = load_item(items, i, i < total)
            own, lo = unclaimed(window, start, end, entry, entry_capacity, SPEC)
            left = own | lo | (token + end - start > num_tokens)
            found = tl.min(tl.where(left & (i < total), i, total), axis=0)
            index += 32 * programs
        index = found
    return index


@triton.jit
def judge_item(
    item, there, plan, kv_pool, score_pool, page_size, cache, SPEC: tl.constexpr, TILE: tl.constexpr, ONE_PAGE: tl.constexpr
):
    """What is wrong with the entry of a work item, if it has one: old rows with a bad page, old rows with none, whether it is
    wanted, and whether it is refused. Before the wait, as nothing of it is written by a kernel in flight.
    """
    window, start, _end, _token, _slot, entry, sequence = item
    missing = tl.zeros((), tl.int32)
    bad = tl.zeros((), tl.int32)
    wanted = entry < 0
    wrong = entry < -1
    if there & (entry >= 0):
        missing, bad = check_window(kv_pool, score_pool, page_size, window, start, sequence, SPEC, TILE, ONE_PAGE)
        slot = tl.where(entry < plan.entry_capacity, entry, -1).to(tl.int64)
        if plan.entry_slots is not None:
            slot = tl.load(plan.entry_slots + entry, mask=entry < plan.entry_capacity, other=-1, cache_modifier=".cg")
        _deliver, wrong = judge_slot(entry, slot, window * SPEC.RATIO, plan.entry_capacity, cache, SPEC.ROPE_DIM)
        wanted = (entry >= plan.entry_capacity) | (slot != -1)
    return bad, missing, wanted, wrong


@triton.jit
def write_item(
    item, verdict, tokens, plan, kv_pool, score_pool, page_size, SPEC: tl.constexpr, AHEAD: tl.constexpr, ALIGNED: tl.constexpr,
    PROMPT: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Writes the new rows of a work item that nobody claims, and counts what is wrong with it. verdict: of `judge_item`."""
    window, start, end, token, _slot, entry, sequence = item
    bad, missing, wanted, wrong = verdict
    count = tl.zeros((), tl.int32)
    if token + end - start <= tokens.count:
        begin = tl.maximum(start, window * SPEC.RATIO)
        stop = begin + tl.minimum(end - begin, SPEC.RATIO - begin % SPEC.RATIO)
        halves = None
        own = window >= 0
        if PROMPT:
            own, lo = unclaimed(window, start, end, entry, plan.entry_capacity, SPEC)
            if SPEC.OVERLAP:
                halves = tl.where(own & lo, 2, own.to(tl.int32))
        if JOIN > 0:
            if joins(window, start, entry, plan.entry_capacity, SPEC.RATIO, JOIN) & (bad + missing == 0):
                stop = begin
        refused = write_rows(
            tokens, kv_pool, score_pool, page_size, begin, stop, start, token, sequence, halves, SPEC.RATIO,
            SPEC.HEAD_DIM * (1 + SPEC.OVERLAP), AHEAD, ALIGNED,
        )  # fmt: skip
        if own:  # who pools a claimed window counts what is wrong with it
            count = (refused > 0).to(tl.int32)
            if bad > 0:
                count = bad * 0 + 1
            elif missing > 0:
                count = tl.maximum(count, wanted.to(tl.int32))
            else:
                count += wrong.to(tl.int32)
    elif window == start // SPEC.RATIO:
        count += 1
    if count > 0:
        tl.atomic_add(plan.errors, count)


@triton.jit
def window_kernel(
    plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors,
    entry_items, cu_entries, batch,
    tokens_kv_score, tokens_stride, tokens_count, tokens_ape,
    kv_pool_rows, kv_pool_page_stride, kv_pool_row_stride, kv_pool_num_pages, kv_pool_table, kv_pool_width,
    score_pool_rows, score_pool_page_stride, score_pool_row_stride, score_pool_num_pages, score_pool_table,
    score_pool_width,
    page_size,
    scratch_workspace, scratch_arrivals,
    output_rows, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride, output_scales,
    output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
    ONE_PAGE: tl.constexpr, PROMPT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    plan = Plan(plan_items, plan_num_items, plan_entry_slots, plan_entry_capacity, plan_errors)
    tokens = Tokens(tokens_kv_score, tokens_stride, tokens_count, tokens_ape)
    kv_pool = Pool(kv_pool_rows, kv_pool_page_stride, kv_pool_row_stride, kv_pool_num_pages, kv_pool_table, kv_pool_width)
    score_pool = Pool(
        score_pool_rows, score_pool_page_stride, score_pool_row_stride, score_pool_num_pages, score_pool_table,
        score_pool_width,
    )  # fmt: skip
    scratch = Scratch(scratch_workspace, scratch_arrivals)
    cache = Cache(
        output_rows, output_norm_weight, output_rope, output_max_position, output_pages, output_page_stride, output_scales,
        output_scales_stride, output_rows_per_page, output_num_slots, output_scale,
    )  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    SLICES: tl.constexpr = SPEC.HEAD_DIM // HOW.SLICE
    POOLS: tl.constexpr = (cache.pages is not None) or (cache.rows is not None)
    # Of 64 sequences whose windows end, programs that first wrote a row and then pooled came last: 13.6 us, and 13.2 so.
    JOIN: tl.constexpr = LANES if (POOLS and ONE_PAGE) and ((SPEC.OVERLAP == 0 and HOW.TOGETHER > 1) and not PROMPT) else 0
    # What is read before the wait, the plan and what it was built from, is older than the launch before this one. Loads that
    # do not need each other stand side by side: one behind the other, they take longer than a short step.
    total = load_plan(plan.num_items)
    front = pid
    if POOLS:
        num_entries = tl.minimum(load_plan(cu_entries + batch), plan.entry_capacity)
        # As many programs to an entry as leave one part to each of them: one that has several looks up its rows once.
        parts = num_entries * 0 + SLICES
        span = num_entries * 0 + 1
        while (parts > 1) & (num_entries * parts > programs):
            parts = parts // 2
            span = span * 2
        # Programs start in order: those with the longer way first, which is pooling where it has slices.
        task = programs - 1 - pid
        if SLICES > 1:
            task = pid
            behind = pid - tl.minimum(num_entries * parts, programs)
            front = tl.where(behind < 0, behind + programs, behind)
    idle = front >= total
    if POOLS:
        idle = idle & (task >= num_entries * parts)
    # Programs with nothing to do make room for the next launch, which starts sooner: 64 sequences, one token each, of which no
    # window ends, 1.8 instead of 2.2 us. One that waits is enough for a launch that ends behind the one before it.
    if idle & (pid > 0):
        return
    index = next_item(plan.items, front, total, programs, plan.entry_capacity, tokens.count, SPEC, PROMPT)
    next_up = load_item(plan.items, index, index < total)
    if POOLS:
        item, slot, homes = load_entry(
            plan, entry_items, task // parts, task < num_entries * parts, kv_pool, score_pool, page_size, SPEC, ONE_PAGE, PROMPT,
        )  # fmt: skip
        if HOW.PDL and (PROMPT and (SLICES == 1 or SPEC.OVERLAP == 0)):  # ratio 128, a prompt of 8k in 16.9 instead of 18.3 us
            there = task < num_entries * parts
            c0 = task % parts * HOW.SLICE
            prefetch_item(item, there, c0, tokens, SPEC, HOW.SLICE)
        if HOW.PDL and ONE_PAGE:
            # Pieces are asked for one after the other, 0.5 us for 128 of them, which paces what is fetched beside loads of the
            # launch before; lines all at once. Slices of values in pieces and of scores in lines: 1, 16 and 64 windows in 3.09,
            # 5.10 and 11.9 us and four tokens of 64 sequences at all phases in 3.50; both in pieces 3.2, 5.2, 11.7 and 4.0.
            if (task < num_entries * parts) & (homes[4] == 0):
                c0 = task % parts * HOW.SLICE
                prefetch_window(
                    kv_pool.rows, kv_pool.page_stride, kv_pool.row_stride, page_size, item[0], item[1], c0, homes[0], homes[1],
                    SPEC, HOW.SLICE, SLICES > 1 or PROMPT,
                )  # fmt: skip
                prefetch_window(
                    score_pool.rows, score_pool.page_stride, score_pool.row_stride, page_size, item[0], item[1], c0, homes[2],
                    homes[3], SPEC, HOW.SLICE, PROMPT,
                )  # fmt: skip
    verdict = judge_item(next_up, index < total, plan, kv_pool, score_pool, page_size, cache, SPEC, TILE, ONE_PAGE)
    if HOW.PDL:
        window, start, end, token, _slot, _entry, _sequence = next_up
        if (index < total) & (token + end - start <= tokens.count):
            live = tokens.kv_score + (token - start).to(tl.int64) * tokens.stride
            prefetch_tokens(
                live,
                tokens.stride,
                tl.maximum(start, window * SPEC.RATIO),
                end,
                HOW.AHEAD,
                SPEC.HEAD_DIM * (1 + SPEC.OVERLAP),
            )
    # Every program that is left waits; each where its work begins, so that what it needs for that is worked out before: 300
    # instructions stand in front of the loop over entries.
    if index < total:
        wait_for_inputs(HOW.PDL)
        while index < total:
            write_item(next_up, verdict, tokens, plan, kv_pool, score_pool, page_size, SPEC, HOW.AHEAD, ALIGNED, PROMPT, JOIN)
            index = next_item(
                plan.items,
                index + programs,
                total,
                programs,
                plan.entry_capacity,
                tokens.count,
                SPEC,
                PROMPT,
            )
            if index < total:
                next_up = load_item(plan.items, index, index < total)
                verdict = judge_item(next_up, index < total, plan, kv_pool, score_pool, page_size, cache, SPEC, TILE, ONE_PAGE)
        if POOLS and ((SLICES > 1 or PROMPT) or ONE_PAGE == 0):
            # Again: kept in registers meanwhile, these would spill. In a short step over whole rows they do not, and it is done
            # sooner: one token at ratio 4 takes 1.7 instead of 2.0 us where no window ends, and 3.2 instead of 3.5 where 64 do.
            item, slot, homes = load_entry(
                plan, entry_items, task // parts, task < num_entries * parts, kv_pool, score_pool, page_size, SPEC, ONE_PAGE, PROMPT,
            )  # fmt: skip
    if POOLS:
        # Slices are turns of this loop and not of one inside it, out of which the compiler would take the addresses of all
        # ways to load rows: 400 instructions more for each entry.
        turn = task * 0
        while task < num_entries * parts:
            wait_for_inputs(HOW.PDL)
            window, start, end, token, _slot, entry, sequence = item
            deliver, wrong = judge_slot(entry, slot, window * SPEC.RATIO, plan.entry_capacity, cache, SPEC.ROPE_DIM)
            mine = entry < 0
            if JOIN > 0:
                mine = joins(window, start, entry, plan.entry_capacity, SPEC.RATIO, JOIN) & (homes[4] == 0)
            if PROMPT:
                mine = claims(window, start, entry, plan.entry_capacity, SPEC)
                if mine & (turn + task % parts == 0) & (token + end - start <= tokens.count):
                    count = homes[5].to(tl.int32) + wrong.to(tl.int32)
                    if count > 0:
                        tl.atomic_add(plan.errors, count)
            if (deliver | mine) & (token + end - start <= tokens.count):
                # The parts of an entry side by side: memory has rows of 1 KiB open, and gives them slower slice by slice.
                c0 = (task % parts + turn * parts) * HOW.SLICE
                if SLICES > 1 and ONE_PAGE:  # known before the work: whether rows are lost
                    ticket = draw_ticket(scratch.arrivals, entry, deliver & (turn == span - 1) & (homes[4] == 0))
                y, absent = pool_slice(
                    tokens, kv_pool, score_pool, page_size, window, start, token, sequence, c0, homes, mine, SPEC, TILE, LANES,
                    HOW.TOGETHER, HOW.SLICE, ONE_PAGE, PROMPT, ALIGNED, HOW.TARGET.FAST_DIVISION,
                )  # fmt: skip
                # Every slice sees the same rows, so either all of them bring theirs or none.
                finish = deliver & (absent == 0)
                # Loads that the last of the parts needs are under way while it arrives.
                _slot, weight, cos, sin = aim_entry(
                    entry, window * SPEC.RATIO, Plan(None, None, None, plan.entry_capacity, None), cache, SPEC
                )
                if SLICES > 1:
                    if finish:
                        leave_slice(scratch.workspace, y, entry, c0, SPEC.HEAD_DIM, HOW.SLICE, HOW.TARGET.COHERENT_STORES)
                    finish = finish & (turn == span - 1)
                    if ONE_PAGE == 0:
                        ticket = draw_ticket(scratch.arrivals, entry, finish)
                    if finish:
                        finish = is_last(ticket, parts)
                if finish:
                    if SLICES > 1:
                        whole = take_slices(scratch.workspace, scratch.arrivals, entry, SPEC.HEAD_DIM)
                    else:
                        whole = y
                    emit(whole, entry, slot, weight, cos, sin, cache, SPEC, FMT, HOW.TARGET)
            turn += 1
            if turn >= span:
                # Not before the work on this one: that cost 150 of 1,300 instructions, and other programs hide the latency.
                turn = turn * 0
                task += programs
                # By a branch: the way through the loads of an entry that is not there, at the end of a launch, took 0.35 us.
                if task < num_entries * parts:
                    item, slot, homes = load_entry(
                        plan, entry_items, task // parts, task < num_entries * parts, kv_pool, score_pool, page_size, SPEC, ONE_PAGE,
                        PROMPT,
                    )  # fmt: skip
    wait_for_inputs(HOW.PDL)
