"""`compress`: check the arguments, choose the backend, launch once."""

from __future__ import annotations

import torch

from .backend_torch import compress_torch
from .checks import check_device, check_dtype, check_shape, check_tensor, check_type
from .plan import StepPlan
from .records import EntryCache
from .spec import CompressorSpec
from .state import FoldState

BACKENDS = ("triton", "torch")
_FLOATS = (torch.bfloat16, torch.float32)


def compress(
    kv_score: torch.Tensor,
    plan: StepPlan,
    state: FoldState,
    cache: EntryCache | None,
    *,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    rows: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Folds a step's new tokens into the state and writes the entries of the windows that end in it.

    Prefill, chunks, decode with any number of new tokens, mixtures of these and padding are all this one call, and give
    the same bits. Everything after the projection happens here: pooling, RMSNorm, RoPE, Hadamard, quantization and store.

    Args:
        kv_score: bf16 or fp32 `[T, 2 * channels]`, rows `[K | S]` (overlap: `[K.lo K.hi S.lo S.hi]`), sequence-major as
            `plan.cu_seqlens` says. The last dimension is contiguous, the row stride free. Rows behind the last sequence
            are not read.
        plan: of this step, for `spec.ratio`.
        state: mutated: the rows of the step's last `state.ring` positions.
        cache: mutated: one record per entry, at `plan.entry_slots`. None leaves out all that follows the pooling.
        spec: the compressor; the one that `state` and `cache` were made for.
        ape: fp32 `[ratio, channels]`; None if and only if `spec.has_ape` is false.
        norm_weight: fp32 or bf16 `[head_dim]`; may be None without a cache.
        rope: fp32 `[max_pos, rope_dim]`, cosines then sines; an entry is rotated by the position of its window's first
            token. May be None without a cache or with `rope_dim` 0.
        rows: mutated if given: bf16 or fp32 `[E, head_dim]`, row e receives the pooled row of entry e before the norm. Rows of
            entries that do not exist or are dropped stay as they are.
        backend: `"triton"` (CUDA or HIP tensors; CPU tensors under Triton's interpreter) or `"torch"` (any device).
            Default: triton for CUDA and HIP tensors, torch for others.

    Raises:
        TypeError, ValueError: naming the argument; nothing has been written then. What depends on data (a slot beyond
            its pool, a state row that is not held) is skipped and counted in `plan.errors`.
    """
    check_type("kv_score", kv_score, torch.Tensor)
    chosen = choose_backend(backend, "kv_score", kv_score)
    _check(kv_score, plan, state, cache, spec, ape, norm_weight, rope, rows)
    if plan.batch == 0:
        return
    if chosen == "torch":
        compress_torch(kv_score, plan, state, cache, spec, ape, norm_weight, rope, rows)
    else:
        from .kernels.launch import compress_triton  # imports triton, which the torch backend does not need

        compress_triton(kv_score, plan, state, cache, spec, ape, norm_weight, rope, rows)


def choose_backend(backend: str | None, name: str, tensor: torch.Tensor) -> str:
    """The backend to use for inputs like argument `name`; raises ValueError if it cannot take them."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name} must be on a CPU or a GPU, got the meta device")
    if backend is None:
        return "triton" if tensor.is_cuda else "torch"
    if backend == "triton" and not tensor.is_cuda:
        from .kernels.launch import INTERPRETED

        if tensor.device.type != "cpu" or not INTERPRETED:
            raise ValueError(
                f"backend='triton' takes CUDA or HIP tensors, and CPU tensors under Triton's interpreter (set "
                f"TRITON_INTERPRET=1 before importing kvfold), got {tensor.device}; or use backend='torch'"
            )
    return backend


def _check(
    kv_score: torch.Tensor,
    plan: StepPlan,
    state: FoldState,
    cache: EntryCache | None,
    spec: CompressorSpec,
    ape: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    check_type("spec", spec, CompressorSpec)
    check_type("plan", plan, StepPlan)
    check_type("state", state, FoldState)
    device = kv_score.device
    check_dtype("kv_score", kv_score, _FLOATS)
    check_shape("kv_score", kv_score, (None, 2 * spec.channels))
    if kv_score.shape[0] and kv_score.stride(1) != 1:
        raise ValueError(f"kv_score must be contiguous in its last dimension, got strides {tuple(kv_score.stride())}")
    check_plan(plan, spec, device)
    if state.spec != spec:
        raise ValueError(f"state must be for {spec}, got {state.spec}")
    check_device("state", state.rows, device)
    if state.kind == "rows" and state.rows.dtype == torch.bfloat16 and kv_score.dtype != torch.bfloat16:
        raise TypeError("kv_score must be torch.bfloat16, as state keeps input rows in bf16, got torch.float32")
    if spec.has_ape:
        check_tensor("ape", ape, (spec.ratio, spec.channels), (torch.float32,), device)
    elif ape is not None:
        raise ValueError("ape must be None, as spec.has_ape is False")
    if rows is not None:
        check_tensor("rows", rows, (plan.entry_capacity, spec.head_dim), _FLOATS, device)
    check_epilogue(plan, cache, spec, norm_weight, rope, device)


def check_plan(plan: StepPlan, spec: CompressorSpec, device: torch.device) -> None:
    """Checks that a plan is for this compressor and on this device."""
    if plan.ratio != spec.ratio:
        raise ValueError(f"plan must be for ratio {spec.ratio}, got ratio {plan.ratio}")
    check_device("plan", plan.items, device)


def check_epilogue(
    plan: StepPlan,
    cache: EntryCache | None,
    spec: CompressorSpec,
    norm_weight: torch.Tensor | None,
    rope: torch.Tensor | None,
    device: torch.device,
) -> None:
    """Checks what everything behind the pooling takes."""
    if norm_weight is not None or cache is not None:
        check_tensor("norm_weight", norm_weight, (spec.head_dim,), _FLOATS, device)
    if rope is not None or (cache is not None and spec.rope_dim):
        check_tensor("rope", rope, (None, spec.rope_dim), (torch.float32,), device)
    if cache is not None:
        check_type("cache", cache, EntryCache)
        if cache.spec != spec:
            raise ValueError(f"cache must be for {spec}, got {cache.spec}")
        check_device("cache", cache.storage, device)
        if plan.entry_slots is None:
            raise ValueError("plan must have entry_slots or a cache_block_table when a cache is given, got neither")
