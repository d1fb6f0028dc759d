"""Calls that engines make, by name: what `kvfold warmup` and `kvfold prebuild` compile."""

from __future__ import annotations

from typing import Any

import torch

from ..spec import V4_CSA, V4_HCA, V4_INDEXER

MAIN, KEYS = "fp8_ds_mla", "indexer_mxfp4"


def _v4(norm: torch.dtype) -> dict[str, Any]:
    """Layers in `FoldState`, decode of up to 4 tokens a step, and prompts of any length: the example of `warmup`."""
    pair = ((V4_CSA, MAIN), (V4_INDEXER, KEYS))
    return {
        "specs": (V4_HCA, V4_CSA), "formats": (MAIN,), "max_new_tokens": (1, 4, 8192), "norm_weight_dtypes": (norm,),
        "many": (pair,),
    }  # fmt: skip


def _projected(norm: torch.dtype) -> dict[str, Any]:
    """The same from hidden states on, of V4-Flash and V4-Pro."""
    return _v4(norm) | {"dtypes": (), "hidden_dims": (4096, 7168)}


# By name, the arguments of each call of `warmup`, for norm weights in bf16 and in fp32.
SETS: dict[str, tuple[dict[str, Any], ...]] = {
    "v4": (_v4(torch.bfloat16), _v4(torch.float32)),
    "v4-project": (_projected(torch.bfloat16), _projected(torch.float32)),
}
