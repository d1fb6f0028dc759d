"""Times `kvfold.store`: pooled rows to stored records, alone.

python -m benchmarks.run.store --out benchmarks/results/store.jsonl [--places ROWS]

`--places`: so many rows instead, with a plan and without one, at shuffled slots, in one format of each width.
"""

from __future__ import annotations

import torch

import kvfold

from ..lib import protocol

DEVICE = "cuda"


def calls_of(spec: kvfold.CompressorSpec, fmt: str, count: int, dtype: torch.dtype, placed: bool = False) -> list:
    """One ready call per buffer set: `count` sequences, each of which finishes one window. placed: without the plan."""
    rows_per_page = 64 if spec.ratio == 4 else 2
    last = spec.ratio * 5
    weight = torch.ones(spec.head_dim, device=DEVICE)
    rope = kvfold.reference.rope_table(last, spec.rope_dim).to(DEVICE)
    plan = kvfold.StepPlan.build(
        spec.ratio,
        torch.full((count,), last - 1, dtype=torch.int32, device=DEVICE),
        torch.arange(count + 1, dtype=torch.int32, device=DEVICE),
        1,
        state_slots=torch.arange(count, dtype=torch.int32, device=DEVICE),
        entry_slots=torch.randperm(count, device=DEVICE) * rows_per_page,
    )
    given, calls = {"spec": spec, "norm_weight": weight, "rope": rope}, []
    places = {"slots": plan.entry_slots, "positions": torch.full((count,), last - spec.ratio, device=DEVICE)}
    for _ in range(protocol.buffer_sets(count * spec.head_dim * 4)):
        rows = torch.randn(count, spec.head_dim, device=DEVICE).to(dtype)
        cache = kvfold.EntryCache.allocate(fmt, count, rows_per_page, spec, device=DEVICE)
        if placed:
            calls.append(lambda r=rows, c=cache: kvfold.store(r, c, **places, **given))
        else:
            calls.append(lambda r=rows, c=cache: kvfold.store(r, plan, c, **given))
    calls[0]()
    assert int(plan.errors) == 0, "the benchmark's own rows were refused"
    return calls


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--places", type=int, default=0)
    args = parser.parse_args()
    where, out = protocol.environment(args.commit), []
    if args.places:
        for spec, name in ((kvfold.V4_HCA, "fp8_ds_mla"), (kvfold.V4_INDEXER, "indexer_mxfp4")):
            for placed in (False, True):
                us = protocol.time_graph(calls_of(spec, name, args.places, torch.bfloat16, placed))
                case = f"store hd{spec.head_dim} {args.places} rows {'by slots' if placed else 'of a plan'}"
                print(f"{case:44s} {name:24s} {us:7.2f} us", flush=True)
                out.append({"bench": "store_places", "case": case, "variant": f"store:{name}", "us": round(us, 3), **where})
        protocol.append_rows(args.out, out)
        return
    for name, fmt in kvfold.storage.formats.FORMATS.items():
        spec = kvfold.V4_HCA if not fmt.head_dims or 512 in fmt.head_dims else kvfold.V4_INDEXER
        for dtype in (torch.bfloat16, torch.float32):
            for count in (16, 64, 256):
                us = protocol.time_graph(calls_of(spec, name, count, dtype))
                case = f"store hd{spec.head_dim} {count} rows {str(dtype).removeprefix('torch.')}"
                print(f"{case:32s} {name:24s} {us:7.2f} us", flush=True)
                out.append({"bench": "store", "case": case, "variant": f"store:{name}", "us": round(us, 3), **where})
    protocol.append_rows(args.out, out)


if __name__ == "__main__":
    main()
