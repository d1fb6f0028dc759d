"""Times trees of this repository row by row in turn, on one GPU in one run: is any row of the protocol slower than in the base?

python -m benchmarks.run.compare BASE --out benchmarks/results/compare.jsonl [--trees FOLDER,FOLDER]
                                [--base-commit COMMIT] [--limit 2] [--only WORDS,WORDS]

BASE is another checkout, of this layout or the one before (`benchmarks/*.py` flat). It is compared with this one, or with
each of `--trees`. Each tree has a process of its own, with its own kernels and calls; for each row they take turns. A tree
that looks slower by more than half of the limit is timed again, and the base with it; what counts is the fastest time of each
tree, as what else runs on a machine only adds. Also compared: the host's time for an eager call. Exits with 1 where a row is
slower by the limit, or could not be timed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TURNS, MORE_TURNS = 1, 6
PLACES = {"calls": "lib", "protocol": "lib", "decode": "run", "overhead": "run", "prefill": "run"}  # of a tree's modules


class NotTimed(Exception):
    pass


class Tree:
    """A process that times rows of one checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(root)],
            env={**os.environ, "PYTHONPATH": str(root / "src")},
            cwd=root,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
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
        if not answer:
            raise RuntimeError(f"{what}: the process of {self.root} ended")
        if not answer.startswith("="):
            raise NotTimed(f"{what}: {self.root}: {answer.strip()}")
        return answer[1:].rstrip("\n")


def modules_of(root: Path) -> list:
    """The modules of `PLACES` as a tree has them: in a package, or flat in a folder."""
    if (root / "benchmarks" / "lib").is_dir():
        sys.path[0] = str(root)  # not this file's folder, which may be of another tree
        return [importlib.import_module(f"benchmarks.{place}.{name}") for name, place in PLACES.items()]
    sys.path[0] = str(root / "benchmarks")
    return [importlib.import_module(name) for name in PLACES]


def rows(root: Path) -> dict[str, Callable[[], float]]:
    """What the tree of this process can time, in microseconds; by names that another tree has as well."""
    calls, protocol, decode, overhead, prefill = modules_of(root)
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


def work(root: Path) -> None:
    """Answers on standard output, a line for each line that comes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    found = rows(root)
    for line in sys.stdin:
        name = line.rstrip("\n")
        try:
            answer = "=" + ("\t".join(found) if name == "names" else repr(found[name]()))
        except Exception as error:  # the other rows are worth having
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, file=answers, flush=True)


def compare(base: Tree, trees: list[Tree], name: str, limit: float) -> tuple[float, list[float]]:
    """The fastest time of the base, and of each tree."""
    best, base_us = [float("inf")] * len(trees), float("inf")
    for turn in range(MORE_TURNS):
        again = [i for i in range(len(trees)) if turn < TURNS or best[i] > base_us * (1 + limit / 200)]
        if not again:
            break
        base_us = min(base_us, base.time(name))
        for i in again:
            best[i] = min(best[i], trees[i].time(name))
    return base_us, best


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]))
        return 0
    from ..lib import protocol

    parser = protocol.parser(__doc__)
    parser.add_argument("base", type=Path, help="the other checkout")
    parser.add_argument("--trees", default=str(ROOT), help="checkouts, separated by commas (default: this one)")
    parser.add_argument("--base-commit", default="unknown")
    parser.add_argument("--limit", type=float, default=2.0, help="percent (default: %(default)s)")
    parser.add_argument("--only", default="", help="rows whose name has one of these, separated by commas, in it")
    args: argparse.Namespace = parser.parse_args()
    where = protocol.environment(args.commit) | {"base_commit": args.base_commit}
    base, trees = Tree(args.base.resolve()), [Tree(Path(root).resolve()) for root in args.trees.split(",")]
    known, has = set(base.names()), [tree.names() for tree in trees]
    slower = failed = 0
    for name in dict.fromkeys(one for names in has for one in names if one in known):
        if not any(part in name for part in args.only.split(",")):
            continue
        able = [tree for tree, names in zip(trees, has, strict=True) if name in names]
        try:
            base_us, times = compare(base, able, name, args.limit)
        except NotTimed as error:
            print(error, flush=True)
            failed += 1
            continue
        for tree, us in zip(able, times, strict=True):
            ratio = us / base_us
            slow = ratio > 1 + args.limit / 100
            slower += slow
            whose = f"  {tree.root.name}" if len(trees) > 1 else ""
            print(f"{ratio:6.3f} {us:9.3f} {base_us:9.3f}  {name}{whose}{'  SLOWER' if slow else ''}", flush=True)
            row = {"bench": "compare", "row": name, "us": round(us, 3), "base_us": round(base_us, 3), "ratio": round(ratio, 4)}
            row |= {"tree": tree.root.name} if len(trees) > 1 else {}
            protocol.append_rows(args.out, [row | where])
    print(f"{slower} rows slower by more than {args.limit:g} %" + (f", {failed} could not be timed" if failed else ""))
    return 1 if slower or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
