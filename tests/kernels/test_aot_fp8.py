"""Kernels of weights in FP8 compile for every target, without a GPU; weights in several tensors are loaded as in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_aot import python

FEW = """
import json
import re
import sys
import torch
from kvfold.backend_triton.keys import DequantizeKey, ProjectKey
from kvfold.backend_triton.table import SCALED, TILINGS
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import TARGETS
from kvfold.precompile.resources import resources

name, gpu, found = sys.argv[1], TARGETS[sys.argv[1]], {}
pdl = gpu.backend == "cuda" and gpu.arch >= 90
keys = {f"fp8 {i}": ProjectKey(7168, row, 2, torch.float32, False, True) for i, row in enumerate(SCALED)}
keys |= {"one chunk": ProjectKey(320, SCALED[0], 1, torch.float32, False, True), "dequantize": DequantizeKey(7168, 2)}
if name == "sm_90":
    keys |= {f"{kind} {n}": ProjectKey(7168, rows[0], n, torch.float32, False, kind == "codes")
             for kind, rows in (("codes", SCALED), ("bf16", TILINGS)) for n in (1, 2, 4)}
for what, key in keys.items():
    compiled = variant_of(key, True, pdl).compile(gpu)
    asm = "".join(compiled.asm.get(kind, "") for kind in ("ptx", "amdgcn"))
    ttgir = compiled.asm["ttgir"]
    loads = re.findall(r"async_copy_global_to_local .*?: tensor<64x128x!tt.ptr<(\\w+)>", ttgir)
    found[what] = [
        vars(resources(compiled, gpu)), asm.count("e4m3x2"), len(loads), len(re.findall(r"tt.load .*tensor<64x128x", ttgir)),
    ]
print(json.dumps(found))
"""
PAST_L1 = """
import json
import re
import torch
from kvfold.backend_triton.keys import ProjectKey
from kvfold.backend_triton.table import TILINGS, scaled_tiling
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import TARGETS

found = []
for row in TILINGS:
    if scaled_tiling(row.max_tokens, 1024) is None:
        for width, aligned in ((512, True), (1024, False), (1024, True)):  # a chunk of one tile has no stages
            compiled = variant_of(ProjectKey(width, row, 1, torch.float32), aligned, True).compile(TARGETS["sm_90"])
            found += set(re.findall(r"cp\\.async\\.c[ag]|ld\\.global(?:\\.c[ag])?", compiled.asm["ptx"]))
print(json.dumps(found))
"""
TOO_DEEP = """
from dataclasses import replace
import torch
from triton.compiler.errors import CompilationError
from kvfold.backend_triton.keys import ProjectKey
from kvfold.backend_triton.table import SCALED
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import TARGETS

for scaled in (False, True):
    key = ProjectKey(8192, replace(SCALED[0], depth=256, stages=2), 1, torch.float32, False, scaled)
    try:
        variant_of(key, True, True).compile(TARGETS["sm_90"])
        print("compiled")
    except CompilationError:
        print("refused")
"""
ROOM = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}


@pytest.mark.parametrize("target", ROOM)
def test_they_compile(target: str, tmp_path: Path) -> None:
    """With room for their tiles in shared memory; from sm_89 on by the instruction that converts."""
    found = json.loads(python(tmp_path, FEW, target).splitlines()[-1])
    for used, _, _, _ in found.values():
        assert used["shared"] <= ROOM[target] << 10
        assert used["spilled"] == 0 or target != "sm_90"
    converts = target in ("sm_89", "sm_90", "sm_100", "sm_120")
    assert all((count > 0) == converts for what, (_, count, _, _) in found.items() if not what.startswith("bf16"))
    if target == "sm_90":
        for kind in ("codes", "bf16"):
            (one, two, four) = (found[f"{kind} {n}"][2:] for n in (1, 2, 4))
            assert one == two == four and one[0] > 2 and one[1] == 0  # asynchronous, in stages


def test_weights_made_by_the_launch_before_are_read_past_the_l1_cache(tmp_path: Path) -> None:
    """It may hold what stood there before, as the product starts early (`pdl.load_plan`)."""
    assert set(json.loads(python(tmp_path, PAST_L1))) == {"cp.async.cg", "ld.global.cg"}


def test_a_tile_of_two_blocks_is_refused(tmp_path: Path) -> None:
    """In FP8, as it has one scale for each column."""
    assert python(tmp_path, TOO_DEEP).split() == ["compiled", "refused"]
