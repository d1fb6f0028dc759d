"""Times what a step costs beside its kernels: `StepPlan.update` on the device, and every call on the host.

The host's figures are of an eager call, of the same through its operator (`op`), and of that call compiled as a whole by
`torch.compile(fullgraph=True)`, without CUDA graphs (`compiled`).

python -m benchmarks.run.overhead --out benchmarks/results/overhead.jsonl [--commit COMMIT]
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kvfold import ops
from kvfold.storage.step import Compressor

from ..lib import protocol, table
from ..lib.calls import Buffers, Step
from ..lib.protocol import Case, Variant

PLANS = 16  # in turn, so that no update waits for the one before it over the same tensors
CHUNK, CHUNKS = 200, 10  # few enough calls that the launch queue never fills and the host never waits
HOST = (
    (Case("decode", 512, 128, 16, 4, "hit"), ("fold:fp8_ds_mla", "window:fp8_ds_mla")),
    (Case("decode", 512, 4, 16, 4, "hit"), ("fold:fp8_ds_mla", "window:fp8_ds_mla", "many:fp8_ds_mla+indexer_fp8_vllm")),
)


def plan_cases() -> list[tuple[str, Case]]:
    """The shapes that a plan is updated for, and their names."""
    found = []
    for ratio in (4, 128):
        for batch in (1, 4, 16, 64, 128, 256, 512, 1024):
            found.append((f"plan r{ratio} b{batch} n4", Case("decode", 512, ratio, batch, 4, "hit")))
        found.append((f"plan r{ratio} b1 s65536", Case("prefill", 512, ratio, 1, 65536)))
    return found


def plan_us(case: Case) -> float:
    """Microseconds of an update on the device, with cache slots from a block table."""
    step = Step(case, Variant.parse("fold:bf16"))
    plans = [step.make_plan() for _ in range(PLANS)]
    us = protocol.time_graph([lambda p=plan: p.update(step.start_pos, step.cu_seqlens) for plan in plans])
    if any(int(plan.errors) for plan in plans):
        raise RuntimeError(f"{case.name}: the plan counted errors")
    return us


def through_operator(step: Step, buffers: list[Buffers]) -> Callable[[], None]:
    """The call as compiled code makes it: by its operator, but without what compiled code has round it."""
    made = [
        Compressor(b.kv_score, b.state, b.cache, spec, *weights)
        for b, spec, weights in zip(buffers, step.specs, step.weights, strict=True)
    ]
    if len(made) == 1:
        return lambda: ops.compress(made[0], step.plan, buffers[0].rows, None, None)
    return lambda: ops.compress_many(made, step.plan, None, None)


def host_us(call: Callable[[], None]) -> float:
    """Microseconds of host time per eager call; the device is waited for between chunks, outside the timing.

    Of the fastest chunk: what else runs on a lent machine's cores only adds, 24 to 52 us were medians of one call on one day.
    """
    call()
    times = []
    for _ in range(CHUNKS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CHUNK):
            call()
        times.append((time.perf_counter() - begin) / CHUNK * 1e6)
    torch.cuda.synchronize()
    return min(times)


def main() -> None:
    args = protocol.parser(__doc__).parse_args()
    where, rows = protocol.environment(args.commit), []

    def add(bench: str, case: str, variant: str, us: float) -> None:
        rows.append({"bench": bench, "case": case, "variant": variant, "us": round(us, 3)})
        protocol.append_rows(args.out, [rows[-1] | where])

    for name, case in plan_cases():
        add("plan", name, "update", plan_us(case))
    for case, variants in HOST:
        for name in variants:
            step = Step(case, Variant.parse(name))
            buffers = step.buffers()
            call = step.call(buffers)
            ways = {"": call, " op": through_operator(step, buffers), " compiled": torch.compile(call, fullgraph=True)}
            for way, made in ways.items():
                step.check(made)
                add("host", case.name, name + way, host_us(made))
        add("host", case.name, "update", host_us(lambda s=step: s.plan.update(s.start_pos, s.cu_seqlens)))
    cells = [[row["bench"], row["case"], row["variant"], f"{row['us']:.2f}"] for row in rows]
    table.show("Plan on the device and calls on the host, microseconds", ("bench", "case", "variant", "us"), cells)


if __name__ == "__main__":
    main()
