"""Compiles what the benchmarks need on all cores, into Triton's cache: time on a rented GPU is for measuring.

python -m benchmarks.run.precompile [--target sm_90] [--only WORDS,WORDS] [--ordinary]       needs no GPU
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import torch
import triton

import kvfold
from kvfold.backend_triton.keys import (
    AddKey,
    DequantizeKey,
    Key,
    PairKey,
    ProjectKey,
    StepKey,
    StoreKey,
    WindowKey,
    kind_of,
    plan_key,
    step_key,
    store_key,
    window_key,
)
from kvfold.backend_triton.table import BUCKETS, MULTIPROCESSORS, SCALED, TILINGS, item_bucket, pair_buckets
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import TARGETS
from kvfold.storage.fold_state import state_kind
from kvfold.storage.formats import FORMATS
from kvfold.training import problem
from kvfold.training.keys import keys_of as training_keys_of

from ..lib import models, protocol, v41
from ..lib.adapter_kernels import adapter_keys
from ..lib.floor import PAGE_SIZE
from ..lib.protocol import Case, Variant
from . import decode, launches, metadata, overhead, parallel, prefill, store, training
from .v41 import name_of

BF16, FP32 = torch.bfloat16, torch.float32
HIDDEN_DIMS = (4096, 7168)  # of V4-Flash and V4-Pro
WAYS = (False, True)  # a call is launched in: as a dependent or not


def key_of(case: Case, variant: Variant, pooled: torch.dtype = BF16) -> StepKey | PairKey | WindowKey:
    """Of the call that a benchmark makes of a case. pooled: dtype of the rows, where there is no cache."""
    specs = variant.specs(case)
    formats = [None if output == "rows" else FORMATS[output] for output in variant.outputs]
    rows, weight = (pooled, None) if formats[0] is None else (None, FP32)
    if variant.state == "window":
        return window_key(specs[0], formats[0], case.new, (BF16, FP32, rows, weight, True), PAGE_SIZE)
    buckets = BUCKETS if len(specs) == 1 else pair_buckets({state_kind(spec) for spec in specs})
    bucket = item_bucket(case.windows, MULTIPROCESSORS, buckets)
    found = []
    for spec, fmt in zip(specs, formats, strict=True):
        kind = state_kind(spec)
        types = (BF16, FP32 if kind == "fold" else BF16, rows, weight, True)
        found.append(step_key(spec, fmt, kind, case.new, types, bucket=bucket))
    return found[0] if len(found) == 1 else PairKey(*found)


def layer_keys(case: Case, state: str) -> tuple[StepKey | WindowKey, StoreKey]:
    """Of the two launches of a source layer of V4.1. state: of `v41.STATES`, for ratio 2."""
    spec, fmt, found = case.spec, FORMATS[v41.MAIN], store_key(v41.key_spec(case.ratio), FORMATS[v41.KEY], (BF16, FP32))
    if spec.gate and state == "ring":
        return window_key(spec, fmt, case.new, (BF16, FP32, None, FP32, True, True), v41.RING, "ring"), found
    bucket = item_bucket(case.windows, MULTIPROCESSORS, BUCKETS)
    types = (BF16, BF16 if spec.gate else None, None, FP32, True, True)
    return step_key(spec, fmt, kind_of(spec), case.new, types, bucket=bucket), found


def engine_keys() -> dict[str, Key]:
    """Of the calls that `v41`, `metadata` and `store --places` make, and of their plans."""
    found: dict[str, Key] = {}
    for cases in v41.cases():
        for state in v41.STATES:
            for ratio, case in cases.items():
                for launch, key in zip(("compress", "store"), layer_keys(case, state), strict=True):
                    found[f"{name_of(case, f'r{ratio}')} {state} {launch}"] = key
    found |= {f"metadata {case.name} {variant.name}": key_of(case, variant) for case, variant in metadata.CALLS}
    for engine in (False, True):
        found |= {
            f"metadata plan r{case.ratio} {engine}": plan_key(case.ratio, 1, False, False, engine) for case in metadata.UPDATES
        }
        found[f"metadata plan of a prompt {engine}"] = plan_key(4, 1 << 20, False, False, engine)
        found[f"v41 plan r2 {engine}"] = plan_key(2, 1, False, False, engine)
    found |= {f"{what} plan r1": plan_key(1, windows, True, False) for what, windows in (("v41", 1), ("places", 1 << 20))}
    for spec, fmt in store.PLACED:
        for way, places in (("plan", ()), ("slots", (torch.int64, torch.int64))):
            found[f"places {fmt} {way}"] = store_key(spec, FORMATS[fmt], (BF16, FP32, *places))
    return found


def parallel_keys() -> dict[str, Key]:
    """Of the calls that `parallel` makes of its sequences over two GPUs or more, and the example, if its prompt is long."""
    found: dict[str, Key] = {}
    for case in parallel.CASES:
        # The whole, a rank's part, and the tail that is folded first: its plan is short, or of one or two windows.
        tail = case.ratio - 1 if case.ratio > 8 else 2 * case.ratio - 1
        for what, new, windows in (("main", 1 << 20, 1 << 20), ("tail", tail, 2), ("next step", 8, 3)):
            made = []
            for spec, fmt in case.compressors:
                kind, ends = state_kind(spec), what != "tail"
                types = (BF16, FP32 if kind == "fold" else BF16, None, FP32 if ends else None, ends)
                bucket = item_bucket(windows, MULTIPROCESSORS, BUCKETS)
                made.append(step_key(spec, FORMATS[fmt] if ends else None, kind, new, types, bucket=bucket))
            found |= {f"{case.name} {what} {i}": key for i, key in enumerate(made)}
            if len(made) > 1:
                found[f"{case.name} {what}"] = PairKey(*made)
        found |= {f"{case.name} plan {n} {no}": plan_key(case.ratio, n, False, no) for n in (1, 1 << 20) for no in WAYS}
        if len(case.compressors) == 1:
            how = problem.How(case.compressors[0][0], True, BF16, None, False, "")
            for tokens in (case.ratio, 2 * case.ratio, 3 * case.ratio, 50_000, 100_003, 1 << 16, 1 << 17, 1 << 18):
                for runs in WAYS:
                    trained = training_keys_of(how, (BF16, False, FP32), tokens // case.ratio, runs)
                    found |= {f"train {case.name} {tokens} {runs} {kernel}": key for kernel, key in trained.items()}
    return {f"parallel {name}": key for name, key in found.items()}


def model_keys() -> dict[str, Key]:
    """Of the calls that `model_step` makes, and of its plans."""
    found: dict[str, Key] = {}
    for case in (*models.step_cases(), *models.prompt_cases()):
        found |= {f"step {case.name} r{layer.ratio}": key_of(layer, models.VARIANTS[layer.ratio]) for layer in case.layers}
    for ratio in models.VARIANTS:
        for what, windows in (("step", 1), ("step prompt", 1 << 20)):
            found[f"{what} plan r{ratio}"] = plan_key(ratio, windows, False, False)
    return found


def project_keys() -> dict[str, Key]:
    """Of the calls of `project_compress` and `project_compress_many` in a step of V4, by both models' hidden_dim."""
    found: dict[str, Key] = {}
    stored = ((FP32, False), (BF16, True))
    rows = [(config, False) for config in TILINGS] + [(config, True) for config in SCALED]
    for width, (i, (config, fp8)), (sums, rounded) in product(HIDDEN_DIMS, enumerate(rows), stored):
        if config.parts == 1 or not rounded:
            for tensors in (1, 2):
                found[f"project h{width} row {i} {sums} {tensors}"] = ProjectKey(width, config, tensors, sums, rounded, fp8)
        if config.parts > 1:
            found[f"project sum of {config.parts} {sums}"] = AddKey(config.parts, sums, rounded)
    found |= {f"project h{width} before {n}": DequantizeKey(width, n) for width, n in product(HIDDEN_DIMS, (1, 2))}
    main, indexer = FORMATS["fp8_ds_mla"], FORMATS["indexer_mxfp4"]
    for new, batch in product((1, 4), (1, 16, 64, 256)):
        types = (FP32, FP32, None, FP32, True)
        found[f"project r128 b{batch} n{new}"] = step_key(kvfold.V4_HCA, main, "fold", new, types)
        bucket = item_bucket(2 * batch, MULTIPROCESSORS, pair_buckets({"rows"}))
        found[f"project r4 b{batch} n{new}"] = PairKey(
            step_key(kvfold.V4_CSA, main, "rows", new, types, bucket=bucket),
            step_key(kvfold.V4_INDEXER, indexer, "rows", new, types, bucket=bucket),
        )
    return found


