"""The tests that `benchmarks.run.sanitize` runs are there, each with a case on a GPU."""

from __future__ import annotations

import pytest

from benchmarks.run import sanitize


@pytest.mark.parametrize("name", sanitize.TESTS)
def test_every_path_of_a_set_chooses_a_test(name: str) -> None:
    paths = sanitize.chosen(name)
    names = sanitize.collect(paths, "cuda and not torch-cuda")
    for path in paths:
        found = [node for node in names if node == path or node.startswith((f"{path}::", f"{path}["))]
        assert found and all("cuda" in node for node in found), path


def test_sets_files_and_tests_stand_side_by_side() -> None:
    assert sanitize.chosen("training,tests/calls/test_plan.py") == [*sanitize.TESTS["training"], "tests/calls/test_plan.py"]
