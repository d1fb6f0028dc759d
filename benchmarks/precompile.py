"""Compiles what the benchmarks need on all cores, into Triton's cache: time on a rented GPU is for measuring.

python benchmarks/precompile.py [--target sm_90]        needs no GPU
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from protocol import Case, Variant

import kvfold
from kvfold.kernels.aot import TARGETS
from kvfold.kernels.configs import ANY, FEW_ITEMS
from kvfold.kernels.variants import pair_key, step_key, variant_of, window_key
from kvfold.records import FORMATS
from kvfold.state import state_kind

BF16, FP32 = torch.bfloat16, torch.float32
PAGE_SIZE = 128  # of raw rows, as floor.py has it


def key_of(case: Case, variant: Variant) -> tuple:
    """Of the call that a benchmark makes of a case."""
    specs = variant.specs(case)
    formats = [None if output == "rows" else FORMATS[output] for output in variant.outputs]
    rows, weight = (BF16, None) if formats[0] is None else (None, FP32)
    if variant.state == "window":
        return window_key(specs[0], formats[0], case.new, (BF16, FP32, rows, weight, True), PAGE_SIZE)
    windows = sum((start + case.new - 1) // case.ratio - start // case.ratio + 1 for start in case.start_positions())
    items = FEW_ITEMS if len(specs) == 1 and windows <= FEW_ITEMS else ANY
    found = []
    for spec, fmt in zip(specs, formats, strict=True):
        kind = state_kind(spec)
        types = (BF16, FP32 if kind == "fold" else BF16, rows, weight, True)
        found.append(step_key(spec, fmt, kind, case.new, types, items=items))
    return found[0] if len(found) == 1 else pair_key(*found)


def keys() -> list[tuple]:
    """Of the calls that `decode.py`, `window_reduction.py` and `prefill.py` make: bf16 kv_score and kept rows, fp32 pools."""
    main, indexer, found = FORMATS["fp8_ds_mla"], FORMATS["indexer_fp8_vllm"], []
    for new in (1, 4, 8192):
        layer = []
        for spec, fmt in ((kvfold.V4_HCA, main), (kvfold.V4_CSA, main), (kvfold.V4_INDEXER, indexer)):
            kind = state_kind(spec)
            types = (BF16, FP32 if kind == "fold" else BF16, None, FP32, True)
            layer.append(step_key(spec, fmt, kind, new, types))
            found.append(step_key(spec, fmt, kind, new, types, items=FEW_ITEMS))
            if new < 8192 and spec is not kvfold.V4_INDEXER:
                found.append(window_key(spec, fmt, new, (BF16, FP32, None, FP32, True), PAGE_SIZE))
                found += [window_key(spec, None, new, (BF16, FP32, rows, None, True), PAGE_SIZE) for rows in (BF16, FP32)]
        found += [*layer, pair_key(layer[1], layer[2])]
    return list(dict.fromkeys(found))


def build(job: tuple[tuple, bool, str]) -> None:
    key, pdl, target = job
    variant_of(key, True, pdl).compile(TARGETS[target])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    target, start = parser.parse_args().target, time.perf_counter()
    jobs = [(key, pdl, target) for key in keys() for pdl in (False, True)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(build, jobs))
    print(f"{len(jobs)} kernels in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
