"""Times on one GPU what each rank of several has to do, by itself, beside the whole: for shares of more GPUs than there are.

python -m benchmarks.run.parallel_alone --out benchmarks/results/parallel.jsonl
         [--ranks 2,4] [--tokens 1048576] [--training-tokens 262144] [--only SUBSTRING] [--layout contiguous,zigzag] [--eager]

The cases of `benchmarks.run.parallel`, in CUDA graphs, or `--eager`, where the host's time is in it. Ranks are in one process
and make their steps one after the other; what they send each other is kept (`lib/ranks.py`), until all has the bits of the
whole, which is checked. Then each rank's step is timed: all that its GPU would do, with copies on the device for what it
receives, and no time for what it sends. `part_us`: of the slowest rank, `parts` of each. `messages`, `bytes`, `gathered`:
exchanges of a step, bytes that a rank sends in them, and in all-gathers, of sums of weights; the most of any rank. These are
parts of a time on several GPUs, and no such time.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Sequence
from functools import reduce

import torch

import kvfold
from kvfold.parallel import ContextParallel, ParallelPlan
from kvfold.parallel.exchange import How, run
from kvfold.parallel.halo import CutPacking
from kvfold.training import Packing, compress

from ..lib import protocol
from ..lib.ranks import Mail, Ranks, ranks_of, settle
from ..lib.table import show
from .parallel import CASES, ROWS_PER_PAGE, Case, Timer, compressors_of, pages_of, rope_of, split


def timed(ranks: Ranks, steps: Sequence[Callable[[], None]], timer: Timer, one_us: float) -> dict:
    """The figures of a row."""
    parts = [timer.us(step) for step in steps]
    mails = [mail for _, mail in ranks]
    return {
        "one_us": round(one_us, 2),
        "part_us": round(max(parts), 2),
        "parts": [round(us, 2) for us in parts],
        "messages": max(mail.messages for mail in mails),
        "bytes": max(mail.sent for mail in mails),
        "gathered": max(mail.gathered for mail in mails),
        "share": round(max(parts) / one_us, 4),
    }


def measure(case: Case, tokens: int, sizes: Sequence[int], layouts: Sequence[str], timer: Timer) -> list[dict]:
    """Rows of a prompt."""
    device, rows = timer.device, []
    whole = compressors_of(case, tokens, tokens, device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    where = {"cache_block_table": pages_of(whole), "rows_per_page": ROWS_PER_PAGE}
    plan = kvfold.StepPlan.build(case.ratio, zero, ends, tokens, state_slots=zero, **where)
    one_us = timer.us(lambda: run(whole, plan, How(None, None)))
    assert int(plan.errors) == 0
    for size in sizes:
        for layout in layouts:
            ranks, steps, made, plans = ranks_of(size, layout), [], [], []
            for cp, mail in ranks:
                shards = split(cp, case, tokens)
                own = shards.index(mail.rank).to(device)
                mine = [of_rank(c, own) for c in whole]
                plans.append(cp.plan(shards, case.compressors[0][0], **where))
                made.append(mine)
                steps.append(step_of(cp, mail, mine, plans[-1]))
            settle(ranks, steps)
            for one in plans:
                one.errors.zero_()
            figures = timed(ranks, steps, timer, one_us)
            assert not any(int(one.errors) for one in plans)
            for i, c in enumerate(whole):
                assert torch.equal(reduce(torch.bitwise_or, (mine[i].cache.storage for mine in made)), c.cache.storage)
            what = {"bench": "parallel_alone", "case": f"{case.name} s{tokens}", "variant": _variant(size, layout, timer)}
            rows.append(what | figures)
    return rows


def step_of(cp: ContextParallel, mail: Mail, compressors: list[kvfold.Compressor], plan: ParallelPlan) -> Callable[[], None]:
    def step() -> None:
        mail.begin()
        cp.compress(compressors, plan)

    return step


def _variant(size: int, layout: str, timer: Timer) -> str:
    return f"{size} {layout}" + ("" if timer.graph else ", no graph")


def of_rank(c: kvfold.Compressor, own: torch.Tensor) -> kvfold.Compressor:
    """The compressor of a rank that has these rows: state and cache are its own, and empty."""
    state = kvfold.FoldState.allocate(c.spec, 1, 8, dtype=c.state.rows.dtype, device=own.device)
    cache = kvfold.EntryCache.allocate(c.cache.format, c.cache.num_pages, ROWS_PER_PAGE, c.spec, device=own.device)
    return c._replace(kv_score=c.kv_score[own], state=state, cache=cache)


def measure_training(case: Case, tokens: int, sizes: Sequence[int], layouts: Sequence[str], timer: Timer) -> list[dict]:
    """Rows of a forward and a backward of one compressor, through autograd."""
    device, spec, rows = timer.device, case.compressors[0][0], []
    leaves = torch.randn(spec.ratio, spec.channels, device=device), torch.ones(spec.head_dim, device=device)
    ape, norm_weight = (x.requires_grad_() for x in leaves)
    given = {"spec": spec, "ape": ape, "norm_weight": norm_weight, "rope": rope_of(tokens, spec.rope_dim, device)}
    kv_score = torch.randn(tokens, 2 * spec.channels, dtype=torch.bfloat16, device=device).requires_grad_()
    whole = Packing.build(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens, spec.ratio)
    g = torch.randn(tokens // spec.ratio, spec.head_dim, device=device).bfloat16()

    def step() -> list[torch.Tensor]:
        entries = compress(kv_score, whole, **given)
        return [entries.detach(), *torch.autograd.grad(entries, [kv_score, ape, norm_weight], g)]

    one_us, wanted = timer.us(step), step()
    for size in sizes:
        for layout in layouts:
            ranks, steps, numbers = ranks_of(size, layout), [], []
            for cp, mail in ranks:
                shards = split(cp, case, tokens)
                own = shards.index(mail.rank).to(device)
                packing = cp.packing(shards, spec, device=device)
                numbers.append((packing.numbers[mail.rank], own))
                tokens_of = kv_score.detach()[own].requires_grad_()
                steps.append(training_step_of(cp, mail, tokens_of, packing, given, g[numbers[-1][0]]))
            settle(ranks, steps)
            for (made, own), one in zip(numbers, steps, strict=True):
                found = one()
                of = wanted[0][made], wanted[1][own], *wanted[2:]
                assert all(torch.equal(x, y) for x, y in zip(found, of, strict=True)), "a rank has other bits than the whole"
            what = {"bench": "parallel_alone", "case": f"train {case.name} s{tokens}"}
            rows.append(what | {"variant": _variant(size, layout, timer)} | timed(ranks, steps, timer, one_us))
    return rows


def training_step_of(
    cp: ContextParallel, mail: Mail, tokens: torch.Tensor, packing: CutPacking, given: dict, g: torch.Tensor
) -> Callable[[], list[torch.Tensor]]:
    leaves = [tokens, given["ape"], given["norm_weight"]]

    def step() -> list[torch.Tensor]:
        mail.begin()
        entries = cp.entries(tokens, packing, **given)
        return [entries.detach(), *torch.autograd.grad(entries, leaves, g)]

    return step


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("--ranks", default="2,4", help="how many, separated by commas (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of the prompt, 0 for none (default: %(default)s)")
    parser.add_argument("--training-tokens", type=int, default=1 << 18, help="0 for none (default: %(default)s)")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--layout", default="contiguous,zigzag", help="separated by commas (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--eager", action="store_true", help="record no CUDA graphs")
    return parser.parse_args(arguments)


def main() -> int:
    args, rows, failed = parse(), [], 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = Timer(device, args.repeats, not args.eager)
    sizes, layouts = [int(size) for size in args.ranks.split(",")], args.layout.split(",")
    todo = [(measure_training, case) for case in CASES if args.training_tokens and len(case.compressors) == 1]
    todo += [(measure, case) for case in CASES if args.tokens]
    for call, case in todo:
        training = call is measure_training
        if args.only in (f"train {case.name}" if training else case.name):
            try:
                found = call(case, args.training_tokens if training else args.tokens, sizes, layouts, timer)
            except Exception:  # the other cases are worth having: device time is scarce
                traceback.print_exc()
                found, failed = [], failed + 1
            for row in found:
                rows.append(row)
                print(row, flush=True)
                protocol.append_rows(args.out, [protocol.environment(args.commit) | row])
            if device.type == "cuda":
                torch.cuda.empty_cache()
    columns = ("case", "variant", "one_us", "part_us", "share", "messages", "bytes", "gathered")
    show("parts of ranks, on one GPU", columns, [[str(row[name]) for name in columns] for row in rows])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
