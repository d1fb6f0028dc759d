"""Cases of `verify` in several processes: on a GPU compiling takes most of the time, and a kernel is compiled by one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch

from ..precompile.workers import processes
from .cases import Case, Result, verify
from .run import LOST

Numbers = list[int]


def verify_apart(listed: Callable[[], list[Case]], numbers: Sequence[int], workers: int) -> Iterator[Result]:
    """Runs cases of a list in `workers` processes, and yields results as they come; after a device is lost none follow.

    Processes are spawned: a script calls this under `if __name__ == "__main__"`. A fault that ends one ends that case alone.

    Args:
        listed: makes the list, here and in each process, as cases are no data; a function that pickle finds by its name.
        numbers: of the cases to run.
    """
    cases = listed()
    waiting = groups(cases, numbers)
    while waiting:
        try:
            with processes(min(workers, len(waiting))) as pool:
                jobs = {pool.submit(partial(_run, listed), group): group for group in waiting}
                try:
                    for job in as_completed(jobs):
                        results = job.result()
                        waiting.remove(jobs[job])
                        for result in results:
                            yield result
                            if _lost(result):
                                return
                finally:
                    pool.shutdown(cancel_futures=True)
        except BrokenProcessPool:
            # Whose fault it was is not told. What did not get done is run anew, and one of it, case by case, first.
            group = waiting.pop(0)
            for number in group:
                result = _alone(listed, cases[number], number)
                yield result
                if _lost(result):
                    return


def groups(cases: Sequence[Case], numbers: Sequence[int]) -> list[Numbers]:
    """Cases that share kernels, which one process compiles once: their names are the same up to a colon. The longest first."""
    found: dict[tuple[str, str], Numbers] = {}
    for number in numbers:
        found.setdefault((cases[number].group, cases[number].name.partition(":")[0]), []).append(number)
    return sorted(found.values(), key=lambda group: -len(group))


def _lost(result: Result) -> bool:
    return any(words in result.problem for words in LOST)


def _alone(listed: Callable[[], list[Case]], case: Case, number: int) -> Result:
    try:
        with processes(1) as pool:
            return pool.submit(partial(_run, listed), [number]).result()[0]
    except BrokenProcessPool:
        return Result(case.group, case.name, "", 0.0, "a fault ended the process")


def _run(listed: Callable[[], list[Case]], numbers: Numbers) -> list[Result]:
    """In a process for that."""
    torch.set_num_threads(1)
    cases = listed()
    return list(verify(cases[number] for number in numbers))
