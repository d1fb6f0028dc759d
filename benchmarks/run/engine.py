"""What V4.1 and calls with an engine's own tensors must show on a GPU, in one process: compiled, timed, and held to targets.

python -m benchmarks.run.engine --into benchmarks/results [--commit COMMIT]

Adds the rows of `v41`, `store --places` and `metadata` to the files of that folder. Fails where a target is missed or a part
did not run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from ..lib import protocol
from . import metadata, store, v41

ROWS = 131072
COMPILED = "v41,places,metadata"  # what `precompile` is asked for
FLOORS, FROM_BATCH = 1.3, 64
PLACES = 1.1
RESERVED_US, TOKEN_SLOTS_US, UPDATE_US = 0.2, 1.0, 5.0


def judged_v41(rows: list[dict]) -> list[tuple[str, float, float]]:
    """What was measured, and the most that it may be: of FoldStates, from BATCH sequences up; launches of a layer."""
    found = [(f"launches of a layer, {row['case']} {row['variant']}", row["launches"], 2) for row in rows if "launches" in row]
    for row in rows:
        if row["variant"] == "fold" and int(row["case"].split(" b")[1].split()[0]) >= FROM_BATCH:
            found.append((f"x floor, {row['case']}", row["us"] / row["floor_us"], FLOORS))
    return found


def judged_places(rows: list[dict]) -> list[tuple[str, float, float]]:
    found = []
    for at in range(0, len(rows), len(store.WAYS)):
        plan, _, anywhere = rows[at : at + len(store.WAYS)]
        found.append((f"x the form with a plan, {plan['variant']}", anywhere["us"] / plan["us"], PLACES))
    return found


def judged_metadata(rows: list[dict]) -> list[tuple[str, float, float]]:
    found = []
    for row in rows:
        what = f"{row['case']}, {row['variant']}"
        if row["bench"] == "reserved" and row["variant"].endswith("reserved places"):
            found.append((f"us more, {what}", row["more_us"], RESERVED_US))
        elif row["bench"] == "plan_metadata":
            found.append((f"us, {what}", row["us"], UPDATE_US))
            if row["variant"] == "token slots":
                found.append((f"us more, {what}", row["more_us"], TOKEN_SLOTS_US))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True, help="folder of the results")
    parser.add_argument("--commit", help="what the rows give as the commit (default: git's HEAD)")
    args, start = parser.parse_args(), time.monotonic()
    args.into.mkdir(parents=True, exist_ok=True)
    # In a process of its own: its workers are forked, which a process that has a CUDA context should not be.
    failed = subprocess.run([sys.executable, "-m", "benchmarks.run.precompile", "--only", COMPILED], check=False).returncode
    where, judged = protocol.environment(args.commit), []

    def part(name: str, run: Callable[[Path], list[tuple[str, float, float]]]) -> None:
        nonlocal failed
        try:
            judged.extend(run(args.into / f"{name}.jsonl"))
        except Exception:  # the other parts are worth having: device time is scarce
            traceback.print_exc()
            failed += 1
        print(f"{name}: {time.monotonic() - start:.0f} s since the start", flush=True)

    part("store", lambda out: judged_places(store.places(ROWS, where, out)))
    part("metadata", lambda out: judged_metadata(metadata.run(where, out)))

    def layers(out: Path) -> list[tuple[str, float, float]]:
        nonlocal failed
        rows, missing = v41.run(v41.parse(["--out", str(out)]), where)
        failed += missing
        return judged_v41(rows)

    part("v41", layers)
    for what, value, most in judged:
        print(f"{'ok  ' if value <= most else 'MISS'} {value:6.2f} (at most {most:g}) {what}")
    missed = sum(value > most for _, value, most in judged)
    print(f"{len(judged) - missed} of {len(judged)} targets met, {failed} parts failed")
    return 1 if missed or failed else 0


if __name__ == "__main__":
    sys.exit(main())
