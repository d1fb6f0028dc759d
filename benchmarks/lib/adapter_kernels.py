"""Which kernels adapters call in the steps of `adapter_steps` and in a model of transformers, to compile them beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

import kvfold
from kvfold.backend_triton.keys import Key, plan_key, step_key, window_key
from kvfold.backend_triton.table import BUCKETS, MULTIPROCESSORS, item_bucket
from kvfold.integrations.tensorrt_llm.kernel import PostprocessKey
from kvfold.integrations.tensorrt_llm.pooling import pooling_spec
from kvfold.integrations.tensorrt_llm.postprocess import FORMATS_BY_TYPE, finishing_spec, with_scales_apart
from kvfold.storage.fold_state import state_kind
from kvfold.storage.formats import FORMATS

from .adapter_trtllm import INDEXER, MAIN, PAGE

BF16, FP32 = torch.bfloat16, torch.float32
PLAIN = {FP32: "fp32", BF16: "bf16"}
LONG = 1 << 20
SPECS = {"r128": kvfold.V4_HCA, "r4": kvfold.V4_CSA, "indexer": kvfold.V4_INDEXER}


def adapter_keys() -> dict[str, Key]:
    """By what needs them: "adapters ENGINE ..."."""
    found = {**dict(_vllm()), **dict(_sglang()), **dict(_trtllm()), **dict(_transformers())}
    for ratio, windows in product((4, 128), (1, LONG)):
        found[f"plan r{ratio} {windows}"] = plan_key(ratio, windows, True, True, True)
        found[f"plan r{ratio} {windows} plain"] = plan_key(ratio, windows, False, False)
    return {f"adapters {name}": key for name, key in found.items()}


def _vllm() -> Iterator[tuple[str, Key]]:
    for (name, spec), new in product(SPECS.items(), (1, 4, LONG)):
        fmt = FORMATS["indexer_fp8_vllm" if name == "indexer" else "fp8_ds_mla_vllm_triton"]
        spec, types = replace(spec, hadamard=False), (FP32, FP32, None, FP32, True)
        yield f"vllm window {name} n{new}", window_key(spec, fmt, new, types, 8 if name == "r128" else 4, "engine")
        for bucket in BUCKETS if name == "r128" else ():
            yield f"vllm fold {name} n{new} {bucket}", step_key(spec, fmt, "fold", new, types, bucket=bucket)


def _sglang() -> Iterator[tuple[str, Key]]:
    for (name, spec), new in product(SPECS.items(), (1, 4, LONG)):
        fmt = FORMATS["indexer_fp8_sglang" if name == "indexer" else "fp8_ds_mla_sglang"]
        spec, types = replace(spec, norm_eps=3e-6), (FP32, FP32, None, FP32, True)
        yield f"sglang pools {name} n{new}", window_key(spec, fmt, new, types, spec.ratio, "ring")
        if spec.overlap:
            yield f"sglang fold {name} n{new}", step_key(spec, fmt, "rows", new, types, True)
        for bucket in () if spec.overlap else BUCKETS:
            yield f"sglang fold {name} n{new} {bucket}", step_key(spec, fmt, "fold", new, types, bucket=bucket)


def _trtllm() -> Iterator[tuple[str, Key]]:
    for name, spec in SPECS.items():
        dim, ratio, rotated = spec.head_dim, spec.ratio, spec.hadamard
        fmt = FORMATS[FORMATS_BY_TYPE[INDEXER if rotated else MAIN]]
        pooled = BF16, FP32, BF16, None, False
        yield f"trtllm pool {name}", window_key(pooling_spec(dim, ratio), None, 4, pooled, PAGE, "engine")
        finish = finishing_spec(dim, dim - 64, 64, 1e-6, rotated)
        yield (
            f"trtllm finish {name}",
            PostprocessKey(finish, fmt, with_scales_apart(fmt) if rotated else None, BF16, BF16),
        )
        if not rotated:
            types = BF16, FP32, None, BF16, True
            yield f"trtllm records {name}", window_key(pooling_spec(dim, ratio, 64), fmt, 4, types, PAGE, "plain")


def _transformers() -> Iterator[tuple[str, Key]]:
    """Of prompts of up to 4000 tokens, pieces of them, and one token; values and scores are two tensors."""
    for (name, spec), dtype, new in product(SPECS.items(), (FP32, BF16), (1, 8, LONG)):
        kind = state_kind(spec)
        types = dtype, FP32 if kind == "fold" else dtype, None, dtype, True, False, True
        bucket = item_bucket(2000 // spec.ratio + 1, MULTIPROCESSORS, BUCKETS)
        key = step_key(replace(spec, hadamard=False), FORMATS[PLAIN[dtype]], kind, new, types, bucket=bucket)
        yield f"transformers {name} {PLAIN[dtype]} n{new}", key
