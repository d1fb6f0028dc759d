"""Runs the test suite here and appends one line of what came of it: the proof that it is green on a GPU.

python benchmarks/suite.py --out benchmarks/results/suite.jsonl [-- PYTEST ARGUMENTS]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import protocol


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit")
    parser.add_argument("pytest", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *args.pytest]
        code = subprocess.run(command, check=False).returncode
        suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {key: int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")}
    per_file: dict[str, int] = {}
    for test in suite.iter("testcase"):
        if test.find("skipped") is None:
            name = (test.get("classname") or "").split(".")[-1]
            per_file[name] = per_file.get(name, 0) + 1
    row = {"bench": "suite", **count, "seconds": round(float(suite.get("time", "0")), 1), "exit": code, "ran": per_file}
    protocol.append_rows(args.out, [row | protocol.environment(args.commit)])
    print(row)
    return code


if __name__ == "__main__":
    sys.exit(main())
