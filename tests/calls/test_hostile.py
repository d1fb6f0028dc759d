"""Hostile calls: 5,000 of a seed, and each ends with a result, a count or an error that names the argument.

What a call is and what is a fault: hostile_call.py. A fault is printed with what makes it again.
"""

from __future__ import annotations

import pytest
from support import hostile_run

SEED = 24
# Calls in all and of one test, which costs 3 seconds of its own and as many for imports of nested tensors; interpreted calls
# cost twenty times as much.
SHARES = {"torch": (4_800, 4_800), "interpreter": (200, 200), "cuda": (2_000, 1_000), "torch-cuda": (500, 500)}
SHARDS = [(name, start, size) for name, (calls, size) in SHARES.items() for start in range(0, calls, size)]


@pytest.mark.parametrize(
    "backend, start, size",
    [pytest.param(*shard, marks=pytest.mark.gpu if "cuda" in shard[0] else ()) for shard in SHARDS],
    ids=lambda value: str(value),
)
def test_hostile_calls(backend: str, start: int, size: int) -> None:
    summary = hostile_run.run(SEED, start, start + size, backend)
    assert summary.calls == size
    assert not summary.faults, hostile_run.table(summary)
