"""Times whole steps from hidden states on, as `benchmarks.run.model_step` does, for other rows of the table of projections.

A product by itself does not say which row is best: in a step other launches stand between two of them, and where several
programs have room on a multiprocessor, some may get more of them than others. First it compares the bits of all rows of `SETS`.

python -m benchmarks.experiments.projection_steps --compile
python -m benchmarks.experiments.projection_steps --out FILE [--only WORDS,WORDS]
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from itertools import product

import torch

from kvfold.backend_triton import table
from kvfold.backend_triton.keys import AddKey, Key, ProjectKey
from kvfold.backend_triton.table import TILINGS, Tiling

from ..lib import model_calls, models, protocol
from ..lib.model_calls import WholeStep
from ..run import model_step
from ..run.precompile import HIDDEN_DIMS, compile_all, keys
from .projection import Product

Numbers = tuple[int, ...]  # columns, tokens, depth, parts, stages and warps
# By the most tokens: of kv_score of 1024 columns, and of 2560. The table's come first.
SETS: dict[int, tuple[tuple[Numbers, Numbers], ...]] = {
    16: (
        ((64, 16, 128, 8, 6, 4), (64, 16, 128, 8, 3, 4)),
        ((64, 16, 128, 8, 5, 4), (64, 16, 128, 8, 2, 4)),
        ((64, 16, 128, 8, 4, 4), (64, 16, 128, 8, 3, 4)),
        ((64, 16, 64, 8, 10, 4), (64, 16, 64, 8, 5, 4)),
    ),
    64: (
        ((64, 64, 128, 8, 4, 4), (64, 64, 64, 8, 4, 4)),
        ((64, 64, 64, 8, 6, 4), (64, 64, 64, 8, 4, 4)),
        ((64, 64, 128, 8, 4, 4), (64, 64, 64, 4, 3, 4)),
        ((64, 64, 64, 4, 6, 4), (64, 64, 64, 4, 3, 4)),
        ((64, 64, 128, 8, 4, 4), (128, 64, 64, 8, 4, 8)),
    ),
    512: (
        ((64, 128, 64, 4, 4, 4), (64, 128, 64, 1, 4, 4)),
        ((64, 128, 64, 4, 4, 4), (64, 128, 64, 4, 4, 4)),
        ((64, 128, 64, 4, 3, 4), (64, 128, 64, 1, 3, 4)),
        ((64, 128, 64, 4, 4, 4), (128, 128, 64, 4, 3, 8)),
    ),
    1024: (
        ((64, 128, 64, 1, 4, 4), (64, 128, 64, 1, 4, 4)),
        ((64, 128, 64, 1, 4, 4), (128, 128, 64, 1, 3, 8)),
        ((128, 128, 64, 4, 3, 8), (128, 128, 64, 1, 3, 8)),
    ),
}


def rows_of(most: int, i: int) -> tuple[Tiling, Tiling]:
    """Of set `i`, in the place of the table's."""
    one, other = SETS[most][i]
    return Tiling(most, *one, max_columns=1024), Tiling(most, *other)


def keys_of_sets() -> list[Key]:
    found: list[Key] = []
    for width, (most, sets) in product(HIDDEN_DIMS, SETS.items()):
        for i, (config, tensors) in product(range(len(sets)), ((0, 1), (1, 2))):
            row = rows_of(most, i)[config]
            if row.parts == 1:
                found.append(ProjectKey(width, row, tensors, torch.bfloat16, True))
            found += [ProjectKey(width, row, count, torch.float32) for count in ((tensors, 1) if row.parts > 1 else (1,))]
        found += [ProjectKey(width, TILINGS[-1], 1, torch.float32)]
    found += [AddKey(parts, *kind) for parts in (4, 8) for kind in ((torch.float32, False), (torch.bfloat16, True))]
    return list(dict.fromkeys(found))


def check() -> None:
    """Prints rows of sets whose bits are not those of a prompt's row."""
    compared = 0
    for width, columns in product(HIDDEN_DIMS, (1024, 2560)):
        hidden = torch.randn(1024, width, device="cuda").bfloat16()
        weight = (torch.randn(columns, width, device="cuda") / width**0.5).bfloat16()
        right = Product(hidden, weight, TILINGS[-1])().view(torch.int32)
        for most, sets in SETS.items():
            for row in dict.fromkeys(rows_of(most, i)[columns == 2560] for i in range(len(sets))):
                for tokens in (1, most):
                    compared += 1
                    try:
                        if not torch.equal(Product(hidden[:tokens], weight, row)().view(torch.int32), right[:tokens]):
                            print("other bits:", width, columns, tokens, row, flush=True)
                    except Exception as error:  # a row that the device has no room for
                        print(row, str(error)[:200], flush=True)
    print(f"bits of {compared} products compared", flush=True)


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has one of these, separated by commas, in it")
    parser.add_argument("--compile", action="store_true", help="only compiles, on all cores")
    args = parser.parse_args()
    if args.compile:
        print(compile_all([*keys_of_sets(), *keys("step v4-,step plan")], "sm_90"), flush=True)
        return
    check()
    where, made = protocol.environment(args.commit), (None, [])
    for case in models.step_cases()[::-1]:
        if not any(words in case.name for words in args.only.split(",")):
            continue
        most = next(most for most in SETS if case.tokens <= most)
        if made[0] != case.model:
            made = (None, [])
            gc.collect()
            made = (case.model, model_calls.projections(case.model))
        step = WholeStep(case, made[1])
        sets = [step.make_set() for _ in range(model_step.set_count(case))]
        calls, found = [step.call("fused", own) for own in sets], []
        for i in range(len(SETS[most])):
            table.TILINGS = (*rows_of(most, i), replace(TILINGS[-1], round=0))
            try:
                step.check(calls[0])
                us = protocol.time_graph(calls, rounds=-(-model_step.STEPS // len(calls)))
                step.check(calls[0])
            except Exception as error:  # a row that the device has no room for
                print(case.name, i, str(error)[:200], flush=True)
                continue
            found.append({"what": "step", "of": case.name, "rows": str(SETS[most][i]), "us": round(us, 2)})
            print(json.dumps(found[-1]), flush=True)
        protocol.append_rows(args.out, [row | where for row in found])
        del step, sets, calls
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
