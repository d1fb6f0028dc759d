"""The tests that `benchmarks.run.sanitize` runs are there, each with a case on a GPU."""

from __future__ import annotations

import pytest

from benchmarks.run import sanitize


@pytest.fixture(scope="module")
def names() -> list[str]:
    """Of all sets at once, as collecting takes seconds."""
    paths = dict.fromkeys(path for name in sanitize.TESTS for path in sanitize.chosen(name))
    return sanitize.collect(list(paths), "cuda and not torch-cuda")


@pytest.mark.parametrize("name", sanitize.TESTS)
def test_every_path_of_a_set_chooses_a_test(name: str, names: list[str]) -> None:
    for path in sanitize.chosen(name):
        found = [node for node in names if node == path or node.startswith((f"{path}::", f"{path}["))]
        assert found and all("cuda" in node for node in found), path


def test_sets_files_and_tests_stand_side_by_side() -> None:
    assert sanitize.chosen("training,tests/calls/test_plan.py") == [*sanitize.TESTS["training"], "tests/calls/test_plan.py"]
