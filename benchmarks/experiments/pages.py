"""Reads the pages of raw rows that a step pools where a window of every sequence ends, and does nothing else.

`floor.py` moves as many bytes from one place to the next. Pages lie anywhere, and a program takes some channels of every row:
this is what is left for `WindowState` to be fast in, by the width of the pieces.

python -m benchmarks.experiments.pages --out benchmarks/results/pages.jsonl
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kvfold.backend_triton.kernels.pdl import wait_for_inputs
from kvfold.backend_triton.launcher import multiprocessors, supports_pdl

from ..lib import protocol
from ..lib.floor import PAGE_SIZE

HEAD_DIM = tl.constexpr(512)
ROWS = tl.constexpr(PAGE_SIZE)
# Channels per piece, rows at a time: a thread has 16 bytes of each load, or 8 in the first.
PIECES = ((32, 8), (64, 8), (128, 4), (512, 1))
LOADS = 8  # of values and as many of scores, in flight per thread
PROGRAMS, NUM_WARPS, REGISTERS = 4, 4, 128  # as the row of the table that serves ratio 128; programs per multiprocessor


@triton.jit
def read_kernel(
    kv, score, pages, out, entries, parts, span,
    PIECE: tl.constexpr, LANES: tl.constexpr, LOADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`parts` programs to an entry, side by side, each with `span` pieces; sums what it reads, which stores nothing."""
    total = tl.zeros((LANES, PIECE), tl.float32)
    rows = tl.arange(0, LANES)[:, None] * HEAD_DIM + tl.arange(0, PIECE)[None, :]
    wait_for_inputs(PDL)
    for task in range(tl.program_id(0), entries * parts, tl.num_programs(0)):
        kv_page = kv + tl.load(pages + task // parts).to(tl.int64) * (ROWS * HEAD_DIM)
        score_page = score + tl.load(pages + entries + task // parts).to(tl.int64) * (ROWS * HEAD_DIM)
        for turn in range(0, span):
            at = rows + (task % parts + turn * parts) * PIECE
            for _ in range(0, ROWS, LANES * LOADS):
                found = ()
                for i in tl.static_range(LOADS):
                    step = i * LANES * HEAD_DIM
                    found = found + (tl.load(kv_page + at + step), tl.load(score_page + at + step))
                for i in tl.static_range(2 * LOADS):
                    total += found[i]
                at += LOADS * LANES * HEAD_DIM
    tl.store(out + rows, total, mask=total == float("inf"))


def calls_of(entries: int, piece: int, lanes: int) -> list[Callable[[], None]]:
    """One call for each buffer set. Twice as many pages as are read, as every sequence has one of the window before too."""
    out = torch.empty(ROWS.value, HEAD_DIM.value, device="cuda")
    parts, programs = HEAD_DIM.value // piece, PROGRAMS * multiprocessors(out.device)
    while entries * parts > programs and parts > 1:
        parts //= 2
    options = {"launch_pdl": True} if supports_pdl(out.device) else {}
    calls = []
    for _ in range(protocol.buffer_sets(entries * 2 * ROWS.value * HEAD_DIM.value * 4)):
        kv, score = (torch.randn(2 * entries, ROWS.value, HEAD_DIM.value, device="cuda") for _ in range(2))
        pages = torch.cat([torch.randperm(2 * entries, device="cuda")[:entries] for _ in range(2)]).int()
        calls.append(
            lambda kv=kv, score=score, pages=pages: read_kernel[(programs,)](
                kv, score, pages, out, entries, parts, HEAD_DIM.value // piece // parts, piece, lanes, LOADS, bool(options),
                num_warps=NUM_WARPS, maxnreg=REGISTERS, **options,
            )
        )  # fmt: skip
    return calls


def main() -> None:
    args = protocol.parser(__doc__).parse_args()
    where = protocol.environment(args.commit)
    for entries in (1, 16, 64, 128, 256):
        rows = []
        for piece, lanes in PIECES:
            us = round(protocol.time_graph(calls_of(entries, piece, lanes)), 3)
            case, variant = f"{entries} windows of 128 rows, fp32", f"pieces of {piece} channels"
            print(f"{case:36s} {variant:24s} {us:7.2f} us", flush=True)
            rows.append({"bench": "pages", "case": case, "variant": variant, "us": us, **where})
        protocol.append_rows(args.out, rows)


if __name__ == "__main__":
    main()
