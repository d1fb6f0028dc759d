"""Runs the test suite here and appends one line of what came of it: the proof that it is green on a GPU.

python -m benchmarks.run.suite --out benchmarks/results/suite.jsonl [--seconds 400] [-- PYTEST ARGUMENTS]

A failure is named when it happens. A run that is ended by its time or from outside (SIGTERM) still says what came before that:
"exit" is null then, which is no verdict.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ..lib import protocol


class Recorder:
    """A plugin of pytest that counts tests as they end."""

    def __init__(self) -> None:
        self.counts, self.ran, self.failed = Counter(), Counter(), []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = {"failed": "failures" if report.when == "call" else "errors"}.get(report.outcome, report.outcome)
            self.counts[outcome] += 1
            if report.outcome != "skipped" and report.when == "call":
                self.ran[Path(report.nodeid.partition("::")[0]).stem] += 1
            if report.outcome == "failed":
                self.failed.append(report.nodeid)
                print(f"\n{outcome}: {report.nodeid}\n{str(report.longrepr)[-1500:]}", flush=True)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit")
    parser.add_argument("--seconds", type=int, default=0, help="end the run after so many")
    parser.add_argument("pytest", nargs="*")
    args = parser.parse_args()
    recorder, start = Recorder(), time.monotonic()
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, interrupt)
    signal.alarm(args.seconds)
    code = pytest.main(["-q", *args.pytest], plugins=[recorder])
    signal.alarm(0)
    count = {key: recorder.counts[key] for key in ("failures", "errors", "skipped")}
    row = {"bench": "suite", "tests": recorder.counts.total(), **count, "seconds": round(time.monotonic() - start, 1)}
    row |= {"exit": None if code == pytest.ExitCode.INTERRUPTED else int(code), "ran": dict(recorder.ran)}
    row |= {"failed": recorder.failed} if recorder.failed else {}
    protocol.append_rows(args.out, [row | protocol.environment(args.commit)])
    print(row)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
