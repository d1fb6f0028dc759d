"""Compiles what the benchmarks need on all cores, into Triton's cache: time on a rented GPU is for measuring.

python benchmarks/precompile.py [--target sm_90]        needs no GPU
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor

import decode
import launches
import prefill
import protocol
import torch
import triton
from floor import PAGE_SIZE
from protocol import Case, Variant

import kvfold
from kvfold.backend_triton.kernels.pdl import AVAILABLE
from kvfold.backend_triton.table import BUCKETS, MULTIPROCESSORS, item_bucket, pair_buckets
from kvfold.backend_triton.variants import pair_key, step_key, store_key, variant_of, window_key
from kvfold.precompile.combinations import TARGETS
from kvfold.storage.fold_state import state_kind
from kvfold.storage.formats import FORMATS

BF16, FP32 = torch.bfloat16, torch.float32
WAYS = (False, True) if AVAILABLE else (False,)  # a call is launched in: as a dependent or not


def key_of(case: Case, variant: Variant, pooled: torch.dtype = BF16) -> tuple:
    """Of the call that a benchmark makes of a case. pooled: dtype of the rows, where there is no cache."""
    specs = variant.specs(case)
    formats = [None if output == "rows" else FORMATS[output] for output in variant.outputs]
    rows, weight = (pooled, None) if formats[0] is None else (None, FP32)
    if variant.state == "window":
        return window_key(specs[0], formats[0], case.new, (BF16, FP32, rows, weight, True), PAGE_SIZE)
    windows = sum((start + case.new - 1) // case.ratio - start // case.ratio + 1 for start in case.start_positions())
    buckets = BUCKETS if len(specs) == 1 else pair_buckets({state_kind(spec) for spec in specs})
    bucket = item_bucket(windows, MULTIPROCESSORS, buckets)
    found = []
    for spec, fmt in zip(specs, formats, strict=True):
        kind = state_kind(spec)
        types = (BF16, FP32 if kind == "fold" else BF16, rows, weight, True)
        found.append(step_key(spec, fmt, kind, case.new, types, bucket=bucket))
    return found[0] if len(found) == 1 else pair_key(*found)


def keys() -> list[tuple]:
    """Of the calls that `decode.py`, `prefill.py`, `launches.py` and `window_reduction.py` make."""
    variants = {bench.__name__: [Variant.parse(name) for name in bench.DEFAULT.split(",")] for bench in (decode, prefill)}
    found = [key_of(case, variant) for case in protocol.cases() for variant in variants[case.kind] if variant.fits(case)]
    # These pool rows in fp32.
    found.append(window_key(kvfold.V4_HCA, None, 4, (BF16, FP32, FP32, None, True), PAGE_SIZE))
    found += [key_of(case, launches.POOL, FP32) for case in launches.CASES]
    found += [store_key(spec, FORMATS[launches.FORMAT], (FP32, FP32)) for spec in (kvfold.V4_HCA, kvfold.V4_CSA)]
    return list(dict.fromkeys(found))


def build(job: tuple[tuple, bool, str]) -> None:
    key, pdl, target = job
    variant_of(key, True, pdl).compile(TARGETS[target])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    target, start = parser.parse_args().target, time.perf_counter()
    jobs = [(key, pdl, target) for key in keys() for pdl in WAYS]
    with ProcessPoolExecutor() as pool:
        list(pool.map(build, jobs))
    print(f"{len(jobs)} kernels by Triton {triton.__version__} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
