"""From a pooled row in registers to a finished entry: RMSNorm, RoPE, Hadamard; and its delivery.

COUNT consecutive entries of one sequence can be finished side by side; vectors.py says how.
"""

import triton
import triton.language as tl

from .record import bf16_bits, bf16_value, load_scale, store_record
from .vectors import abreast, channels, flat, numbers, span


@triton.jit
def tree_sum(x, LENGTH: tl.constexpr, LOG2: tl.constexpr, COUNT: tl.constexpr):
    """Sum of `[LENGTH]`, for COUNT of them, by pairing neighbours LOG2 times: the same bits for every number of warps."""
    for i in tl.static_range(LOG2):
        x = tl.sum(tl.reshape(x, ((COUNT * LENGTH) >> (i + 1), 2)), axis=1)
    return tl.sum(x, axis=0) if COUNT == 1 else tl.reshape(x, (COUNT, 1))


@triton.jit
def rms_norm(y, weight, SPEC: tl.constexpr, COUNT: tl.constexpr):
    mean = tree_sum(y * y, SPEC.HEAD_DIM, SPEC.LOG2, COUNT) * (1.0 / SPEC.HEAD_DIM)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + SPEC.EPS))
    return y * flat(inverse, SPEC.HEAD_DIM, COUNT) * weight


