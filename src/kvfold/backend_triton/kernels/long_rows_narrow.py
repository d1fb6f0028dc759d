"""A long step over input rows whose entries are small: each program takes several windows of a sequence side by side.

One window of the indexer has too few loads in flight to hide its own waits, and its transforms leave most of a warp idle.
"""

import triton
import triton.language as tl

from ..args import Tokens
from .finish import emit, entry_slot, load_finish, slot_valid
from .fold import empty_group, quotient
from .items import dealt_items, draw_item, item_after, load_item, next_index
from .long_rows import take_item
from .pdl import load_plan, wait_for_inputs
from .places import is_kept, look_up
from .rows import fold_part, keep_window, load_live
from .slots import first_read, sequence_of
from .tokens import apart_from
from .vectors import numbers


@triton.jit
def go_together(item, entry_capacity, one, SPEC: tl.constexpr, COUNT: tl.constexpr):
    """Whether the COUNT windows from `item` on all belong to one sequence, end in this call, and have no old rows."""
    st = one.state
    window, start, end, token, slot, entry, _ = item
    able = (window > start // SPEC.RATIO) & ((window - SPEC.OVERLAP) * SPEC.RATIO >= start)
    able = able & ((window + COUNT) * SPEC.RATIO <= end) & (entry >= 0) & (entry + COUNT <= entry_capacity)
    able = able & (slot < st.num_slots) & (token + end - start <= one.tokens.count)
    if able & (first_read(start, SPEC) < start):
        able, _kept = look_up(sequence_of(st, slot, start, end, SPEC), SPEC)
    return able


@triton.jit
def take_items(item, plan, one, HOW: tl.constexpr, SPEC: tl.constexpr, COUNT: tl.constexpr, FMT: tl.constexpr):
    """Takes the COUNT windows from `item` on, which `go_together`."""
    ROWS: tl.constexpr = SPEC.RATIO * (1 + SPEC.OVERLAP)
    tokens, st, _snaps, _scratch, cache = one
    window, start, end, token, slot, entry, _ = item
    i = numbers(COUNT)
    position = (window + i) * SPEC.RATIO
    cache_slot = entry_slot(entry + i, plan)
    live = tokens.kv_score + (token - start).to(tl.int64) * tokens.stride
    apart = apart_from(tokens, token - start)
    tokens = Tokens(tokens.kv_score, tokens.stride, tokens.count, tokens.ape, apart, tokens.skew)
    ks, ss = load_live(live, tokens, window, 0, ROWS, st.rows.dtype.element_ty, SPEC, HOW.TARGET.INLINE_PTX, COUNT)
    m, l, a = empty_group(COUNT * SPEC.HEAD_DIM)
    m, l, a = fold_part(m, l, a, ks, ss, tokens.ape, None, 0, True, SPEC, ROWS, COUNT)
    y = quotient(a, l, HOW.TARGET.FAST_DIVISION)
    weight, cos, sin = load_finish(position, cache, SPEC, COUNT)
    deliver, wrong = slot_valid(entry + i, cache_slot, position, plan.entry_capacity, cache, SPEC.ROPE_DIM)
    emit(y, entry, cache_slot, weight, cos, sin, cache, SPEC, FMT, HOW.TARGET, COUNT, deliver)
    refused = tl.sum(tl.reshape(wrong.to(tl.int32), (COUNT,)), axis=0)
    if refused > 0:
        tl.atomic_add(plan.errors, refused)
    seq = sequence_of(st, slot, start, end, SPEC)
    if is_kept(seq, window + COUNT - 1, SPEC):  # the last ones of a prompt
        for one_of in range(0, COUNT):
            own = window + one_of
            begin = own * SPEC.RATIO
            keep_window(live, tokens, seq, own, begin, begin + SPEC.RATIO, SPEC, SPEC.RATIO)


@triton.jit
def narrow_rows_step(pid, programs, plan, snap_table, one, HOW: tl.constexpr, SPEC: tl.constexpr, FMT: tl.constexpr):
    """Program `pid` of `programs`, each of which takes TOGETHER consecutive items at a time; without snapshots."""
    COUNT: tl.constexpr = HOW.TOGETHER
    arrivals = one.scratch.arrivals
    total = load_plan(plan.num_items)
    wait_for_inputs(HOW.PDL)
    blocks = (total + COUNT - 1) // COUNT
    dealt = dealt_items(blocks, programs)
    index = pid
    item = load_item(plan.items, pid * COUNT, pid < blocks)
    while index < blocks:
        after = index + programs
        drawn, ticket = draw_item(arrivals, after, dealt, blocks)
        if go_together(item, plan.entry_capacity, one, SPEC, COUNT):
            take_items(item, plan, one, HOW, SPEC, COUNT, FMT)
        else:
            single = item
            for number in range(index * COUNT, tl.minimum(index * COUNT + COUNT, total)):
                take_item(single, None, plan, snap_table, one, False, HOW, SPEC, FMT)
                single = item_after(single, plan.items, number + 1, 1, total, SPEC.RATIO)
        after = next_index(arrivals, drawn, ticket, after, dealt, blocks, programs)
        item = item_after(item, plan.items, after * COUNT, (after - index) * COUNT, total, SPEC.RATIO)
        index = after
