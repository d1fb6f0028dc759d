"""Switching kvfold on in SGLang: `load`, which SGLang finds as an entry point, and `register`, for code."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

from ...contract import UnsupportedError
from .. import switch

VERSION = "0.5.23"
STATES = ("pools", "fold")

_DSV4 = "sglang.srt.layers.attention.dsv4."
_BACKEND = "sglang.srt.layers.attention.deepseek_v4_backend."
_POOL = "sglang.srt.mem_cache.deepseek_v4_memory_pool.DeepSeekV4TokenToKVPool."


def load() -> None:
    """SGLang's entry point: `register` if `KVFOLD_ENGINES` has sglang and kvfold is not on yet; else SGLang is not imported.

    `sglang:fold` is `register("fold")`.

    Raises:
        ValueError, ImportError, UnsupportedError: as `register`. SGLang logs it and goes on with its own kernels.
    """
    if switch.asked_for("sglang") and "sglang" not in switch.ON:
        register(switch.state_for("sglang", STATES))


def register(state: str = "pools") -> None:
    """Hands SGLang's compressors of DeepSeek-V4 and V4.1 to kvfold, in this process.

    Call it before SGLang makes its pools; the entry point does. Once is enough, and there is no way back.

    Args:
        state: `"pools"`: SGLang's own state pools, in place. `"fold"`: kvfold's state in pools of SGLang's kind.

    Raises:
        ValueError: naming `state`.
        ImportError: SGLang is not installed.
        UnsupportedError: another version of SGLang, or a platform on which it uses other kernels.
    """
    if state not in STATES:
        raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}")
    if "sglang" in switch.ON:
        raise ValueError(f"kvfold must be registered once, and is already on in SGLang: {switch.ON['sglang']}")
    _check_engine()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = _hooks(HookType) + (_fold_hooks(HookType) if state == "fold" else [])
    for target, _, _ in hooks:
        _resolve(target)  # SGLang only logs a hook that it cannot apply
    for target, hook, kind in hooks:
        HookRegistry.register(target, hook, kind)
    HookRegistry.apply_hooks()
    switch.ON["sglang"] = f'compressors of V4 and V4.1, state="{state}" ({len(hooks)} hooks)'


def _check_engine() -> None:
    try:
        found = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"sglang must be installed to plug kvfold into it; version {VERSION} is what it knows") from None
    if found != VERSION:
        raise UnsupportedError(f"sglang must be version {VERSION}, whose metadata and pools kvfold knows, got {found}")
    from sglang.srt.utils import is_hip, is_npu, is_xpu

    for platform, there in (("ROCm", is_hip()), ("Ascend", is_npu()), ("XPU", is_xpu())):
        if there:
            raise UnsupportedError(f"sglang must run on CUDA, whose backend kvfold knows, got {platform}")


def _resolve(target: str) -> Any:
    """The module, class or function behind a dotted path.

    Raises:
        UnsupportedError: there is none of this name.
    """
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name is not None and target.startswith(error.name):
                continue
            raise
        for name in parts[cut:]:
            found = getattr(found, name, None)
        if found is not None:
            return found
        break
    raise UnsupportedError(f"sglang must have {target}, which kvfold replaces, got none")


def _hooks(kind: Any) -> list[tuple[str, Callable[..., Any], Any]]:
    from . import forward, layer, low_ratio, step

    return [
        (_DSV4 + "compressor_v2.create_paged_compressor_data", step.create_step, kind.REPLACE),
        (
            _DSV4 + "compressor_v2.CompressorBackendMixin._forward_compress_all_in_one",
            forward.compress_all_in_one,
            kind.REPLACE,
        ),
        (_DSV4 + "compressor_trtllm.forward_compress_uniform_fp8", forward.compress_uniform_fp8, kind.REPLACE),
        (_DSV4 + "compressor.Compressor._apply_ape_hotfix", layer.refresh_ape, kind.AFTER),
        (_DSV4 + "online_c128_mtp.OnlineC128MTPController.write_prefix_states", _nothing, kind.REPLACE),
        (_BACKEND + "DSV4Metadata.__init__", forward.bind_metadata, kind.AFTER),
        (_BACKEND + "DeepseekV4AttnBackend.make_forward_metadata_from_raw_verify", step.verify, kind.AROUND),
        (_BACKEND + "DeepseekV4AttnBackend._make_target_verify_c128_metadata", step.verify, kind.AROUND),
        (_BACKEND + "DeepseekV4AttnBackend._low_ratio_compress", low_ratio.compress_low_ratio, kind.REPLACE),
    ]


def _fold_hooks(kind: Any) -> list[tuple[str, Callable[..., Any], Any]]:
    from . import low_ratio, pool_hooks

    return [
        (_POOL + "_make_compress_state_pool", pool_hooks.make_state_pool, kind.REPLACE),
        (_POOL + "_make_pair_state_pool", pool_hooks.make_pair_state_pool, kind.REPLACE),
        (_POOL + "get_request_state_buf_infos", pool_hooks.request_state_buf_infos, kind.REPLACE),
        (_POOL + "request_state_transfer_indices", pool_hooks.request_state_transfer_indices, kind.REPLACE),
        (_POOL + "clear_request_scoped_state", pool_hooks.clear_request_state, kind.REPLACE),
        (_POOL + "clear_unaccepted_c128_draft_states", pool_hooks.clear_drafts, kind.REPLACE),
        (_BACKEND + "DeepseekV4AttnBackend._low_ratio_compress_fused", low_ratio.refuse, kind.REPLACE),
        (_BACKEND + "DeepseekV4AttnBackend._low_ratio_compress_torch", low_ratio.refuse, kind.REPLACE),
    ]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of SGLang's writing of drafts into banks: the step that folded them has done it."""
