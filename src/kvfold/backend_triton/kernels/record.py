"""From the finished row to the stored record: scales, element encodings, bytes. The layout is a `RecordFormat`.

Everything is rounded by IEEE operations and integer arithmetic, so that the bytes are the same on every GPU and under the
interpreter. For bf16 and e4m3 a GPU may have an instruction (`args.Target`), which gives the same bytes.
"""

import triton
import triton.language as tl

from .vectors import abreast, span, wherever


@triton.jit
def bf16_bits(x, BF16_CONVERSION: tl.constexpr = False):
    """bf16 of fp32, nearest even, as int16. NaN becomes 0x7FC0. (Triton's interpreter truncates in its own cast.)"""
    if BF16_CONVERSION:
        rounded = x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    else:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def bf16_value(bits):
    """fp32 of `bf16_bits`."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_bits(x):
    """e4m3fn of fp32 as int32, nearest even, saturating at 448; NaN becomes 0x7F."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    mag = tl.minimum(tl.abs(x), 448.0)
    bits = mag.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 a code is a multiple of 2**-9, the spacing of fp32 at 2**14: the addition rounds.
    subnormal = (mag + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(mag < 0.015625, subnormal, normal) | sign
    return tl.where(x == x, code, 0x7F)


@triton.jit
def e4m3_value(code):
    """fp32 of a non-negative e4m3fn code."""
    normal = (((code >> 3) + 120) << 23) | ((code & 7) << 20)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal.to(tl.float32, bitcast=True))


@triton.jit
def e4m3_number(code):
    """fp32 of any e4m3fn code."""
    magnitude = code & 0x7F
    bits = tl.where(magnitude == 0x7F, 0x7FF00000, e4m3_value(magnitude).to(tl.int32, bitcast=True))
    return (bits | (code & 0x80) << 24).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_bits(x, TIES_TO_ZERO: tl.constexpr = False, UNSIGNED_ZERO: tl.constexpr = False):
    """e2m1 of fp32 as int32, saturating at 6: ties to even with the sign of zero kept, or toward zero without it.

    NaN becomes 7 (6.0), as hardware has it: the encoding has no NaN.
    """
    mag = tl.abs(x)
    code = (mag > 0.25).to(tl.int32) + (mag > 1.25).to(tl.int32) + (mag > 2.5).to(tl.int32) + (mag > 5.0).to(tl.int32)
    # The other three thresholds lie between an odd code and the even one above it.
    if TIES_TO_ZERO:
        code += (mag > 0.75).to(tl.int32) + (mag > 1.75).to(tl.int32) + (mag > 3.5).to(tl.int32)
    else:
        code += (mag >= 0.75).to(tl.int32) + (mag >= 1.75).to(tl.int32) + (mag >= 3.5).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    if TIES_TO_ZERO or UNSIGNED_ZERO:
        sign = tl.where(code > 0, sign, 0)
    return tl.where(x == x, code | sign, 7)


@triton.jit
def e2m1_value(code):
    """fp32 of a code 0..15."""
    mag = code & 7
    bits = tl.where(mag > 1, ((mag >> 1) + 126) << 23 | (mag & 1) << 22, mag * 0x3F000000)
    return (bits | (code & 8) << 28).to(tl.float32, bitcast=True)


@triton.jit
def magnitudes(v):
    """Magnitudes, whose largest sets the scale; 0 for a NaN, which must not set that of its neighbours."""
    return tl.where(v == v, tl.abs(v), 0.0)


