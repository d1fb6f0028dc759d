"""Prebuilt kernels are launched on a GPU, and give the bits of those that are compiled there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import triton
from test_aot import python

import kvfold
from kvfold import V4_INDEXER
from kvfold.backend_triton import launcher, prebuilt

LAUNCHED = """
import json, sys, warnings
import torch
import kvfold
from kvfold import EntryCache, FoldState, StepPlan, V4_INDEXER
from kvfold.backend_triton import launcher, prebuilt

warnings.simplefilter("error", RuntimeWarning)
if sys.argv[1] != "none":
    kvfold.use_prebuilt(sys.argv[1])
torch.manual_seed(5)
ints = lambda *numbers: torch.tensor(numbers, dtype=torch.int32, device="cuda")
kv_score = torch.randn(40, 2 * V4_INDEXER.channels, device="cuda").bfloat16()
state = FoldState.allocate(V4_INDEXER, 1, 64, device="cuda")
cache = EntryCache.allocate("bf16", 1, 16, V4_INDEXER, device="cuda")
weights = {"ape": torch.randn(4, V4_INDEXER.channels, device="cuda"), "norm_weight": torch.ones(128, device="cuda"),
           "rope": torch.randn(64, V4_INDEXER.rope_dim, device="cuda")}
plan = StepPlan.build(4, ints(0), ints(0, 40), 64, state_slots=ints(0), cache_block_table=ints(0)[None], rows_per_page=16)
kvfold.compress(kv_score, plan, state, cache, spec=V4_INDEXER, **weights)
rows = cache.read(torch.arange(10, device="cuda")).double()
print(json.dumps([launcher.compilations, prebuilt.loaded, int(plan.errors), rows.flatten().tolist()]))
"""


@pytest.mark.gpu
def test_prebuilt_kernels_are_launched(tmp_path: Path) -> None:
    """In a process whose Triton cache is empty: the bits are those of kernels that were compiled there."""
    device = torch.device("cuda", torch.cuda.current_device())
    target = prebuilt.facts_of(triton.runtime.driver.active.get_current_target(), 1).target
    calls = [{"specs": (V4_INDEXER,), "formats": ("bf16",), "max_new_tokens": (64,)}]
    kvfold.prebuild(target, tmp_path / "package", calls, multiprocessors=launcher.multiprocessors(device))
    results = []
    for folder in (tmp_path / "package", "none"):
        place = tmp_path / f"process {len(results)}"
        place.mkdir()
        results.append(json.loads(python(place, LAUNCHED, folder)))
    (made, loaded, errors, rows), (compiled, none, also, expected) = results
    assert made == loaded == compiled > 0 and none == errors == also == 0
    assert rows == expected and any(rows)
