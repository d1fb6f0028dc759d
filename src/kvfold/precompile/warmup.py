"""`warmup`: compiles beforehand what the calls of an engine will need."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..arguments.checks import usable_device
from ..spec import CompressorSpec
from .choices import check_progress, check_workers
from .wanted import keys_of


def warmup(
    specs: Iterable[CompressorSpec],
    formats: Iterable[str | None],
    *,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    max_new_tokens: Iterable[int] = (1,),
    states: Iterable[str] = ("fold",),
    state_dtypes: Iterable[torch.dtype] = (torch.float32,),
    norm_weight_dtypes: Iterable[torch.dtype] = (torch.float32,),
    rows: Iterable[torch.dtype | None] = (None,),
    latents: Iterable[bool] = (False,),
    apart: Iterable[bool] = (False,),
    page_sizes: Iterable[int] | None = None,
    many: Iterable[tuple[tuple[CompressorSpec, str | None], tuple[CompressorSpec, str | None]]] = (),
    snapshots: Iterable[bool] = (False,),
    plans: Iterable[str] = ("plain",),
    round_inputs: bool = False,
    slot_dtypes: Iterable[torch.dtype] = (),
    position_dtypes: Iterable[torch.dtype] = (torch.int64,),
    also: Iterable[tuple[str, str]] = (),
    hidden_dims: Iterable[int] = (),
    weights: Iterable[str] = ("bf16",),
    round_kv_score: Iterable[bool] = (False,),
    training: Iterable[int] = (),
    round_rows: Iterable[bool | None] = (None,),
    out_dtypes: Iterable[torch.dtype | None] = (None,),
    pdl: bool | None = None,
    device: torch.device | str | int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Compiles and loads every kernel that calls over these combinations can need, and launches none.

    Kernels that a package of `prebuild` has for this GPU are loaded from it (`use_prebuilt`), the others are compiled.

    After it, `compress`, `compress_many`, `store`, `restore`, `StepPlan.update`, `training.compress` and, with `hidden_dims`,
    `project_compress` and `project_compress_many` compile nothing, whatever their batch sizes, lengths, strides, alignments,
    slots and pages. An engine that keeps V4's layers in `FoldState`, decodes up to 4 tokens a step and prefills in chunks of
    8,192 calls, once for each device and before it captures a graph:

        kvfold.warmup(
            [kvfold.V4_HCA, kvfold.V4_CSA],
            ["fp8_ds_mla"],
            max_new_tokens=(1, 4, 8192),
            norm_weight_dtypes=(torch.bfloat16,),
            many=[((kvfold.V4_CSA, "fp8_ds_mla"), (kvfold.V4_INDEXER, "indexer_mxfp4"))],
        )

    Args:
        specs: the compressors. Each is combined with every choice below. Specs without a gate have no state, whatever `states`.
        formats: names of record formats, or None for calls without a cache. Each is combined with the specs that it is defined
            for; a format for none of the specs is an error.
        dtypes: dtypes of `kv_score`.
        max_new_tokens: the bounds that plans are built with.
        states: `"fold"` for `FoldState`, `"mean"` for `MeanState` (for specs that can have one), `"window"` for `WindowState`.
        state_dtypes: dtypes of the input rows that a `FoldState` keeps, and of a `WindowState`.
        norm_weight_dtypes: dtypes of the norm weight; None for `store` without a norm.
        rows: dtypes of `compress(rows=...)`, None for calls without. `store` is compiled for those that are not None.
        latents: whether `compress` gets `latent`: True, False or both.
        apart: whether `kv_score` comes as two tensors: True, False or both.
        page_sizes: page sizes of `WindowState`s; default: any.
        many: pairs of (spec, format) that `compress_many` gets together, over `FoldState`s.
        snapshots: whether calls over `FoldState`s get `snapshots`: True, False or both. With True `restore` is compiled too.
        plans: how plans are built. `"plain"`: with none of the following. `"engine"`: with `seq_lens`, `token_slots`,
            `null_page`, `null_slot`, `cu_rows`, int64 or strided tensors. `"ring"`: with `ring=True` and anything else; name
            also which of the others such plans are. For calls over `FoldState`s it makes no difference.
        round_inputs: whether a `FoldState` in bf16 gets fp32 `kv_score`, which it rounds.
        slot_dtypes: dtypes of `slots` in `store` without a plan: int32, int64 or both. Default: only `store` with a plan.
        position_dtypes: dtypes of `positions` there.
        also: pairs of formats, of `cache` and of `also`, that `store` without a plan gets together.
        hidden_dims: widths of the hidden states that `project_compress` gets for `specs`, and `project_compress_many` for
            `many`. The dtype of the kv_score that they make is added to `dtypes`; with `dtypes=()` it is the only one.
        weights: how weights of these calls are stored: `"bf16"`, `"fp8"` for `ScaledWeight`, or both.
        round_kv_score: as these calls have it: False, True or both.
        training: numbers of kv_score rows that `training.compress` gets, forward and backward; no others are compiled. For
            these calls `formats` are those of fake quantization, None for calls without; `dtypes`, `norm_weight_dtypes`,
            `latents` and `apart` apply too. With `max_new_tokens=()` nothing is compiled for `compress` itself.
        round_rows, out_dtypes: as these training calls have them, None for the default.
        pdl: as the calls will have it. False leaves out the kernels for dependent launches, but for those of training.
        device: default: the current one.
        workers: threads that compile at once, from 1 to 256. Default: the cores that this process may use, 16 at most. Always
            one on AMD.
        progress: called with the number of kernels done, their total, and a text. Before the first kernel the text says how
            many are prebuilt and how many seconds the others take if Triton's cache has none of them; then it is the kernel's
            name. Not called if nothing was missing.

    Returns:
        How many kernels were compiled, or loaded from a package; 0 if nothing was missing.

    Raises:
        Whatever Triton raises for a kernel that does not compile. Kernels loaded before stay; no more are started.
        TypeError, ValueError: naming the argument, before anything is compiled; `UnsupportedError` if no kernel is configured
            for a spec.
        RuntimeError: there is no GPU, or kernels are interpreted.
    """
    calls = {
        "specs": specs, "formats": formats, "dtypes": dtypes, "max_new_tokens": max_new_tokens, "states": states,
        "state_dtypes": state_dtypes, "norm_weight_dtypes": norm_weight_dtypes, "rows": rows, "latents": latents,
        "apart": apart,
        "page_sizes": page_sizes, "many": many, "snapshots": snapshots, "plans": plans, "round_inputs": round_inputs,
        "slot_dtypes": slot_dtypes, "position_dtypes": position_dtypes, "also": also, "hidden_dims": hidden_dims,
        "weights": weights, "round_kv_score": round_kv_score, "training": training, "round_rows": round_rows,
        "out_dtypes": out_dtypes, "pdl": pdl,
    }  # fmt: skip
    keys, dependent = keys_of(calls)
    workers = check_workers(workers)
    check_progress(progress)

    from ..backend_triton.launcher import INTERPRETED, supports_pdl
    from ..backend_triton.prepare import prepare

    gpu = _gpu(device, INTERPRETED)
    return prepare(keys, gpu, lambda key: supports_pdl(gpu) and dependent(key), workers, progress)


def _gpu(device: torch.device | str | int | None, interpreted: bool) -> torch.device:
    if interpreted:
        raise RuntimeError("warmup compiles for a GPU, but TRITON_INTERPRET is set and kernels are interpreted")
    if not torch.cuda.is_available():
        raise RuntimeError("warmup compiles for the GPU of this machine, and torch finds none")
    found = torch.device("cuda") if device is None else usable_device("device", device)
    if found.type != "cuda":
        raise ValueError(f"device must be a CUDA or HIP device, got {found}")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
