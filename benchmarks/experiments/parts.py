"""Reads a prompt's windows of ratio 4 as the long kernel does, folds them, writes as many bytes as a record; or parts of it.

What a prompt costs before any entry is normed, rotated and quantized: it is what is left for the whole kernel to be fast in.

python -m benchmarks.experiments.parts --out benchmarks/results/parts.jsonl
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kvfold import V4_CSA
from kvfold.backend_triton.args import Tokens
from kvfold.backend_triton.kernels.fold import empty_group, quotient, widen
from kvfold.backend_triton.kernels.pdl import wait_for_inputs
from kvfold.backend_triton.kernels.rows import fold_part, load_live
from kvfold.backend_triton.launcher import multiprocessors, supports_pdl

from ..lib import protocol
from ..lib.constants import constants

WORDS = 144  # of a record of 576 bytes, without its tail
PROGRAMS, NUM_WARPS, REGISTERS = 8, 2, 128  # as the row of the table that serves long prompts; programs per multiprocessor
PARTS = {"read": (False, False), "read, fold": (True, False), "read, write": (False, True), "read, fold, write": (True, True)}


@triton.jit
def parts_kernel(
    kv_score, ape, records, windows,
    WORDS: tl.constexpr, FOLD: tl.constexpr, WRITE: tl.constexpr, HOW: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """Windows 1 to `windows` of one sequence; what is not written is summed, of which no infinity comes, and so nothing."""
    HEAD_DIM: tl.constexpr = SPEC.HEAD_DIM
    tokens = Tokens(kv_score, 4 * HEAD_DIM, None, ape)
    c = tl.arange(0, HEAD_DIM)
    total = tl.zeros((HEAD_DIM,), tl.float32)
    wait_for_inputs(HOW.PDL)
    for number in range(tl.program_id(0) + 1, windows, tl.num_programs(0)):
        window = tl.full((), 0, tl.int32) + number  # a tensor also in the interpreter
        ks, ss = load_live(kv_score, tokens, window, 0, 2 * SPEC.RATIO, kv_score.dtype.element_ty, SPEC, HOW.TARGET.INLINE_PTX)
        m, l, a = empty_group(HEAD_DIM)
        if FOLD:
            m, l, a = fold_part(m, l, a, ks, ss, ape, None, 0, True, SPEC, 2 * SPEC.RATIO)
            y = quotient(a, l, HOW.TARGET.FAST_DIVISION)
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
    windows, width = tokens // V4_CSA.ratio, 2 * V4_CSA.channels
    ape = torch.randn(V4_CSA.ratio, V4_CSA.channels, device="cuda")
    programs = PROGRAMS * multiprocessors(ape.device)
    options = {"launch_pdl": True} if supports_pdl(ape.device) else {}
    calls = []
    for _ in range(protocol.buffer_sets(tokens * width * 2)):
        kv_score = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        records = torch.empty(windows * WORDS, device="cuda")
        calls.append(
            lambda kv_score=kv_score, records=records: parts_kernel[(programs,)](
                kv_score, ape, records, windows, WORDS, fold, write, **constants(V4_CSA, pdl=bool(options)),
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
