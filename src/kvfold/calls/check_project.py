"""What `project_compress` and `project_compress_many` may be given, besides what `compress` may (checks.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch

from ..arguments.checks import (
    check_device,
    check_dtype,
    check_memory,
    check_real_memory,
    check_shape,
    check_switch,
    check_tensor,
    check_type,
)
from ..arguments.overlap import Place, check_apart, extent
from ..contract import SCALE_BLOCK, check_hidden_dim
from ..spec import CompressorSpec, check_spec
from ..storage.fold_state import FoldState
from ..storage.step import Compressor, Outputs, PlanData, Projection, owner_of
from ..storage.weights import ScaledWeight, Weight, blocks_of, tensors_of
from .checks import check_room, check_tokens, choose_backend

_BF16, _CODES, _FP32 = (torch.bfloat16,), (torch.float8_e4m3fn,), (torch.float32,)
_WEIGHT = "a torch.Tensor or a kvfold.ScaledWeight"


def projection_of(
    hidden: torch.Tensor, weight: object, specs: Sequence[CompressorSpec], round_kv_score: bool, many: bool = False
) -> Projection:
    """What a call is given as `hidden` and `weight`. many: of `project_compress_many`, where that may be a sequence."""
    check_type("hidden", hidden, torch.Tensor)
    check_switch("round_kv_score", round_kv_score)
    if round_kv_score is None:
        raise TypeError("round_kv_score must be a bool, got NoneType")
    for i, spec in enumerate(specs):
        check_spec(f"compressors[{i}]: spec" if many else "spec", spec)
    check_memory("hidden", hidden, fake=True)
    check_shape("hidden", hidden, (None, None))
    if isinstance(weight, (torch.Tensor, ScaledWeight)):
        widths = [spec.kv_score_width for spec in specs]
        for (name, x), shape in zip(tensors_of("weight", weight), _shapes(sum(widths), hidden.shape[1]), strict=False):
            check_memory(name, x, fake=True)
            check_shape(name, x, shape)
        if isinstance(weight, ScaledWeight) and any(width % SCALE_BLOCK for width in widths[:-1]):
            raise ValueError(
                f"weight must have a multiple of {SCALE_BLOCK} rows for each compressor but the last where all have one "
                f"kvfold.ScaledWeight, as blocks begin at a compressor's first row, got {widths}; pass a sequence of weights"
            )
        return Projection(hidden, tuple((part,) for part in weight.split(widths)), round_kv_score, weight)
    if not many:
        found = (_parts("weight", weight),)
    elif not isinstance(weight, (list, tuple)) or len(weight) != len(specs):
        raise TypeError(f"weight must be {_WEIGHT}, or a sequence of {len(specs)}, got {_told(weight)}")
    else:
        found = tuple(_parts(f"weight[{i}]", given) for i, given in enumerate(weight))
    if len({isinstance(x, ScaledWeight) for parts in found for x in parts}) > 1:
        raise TypeError("weight must be of one kind, all torch.Tensors or all kvfold.ScaledWeights, got both")
    return Projection(hidden, found, round_kv_score)


def _parts(name: str, given: object) -> tuple[Weight, ...]:
    if isinstance(given, (torch.Tensor, ScaledWeight)):
        return (given,)
    if not isinstance(given, tuple) or len(given) != 2 or not all(isinstance(x, (torch.Tensor, ScaledWeight)) for x in given):
        raise TypeError(f"{name} must be {_WEIGHT}, or a tuple of two, of values and of scores, got {_told(given)}")
    return given


def _shapes(rows: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a weight in bf16 or of codes; and of scales."""
    return (rows, width), (blocks_of(rows), blocks_of(width))


def _name(argument: str, i: int, of: Sequence[object]) -> str:
    return argument if len(of) == 1 else f"compressors[{i}]: {argument}"


def _told(given: object) -> str:
    return f"{type(given).__name__} of {len(given)}" if isinstance(given, (list, tuple)) else type(given).__name__


def check_hidden(p: Projection, backend: str | None) -> str:
    """Checks the hidden states; returns the backend to use."""
    hidden = p.hidden
    check_type("hidden", hidden, torch.Tensor)
    chosen = choose_backend(backend, "hidden", hidden)
    check_real_memory("hidden", hidden)
    check_dtype("hidden", hidden, _BF16)
    check_shape("hidden", hidden, (None, None))
    check_hidden_dim("hidden", hidden.shape[1])
    check_tokens("hidden", hidden, hidden.shape[1])
    return chosen


def check_product(p: Projection, kv_scores: Sequence[torch.Tensor]) -> None:
    """Checks the weights that make kv_score of checked hidden states, and what receives it."""
    for i, x in enumerate(kv_scores):
        _check_kv_score(_name("kv_score", i, kv_scores), x, p)
    for name, x, shape, dtypes in _tensors(p, [x.shape[1] for x in kv_scores]):
        check_tensor(name, x, shape, dtypes, p.hidden.device)
        if x.data_ptr() % x.element_size():  # kernels count in elements from one tensor to the next
            raise ValueError(f"{name} must begin at a multiple of its element size, {x.element_size()} bytes")


