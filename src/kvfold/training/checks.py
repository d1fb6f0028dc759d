"""What a training call may be given: every failure names the argument and comes before anything is computed."""

from __future__ import annotations

import torch

from ..arguments.checks import (
    check_device,
    check_dtype,
    check_eager,
    check_memory,
    check_shape,
    check_tensor,
    check_type,
)
from ..calls.checks import choose_backend
from ..contract import INT32_MAX
from ..spec import CompressorSpec, check_spec
from ..storage.formats import RecordFormat, get_format
from ..storage.remembered import Layer, where
from .packing import Packing
from .problem import How, Inputs, rounds_rows

_FLOATS = (torch.bfloat16, torch.float32)
_EXACT = (*_FLOATS, torch.float64)
MOST_LAYERS = 1024  # whose arguments are remembered


def check_call(
    kv_score: object,
    packing: Packing,
    *,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    round_rows: bool | None,
    out_dtype: torch.dtype | None,
    fake_quant: str | RecordFormat | None,
    cache_scale: torch.Tensor | None,
    latent: bool,
    backend: str | None,
) -> tuple[Inputs, How]:
    """Checks the arguments of the forward; returns what they mean.

    What a layer passes in every step is checked once, and again when something about it has changed.
    """
    check_packing(packing, spec)
    value, score = check_tokens(kv_score, spec, backend)
    if packing.tokens != value.shape[0]:
        raise ValueError(f"packing must be for the {value.shape[0]} rows of kv_score, got {packing.tokens}")
    x = Inputs(value, score, packing.pieces, ape, norm_weight, rope if spec.rope_dim else None, cache_scale)
    check_eager("kv_score")
    # Not their equals: 1 is no bool.
    asked = _Asked(spec, value.dtype, value.device, score is None, round_rows, out_dtype, fake_quant, latent, backend)
    weights = x.ape, norm_weight, x.rope, cache_scale
    known = _layers.get(id(norm_weight))
    if known is None or not known[0].same(asked, weights) or _asks(x.rope) or _asks(cache_scale):
        how = check_rest(x, spec, round_rows, out_dtype, fake_quant, latent, backend)
        if len(_layers) >= MOST_LAYERS:
            _layers.clear()
        known = _layers[id(norm_weight)] = Layer(asked, weights, ()), how
    _check_pieces(packing, value, spec)
    most = min(packing.max_seqlen, packing.tokens) // spec.ratio * spec.ratio - spec.ratio
    if spec.rope_dim and x.rope.shape[0] <= most:
        raise ValueError(
            f"rope must have {most + 1} rows, as a sequence may have {packing.max_seqlen} tokens, got {x.rope.shape[0]}; "
            "Packing.build takes max_seqlen"
        )
    return x, known[1]


def _asks(tensor: object) -> bool:
    """Whether it is a tensor that requires a gradient."""
    return isinstance(tensor, torch.Tensor) and tensor.requires_grad


class _Asked(tuple):
    """What a call is given besides its tensors; equal only if each part is the same object, or the same device."""

    __slots__ = ()
    __hash__ = None

    def __new__(cls, *parts: object) -> _Asked:
        return tuple.__new__(cls, parts)

    def __eq__(self, other: object) -> bool:
        for a, b in zip(self, other):  # noqa: B905, SIM110 (every call comes here)
            if a is not b and not (a.__class__ is torch.device and a == b):
                return False
        return True


_layers: dict[int, tuple[Layer, How]] = {}  # by the id of their norm_weight


def _check_pieces(packing: Packing, value: torch.Tensor, spec: CompressorSpec) -> None:
    pieces, entries = packing.pieces, value.shape[0] // spec.ratio
    seen = packing.__dict__.get("_seen")
    if seen is not None and seen[0] is pieces and seen[1:] == (where([pieces]), value.device, entries):
        return
    check_tensor("packing.pieces", pieces, (None, 4), (torch.int32,), value.device)
    if pieces.shape[0] < entries:
        raise ValueError(f"packing must have a piece for each of {entries} entries, got {pieces.shape[0]}")
    packing.__dict__["_seen"] = pieces, where([pieces]), value.device, entries


def check_packing(packing: Packing, spec: CompressorSpec) -> None:
    """Checks both, and that the packing is for this ratio; also called before an operator gets only parts of them."""
    check_spec("spec", spec)
    check_type("packing", packing, Packing)
    if "pieces" not in packing.__dict__:
        raise ValueError("packing must be made by Packing.build, got one without pieces")
    if packing.ratio != spec.ratio:
        raise ValueError(f"packing must be for spec.ratio={spec.ratio}, got {packing.ratio}")


