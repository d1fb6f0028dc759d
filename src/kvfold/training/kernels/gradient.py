"""The way back from the gradient of an entry to that of its pooled row."""

import triton
import triton.language as tl

from ...backend_triton.kernels.finish import hadamard, rotate
from ...backend_triton.kernels.record import bf16_bits, bf16_value


@triton.jit
def load_incoming(incoming, n, SPEC: tl.constexpr):
    """Gradients of entry n and of its latent, fp32; zeros for a latent that was not asked for."""
    at = n.to(tl.int64) * SPEC.HEAD_DIM + tl.arange(0, SPEC.HEAD_DIM)
    g = tl.load(incoming.entries + at, cache_modifier=".cg").to(tl.float32)
    g_latent = tl.zeros((SPEC.HEAD_DIM,), tl.float32)
    if incoming.latent is not None:
        g_latent = tl.load(incoming.latent + at, cache_modifier=".cg").to(tl.float32)
    return g, g_latent


@triton.jit
def tree_sums(a, b, LENGTH: tl.constexpr, LOG2: tl.constexpr):
    """`tree_sum` of both, in as many steps as for one: each step waits for all warps."""
    x = tl.join(a, b)
    for i in tl.static_range(LOG2):
        x = tl.sum(tl.reshape(x, (LENGTH >> (i + 1), 2, 2)), axis=1)
    of_a, of_b = tl.split(x)
    return tl.sum(of_a, axis=0), tl.sum(of_b, axis=0)


@triton.jit
def pull_back(g, g_latent, y, finish, SPEC: tl.constexpr, FMT: tl.constexpr, TARGET: tl.constexpr):
    """The gradient of pooled row `y`, and the entry's share of norm_weight's. Roundings pass gradients as they are.

    finish: what `load_finish` gave.
    """
    weight, cos, sin = finish
    if SPEC.HADAMARD:  # its own transpose
        g = hadamard(g, SPEC, 1)
    if SPEC.ROPE_DIM > 0:  # turned the other way
        g = rotate(g, cos, -sin, SPEC, 1)
    g += g_latent
    if FMT.ROUND_ROWS:
        y = bf16_value(bf16_bits(y, TARGET.BF16_CONVERSION))
    weighted = g * weight
    squares, products = tree_sums(y * y, weighted * y, SPEC.HEAD_DIM, SPEC.LOG2)
    scale = tl.div_rn(1.0, tl.sqrt_rn(squares * (1.0 / SPEC.HEAD_DIM) + SPEC.EPS))
    normed = y * scale
    dot = products * scale * (1.0 / SPEC.HEAD_DIM)
    return (weighted - normed * dot) * scale, g * normed
