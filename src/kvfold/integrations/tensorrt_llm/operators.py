"""The three operators under TensorRT-LLM's own names and schemas: `register`, `load` and `unregister`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import torch

from ..switch import ON, asked_for, state_for
from .kept import forget
from .pooling import paged_kv_compress, prefill_reduction
from .postprocess import postprocess_scatter

ENGINE, NAMESPACE = "tensorrt_llm", "trtllm"
_POOLS = (
    "Tensor kv_score, Tensor ape, Tensor(a!) paged_kv, Tensor(b!) paged_score, Tensor block_table_kv, "
    "Tensor block_table_score, Tensor(c!) output, Tensor kv_lens"
)
_SHAPE = "int batch_size, int page_size, int head_dim, int compress_ratio"
_ROWS = (
    "Tensor kv_comp, Tensor(a!)? kv_out, Tensor rms_weight, float rms_eps, Tensor cos_sin_table, Tensor position_ids, "
    "int nope_dim, int rope_dim, Tensor(b!) kv_cache"
)
_PLACES = "Tensor num_outputs, Tensor cu_kv_comp, Tensor start_pos, Tensor block_offsets, Tensor compressed_mask"
_HOW = "int tokens_per_block, int cache_scale_type"
_LAST = "bool rotate_activation, Tensor({}!)? quant_output, Tensor({}!)? scale_output"

IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "compressor_paged_kv_compress": paged_kv_compress,
    "compressor_prefill_reduction": prefill_reduction,
    "compressor_postprocess_scatter": postprocess_scatter,
}
_library: torch.library.Library | None = None


def schemas(nvfp4: bool = False) -> dict[str, str]:
    """The arguments of each operator. nvfp4: of the revisions that can store NVFP4, where the last operator takes two more."""
    scales, factor, letters = (", Tensor(c!)? kv_cache_scale", ", float nvfp4_global_scale", "de") if nvfp4 else ("", "", "cd")
    new = "int next_n, Tensor? new_tokens_per_seq=None"
    return {
        "compressor_paged_kv_compress": f"{_POOLS}, Tensor cu_seq_lens, Tensor cu_kv_comp, {_SHAPE}, {new}",
        "compressor_prefill_reduction": (
            f"{_POOLS}, Tensor start_pos, Tensor cu_seq_lens, Tensor cu_kv_comp, {_SHAPE}, int max_outputs"
        ),
        "compressor_postprocess_scatter": f"{_ROWS}{scales}, {_PLACES}, {_HOW}{factor}, {_LAST.format(*letters)}",
    }


def register(*, replace: bool = False, nvfp4: bool = False) -> None:
    """Makes `torch.ops.trtllm.compressor_*` kvfold's, for CUDA and CPU tensors. A second call does nothing.

    If `tensorrt_llm` is installed, import it before: torch lets nobody define an operator twice, so its import would fail
    afterwards.

    Args:
        replace: take over operators that another library has defined; their schemas stay as they are.
        nvfp4: if nobody has defined them, use the schema that can store NVFP4.

    Raises:
        RuntimeError: an operator is defined, and `replace` is false; or it takes an argument that kvfold does not know.
    """
    global _library
    if _library is not None:
        return
    there = {name: found for name in IMPLEMENTATIONS if (found := _defined(name)) is not None}
    if there and not replace:
        raise RuntimeError(f"torch.ops.{NAMESPACE}.{next(iter(there))} is defined by another library: register(replace=True)")
    if not there and ENGINE not in sys.modules and importlib.util.find_spec(ENGINE) is not None:
        raise RuntimeError("tensorrt_llm must be imported before register(), as it defines the operators itself")
    for name, schema in there.items():
        _check_arguments(name, schema)
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    wanted = schemas(nvfp4)
    for name, function in IMPLEMENTATIONS.items():
        if name not in there:
            library.define(f"{name}({wanted[name]}) -> ()")
            torch.library.register_fake(f"{NAMESPACE}::{name}", _nothing, lib=library)
        called = _by_name(function, [one.name for one in _defined(name).arguments])
        for device in ("CUDA", "CPU"):
            library.impl(name, called, device)
    _library = library
    ON[ENGINE] = f"{len(IMPLEMENTATIONS)} operators {NAMESPACE}::compressor_*" + (", taken over" if there else "")


def load() -> None:
    """`register(replace=True)` where `KVFOLD_ENGINES` has `tensorrt_llm`, and nothing elsewhere."""
    if asked_for(ENGINE):
        state_for(ENGINE, ("window",))  # there is no other
        register(replace=True)


def unregister() -> None:
    """Takes back what `register` did: operators that were another library's are again. Forgets all states and plans."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None
        del ON[ENGINE]
    forget()


def _defined(name: str) -> torch._C.FunctionSchema | None:
    """The schema of an operator, whoever defined it."""
    found = torch._C._jit_get_schemas_for_operator(f"{NAMESPACE}::{name}")
    return found[0] if found else None


def _check_arguments(name: str, schema: torch._C.FunctionSchema) -> None:
    given = [one.name for one in schema.arguments]
    known = {one.split("=")[0].split()[-1] for one in schemas(nvfp4=True)[name].split(", ")}
    needed = {one.split()[-1] for one in schemas()[name].split(", ") if "=" not in one}
    for one in (*(x for x in given if x not in known), *sorted(needed - {*given})):
        what = "takes" if one in given else "does not take"
        raise RuntimeError(f"{NAMESPACE}::{name} {what} {one!r}: a revision of TensorRT-LLM that kvfold does not know")


def _by_name(function: Callable[..., None], names: list[str]) -> Callable[..., None]:
    """By position as this schema has it; revisions differ in the order."""

    def called(*args: object, **more: object) -> None:
        function(**dict(zip(names, args)), **more)  # noqa: B905 (those behind have defaults)

    return called


def _nothing(*args: object, **more: object) -> None:
    """What a fake call does: nothing is returned."""
