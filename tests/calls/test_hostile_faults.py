"""The generator of hostile calls sees what it is there to see: each kind of fault, made on purpose, is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import BACKENDS
from support import hostile_call, hostile_outcome, hostile_run, hostile_world
from support.hostile_cases import Case, Spoil

from kvfold.arguments.checks import check_int

TORCH = BACKENDS["torch"]
GOOD = Case("restore", "rows", (), ())
BAD_SLOTS = Case("restore", "rows", (), (Spoil("given", "slots", "tensor", "as torch.float32"),))
OTHER_PAGES = Case("store", "rows", (), (Spoil("made", "plan.rows_per_page", "value", "5"),))
NEGATED = Case("restore", "rows", (), (Spoil("given", "slots", "tensor", "negated view"),))


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[dict[str, Any]], Any]], None]:
    """Puts something in place of `restore` and `store`."""

    def replace(call: Callable[[dict[str, Any]], Any]) -> None:
        for name in ("restore", "store"):
            monkeypatch.setitem(hostile_world.FUNCTIONS, name, hostile_world.FUNCTIONS[name]._replace(call=call))
        hostile_call.world_of.cache_clear()

    yield replace
    hostile_call.world_of.cache_clear()


def raising(error: Exception) -> Callable[[dict[str, Any]], None]:
    def call(given: dict[str, Any]) -> None:
        raise error

    return call


def writing_first(given: dict[str, Any]) -> None:
    given["state"].rows[0, 0] = 7
    hostile_world._restore(given)


def writing_beside(given: dict[str, Any]) -> None:
    slots = given["slots"]
    slots.as_strided((1,), (1,), slots.storage_offset() + len(slots))[0] = 7


def nothing(given: dict[str, Any]) -> None:
    pass


def reading_the_storage(given: dict[str, Any]) -> None:
    slots = given["slots"]
    given["slots"] = slots._neg_view().clone() if slots.is_neg() else slots
    hostile_world._restore(given)


def test_good() -> None:
    found = hostile_call.run(GOOD, TORCH)
    assert found.word == "ok", found


def test_refused() -> None:
    found = hostile_call.run(BAD_SLOTS, TORCH)
    assert found.word == "refused" and "slots" in found.text


@pytest.mark.parametrize(
    "case, call, word",
    [
        (BAD_SLOTS, raising(RuntimeError("slots must be int32")), "unnamed RuntimeError"),
        (BAD_SLOTS, raising(AttributeError("'slots'")), "unnamed AttributeError"),
        (BAD_SLOTS, raising(ValueError("slots must be int32")), "ValueError of torch"),  # not raised by kvfold
        (BAD_SLOTS, writing_first, "written before an error"),
        (GOOD, writing_beside, "bytes outside"),
        (OTHER_PAGES, nothing, "accepted, though two differ"),
        (NEGATED, reading_the_storage, "wrong result"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults(replaced: Callable, case: Case, call: Callable[[dict[str, Any]], Any], word: str) -> None:
    replaced(call)
    found = hostile_call.run(case, TORCH)
    assert found.word == word and found.fault, found


def test_an_error_that_names_something_else() -> None:
    with pytest.raises(ValueError) as caught:
        check_int("ratio", 0, 1, 4)
    assert hostile_outcome.judge(BAD_SLOTS, caught.value).word == "other name"


def test_a_process_that_ends(tmp_path: Path) -> None:
    """The call that it was making is the fault, and those behind it are made all the same."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        "start, stop = map(int, sys.argv[sys.argv.index('--child') + 1].split(':'))\n"
        "for i in range(start, stop):\n"
        "    print(json.dumps({'word': 'begun', 'case': 'restore over rows; slots'}), flush=True)\n"
        "    if i == 3:\n"
        "        os.abort()\n"
        "    print(json.dumps({'index': i, 'function': 'restore', 'word': 'ok'}), flush=True)\n"
    )
    summary = hostile_run.run(0, 0, 6, "torch", script)
    assert summary.calls == 6 and summary.counts["restore", "ok"] == 5
    assert [(fault.index, fault.word) for fault in summary.faults] == [(3, "crash")]
    assert "seed 0, call 3" in hostile_run.table(summary)


def test_a_call_is_the_same_again() -> None:
    """Whatever was called before it."""
    first = [str(hostile_call.call(3, index, TORCH).case) for index in range(12)]
    assert [str(hostile_call.call(3, index, TORCH).case) for index in reversed(range(12))] == first[::-1]
