"""Runs GPU tests under compute-sanitizer's four tools, side by side, and appends one line for each.

python benchmarks/sanitize.py --out benchmarks/results/sanitizer.jsonl [--tools memcheck,racecheck] [--timeout SECONDS]
                              [--tests tests/test_padding.py,...] [--only cuda]

A tool that did not finish in time has "errors": null, which is no verdict.
"""

from __future__ import annotations

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import bounded
import protocol

TOOLS = "memcheck,racecheck,initcheck,synccheck"
# Padding, refusals and slot reuse over both kinds of state, shared windows, pairs, plans, stores and snapshots.
TESTS = (
    "tests/test_padding.py,tests/test_plan.py,tests/test_store.py,tests/test_many.py,tests/test_window_refused.py,"
    "tests/test_snapshots.py,tests/test_configs.py"
)
SUMMARY = re.compile(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+)")


def run(tool: str, tests: list[str], only: str, timeout: float) -> dict:
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--print-limit", "3"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", only, *tests]
    start = time.monotonic()
    _, output = bounded.run(command, timeout)
    found = SUMMARY.findall(output)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", output)}
    row = {"bench": "sanitizer", "tool": tool, "tests": " ".join(tests), "only": only, "passed": counts.get("passed", 0)}
    row |= {"failed": counts.get("failed", 0), "errors": sum(map(int, found)) if found else None}
    row["seconds"] = round(time.monotonic() - start, 1)
    if row["errors"] != 0 or row["failed"]:
        print(f"--- {tool}\n{output[-3000:]}", flush=True)
    return row


def main() -> int:
    parser = protocol.parser(__doc__)
    parser.add_argument("--tools", default=TOOLS)
    parser.add_argument("--tests", default=TESTS)
    parser.add_argument("--only", default="cuda and not torch-cuda", help="pytest's -k (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=600)
    args = parser.parse_args()
    where, tools = protocol.environment(args.commit), args.tools.split(",")
    with ThreadPoolExecutor(len(tools)) as pool:
        rows = list(pool.map(lambda tool: run(tool, args.tests.split(","), args.only, args.timeout), tools))
    for row in rows:
        print(row)
        protocol.append_rows(args.out, [row | where])
    return 0 if all(row["errors"] == 0 and row["passed"] and not row["failed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
