"""Calls that engines make, by name: what `kvfold warmup`, `kvfold prebuild` and `kvfold aot` compile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..spec import V4_CSA, V4_HCA, V4_INDEXER, V41_INDEX_K, V41_MAIN_R1, V41_MAIN_R2

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64
MAIN, KEYS = "fp8_ds_mla", "indexer_mxfp4"
STEPS = (1, 4, 8192)  # new tokens of a sequence: decode with up to 3 drafts, and prompts

Calls = tuple[dict[str, Any], ...]


def _v4(norm: torch.dtype) -> dict[str, Any]:
    """Layers in `FoldState`, decode of up to 4 tokens a step, and prompts of any length: the example of `warmup`."""
    pair = ((V4_CSA, MAIN), (V4_INDEXER, KEYS))
    return {
        "specs": (V4_HCA, V4_CSA), "formats": (MAIN,), "max_new_tokens": STEPS, "norm_weight_dtypes": (norm,), "many": (pair,),
    }  # fmt: skip


def _projected(norm: torch.dtype) -> dict[str, Any]:
    """The same from hidden states on, of V4-Flash and V4-Pro."""
    return _v4(norm) | {"dtypes": (), "hidden_dims": (4096, 7168)}


def _projected_fp8(norm: torch.dtype) -> dict[str, Any]:
    return _projected(norm) | {"weights": ("fp8",)}


def _vllm(fold: bool) -> Calls:
    """V4 in vLLM, by kvfold's plug-in (docs/vllm.md): kv_score in fp32, blocks of 4 and 8 raw rows, index keys that are not
    rotated. fold: ratio 128 in fold rows."""
    specs = (V4_CSA, replace(V4_INDEXER, hadamard=False))
    told = {"dtypes": (FP32,), "max_new_tokens": STEPS, "norm_weight_dtypes": (BF16,), "plans": ("engine",), "pdl": False}
    rows = told | {"states": ("window",)}
    return (
        rows | {"specs": specs, "formats": (MAIN, "indexer_fp8_vllm", KEYS), "page_sizes": (4,)},
        (told if fold else rows | {"page_sizes": (8,)}) | {"specs": (V4_HCA,), "formats": (MAIN,)},
    )


def _vllm_v41() -> Calls:
    """V4.1 in vLLM: pooling in rings of raw rows, of which a normed row comes, and that row stored."""
    return (
        {
            "specs": (V41_MAIN_R2,), "formats": (None,), "dtypes": (FP32,), "max_new_tokens": STEPS, "states": ("window",),
            "norm_weight_dtypes": (BF16,), "latents": (True,), "page_sizes": (8,), "plans": ("engine", "ring"), "pdl": False,
        },
        {
            "specs": (V41_MAIN_R1, V41_MAIN_R2), "formats": ("fp8_ds_mla_v41",), "max_new_tokens": (), "states": (),
            "rows": (BF16,), "norm_weight_dtypes": (None,), "slot_dtypes": (INT64,), "plans": (), "pdl": False,
        },
    )  # fmt: skip


def _sglang(fold: bool) -> Calls:
    """V4 in SGLang, by kvfold's plug-in (docs/sglang.md): kv_score and norm weights in fp32, state in SGLang's rings of raw
    rows. fold: in fold rows and, at ratio 4, snapshots."""
    main, keys = "fp8_ds_mla_sglang", ("indexer_fp8_sglang", "indexer_mxfp4_sglang")
    told = {"dtypes": (FP32,), "max_new_tokens": STEPS}
    if fold:
        engine = told | {"plans": ("engine",)}
        return (
            engine | {"specs": (V4_HCA,), "formats": (main,)},
            engine | {"specs": (V4_CSA, V4_INDEXER), "formats": (main, *keys), "snapshots": (True,)},
        )
    specs = (V4_HCA, V4_CSA, V4_INDEXER)
    rings = {"specs": specs, "formats": (main, *keys), "states": ("window",), "page_sizes": (128,), "plans": ("ring",)}
    return told | rings, _plans(*specs)


def _sglang_v41(fold: bool) -> Calls:
    """V4.1 in SGLang: records and normed rows at once, and index keys stored by the same plan."""
    main, keys = {"formats": ("fp8_ds_mla_v41_sglang",), "latents": (True,)}, {"formats": ("indexer_mxfp4_v41_sglang",)}
    pairs = {"specs": (V41_MAIN_R2,), "dtypes": (FP32,), "apart": (True,), "max_new_tokens": STEPS, "pdl": False}
    pairs |= {"plans": ("engine",)} if fold else {"states": ("window",), "page_sizes": (8,), "plans": ("ring",)}
    return (
        main | pairs,
        main | {"specs": (V41_MAIN_R1,), "max_new_tokens": STEPS, "plans": ("engine",), "pdl": False},
        keys
        | {
            "specs": (V41_INDEX_K, replace(V41_INDEX_K, ratio=2, gate=True)),
            "max_new_tokens": (),
            "rows": (BF16,),
            "plans": (),
        },
        _plans(V41_MAIN_R2),
    )


def _plans(*specs: object) -> dict[str, Any]:
    """The plans alone of an engine's metadata."""
    return {"specs": specs, "formats": (None,), "max_new_tokens": (), "states": ("window",), "plans": ("engine",)}


# By name, the arguments of each call of `warmup`. Those that begin with "v4" are for norm weights in bf16 and in fp32.
SETS: dict[str, Calls] = {
    "v4": (_v4(BF16), _v4(FP32)),
    "v4-project": (_projected(BF16), _projected(FP32)),
    "v4-project-fp8": (_projected_fp8(BF16), _projected_fp8(FP32)),
    "vllm": _vllm(fold=False),
    "vllm-fold": _vllm(fold=True),
    "vllm-v41": _vllm_v41(),
    "sglang": _sglang(fold=False),
    "sglang-fold": _sglang(fold=True),
    "sglang-v41": _sglang_v41(fold=False),
    "sglang-v41-fold": _sglang_v41(fold=True),
}
