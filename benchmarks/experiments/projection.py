"""Times the product of `project_compress` by itself, for rows of its table and others, and compares the bits of all of them.

A figure is microseconds per layer of one CUDA graph of 31 layers, each with its own weights, launched as dependents; beside it
those of `torch.mm` and of reading the weights once at 4.5 TB/s.

python -m benchmarks.experiments.projection [--out FILE] [--shapes 1024x7168,2560x7168] [--tokens 4,16,64,256] [--sweep]
    [--weights fp8]

Without `--sweep` the rows beside the table's are those of `FEW`. "alone" is a product without the launch that adds its parts.
All layers write the same parts and kv_score, as the layers of a model may.

`--weights fp8`: rows that make bf16 of FP8 as they take a tile, beside "before", a launch that does so for the whole weight and
then the table's row for bf16; that row by itself, over weights in bf16; and `torch.mm` of those. Bits are compared with what
weights in bf16 give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import copy
from itertools import product

import torch

from kvfold import ScaledWeight
from kvfold.backend_triton.keys import AddKey, DequantizeKey, Key, ProjectKey
from kvfold.backend_triton.launch_product import add, dequantize, project
from kvfold.backend_triton.table import SCALED, TILINGS, Tiling, scaled_tiling, tiling
from kvfold.storage.weights import Weight, blocks_of

from ..lib import protocol
from ..lib.model_calls import in_fp8
from ..run.precompile import compile_all

LAYERS, BANDWIDTH = 31, 4.5e12
SHAPES = ((1024, 7168), (2560, 7168), (1024, 4096), (2560, 4096))
TOKENS = (4, 16, 64, 256)
LONG = 8192  # tokens of a prompt
# Columns, tokens, depth, parts, stages and warps, by the most tokens of a step that they may be best for.
FEW: dict[int, tuple[tuple[int, ...], ...]] = {
    16: ((128, 16, 64, 4, 6, 4), (64, 8, 128, 8, 5, 4)),
    64: ((64, 64, 128, 8, 4, 4), (64, 64, 64, 4, 6, 4), (128, 64, 64, 8, 4, 8)),
    2048: (
        (64, 128, 64, 4, 4, 4), (64, 128, 64, 1, 4, 4), (128, 128, 64, 1, 3, 8), (128, 128, 64, 4, 3, 8),
        (128, 64, 64, 1, 4, 4), (128, 64, 64, 1, 4, 8), (64, 64, 64, 1, 6, 4), (64, 64, 64, 4, 6, 4), (64, 64, 64, 4, 3, 4),
    ),
    LONG: ((128, 128, 64, 1, 3, 8), (64, 128, 64, 1, 4, 4), (128, 128, 32, 1, 6, 8)),
}  # fmt: skip


# The same of weights in FP8.
FEW_SCALED: dict[int, tuple[tuple[int, ...], ...]] = {
    16: ((64, 16, 128, 8, 5, 4), (64, 16, 128, 8, 4, 4), (64, 16, 64, 8, 12, 4), (128, 16, 128, 8, 4, 8)),
    64: ((64, 64, 128, 8, 3, 4), (64, 64, 64, 8, 6, 4), (64, 64, 64, 4, 6, 4), (128, 64, 128, 8, 3, 8), (128, 64, 64, 8, 4, 8)),
    512: ((128, 64, 64, 4, 4, 8), (64, 128, 64, 4, 4, 4), (128, 128, 64, 4, 3, 8), (128, 64, 64, 8, 4, 8)),
    LONG: ((128, 128, 64, 1, 4, 8),),
}  # fmt: skip


def other_scaled(tokens: int) -> Iterator[Tiling]:
    """The same of weights in FP8."""
    if tokens > 512:
        return
    wides = (max(16, tokens),) if tokens <= 64 else (64, 128)
    for wide, depth, parts, columns in product(wides, (64, 128), (8, 4), (64, 128)):
        each = (columns + 2 * wide) * depth
        found = {min(room * 1024 // each, 14 * 128 // depth) for room in (40, 56, 110, 220)}
        for stages in sorted(stages for stages in found if stages >= 2):
            yield Tiling(tokens, columns, wide, depth, parts, stages, columns // 16)


def chunks_in_a_loop(parts: int) -> int:
    """Of hidden_dim, tiles of which are under way at once."""
    return 1 if parts == 8 else 2


def others(tokens: int) -> Iterator[Tiling]:
    """Rows that could serve a step of so many tokens."""
    if tokens <= 64:
        wide = max(16, tokens)
        for depth, parts, columns in product((64, 128), (8, 4), (64, 128)):
            each = (columns + wide) * depth * 2 * chunks_in_a_loop(parts)
            for room in (56, 110, 220):  # KiB, so that 4, 2 or 1 programs have room on a multiprocessor
                stages = min(room * 1024 // each, 14 * 128 // depth)
                for warps in (4, 8):
                    if stages >= 2 and warps * 16 <= columns * 2:
                        yield Tiling(tokens, columns, wide, depth, parts, stages, warps)
        return
    sizes = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
    for (columns, wide), parts, room in product(sizes, (8, 4, 1), (110, 220)):
        stages = min(room * 1024 // ((columns + wide) * chunks_in_a_loop(parts) * 128), 14)
        if stages >= 2:
            yield Tiling(tokens, columns, wide, 64, parts, stages, 8 if columns * wide > 4096 else 4)


def rows(tokens: int, sweep: bool, scaled: bool = False) -> list[Tiling]:
    """The table's first, those of either width."""
    few = next(few for most, few in (FEW_SCALED if scaled else FEW).items() if tokens <= most)
    more = (other_scaled if scaled else others)(tokens) if sweep else (Tiling(tokens, *one) for one in few)
    of_table = [(scaled_tiling if scaled else tiling)(tokens, columns) for columns in (1024, 2560)]
    return list(dict.fromkeys([*(row for row in of_table if row is not None), *more]))


