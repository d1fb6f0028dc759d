"""Everything that is measured and checked on a GPU, in one go: kernels compiled on all cores, the test suite, the sanitizers,
every benchmark. What comes of it is added to the results of one folder; `documents.py` makes the documents of them.

python -m benchmarks.run.record --into benchmarks/results
                               [--logs FOLDER] [--only decode,prefill] [--seconds 900] [--commit COMMIT]

Stages run one after the other, so that nothing disturbs a timing, and the ones that are cheap and most wanted come first. None
starts that the time left does not hold, and none runs longer than its share; which those were is said at the end. `adapters`
needs an engine of `make engines`, and `parallel` two GPUs: left out where there are none, and failed where asked for by name.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..lib import bounded

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stage:
    """One command.

    seconds: what it may take, about twice what it took on an H200 with 16 cores. lacks: what it needs and is not there.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    lacks: Callable[[], str] = str

    def line(self, into: Path, commit: str | None) -> list[str]:
        found = [sys.executable, *self.command]
        if "{out}" in found:
            at = found.index("{out}")
            found[at : at + 1] = [str(into / f"{self.name.partition('-')[0]}.jsonl"), *(("--commit", commit) if commit else ())]
        return found


def _bench(name: str, seconds: int, *options: str, module: str = "") -> Stage:
    """`module`: below `benchmarks`, where it is not `run` and the name."""
    module = module or f"run.{name.partition('-')[0]}"
    return Stage(name, ("-m", f"benchmarks.{module}", "--out", "{out}", *options), seconds)


ENGINES = ROOT / "build" / "engines"
GPUS = 2  # that `parallel` cuts over


def no_engine() -> str:
    return "" if (ENGINES / "vllm").is_dir() else "make engines"


def no_gpus() -> str:
    import torch

    return "" if torch.cuda.device_count() >= GPUS else f"{GPUS} GPUs"


ACROSS = ("-m", "torch.distributed.run", "--nproc-per-node", str(GPUS), "-m", "benchmarks.run.parallel", "--out", "{out}")
PARALLEL = ("-n", "12", "--dist", "worksteal")
STAGES = (
    Stage("precompile", ("-m", "benchmarks.run.precompile"), 90),
    _bench("decode", 120),
    _bench("prefill", 90, "--parts", "protocol,mixed"),
    _bench("step", 180, module="run.model_step"),
    _bench("overhead", 60),
    _bench("window_reduction", 30, module="experiments.window_reduction"),
    _bench("pages", 20, module="experiments.pages"),
    _bench("parts", 40, module="experiments.parts"),
    _bench("store", 60),
    _bench("store-places", 30, "--places", "131072"),
    _bench("v41", 60),
    _bench("metadata", 40),
    _bench("training", 120),
    _bench("trtllm", 60),
    _bench("transformers", 120, "--device", "cuda"),
    _bench("launches", 60),
    Stage("adapters", _bench("adapters", 0, "--engines", str(ENGINES)).command, 240, no_engine),
    Stage("parallel", ACROSS, 300, no_gpus),
    # racecheck and memcheck side by side, with 7 processes each, took 175 s; racecheck with one did not end in 380 s.
    _bench("sanitizer", 500, "--timeout", "490", module="run.sanitize"),
    # An illegal access spoils a process for all tests behind it, and this file provokes what would be one.
    _bench("suite-fuzz", 180, "--seconds", "170", "--", "-m", "gpu", "tests/calls/test_fuzz.py", module="run.suite"),
    # 600 s where every kernel has to be compiled first.
    _bench("suite", 700, "--seconds", "680", "--", *PARALLEL, "--ignore", "tests/calls/test_fuzz.py", module="run.suite"),
    _bench("prefill-scaling", 120, "--parts", "scaling"),
    _bench("representations", 60, module="experiments.representations"),
)


def run(stage: Stage, args: argparse.Namespace, left: float) -> str:
    """Runs a stage; returns how it ended."""
    start = time.monotonic()
    with (args.logs / f"{stage.name}.log").open("w") as log:
        code, _ = bounded.run(stage.line(args.into, args.commit), min(stage.seconds, left), cwd=ROOT, log=log)
    how = {0: "done in", None: "cut off after"}.get(code, f"failed with {code} in")
    return f"{how} {time.monotonic() - start:.0f} s"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, required=True, help="folder of the results")
    parser.add_argument("--logs", type=Path, help="folder of what the stages print (default: logs, inside that of the results)")
    parser.add_argument("--only", default="", help=f"of {','.join(stage.name for stage in STAGES)}")
    parser.add_argument("--seconds", type=float, default=1800, help="for all stages together (default: %(default)s)")
    parser.add_argument("--commit", help="what the rows give as the commit (default: git's HEAD)")
    args = parser.parse_args(arguments)
    wanted = [name for name in args.only.split(",") if name]
    unknown = set(wanted) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"--only must be of {', '.join(stage.name for stage in STAGES)}, got {', '.join(sorted(unknown))}")
    args.stages = [stage for stage in STAGES if not wanted or stage.name in wanted]
    args.logs = args.logs or args.into / "logs"
    return args


def main() -> int:
    args = parse()
    args.into.mkdir(parents=True, exist_ok=True)
    args.logs.mkdir(parents=True, exist_ok=True)
    deadline, ends = time.monotonic() + args.seconds, []
    for stage in args.stages:
        left = deadline - time.monotonic()
        if lacking := stage.lacks():
            ends += [f"not started, needs {lacking}"] if args.only else []
            print(f"{stage.name}: left out, needs {lacking}", flush=True)
            continue
        ends.append(run(stage, args, left) if left > stage.seconds / 2 else f"not started, {max(left, 0):.0f} s were left")
        print(f"{stage.name}: {ends[-1]}", flush=True)
    return 0 if all(end.startswith("done") for end in ends) else 1


if __name__ == "__main__":
    sys.exit(main())
