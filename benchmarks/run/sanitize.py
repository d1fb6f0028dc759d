"""Runs GPU tests under compute-sanitizer's four tools, side by side, and appends one line for each.

python -m benchmarks.run.sanitize --out benchmarks/results/sanitizer.jsonl [--tools memcheck,racecheck] [--timeout SECONDS]
                              [--tests calls,states,projection,training,tests/calls/test_padding.py,...]
                              [--only cuda] [--processes 4]

`calls` (the default), `states`, `projection` and `training` are sets of tests (`TESTS`). The tests of a tool are dealt out to
several processes. A tool of which one did not finish in time has "errors": null, which is no verdict.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from ..lib import bounded, protocol

TOOLS = "memcheck,racecheck,initcheck,synccheck"
TESTS = {
    # Padding, refusals and slot reuse over both kinds of state, shared windows, pairs, plans, stores and snapshots.
    "calls": (
        "tests/calls/test_padding.py", "tests/calls/test_plan_metadata_calls.py", "tests/calls/test_store.py",
        "tests/calls/test_many.py", "tests/calls/test_window_refused.py", "tests/storage/test_snapshots.py",
        "tests/kernels/test_configs.py",
    ),
    # What programs of one launch may read of each other's windows: long and short steps over input rows, rewinds, rings that
    # turn, states in an engine's pages, and banks that keep each draft. A history takes a tool a minute: a few of each.
    "states": (
        "tests/storage/test_state.py::test_walks_of_long_and_short_steps[cuda-indexer-1]",
        "tests/storage/test_state.py::test_walks_of_long_and_short_steps[cuda-rows-2-1]",
        *(f"tests/storage/test_state.py::test_a_long_step_can_be_replayed_and_rewound_to_its_start[cuda-{name}]"
          for name in ("hca", "csa")),
        "tests/storage/test_state_pages.py::test_same_bits_as_a_state_of_its_own[cuda-rows-dtype0-Odd]",
        "tests/calls/test_history.py::test_histories[cuda-ratio-2]",
        *(f"tests/calls/test_window_ring.py::test_histories[cuda-{name}]" for name in ("pairs-8", "csa-16", "pending")),
        "tests/calls/test_mean.py::test_read_and_write_in_one_launch[cuda-5]",
        "tests/calls/test_mean.py::test_banks_keep_each_draft[cuda]",
    ),
    # Products whose tiles are shared by programs and are not full, with the folds behind them that add up parts.
    "projection": (
        "tests/projection/test_project_bits.py::test_every_row_of_the_table",
        "tests/projection/test_project_bits.py::test_every_form",
        "tests/projection/test_project_bits.py::test_two_compressors",
        "tests/projection/test_project_bits.py::test_what_it_leaves_alone",
        *(f"tests/projection/test_project_fp8.py::test_{name}"
          for name in ("every_row_of_the_table", "two_tensors", "two_compressors")),
    ),
    # Forward and backward of packed sequences: ratios 1 to 128, windows that programs share, records.
    "training": (
        "tests/training/test_training_gradients.py::test_against_fp64",
        "tests/training/test_training_gradients.py::test_real_shapes_against_fp64",
        "tests/training/test_training_bits.py::test_a_sequence_has_its_bits_in_every_packing",
        "tests/training/test_training_bits.py::test_the_table_changes_no_bit_but_by_groups",
        *(f"tests/training/test_training_bits.py::test_fake_quantization_is_what_is_read_of_the_records[cuda-{name}]"
          for name in ("fp8_ds_mla", "indexer_mxfp4", "fp8_tensor")),
    ),
}  # fmt: skip
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")


def chosen(text: str) -> list[str]:
    """Paths of sets, files and tests that are separated by commas."""
    return [path for word in text.split(",") for path in TESTS.get(word, (word,))]


def collect(tests: list[str], only: str) -> list[str]:
    """The tests that pytest chooses, each by its own name."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    _, output = bounded.run([*command, "-k", only, *tests], 120)
    return [line for line in output.splitlines() if "::" in line]


def part(tool: str, names: list[str], timeout: float) -> tuple[dict[str, int], int | None, str]:
    """What pytest counted in one process, how many errors the tool saw (None: no verdict), and what was printed."""
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--print-limit", "3"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names]
    _, output = bounded.run(command, timeout)
    found = SUMMARY.findall(output)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", output)}
    return counts, sum(map(int, found)) if found else None, output


def run(tool: str, names: list[str], args: argparse.Namespace) -> dict:
    start, count = time.monotonic(), min(args.processes, len(names))
    with ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(lambda i: part(tool, names[i::count], args.timeout), range(count)))
    row = {"bench": "sanitizer", "tool": tool, "tests": args.tests, "only": args.only}
    row |= {word: sum(counts.get(word, 0) for counts, _, _ in parts) for word in ("passed", "failed")}
    errors = [found for _, found, _ in parts]
    row["errors"] = None if None in errors else sum(errors)
    row["seconds"] = round(time.monotonic() - start, 1)
    for counts, found, output in parts:
        if found != 0 or counts.get("failed"):
            print(f"--- {tool}\n{output[-3000:]}", flush=True)
    return row


def main() -> int:
    parser = protocol.parser(__doc__)
    parser.add_argument("--tools", default=TOOLS)
    parser.add_argument("--tests", default="calls", help="sets, files or tests (default: %(default)s)")
    parser.add_argument("--only", default="cuda and not torch-cuda", help="pytest's -k (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="of each tool (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600)
    args = parser.parse_args()
    where, tools = protocol.environment(args.commit), args.tools.split(",")
    names = collect(chosen(args.tests), args.only)
    if not names:
        parser.error(f"--tests and --only choose no test, got {args.tests!r} and {args.only!r}")
    with ThreadPoolExecutor(len(tools)) as pool:
        rows = list(pool.map(lambda tool: run(tool, names, args), tools))
    for row in rows:
        print(row)
        protocol.append_rows(args.out, [row | where])
    return 0 if all(row["errors"] == 0 and row["passed"] == len(names) for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
