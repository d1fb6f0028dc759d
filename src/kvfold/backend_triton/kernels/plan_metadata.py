"""`StepPlan.update` with an engine's metadata: numbers of any width and stride, other sources of slots, reserved places.

A launch has few programs, so its time is a chain of instructions and latencies. Hence everything that depends only on a
sequence's number is loaded at once, without masks, and cache slots before anything is summed.
"""

import triton
import triton.language as tl

from .numbers import load_numbers, to_int32, where_set
from .plan_items import INT32_MAX, MOST_POSITIONS, store_items

TABLE, TOKENS, ENTRIES = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # what says where entries go: `Metadata.source`
SCAN_METADATA = 256  # sequences before a program's own that it counts at a time: two to a thread
WARPS_METADATA = 4


@triton.jit
def bytes_apart(numbers):
    """Bytes from one number, or row of numbers, to the next; below 2**31 (`check_numbers`), so that an address is one
    instruction.
    """
    return numbers.step.to(tl.int32) // 2 * 4


@triton.jit
def is_wide(numbers):
    """1 where numbers are int64, and 0 where they are int32."""
    return numbers.step.to(tl.int32) & 1


@triton.jit
def joined(low, high, wide):
    """int64: the numbers of two words, or of `low` alone where they are not `wide`."""
    return (tl.where(wide == 1, high, low >> 31).to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def address_of(at, i, apart):
    """Address of a word of numbers `i`, which are int32 like `apart`, the bytes between them. at: the address of number 0."""
    return (at.to(tl.pointer_type(tl.int8)) + i.to(tl.int64) * apart.to(tl.int64)).to(tl.pointer_type(tl.int32))


@triton.jit
def load_given(numbers, i, there):
    """Both words of numbers `i`, all of which are in the tensor; those of its first number where `there` is 0 instead of 1."""
    at, apart = numbers.at.to(tl.pointer_type(tl.int32)), bytes_apart(numbers) * there
    # Of an int32 the same word twice: no mask, for which there are too few registers to ask for all at once.
    return tl.load(address_of(at, i, apart)), tl.load(address_of(at + is_wide(numbers) * there, i, apart))


@triton.jit
def load_sequences(given, b):
    """What the engine says of sequences `b`, as words; sequences beyond the batch get what it says of the last one."""
    i = tl.minimum(b, given.batch - 1)
    more = given.metadata
    return (
        load_given(given.lengths, i, 1), load_given(given.cu_seqlens, i, 1), load_given(given.cu_seqlens, i + 1, 1),
        load_given(given.state_slots, i, more.by_slot), load_given(more.cu_rows, i, more.reserved),
    )  # fmt: skip


@triton.jit
def start_of(given, loaded):
    """int64: first positions, and how many there are of each sequence."""
    wide = is_wide(given.cu_seqlens)
    length = joined(loaded[2][0], loaded[2][1], wide) - joined(loaded[1][0], loaded[1][1], wide)
    return joined(loaded[0][0], loaded[0][1], is_wide(given.lengths)) - length * given.metadata.totals, length


@triton.jit
def count_loaded(given, loaded, b, inside, RATIO: tl.constexpr):
    """Windows touched, entries made, and whether refused, from what `load_sequences` found: the rules of `StepPlan.update`.

    One unsigned comparison checks both bounds of a number. After it start, end and token are int32, which mean nothing for a
    sequence without windows.
    """
    more = given.metadata
    start, length = start_of(given, loaded)
    token = joined(loaded[1][0], loaded[1][1], is_wide(given.cu_seqlens))
    kept = joined(loaded[3][0], loaded[3][1], is_wide(given.state_slots))
    slot = tl.where(more.by_slot == 1, tl.where(kept == more.null_slot, -1, kept), b)
    present = inside & (slot != -1) & (length != 0)
    offset = token - given.first_row
    wrong = (slot < -1) | (start.to(tl.uint64) > MOST_POSITIONS) | (length.to(tl.uint64) > given.max_new_tokens.to(tl.uint64))
    wrong = wrong | (offset.to(tl.uint64) > given.max_tokens.to(tl.uint64)) | (token > INT32_MAX)
    start, length, token = start.to(tl.int32), length.to(tl.int32), token.to(tl.int32)
    # Where the bounds above hold, neither sum reaches 2**32.
    end = start + length
    behind = offset.to(tl.int32) + length
    wrong = wrong | (end.to(tl.uint32) > MOST_POSITIONS) | (behind.to(tl.uint32) > given.max_tokens.to(tl.uint32))
    wrong = present & wrong
    live = present & (wrong == 0)
    first = tl.where(live, start, 0) // RATIO
    windows = tl.where(live, (tl.where(live, end, 1) - 1) // RATIO - first + 1, 0)
    entries = tl.where(live, tl.where(live, end, 0) // RATIO - first, 0)
    return windows, entries, wrong, start, end, token, to_int32(slot)


@triton.jit
def place_of(low, high, numbers):
    """A place as an int32 that compares with all other places as the place itself does."""
    return tl.maximum(tl.minimum(joined(low, high, is_wide(numbers)), MOST_POSITIONS + 1), -1).to(tl.int32)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def first_places(place, behind, numbers, entries, farthest):
    """The place of each sequence's first entry; where its entries do not fit, one that no output has.

    place, behind: where a sequence's places begin and end. numbers: entries before. farthest: the largest place at which a
    sequence before these begins; no sequence may begin before that.
    """
    behind = tl.minimum(behind, MOST_POSITIONS)
    highest = tl.maximum(tl.associative_scan(place, 0, larger), farthest)
    fits = (place >= numbers) & (place >= highest) & (place <= MOST_POSITIONS) & (behind - place >= entries)
    return tl.where(fits, place, MOST_POSITIONS)


@triton.jit
def load_slots(b, window, last_token, complete, table, table_width, rows_per_page, metadata):
    """Words of whatever says where entries go, which of them exist, and an entry's row in its page.

    For entries that are `complete`, by a table or by tokens. last_token: rows of kv_score.
    """
    if metadata.source == TABLE:
        column = window // rows_per_page
        row = window - column * rows_per_page
        known = complete & (column < table_width)
        at = address_of(table.at, b, bytes_apart(table)) + column * (1 + is_wide(table))
        low = tl.load(at, mask=known, other=0)
        high = tl.load(at + 1, mask=where_set(known, is_wide(table)), other=0)
    else:
        row = window
        known = complete & (last_token < tl.where(metadata.source == TOKENS, metadata.num_slots, 0))
        at = address_of(metadata.slots.at, last_token, bytes_apart(metadata.slots))
        low = tl.load(at, mask=known, other=0)
        high = tl.load(at + 1, mask=where_set(known, is_wide(metadata.slots)), other=0)
    return low, high, known, row


@triton.jit
def slots_of(low, high, known, row, made, table, rows_per_page, metadata):
    """Cache slots from what `load_slots` found, and which of the entries that are `made` have none."""
    by_table = metadata.source == TABLE
    number = joined(low, high, tl.where(by_table, is_wide(table), is_wide(metadata.slots)))
    number = tl.where(known & (number != tl.where(by_table, metadata.null_page, metadata.no_slot)), number, -1)
    scale = tl.where(by_table, rows_per_page, 1).to(tl.int64)
    page = tl.where(by_table, tl.minimum(number, INT32_MAX), number)
    slot = tl.where(number >= 0, page * scale + tl.where(by_table, row, 0), -1)
    return slot, made & ((known == 0) | where_set(number < -1, by_table))


@triton.jit
def plan_part(
    given, loaded, limits, first, counts, own, pages, chunk, num_chunks, part, b,
    RATIO: tl.constexpr, SEQUENCES: tl.constexpr, WINDOWS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Plans WINDOWS windows of each of a program's sequences, from `part * WINDOWS` on.

    loaded, first: what `load_sequences` gave, for these sequences and for the first SCAN of all. limits: words of the places
    where they end. counts: what `count_loaded` gave. pages: the block table, its width, and the rows of a page.
    """
    metadata, batch = given.metadata, given.batch
    windows, entries, wrong, start, end, token, slot = counts
    table, table_width, rows_per_page = pages
    before = chunk * SEQUENCES
    inside = b < batch
    earlier = tl.arange(0, SCAN)
    ordinal = part * WINDOWS + tl.arange(0, WINDOWS)[None, :]
    window = (tl.where(windows > 0, start, 0) // RATIO)[:, None] + ordinal
    complete = ordinal < entries[:, None]
    last_token = (token - start)[:, None] + window * RATIO + RATIO - 1
    low, high, known, row = load_slots(b[:, None], window, last_token, complete, table, table_width, rows_per_page, metadata)

    w, e, _, _, _, _, _ = count_loaded(given, first, earlier, earlier < before, RATIO)
    counted = (w.to(tl.int64) << 32) + e.to(tl.int64)
    places = earlier * 0
    for base in range(SCAN, before, SCAN):
        others = base + earlier
        found = load_sequences(given, others)
        w, e, _, _, _, _, _ = count_loaded(given, found, others, others < before, RATIO)
        counted += (w.to(tl.int64) << 32) + e.to(tl.int64)
        place = place_of(found[4][0], found[4][1], metadata.cu_rows)
        places = tl.maximum(places, tl.where(others < before, place, 0))
    total = tl.sum(counted, axis=0)  # both sums at once; neither reaches 2**31
    cu_windows = (total >> 32).to(tl.int32) + tl.cumsum(windows, axis=0)
    entries_before = (total & 0xFFFFFFFF).to(tl.int32)
    ends = entries_before + tl.cumsum(entries, axis=0)
    numbers = ends - entries
    index = (cu_windows - windows)[:, None] + ordinal
    used = (ordinal < windows[:, None]) & (index < own.item_capacity)
    entry = tl.where(complete, numbers[:, None] + ordinal, -1)
    tl.store(own.entry_items + entry, index, mask=used & complete & (entry < own.entry_capacity))
    if metadata.reserved == 1:
        place = place_of(first[4][0], first[4][1], metadata.cu_rows)
        places = tl.maximum(places, tl.where(earlier < before, place, 0))
        place = place_of(loaded[4][0], loaded[4][1], metadata.cu_rows)
        behind = place_of(limits[0], limits[1], metadata.cu_rows)
        firsts = first_places(place, behind, numbers, entries, tl.max(places, axis=0))
        entry = tl.where(complete, firsts[:, None] + ordinal, -1)
    store_items(own.items, index, used, window, start, end, token, slot, entry, b)
    if metadata.source > 0:
        made = used & complete & (entry < own.entry_capacity)
        if metadata.source == ENTRIES:
            cache_slot = load_numbers(metadata.slots, entry, made & (entry < metadata.num_slots), -1)
        else:
            cache_slot, missing = slots_of(low, high, known, row, made, table, rows_per_page, metadata)
            tl.atomic_add(own.errors + ordinal * 0 + b[:, None] * 0, 1, mask=missing, sem="relaxed")
        tl.store(own.entry_slots + entry, cache_slot, mask=made)
    if part == 0:
        tl.store(own.cu_entries + 1 + b, ends, mask=inside)
        given_start = start_of(given, loaded)[0]
        tl.store(own.start_pos + b, to_int32(given_start), mask=inside)
        wide = is_wide(given.cu_seqlens)
        tl.store(own.cu_seqlens + b, to_int32(joined(loaded[1][0], loaded[1][1], wide)), mask=b == 0)
        tl.store(own.cu_seqlens + 1 + b, to_int32(joined(loaded[2][0], loaded[2][1], wide)), mask=inside)
        tl.store(own.num_items + b * 0, tl.minimum(cu_windows, own.item_capacity), mask=b == batch - 1)
        tl.atomic_add(own.errors + b * 0, 1, mask=wrong, sem="relaxed")
    if chunk == num_chunks - 1:
        parts = tl.num_programs(0) // num_chunks
        behind = entries_before + tl.sum(entries, axis=0)
        # Of reserved places it is not known here which are free.
        frees = (metadata.source > 0) & (metadata.reserved == 0)
        for base in range(0, tl.maximum(own.entry_capacity - behind, 0), parts * SCAN):
            spare = behind + base + part * SCAN + tl.arange(0, SCAN)
            tl.store(own.entry_items + spare, tl.full((SCAN,), -1, tl.int32), mask=spare < own.entry_capacity)
            if frees:
                tl.store(own.entry_slots + spare, tl.full((SCAN,), -1, tl.int64), mask=spare < own.entry_capacity)


@triton.jit
def plan_engine(
    given, own, table, table_width, rows_per_page, chunk, num_chunks, part, b,
    RATIO: tl.constexpr, SEQUENCES: tl.constexpr, WINDOWS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """`plan_part`, except for parts beyond the longest sequence, which have nothing to do; those of the last chunk clear
    entries.
    """
    loaded = load_sequences(given, b)
    limits = load_given(given.metadata.cu_rows, tl.minimum(b, given.batch - 1) + 1, given.metadata.reserved)
    first = load_sequences(given, tl.arange(0, SCAN))
    counts = count_loaded(given, loaded, b, b < given.batch, RATIO)
    # Few windows are of one part (`keys.windows_per_program`), and nobody waits for their largest number.
    if WINDOWS <= 8 or (chunk == num_chunks - 1) | (part == 0) | (tl.max(counts[0], axis=0) > part * WINDOWS):
        pages = table, table_width, rows_per_page
        plan_part(given, loaded, limits, first, counts, own, pages, chunk, num_chunks, part, b, RATIO, SEQUENCES, WINDOWS, SCAN)
