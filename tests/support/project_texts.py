"""Prints the kernels of projections in Triton's intermediate form, before anything is of one GPU, as JSON by name.

A program of its own, as where the interpreter is used nothing compiles.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
import triton
from triton._C.libtriton import ir
from triton.compiler.compiler import make_backend

from kvfold.backend_triton import table
from kvfold.backend_triton.kernels import project
from kvfold.backend_triton.keys import AddKey, ProjectKey
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import TARGETS


@triton.jit
def plus(a, b):
    return a + b


def text_of(key: ProjectKey | AddKey) -> str:
    variant, gpu = variant_of(key, True, False), TARGETS["sm_90"]
    source, backend, context = variant.source_for(gpu), make_backend(gpu), ir.context()
    options = backend.parse_options(variant.options_for(gpu))
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = source.make_ir(gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](made, {}))


def main(widths: list[int]) -> None:
    rows = [(row, width) for row in range(len(table.TILINGS)) for width in widths]
    found = {f"{row} {width}": text_of(ProjectKey(width, table.TILINGS[row], 1, torch.float32)) for row, width in rows}
    rows = [(row, width) for row in range(len(table.SCALED)) for width in widths]
    found |= {
        f"fp8 {row} {width}": text_of(ProjectKey(width, table.SCALED[row], 1, torch.float32, False, True))
        for row, width in rows
    }
    found |= {f"sum of {parts}": text_of(AddKey(parts, torch.float32)) for parts in (4, 8)}
    project.added = plus  # what kernels must not do
    found["plus"] = text_of(ProjectKey(512, replace(table.TILINGS[-1], depth=64), 1, torch.float32))
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
