"""Times prefill, from kv_score to the stored record, beside other projects and beside the floor of the same bytes.

python -m benchmarks.run.prefill --out benchmarks/results/prefill.jsonl
                             [--only SUBSTRING] [--variants fold:fp8_ds_mla,...] [--parts protocol,scaling,mixed]

Parts: protocol, the cases that other projects were timed with; scaling, from 1k to 1M tokens in one sequence and up to 256
sequences; mixed, a prompt of 8k beside 64 sequences that decode 4 tokens, and each of the two alone.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator

import torch

from ..lib import floor, protocol, table
from ..lib.calls import Step, calls_of
from ..lib.floor import Traffic
from ..lib.protocol import Case, Variant

DEFAULT = "fold:fp8_ds_mla,window:fp8_ds_mla,many:fp8_ds_mla+indexer_fp8_vllm"
PARTS = ("protocol", "scaling", "mixed")
SHAPES = ((1, 1024), (1, 262144), (1, 1048576), (16, 4096), (256, 1024))  # sequences, tokens of each
LONG = 1 << 17  # tokens in all from which three replays are enough: a step is then as long as 30 of the others
DECODING = Case("decode", 512, 128, 64, 4, "spread")  # beside a prompt; with the ratio of the prompt


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--variants", default=DEFAULT, help="separated by commas (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="separated by commas (default: %(default)s)")
    args = parser.parse_args(arguments)
    args.parts = args.parts.split(",")
    if not set(args.parts) <= set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {args.parts}")
    try:
        args.variants = [Variant.parse(name) for name in args.variants.split(",")]
    except ValueError as error:
        parser.error(str(error))
    return args


def chosen(args: argparse.Namespace) -> list[tuple[Case, Variant]]:
    """What is to be timed of the first two parts; of the second, FoldState alone."""
    found = []
    if "protocol" in args.parts:
        found += [(case, variant) for case in protocol.cases() if case.kind == "prefill" for variant in args.variants]
    if "scaling" in args.parts:
        more = [Case("prefill", 512, ratio, batch, new) for ratio in (128, 4) for batch, new in SHAPES]
        found += [(case, variant) for case in more for variant in args.variants if variant.state == "fold"]
    return [(case, variant) for case, variant in found if args.only in case.name and variant.fits(case)]


def mixed_parts(prompt: Case) -> list[tuple[int, int]]:
    """Start and new tokens of each sequence: those that decode, and the prompt in the middle of them."""
    decoding = Case("decode", 512, prompt.ratio, DECODING.batch, DECODING.new, DECODING.mode)
    parts = [(start, decoding.new) for start in decoding.start_positions()]
    half = len(parts) // 2
    return [*parts[:half], (0, prompt.new), *parts[half:]]


def measure(calls: list[Callable[[], None]], traffic: Traffic, tokens: int) -> dict:
    us = protocol.time_graph(calls, replays=3 if tokens > LONG else 30)
    torch.cuda.empty_cache()
    floor_us = floor.floor_us(traffic)
    torch.cuda.empty_cache()
    row = {"us": round(us, 3), "floor_us": round(floor_us, 3), "bytes": traffic.total}
    return row | {"ns_per_token": round(us * 1e3 / tokens, 3)}


def mixed(args: argparse.Namespace) -> Iterator[dict]:
    """The batch, and each half of it as it is called when it is alone."""
    for ratio in (128, 4):
        prompt = Case("prefill", 512, ratio, 1, 8192)
        decoding = Case("decode", 512, ratio, DECODING.batch, DECODING.new, DECODING.mode)
        name = f"mix hd512 r{ratio} s{prompt.new} + b{decoding.batch} n{decoding.new}"
        if args.only not in name:
            continue
        for variant in args.variants:
            if variant.state != "fold" or not variant.fits(prompt):
                continue
            both = [floor.traffic(case, variant) for case in (prompt, decoding)]
            traffic = Traffic(*(sum(column) for column in zip(*both, strict=True)))

            step = Step(prompt, variant, parts=mixed_parts(prompt))
            made = [step.call(step.buffers()) for _ in range(protocol.buffer_sets(traffic.total))]
            step.check(made[0])

            tokens = prompt.new + decoding.batch * decoding.new
            row = {"case": name, "variant": variant.name} | measure(made, traffic, tokens)
            for key, case in (("prompt_us", prompt), ("decode_us", decoding)):
                row[key] = round(protocol.time_graph(calls_of(case, variant)), 3)
                torch.cuda.empty_cache()
            yield row | {"over_slower": round(row["us"] / max(row["prompt_us"], row["decode_us"]), 3)}


def main() -> int:
    args = parse()
    where, rows, failed = protocol.environment(args.commit), [], 0
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}")

    def add(row: dict) -> None:
        rows.append({"bench": "prefill"} | row)
        print(*row.values(), flush=True)
        protocol.append_rows(args.out, [rows[-1] | where])

    for case, variant in chosen(args):
        traffic, tokens = floor.traffic(case, variant), case.batch * case.new
        try:
            row = measure(calls_of(case, variant), traffic, tokens)
        except Exception:  # the other cases are worth having: device time is scarce
            traceback.print_exc()
            failed += 1
            continue
        add({"case": case.name, "variant": variant.name} | row)
    if "mixed" in args.parts:
        for row in mixed(args):
            add(row)
    table.show("Prefill, microseconds per call", table.HEADER, [table.cells(row) for row in rows])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
