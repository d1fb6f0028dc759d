"""Times the product of `project_compress` by itself, for rows of its table and others, and compares the bits of all of them.

A figure is microseconds per layer of one CUDA graph of 31 layers, each with its own weights, launched as dependents; beside it
those of `torch.mm` and of reading the weights once at 4.5 TB/s.

python -m benchmarks.experiments.projection [--out FILE] [--shapes 1024x7168,2560x7168] [--tokens 4,16,64,256] [--sweep]

Without `--sweep` the rows beside the table's are those of `FEW`. "alone" is a product without the launch that adds its parts.
All layers write the same parts and kv_score, as the layers of a model may.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import copy
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
LONG = 8192  # tokens of a prompt
# Columns, tokens, depth, parts, stages and warps, by the most tokens of a step that they may be best for.
FEW: dict[int, tuple[tuple[int, ...], ...]] = {
    16: ((128, 16, 64, 4, 6, 4), (64, 8, 128, 8, 5, 4)),
    64: ((64, 64, 128, 8, 4, 4), (64, 64, 64, 4, 6, 4), (128, 64, 64, 8, 4, 8)),
    512: ((128, 64, 64, 4, 4, 8), (64, 128, 64, 4, 4, 8), (128, 128, 64, 8, 3, 8), (128, 128, 64, 4, 3, 8)),
    LONG: ((128, 128, 64, 1, 6, 8), (128, 128, 128, 1, 3, 8)),
}  # fmt: skip


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


def rows(tokens: int, sweep: bool) -> list[Tiling]:
    """The table's first, those of either width."""
    few = next(few for most, few in FEW.items() if tokens <= most)
    more = others(tokens) if sweep else (Tiling(tokens, *one) for one in few)
    return list(dict.fromkeys([tiling(tokens, 1024), tiling(tokens, 2560), *more]))


class Product:
    """A call of the product by this row, with room for all that it makes. alone: its parts stay as they are."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, config: Tiling, alone: bool = False) -> None:
        shape = hidden.shape[0], weight.shape[0]
        self.hidden, self.weight, self.config = hidden, weight, config
        self.kv_score, self.parts, self.alone = torch.empty(shape, device="cuda"), None, alone
        if config.parts > 1:
            self.parts = torch.empty((config.parts, *shape), device="cuda")

    def of_layer(self, weight: torch.Tensor) -> Product:
        """The same for another weight, into the same room."""
        found = copy(self)
        found.weight = weight
        return found

    def __call__(self) -> torch.Tensor:
        project(self.hidden, (self.weight,), self.kv_score if self.parts is None else self.parts, self.config, True)
        if self.parts is not None and not self.alone:
            add(self.parts, self.kv_score, True, False)
        return self.kv_score


def check(shape: tuple[int, int], counts: list[int], sweep: bool) -> dict:
    """Bits of every row and every number of tokens, and the distance from fp64 in units of the bound."""
    columns, width = shape
    generator = torch.Generator(device="cuda").manual_seed(columns + width)
    hidden = torch.randn(LONG, width, generator=generator, device="cuda").bfloat16()
    hidden[3] = 0  # sums of nothing, too
    weight = (torch.randn(columns, width, generator=generator, device="cuda") / width**0.5).bfloat16()
    right = Product(hidden, weight, TILINGS[-1])().view(torch.int32)
    differ, compared = [], 0
    for tokens in (1, 3, *counts, 300, 1000):
        for config in rows(tokens, sweep) if tokens in counts else TILINGS:
            call = Product(hidden[:tokens], weight, config)
            compared += 1
            if not torch.equal(call().view(torch.int32), right[:tokens]):
                differ.append([tokens, str(config)])
    exact = hidden[:512].double() @ weight.double().T
    most = hidden[:512].double().abs() @ weight.double().abs().T
    error = (right[:512].view(torch.float32).double() - exact).abs()
    bound = float((error / (most * width * 2.0**-24 + 1e-300)).max())
    found = {"what": "bits", "shape": shape, "compared": compared, "differing": len(differ), "of bound": bound}
    return found | {"differ": differ[:8]}


def figures(shape: tuple[int, int], tokens: int, sweep: bool) -> Iterator[dict]:
    """Of every row, and of `torch.mm`."""
    columns, width = shape
    hidden, rounds = torch.randn(tokens, width, device="cuda").bfloat16(), 15 if tokens < LONG else 5
    weights = [(torch.randn(columns, width, device="cuda") / width**0.5).bfloat16() for _ in range(LAYERS)]
    same = {"what": "time", "shape": shape, "tokens": tokens}
    into = torch.empty(tokens, columns, dtype=torch.bfloat16, device="cuda")
    us = protocol.time_graph([lambda w=w: torch.mm(hidden, w.T, out=into) for w in weights], rounds)
    yield same | {"how": "torch.mm", "us": round(us, 2)}
    yield same | {"how": "weights once", "us": round(columns * width * 2 / BANDWIDTH * 1e6, 2)}
    for config, alone in product(rows(tokens, sweep), (False, True)):
        if alone and config.parts == 1:
            continue
        told = {"how": str(config), "alone": alone, "table": config == tiling(tokens, columns)}
        try:
            call = Product(hidden, weights[0], config, alone)
            us = protocol.time_graph([call.of_layer(w) for w in weights], rounds)
        except Exception as error:  # a row that the device has no room for
            yield same | told | {"us": None, "error": str(error)[:80]}
            continue
        yield same | told | {"us": round(us, 2)}


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--shapes", default=",".join(f"{columns}x{width}" for columns, width in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--sweep", action="store_true", help="many more rows, which takes minutes")
    parser.add_argument("--target", default="sm_90")
    args = parser.parse_args()
    shapes = [tuple(int(number) for number in text.split("x")) for text in args.shapes.split(",")]
    counts = [int(text) for text in args.tokens.split(",")]
    configs = dict.fromkeys([*TILINGS, *(config for tokens in counts for config in rows(tokens, args.sweep))])
    widths = dict.fromkeys(width for _, width in shapes)
    keys = [ProjectKey(width, config, 1, torch.float32) for width, config in product(widths, configs)]
    keys += [AddKey(parts, torch.float32) for parts in (4, 8)]
    print(compile_all(keys, args.target, (True,)), flush=True)
    found = []
    for shape in shapes:
        found.append(check(shape, counts, args.sweep))
        print(json.dumps(found[-1]), flush=True)
        for tokens in counts:
            timed = sorted(figures(shape, tokens, args.sweep), key=lambda row: row["us"] or 1e9)
            for row in timed[:12]:
                print(json.dumps(row), flush=True)
            found += timed
    protocol.append_rows(args.out, [protocol.environment(args.commit) | row for row in found])


if __name__ == "__main__":
    main()