def check_traced(p: Projection, widths: Sequence[int]) -> None:
    """Checks of weights what a trace shows, whose operator does not look at them before it runs."""
    for name, x, shape, dtypes in _tensors(p, widths):
        check_type(name, x, torch.Tensor)
        check_dtype(name, x, dtypes)
        check_shape(name, x, shape)


def _tensors(p: Projection, widths: Sequence[int]) -> Iterator[tuple[str, torch.Tensor, tuple[int, int], tuple]]:
    """Tensors of weights, with the names that errors have for them, and the shapes and dtypes that they must have."""
    accepted = (_CODES, _FP32) if p.scaled else (_BF16,)
    for name, weight, rows in _named(p, widths):
        each = zip(tensors_of(name, weight), _shapes(rows, p.hidden.shape[1]), accepted, strict=False)
        for (one, x), shape, dtypes in each:
            if not p.scaled and getattr(x, "dtype", None) is torch.float8_e4m3fn:
                raise TypeError(f"{name} must be torch.bfloat16, or a kvfold.ScaledWeight, got {x.dtype} without scales")
            yield one, x, shape, dtypes


def _named(p: Projection, widths: Sequence[int]) -> list[tuple[str, Weight, int]]:
    """Weights, with the names that errors have for them, and how many rows they must have."""
    if p.stacked is not None:
        return [("weight", p.stacked, sum(widths))]
    found = []
    for i, (weights, width) in enumerate(zip(p.weights, widths, strict=True)):
        name = "weight" if len(widths) == 1 else f"weight[{i}]"
        names = (name,) if len(weights) == 1 else (f"{name}[0]", f"{name}[1]")
        found += [(one, weight, width // len(weights)) for one, weight in zip(names, weights, strict=True)]
    return found


def _check_kv_score(name: str, x: torch.Tensor, p: Projection) -> None:
    check_type(name, x, torch.Tensor)
    check_real_memory(name, x)
    check_shape(name, x, (None, None))
    check_tokens(name, x, x.shape[1])
    check_device(name, x, p.hidden.device)
    count = p.hidden.shape[0]
    if x.shape[0] != count:
        raise ValueError(f"{name} must have {count} rows like hidden, got {x.shape[0]}")
    if x.dtype is torch.bfloat16 and not p.round_kv_score:
        raise ValueError(f"round_kv_score must be True for a {name} in torch.bfloat16, got False")
    if count > 1 and x.stride(0) < x.shape[1]:
        raise ValueError(f"{name} must have rows apart from each other, as they are written, got strides {tuple(x.stride())}")


def with_room(p: Projection, compressors: Sequence[Compressor]) -> list[Compressor]:
    """The compressors with a kv_score: the caller's, or one of their own."""
    widths = [c.spec.kv_score_width for c in compressors]
    columns = sum(width for width, c in zip(widths, compressors, strict=True) if c.kv_score is None)
    own = None
    if columns:
        own = torch.empty((p.hidden.shape[0], columns), dtype=p.sums_in, device=p.hidden.device)
    made, at = [], 0
    for i, (width, c) in enumerate(zip(widths, compressors, strict=True)):
        name = _name("kv_score", i, compressors)
        state = c.state
        rows = getattr(state, "rows", None) if isinstance(state, FoldState) else None  # which is checked later
        if getattr(rows, "dtype", None) is torch.bfloat16 and not (state.round_inputs or p.round_kv_score):
            raise TypeError("round_kv_score must be True, as state keeps input rows in bf16 without round_inputs, got False")
        if c.kv_score is not None:
            check_type(name, c.kv_score, torch.Tensor)
            check_memory(name, c.kv_score, fake=True)
            check_shape(name, c.kv_score, (None, width))
        else:
            c, at = c._replace(kv_score=own[:, at : at + width]), at + width
        made.append(c)
    return made


def check_projected(p: Projection, compressors: Sequence[Compressor], plan: PlanData, out: Outputs) -> None:
    """Checks that what a call writes shares no byte with hidden states, weights, and a kv_score that was given."""
    named = _named(p, [c.spec.kv_score_width for c in compressors])
    read = [Place("hidden", p.hidden)]
    read += [Place(one, x) for name, weight, _ in named for one, x in tensors_of(name, weight)]
    written = [Place("kv_score", c.kv_score, True) for c in compressors if c.kv_score is not None]
    for c in compressors:
        met = owner_of(c, plan)._layer.plans[id(plan)]
        for name, x, writes, _ in (*read, *written):
            check_room(name, x, writes, *extent(x), c, plan, met)
    written += [Place(name, x, True) for name, x in (("rows", out.rows), ("latent", out.latent)) if x is not None]
    for one, other in product(read, written):
        _check_apart(one, other)
    for i, one in enumerate(written):
        for other in written[i + 1 :]:
            _check_apart(one, other)


def _check_apart(one: Place, other: Place) -> None:
    (start, end), (first, behind) = extent(one.tensor), extent(other.tensor)
    if start < behind and first < end:
        check_apart((one, other))
