"""Times a call with other rows of the configuration table than the one that serves it: what a new row must be chosen by.

python -m benchmarks.run.sweep "dec hd512 r128 b256 n1 hit" window:fp8_ds_mla --try slice=64,registers=96 --try tile=64
                           [--out benchmarks/results/sweep.jsonl]

Each `--try` names what differs from the row of the table (of the first compressor, where there are two). Everything is
compiled on all cores first. After a timing the entries are compared with those of the table's own row: no row changes a bit.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from multiprocessing import get_context

import torch

from kvfold.backend_triton import table as configs
from kvfold.backend_triton.keys import PairKey
from kvfold.backend_triton.table import Config

from ..lib import floor, protocol
from ..lib.calls import Buffers, Step
from ..lib.protocol import Case, Variant
from .precompile import WAYS, build, key_of


def parse() -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("case", help="its name, as the results have it")
    parser.add_argument("variant", type=Variant.parse)
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="NAME=NUMBER,...")
    args = parser.parse_args()
    known = {case.name: case for case in protocol.cases()}
    if args.case not in known:
        parser.error(f"case must be one of {', '.join(known)}, got {args.case!r}")
    args.case = known[args.case]
    names = {field.name for field in fields(Config)}
    for text in args.tries:
        for part in text.split(","):
            name, _, number = part.partition("=")
            if name not in names or not number.replace(".", "", 1).isdigit():
                parser.error(f"--try must be NAME=NUMBER,... with names of {', '.join(sorted(names))}, got {text!r}")
    return args


def changes_of(text: str) -> dict[str, float]:
    return {
        name: float(number) if "." in number else int(number)
        for name, number in (part.split("=") for part in text.split(",") if part)
    }


def own_row(case: Case, variant: Variant) -> Config:
    """The row of the table that serves the call, or its first compressor."""
    key = key_of(case, variant)
    return key.first.config if isinstance(key, PairKey) else key.config


@contextmanager
def table_with(row: Config, changes: dict[str, float]) -> Iterator[None]:
    """The table with another row in the place of one."""
    table = configs.CONFIGS
    configs.CONFIGS = tuple(replace(config, **changes) if config == row else config for config in table)
    try:
        yield
    finally:
        configs.CONFIGS = table


def compile_try(job: tuple[Case, Variant, str]) -> None:
    case, variant, text = job
    with table_with(own_row(case, variant), changes_of(text)):
        for pdl in WAYS:
            build((key_of(case, variant), pdl, "sm_90"))


def entries(buffers: list[Buffers], step: Step) -> list[torch.Tensor]:
    """What the call stored, as it is: records, or pooled rows where there is no cache."""
    used = int(step.plan.cu_entries[-1])
    return [(b.rows[:used] if b.cache is None else b.cache.storage).clone() for b in buffers]


def main() -> int:
    args = parse()
    case, variant, where = args.case, args.variant, protocol.environment(args.commit)
    row, failed = own_row(case, variant), 0
    tries = ["", *args.tries]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_try, [(case, variant, text) for text in tries]))
    step = Step(case, variant)
    sets = [step.buffers() for _ in range(protocol.buffer_sets(floor.traffic(case, variant).total))]
    torch.cuda.synchronize()
    calls, want = [step.call(buffers) for buffers in sets], None
    for text in tries:
        for buffers in sets:
            for b in buffers:
                b.state._forget()  # it knows the kernel of its last call
        try:
            with table_with(row, changes_of(text)):
                step.check(calls[0])
                us = protocol.time_graph(calls)
        except Exception:
            traceback.print_exc()
            failed += 1
            continue
        have = entries(sets[0], step)
        want = want or have
        result = {"bench": "sweep", "case": case.name, "variant": variant.name, "row": text, "us": round(us, 3)}
        result["entries"] = "equal" if all(map(torch.equal, have, want)) else "DIFFERENT"
        print(*result.values(), flush=True)
        protocol.append_rows(args.out, [result | where])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
