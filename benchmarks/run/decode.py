"""Times decode, from kv_score to the stored record, beside other projects and beside the floor of the same bytes.

python -m benchmarks.run.decode --out benchmarks/results/decode.jsonl
                            [--quick] [--only SUBSTRING] [--variants fold:fp8_ds_mla,window:rows] [--pdl on|off]

Variants: fold:FORMAT over FoldState, window:FORMAT over WindowState (fp32 rows, pages of 128), window:rows without a cache,
many:FORMAT+FORMAT main and indexer compressor of a ratio-4 layer in one launch.
"""

from __future__ import annotations

import argparse
import traceback

import torch

from ..lib import floor, protocol, table
from ..lib.calls import calls_of
from ..lib.protocol import Case, Variant

DEFAULT = (
    "fold:fp8_ds_mla,fold:bf16,fold:indexer_fp8_vllm,fold:indexer_mxfp4,"
    "window:fp8_ds_mla,window:indexer_fp8_vllm,window:rows,"
    "many:fp8_ds_mla+indexer_fp8_vllm,many:fp8_ds_mla+indexer_mxfp4"
)
QUICK = (16, 256)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--variants", default=DEFAULT, help="separated by commas (default: %(default)s)")
    parser.add_argument("--pdl", choices=("on", "off", "default"), default="default", help="dependent launch")
    parser.add_argument("--quick", action="store_true", help=f"only batches {QUICK}")
    args = parser.parse_args(arguments)
    try:
        args.variants = [Variant.parse(name) for name in args.variants.split(",")]
    except ValueError as error:
        parser.error(str(error))
    return args


def chosen(args: argparse.Namespace) -> list[tuple[Case, Variant]]:
    """What is to be timed."""
    return [
        (case, variant)
        for case in protocol.cases()
        if case.kind == "decode" and args.only in case.name and (not args.quick or case.batch in QUICK)
        for variant in args.variants
        if variant.fits(case)
    ]


def measure(case: Case, variant: Variant, pdl: str) -> dict:
    """One result row, without where it was taken."""
    traffic = floor.traffic(case, variant)
    us = protocol.time_graph(calls_of(case, variant, pdl))
    torch.cuda.empty_cache()
    floor_us = floor.floor_us(traffic, dependent=pdl != "off")
    row = {"bench": "decode", "case": case.name, "variant": variant.name, "us": round(us, 3)}
    row |= {"floor_us": round(floor_us, 3), "bytes": traffic.total}
    return row if pdl == "default" else row | {"pdl": pdl}


def main() -> int:
    args = parse()
    where, rows, failed = protocol.environment(args.commit), [], 0
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}")
    for case, variant in chosen(args):
        try:
            row = measure(case, variant, args.pdl)
        except Exception:  # the other cases are worth having: device time is scarce
            traceback.print_exc()
            print(f"{case.name} {variant.name}: failed", flush=True)
            failed += 1
            continue
        print(f"{case.name:28s} {variant.name:34s} {row['us']:8.2f} us   floor {row['floor_us']:8.2f}", flush=True)
        rows.append(row)
        protocol.append_rows(args.out, [row | where])
    table.show("Decode, microseconds per call", table.HEADER, [table.cells(row) for row in rows])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
