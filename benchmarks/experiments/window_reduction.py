"""The change this project began from: the reduction of a window by one warp against the shipped configuration.

python -m benchmarks.experiments.window_reduction --out benchmarks/results/window_reduction.jsonl

Paged fp32 rows, bf16 kv_score, head_dim 512, ratio 128, 4 new tokens that finish a window, pooled rows only. In the naive
arrangement a program covers a slice of the columns with one warp, which walks the 128 rows of the window alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..lib import floor, protocol, table
from ..lib.calls import Buffers, Step
from ..lib.protocol import Case, Variant

COLUMNS = 64  # of a program: two per lane
BOUND = 2e-6  # of fp32 pooling, relative to the row's norm (DESIGN.md)
VARIANT = Variant.parse("window:rows")


@triton.jit
def _add_row(m, l, a, k, s):
    """Running maximum, sum of weights and weighted sum, with one row more."""
    top = tl.maximum(m, s)
    kept = tl.exp(m - top)
    weight = tl.exp(s - top)
    return top, l * kept + weight, a * kept + weight * k


@triton.jit
def one_warp_kernel(
    kv_score, ape, kv, score, kv_table, score_table, table_width, start_pos, new, rows,
    RATIO: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One sequence whose step ends its window, one slice of columns. No overlap; `new` is at most RATIO."""
    b = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(start_pos + b)
    first = (start + new) // RATIO * RATIO - RATIO
    m = tl.full([COLUMNS], float("-inf"), tl.float32)
    l = tl.zeros([COLUMNS], tl.float32)
    a = tl.zeros([COLUMNS], tl.float32)
    for x in range(first, start):
        at = b * table_width + x // PAGE
        k = tl.load(kv + (tl.load(kv_table + at).to(tl.int64) * PAGE + x % PAGE) * HEAD_DIM + c)
        s = tl.load(score + (tl.load(score_table + at).to(tl.int64) * PAGE + x % PAGE) * HEAD_DIM + c)
        m, l, a = _add_row(m, l, a, k, s)
    for x in range(start, start + new):
        live = kv_score + (b * new + x - start).to(tl.int64) * (2 * HEAD_DIM) + c
        k = tl.load(live).to(tl.float32)
        s = tl.load(live + HEAD_DIM).to(tl.float32) + tl.load(ape + x % RATIO * HEAD_DIM + c)
        at = b * table_width + x // PAGE
        tl.store(kv + (tl.load(kv_table + at).to(tl.int64) * PAGE + x % PAGE) * HEAD_DIM + c, k)
        tl.store(score + (tl.load(score_table + at).to(tl.int64) * PAGE + x % PAGE) * HEAD_DIM + c, s)
        m, l, a = _add_row(m, l, a, k, s)
    tl.store(rows + b.to(tl.int64) * HEAD_DIM + c, a / l)


def one_warp(step: Step, buffers: Buffers, rows: torch.Tensor, columns: int = COLUMNS) -> Callable[[], None]:
    """A call of the naive kernel that does what `compress` does with these buffers, into `rows`."""
    spec, state, (kv_table, score_table) = step.specs[0], buffers.state, step.plan.block_tables
    grid = (step.case.batch, spec.head_dim // columns)
    return lambda: one_warp_kernel[grid](
        buffers.kv_score,
        step.weights[0].ape,
        state.kv,
        state.score,
        kv_table,
        score_table,
        kv_table.shape[1],
        step.start_pos,
        step.case.new,
        rows,
        RATIO=spec.ratio,
        PAGE=state.kv.shape[1],
        HEAD_DIM=spec.head_dim,
        COLUMNS=columns,
        num_warps=1,
    )


def disagreement(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest over rows of |got - want| / |want|, Euclidean norms."""
    got, want = got.double(), want.double()
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).max())


def measure(case: Case) -> tuple[float, float, float]:
    """Microseconds of one warp and of the shipped configuration, and the floor."""
    step, traffic = Step(case, VARIANT), floor.traffic(case, VARIANT)
    naive, shipped = [], []
    for _ in range(protocol.buffer_sets(traffic.total)):
        buffers = step.buffers(torch.float32)
        rows = torch.full_like(buffers[0].rows, torch.nan)
        naive.append(one_warp(step, buffers[0], rows))
        shipped.append(step.call(buffers))
        naive[-1]()
        step.check(shipped[-1])
        error = disagreement(rows, buffers[0].rows)
        if not error <= BOUND:
            raise RuntimeError(f"{case.name}: the two arrangements differ by {error:.1e}, more than {BOUND:.0e}")
    return protocol.time_graph(naive), protocol.time_graph(shipped), floor.floor_us(traffic)


def main() -> None:
    args = protocol.parser(__doc__).parse_args()
    where, cells = protocol.environment(args.commit), []
    for batch in (16, 64, 128, 256):
        case = Case("decode", 512, 128, batch, 4, "hit")
        naive, shipped, floor_us = measure(case)
        torch.cuda.empty_cache()
        for name, us in (("one_warp", naive), ("shipped", shipped)):
            row = {"bench": "window_reduction", "case": case.name, "variant": name, "us": round(us, 3)}
            row |= {"floor_us": round(floor_us, 3), "speedup": round(naive / us, 2)}
            protocol.append_rows(args.out, [row | where])
        times = [f"{naive:.2f}", f"{shipped:.2f}", f"{naive / shipped:.2f}x", f"{floor_us:.2f}"]
        cells.append([case.name, *times])
    header = ("case", "one warp", "shipped", "speed-up", "floor")
    table.show("Reduction of paged fp32 windows, microseconds", header, cells)


if __name__ == "__main__":
    main()
