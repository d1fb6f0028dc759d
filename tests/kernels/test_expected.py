"""What `warmup` says beforehand rests on measured seconds: those of benchmarks/results/compile.jsonl."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from kvfold.backend_triton.build import KERNELS
from kvfold.backend_triton.prepare import SECONDS
from kvfold.backend_triton.table import CONFIGS
from kvfold.precompile.combinations import combinations
from kvfold.storage.formats import FORMATS

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
    timed = combinations(formats=(FORMATS["fp8_ds_mla"], FORMATS["indexer_mxfp4"]))
    served = {c.config for c in timed if c.name in names}
    missing = [row for row in CONFIGS if row not in served]
    assert {row.head_dims for row in missing} <= {(256, 256)}  # a width that V4 has not; its rows are those of others, wider
    before = {row["name"]: row for row in ROWS if row["note"].startswith("before: the last")}
    assert {row["triton"][:4] for row in before.values()} == {"3.6."} and len(before) > 40
    both = [(before[row["name"]], row) for row in NEWEST if row["name"] in before]
    folds = [(old["cpu_s"], new["cpu_s"]) for old, new in both if "ahead16" in new["name"]]
    assert len(both) > 35 and len(folds) == 4 and all(new < old / 2 for old, new in folds)
