"""The call as two operators of torch, forward and backward: what torch.compile and `FakeTensor`s see of it.

An operator takes tensors and plain values, and makes the call with all its checks. Nothing is mutated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch._subclasses import FakeTensor

from ..arguments.checks import check_type, makes_fakes
from ..ops import NAMESPACE, spec_of
from ..spec import CompressorSpec
from ..storage.formats import FORMATS, RecordFormat, get_format
from .checks import check_call, check_gradients, check_packing
from .packing import Packing
from .problem import How, Inputs
from .run import backward, forward

OPS = getattr(torch.ops, NAMESPACE)
INPUTS = (
    "Tensor value", "Tensor? score", "Tensor pieces", "Tensor? ape", "Tensor norm_weight", "Tensor? rope",
    "Tensor? cache_scale", "SymInt tokens", "SymInt max_seqlen", "str spec", "bool? round_rows", "ScalarType? out_dtype",
    "str fake_quant", "bool latent", "str? backend",
)  # fmt: skip
_DIFFERENTIABLE = ("value", "score", "ape", "norm_weight")


def compress(
    kv_score: object,
    packing: Packing,
    spec: CompressorSpec,
    weights: tuple[torch.Tensor | None, ...],
    round_rows: bool | None,
    out_dtype: torch.dtype | None,
    fake_quant: str | RecordFormat | None,
    cache_scale: torch.Tensor | None,
    latent: bool,
    backend: str | None,
) -> Sequence[torch.Tensor]:
    """`training.compress` while it is traced: entries and latents. weights: ape, norm_weight, rope."""
    check_packing(packing, spec)
    value, score = kv_score if isinstance(kv_score, tuple) and len(kv_score) == 2 else (kv_score, None)
    check_type("kv_score", value, torch.Tensor)
    name = ""
    if fake_quant is not None:
        fmt = get_format(fake_quant, "fake_quant")
        name = fmt.name
        if FORMATS.get(name) != fmt:
            raise ValueError(f"fake_quant must be a format of kvfold.storage.formats.FORMATS when it is traced, got {name!r}")
    places = packing.tokens, packing.max_seqlen
    tensors = value, score, packing.pieces, *weights, cache_scale
    _check_fakes(tensors)
    return OPS.train_compress(*tensors, *places, spec._text, round_rows, out_dtype, name, latent, backend)[:2]


def _check_fakes(tensors: tuple[torch.Tensor | None, ...]) -> None:
    """Outside of their mode, where torch would turn real tensors into such, fake ones stand beside fake ones only."""
    if torch.compiler.is_compiling() or makes_fakes():
        return
    names = "kv_score", "kv_score[1]", "packing", "ape", "norm_weight", "rope", "cache_scale"
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and not isinstance(tensor, FakeTensor):
            raise TypeError(f"{name} must be a FakeTensor like kv_score, got a {type(tensor).__name__}")


def _call_of(
    value, score, pieces, ape, norm_weight, rope, cache_scale, tokens, max_seqlen, spec, round_rows, out_dtype, fake_quant,
    latent, backend,
) -> tuple[Inputs, How]:  # fmt: skip
    """The call that these arguments describe, checked."""
    spec = spec_of(spec)
    return check_call(
        value if score is None else (value, score),
        Packing(tokens, spec.ratio, max_seqlen, pieces[:0, 0], pieces),
        spec=spec,
        ape=ape,
        norm_weight=norm_weight,
        rope=rope,
        round_rows=round_rows,
        out_dtype=out_dtype,
        fake_quant=fake_quant or None,
        cache_scale=cache_scale,
        latent=latent,
        backend=backend,
    )


def _forward(*args: object) -> tuple[torch.Tensor, ...]:
    return tuple(forward(*_call_of(*args)))


def _backward(d_entries: torch.Tensor, d_latent: torch.Tensor, kept: torch.Tensor, *args: object) -> tuple[torch.Tensor, ...]:
    x, how = _call_of(*args)
    gradients = check_gradients(x, how, kept, d_entries, d_latent if how.latent else None)
    nothing = [kept.new_empty(0), kept.new_empty(0)]  # two: outputs of an operator share no memory
    found = backward(x, how, kept, *gradients)
    return tuple(nothing.pop() if gradient is None else gradient for gradient in found)


def _named(args: Sequence[object]) -> dict[str, object]:
    return dict(zip((text.split()[-1] for text in INPUTS), args, strict=True))


def _fake_how(named: dict) -> How:
    """What the shapes and dtypes of results follow from."""
    out_dtype, fmt = named["out_dtype"] or named["value"].dtype, FORMATS.get(named["fake_quant"])
    return How(spec_of(named["spec"]), False, out_dtype, fmt, named["latent"], "")


def _fake_forward(*args: object) -> tuple[torch.Tensor, ...]:
    named = _named(args)
    how, value = _fake_how(named), named["value"]
    x = Inputs(value, *[None] * 6)
    entries = value.new_empty((how.capacity(x), how.spec.head_dim), dtype=how.out_dtype)
    latent = value.new_empty(how.latent_shape(x), dtype=how.out_dtype)
    return entries, latent, value.new_empty(how.kept_shape(x), dtype=x.wide)


def _fake_backward(d_entries: torch.Tensor, d_latent: torch.Tensor, kept: torch.Tensor, *args: object) -> tuple:
    named = _named(args)
    value, score, spec = named["value"], named["score"], spec_of(named["spec"])

    def gradient(x: torch.Tensor | None) -> torch.Tensor:
        return kept.new_empty(0) if x is None else value.new_empty(x.shape)

    ape = kept.new_empty(spec.ratio, spec.channels) if spec.has_ape else kept.new_empty(0)
    return gradient(value), gradient(score), ape, kept.new_empty(spec.head_dim)


def _setup(ctx, inputs: tuple, output: tuple[torch.Tensor, ...]) -> None:
    ctx.tensors = [isinstance(x, torch.Tensor) for x in inputs]
    ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.save_for_backward(output[2], *(x for x in inputs if isinstance(x, torch.Tensor)))


def _differentiate(ctx, d_entries: torch.Tensor, d_latent: torch.Tensor, _d_kept: torch.Tensor) -> tuple:
    kept, *saved = ctx.saved_tensors
    args = [saved.pop(0) if is_tensor else x for is_tensor, x in zip(ctx.tensors, ctx.rest, strict=True)]
    named = _named(args)
    named["cache_scale"] = None  # of the forward alone
    found = OPS.train_compress_backward(d_entries, d_latent, kept, *named.values())
    of = dict(zip(_DIFFERENTIABLE, found, strict=True))
    of["norm_weight"] = of["norm_weight"].to(named["norm_weight"].dtype)
    return tuple(of.get(name) if is_tensor else None for name, is_tensor in zip(named, ctx.tensors, strict=True))


def _refuse(ctx, *gradients: torch.Tensor) -> tuple:
    """Without this, gradients of gradients would silently leave out what goes through this call."""
    raise RuntimeError("trying to differentiate kvfold.training.compress twice: it is differentiable once")


def _define(name: str, arguments: tuple[str, ...], results: int, run: Callable, fake: Callable) -> str:
    name = f"{NAMESPACE}::{name}"
    schema = f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * results)})"
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,), lib=_LIBRARY)
    torch.library.impl(name, "CompositeExplicitAutograd", run, lib=_LIBRARY)
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    return name


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_NAME = _define("train_compress", INPUTS, 3, _forward, _fake_forward)
_NAME_OF_BACKWARD = _define(
    "train_compress_backward", ("Tensor d_entries", "Tensor d_latent", "Tensor kept", *INPUTS), 4, _backward, _fake_backward
)
torch.library.register_autograd(_NAME, _differentiate, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd(_NAME_OF_BACKWARD, _refuse, lib=_LIBRARY)
