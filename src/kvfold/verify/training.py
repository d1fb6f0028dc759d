"""What `kvfold verify` asks of training: the entries that are served, gradients that fp64 gives, and the same bits again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..testing.engine import Engine, prefill
from ..training import Gradients, Packing, compress_backward, compress_forward
from .case import Mismatch

EXACT, ROUNDED = 1e-6, 2e-3  # of fp32, and of gradients in bf16 (tests/training/test_training_gradients.py)


def check_training(engine: Engine) -> str:
    """Forward and backward of the engine's sequences, packed. engine: of a cache in fp32, which gets a prefill of them."""
    engine.run(prefill(engine.lengths))
    tokens, device = torch.cat(engine.tokens), engine.device
    cu_seqlens = torch.tensor([0, *engine.lengths], device=device).cumsum(0)
    packing = Packing.build(cu_seqlens, len(tokens), engine.spec.ratio, max_seqlen=max(engine.lengths))
    given = engine.weights | {"backend": engine.backend, "round_rows": False, "out_dtype": torch.float32}
    forward = compress_forward(tokens, packing, **given)
    served = torch.cat(engine.entries())
    if not torch.equal(forward.entries[: len(served)], served):
        raise Mismatch("training's entries are not those of compress, to the bit")
    draw = torch.Generator().manual_seed(3)
    g = torch.randn(forward.entries.shape, generator=draw, dtype=torch.float32).to(device)
    first, again = (compress_backward(g, tokens, packing, forward.kept, **given) for _ in range(2))
    want = exact_gradients(engine.tokens, engine.weights, g)
    worst = 0.0
    for name, mine, same, right in zip(Gradients._fields, first, again, want, strict=True):
        if mine is None:
            continue
        if not torch.equal(mine, same):
            raise Mismatch(f"the gradient of {name} has other bits the second time")
        error = float((mine.double() - right).norm() / right.norm())
        if error > (ROUNDED if mine.dtype == torch.bfloat16 else EXACT):
            raise Mismatch(f"the gradient of {name} is {error:.1e} from that of fp64")
        worst = max(worst, error)
    return f"{worst:.1e}, bits equal"


def exact_gradients(tokens: Sequence[Tensor], weights: dict, g: Tensor) -> Gradients:
    """Of all sequences by fp64 autograd of the reference; `g` of their entries in order."""
    spec, ape = weights["spec"], weights["ape"]
    rows, weight = torch.cat(list(tokens)).double().requires_grad_(), weights["norm_weight"].double().requires_grad_()
    wide = None if ape is None else ape.double().requires_grad_()
    parts = rows.split([len(some) for some in tokens])
    entries = torch.cat([reference.entries(some, spec, wide, weight, weights["rope"]) for some in parts])
    leaves = [rows, weight] if wide is None else [rows, weight, wide]
    found = torch.autograd.grad(entries, leaves, g[: len(entries)].double())
    return Gradients(found[0], None, None if wide is None else found[2], found[1])