@triton.jit
def through_fp4(v, KIND: tl.constexpr, LENGTH: tl.constexpr):
    """Values after a way through fp4 (`RecordFormat.fp4_first`): codes times scales, and NaN where they were."""
    GROUP: tl.constexpr = 16 if KIND == "nvfp4" else 32
    grouped = tl.reshape(v, (LENGTH // GROUP, GROUP))
    amax = tl.max(magnitudes(grouped), axis=1)
    if KIND == "nvfp4":
        scale = e4m3_value(e4m3_bits(tl.maximum(tl.div_rn(amax, 6.0), 0.001953125)))
        quotient = tl.div_rn(grouped, scale[:, None])
    else:
        code = power_of_two(tl.maximum(amax, 7.052966104933725e-38), 6.0, False)  # 6 * 2**-126
        scale = (code << 23).to(tl.float32, bitcast=True)
        quotient = grouped * ((254 - code) << 23).to(tl.float32, bitcast=True)[:, None]
    quotient = tl.where(quotient == 0.0, 0.0, quotient)  # of either sign
    faked = e2m1_value(e2m1_bits(quotient)) * scale[:, None]
    return tl.reshape(tl.where(grouped == grouped, faked, grouped), (LENGTH,))


@triton.jit
def power_of_two(amax, MAX: tl.constexpr, NEAREST: tl.constexpr):
    """The ue8m0 code of a scale: the smallest that takes amax to MAX or below, or the nearest one (to 6) by its logarithm.

    Exact, and without a division. MAX is 1.75 * 2**8 or 1.5 * 2**2, so the exponent goes up by one where the mantissa of amax
    is above that of MAX; and for the nearest from the mantissa of 6 / sqrt(2) on.
    """
    bits = amax.to(tl.int32, bitcast=True)
    if NEAREST:
        code = ((bits + (0x800000 - 0x7C3B7)) >> 23) - 3
    elif MAX == 448.0:
        code = ((bits + 0x1FFFFF) >> 23) - 8
    else:
        code = ((bits + 0x3FFFFF) >> 23) - 2
    return tl.where(bits == 0x7F800000, 254, code)  # an infinity: the inverse of this scale is 0


@triton.jit
def group_scale(amax, cache_scale, MAX: tl.constexpr, FMT: tl.constexpr):
    """The stored scale of each group (int32: its byte, or its bits as fp32), and the factor or divisor of its values."""
    if FMT.FLOOR_ON_SCALE == 0:
        amax = tl.maximum(amax, FMT.FLOOR)
    if FMT.SCALE == "e4m3":
        if FMT.FLOOR_ON_SCALE:
            stored = e4m3_bits(tl.maximum(tl.div_rn(amax, MAX), FMT.FLOOR))
            factor = e4m3_value(stored)
        elif FMT.ZERO_SMALL:
            stored = e4m3_bits(tl.div_rn(amax, MAX))
            factor = tl.where(stored > 0, tl.div_rn(1.0, e4m3_value(tl.maximum(stored, 1))), 0.0)
        else:
            stored = e4m3_bits(tl.div_rn(amax * cache_scale, MAX))
            factor = tl.div_rn(cache_scale, tl.maximum(e4m3_value(stored), 1e-12))
    elif FMT.SCALE == "fp32":
        scale = tl.div_rn(amax, MAX)
        if FMT.FLOOR_ON_SCALE:
            scale = tl.maximum(scale, FMT.FLOOR)
        stored = scale.to(tl.int32, bitcast=True)
        # TensorRT-LLM, which has no floor, multiplies by 448 / amax; SGLang by 1 / scale.
        if FMT.FLOOR == 0.0:
            factor = tl.where(amax > 0.0, tl.div_rn(MAX, tl.where(amax > 0.0, amax, 1.0)), 1.0)
        else:
            factor = tl.div_rn(1.0, scale)
    else:
        if FMT.FLOOR_ON_SCALE:
            amax = tl.maximum(amax, FMT.FLOOR * MAX)
        code = power_of_two(amax, MAX, FMT.NEAREST_SCALE)
        factor = ((254 - code) << 23).to(tl.float32, bitcast=True)
        if FMT.SCALE == "pow2":
            stored = code << 23
        elif FMT.SCALE == "ue8m0x4":
            stored = code | code << 8 | code << 16 | code << 24
        else:
            stored = code
    return stored, factor


@triton.jit
def load_scale(cache):
    """The scale of the whole cache; None for formats that have none. Loads past the L1 cache, as `pdl.load_plan`."""
    scale = None
    if cache.scale is not None:
        scale = tl.load(cache.scale.to(tl.pointer_type(tl.float32)), cache_modifier=".cg")
    return scale


@triton.jit
def tail_address(record, page, number, row, cache, FMT: tl.constexpr):
    """Where the scales of a record are: after its values, in a buffer of their own, or after all records of its page."""
    if FMT.INTERLEAVED:
        tail = record + FMT.VALUES_BYTES
    elif cache.scales is not None:
        tail = cache.scales + number * cache.scales_stride + row * FMT.TAIL_BYTES
    else:
        tail = page + cache.rows_per_page * FMT.ROW_BYTES + row * FMT.TAIL_BYTES
    return tail


@triton.jit
def scale_groups(v, tail, scale, wanted, SPEC: tl.constexpr, FMT: tl.constexpr, MAX: tl.constexpr, COUNT: tl.constexpr):
    """Stores the scale of each group to `tail`, and pad bytes. Returns the values as they are encoded, divided by their scales.

    scale, wanted, COUNT: as of `store_record`. PAD is how many pad bytes to zero.
    """
    QUANTIZED: tl.constexpr = SPEC.HEAD_DIM - (SPEC.ROPE_DIM if FMT.ROTATED_BF16 else 0)
    WORDS: tl.constexpr = FMT.SCALE == "fp32" or FMT.SCALE == "pow2" or FMT.SCALE == "ue8m0x4"
    tail_scales = tail.to(tl.pointer_type(tl.int32)) if WORDS else tail
    magnitude = magnitudes(v)
    if FMT.GROUP == COUNT * SPEC.HEAD_DIM:
        # One group for the whole entry: its scale is a scalar.
        stored, factor = group_scale(tl.max(magnitude, axis=0), scale, MAX, FMT)
        tl.store(tail_scales, stored.to(tail_scales.dtype.element_ty))
        v = tl.div_rn(v, factor) if FMT.DIVIDE else v * factor
    else:
        GROUPS: tl.constexpr = SPEC.HEAD_DIM // FMT.GROUP
        amax = tl.max(tl.reshape(magnitude, (COUNT * GROUPS, FMT.GROUP)), axis=1)
        stored, factor = group_scale(amax, scale, MAX, FMT)
        codes = abreast(stored.to(tail_scales.dtype.element_ty), GROUPS, COUNT)
        # One scale of an entry is spread over 16 threads, of which one stores it: else it goes through shared memory.
        SAME: tl.constexpr = 16 if COUNT > 1 and GROUPS == 1 else GROUPS
        group = span(SAME, COUNT)
        live = wherever(group < QUANTIZED // FMT.GROUP, wanted, COUNT)
        if SAME > GROUPS:
            codes = tl.broadcast_to(codes, (COUNT, SAME))
        tl.store(tail_scales + group, codes, mask=live)
        grouped = tl.reshape(v, (COUNT * GROUPS, FMT.GROUP))
        grouped = tl.div_rn(grouped, factor[:, None]) if FMT.DIVIDE else grouped * factor[:, None]
        v = tl.reshape(grouped, (COUNT * SPEC.HEAD_DIM,))
    if FMT.PAD > 0:
        pad = tail + (FMT.TAIL_BYTES - FMT.PAD) + span(FMT.PAD, COUNT)
        tl.store(pad, abreast(tl.zeros((COUNT * FMT.PAD,), tl.uint8), FMT.PAD, COUNT), mask=wanted)
    return v


@triton.jit
def store_codes(v, record, wanted, SPEC: tl.constexpr, FMT: tl.constexpr, TARGET: tl.constexpr, COUNT: tl.constexpr):
    """Encodes scaled values in e4m3 or e2m1, and stores those that are not kept as bf16."""
    QUANTIZED: tl.constexpr = SPEC.HEAD_DIM - (SPEC.ROPE_DIM if FMT.ROTATED_BF16 else 0)
    if FMT.ELEMENT == "e4m3":
        if TARGET.E4M3_CONVERSION:
            # One instruction for two channels where e4m3_bits takes fifteen for one; the same bytes, NaN and all.
            code = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = e4m3_bits(v).to(tl.uint8)
        c = span(SPEC.HEAD_DIM, COUNT)
        tl.store(record + c, abreast(code, SPEC.HEAD_DIM, COUNT), mask=wherever(c < QUANTIZED, wanted, COUNT))
    else:
        code = e2m1_bits(v, FMT.TIES_TO_ZERO, FMT.UNSIGNED_ZERO)
        low, high = tl.split(tl.reshape(code, (COUNT * SPEC.HEAD_DIM // 2, 2)))
        pairs = abreast((low | (high << 4)).to(tl.uint8), SPEC.HEAD_DIM // 2, COUNT)
        pair = span(SPEC.HEAD_DIM // 2, COUNT)
        tl.store(record + pair, pairs, mask=wherever(pair < QUANTIZED // 2, wanted, COUNT) if FMT.ROTATED_BF16 else wanted)


@triton.jit
def store_record(
    y, slot, scale, cache, SPEC: tl.constexpr, FMT: tl.constexpr, TARGET: tl.constexpr, COUNT: tl.constexpr = 1,
    wanted=None,
):  # fmt: skip
    """Writes one record and its tail. With COUNT above 1, those that are `wanted`, whose rows are side by side in `y`.

    scale: what `load_scale` gave. `cache.scales` is None where tails are in the page.
    """
    c = span(SPEC.HEAD_DIM, COUNT)
    # In 32 bits, which all slots of a cache fit: a division of 64 is 100 instructions and a branch.
    index = slot.to(tl.uint32)
    number = (index // cache.rows_per_page.to(tl.uint32)).to(tl.int64)
    row = slot - number * cache.rows_per_page
    page = cache.pages + number * cache.page_stride
    record = page + row * FMT.ROW_BYTES
    if FMT.ELEMENT == "fp32":
        tl.store(record.to(tl.pointer_type(tl.float32)) + c, abreast(y, SPEC.HEAD_DIM, COUNT), mask=wanted)
    elif FMT.ELEMENT == "bf16":
        bits = abreast(bf16_bits(y, TARGET.BF16_CONVERSION), SPEC.HEAD_DIM, COUNT)
        tl.store(record.to(tl.pointer_type(tl.int16)) + c, bits, mask=wanted)
    else:
        rounded = bf16_bits(y, TARGET.BF16_CONVERSION)
        v = bf16_value(rounded) if FMT.ROUND_VALUES else y
        if FMT.FP4_FIRST != "":
            v = through_fp4(v, FMT.FP4_FIRST, COUNT * SPEC.HEAD_DIM)
            rounded = bf16_bits(v, TARGET.BF16_CONVERSION)
        if FMT.SCALE == "static":
            v = v * tl.div_rn(1.0, scale)
        else:
            MAX: tl.constexpr = 448.0 if FMT.ELEMENT == "e4m3" else 6.0
            tail = tail_address(record, page, number, row, cache, FMT)
            v = scale_groups(v, tail, scale, wanted, SPEC, FMT, MAX, COUNT)
        store_codes(v, record, wanted, SPEC, FMT, TARGET, COUNT)
        if FMT.ROTATED_BF16:
            QUANTIZED: tl.constexpr = SPEC.HEAD_DIM - SPEC.ROPE_DIM
            rotated = (record + FMT.ROTATED_AT).to(tl.pointer_type(tl.int16))
            there = wherever(c >= QUANTIZED, wanted, COUNT)
            tl.store(rotated + (c - QUANTIZED), abreast(rounded, SPEC.HEAD_DIM, COUNT), mask=there)
