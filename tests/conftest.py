"""The backends that every test runs on. Tests marked `gpu` are skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before kvfold is

from hypothesis import HealthCheck, settings
from support import fast_interpreter
from support.helpers import Backend

if TYPE_CHECKING:
    from support.parallel_support import World

if os.environ.get("TRITON_INTERPRET") == "1":
    fast_interpreter.install()

# The tensors are small, and pytest-xdist already fills the cores: more threads only spin against each other.
torch.set_num_threads(1)

# Drawn tests are the same in every run; `pytest --hypothesis-profile=long` draws others every time, and many.
_SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("short", max_examples=24, derandomize=True, database=None, **_SLOW)
settings.register_profile("long", max_examples=2000, print_blob=True, **_SLOW)
settings.load_profile("short")

BACKENDS = {
    "torch": Backend("torch", torch.device("cpu")),
    "interpreter": Backend("triton", torch.device("cpu")),
    "cuda": Backend("triton", torch.device("cuda", 0)),
    "torch-cuda": Backend("torch", torch.device("cuda", 0)),
}


# Which compile for minutes: begun last, they would run alone for as long.
LONGEST = ("test_recorded_before_anything_ran", "test_nothing_compiles", "test_every_row_compiles", "test_sample_compiles")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.name.startswith(LONGEST))  # stable, the same in every worker
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.gpu if "cuda" in name else ()) for name in BACKENDS],
)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend of `compress` in turn; on a GPU machine Triton's interpreter is off, as it cannot be on beside it."""
    if request.param == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles in this process, so it does not interpret")
    return BACKENDS[request.param]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The ranks of tests/parallel, started once."""
    from support.parallel_support import World

    made = World(tmp_path_factory.mktemp("gloo"))
    yield made
    made.close()
