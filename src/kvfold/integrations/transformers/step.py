"""One step of one compressor over the tensors of a cache layer: a function, and the same as an operator under torch.compile.

On a CPU sequences go on together (`backend_torch/even.py`), as all of a batch are at one position. Elsewhere, and with the
triton backend, a step is `kvfold.compress` over a `FoldState`, with a plan that the layers of a step share.
"""

from __future__ import annotations

from typing import Any

import torch

from ...backend_torch.even import even_shape, step_even
from ...storage.fold_state import empty_slots, state_kind
from .planned import most_of, step_planned
from .weights import Shape

_NO_TAGS = 0
_NAMESPACE = __package__.replace(".", "_")  # of copies of kvfold under other names too
OPS = getattr(torch.ops, _NAMESPACE)


def goes_together(device: torch.device, backend: str | None) -> bool:
    """Whether a step needs no plan."""
    return device.type == "cpu" and backend in (None, "torch")


def new_state(like: torch.Tensor, shape: Shape, max_new_tokens: int, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and tags of an empty state, `[batch, ...]` each; `like`: a projection `[batch, new, channels]`."""
    if torch.compiler.is_compiling():
        return OPS.new_state(like, max_new_tokens, *shape, backend)
    return _new_state(like, max_new_tokens, *shape, backend)


def _new_state(like: torch.Tensor, max_new_tokens: int, *how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *shape, backend = how
    spec, batch = Shape(*shape).spec(1e-6), like.shape[0]
    rows = state_kind(spec) == "rows"
    dtype = like.dtype if rows else torch.float32
    if goes_together(like.device, backend):
        return (
            like.new_zeros(batch, *even_shape(spec, max_new_tokens), dtype=dtype),
            like.new_empty(batch, _NO_TAGS, dtype=torch.int32),
        )
    return empty_slots(spec, batch, most_of(spec, max_new_tokens), dtype, like.device)


def step(
    tokens: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    state: tuple[torch.Tensor, torch.Tensor],
    entries: torch.Tensor,
    start: int,
    max_new_tokens: int,
    shape: Shape,
    norm_eps: float,
    backend: str | None,
) -> None:
    """Folds the tokens of a step and writes the entries of the windows that end in it.

    Args:
        tokens: `kv` and `gate`, bf16 or fp32 `[batch, new, channels]`, from position `start` on.
        weights: ape `[ratio, channels]`, norm_weight `[head_dim]`, and rotations, as `weights.rope_rows` makes them; these may
            be None where no window ends.
        state: rows and tags of `new_state`. Mutated.
        entries: fp32 or bf16 `[batch, at least (start + new) // ratio, head_dim]`. Mutated from `start // ratio` on.
    """
    call = OPS.step if torch.compiler.is_compiling() else _step
    call(*tokens, *weights, *state, entries, start, max_new_tokens, *shape, norm_eps, backend)


def _step(
    kv: torch.Tensor,
    gate: torch.Tensor,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    rope: torch.Tensor | None,
    rows: torch.Tensor,
    tags: torch.Tensor,
    entries: torch.Tensor,
    start: int,
    max_new_tokens: int,
    *how: Any,
) -> None:
    *shape, norm_eps, backend = how
    spec = Shape(*shape).spec(norm_eps)
    ended = (start + kv.shape[1]) // spec.ratio - start // spec.ratio
    if not ended:
        rope = None
    elif len(rope) > ended:  # a traced step brings as many as there could be
        rope = rope[:ended]
    if tags.shape[1] == _NO_TAGS:
        step_even(kv, gate, start, rows, entries, spec, ape.float(), norm_weight, rope)
    else:
        step_planned(kv, gate, ape, norm_weight, rope, rows, tags, entries, start, max_new_tokens, spec, backend)


_SHAPE = "int head_dim, int ratio, bool overlap, int rope_dim"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")
for _name, _schema, _run, _fake in (
    ("new_state", f"(Tensor like, int max_new_tokens, {_SHAPE}, str? backend) -> (Tensor, Tensor)", _new_state, _new_state),
    (
        "step",
        "(Tensor kv, Tensor gate, Tensor ape, Tensor norm_weight, Tensor rope, Tensor(a!) rows, Tensor(b!) tags,"
        f" Tensor(c!) entries, SymInt start, int max_new_tokens, {_SHAPE}, float norm_eps, str? backend) -> ()",
        _step,
        lambda *args: None,
    ),
):
    _full = f"{_NAMESPACE}::{_name}"
    torch.library.define(_full, _schema, tags=(torch.Tag.pt2_compliant_tag,), lib=_LIBRARY)
    torch.library.impl(_full, "CompositeExplicitAutograd", _run, lib=_LIBRARY)
    torch.library.register_fake(_full, _fake, lib=_LIBRARY)
