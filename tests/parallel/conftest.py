"""The ranks, started once for all tests of the folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.parallel_support import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("gloo"))
    yield made
    made.close()
