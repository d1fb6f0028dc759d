"""What `warmup` says beforehand rests on measured seconds: those of benchmarks/results/compile.jsonl."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from kvfold.backend_triton.build import KERNELS
from kvfold.backend_triton.prepare import SECONDS, expected, ways
from kvfold.backend_triton.table import CONFIGS
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.asked import asked_of
from kvfold.precompile.combinations import TARGETS, combinations
from kvfold.precompile.sets import SETS
from kvfold.storage.formats import FORMATS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = [json.loads(line) for line in (RESULTS / "compile.jsonl").read_text().splitlines()]
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


def test_warmup_took_what_it_would_have_said() -> None:
    """On an H200 with an empty cache: 68 kernels of its example, within a fifth."""
    rows = [json.loads(line) for line in (RESULTS / "first_call.jsonl").read_text().splitlines()]
    (took,) = [row for row in rows if (row["case"], row["variant"]) == ("warmup v4", "cold")]
    wanted = [variant_of(key, *way) for keys, may in asked_of(SETS["v4"][:1]) for key in keys for way in ways(may(key))]
    variants = list(dict.fromkeys(wanted))
    assert len(variants) == took["kernels"] == 68
    said = int(re.search(r"about (\d+) s of 16 cores", expected(variants, TARGETS["sm_90"], took["cores"]))[1])
    assert abs(said - took["wait_s"]) < took["wait_s"] / 5


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
