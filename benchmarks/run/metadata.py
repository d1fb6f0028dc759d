"""Times what an engine's metadata costs: reserved places of entries in a call, and `StepPlan.update` that gathers them.

python -m benchmarks.run.metadata --out benchmarks/results/metadata.jsonl

A figure is the median of what the protocol says in ROUNDS rounds, in which the ways to do the same take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import kvfold

from ..lib import floor, protocol, table
from ..lib.calls import Step
from ..lib.protocol import Case, Variant

ROUNDS = 3
PLANS = 16  # in turn, so that no update waits for the one before it over the same tensors
FORMAT = "fold:fp8_ds_mla"
CALLS = tuple(
    (case, Variant.parse(name))
    for case, names in (
        (Case("decode", 512, 128, 256, 1, "hit"), (FORMAT,)),
        (Case("decode", 512, 4, 256, 4, "hit"), (FORMAT, "fold:rows", "many:fp8_ds_mla+indexer_fp8_vllm")),
        (Case("prefill", 512, 4, 8, 8192), (FORMAT,)),
    )
    for name in names
)
UPDATES = tuple(Case("decode", 512, ratio, 256, new, "hit") for ratio in (4, 128) for new in (1, 4))


def reserved(step: Step) -> dict[str, torch.Tensor | int]:
    """Options of a plan that keeps a place more for each sequence than it can need."""
    each = -(-step.longest // step.case.ratio) + 1
    return {
        "cu_rows": torch.arange(step.batch + 1, dtype=torch.int32, device=step.device) * each,
        "max_rows": step.batch * each,
    }


def calls_of(case: Case, variant: Variant, places: bool, device: str = "cuda", sets: int = 0) -> list[Callable[[], None]]:
    """One call for each buffer set. places: of a plan with reserved places. sets: other than the protocol wants."""
    step = Step(case, variant, device)
    if places:
        step.plan = step.make_plan(**reserved(step))
    made = [step.call(step.buffers()) for _ in range(sets or protocol.buffer_sets(floor.traffic(case, variant).total))]
    step.check(made[0])
    return made


def ways(step: Step) -> dict[str, dict[str, object]]:
    """How cache slots come to a plan, by name: options of `StepPlan.build`. The first is the one that all are compared with."""
    slots = torch.arange(step.tokens, dtype=torch.int64, device=step.device)
    tokens = {"cache_block_table": None, "rows_per_page": None, "token_slots": slots}
    count = step.batch * 2 * step.cache_pages
    wide = torch.arange(1, count + 1, dtype=torch.int64, device=step.device).view(step.batch, -1)
    return {
        "block table": {},
        "token slots": tokens,
        "token slots, reserved places": tokens | reserved(step),
        "wide int64 table, null page, reserved places": {
            "cache_block_table": wide[:, : step.cache_pages],
            "null_page": 0,
            **reserved(step),
        },
    }


def updates_of(case: Case, device: str = "cuda", plans: int = PLANS) -> dict[str, list[Callable[[], None]]]:
    """One update for each plan, by the way of `ways`."""
    step, found = Step(case, Variant.parse("fold:bf16"), device), {}
    for name, options in ways(step).items():
        made = [step.make_plan(**options) for _ in range(plans)]
        found[name] = [lambda p=plan: p.update(step.start_pos, step.cu_seqlens) for plan in made]
        _check(case, name, made)
    return found


def _check(case: Case, name: str, plans: list[kvfold.StepPlan]) -> None:
    for plan in plans:
        if int(plan.errors):
            raise RuntimeError(f"{case.name}, {name}: the plan counted errors")


def in_turns(ways: dict[str, list[Callable[[], None]]]) -> dict[str, float]:
    """Microseconds per call of each."""
    times = [{name: protocol.time_graph(calls) for name, calls in ways.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(one[name] for one in times) for name in ways}


def run(where: dict[str, str], out: Path | None) -> list[dict]:
    """The rows; each is written when it is there."""
    rows: list[dict] = []

    def add(bench: str, case: str, found: dict[str, float]) -> None:
        base = next(iter(found.values()))
        for name, us in found.items():
            row = {"bench": bench, "case": case, "variant": name, "us": round(us, 3), "more_us": round(us - base, 3)}
            rows.append(row)
            print(*cells(row), flush=True)
            protocol.append_rows(out, [row | where])

    for case in UPDATES:
        add("plan_metadata", f"plan r{case.ratio} b{case.batch} n{case.new}", in_turns(updates_of(case)))
    for case, variant in CALLS:
        both = {name: calls_of(case, variant, places) for name, places in (("", False), (", reserved places", True))}
        add("reserved", case.name, {variant.name + name: us for name, us in in_turns(both).items()})
        del both
        torch.cuda.empty_cache()
    return rows


def cells(row: dict) -> list[str]:
    return [row["case"], row["variant"], f"{row['us']:.2f}", f"{row['more_us']:+.2f}"]


def main() -> None:
    args = protocol.parser(__doc__).parse_args()
    table.show(
        "An engine's metadata, microseconds",
        ("case", "way", "us", "more"),
        [cells(row) for row in run(protocol.environment(args.commit), args.out)],
    )


if __name__ == "__main__":
    main()
