"""What `warmup` says beforehand rests on measured seconds: those of benchmarks/results/compile.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from kvfold.backend_triton.build import KERNELS
from kvfold.backend_triton.prepare import SECONDS
from kvfold.backend_triton.table import CONFIGS, TILINGS
from kvfold.precompile.combinations import combinations

ROOT = Path(__file__).parents[2]
ROWS = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "compile.jsonl").read_text().splitlines()]
NEWEST = [row for row in ROWS if row["commit"] == ROWS[-1]["commit"]]


def test_seconds_are_the_averages_of_the_newest_results() -> None:
    """Of the kernels of the set v4, or where it has none of a kind, of all."""
    found: dict[str, dict[bool, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in NEWEST:
        found[row["kernel"]][row["set"]].append(row["cpu_s"])
    wanted = {kernel: some.get(True, some[False]) for kernel, some in found.items()}
    assert {kernel: round(sum(some) / len(some), 1) for kernel, some in wanted.items()} == SECONDS
    assert {"plan", "step", "pair", "window", "store", "restore", "project"} <= SECONDS.keys() <= KERNELS.keys()
    assert {row["triton"][:4] for row in NEWEST} == {"3.6."}  # which the figures of GPUs are by, too


def test_the_results_have_every_row_of_the_table_before_and_after() -> None:
    names = {row["name"] for row in NEWEST}
    served = {c.config for c in combinations() if c.name in names}
    missing = [row for row in CONFIGS if row not in served]
    assert not missing or {row.head_dims for row in missing} == {(129, 256)}  # a width that V4 has not
    assert sum(row["kernel"] == "project" for row in NEWEST) == len({row.num_warps and row for row in TILINGS})
    before = [row for row in ROWS if row["note"].startswith("before")]
    assert {row["triton"][:4] for row in before[-41:]} == {"3.6."}
    assert {row["name"] for row in before[-41:]} <= names
