"""`project_compress` and `project_compress_many`: `compress`, from the hidden states on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import ops
from .arguments.checks import traced
from .calls.check_project import projection_of
from .calls.checks import compressors_of
from .calls.run import run_project
from .plan import StepPlan
from .spec import CompressorSpec
from .storage.cache import EntryCache
from .storage.fold_state import FoldState
from .storage.mean_state import MeanState
from .storage.snapshots import Snapshots
from .storage.step import NO_OUTPUTS, Compressor, Outputs
from .storage.window_state import WindowState

Weight = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def project_compress(
    hidden: torch.Tensor,
    weight: Weight,
    plan: StepPlan,
    state: FoldState | MeanState | WindowState | None,
    cache: EntryCache | None,
    *,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    rows: torch.Tensor | None = None,
    latent: torch.Tensor | None = None,
    snapshots: Snapshots | None = None,
    kv_score: torch.Tensor | None = None,
    round_kv_score: bool = False,
    backend: str | None = None,
    pdl: bool | None = None,
) -> None:
    """`compress` of `hidden @ weight.T`, summed in fp32 in one order: a hidden state gives the same bits in every batch.

    So the promise of `compress` begins with the hidden states: prefill, chunks and decode give the same entries, to the bit.

    Args:
        hidden: bf16 `[T, hidden_dim]`, a row for each new token, sequence-major as `plan.cu_seqlens` says. hidden_dim is a
            multiple of 64 and at least 256. The last dimension is contiguous, the row stride free.
        weight: bf16 `[2 * channels, hidden_dim]`, contiguous: the rows of the values, then those of the scores; or the two as
            tensors of their own, `[channels, hidden_dim]` each (a checkpoint's wkv and wgate); without a gate values alone. Not
            written by the launch right before the call.
        plan, state, cache, spec, ape, norm_weight, rope, rows, latent, snapshots: as for `compress`.
        kv_score: mutated if given: fp32 or bf16 `[T, 2 * channels]`, receives what was folded. Without it, it need not exist.
        round_kv_score: whether kv_score is rounded to bf16 before it is folded, as where an engine's projection gives bf16.
            It must be where `kv_score` is bf16, and where `state` keeps input rows in bf16 without `round_inputs`.
        backend, pdl: as for `compress`.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then.
    """
    c = Compressor(kv_score, state, cache, spec, ape, norm_weight, rope, snapshots)
    p = projection_of(hidden, weight, (spec,), round_kv_score)
    out = NO_OUTPUTS if rows is None and latent is None else Outputs(rows, latent)
    (ops.project if traced(hidden) else run_project)(p, [c], plan, out, backend, pdl)


def project_compress_many(
    hidden: torch.Tensor,
    weight: torch.Tensor | Sequence[Weight],
    compressors: Sequence[Compressor | tuple],
    plan: StepPlan,
    *,
    round_kv_score: bool = False,
    backend: str | None = None,
    pdl: bool | None = None,
) -> None:
    """`project_compress` for up to two compressors of a layer at once: a ratio-4 layer's main one and its indexer.

    The bits are those of one `project_compress` for each.

    Args:
        hidden: as for `project_compress`.
        weight: bf16 `[sum of 2 * channels, hidden_dim]`, the weights of each compressor behind those of the one before, which
            is fastest; or a sequence with what `project_compress` takes for each.
        compressors: as for `compress_many`, where `kv_score` is None or receives what was folded.
        plan: as for `compress_many`.
        round_kv_score, backend, pdl: as for `project_compress`.

    Raises:
        TypeError, ValueError: naming the argument, `compressors[i]` before it; nothing has been written then.
    """
    made = compressors_of(compressors)
    p = projection_of(hidden, weight, [c.spec for c in made], round_kv_score)
    (ops.project if traced(hidden) else run_project)(p, made, plan, NO_OUTPUTS, backend, pdl)
