"""Hostile calls by the thousand, in a process of their own: one that dies is a fault of the call that it was making.

python tests/support/hostile_run.py --calls 1000 --seed 0 --backend torch   prints the faults, each with a smallest reproduction
python tests/support/hostile_run.py --seed 0 --at 123                       makes call 123 of the run of seed 0 again
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any, NamedTuple

LIMIT = 240  # seconds after which ten calls are taken to hang: on a GPU most of them may compile a kernel
BACKENDS = {
    "torch": ("torch", "cpu"),
    "interpreter": ("triton", "cpu"),
    "cuda": ("triton", "cuda"),
    "torch-cuda": ("torch", "cuda"),
}
MOST_MEMORY = 16 << 30  # bytes of address space of a process on a CPU: what a claimed size would take must not take the machine


class Fault(NamedTuple):
    """A call that did not end as it should; `python tests/support/hostile_run.py --seed SEED --at INDEX` makes it again."""

    seed: int
    index: int
    backend: str
    word: str
    case: str
    text: str

    def __str__(self) -> str:
        return f"seed {self.seed}, call {self.index}, {self.backend}: {self.word}\n    {self.case}\n    {self.text}"

    @property
    def kind(self) -> tuple[str, str]:
        """What is the same in faults of one kind: numbers, quoted text and shapes are not."""
        return self.word, re.sub(r"'[^']*'|\"[^\"]*\"|\[[\d, -]*\]|-?\d+", "#", self.text)[:160]


class Summary(NamedTuple):
    """counts: calls by function and by how they ended."""

    counts: Counter
    faults: list[Fault]

    @property
    def calls(self) -> int:
        return sum(self.counts.values())


def run(seed: int, start: int, stop: int, backend: str, script: str | os.PathLike = __file__) -> Summary:
    """The calls from `start` to before `stop` of a run; a new process goes on behind a call that ended one.

    script: what a process runs.
    """
    summary = Summary(Counter(), [])
    while start < stop:
        start = _process(script, seed, start, stop, backend, summary)
    return summary


def _process(script: str | os.PathLike, seed: int, start: int, stop: int, backend: str, summary: Summary) -> int:
    """Returns the first call that is still to be made."""
    command = [sys.executable, os.path.abspath(script), "--child", f"{start}:{stop}", "--seed", str(seed), "--backend", backend]
    environment = {**os.environ, "TRITON_INTERPRET": "0" if "cuda" in backend else "1"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    case = "?"
    assert child.stdout is not None and child.stderr is not None
    for line in child.stdout:
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        if row["word"] == "begun":
            case = row["case"]
            continue
        start = row["index"] + 1
        summary.counts[row["function"], row["word"]] += 1
        if "text" in row:
            summary.faults.append(Fault(seed, row["index"], backend, row["word"], row["case"], row["text"]))
    printed = child.stderr.read()
    if child.wait() == 0 or start >= stop:
        return stop if child.returncode == 0 else start
    function = case.split(" over ")[0]
    where = re.findall(r'src/kvfold/([\w/]+\.py)", line \d+ in (\w+)', printed) or [("?", "?")]
    text = f"exit {child.returncode} [{':'.join(where[0])}] " + ("" if where[0][0] != "?" else printed[-300:])
    summary.faults.append(Fault(seed, start, backend, "crash", case, text))
    summary.counts[function, "crash"] += 1
    return start + 1


def _child(seed: int, start: int, stop: int, name: str) -> None:
    """Makes the calls and prints a line for each."""
    import torch
    from support.helpers import Backend

    torch.set_num_threads(1)
    kind, device = BACKENDS[name]
    if device == "cpu":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
        if kind == "triton":
            from support import fast_interpreter

            fast_interpreter.install()
    from support import hostile_call

    backend = Backend(kind, torch.device(device, 0) if device == "cuda" else torch.device(device))
    faulthandler.enable()
    for index in range(start, stop):
        if (index - start) % 10 == 0:
            faulthandler.dump_traceback_later(LIMIT, exit=True)
        found = hostile_call.call(seed, index, backend, lambda case: _print(word="begun", case=str(case)))
        row: dict[str, Any] = {"index": index, "function": found.case.function, "word": found.word}
        _print(**row, **({"case": str(found.case), "text": found.text} if found.fault else {}))
        if "CUDA error" in found.text:  # no later call of this process could be right
            os._exit(1)
    faulthandler.cancel_dump_traceback_later()


def _print(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def table(summary: Summary) -> str:
    """Faults by kind, the most frequent first, each with the call of the fewest spoils."""
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in summary.faults:
        kinds.setdefault(fault.kind, []).append(fault)
    lines = [f"{summary.calls} calls, {len(summary.faults)} faults of {len(kinds)} kinds"]
    for found in sorted(kinds.values(), key=len, reverse=True):
        smallest = min(found, key=lambda fault: (fault.case.count(";"), " after " in fault.case, len(fault.case)))
        functions = Counter(fault.case.split(" over ")[0] for fault in found)
        lines.append(f"{len(found)} x, {', '.join(f'{name} {count}' for name, count in functions.most_common())}\n  {smallest}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    parser.add_argument("--at", type=int, help="one call alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        start, _, stop = args.child.partition(":")
        _child(args.seed, int(start), int(stop), args.backend)
        return 0
    first = 0 if args.at is None else args.at
    summary = run(args.seed, first, first + (args.calls if args.at is None else 1), args.backend)
    print(table(summary))
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(sys.path[0])  # the folder that `support` is in
    sys.exit(main())