@triton.jit
def load_rotation(cache, position, SPEC: tl.constexpr, COUNT: tl.constexpr):
    """Cosine and sine of each channel pair; 1 and 0 for pairs that are not rotated, and beyond the end of the table."""
    pair = span(SPEC.HEAD_DIM // 2, COUNT) - (SPEC.HEAD_DIM - SPEC.ROPE_DIM) // 2
    rotated = pair >= tl.where(position < cache.max_position, 0, SPEC.HEAD_DIM)
    row = cache.rope + position.to(tl.int64) * SPEC.ROPE_DIM + pair
    cos = tl.load(row, mask=rotated, other=1.0)
    sin = tl.load(row + SPEC.ROPE_DIM // 2, mask=rotated, other=0.0)
    return flat(cos, SPEC.HEAD_DIM // 2, COUNT), flat(sin, SPEC.HEAD_DIM // 2, COUNT)


@triton.jit
def rotate(y, cos, sin, SPEC: tl.constexpr, COUNT: tl.constexpr):
    """RoPE on the last ROPE_DIM channels, in interleaved pairs; the others pass untouched, whatever they hold."""
    even, odd = tl.split(tl.reshape(y, (COUNT * SPEC.HEAD_DIM // 2, 2)))
    rotated = channels(SPEC.HEAD_DIM // 2, COUNT) >= (SPEC.HEAD_DIM - SPEC.ROPE_DIM) // 2
    new_even = tl.where(rotated, even * cos - odd * sin, even)
    new_odd = tl.where(rotated, odd * cos + even * sin, odd)
    return tl.reshape(tl.join(new_even, new_odd), (COUNT * SPEC.HEAD_DIM,))


@triton.jit
def hadamard(y, SPEC: tl.constexpr, COUNT: tl.constexpr):
    """Sylvester order, all channels, divided by sqrt(HEAD_DIM) at the end."""
    # The other of two elements is the exclusive or of both, without this one: a reduction, which is one shuffle inside a warp.
    # Moving channels so that each pair is in one thread would go through shared memory LOG2 times.
    sign = tl.where(tl.arange(0, 2)[None, :, None] == 1, -1.0, 1.0)
    for i in tl.static_range(SPEC.LOG2):
        own = tl.reshape(y, ((COUNT * SPEC.HEAD_DIM) >> (i + 1), 2, 1 << i))
        bits = own.to(tl.int32, bitcast=True)
        other = (tl.xor_sum(bits, axis=1, keep_dims=True) ^ bits).to(tl.float32, bitcast=True)
        y = tl.reshape(tl.fma(own, tl.broadcast_to(sign, own.shape), other), (COUNT * SPEC.HEAD_DIM,))
    return y * (SPEC.HEAD_DIM**-0.5)


@triton.jit
def entry_address(entry, position, plan, cache, SPEC: tl.constexpr):
    """The cache slot of entry `entry` (-1: none), norm weight, cosines and sines: all that may be read before the wait.

    The slot is checked after the wait (`slot_valid`): looking at it here would stall before the wait.
    """
    weight, cos, sin = load_finish(position, cache, SPEC)
    return entry_slot(entry, plan), weight, cos, sin


@triton.jit
def load_finish(position, cache, SPEC: tl.constexpr, COUNT: tl.constexpr = 1):
    """Norm weight, cosines and sines of an entry; zeros where nobody needs them."""
    c = channels(SPEC.HEAD_DIM, COUNT)
    weight = tl.zeros((COUNT * SPEC.HEAD_DIM,), tl.float32)
    cos = tl.zeros((COUNT * SPEC.HEAD_DIM // 2,), tl.float32)
    sin = tl.zeros((COUNT * SPEC.HEAD_DIM // 2,), tl.float32)
    if cache.norm_weight is not None:
        weight = tl.load(cache.norm_weight + c).to(tl.float32)
    if cache.pages is not None:
        if SPEC.ROPE_DIM > 0:
            cos, sin = load_rotation(cache, position, SPEC, COUNT)
    return weight, cos, sin


@triton.jit
def entry_slot(entry, plan):
    """The cache slot of entry `entry` of the plan; -1 where there is none."""
    inside = (entry >= 0) & (entry < plan.entry_capacity)
    if plan.entry_slots is not None:
        slot = tl.load(plan.entry_slots + entry, mask=inside, other=-1, cache_modifier=".cg")  # as `pdl.load_plan`
    else:
        slot = tl.where(inside, entry, -1).to(tl.int64)
    return slot


@triton.jit
def slot_valid(entry, slot, position, entry_capacity, cache, ROPE_DIM: tl.constexpr):
    """Whether entry `entry` is delivered to cache slot `slot`, and whether it is refused."""
    keep = slot != -1
    wrong = entry >= entry_capacity
    if cache.pages is not None:
        bad = (slot < -1) | (slot >= cache.num_slots)
        if ROPE_DIM > 0:
            bad = bad | (position >= cache.max_position)
        wrong = wrong | (keep & bad)
        keep = keep & (bad == 0)
    return keep, wrong


@triton.jit
def store_row(rows, y, entry, wanted, HEAD_DIM: tl.constexpr, TARGET: tl.constexpr, COUNT: tl.constexpr):
    """Stores row `entry` of `rows`, fp32 or bf16; or COUNT of them."""
    at = rows + entry.to(tl.int64) * HEAD_DIM + span(HEAD_DIM, COUNT)
    if COUNT > 1:
        at += numbers(COUNT) * HEAD_DIM
    if rows.dtype.element_ty == tl.bfloat16:
        bits = abreast(bf16_bits(y, TARGET.BF16_CONVERSION), HEAD_DIM, COUNT)
        tl.store(at.to(tl.pointer_type(tl.int16)), bits, mask=wanted)
    else:
        tl.store(at, abreast(y, HEAD_DIM, COUNT), mask=wanted)


@triton.jit
def emit(
    y, entry, slot, weight, cos, sin, cache, SPEC: tl.constexpr, FMT: tl.constexpr, TARGET: tl.constexpr,
    COUNT: tl.constexpr = 1, wanted=None,
):  # fmt: skip
    """Delivers pooled row `y` as entry `entry` of the plan to all outputs that are given; with COUNT above 1, those that are
    `wanted`.
    """
    if cache.rows is not None:
        store_row(cache.rows, y, entry, wanted, SPEC.HEAD_DIM, TARGET, COUNT)
    if cache.pages is not None:
        scale = load_scale(cache)  # on its way during the norm
    if cache.pages is not None or cache.latent is not None:
        if FMT.ROUND_ROWS:
            y = bf16_value(bf16_bits(y, TARGET.BF16_CONVERSION))
        if cache.norm_weight is not None:
            y = rms_norm(y, weight, SPEC, COUNT)
    if cache.latent is not None:
        store_row(cache.latent, y, entry, wanted, SPEC.HEAD_DIM, TARGET, COUNT)
    if cache.pages is not None:
        if FMT.ROUND_NORMED:
            y = bf16_value(bf16_bits(y, TARGET.BF16_CONVERSION))
        if SPEC.ROPE_DIM > 0:
            y = rotate(y, cos, sin, SPEC, COUNT)
        if SPEC.HADAMARD:
            y = hadamard(y, SPEC, COUNT)
        store_record(y, slot, scale, cache, SPEC, FMT, TARGET, COUNT, wanted)
