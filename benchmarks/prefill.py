"""Times prefill over FoldState, from kv_score to the stored record, beside the best pipeline of other projects.

python benchmarks/prefill.py --out benchmarks/results/prefill.jsonl [--only SUBSTRING] [--formats fp8_ds_mla,...]
"""

from __future__ import annotations

import protocol
import torch
from calls import calls_of
from protocol import Variant


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--formats", default="bf16,fp8_ds_mla")
    args = parser.parse_args()
    where = protocol.environment(args.commit)
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}")
    for case in protocol.cases():
        if case.kind != "prefill" or args.only not in case.name:
            continue
        peer = protocol.best_peer(case)
        for fmt in args.formats.split(","):
            variant = Variant("fold", (fmt,))
            if not variant.fits(case):
                continue
            us = protocol.time_graph(calls_of(case, variant))
            torch.cuda.empty_cache()
            beside = f"{peer[0]:8.2f}  {peer[0] / us:5.2f}x  {peer[1]}" if peer else ""
            print(f"{case.name:28s} {variant.name:16s} {us:8.2f} us   best peer {beside}", flush=True)
            row = {"bench": "prefill", "case": case.name, "variant": variant.name, "us": round(us, 3)}
            protocol.append_rows(args.out, [row | where])


if __name__ == "__main__":
    main()
