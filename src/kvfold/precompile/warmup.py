"""`warmup`: compiles beforehand what the calls of an engine will need."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..arguments.checks import check_int, check_switch, check_type, usable_device
from ..contract import INT32_MAX
from ..spec import CompressorSpec
from ..storage.formats import RecordFormat
from .choices import FLOATS, INDICES, check_all, check_choices, check_formats, check_workers, defined_for, fits, several

STATES = ("fold", "mean", "window")
PLANS = ("plain", "engine", "ring")  # as `backend_triton.keys.TABLES`, which imports triton


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
    training: Iterable[int] = (),
    round_rows: Iterable[bool | None] = (None,),
    out_dtypes: Iterable[torch.dtype | None] = (None,),
    pdl: bool | None = None,
    device: torch.device | str | int | None = None,
    workers: int | None = None,
) -> int:
    """Compiles and loads every kernel that calls over these combinations can need, and launches none.

    After it, `compress`, `compress_many`, `store`, `restore`, `StepPlan.update` and `training.compress` compile nothing,
    whatever their batch sizes, lengths, strides, alignments, slots and pages. An engine that keeps V4's layers in `FoldState`,
    decodes up to 4 tokens a step and prefills in chunks of 8,192 calls, once for each device and before it captures a graph:

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
        training: rows of kv_score that `training.compress` gets, forward and backward: those numbers of rows and no others.
            `formats` are those of fake quantization then, None for calls without; dtypes, `norm_weight_dtypes`, `latents` and
            `apart` are of these calls too. With `max_new_tokens=()` nothing is compiled for `compress` itself.
        round_rows, out_dtypes: of these calls, None for the default.
        pdl: as the calls will have it. False leaves out the kernels that are launched as dependents. Those of training are.
        device: default: the current one.
        workers: threads that compile at once, from 1 to 256; with 1 one kernel after the other. Default: the cores that this
            process may use, 16 at most. For AMD it is one.

    Returns:
        How many kernels were compiled; 0 when all were there.

    Raises:
        Whatever Triton does for a kernel that does not compile. Those that were loaded before stay, and nothing is begun after.
        TypeError, ValueError: naming the argument, before anything is compiled; `UnsupportedError` where no kernel is
            configured for a spec.
        RuntimeError: there is no GPU, or kernels are interpreted.
    """
    specs, names = check_all("specs", specs, CompressorSpec), check_formats("formats", formats)
    dtypes = check_choices("dtypes", dtypes, FLOATS)
    norms = check_choices("norm_weight_dtypes", norm_weight_dtypes, (*FLOATS, None))
    state_dtypes, states = check_choices("state_dtypes", state_dtypes, FLOATS), check_choices("states", states, STATES)
    rows = check_choices("rows", rows, (None, *FLOATS))
    switches = {"snapshots": snapshots, "latents": latents, "apart": apart}
    snapshots, latents, apart = (check_choices(name, given, (False, True)) for name, given in switches.items())
    plans = check_choices("plans", plans, PLANS)
    rows_of_training = several("training", training)
    for tokens in rows_of_training:
        check_int("training", tokens, 0, INT32_MAX)
    rounds = check_choices("round_rows", round_rows, (None, False, True))
    outs = check_choices("out_dtypes", out_dtypes, (None, *FLOATS))
    steps = several("max_new_tokens", max_new_tokens)
    for bound in steps:
        check_int("max_new_tokens", bound, 1, (1 << 31) - 1)
    pages = None if page_sizes is None else several("page_sizes", page_sizes)
    for size in pages or ():
        check_int("page_sizes", size, 1, (1 << 31) - 1)
    slots, positions = (
        check_choices("slot_dtypes", slot_dtypes, INDICES),
        check_choices("position_dtypes", position_dtypes, INDICES),
    )
    together = [check_formats(f"also[{i}]", pair) for i, pair in enumerate(several("also", also))]
    pairs = [_pair(i, pair) for i, pair in enumerate(several("many", many))]
    check_switch("pdl", pdl)
    check_type("round_inputs", round_inputs, bool)
    workers = check_workers(workers)
    chosen = defined_for(specs, names)
    stored = [(*one, some) for i, pair in enumerate(together) for one in _stored(i, pair, specs) for some in rows]

    from ..backend_triton import keys
    from ..backend_triton.launcher import INTERPRETED, supports_pdl
    from ..backend_triton.prepare import prepare
    from ..training.keys import Calls, TrainingKey, training_keys

    gpu = _gpu(device, INTERPRETED)
    w = keys.Wanted(
        dtypes, steps, state_dtypes, norms, snapshots, round_inputs, slots, positions, _tables(plans), latents, apart
    )
    paired = [spec for pair in pairs for spec, _ in pair]
    found = [*keys.plan_keys({spec.ratio for spec in (*specs, *paired) if spec.gate}, states, plans)]
    if not all(spec.gate for spec in specs):
        found += keys.plan_keys({1}, STATES, plans)  # with slots or without
    for spec, fmt in chosen:
        for some in rows:
            found += keys.store_keys(spec, fmt, w, some)
            found += keys.step_keys(spec, fmt, w, some) if "fold" in states or not spec.gate else ()
            found += keys.mean_keys(spec, fmt, w, some) if "mean" in states else ()
            found += keys.window_keys(spec, fmt, w, some, pages) if "window" in states and spec.gate else ()
    for spec, fmt, second, some in stored:
        found += keys.store_keys(spec, fmt, w, some, second)
    for pair in pairs:
        found += keys.pair_keys(pair, w)
    if True in snapshots:
        for spec in dict.fromkeys((*(specs if "fold" in states else ()), *paired)):
            found += keys.restore_keys(spec, w) if spec.gate else ()
    normed = tuple(norm for norm in norms if norm is not None)
    calls = Calls(rows_of_training, dtypes, normed, apart, latents, rounds, outs)
    found += [key for spec, fmt in chosen for key in training_keys(spec, fmt, calls)]
    never = keys.PlanKey, keys.RestoreKey

    def dependent(key: object) -> bool:
        return supports_pdl(gpu) and (isinstance(key, TrainingKey) or (pdl is not False and not isinstance(key, never)))

    return prepare(found, gpu, dependent, workers)


def _tables(plans: tuple[str, ...]) -> tuple[str, ...]:
    """How kernels of a `WindowState` read its tables: what is of an engine elsewhere may be plain here."""
    return tuple(dict.fromkeys((*plans, *["plain"] * ("engine" in plans))))


def _gpu(device: torch.device | str | int | None, interpreted: bool) -> torch.device:
    if interpreted:
        raise RuntimeError("warmup compiles for a GPU, but TRITON_INTERPRET is set and kernels are interpreted")
    if not torch.cuda.is_available():
        raise RuntimeError("warmup compiles for the GPU of this machine, and torch finds none")
    found = torch.device("cuda") if device is None else usable_device("device", device)
    if found.type != "cuda":
        raise ValueError(f"device must be a CUDA or HIP device, got {found}")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def _stored(
    i: int, pair: tuple[RecordFormat | None, ...], specs: tuple[CompressorSpec, ...]
) -> list[tuple[CompressorSpec, RecordFormat, RecordFormat]]:
    """One of `also`, with each of the specs that both are defined for."""
    if len(pair) != 2 or None in pair:
        raise ValueError(f"also[{i}] must be the names of two formats, got {[fmt and fmt.name for fmt in pair]}")
    first, second = pair
    found = [(spec, first, second) for spec in specs if fits(spec, first) and fits(spec, second)]
    if not found:
        raise ValueError(f"also[{i}] must be defined for one of the specs at least, got {first.name!r} and {second.name!r}")
    return found


def _pair(i: int, pair: object) -> tuple[tuple[CompressorSpec, RecordFormat | None], ...]:
    """One of `many`, with its formats looked up."""
    name = f"many[{i}]"
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(one, tuple) and len(one) == 2 for one in pair):
        raise TypeError(f"{name} must be a pair of (spec, format) tuples, got {pair!r}")
    found = []
    for spec, fmt in pair:
        check_type(name, spec, CompressorSpec)
        (known,) = check_formats(name, (fmt,))
        if known is not None:
            try:
                known.check(spec)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        found.append((spec, known))
    if found[0][0].ratio != found[1][0].ratio:
        raise ValueError(f"{name} must have one ratio, got {found[0][0].ratio} and {found[1][0].ratio}")
    return tuple(found)
