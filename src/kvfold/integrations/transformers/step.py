"""One step of one compressor over the tensors of a cache layer: a function, and the same as an operator under torch.compile.

On a CPU sequences go on together (`backend_torch/even.py`), as all of a batch are at one position. Elsewhere, and with the
triton backend, a step is `kvfold.compress` over a `FoldState`, with a plan that the layers of a step share.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from ...backend_torch.even import even_shape, step_even
from ...compress import compress
from ...plan import StepPlan
from ...spec import CompressorSpec
from ...storage.cache import EntryCache
from ...storage.fold_state import FoldState, state_kind
from .weights import Shape

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_NO_TAGS = 0
_NAMESPACE = __package__.replace(".", "_")  # of copies of kvfold under other names too
OPS = getattr(torch.ops, _NAMESPACE)


class _OfThread(threading.local):
    """What a thread keeps between steps: for each ratio, device and stream a plan, and rotations by position."""

    def __init__(self) -> None:
        self.plans: dict[tuple, tuple[tuple[int, int, int], int, StepPlan]] = {}
        self.tables: dict[tuple, torch.Tensor] = {}


_kept = _OfThread()


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
    state = FoldState.allocate(spec, batch, _most(spec, max_new_tokens), device=like.device, dtype=dtype)
    return state.rows, state.positions


def _most(spec: CompressorSpec, max_new_tokens: int) -> int:
    """`FoldState.max_new_tokens`: a rewind may go back by so many tokens however many steps they came in."""
    return max_new_tokens + 2 * spec.ratio if state_kind(spec) == "rows" and max_new_tokens > 1 else max_new_tokens


def step(
    tokens: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
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
        weights: ape fp32 `[ratio, channels]`, norm_weight `[head_dim]`, and rotations, as `weights.rope_rows` makes them.
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
    rope: torch.Tensor,
    rows: torch.Tensor,
    tags: torch.Tensor,
    entries: torch.Tensor,
    start: int,
    max_new_tokens: int,
    *how: Any,
) -> None:
    *shape, norm_eps, backend = how
    spec = Shape(*shape).spec(norm_eps)
    rope = rope[: (start + kv.shape[1]) // spec.ratio - start // spec.ratio]
    if tags.shape[1] == _NO_TAGS:
        step_even(kv, gate, start, rows, entries, spec, ape, norm_weight, rope)
        return
    batch, new = kv.shape[:2]
    state = FoldState(spec, rows, tags, _most(spec, max_new_tokens))
    cache = EntryCache(entries, FORMATS[entries.dtype], entries.shape[1], spec)
    plan = _plan(spec.ratio, kv.device, batch, start, new, entries.shape[1])
    table = _table(rope, start, start + new, spec)
    weights = {"spec": spec, "ape": ape, "norm_weight": norm_weight, "rope": table}
    compress(torch.cat([kv, gate], -1).flatten(0, 1), plan, state, cache, **weights, backend=backend)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _plan(ratio: int, device: torch.device, batch: int, start: int, new: int, capacity: int) -> StepPlan:
    """Of a step of all sequences from `start` on; batch row = state slot = page, and a page has `capacity` entries.

    A decode step differs from the one before only in its start, so it is an `update` in place.
    """
    place, key, ints = (ratio, device, _stream(device)), (batch, new, capacity), {"dtype": torch.int32, "device": device}
    known, before, plan = _kept.plans.get(place, (None, start, None))
    if known != key:
        rows, ends = torch.arange(batch, **ints), torch.arange(batch + 1, **ints) * new
        plan = StepPlan.build(
            ratio, torch.full((batch,), start, **ints), ends, max(new, 1), state_slots=rows,
            cache_block_table=rows[:, None].contiguous(), rows_per_page=capacity,
        )  # fmt: skip
    elif before != start:
        plan.update(torch.full((batch,), start, **ints), plan.cu_seqlens)
    _kept.plans[place] = key, start, plan
    return plan


def _table(rope: torch.Tensor, start: int, end: int, spec: CompressorSpec) -> torch.Tensor:
    """A table by position with the rotations of this step's entries in it. Nobody reads its other rows."""
    place = spec.rope_dim, rope.device, _stream(rope.device)
    table = _kept.tables.get(place)
    if table is None or len(table) < end:
        table = _kept.tables[place] = rope.new_empty(max(4096, 1 << (end - 1).bit_length()), spec.rope_dim)
    if len(rope):
        table[start // spec.ratio * spec.ratio :: spec.ratio][: len(rope)] = rope
    return table


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
