"""Times `compress` over FoldState, from kv_score to the stored record, beside the best pipeline of other projects.

python benchmarks/fold.py --out benchmarks/results/fold.jsonl [--only SUBSTRING] [--formats fp8_ds_mla,...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import protocol
import torch
from protocol import Case

import kvfold


def specs_of(case: Case) -> kvfold.CompressorSpec:
    if case.head_dim == 128:
        return kvfold.V4_INDEXER
    return kvfold.V4_HCA if case.ratio == 128 else kvfold.V4_CSA


def calls_of(case: Case, fmt: str) -> list:
    """One ready call per buffer set. State rows are as a decode would have left them: tagged, with finite values."""
    spec, device = specs_of(case), "cuda"
    starts, tokens = case.start_positions(), case.batch * case.new
    last = max(starts) + case.new
    rows_per_page = 64 if spec.ratio == 4 else 2
    pages = -(-(last // spec.ratio + 1) // rows_per_page)
    ape = torch.randn(spec.ratio, spec.channels, device=device)
    weight = torch.ones(spec.head_dim, device=device)
    rope = kvfold.reference.rope_table(last + 1, spec.rope_dim).to(device)
    kept = torch.bfloat16  # of input rows, as kv_score is bf16; fold rows are fp32 in any case
    probe = kvfold.FoldState.allocate(spec, 1, min(case.new, 8), device=device, dtype=kept)
    bytes_per_set = tokens * 2 * spec.channels * 2
    if case.kind == "decode":
        bytes_per_set += case.batch * probe.bytes_per_slot
    cu_seqlens = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.new
    start_pos = torch.tensor(starts, dtype=torch.int32, device=device)
    slots = torch.arange(case.batch, dtype=torch.int32, device=device)
    table = torch.arange(case.batch * pages, dtype=torch.int32, device=device).view(case.batch, pages)
    plan = kvfold.StepPlan.build(
        spec.ratio, start_pos, cu_seqlens, case.new, state_slots=slots, cache_block_table=table, rows_per_page=rows_per_page
    )
    calls = []
    for _ in range(protocol.buffer_sets(bytes_per_set)):
        kv_score = torch.randn(tokens, 2 * spec.channels, device=device).bfloat16()
        state = kvfold.FoldState.allocate(spec, case.batch, min(case.new, 8), device=device, dtype=kept)
        state.rows.normal_().abs_()
        for b, start in enumerate(starts):
            held = torch.arange(max(start - state.ring, 0), start, dtype=torch.int32, device=device)
            state.positions[b, (held % state.ring).long()] = held
        cache = kvfold.EntryCache.allocate(fmt, case.batch * pages, rows_per_page, spec, device=device)
        arguments = (kv_score, plan, state, cache)
        calls.append(lambda a=arguments: kvfold.compress(*a, spec=spec, ape=ape, norm_weight=weight, rope=rope))
    calls[0]()
    assert int(plan.errors) == 0, "the benchmark's own step was refused"
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--formats", default="bf16,fp8_ds_mla,indexer_fp8_vllm,indexer_mxfp4")
    parser.add_argument("--commit")
    args = parser.parse_args()
    where, rows = protocol.environment(args.commit), []
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}")
    for case in protocol.cases():
        if args.only not in case.name:
            continue
        peer = protocol.best_peer(case)
        for fmt in args.formats.split(","):
            if not protocol.fits(case, kvfold.records.get_format(fmt)):
                continue
            us = protocol.time_graph(calls_of(case, fmt))
            torch.cuda.empty_cache()
            beside = f"{peer[0]:8.2f}  {peer[0] / us:5.2f}x  {peer[1]}" if peer else ""
            print(f"{case.name:28s} fold:{fmt:12s} {us:8.2f} us   best peer {beside}", flush=True)
            rows.append({"bench": case.kind, "case": case.name, "variant": f"fold:{fmt}", "us": round(us, 3), **where})
    if args.out:
        protocol.append_rows(args.out, rows)


if __name__ == "__main__":
    main()
