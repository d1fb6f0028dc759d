"""Times the product of `project_compress` by itself, for rows of its table and others, and compares the bits of all of them.

A figure is microseconds per layer of one CUDA graph of 31 layers, each with its own weights, launched as dependents; beside it
those of `torch.mm` and of reading the weights once at 4.5 TB/s.

python -m benchmarks.experiments.projection [--out FILE] [--shapes 1024x7168,2560x7168] [--tokens 4,16,64,256]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product

import torch

from kvfold.backend_triton.keys import AddKey, ProjectKey
from kvfold.backend_triton.launch_product import add, project
from kvfold.backend_triton.table import TILINGS, Tiling, tiling

from ..lib import protocol
from ..run.precompile import compile_all

LAYERS, BANDWIDTH = 31, 4.5e12
SHAPES = ((1024, 7168), (2560, 7168), (1024, 4096), (2560, 4096))
TOKENS = (4, 16, 64, 256)
LONG = 8192  # tokens of a prompt, of which only bits are compared


def others(tokens: int) -> Iterator[Tiling]:
    """Rows that could serve a step of so many tokens."""
    if tokens <= 64:
        wide = max(16, tokens)
        for depth, parts, columns in product((64, 128), (8, 4), (64, 128)):
            each = (columns + wide) * depth * 2
            for room in (56, 110, 220):  # KiB, so that 4, 2 or 1 programs have room on a multiprocessor
                stages = min(room * 1024 // each, 14 * 128 // depth)
                for warps in (4, 8):
                    if stages >= 2 and warps * 16 <= columns * 2:
                        yield Tiling(tokens, columns, wide, depth, parts, stages, warps)
        return
    for (columns, wide), parts, room in product(((64, 64), (64, 128), (128, 64), (128, 128), (128, 256)), (8, 4), (110, 220)):
        stages = min(room * 1024 // ((columns + wide) * 128), 14)
        if stages >= 2:
            yield Tiling(tokens, columns, wide, 64, parts, stages, 8 if columns * wide > 4096 else 4)


def rows(tokens: int) -> list[Tiling]:
    """The row of the table first."""
    return list(dict.fromkeys([tiling(tokens), *others(tokens)]))


def key_of(config: Tiling, hidden_dim: int) -> ProjectKey:
    return ProjectKey(hidden_dim, config, 1, torch.float32)


def room_for(config: Tiling, count: int, columns: int) -> torch.Tensor:
    shape = (count, columns) if config.parts == 1 else (config.parts, count, columns)
    return torch.empty(shape, dtype=torch.float32, device="cuda")


def whole(hidden: torch.Tensor, weight: torch.Tensor, config: Tiling) -> torch.Tensor:
    """kv_score by this row."""
    out = room_for(config, hidden.shape[0], weight.shape[0])
    project(hidden, (weight,), out, config, pdl=True)
    if config.parts == 1:
        return out
    found = torch.empty_like(out[0])
    add(out, found, True, False)
    return found


def check(shape: tuple[int, int]) -> dict:
    """Bits of every row and every number of tokens, and the distance from fp64 in units of the bound."""
    columns, width = shape
    generator = torch.Generator(device="cuda").manual_seed(columns + width)
    hidden = torch.randn(LONG, width, generator=generator, device="cuda").bfloat16()
    hidden[3] = 0  # sums of nothing, too
    weight = (torch.randn(columns, width, generator=generator, device="cuda") / width**0.5).bfloat16()
    right = whole(hidden, weight, TILINGS[-1]).view(torch.int32)
    differ, compared = [], 0
    for tokens in (1, 3, *TOKENS, 300, 1000):
        for config in rows(tokens) if tokens in TOKENS else TILINGS:
            compared += 1
            if not torch.equal(whole(hidden[:tokens], weight, config).view(torch.int32), right[:tokens]):
                differ.append([tokens, str(config)])
    exact = hidden[:512].double() @ weight.double().T
    most = hidden[:512].double().abs() @ weight.double().abs().T
    error = (right[:512].view(torch.float32).double() - exact).abs()
    bound = float((error / (most * width * 2.0**-24 + 1e-300)).max())
    found = {"what": "bits", "shape": shape, "compared": compared, "differing": len(differ), "of bound": bound}
    return found | {"differ": differ[:8]}


def figures(shape: tuple[int, int], tokens: int) -> Iterator[dict]:
    """Of every row, and of `torch.mm`."""
    columns, width = shape
    hidden = torch.randn(tokens, width, device="cuda").bfloat16()
    weights = [(torch.randn(columns, width, device="cuda") / width**0.5).bfloat16() for _ in range(LAYERS)]
    same = {"what": "time", "shape": shape, "tokens": tokens}
    into = torch.empty(tokens, columns, dtype=torch.bfloat16, device="cuda")
    us = protocol.time_graph([lambda w=w: torch.mm(hidden, w.T, out=into) for w in weights], 15)
    yield same | {"how": "torch.mm", "us": round(us, 2)}
    yield same | {"how": "weights once", "us": round(columns * width * 2 / BANDWIDTH * 1e6, 2)}
    for config in rows(tokens):
        outs = [room_for(config, tokens, columns) for _ in range(LAYERS)]
        calls = [
            lambda w=w, out=out, config=config: project(hidden, (w,), out, config, pdl=True)
            for w, out in zip(weights, outs, strict=True)
        ]
        try:
            us = protocol.time_graph(calls, 15)
        except Exception as error:  # a row that the device has no room for
            yield same | {"how": str(config), "us": None, "error": str(error)[:80]}
            continue
        yield same | {"how": str(config), "us": round(us, 2), "table": config == tiling(tokens)}


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--shapes", default=",".join(f"{columns}x{width}" for columns, width in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--target", default="sm_90")
    args = parser.parse_args()
    shapes = [tuple(int(number) for number in text.split("x")) for text in args.shapes.split(",")]
    counts = [int(text) for text in args.tokens.split(",")]
    configs = dict.fromkeys([*TILINGS, *(config for tokens in (*TOKENS, *counts) for config in rows(tokens))])
    keys = [key_of(config, width) for width in dict.fromkeys(width for _, width in shapes) for config in configs]
    print(compile_all([*keys, *(AddKey(parts, torch.float32, False) for parts in (8, 4))], args.target, (True,)), flush=True)
    found = []
    for shape in shapes:
        found.append(check(shape))
        print(json.dumps(found[-1]), flush=True)
        for tokens in counts:
            timed = sorted(figures(shape, tokens), key=lambda row: row["us"] or 1e9)
            for row in timed[:12]:
                print(json.dumps(row), flush=True)
            found += timed
    protocol.append_rows(args.out, [protocol.environment(args.commit) | row for row in found])


if __name__ == "__main__":
    main()
