"""Times two trees of this repository row by row in turn, on one GPU in one run: is any row of the protocol slower than before?

python -m benchmarks.run.compare BASE --out benchmarks/results/compare.jsonl
                                [--base-commit COMMIT] [--limit 2] [--only SUBSTRING]

BASE is another checkout. Each tree has a process of its own, with its own kernels and calls; for each row the two take turns. A
row that looks slower by more than half of the limit is timed again; what counts is the fastest time of each tree, as what else
runs on a machine only adds. Also compared: the host's time for an eager call. Exits with 1 where a row is slower by the limit.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
TURNS, MORE_TURNS = 1, 6


class Tree:
    """A process that times rows of one checkout."""

    def __init__(self, root: Path) -> None:
        path = os.pathsep.join((str(root / "src"), str(root / "benchmarks")))
        command = [sys.executable, str(HERE / "compare.py"), "--worker", str(root)]
        self.process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def names(self) -> list[str]:
        """The rows that it has."""
        return self._ask("names").split("\t")

    def time(self, name: str) -> float:
        return float(self._ask(name))

    def _ask(self, what: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer.startswith("="):
            raise RuntimeError(f"{what}: {answer or 'the process ended'}")
        return answer[1:].rstrip("\n")


def rows() -> dict[str, Callable[[], float]]:
    """What the tree of this process can time, in microseconds; by names that another tree has as well."""
    calls, decode, overhead, prefill, protocol = map(
        importlib.import_module, ("calls", "decode", "overhead", "prefill", "protocol")
    )
    torch = importlib.import_module("torch")

    def on_device(case, variant) -> Callable[[], float]:  # the types are those of the tree
        def run() -> float:
            us = protocol.time_graph(calls.calls_of(case, variant))
            torch.cuda.empty_cache()
            return us

        return run

    def on_host(case, variant: str) -> Callable[[], float]:
        def run() -> float:
            step = calls.Step(case, protocol.Variant.parse(variant))
            return overhead.host_us(step.call(step.buffers()))

        return run

    found = {
        f"{bench} {case.name} {variant.name}": on_device(case, variant)
        for bench, module in (("decode", decode), ("prefill", prefill))
        for case, variant in module.chosen(module.parse([]))
        if bench == "decode" or case in protocol.cases()
    }
    return found | {f"host {case.name} {name}": on_host(case, name) for case, names in overhead.HOST for name in names}


def work(root: str) -> None:
    """Answers on standard output, a line for each line that comes."""
    sys.path[0] = os.path.join(root, "benchmarks")  # not this file's folder, which may be of another tree
    answers, found = os.fdopen(os.dup(1), "w"), rows()
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        name = line.rstrip("\n")
        answer = "\t".join(found) if name == "names" else repr(found[name]())
        print(f"={answer}", file=answers, flush=True)


def compare(trees: tuple[Tree, Tree], name: str, limit: float) -> tuple[float, float]:
    """The fastest time of each tree, base first."""
    best = [float("inf")] * 2
    for turn in range(MORE_TURNS):
        if turn >= TURNS and best[1] <= best[0] * (1 + limit / 200):
            break
        for i, tree in enumerate(trees):
            best[i] = min(best[i], tree.time(name))
    return best[0], best[1]


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2])
        return 0
    import protocol

    parser = protocol.parser(__doc__)
    parser.add_argument("base", type=Path, help="the other checkout")
    parser.add_argument("--base-commit", default="unknown")
    parser.add_argument("--limit", type=float, default=2.0, help="percent (default: %(default)s)")
    parser.add_argument("--only", default="", help="rows whose name has one of these, separated by commas, in it")
    args: argparse.Namespace = parser.parse_args()
    where = protocol.environment(args.commit) | {"base_commit": args.base_commit}
    trees = Tree(args.base.resolve()), Tree(HERE.parent)
    both = set(trees[0].names()) & set(trees[1].names())
    slower = 0
    for name in (one for one in trees[1].names() if one in both and any(part in one for part in args.only.split(","))):
        base, us = compare(trees, name, args.limit)
        ratio = us / base
        slower += ratio > 1 + args.limit / 100
        print(f"{ratio:6.3f} {us:9.3f} {base:9.3f}  {name}{'  SLOWER' if ratio > 1 + args.limit / 100 else ''}", flush=True)
        row = {"bench": "compare", "row": name, "us": round(us, 3), "base_us": round(base, 3), "ratio": round(ratio, 4)}
        protocol.append_rows(args.out, [row | where])
    print(f"{slower} rows slower by more than {args.limit:g} %")
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
