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
        specs: the compressors; every one with every other choice below. Those without a gate have no state, whatever `states`.
        formats: names of record formats, or None for calls without a cache. A spec is left out of formats that are not
            defined for it; a format that is for none of the specs is a mistake.
        dtypes: of `kv_score`.
        max_new_tokens: the bounds that plans are built with.
        states: `"fold"` for `FoldState`, `"mean"` for `MeanState`, where a spec can have one, `"window"` for `WindowState`.
        state_dtypes: of input rows that a `FoldState` keeps, and of a `WindowState`.
        norm_weight_dtypes: of the norm weight; None for `store` without a norm.
        rows: dtypes of `compress(rows=...)`, None for calls without. `store` is compiled for those that are not None.
        latents: whether `compress` gets `latent`: True, False or both.
        apart: whether `kv_score` comes as two tensors: True, False or both.
        page_sizes: of `WindowState`s; default: any.
        many: pairs of (spec, format) that `compress_many` gets together, over `FoldState`s.
        snapshots: whether calls over `FoldState`s get `snapshots`: True, False or both. With True `restore` is compiled too.
        plans: what plans are built with. `"plain"`: nothing below. `"engine"`: any of `seq_lens`, `token_slots`, `null_page`,
            `null_slot`, `cu_rows`, int64, or numbers that are strided. `"ring"`: `ring=True`, whatever else; name the others
            too that come with it. Of calls over `FoldState`s it changes nothing.
        round_inputs: whether a `FoldState` in bf16 gets fp32 `kv_score`, which it rounds.
        slot_dtypes: of `slots` in `store` without a plan: int32, int64 or both. Default: `store` is compiled with a plan alone.
        position_dtypes: of `positions` there.
        also: pairs of formats, of `cache` and of `also`, that `store` without a plan gets together.
        hidden_dims: numbers of the hidden states that `project_compress` gets for specs, and `project_compress_many` for many.
            `dtypes` need not name what these make of them; with `dtypes=()` there is nothing for other kv_score.
        weights: of these calls: `"bf16"`, `"fp8"` for `ScaledWeight`, or both.
        round_kv_score: as these calls have it: False, True or both.
        training: rows of kv_score that `training.compress` gets, forward and backward: those numbers of rows and no others.
            `formats` are those of fake quantization then, None for calls without; dtypes, `norm_weight_dtypes`, `latents` and
            `apart` are of these calls too. With `max_new_tokens=()` nothing is compiled for `compress` itself.
        round_rows, out_dtypes: of these calls, None for the default.
        pdl: as the calls will have it. False leaves out the kernels that are launched as dependents. Those of training are.
        device: default: the current one.
        workers: threads that compile at once, from 1 to 256; with 1 one kernel after the other. Default: the cores that this
            process may use, 16 at most. For AMD it is one.
        progress: called with how many kernels are done, of how many, and words: before the first one how many are prebuilt and
            how many seconds the others take if Triton's cache has none of them; after each its name. Not called where all were
            there.

    Returns:
        How many kernels were compiled, or loaded from a package; 0 when all were there.

    Raises:
        Whatever Triton does for a kernel that does not compile. Those that were loaded before stay, and nothing is begun after.
        TypeError, ValueError: naming the argument, before anything is compiled; `UnsupportedError` where no kernel is
            configured for a spec.
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
