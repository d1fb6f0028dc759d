"""Times Triton's compiler kernel by kernel, without a GPU: the set v4 of `kvfold warmup`, and each other row of the table once.

python -m benchmarks.run.compile_time --out benchmarks/results/compile.jsonl
                                      [--target sm_90] [--only WORDS,WORDS] [--commit COMMIT] [--note WORDS]

One kernel at a time, into a cache of its own. Seconds: those of a core (`cpu_s`), with ptxas; those that Triton's compiler took
by the clock (`s`), more where others use the machine, and of these its coalescing pass (`coalesce_s`), by the timer of its
pass manager. What the pass has to do: `operations` of the kernel before
the pass, and those of them that read or write a block of memory (`accesses`). set: whether the kernel is one of the set v4,
which has each step twice: those for norm weights in bf16, and all but one of the plans of a ratio, are left out here. Then each
row of the table of projections, for V4-Pro, and training's kernels for 65,536 rows of bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import torch
import triton

from kvfold.backend_triton import table
from kvfold.backend_triton.build import Variant
from kvfold.backend_triton.keys import PairKey, ProjectKey
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import FORMATS, TARGETS, combinations, of_training
from kvfold.precompile.sets import SETS
from kvfold.precompile.wanted import keys_of
from kvfold.precompile.warmup import warmup
from kvfold.precompile.words import words_of
from kvfold.spec import V4_CSA, V4_HCA, V4_INDEXER

ROOT = Path(__file__).parents[2]
TIMER = "MLIR_ENABLE_TIMING"  # Triton prints a table of its passes' seconds to stderr
PASS = re.compile(r"([\d.]+) \( *[\d.]+%\)  TritonGPUCoalesce$", re.MULTILINE)
OPERATION = re.compile(r"^\s*(?:%\S+(?:, %\S+)* = )?\"?((?:tt|arith|math|scf|cf)\.\w+)\"?(.*)$", re.MULTILINE)
BLOCK_OF_POINTERS = re.compile(r"tensor<[\dx]+x!tt\.ptr<")


def wanted() -> Iterator[tuple[str, Variant, bool]]:
    """Names, kernels, and whether they are of the set: aligned, and as dependents, as all but the first of a step are."""
    defaults = warmup.__kwdefaults__
    named = {one.key(): one.name for one in combinations()}
    rows, seen = set(), set()
    for call in SETS["v4"]:
        keys, may = keys_of(defaults | call)
        for key in keys:
            variant = variant_of(key, True, may(key))
            first = key.first if isinstance(key, PairKey) else key
            rows.add((variant.kernel, getattr(first, "config", None)))
            if key in named and variant not in seen:
                seen.add(variant)
                yield named[key], variant, True
    for one in combinations(formats=(FORMATS["fp8_ds_mla"], FORMATS["indexer_mxfp4"])):
        variant = one.variant(True)
        known = one.config in table.CONFIGS or one.kind == "restore"
        if known and (row := (variant.kernel, one.config)) not in rows:
            rows.add(row)
            yield one.name, variant, False
    keys, _ = keys_of(defaults | {"specs": (V4_HCA, V4_CSA), "formats": (), "max_new_tokens": (), "hidden_dims": (7168,)})
    projections = {key.config: key for key in keys if isinstance(key, ProjectKey) and key.tensors == 1}
    for key in projections.values():
        yield " ".join(words_of(key)), variant_of(key, True, True), False
    for training in of_training((V4_HCA, V4_CSA, V4_INDEXER), (None,), (torch.bfloat16,), (1 << 16,)):
        if not training.key.apart:
            yield training.name, training.variant(True), False


def measure(variant: Variant, target: str) -> dict[str, float | int]:
    """Of one kernel, compiled anew."""
    times = []
    with triton.knobs.compilation.scope(), tempfile.TemporaryFile() as said:
        triton.knobs.compilation.always_compile = True
        triton.knobs.compilation.listener = lambda **told: times.append(told["times"])
        stderr = os.dup(2)
        os.dup2(said.fileno(), 2)
        before = sum(os.times()[:4])  # of this process and of those that it ended
        try:
            compiled = variant.compile(TARGETS[target])
            cpu = sum(os.times()[:4]) - before
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        seconds = PASS.findall(said.read().decode())
    if len(seconds) != 1 or len(times) != 1:
        raise SystemExit(f"Triton's timer says {len(seconds)} times what coalescing took, and its listener {len(times)} times")
    found = OPERATION.findall(compiled.asm["ttir"])
    accesses = [rest for name, rest in found if name in ("tt.load", "tt.store", "tt.atomic_rmw", "tt.atomic_cas")]
    return {
        "cpu_s": round(cpu, 2),
        "s": round(times[0].total / 1e6, 3),
        "coalesce_s": round(float(seconds[0]), 3),
        "operations": len(found),
        "accesses": sum(bool(BLOCK_OF_POINTERS.search(rest)) for rest in accesses),
    }


def device() -> str:
    """The processor, in words."""
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    name = re.search(r"model name\s*: (.*)", text)
    return f"cpu: {name[1] if name else 'unknown'}"


def run(target: str, only: str, facts: dict[str, str], file: TextIO) -> None:
    sums: dict[str, list[float]] = defaultdict(list)
    for name, variant, of_set in wanted():
        if not any(words in name for words in only.split(",")):
            continue
        found = measure(variant, target)
        row = {"bench": "compile", "name": name, "kernel": variant.kernel, "set": of_set, **found, "target": target}
        file.write(json.dumps(row | facts) + "\n")
        file.flush()
        print(
            f"{name:64s} {found['cpu_s']:6.2f} s of a core; {found['s']:6.2f} s, coalescing {found['coalesce_s']:6.2f} s",
            flush=True,
        )
        if of_set:
            sums[variant.kernel].append(found["cpu_s"])
    for kernel, seconds in sums.items():
        print(f"{kernel}: {len(seconds)} of the set V4, {sum(seconds) / len(seconds):.1f} s of a core on the average")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to it")
    parser.add_argument("--target", choices=[name for name in TARGETS if name.startswith("sm_")], default="sm_90")
    parser.add_argument("--only", default="", help="kernels whose name has one of these, separated by commas, in it")
    parser.add_argument("--commit", help="default: of this checkout")
    parser.add_argument("--note", default="", help="goes into each row")
    args = parser.parse_args()
    git = ("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    commit = args.commit or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    facts = {"device": device(), "torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    os.environ[TIMER] = "1"
    with tempfile.TemporaryDirectory(prefix="compile-") as cache, triton.knobs.cache.scope(), args.out.open("a") as file:
        triton.knobs.cache.dir = cache
        run(args.target, args.only, facts | ({"note": args.note} if args.note else {}), file)


if __name__ == "__main__":
    main()