def numbers(shape: tuple[int, int], generator: torch.Generator | None = None, scaled: bool = False) -> Weight:
    """A weight, of which half of the FP8 ones are made of scales that are no powers of two."""
    columns, width = shape
    weight = torch.randn(columns, width, generator=generator, device="cuda") / width**0.5
    if not scaled:
        return weight.bfloat16()
    scales = torch.rand(blocks_of(columns), blocks_of(width), generator=generator, device="cuda") / 200 / width**0.5 + 1e-6
    scales[::2] = 2.0 ** scales[::2].log2().round()
    return in_fp8(weight, scales)


class Product:
    """A call of the product by this row, with room for all that it makes. alone: its parts stay as they are. before: a launch
    makes bf16 of the weight first."""

    def __init__(self, hidden: torch.Tensor, weight: Weight, config: Tiling, alone: bool = False, before: bool = False) -> None:
        shape = hidden.shape[0], weight.codes.shape[0] if isinstance(weight, ScaledWeight) else weight.shape[0]
        self.hidden, self.weight, self.config, self.before = hidden, weight, config, before
        self.kv_score, self.parts, self.alone = torch.empty(shape, device="cuda"), None, alone
        if config.parts > 1:
            self.parts = torch.empty((config.parts, *shape), device="cuda")

    def of_layer(self, weight: Weight) -> Product:
        """The same for another weight, into the same room."""
        found = copy(self)
        found.weight = weight
        return found

    def __call__(self) -> torch.Tensor:
        weight = dequantize((self.weight,), True) if self.before else self.weight
        project(self.hidden, (weight,), self.kv_score if self.parts is None else self.parts, self.config, True)
        if self.parts is not None and not self.alone:
            add(self.parts, self.kv_score, True, False)
        return self.kv_score


def check(shape: tuple[int, int], counts: list[int], sweep: bool, scaled: bool) -> dict:
    """Bits of every row and every number of tokens, and the distance from fp64 in units of the bound."""
    columns, width = shape
    generator = torch.Generator(device="cuda").manual_seed(columns + width)
    hidden = torch.randn(LONG, width, generator=generator, device="cuda").bfloat16()
    hidden[3] = 0  # sums of nothing, too
    given = numbers(shape, generator, scaled)
    weight = given.dequantized() if isinstance(given, ScaledWeight) else given
    right = Product(hidden, weight, TILINGS[-1])().view(torch.int32)
    differ, compared = [], 0
    for tokens in (1, 3, *counts, 300, 1000):
        for config in rows(tokens, sweep, scaled) if tokens in counts else SCALED if scaled else TILINGS:
            call = Product(hidden[:tokens], given, config)
            compared += 1
            if not torch.equal(call().view(torch.int32), right[:tokens]):
                differ.append([tokens, str(config)])
        if scaled:
            compared += 1
            call = Product(hidden[:tokens], given, tiling(tokens, columns), before=True)
            if not torch.equal(call().view(torch.int32), right[:tokens]):
                differ.append([tokens, "before"])
    exact = hidden[:512].double() @ weight.double().T
    most = hidden[:512].double().abs() @ weight.double().abs().T
    error = (right[:512].view(torch.float32).double() - exact).abs()
    bound = float((error / (most * width * 2.0**-24 + 1e-300)).max())
    found = {"what": "bits", "shape": shape, "compared": compared, "differing": len(differ), "of bound": bound}
    return found | {"differ": differ[:8]}


