"""`verify` in several processes: the same results, and a fault or a lost device costs no more than it must."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial

from kvfold.verify.apart import groups, verify_apart
from kvfold.verify.cases import Case, list_cases

LISTED = partial(list_cases, "cpu", backend="torch", quick=True)


def ends() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def loses() -> str:
    raise RuntimeError("CUDA error: an illegal memory access")


def leaves() -> str:
    sys.exit("out of patience")


def faulty() -> list[Case]:
    return [Case("a", "1: x", str), Case("a", "1: y", ends), Case("a", "1: z", str), Case("b", "2", str)]


def lost() -> list[Case]:
    return [Case("a", "1: x", str), Case("a", "1: y", loses), Case("a", "1: z", str)]


def leaving() -> list[Case]:
    return [Case("a", "1: x", leaves), Case("a", "1: y", str), Case("b", "2", str)]


def both() -> list[Case]:
    return [Case("a", "1: x", ends), Case("a", "1: y", loses), Case("a", "1: z", str)]


def test_each_case_is_in_one_group_and_long_groups_begin_first() -> None:
    cases = LISTED()
    some = [i for i, case in enumerate(cases) if not case.skip]
    found = groups(cases, some)
    assert sorted(i for group in found for i in group) == some
    assert [len(group) for group in found] == sorted(map(len, found), reverse=True) and len(found) > 60
    assert {cases[i].name.partition(":")[0] for i in found[0]} == {"hca at ratio 32 FoldState"}


def test_processes_find_what_one_does() -> None:
    cases = LISTED()
    some = [i for i, case in enumerate(cases) if case.name.startswith(("indexer_mxfp4 hd", "v41-r1, no state"))]
    found = {(r.group, r.name): r.figure for r in verify_apart(LISTED, some, 2) if r.passed}
    assert found == {(cases[i].group, cases[i].name): cases[i].run() for i in some} and len(found) == 5


def test_no_case_ends_the_run_by_leaving() -> None:
    found = {r.name: r.problem for r in verify_apart(leaving, range(3), 1)}
    assert found == {"1: x": "SystemExit: out of patience", "1: y": "", "2": ""}


def test_a_fault_ends_one_case_and_a_lost_device_all() -> None:
    found = {r.name: r.problem for r in verify_apart(faulty, range(4), 2)}
    assert found == {"1: x": "", "1: y": "a fault ended the process", "1: z": "", "2": ""}
    assert [r.name for r in verify_apart(lost, range(3), 1)] == ["1: x", "1: y"]
    assert [r.name for r in verify_apart(both, range(3), 1)] == ["1: x", "1: y"]  # and of those that run by themselves
