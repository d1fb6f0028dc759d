"""`verify --random`: runs drawn cases, in one process or several, and counts what they were."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from ..arguments.checks import check_int
from ..calls.checks import choose_backend
from ..precompile.choices import check_workers
from ..precompile.workers import processes
from ..testing.told import Told
from .case import Mismatch
from .program import Place, program
from .random import BUDGETS, CASES_PER_SHAPE, RATIOS, RandomCase, draw_case

MOST_CASES = 1 << 30
LOST = ("CUDA error", "HIP error")  # after which no call of the process works


@dataclass(frozen=True)
class Outcome:
    """What came of a case. `problem` is "" when it passed; `program` then too, and otherwise runs as it is and fails likewise.

    Attributes:
        labels: what the case was, by the names that a summary counts under.
    """

    index: int
    labels: dict[str, str]
    seconds: float
    problem: str = ""
    program: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem


def verify_random(
    cases: int,
    seed: int = 0,
    *,
    device: str = "cpu",
    backend: str | None = None,
    first: int = 0,
    workers: int | None = 0,
) -> Iterator[Outcome]:
    """Draws cases from all that is supported and runs them: against fp64, and to the bit across cuts.

    Args:
        cases: how many. seed: of all of them; case i of a seed is the same in every run of a kvfold on such a backend.
        device: "cpu", "cuda" or "cuda:N". backend: as for `compress`.
        first: the index of the first one.
        workers: processes that run cases at once, from 1 to 256, as on a GPU compiling takes most of the time; None for one for
            each core, 16 at most. They are spawned: a script calls this under `if __name__ == "__main__"`. 0: this process does
            it, which a fault in a kernel may then end.

    Yields:
        An `Outcome` for each case, in order. After an error of which the device does not recover none follow.

    Raises:
        TypeError, ValueError: naming the argument, before anything is run.
    """
    check_int("cases", cases, 1, MOST_CASES)
    check_int("seed", seed, -(1 << 63), (1 << 63) - 1)
    check_int("first", first, 0, MOST_CASES)
    if workers != 0 or isinstance(workers, bool):
        workers = check_workers(workers)
    place = Place(device, choose_backend(backend, "device", torch.empty(0, device=device)))
    return _run(range(first, first + cases), seed, place, workers)


def _run(indices: range, seed: int, place: Place, workers: int) -> Iterator[Outcome]:
    here = (run_case(_drawn(seed, place, index), place) for index in indices)
    for outcome in _run_apart(indices, seed, place, workers) if workers else here:
        yield outcome
        if any(words in outcome.problem for words in LOST):
            return


def _run_apart(indices: Sequence[int], seed: int, place: Place, workers: int) -> Iterator[Outcome]:
    """In processes. A fault that ends one takes all with it: each case of that group is then run by itself, the rest anew."""
    groups = [list(group) for _, group in groupby(indices, lambda i: i // CASES_PER_SHAPE)]
    while groups:
        try:
            with processes(workers) as pool:
                for group in pool.map(partial(_run_group, seed, place), list(groups)):
                    groups.pop(0)
                    yield from group
        except BrokenProcessPool:
            group = groups.pop(0)
            if len(indices) == 1:
                case = _drawn(seed, place, *group)
                yield Outcome(case.index, labels(case), 0.0, "a fault ended the process", program(case, place))
            else:
                for index in group:
                    yield from _run_apart([index], seed, place, 1)


def _run_group(seed: int, place: Place, indices: list[int]) -> list[Outcome]:
    """Cases of one shape, in a process for that."""
    torch.set_num_threads(1)
    return [run_case(_drawn(seed, place, index), place) for index in indices]


def _drawn(seed: int, place: Place, index: int) -> RandomCase:
    interpreted = place.backend == "triton" and torch.device(place.device).type == "cpu"
    return draw_case(seed, index, BUDGETS["interpreted" if interpreted else place.backend])


def run_case(case: RandomCase, place: Place) -> Outcome:
    """Runs a case's program."""
    text, begin, problem = program(case, place), time.perf_counter(), ""
    try:
        exec(compile(text, f"case {case.index} of seed {case.seed}", "exec"), {"__name__": "kvfold_case"})
    except (Mismatch, AssertionError) as error:
        problem = str(error)
    except (Exception, SystemExit) as error:  # whatever a call raises where it should not is what is looked for
        problem = f"{type(error).__name__}: {error}"
    return Outcome(case.index, labels(case), time.perf_counter() - begin, problem, text if problem else "")


def _told(told: Told) -> str:
    """By name what an engine has of its own."""
    named = {"totals": told.totals, "int64": told.wide, "strided": told.apart, "rows before": told.before}
    named |= {"reserved places": told.reserved >= 0, "0 for none": told.null == 0}
    return ", ".join(name for name, on in named.items() if on) or "plainly"


def labels(case: RandomCase) -> dict[str, str]:
    """What a summary counts."""
    s = case.shape
    low, high = next((low, high) for _, low, high in RATIOS if low <= s.spec.ratio <= high)
    fields = {"overlap": s.spec.overlap, "ape": s.spec.has_ape, "RoPE": s.spec.rope_dim, "Hadamard": s.spec.hadamard}
    return {
        "state": "none" if s.state == "none" else f"{s.state} {s.state_dtype}{' in pages' * s.in_pages}{', rounds' * s.rounds}",
        "format": s.fmt or "none",
        "ratio": f"{low} to {high}",
        "head_dim": str(s.spec.head_dim),
        "spec": ", ".join(name for name, on in fields.items() if on) or "plain",
        "kv_score": s.kv_dtype + ", two tensors" * s.two,
        "norm_weight": s.norm_dtype,
        "rows": s.rows or "none",
        "latent": "yes" if s.latent else "none",
        "entries by": s.addressing,
        "plans told": _told(s.told),
        "values": case.values,
        "history": case.history,
    }


def summary(outcomes: list[Outcome], seed: int, asked: int) -> dict[str, object]:
    """Plain values for a report: how many failed, with their programs, and how often each thing occurred."""
    names = outcomes[0].labels if outcomes else ()
    counts = {name: dict(sorted(Counter(outcome.labels[name] for outcome in outcomes).items())) for name in names}
    failed = [
        {"case": o.index, "problem": o.problem, "labels": o.labels, "program": o.program} for o in outcomes if not o.passed
    ]
    return {"seed": seed, "cases": len(outcomes), "not run": asked - len(outcomes), "failed": len(failed),
            "counts": counts, "failures": failed}  # fmt: skip
