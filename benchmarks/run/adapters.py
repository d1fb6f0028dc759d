"""Times compressors inside an engine, over its classes and pages: through kvfold's adapter, and by the engine's own kernels.

python -m benchmarks.run.precompile --only adapters --ordinary
python -m benchmarks.run.adapters --out benchmarks/results/adapters.jsonl [--engine vllm] [--engines build/engines]
                                  [--batches 16,64] [--shapes HCA,CSA,step] [--variants VARIANTS] [--only SUBSTRING]

us: of a CUDA graph that holds the calls of all layers, on one stream. host_us: of the same calls without a graph, on the host.
launches: nodes of such a graph. All three of one layer, or of a step: V4-Pro's 31 layers of ratio 128 and 30 of ratio
4, each with its indexer. The plan of a step is updated before it, as the engine does, but in TensorRT-LLM's operators, which
have nothing before them.

Variants. vllm: `own`, its Triton kernels; `window`, its pages; `fold`, kvfold's rows in these at ratio 128. sglang: `pools`, as
SGLang has them; `fold`, of kvfold. trtllm: `operators`; `records`, one call in place of two for main compressors. But
in `own` a wait for the GPU, or an allocation, is an error. --engines: a folder that `make engines` made; an engine that is
installed needs none, and TensorRT-LLM is not imported.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from ..lib import protocol, table
from ..lib.adapter_steps import ENGINES, Case, Ready

HEADER = ("case", "variant", "us", "host us", "launches")
COPIES = 32  # of a layer that is timed alone, so that its pages are as cold as in a model
SHAPES = {"HCA": (128,) * COPIES, "CSA": (4,) * COPIES, "step": (128, *(4, 128) * 30)}


def cases(batches: list[int], shapes: list[str]) -> list[Case]:
    """Small batches first."""
    steps = ((4, "hit"), (1, "spread"))
    return [Case(shape, batch, new, mode) for batch in batches for shape in shapes for new, mode in steps]


def host_us(call: Callable[[], object], device: str, chunks: int = 5) -> float:
    """Microseconds of host time of a call, of the fastest one: what else a machine does only adds."""
    wait, times = (torch.cuda.synchronize if device == "cuda" else int), []
    for _ in range(chunks):
        wait()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    wait()
    return min(times)


def check_quiet(call: Callable[[], object]) -> None:
    """Raises if a call waits for the GPU or allocates."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    if made:
        raise RuntimeError(f"a step of kvfold's allocated {made} times")


def launches_of(call: Callable[[], object]) -> int:
    """What a CUDA graph of a call launches. Not by a profiler: what is timed behind one in a process is slower."""
    graph, count = torch.cuda.CUDAGraph(keep_graph=True), ctypes.c_size_t()
    with torch.cuda.graph(graph):
        call()
    failed = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    if failed:
        raise RuntimeError(f"cuGraphGetNodes says {failed}")
    return count.value


def measure(ready: Ready, variant: str, count: int, device: str) -> dict:
    """The figures of a step, for each of `count` layers."""
    ready.call()
    row = {"host_us": round(host_us(ready.call, device) / count, 2)}
    if device == "cuda":
        if variant != "own":
            check_quiet(ready.call)
        # As many layers in a graph as a step has, or more: own kernels are slow.
        row = {"us": round(protocol.time_graph([ready.call], rounds=1 if count == 1 else 4) / count, 3)} | row
        try:
            row["launches"] = round(launches_of(ready.call) / count, 3)
        except Exception:  # the times are worth having
            traceback.print_exc()
    if ready.refused():
        raise RuntimeError(f"kvfold refused {ready.refused()} sequences or entries")
    return row


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("--engine", choices=sorted(ENGINES), default="vllm")
    parser.add_argument("--engines", type=Path, help="folder with what `make engines` unpacked")
    for name, default in (("batches", "16,64"), ("shapes", ",".join(SHAPES)), ("variants", None)):
        parser.add_argument(f"--{name}", default=default, help=f"separated by commas (default: {default or 'all'})")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args(arguments)
    args.batches = [int(batch) for batch in args.batches.split(",")]
    variants = ENGINES[args.engine].variants
    args.shapes, args.variants = args.shapes.split(","), args.variants.split(",") if args.variants else [*variants]
    for name, known in (("shapes", SHAPES), ("variants", variants)):
        if not set(getattr(args, name)) <= set(known):
            parser.error(f"--{name} must be of {', '.join(known)}, got {getattr(args, name)}")
    if args.engines is not None:
        sys.path += [str(args.engines / args.engine), str(args.engines / "packages")]
    return args


def cells(row: dict) -> list[str]:
    return [row["case"], row["variant"], *(f"{row[key]:.2f}" if key in row else "" for key in ("us", "host_us", "launches"))]


def run(args: argparse.Namespace, device: str, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[list[dict], int]:
    """The rows, and how many cases failed; each row is written when it is there."""
    rows, failed, where = [], 0, protocol.environment(args.commit)
    for case in (case for case in cases(args.batches, args.shapes) if args.only in case.name):
        for variant in args.variants:
            try:
                count = 1 if case.shape == "step" else len(shapes[case.shape])
                with ENGINES[args.engine].step(case, variant, shapes[case.shape], device) as ready:
                    figures = measure(ready, variant, count, device)
            except Exception:  # the other cases are worth having: device time is scarce
                traceback.print_exc()
                failed += 1
                continue
            finally:
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
            rows.append({"bench": "adapters", "engine": args.engine, "case": case.name, "variant": variant} | figures)
            print(*cells(rows[-1]), flush=True)
            protocol.append_rows(args.out, [rows[-1] | where])
    return rows, failed


def main() -> int:
    args = parse()
    rows, failed = run(args, "cuda")
    table.show(f"Compressors in {args.engine}, microseconds", HEADER, [cells(row) for row in rows])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
