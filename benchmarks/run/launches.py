"""Times what two launches cost: pooled rows by one, stored by the next, beside both in one.

python -m benchmarks.run.launches --out benchmarks/results/launches.jsonl [--only SUBSTRING]

The rows between are fp32, so that the records are the same to the bit. Of each pair of launches the second is a dependent of
the first, and the first of the pair before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import kvfold

from ..lib import floor, protocol
from ..lib.calls import Step, calls_of
from ..lib.protocol import Case, Variant

FORMAT = "fp8_ds_mla"
ONE, POOL = Variant.parse(f"fold:{FORMAT}"), Variant.parse("fold:rows")
CASES = tuple(
    case
    for ratio in (128, 4)
    for case in (
        *(Case("decode", 512, ratio, batch, new, "hit") for new in (1, 4) for batch in (16, 64, 256)),
        *(Case("prefill", 512, ratio, 1, new) for new in (8192, 65536)),
    )
)


def in_two(step: Step) -> tuple[Callable[[], None], kvfold.EntryCache]:
    """`compress` without a cache and then `store`, over a new buffer set of a step of POOL; and where the records go."""
    (own,), (spec,), (weights,) = step.buffers(torch.float32), step.specs, step.weights
    pages = step.batch * step.cache_pages
    cache = kvfold.EntryCache.allocate(FORMAT, pages, step.rows_per_page, spec, device=step.device)
    pool = step.call([own])

    def both() -> None:
        pool()
        kvfold.store(own.rows, step.plan, cache, spec=spec, norm_weight=weights.norm_weight, rope=weights.rope)

    return both, cache


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    where = protocol.environment(args.commit)
    for case in CASES:
        if args.only not in case.name:
            continue
        step = Step(case, POOL)
        made = [in_two(step)[0] for _ in range(protocol.buffer_sets(floor.traffic(case, ONE).total))]
        step.check(made[0])
        two = protocol.time_graph(made)
        del made
        torch.cuda.empty_cache()
        one = protocol.time_graph(calls_of(case, ONE))
        torch.cuda.empty_cache()
        print(f"{case.name:32s} two launches {two:7.2f} us, one {one:7.2f} us", flush=True)
        rows = [("two launches", two), ("one launch", one)]
        head = {"bench": "launches", "case": case.name}
        protocol.append_rows(args.out, [head | {"variant": name, "us": round(us, 3)} | where for name, us in rows])


if __name__ == "__main__":
    main()