def timed(hidden: torch.Tensor, weights: list[Weight], config: Tiling, replays: int, **how: bool) -> dict:
    """Of a layer, by a row and as `Product` is told how; or why it cannot be."""
    try:
        call = Product(hidden, weights[0], config, **how)
        return {"us": round(protocol.time_graph([call.of_layer(w) for w in weights], replays), 2)}
    except Exception as error:  # a row that the device has no room for
        return {"us": None, "error": str(error)[:80]}


def scaled_figures(shape: tuple[int, int], tokens: int, sweep: bool) -> Iterator[dict]:
    """Of weights in FP8: every row, "before", the table's row over weights in bf16, and `torch.mm`."""
    columns, width = shape
    hidden, replays = torch.randn(tokens, width, device="cuda").bfloat16(), 20
    scaled = [numbers(shape, scaled=True) for _ in range(LAYERS)]
    in_bf16 = [weight.dequantized() for weight in scaled]
    same = {"what": "time", "weights": "fp8", "shape": shape, "tokens": tokens}
    into = torch.empty(tokens, columns, dtype=torch.bfloat16, device="cuda")
    us = protocol.time_graph([lambda w=w: torch.mm(hidden, w.T, out=into) for w in in_bf16], replays)
    yield same | {"how": "torch.mm, bf16", "us": round(us, 2)}
    yield same | {"how": "codes once", "us": round(columns * width / BANDWIDTH * 1e6, 2)}
    row = tiling(tokens, columns)
    ways = [("the table's, bf16", in_bf16, row, False), ("before", scaled, row, True)]
    ways += [(str(config), scaled, config, False) for config in rows(tokens, sweep, True)]
    for how, weights, config, before in ways:
        told = {"how": how, "table": config == scaled_tiling(tokens, columns) and weights is scaled}
        yield same | told | timed(hidden, weights, config, replays, before=before)


def figures(shape: tuple[int, int], tokens: int, sweep: bool) -> Iterator[dict]:
    """Of every row, and of `torch.mm`."""
    columns, width = shape
    hidden, rounds = torch.randn(tokens, width, device="cuda").bfloat16(), 15 if tokens < LONG else 5
    weights = [numbers(shape) for _ in range(LAYERS)]
    same = {"what": "time", "shape": shape, "tokens": tokens}
    into = torch.empty(tokens, columns, dtype=torch.bfloat16, device="cuda")
    us = protocol.time_graph([lambda w=w: torch.mm(hidden, w.T, out=into) for w in weights], rounds)
    yield same | {"how": "torch.mm", "us": round(us, 2)}
    yield same | {"how": "weights once", "us": round(columns * width * 2 / BANDWIDTH * 1e6, 2)}
    for config, alone in product(rows(tokens, sweep), (False, True)):
        if alone and config.parts == 1:
            continue
        told = {"how": str(config), "alone": alone, "table": config == tiling(tokens, columns)}
        yield same | told | timed(hidden, weights, config, rounds, alone=alone)


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--shapes", default=",".join(f"{columns}x{width}" for columns, width in SHAPES))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--sweep", action="store_true", help="many more rows, which takes minutes")
    parser.add_argument("--weights", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--target", default="sm_90")
    args = parser.parse_args()
    shapes = [tuple(int(number) for number in text.split("x")) for text in args.shapes.split(",")]
    counts = [int(text) for text in args.tokens.split(",")]
    scaled = args.weights == "fp8"
    configs = dict.fromkeys((config, False) for config in TILINGS)
    configs |= dict.fromkeys((config, True) for config in SCALED if scaled)
    configs |= dict.fromkeys((config, scaled) for tokens in counts for config in rows(tokens, args.sweep, scaled))
    widths = dict.fromkeys(width for _, width in shapes)
    keys: list[Key] = [ProjectKey(width, c, 1, torch.float32, False, kind) for width, (c, kind) in product(widths, configs)]
    keys += [AddKey(parts, torch.float32) for parts in (4, 8)] + [DequantizeKey(width, 1) for width in widths if scaled]
    print(compile_all(keys, args.target, (True,)), flush=True)
    found = []
    for shape in shapes:
        found.append(check(shape, counts, args.sweep, scaled))
        print(json.dumps(found[-1]), flush=True)
        for tokens in counts:
            timed = sorted((scaled_figures if scaled else figures)(shape, tokens, args.sweep), key=lambda row: row["us"] or 1e9)
            for row in timed[:12]:
                print(json.dumps(row), flush=True)
            found += timed
    protocol.append_rows(args.out, [protocol.environment(args.commit) | row for row in found])


if __name__ == "__main__":
    main()
