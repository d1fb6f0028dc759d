"""`kvfold verify`: is kvfold right on this machine?"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from .failures import MOST_SEED, stop, wrong_arguments
from .show import check_device, make_console, make_progress, print_table, print_text

if TYPE_CHECKING:
    from kvfold.verify.cases import Result

GROUPS = {"table": "rows of the kernels' table", "format": "record formats", "equivalence": "other equivalences"}
INDENT = 5  # of what belongs to the line before


def verify(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
    backend: Annotated[str | None, typer.Option(help="triton or torch; default: triton where it runs.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One pair of dtypes for each row of the kernels' table.")] = False,
    only: Annotated[str, typer.Option(help="Cases whose line has this in it.")] = "",
    random: Annotated[
        int | None, typer.Option(min=1, max=1 << 30, help="Instead, so many cases drawn from all that is supported.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="Of --random; default: 0.")] = None,
    first: Annotated[
        int | None, typer.Option(min=0, max=1 << 30, help="Of --random: the first case; with --random 1 that case alone.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Processes; default: on a GPU one for each core, 16 at most; on a CPU 1."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--json", help="File for all results.")] = None,
) -> None:
    """Checks every configuration and record format against fp64, and every equivalence, on this machine."""
    import torch

    from kvfold import __version__
    from kvfold.arguments.files import check_writable, write_atomically

    console = make_console()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    if backend is None:
        backend = "triton" if device == "cuda" or _interpreted() else "torch"
    if random is None and (seed, first) != (None, None):
        raise typer.BadParameter("--seed and --first are for --random N")
    if random is not None and (quick or only):
        raise typer.BadParameter("--quick and --only are for verify without --random")
    if out is not None:
        check_writable(out)
    if device == "cpu":
        torch.set_num_threads(1)  # the tensors are small: more threads wait for each other, five times as long beside others
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    about = {"device": where, "backend": backend + " (interpreted)" * (backend == "triton" and device == "cpu")}
    about |= {"torch": torch.__version__, "kvfold": __version__, "triton": _triton()}
    begin = time.perf_counter()
    if random is not None:
        workers = (None if device == "cuda" else 1) if workers is None else workers
        found, failed = _run_random(console, about, random, seed or 0, device, backend, first or 0, workers)
    else:
        workers = 1 if workers is None and device == "cpu" else workers
        found, failed = _run_list(console, about, device, backend, quick, only, workers)
    if out is not None:
        with write_atomically(out) as beside:
            beside.write_text(json.dumps(about | {"seconds": round(time.perf_counter() - begin)} | found, indent=1) + "\n")
    if failed:
        raise typer.Exit(1)


def _run_list(
    console: Console, about: dict[str, str], device: str, backend: str, quick: bool, only: str, workers: int | None
) -> tuple[dict[str, Any], int]:
    """The list of cases; results as plain values, and how many failed. workers: 1 for this process, None for all cores."""
    from kvfold.precompile.choices import check_workers
    from kvfold.verify.apart import groups, verify_apart
    from kvfold.verify.cases import list_cases
    from kvfold.verify.cases import verify as run

    listed = partial(list_cases, device, backend=backend, quick=quick)
    with wrong_arguments(ValueError):
        whole = listed()
    numbers = [i for i, case in enumerate(whole) if only in f"{case.group}: {case.name}"]
    cases = [whole[i] for i in numbers]
    if not cases:
        raise typer.BadParameter(f"--only must be in the line of some case, got {only!r}")
    to_run = [i for i in numbers if not whole[i].skip]  # what is skipped takes no time
    workers = min(check_workers(workers), len(groups(whole, to_run)))
    _headline(console, f"{len(cases)} cases", about, f", {workers} processes" * (workers > 1))
    results, begin = [], time.perf_counter()
    with make_progress(console) as progress:
        task = progress.add_task("", total=len(to_run))
        for result in verify_apart(listed, to_run, workers) if workers > 1 else run(whole[i] for i in to_run):
            results.append(result)
            progress.update(task, advance=1, description=escape(result.name))
            _show(console, result, about["backend"])
    lost = len(to_run) - len(results)
    order = {(case.group, case.name): i for i, case in enumerate(cases)}
    results = sorted([*results, *run(case for case in cases if case.skip)], key=lambda r: order[r.group, r.name])
    failed, skipped = sum(bool(r.problem) for r in results), Counter(r.skipped for r in results if r.skipped)
    ran = len(results) - skipped.total()
    left = [f"{count} skipped: {reason}" for reason, count in skipped.items()]
    if not ran:
        raise stop(f"nothing was run; {', '.join(left)}", "kvfold verify")
    for line in left:
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
    print_table(console, "", ("cases", "passed", "failed", "skipped", "backend"), _summary(results, about["backend"]))
    _print_verdict(console, failed, ran, lost, f"on backend {about['backend']} in {time.perf_counter() - begin:.0f} s")
    rows = [asdict(r) | {"passed": r.passed, "backend": "" if r.skipped else about["backend"]} for r in results]
    return {"failed": failed, "skipped": skipped.total(), "not run": lost, "results": rows}, failed


def _summary(results: list[Result], backend: str) -> list[tuple[str, ...]]:
    """Of each group, how its cases went, and the backend that they ran on."""
    rows = []
    for group in dict.fromkeys(result.group for result in results):
        of_group = [result for result in results if result.group == group]
        passed, failed = sum(r.passed for r in of_group), sum(bool(r.problem) for r in of_group)
        skipped = len(of_group) - passed - failed
        rows.append((GROUPS.get(group, group), str(passed), str(failed), str(skipped), backend if passed + failed else "none"))
    return rows


def _show(console: Console, result: Result, backend: str) -> None:
    verdict = ("pass", "green") if result.passed else ("FAIL", "bold red")
    said, figures = f" {result.group}: {result.name}, {backend}", f"{result.figure}  {result.seconds:.1f} s"
    joint = "  " if 4 + len(said) + 2 + len(figures) <= console.width - INDENT else "\n"  # so figures are not torn
    print_text(console, Text.assemble(verdict, said, joint, figures), indent=INDENT)
    if not result.passed:
        console.print(f"{' ' * INDENT}{result.problem}", style="red", soft_wrap=True, highlight=False, markup=False)


def _run_random(
    console: Console, about: dict[str, str], cases: int, seed: int, device: str, backend: str, first: int, workers: int | None
) -> tuple[dict[str, Any], int]:
    """Drawn cases; a summary, and how many failed. Of each that fails its program is printed."""
    from kvfold.verify.run import summary, verify_random

    with wrong_arguments(ValueError):
        found = verify_random(cases, seed, device=device, backend=backend, first=first, workers=workers)
    _headline(console, f"{cases} random cases of seed {seed}", about)
    outcomes = []
    with make_progress(console) as progress:
        task = progress.add_task("", total=cases)
        for outcome in found:
            outcomes.append(outcome)
            progress.advance(task)
            if not outcome.passed:
                console.print(f"[bold red]FAIL[/] case {outcome.index} of seed {seed}", highlight=False)
                console.print(f"     {outcome.problem}", style="red", soft_wrap=True, highlight=False, markup=False)
                console.print(outcome.program, soft_wrap=True, highlight=False, markup=False)
    failed, left = sum(not outcome.passed for outcome in outcomes), cases - len(outcomes)
    _print_verdict(console, failed, len(outcomes), left, f"on backend {about['backend']}")
    return summary(outcomes, seed, cases), failed


def _print_verdict(console: Console, failed: int, ran: int, lost: int, where: str) -> None:
    """The last line. lost: cases that were not run, as the device is lost."""
    verdict = f"[bold red]{failed} of {ran} failed[/]" if failed else f"[green]all {ran} passed[/]"
    rest = f"; {lost} were not run, as the device is lost" if lost else ""
    console.print(f"{verdict} {where}{rest}", highlight=False, soft_wrap=True)


def _headline(console: Console, what: str, about: dict[str, str], how: str = "") -> None:
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "kvfold"))
    print_text(console, f"{what} on {about['device']}, backend {about['backend']}, {versions}{how}")


def _interpreted() -> bool:
    try:
        from kvfold.backend_triton.build import INTERPRETED
    except ImportError:  # no triton: the torch backend needs none
        return False
    return bool(INTERPRETED)


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)
