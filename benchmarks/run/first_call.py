"""Times a process from its start to its first results: with nothing compiled, with prebuilt kernels, with Triton's cache full.

python -m benchmarks.run.first_call --out benchmarks/results/first_call.jsonl
                                    [--prebuilt FOLDER] [--ways cold,prebuilt,cached] [--only WORDS] [--limit 300]

Each row is a new process with a Triton cache of its own, empty but for `cached`, where the process before filled it. FOLDER is
a package of `kvfold prebuild` for this GPU, Triton and checkout; a run in which a kernel of it does not come is an error.
Seconds since the process began: torch imported (`torch_s`), kvfold imported (`kvfold_s`), the GPU's context there (`gpu_s`),
buffers and plan inputs there (`ready_s`), the first result there (`first_s`); `wait_s` is what the first call itself took,
with its plan. kernels, prebuilt: how many were made, and how many of them came from the package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
WAYS = ("cold", "prebuilt", "cached")
CASES = ("prompt r128", "prompt r4", "decode r128", "warmup v4")


def child(case: str, folder: str, began: float) -> None:
    """Prints the row's own part. began: by the clock of the machine, before the process was started."""
    found: dict[str, float | int] = {}

    def mark(name: str) -> None:
        found[name] = round(time.time() - began, 3)

    import torch

    mark("torch_s")
    import kvfold

    mark("kvfold_s")
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    mark("gpu_s")
    if folder:
        kvfold.use_prebuilt(folder)
    call = warm if case == "warmup v4" else step_of(case)
    torch.cuda.synchronize()
    mark("ready_s")
    call()
    torch.cuda.synchronize()
    mark("first_s")
    found["wait_s"] = round(found["first_s"] - found["ready_s"], 3)
    if case != "warmup v4":
        start = time.time()
        call()
        torch.cuda.synchronize()
        found["second_s"] = round(time.time() - start, 6)
    from kvfold.backend_triton import launcher, prebuilt

    found |= {"kernels": launcher.compilations, "prebuilt": prebuilt.loaded}
    print(json.dumps(found))


def warm() -> None:
    """The example of `warmup`: two calls of a set, of which an engine makes one."""
    import kvfold
    from kvfold.precompile.sets import SETS

    kvfold.warmup(**SETS["v4"][0])


def step_of(case: str) -> Callable[[], None]:
    """A plan and `compress` of one sequence, with bf16 norm weights."""
    import torch

    import kvfold

    kind, ratio = case.split()
    spec = kvfold.V4_HCA if ratio == "r128" else kvfold.V4_CSA
    new = 8192 if kind == "prompt" else 1

    def ints(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device="cuda")

    kv_score = torch.randn(new, 2 * spec.channels, dtype=torch.bfloat16, device="cuda")
    ape = torch.randn(spec.ratio, spec.channels, device="cuda")
    weight = torch.ones(spec.head_dim, dtype=torch.bfloat16, device="cuda")
    rope = torch.ones(16384, spec.rope_dim, device="cuda")
    pages = -(-8192 // spec.ratio // 64)
    state = kvfold.FoldState.allocate(spec, 1, 4, device="cuda")
    cache = kvfold.EntryCache.allocate("fp8_ds_mla", pages, 64, spec, device="cuda")
    table = torch.arange(pages, dtype=torch.int32, device="cuda")[None]
    starts, bounds, slots = ints(0), ints(0, new), ints(0)

    def call() -> None:
        plan = kvfold.StepPlan.build(
            spec.ratio, starts, bounds, new, state_slots=slots, cache_block_table=table, rows_per_page=64
        )
        kvfold.compress(kv_score, plan, state, cache, spec=spec, ape=ape, norm_weight=weight, rope=rope)

    return call


def measure(case: str, way: str, folder: str, cache: str, limit: float) -> dict:
    code = f"from benchmarks.run.first_call import child; child({case!r}, {folder!r}, {time.time()!r})"
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error:kvfold:RuntimeWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise SystemExit(f"{case}, {way}: {done.stderr.strip()[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    if way == "prebuilt" and not row["kernels"] == row["prebuilt"]:
        raise SystemExit(f"{case}: only {row['prebuilt']} of {row['kernels']} kernels were prebuilt")
    return row


def main() -> None:
    from ..lib import protocol

    parser = protocol.parser(__doc__)
    parser.add_argument("--prebuilt", default="", help="a package of `kvfold prebuild`")
    parser.add_argument("--ways", default="prebuilt,cold,cached", help="default: %(default)s")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one process")
    args = parser.parse_args()
    ways = args.ways.split(",")
    if "cached" in ways and "cold" not in ways[: ways.index("cached")]:
        parser.error("cached needs cold before it, which fills the cache")
    where = protocol.environment(args.commit) | {"cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(prefix="kvfold-first-") as place:
        for case in CASES:
            for way in ways:
                if args.only not in case or (way == "prebuilt" and not args.prebuilt):
                    continue
                # What `cold` left is what `cached` finds.
                cache = Path(place, f"{case} {'cold' if way == 'cached' else way}")
                folder = str(Path(args.prebuilt).resolve()) if way == "prebuilt" else ""
                row = measure(case, way, folder, str(cache), args.limit)
                words = f"first result {row['first_s']:7.2f} s, of which the call {row['wait_s']:7.2f}"
                print(f"{case:12s} {way:9s} {words}", flush=True)
                protocol.append_rows(args.out, [{"bench": "first_call", "case": case, "variant": way} | row | where])


if __name__ == "__main__":
    main()
