"""Times a decode step of V4.1's four source layers (ratios 2, 2, 2, 1): latent, main record and index key.

python -m benchmarks.run.v41 --out benchmarks/results/v41.jsonl [--only SUBSTRING] [--states fold,ring] [--layers]

us: of all four, two launches for each. floor_us: of as many launches that move the same bytes. one_launch_us: of a launch for
each layer that moves the bytes of its two, which none can be: the key is made of the latent. launches: of a layer, as a
profiler counts them for the first rows, when all is timed: behind a profiler all that a process runs is slower. --layers: also
the layers of each ratio alone.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable

import torch

from ..lib import floor, protocol, table, v41
from ..lib.protocol import Case

HEADER = ("case", "state", "us", "floor", "x floor", "one launch", "launches")
ALONE = {"r2": (2,), "r1": (1,)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--states", default=",".join(v41.STATES), help="of ratio 2, separated by commas (default: %(default)s)")
    parser.add_argument("--layers", action="store_true", help="also time one layer of each ratio")
    args = parser.parse_args(arguments)
    args.states = args.states.split(",")
    if not set(args.states) <= set(v41.STATES):
        parser.error(f"--states must be of {', '.join(v41.STATES)}, got {args.states}")
    return args


def name_of(case: Case, what: str) -> str:
    return f"v41 {what} b{case.batch} n{case.new} {case.mode}"


def chosen(args: argparse.Namespace) -> list[tuple[str, dict[int, Case], str, tuple[int, ...]]]:
    """What is to be timed: name, step, state, layers."""
    shapes = {"4 layers": v41.LAYERS} | (ALONE if args.layers else {})
    return [
        (name_of(cases[2], what), cases, state, layers)
        for what, layers in shapes.items()
        for state in args.states
        for cases in v41.cases()
        if args.only in name_of(cases[2], what) and (state == "fold" or 2 in layers)
    ]


def launches_of(call: Callable[[], None]) -> int:
    """Kernels that the device runs for a call."""
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def measure(cases: dict[int, Case], state: str, layers: tuple[int, ...]) -> dict:
    """One result row, without where it was taken and of what."""
    step = v41.Step(cases, state, layers=layers)
    apart = tuple(part for one in step.traffics for part in one)
    moved = sum(part.total for part in apart)
    calls = [step.call(step.launches()) for _ in range(protocol.buffer_sets(moved))]
    step.check(calls[0])
    us = protocol.time_graph(calls)
    del calls
    torch.cuda.empty_cache()
    floor_us = floor.chain_us(apart)
    one_launch_us = floor.chain_us(tuple(one.together for one in step.traffics))
    torch.cuda.empty_cache()
    return {"us": round(us, 3), "floor_us": round(floor_us, 3), "one_launch_us": round(one_launch_us, 3), "bytes": moved}


def launches(cases: dict[int, Case], state: str, layers: tuple[int, ...]) -> dict:
    """What a row has more of a step that a profiler has seen."""
    step = v41.Step(cases, state, layers=layers)
    call = step.call(step.launches())
    step.check(call)
    return {"launches": launches_of(call) / len(layers)}


def cells(row: dict) -> list[str]:
    times = [f"{row[key]:.2f}" for key in ("us", "floor_us")]
    return [
        row["case"],
        row["variant"],
        *times,
        f"{row['us'] / row['floor_us']:.2f}",
        f"{row['one_launch_us']:.2f}",
        f"{row['launches']:g}" if "launches" in row else "",
    ]


def run(args: argparse.Namespace, where: dict[str, str]) -> tuple[list[dict], int]:
    """The rows, and how many failed; each row is written when it is there."""
    rows, failed, todo = [], 0, chosen(args)
    for name, cases, state, layers in todo:
        try:
            row = {"bench": "v41", "case": name, "variant": state} | measure(cases, state, layers)
        except Exception:  # the other cases are worth having: device time is scarce
            traceback.print_exc()
            print(f"{name} {state}: failed", flush=True)
            failed += 1
            continue
        print(*cells(row), flush=True)
        rows.append(row)
        protocol.append_rows(args.out, [row | where])
    for i, (_, *how) in enumerate(todo[:3] if len(rows) == len(todo) else ()):
        rows[i] |= launches(*how)
        protocol.append_rows(args.out, [rows[i] | where])  # once more: the last row of a case counts
    return rows, failed


def main() -> int:
    args = parse()
    rows, failed = run(args, protocol.environment(args.commit))
    table.show("V4.1's source layers, microseconds per step", HEADER, [cells(row) for row in rows])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
