"""`register`: puts kvfold's classes where vLLM looks for its own."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

from ...contract import UnsupportedError
from ..switch import ON
from .plans import ERRORS

STATES = ("window", "fold")
TESTED = "0.33.0"

# What the classes here build on: modules of vLLM, and of each the names and the parameters that must be there.
NEEDED = {
    "vllm.models.deepseek_v4.compressor": {
        "DeepseekCompressor.forward": ("self", "kv_score", "positions", "rotary_emb"),
        "CompressorMetadataBuilder.build": ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "CompressorStateCache.get_kv_cache_spec": ("self", "vllm_config"),
    },
    "vllm.models.deepseek_v4.attention": {"DeepseekCompressor": None},
    "vllm.models.deepseek_v4.sparse_mla": {
        "DeepseekV4SparseMLAMetadataBuilder.build": ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    },
    "vllm.models.deepseek_v41.compressor": {
        "DeepseekCompressor.forward": ("self", "kv_score", "positions"),
        "DeepseekCompressor.insert_cache": ("self", "latent", "positions", "rotary_emb"),
        "CompressorMetadataBuilder.build": ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    },
    "vllm.models.deepseek_v41.attention": {"DeepseekCompressor": None},
    "vllm.v1.attention.backends.mla.indexer": {
        "DeepseekV32IndexerMetadataBuilder.build": ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
    },
}

_saved: list[tuple[Any, str, Any]] = []  # holder, name, vLLM's own
_state: str | None = None


def register(state: str = "window", *, backend: str | None = None) -> None:
    """Makes vLLM build its DeepSeek-V4 and V4.1 compressors from kvfold's classes, in this process.

    Models that are built afterwards have them; call it before `vllm.LLM(...)`, in every process that runs a worker (the entry
    point does). What vLLM computes before `kv_score`, and every cache, page and table, stays vLLM's. Called again with the
    same arguments it does nothing.

    Args:
        state: where compressors keep what a later step reads. "window": vLLM's own pages of raw rows, the same bytes as
            without kvfold. "fold": ratio 128 keeps kvfold's fold rows, one page for each request instead of 16 or 17 blocks of
            raw rows; ratio 4 and V4.1 stay with vLLM's pages.
        backend: as for `kvfold.compress`; None is Triton on a GPU.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: `state` is none of these, or kvfold is registered with another.
        UnsupportedError: this vLLM lacks a class or parameter that kvfold builds on; or it runs on a platform whose compressors
            are not those that kvfold replaces (ROCm, XPU, CPU). A vLLM configuration that is not supported is refused when the
            model is built.
    """
    global _state
    if state not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}")
    if _state is not None:
        if _state != state:
            raise ValueError(f"state must be {_state!r}, with which kvfold is registered in vLLM already, got {state!r}")
        return
    modules = _modules()
    _check_platform()
    from . import hooks, v4, v41

    v4.options.update(state=state, backend=backend)
    v4_module, v41_module = (modules[f"vllm.models.deepseek_{name}.compressor"] for name in ("v4", "v41"))
    _replace(modules["vllm.models.deepseek_v4.attention"], "DeepseekCompressor", v4.Compressor)
    _replace(v4_module, "CompressorMetadataBuilder", v4.MetadataBuilder)
    if state == "fold":
        _replace(v4_module, "CompressorStateCache", v4.FoldStateCache)
    _replace(modules["vllm.models.deepseek_v41.attention"], "DeepseekCompressor", v41.Compressor)
    _replace(v41_module, "CompressorMetadataBuilder", v41.MetadataBuilder)
    for holder in (
        modules["vllm.models.deepseek_v4.sparse_mla"].DeepseekV4SparseMLAMetadataBuilder,
        modules["vllm.v1.attention.backends.mla.indexer"].DeepseekV32IndexerMetadataBuilder,
    ):
        _replace(holder, "build", hooks.tell_slots(holder.build))
    _state = state
    kept = "vLLM's pages of raw rows" if state == "window" else "fold rows at ratio 128, vLLM's raw rows elsewhere"
    ON["vllm"] = f"the compressors of DeepSeek-V4 and V4.1; state: {kept}"


def unregister() -> None:
    """Gives vLLM its own classes back; models that were built in between keep kvfold's. Not registered: does nothing."""
    global _state
    ERRORS.clear()
    while _saved:
        holder, name, value = _saved.pop()
        setattr(holder, name, value)
    _state = None
    ON.pop("vllm", None)


def refused() -> int:
    """How many sequences and entries kvfold refused in this process, 0 unless something is wrong (docs/engine.md, 6).

    Waits for the GPU; not for a step.
    """
    return ERRORS.total()


def _modules() -> dict[str, ModuleType]:
    """vLLM's modules, once everything in NEEDED was found."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ImportError(f"vllm must be installed to plug kvfold into it (tested: {TESTED}): {error}") from error
    found = {}
    for name, needed in NEEDED.items():
        try:
            module = found[name] = importlib.import_module(name)
        except ImportError as error:
            raise _unlike(f"{name} cannot be imported ({error})") from error
        for path, parameters in needed.items():
            value: Any = module
            for part in path.split("."):
                value = getattr(value, part, None)
            if value is None:
                raise _unlike(f"{name} has no {path}")
            if parameters is not None and tuple(inspect.signature(value).parameters) != parameters:
                raise _unlike(f"{name}: {path} does not take {', '.join(parameters[1:])}")
    return found


def _unlike(what: str) -> UnsupportedError:
    from importlib.metadata import PackageNotFoundError, version

    try:
        have = version("vllm")
    except PackageNotFoundError:
        have = "of unknown version"
    return UnsupportedError(f"vllm {have} is unlike the one that kvfold was written for ({TESTED}): {what}")


def _check_platform() -> None:
    from vllm.platforms import current_platform

    for name in ("rocm", "xpu", "cpu", "tpu"):
        if getattr(current_platform, f"is_{name}", bool)():
            raise UnsupportedError(
                f"vllm must run on CUDA: its compressors on {name} are classes of their own, kept as they are"
            )


def _replace(holder: Any, name: str, value: Any) -> None:
    _saved.append((holder, name, getattr(holder, name)))
    setattr(holder, name, value)
