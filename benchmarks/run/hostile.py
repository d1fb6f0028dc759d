"""Makes hostile calls (tests/support/hostile_call.py) and appends, for each function, how many ended in which way.

python -m benchmarks.run.hostile --calls 100000 --out benchmarks/results/hostile.jsonl
                                [--seed 0] [--backend torch] [--processes 2]

ok: with the results of a good call. counted: something was refused on the device and counted in `errors`. refused: an error
that names the argument, with nothing written. Whatever else a call did is a fault, and printed with what makes it again.
"""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from ..lib import protocol

# The calls are made by the tests' own modules.
sys.path.insert(0, str(protocol.HERE.parent / "tests"))

from support import hostile_run

ENDS = ("ok", "counted", "refused")
PART = 2500  # calls of one process


def main() -> int:
    parser = protocol.parser(__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=hostile_run.BACKENDS, default="torch")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()

    def part(start: int) -> hostile_run.Summary:
        found = hostile_run.run(args.seed, start, min(start + PART, args.calls), args.backend)
        print(f"calls from {start}: {len(found.faults)} faults", flush=True)
        return found

    with ThreadPoolExecutor(args.processes) as pool:
        parts = list(pool.map(part, range(0, args.calls, PART)))
    counts = sum((found.counts for found in parts), Counter())
    whole = hostile_run.Summary(counts, [fault for found in parts for fault in found.faults])
    print(hostile_run.table(whole))
    rows = []
    for function in sorted({name for name, _ in counts}):
        ended = {word: n for (name, word), n in counts.items() if name == function}
        calls = {"calls": sum(ended.values()), **{word: ended.get(word, 0) for word in ENDS}}
        row = {"bench": "hostile", "function": function, "backend": args.backend, "seed": args.seed, **calls}
        rows.append(row | {"faults": calls["calls"] - sum(calls[word] for word in ENDS)} | protocol.environment(args.commit))
    protocol.append_rows(args.out, rows)
    return 1 if whole.faults else 0


if __name__ == "__main__":
    sys.exit(main())
