"""From a pooled row in registers to the stored record: norm, RoPE, Hadamard, quantize, store."""

import triton
import triton.language as tl


@triton.jit
def tree_sum(x, LENGTH: tl.constexpr, LOG2: tl.constexpr):
    """Sum of `[LENGTH]` by pairing neighbours LOG2 times: the same bits for every number of warps."""
    for i in tl.static_range(LOG2):
        x = tl.sum(tl.reshape(x, (LENGTH >> (i + 1), 2)), axis=1)
    return tl.sum(x, axis=0)  # of one element


@triton.jit
def rms_norm(y, weight, EPS: tl.constexpr, HEAD_DIM: tl.constexpr, LOG2: tl.constexpr):
    mean = tree_sum(y * y, HEAD_DIM, LOG2) * (1.0 / HEAD_DIM)
    inverse = tl.div_rn(mean * 0.0 + 1.0, tl.sqrt_rn(mean + EPS))
    return y * inverse * weight


@triton.jit
def rotate(y, rope, position, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr):
    """RoPE on the last ROPE_DIM channels, in interleaved pairs; the others pass untouched, whatever they hold."""
    even, odd = tl.split(tl.reshape(y, (HEAD_DIM // 2, 2)))
    pair = tl.arange(0, HEAD_DIM // 2) - (HEAD_DIM - ROPE_DIM) // 2
    rotated = pair >= 0
    row = rope + position.to(tl.int64) * ROPE_DIM + pair
    cos = tl.load(row, mask=rotated, other=1.0)
    sin = tl.load(row + ROPE_DIM // 2, mask=rotated, other=0.0)
    new_even = tl.where(rotated, even * cos - odd * sin, even)
    new_odd = tl.where(rotated, odd * cos + even * sin, odd)
    return tl.reshape(tl.join(new_even, new_odd), (HEAD_DIM,))


@triton.jit
def hadamard(y, HEAD_DIM: tl.constexpr, LOG2: tl.constexpr):
    """Sylvester order, all channels, divided by sqrt(HEAD_DIM) at the end."""
    # Every round handles the lowest bit of the channel index and moves it to the top; LOG2 rounds bring all bits home.
    for _ in tl.static_range(LOG2):
        even, odd = tl.split(tl.reshape(y, (HEAD_DIM // 2, 2)))
        y = tl.reshape(tl.trans(tl.join(even + odd, even - odd)), (HEAD_DIM,))
    return y * (HEAD_DIM**-0.5)


@triton.jit
def e4m3_bits(x):
    """e4m3fn of fp32, saturating at 448, nearest even, by integer arithmetic: the same byte on every target."""
    bits = x.to(tl.int32, bitcast=True)
    mag = tl.minimum(tl.abs(x), 448.0)
    mag_bits = mag.to(tl.int32, bitcast=True)
    normal = ((mag_bits + 0x7FFFF + ((mag_bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 a code is a multiple of 2**-9, the spacing of fp32 at 2**14: the addition rounds.
    subnormal = (mag + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(mag < 0.015625, subnormal, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def bf16_bits(x):
    """bf16 of fp32, nearest even, as int16, by integer arithmetic: Triton's interpreter truncates instead of rounding."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def bf16_value(bits):
    """fp32 of `bf16_bits`."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_record(
    y,
    pages,
    page_stride,
    rows_per_page,
    slot,
    HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Writes one record. The layout is `records.RecordFormat`, field for field."""
    page = pages + (slot // rows_per_page) * page_stride
    row = slot % rows_per_page
    record = page + row * ROW_BYTES
    c = tl.arange(0, HEAD_DIM)
    if ELEMENT == "fp32":
        tl.store(record.to(tl.pointer_type(tl.float32)) + c, y)
    elif ELEMENT == "bf16":
        tl.store(record.to(tl.pointer_type(tl.int16)) + c, bf16_bits(y))
    else:
        GROUPS: tl.constexpr = HEAD_DIM // GROUP
        QUANTIZED: tl.constexpr = HEAD_DIM - ROPE_DIM
        rounded = bf16_bits(y)
        v = tl.reshape(bf16_value(rounded), (GROUPS, GROUP))
        # A NaN does not choose the scale of its neighbours.
        amax = tl.max(tl.where(v == v, tl.abs(v), 0.0), axis=1)
        scale = tl.maximum(tl.div_rn(amax, amax * 0.0 + 448.0), FLOOR)
        code = tl.minimum((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23, 254)
        inverse = ((254 - code) << 23).to(tl.float32, bitcast=True)
        group = tl.arange(0, GROUPS)
        channel = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        tl.store(record + channel, e4m3_bits(v * inverse[:, None]), mask=channel < QUANTIZED)
        rotated = (record + QUANTIZED).to(tl.pointer_type(tl.int16))
        tl.store(rotated + (c - QUANTIZED), rounded, mask=c >= QUANTIZED)
        # One byte per group that is quantized; the rest of the tail is the pad that the writer zeroes.
        t = tl.arange(0, TAIL)
        tail = page + rows_per_page * ROW_BYTES + row * TAIL
        tl.static_assert(TAIL == GROUPS, "the tail has one byte per group, the rotated group's being the pad")
        tl.store(tail + t, tl.where(t < QUANTIZED // GROUP, code, 0).to(tl.uint8))


@triton.jit
def emit(
    y,
    entry,
    position,
    rows,
    entry_slots,
    entry_capacity,
    norm_weight,
    rope,
    max_position,
    pages,
    page_stride,
    rows_per_page,
    cache_slots,
    errors,
    HEAD_DIM: tl.constexpr,
    LOG2: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    EPS: tl.constexpr,
    HADAMARD: tl.constexpr,
    ELEMENT: tl.constexpr,
    GROUP: tl.constexpr,
    FLOOR: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Delivers pooled row `y` as entry `entry` of the plan: to `rows` and to the cache, either of which may be None."""
    wrong = entry >= entry_capacity
    slot = entry.to(tl.int64)
    if entry_slots is not None:
        slot = tl.load(entry_slots + entry, mask=entry < entry_capacity, other=-1)
    keep = (entry < entry_capacity) & (slot != -1)
    if pages is not None:
        bad = (slot < -1) | (slot >= cache_slots)
        if ROPE_DIM > 0:
            bad = bad | (position >= max_position)
        wrong = wrong | (keep & bad)
        keep = keep & (bad == 0)
    if wrong:
        tl.atomic_add(errors, 1)
    if keep:
        if rows is not None:
            c = tl.arange(0, HEAD_DIM)
            if rows.dtype.element_ty == tl.bfloat16:
                tl.store(rows.to(tl.pointer_type(tl.int16)) + entry.to(tl.int64) * HEAD_DIM + c, bf16_bits(y))
            else:
                tl.store(rows + entry.to(tl.int64) * HEAD_DIM + c, y)
        if pages is not None:
            weight = tl.load(norm_weight + tl.arange(0, HEAD_DIM)).to(tl.float32)
            y = rms_norm(y, weight, EPS, HEAD_DIM, LOG2)
            if ROPE_DIM > 0:
                y = rotate(y, rope, position, HEAD_DIM, ROPE_DIM)
            if HADAMARD:
                y = hadamard(y, HEAD_DIM, LOG2)
            store_record(y, pages, page_stride, rows_per_page, slot, HEAD_DIM, ROPE_DIM, ELEMENT, GROUP, FLOOR, ROW_BYTES, TAIL)