def check_tokens(kv_score: object, spec: CompressorSpec, backend: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and scores, from one tensor or two."""
    if not isinstance(kv_score, tuple):
        _check_part("kv_score", kv_score, (None, spec.kv_score_width), backend)
        return kv_score, None
    if len(kv_score) != 2:
        raise ValueError(f"kv_score must be a tensor or two, (K, S), got {len(kv_score)}")
    if not spec.gate:
        raise ValueError("kv_score must be values alone, as spec has no gate, got two tensors")
    value, score = kv_score
    _check_part("kv_score[0]", value, (None, spec.channels), backend)
    _check_part("kv_score[1]", score, (value.shape[0], spec.channels), backend)
    check_device("kv_score[1]", score, value.device)
    check_dtype("kv_score[1]", score, (value.dtype,))
    if (score.data_ptr() - value.data_ptr()) % value.element_size():
        raise ValueError("kv_score[1] must begin at a multiple of its element size, like kv_score[0]")
    return value, score


def _check_part(name: str, part: torch.Tensor, shape: tuple[int | None, ...], backend: str | None) -> None:
    check_memory(name, part)
    check_dtype(name, part, _FLOATS if _on_kernels(backend, part) else _EXACT)
    check_shape(name, part, shape)
    rows = part.shape[0]
    if rows and part.stride(1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tuple(part.stride())}")
    if rows > INT32_MAX:
        raise ValueError(f"{name} must have at most {INT32_MAX} rows, got {rows}")


def _on_kernels(backend: str | None, tensor: torch.Tensor) -> bool:
    return tensor.is_cuda if backend is None else isinstance(backend, str) and backend == "triton"


def check_rest(
    x: Inputs,
    spec: CompressorSpec,
    round_rows: bool | None,
    out_dtype: torch.dtype | None,
    fake_quant: str | RecordFormat | None,
    latent: bool,
    backend: str | None,
) -> How:
    """Checks all but the tokens; also what an operator is given."""
    value, exact = x.value, x.value.dtype == torch.float64
    chosen = choose_backend(backend, "kv_score", value)
    own = (torch.float64,) if exact else (torch.float32,)
    if (x.ape is None) == spec.has_ape:
        raise TypeError(f"ape must be given exactly when spec.has_ape, which is {spec.has_ape}")
    if x.ape is not None:
        check_tensor("ape", x.ape, (spec.ratio, spec.channels), own, value.device)
    check_tensor("norm_weight", x.norm_weight, (spec.head_dim,), own if exact else (*own, torch.bfloat16), value.device)
    if spec.rope_dim:
        check_tensor("rope", x.rope, (None, spec.rope_dim), (torch.float32,), value.device)
        if _asks(x.rope):
            raise ValueError("rope must not require a gradient: there is none")
    for name, switch in (("round_rows", round_rows), ("latent", latent)):
        if not isinstance(switch, bool) and (switch is not None or name == "latent"):
            raise TypeError(f"{name} must be a bool, got {type(switch).__name__}")
    if out_dtype is None:
        out_dtype = value.dtype
    accepted = (torch.float64,) if exact else _FLOATS
    if not isinstance(out_dtype, torch.dtype) or out_dtype not in accepted:
        raise TypeError(f"out_dtype must be one of {accepted} for kv_score of {value.dtype}, got {out_dtype}")
    fmt = None if fake_quant is None else get_format(fake_quant, "fake_quant")
    if fmt is not None:
        if exact:
            raise ValueError("fake_quant must be None for kv_score of torch.float64, which no record is made of")
        fmt.check(spec)
    _check_scale(x.scale, fmt, value.device)
    return How(spec, rounds_rows(round_rows, fmt, value.dtype), out_dtype, fmt, latent, chosen)


def _check_scale(scale: torch.Tensor | None, fmt: RecordFormat | None, device: torch.device) -> None:
    if scale is None:
        return
    if fmt is None or not fmt.takes_scale:
        what = "without fake_quant" if fmt is None else f"as format {fmt.name!r} takes none"
        raise ValueError(f"cache_scale must be None {what}, got a {type(scale).__name__}")
    check_tensor("cache_scale", scale, (1,), (torch.float32,), device)
    if _asks(scale):
        raise ValueError("cache_scale must not require a gradient: there is none")


def check_gradients(
    x: Inputs, how: How, kept: torch.Tensor, d_entries: torch.Tensor, d_latent: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Checks what a backward is given besides the inputs; returns the gradients as the backends take them."""
    check_tensor("kept", kept, how.kept_shape(x), (x.wide,), x.value.device)
    d_entries = _check_gradient("d_entries", d_entries, x, how)
    if not how.latent:
        if d_latent is not None:
            raise ValueError("d_latent must be None without latent=True")
        return d_entries, None
    return d_entries, _check_gradient("d_latent", d_latent, x, how)


def _check_gradient(name: str, gradient: torch.Tensor, x: Inputs, how: How) -> torch.Tensor:
    """Checked first and then made contiguous, as a copy of a wrong shape could have any size."""
    check_memory(name, gradient)
    check_dtype(name, gradient, (how.out_dtype,))
    check_shape(name, gradient, (how.capacity(x), how.spec.head_dim))
    check_device(name, gradient, x.value.device)
    return gradient.contiguous()