def keys(only: str = "") -> list[Key]:
    """Of the calls of `decode`, `prefill`, `launches`, `training`, `model_step` and those of an engine, by what needs them.

    only: rows whose name has one of these, separated by commas, in it.
    """
    found: dict[str, Key] = {}
    for bench in (decode, prefill):
        kind, variants = bench.__name__.rpartition(".")[2], [Variant.parse(name) for name in bench.DEFAULT.split(",")]
        fitting = [(case, variant) for case in protocol.cases() for variant in variants if variant.fits(case)]
        found |= {f"{kind} {case.name} {variant.name}": key_of(case, variant) for case, variant in fitting if case.kind == kind}
    for case, names in overhead.HOST:
        found |= {f"host {case.name} {name}": key_of(case, Variant.parse(name)) for name in names}
    # These pool rows in fp32.
    found["window_reduction"] = window_key(kvfold.V4_HCA, None, 4, (BF16, FP32, FP32, None, True), PAGE_SIZE)
    found |= {f"launches {case.name}": key_of(case, launches.POOL, FP32) for case in launches.CASES}
    for spec in (kvfold.V4_HCA, kvfold.V4_CSA):
        found[f"launches store r{spec.ratio}"] = store_key(spec, FORMATS[launches.FORMAT], (FP32, FP32))
    found |= engine_keys() | model_keys() | project_keys()
    if "parallel" in only:
        found |= parallel_keys()
    if "adapters" in only:
        found |= adapter_keys()
    for case in training.cases():
        found |= {f"{case.name} {kernel}": key for kernel, key in training.keys_of(case).items()}
        found |= {f"{case.name} quant {kernel}": key for kernel, key in training.keys_of(case, quantized=True).items()}
        if "sweep" in only:  # what `training --sweep` times, and nobody else
            for kernel, told, _ in training.other_rows(case):
                found |= {f"sweep {case.name} {kernel} {told}: {name}": key for name, key in training.keys_of(case).items()}
    return list(dict.fromkeys(key for name, key in found.items() if any(words in name for words in only.split(","))))


def build(job: tuple[Key, bool, str]) -> None:
    key, pdl, target = job
    variant_of(key, True, pdl).compile(TARGETS[target])


def compile_all(wanted: list[Key], target: str, ways: tuple[bool, ...] = WAYS) -> str:
    """All at once, in both ways or in one; a kernel that fails ends it. Returns what was done."""
    start, jobs = time.perf_counter(), [(key, pdl, target) for key in wanted for pdl in ways]
    with ProcessPoolExecutor() as pool:
        list(pool.map(build, jobs))
    return f"{len(jobs)} kernels by Triton {triton.__version__} in {time.perf_counter() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--only", default="", help="rows of `compare` whose name has one of these, separated by commas, in it")
    parser.add_argument("--ordinary", action="store_true", help="not as dependent launches too")
    args = parser.parse_args()
    print(compile_all(keys(args.only), args.target, WAYS[: 1 + (not args.ordinary)]))


if __name__ == "__main__":
    main()
