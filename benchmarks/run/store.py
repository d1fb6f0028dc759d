"""Times `kvfold.store`: pooled rows to stored records, alone.

python -m benchmarks.run.store --out benchmarks/results/store.jsonl [--places ROWS]

`--places`: so many rows of ratio 1 instead, by a plan of SEQUENCES and without one: at the same places, and at any.
"""

from __future__ import annotations

from pathlib import Path

import torch

import kvfold

from ..lib import protocol

DEVICE = "cuda"
SEQUENCES = 8
PLACED = ((kvfold.V41_MAIN_R1, "fp8_ds_mla"), (kvfold.V41_INDEX_K, "indexer_mxfp4_v41"))
WAYS = ("of a plan", "by slots in order", "by slots anywhere")


def calls_of(spec: kvfold.CompressorSpec, fmt: str, count: int, dtype: torch.dtype) -> list:
    """One ready call per buffer set: `count` sequences, each of which finishes one window."""
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
    for _ in range(protocol.buffer_sets(count * spec.head_dim * 4)):
        rows = torch.randn(count, spec.head_dim, device=DEVICE).to(dtype)
        cache = kvfold.EntryCache.allocate(fmt, count, rows_per_page, spec, device=DEVICE)
        calls.append(lambda r=rows, c=cache: kvfold.store(r, plan, c, **given))
    calls[0]()
    assert int(plan.errors) == 0, "the benchmark's own rows were refused"
    return calls


def placed_calls(spec: kvfold.CompressorSpec, fmt: str, count: int, way: str, rows_per_page: int = 64) -> list:
    """One ready call per buffer set, by one of WAYS: `count` rows of SEQUENCES, that bring as many tokens each."""
    each = count // SEQUENCES
    pages = SEQUENCES * -(-each // rows_per_page)
    table = torch.arange(pages, dtype=torch.int32, device=DEVICE).view(SEQUENCES, -1)
    zero = torch.zeros(SEQUENCES, dtype=torch.int32, device=DEVICE)
    ends = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=DEVICE) * each
    plan = kvfold.StepPlan.build(spec.ratio, zero, ends, each, cache_block_table=table, rows_per_page=rows_per_page)
    slots = (table[:, :, None].long() * rows_per_page + torch.arange(rows_per_page, device=DEVICE)).view(SEQUENCES, -1)
    slots, positions = slots[:, :each].flatten(), torch.arange(each, device=DEVICE).repeat(SEQUENCES)
    if way == WAYS[2]:
        order = torch.randperm(slots.numel(), device=DEVICE)
        slots, positions = slots[order], positions[torch.randperm(slots.numel(), device=DEVICE)]
    weight, rope = torch.ones(spec.head_dim, device=DEVICE), kvfold.reference.rope_table(each, spec.rope_dim).to(DEVICE)
    given, calls, errors = {"spec": spec, "norm_weight": weight, "rope": rope}, [], torch.zeros_like(zero[:1])
    places = {"slots": slots, "positions": positions}
    for _ in range(protocol.buffer_sets(count * spec.head_dim * 4)):
        rows = torch.randn(SEQUENCES * each, spec.head_dim, device=DEVICE).bfloat16()
        cache = kvfold.EntryCache.allocate(fmt, pages, rows_per_page, spec, device=DEVICE)
        if way == WAYS[0]:
            calls.append(lambda r=rows, c=cache: kvfold.store(r, plan, c, **given))
        else:
            calls.append(lambda r=rows, c=cache: kvfold.store(r, c, **places, **given))
            kvfold.store(rows, cache, **places, **given, errors=errors)
    calls[0]()
    assert int(plan.errors) + int(errors) == 0, "the benchmark's own rows were refused"
    return calls


def places(count: int, where: dict[str, str], out: Path | None) -> list[dict]:
    """A row for each of WAYS, of each of PLACED; each is written when it is there."""
    rows = []
    for spec, name in PLACED:
        for way in WAYS:
            us = protocol.time_graph(placed_calls(spec, name, count, way))
            torch.cuda.empty_cache()
            case = f"store hd{spec.head_dim} {count} rows {way}"
            print(f"{case:48s} {name:24s} {us:7.2f} us", flush=True)
            rows.append({"bench": "store_places", "case": case, "variant": f"store:{name}", "us": round(us, 3)})
            protocol.append_rows(out, [rows[-1] | where])
    return rows


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--places", type=int, default=0)
    args = parser.parse_args()
    where, out = protocol.environment(args.commit), []
    if args.places:
        places(args.places, where, args.out)
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
