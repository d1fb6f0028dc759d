"""Reads a prompt's windows of ratio 4 as the long kernel does, folds them, writes as many bytes as a record; or parts of it.

What a prompt costs before any entry is normed, rotated and quantized: it is what is left for the whole kernel to be fast in.

python -m benchmarks.experiments.parts --out benchmarks/results/parts.jsonl
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kvfold.backend_triton.kernels.fold import empty_group, quotient, widen
from kvfold.backend_triton.kernels.pdl import wait_for_inputs
from kvfold.backend_triton.kernels.rows import fold_part, load_live
from kvfold.backend_triton.launcher import supports_pdl

from ..lib import protocol

SHAPE = (512, 4, 144)  # head_dim, ratio, and words of a record of 576 bytes, without its tail
PROGRAMS, NUM_WARPS, REGISTERS = 1056, 2, 128  # as the row of the table that serves long prompts
PARTS = {"read": (False, False), "read, fold": (True, False), "read, write": (False, True), "read, fold, write": (True, True)}


@triton.jit
def parts_kernel(
    kv_score, ape, records, windows,
    HEAD_DIM: tl.constexpr, RATIO: tl.constexpr, WORDS: tl.constexpr,
    FOLD: tl.constexpr, WRITE: tl.constexpr, PDL: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Windows 1 to `windows` of one sequence; what is not written is summed, of which no infinity comes, and so nothing."""
    c = tl.arange(0, HEAD_DIM)
    total = tl.zeros((HEAD_DIM,), tl.float32)
    wait_for_inputs(PDL)
    for number in range(tl.program_id(0) + 1, windows, tl.num_programs(0)):
        window = tl.full((), 0, tl.int32) + number  # a tensor also in the interpreter
        ks, ss = load_live(kv_score, 4 * HEAD_DIM, window, 0, 2 * RATIO, RATIO, 1, HEAD_DIM, HARDWARE)
        m, l, a = empty_group(HEAD_DIM)
        if FOLD:
            m, l, a = fold_part(m, l, a, ks, ss, ape, None, 0, True, RATIO, 1, 2 * RATIO, HEAD_DIM)
            y = quotient(a, l, HARDWARE)
        else:
            for i in tl.static_range(8):
                a += widen(ks[i]) + widen(ss[i])
            y = a
        if WRITE:
            words = tl.max(tl.reshape(y, (HEAD_DIM // 4, 4)), axis=1)
            at = records + window.to(tl.int64) * WORDS + tl.arange(0, HEAD_DIM // 4)
            tl.store(at, words)
            tl.store(at + HEAD_DIM // 4, words, mask=tl.arange(0, HEAD_DIM // 4) < WORDS - HEAD_DIM // 4)
        else:
            total += y
    tl.store(records + c, total, mask=total == float("inf"))


def calls_of(tokens: int, fold: bool, write: bool) -> list[Callable[[], None]]:
    """One call for each buffer set."""
    head_dim, ratio, words = SHAPE
    windows, width = tokens // ratio, 4 * head_dim
    ape = torch.randn(ratio, 2 * head_dim, device="cuda")
    options = {"launch_pdl": True} if supports_pdl(torch.device("cuda")) else {}
    calls = []
    for _ in range(protocol.buffer_sets(tokens * width * 2)):
        kv_score = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        records = torch.empty(windows * words, device="cuda")
        calls.append(
            lambda kv_score=kv_score, records=records: parts_kernel[(PROGRAMS,)](
                kv_score, ape, records, windows, *SHAPE, fold, write, bool(options), True,
                num_warps=NUM_WARPS, maxnreg=REGISTERS, enable_fp_fusion=False, **options,
            )
        )  # fmt: skip
    return calls


def main() -> None:
    args = protocol.parser(__doc__).parse_args()
    where = protocol.environment(args.commit)
    for tokens in (8192, 65536, 8 * 65536):
        rows = []
        for variant, parts in PARTS.items():
            us = round(protocol.time_graph(calls_of(tokens, *parts), replays=5), 3)
            case = f"{tokens} tokens, ratio 4, head_dim 512"
            print(f"{case:40s} {variant:20s} {us:8.2f} us", flush=True)
            rows.append({"bench": "parts", "case": case, "variant": variant, "us": us, **where})
            torch.cuda.empty_cache()
        protocol.append_rows(args.out, rows)


if __name__ == "__main__":
    main()
