"""`compress` and `compress_many`: a step's new tokens, for one compressor or two. `project_*`: the same from hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import ops
from .arguments.checks import traced
from .calls.check_project import projection_of
from .calls.checks import compressors_of
from .calls.run import run_compress, run_many, run_project
from .plan import StepPlan
from .spec import CompressorSpec
from .storage.cache import EntryCache
from .storage.fold_state import FoldState
from .storage.mean_state import MeanState
from .storage.snapshots import Snapshots
from .storage.step import NO_OUTPUTS, Compressor, Outputs
from .storage.weights import Weight
from .storage.window_state import WindowState

Weights = Weight | tuple[Weight, Weight]


def compress(
    kv_score: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
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
    backend: str | None = None,
    pdl: bool | None = None,
) -> None:
    """Folds a step's new tokens into the state and writes the entries of the windows that end in it.

    Prefill, chunks, decode with any number of new tokens, mixtures of these and padding are all this one call, and give
    the same bits. Everything after the projection happens here: pooling, RMSNorm, RoPE, Hadamard, quantization and store.
    No gradient is made; tensors that require one are accepted. A mutated argument must share no byte with any other.

    Args:
        kv_score: the projection's output, bf16 or fp32. One tensor `[T, 2 * channels]`, rows `[K | S]` (with overlap
            `[K.lo K.hi S.lo S.hi]`); or two tensors `(K, S)` of one dtype, `[T, channels]` each; or, without a gate,
            `[T, channels]`, rows `K`. Rows are in the order of `plan.cu_seqlens`. The last dimension is contiguous, the row
            stride is free. Rows after the last sequence are not read.
        plan: the plan of this step, for `spec.ratio`. It has state slots for a `FoldState` or a `MeanState`, and block tables
            for a `WindowState`. Without a state it may have either or neither.
        state: mutated; None if and only if `spec.gate` is false. Of a `FoldState` all that a later step may read is written;
            of a `MeanState` the row of each sequence that ends inside a window, or its banks; of a `WindowState` the rows of
            all new positions. Over a `MeanState` a step must start where the last one ended. Only one call at a time may use
            a state object: to use the same pools on two streams at once, wrap them twice.
        cache: mutated: one record per entry, at `plan.entry_slots`. With None the call ends after the pooling, except for
            `latent`.
        spec: the compressor, the same that `state` and `cache` were made for.
        ape: fp32 `[ratio, channels]`; None if and only if `spec.has_ape` is false.
        norm_weight: fp32 or bf16 `[head_dim]`; may be None with neither a cache nor `latent`.
        rope: fp32 `[max_pos, rope_dim]`, cosines then sines; an entry is rotated by the position of its window's first
            token. May be None without a cache or with `rope_dim` 0.
        rows: mutated if given: bf16 or fp32 `[E, head_dim]`. Row e receives the pooled row of entry e, before the norm. Rows
            without an entry, or whose entry is dropped, stay as they are. If the plan has `cu_rows`, `rows` may have any
            length; an entry whose place lies beyond it is refused.
        latent: mutated if given: bf16 `[E, head_dim]`. Row e receives entry e after RMSNorm and before RoPE, rounded to bf16.
            (In V4.1 the index key is made of it.) If the cache's format has `round_rows`, the pooled row is rounded to bf16
            before the norm. Otherwise as `rows`. Kernels launched later see it, dependent launches too.
        snapshots: mutated if given, for a `FoldState` and a plan with a `snapshot_table`: new rows of this step that belong to
            the snapshot of a page are written there too. If several steps reach the end of a page, each writes its own rows.
        backend: `"triton"` (CUDA or HIP tensors; CPU tensors under Triton's interpreter) or `"torch"` (any device).
            Default: triton for CUDA and HIP tensors, torch for others.
        pdl: whether the kernel may start while the one before it on the stream still runs (programmatic dependent launch,
            sm_90 and newer). Before it waits for that one, it reads only ape, norm_weight, rope and what the plan was built
            from. Same bits. Default: where it is known to help.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then. What depends on data (a slot beyond
            its pool, a state row that is not held) is skipped and counted in `plan.errors`.
    """
    c = Compressor(kv_score, state, cache, spec, ape, norm_weight, rope, snapshots)
    run = ops.compress if traced(c.value) else run_compress
    run(c, plan, NO_OUTPUTS if rows is None and latent is None else Outputs(rows, latent), backend, pdl)


def compress_many(
    compressors: Sequence[Compressor | tuple], plan: StepPlan, *, backend: str | None = None, pdl: bool | None = None
) -> None:
    """`compress` for up to two compressors of a layer in one launch: a ratio-4 layer's main one and its indexer.

    The bits are those of one `compress` for each.

    Args:
        compressors: a tuple `(kv_score, state, cache, spec, ape, norm_weight, rope)` for each, with `snapshots` as an optional
            eighth element. All states are `FoldState`s. The compressors share the plan, and so the ratio, the state slots, the
            entry slots and the snapshot table. No two share a state, a cache or snapshots.
        plan, backend, pdl: as for `compress`.

    Raises:
        TypeError, ValueError: naming the argument, `compressors[i]` before it; nothing has been written then.
    """
    made = compressors_of(compressors)
    run = ops.compress_many if traced(made[0].value) else run_many
    run(made, plan, backend, pdl)


def project_compress(
    hidden: torch.Tensor,
    weight: Weights,
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
    """`compress` of `hidden @ weight.T`. The sums are in fp32 and in one fixed order: a token has the same bits in every batch.

    So the promise of `compress` starts at the hidden states: prefill, chunks and decode give the same entries, to the bit.

    Args:
        hidden: bf16 `[T, hidden_dim]`, a row for each new token, in the order of `plan.cu_seqlens`. hidden_dim is a multiple
            of 64 and at least 256. The last dimension is contiguous, the row stride is free.
        weight: bf16 `[2 * channels, hidden_dim]`, contiguous: the rows that make values, then those that make scores. Or a
            tuple of the two, `[channels, hidden_dim]` each (a checkpoint's wkv and wgate). Without a gate only the values'
            rows. Each tensor may be a `ScaledWeight` instead, in FP8. The launch right before must not write it.
        plan, state, cache, spec, ape, norm_weight, rope, rows, latent, snapshots: as for `compress`.
        kv_score: mutated if given: fp32 or bf16 `[T, 2 * channels]`, receives what was folded.
        round_kv_score: whether kv_score is rounded to bf16 before it is folded, as in an engine whose projection gives bf16.
            It must be True if `kv_score` is bf16, or if `state` keeps input rows in bf16 without `round_inputs`.
        backend, pdl: as for `compress`.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then.
    """
    c = Compressor(kv_score, state, cache, spec, ape, norm_weight, rope, snapshots)
    p = projection_of(hidden, weight, [spec], round_kv_score)
    out = NO_OUTPUTS if rows is None and latent is None else Outputs(rows, latent)
    run = ops.project if traced(hidden) else run_project
    run(p, [c], plan, out, backend, pdl)


def project_compress_many(
    hidden: torch.Tensor,
    weight: Weight | Sequence[Weights],
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
        weight: bf16 `[sum of 2 * channels, hidden_dim]`, the compressors' weights one after the other: this is fastest. Or a
            sequence with what `project_compress` takes for each, all in bf16 or all in FP8. A single `ScaledWeight` may hold
            both if the first compressor's rows are a multiple of 128.
        compressors: as for `compress_many`, but each `kv_score` is None, or receives what was folded.
        plan: as for `compress_many`.
        round_kv_score, backend, pdl: as for `project_compress`.

    Raises:
        TypeError, ValueError: naming the argument, `compressors[i]` before it; nothing has been written then.
    """
    made = compressors_of(compressors)
    p = projection_of(hidden, weight, [c.spec for c in made], round_kv_score, many=True)
    run = ops.project if traced(hidden) else run_project
    run(p, made, plan, NO_OUTPUTS, backend, pdl)
