"""No loop of a kernel is of the kind that Triton 3.6 compiles to another one: see `support.loops`.

The interpreter runs such a loop rightly, so kernels are looked at as they are compiled.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_aot import python

pytest.importorskip("triton")

KERNEL = """
import sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from support.loops import lost_bounds

@triton.jit
def lost(counts, out, n):
    count = tl.load(counts)
    for i in range(0, n):
        behind = tl.load(counts + i + 1)
        for j in range(0, count):
            tl.store(out + j, i)
        count = behind

@triton.jit
def looked_at(counts, out, n):
    count = tl.load(counts)
    for i in range(0, n):
        behind = tl.load(counts + i + 1)
        if count > 0:
            for j in range(0, count):
                tl.store(out + j, i)
        count = behind

@triton.jit
def of_now(counts, out, n):
    for i in range(0, n):
        for j in range(0, tl.load(counts + i) + i):
            tl.store(out + j, i)

for kernel in lost, looked_at, of_now:
    source = ASTSource(kernel, {"counts": "*i32", "out": "*i32", "n": "i32"}, {})
    ttir = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    print(len(lost_bounds(ttir)))
"""

ALL = """
import json
import torch
from kvfold.backend_triton.keys import AddKey, DequantizeKey, ProjectKey
from kvfold.backend_triton.table import SCALED, TILINGS
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import SPECS, TARGETS, combinations
from kvfold.storage.formats import FORMATS
from kvfold.training.keys import keys_of
from kvfold.training.problem import How
from support.loops import lost_bounds, ttir_of
from support.training_support import SPECS as SMALL

keys = {}
for one in combinations():  # one of each kind, of short steps and of long ones
    key = one.key()
    pages = getattr(key, "pages", None)
    keys.setdefault((one.kind, one.config and one.config.max_new_tokens, one.snapshots, one.tables, pages), key)
keys |= {("project", row): ProjectKey(7168, row, 4, torch.float32) for row in TILINGS}
keys |= {("project fp8", row): ProjectKey(7168, row, 4, torch.float32, False, True) for row in SCALED}
keys |= {"add": AddKey(8, torch.float32), "dequantize": DequantizeKey(7168, 4)}
for name, spec in SMALL.items():
    for runs in (False, True):
        how = How(spec, False, torch.float32, FORMATS["mxfp4"] if name == "csa" else None, True, "triton")
        found = keys_of(how, (torch.float32, False, torch.float32), 13, runs)
        keys |= {(name, kernel, runs): key for kernel, key in found.items()}
variants = {variant_of(key, True, True): name for name, key in keys.items()}
lost = {str(name): lost_bounds(ttir_of(variant, TARGETS["sm_90"])) for variant, name in variants.items()}
print(json.dumps([sorted({variant.kernel for variant in variants}), {name: found for name, found in lost.items() if found}]))
"""


def test_such_a_loop_is_found(tmp_path: Path) -> None:
    assert python(tmp_path, KERNEL).split() == ["1", "0", "0"]


def test_no_kernel_has_one(tmp_path: Path) -> None:
    kernels, lost = json.loads(python(tmp_path, ALL))
    wanted = {"step", "window", "project", "project_add", "dequantize", "plan", "train_again", "train_spread", "train_fold"}
    assert wanted | {"train_folded"} <= set(kernels)
    assert not lost
