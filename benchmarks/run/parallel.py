"""Times a prefill that is cut over GPUs beside one GPU, and the exchange alone beside its bytes.

torchrun --nproc-per-node 2 -m benchmarks.run.parallel --out benchmarks/results/parallel.jsonl
         [--tokens 1048576] [--only SUBSTRING] [--layout contiguous,zigzag] [--graph]

One sequence, bf16 kv_score, records of vLLM. All figures are those of the slowest rank. `one_us`: `kvfold.compress` of all
tokens on one GPU, of two compressors one after the other. `cut_us`: `ContextParallel.compress` of a rank's tokens; the
all-gather of entries is apart, `gather_us`. `exchange_us`: the messages alone, beside `bytes`, the most that a rank sends.
`handover_us`: all that a cut adds but for the main call: tails, messages, putting carries. `share`: cut_us / one_us. --graph:
calls are recorded in CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

import kvfold
from kvfold.parallel import ContextParallel, ParallelPlan, Shards
from kvfold.parallel.exchange import How, Part, Scratch, exchange
from kvfold.parallel.transport import Parcel, Transport

from ..lib import protocol
from ..lib.table import show

ROWS_PER_PAGE = 64
CALLS = 8  # one behind the other between two events, like the layers of a model: the host prepares one while another runs


class Case(NamedTuple):
    """Compressors that go together, each with its format. inside: the cut is inside of a window, where a carry is largest."""

    name: str
    compressors: tuple[tuple[kvfold.CompressorSpec, str], ...]
    inside: bool

    @property
    def ratio(self) -> int:
        return self.compressors[0][0].ratio


MAIN, INDEXER = (kvfold.V4_CSA, "fp8_ds_mla"), (kvfold.V4_INDEXER, "indexer_fp8_vllm")
CASES = tuple(
    Case(f"{name}{' inside' * inside}", compressors, inside)
    for name, compressors in (("r128", ((kvfold.V4_HCA, "fp8_ds_mla"),)), ("r4", (MAIN,)), ("r4 many", (MAIN, INDEXER)))
    for inside in (False, True)
)


class Timer:
    """Calls on one device. repeats: of which the median is taken. graph: whether they are recorded."""

    def __init__(self, device: torch.device, repeats: int, graph: bool) -> None:
        self.device, self.repeats, self.graph = device, repeats, graph

    def us(self, call: Callable[[], None], before: Callable[[], None] = lambda: None) -> float:
        """before: called ahead of each, outside of what is timed."""
        for _ in range(2):
            call()
        if self.device.type == "cpu":
            return statistics.median(self._on_host(call, before) for _ in range(self.repeats))
        if self.graph:
            torch.cuda.synchronize()
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                call()
            call = recorded.replay
            call()
        return statistics.median(self._on_gpu(call, before) for _ in range(self.repeats))

    def _on_host(self, call: Callable[[], None], before: Callable[[], None]) -> float:
        before()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    def _on_gpu(self, call: Callable[[], None], before: Callable[[], None]) -> float:
        before()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / CALLS


def compressors_of(case: Case, tokens: int, positions: int, device: torch.device) -> list[kvfold.Compressor]:
    """With `tokens` rows of kv_score, for a sequence of `positions`."""
    found = []
    for spec, fmt in case.compressors:
        kv_score = torch.randn(tokens, 2 * spec.channels, dtype=torch.bfloat16, device=device)
        kept = torch.bfloat16 if spec.overlap else torch.float32
        state = kvfold.FoldState.allocate(spec, 1, 8, dtype=kept, device=device)
        cache = kvfold.EntryCache.allocate(
            fmt, positions // spec.ratio // ROWS_PER_PAGE + 1, ROWS_PER_PAGE, spec, device=device
        )
        ape = torch.randn(spec.ratio, spec.channels, device=device)
        rope = kvfold.reference.rope_table(positions + 1, spec.rope_dim).to(device)
        found.append(kvfold.Compressor(kv_score, state, cache, spec, ape, torch.ones(spec.head_dim, device=device), rope))
    return found


def one_us(case: Case, tokens: int, timer: Timer) -> float:
    """On this GPU alone."""
    found, zero = compressors_of(case, tokens, tokens, timer.device), torch.zeros(1, dtype=torch.int32, device=timer.device)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=timer.device)
    where = {"cache_block_table": pages_of(found), "rows_per_page": ROWS_PER_PAGE}
    plan = kvfold.StepPlan.build(case.ratio, zero, ends, tokens, state_slots=zero, **where)

    def step() -> None:
        for kv_score, state, cache, spec, ape, norm_weight, rope, _ in found:
            kvfold.compress(kv_score, plan, state, cache, spec=spec, ape=ape, norm_weight=norm_weight, rope=rope)

    us = timer.us(step)
    assert int(plan.errors) == 0
    return us


def pages_of(compressors: Sequence[kvfold.Compressor]) -> torch.Tensor:
    return torch.arange(compressors[0].cache.num_pages, dtype=torch.int32, device=compressors[0].cache.device)[None]


def split(cp: ContextParallel, case: Case, tokens: int) -> Shards:
    """Equal parts, each cut on a multiple of 128 tokens or, inside of a window, one before it."""
    chunks = cp.size * (2 if cp.layout == "zigzag" else 1)
    cuts = [tokens * i // chunks // 128 * 128 - case.inside * (0 < i < chunks) for i in range(chunks)]
    return cp.split([tokens], cuts=[max(cut, 0) for cut in cuts] + [tokens])


def messages_us(
    plan: ParallelPlan, own: Sequence[kvfold.Compressor], transport: Transport, timer: Timer, before: Callable
) -> float:
    """The rounds of messages with nothing around them."""
    rounds = []
    for each in plan.rounds:
        parcels = []
        for some in (each.sent, each.received):
            sizes = [plan.message_bytes(own, one) for one in some]
            ranks = [one.message.target if some is each.sent else one.message.source for one in some]
            parcels.append(
                [
                    Parcel(rank, torch.zeros(size, dtype=torch.uint8, device=timer.device))
                    for rank, size in zip(ranks, sizes, strict=True)
                ]
            )
        rounds.append(parcels)

    def step() -> None:
        for sent, received in rounds:
            transport.exchange(sent, received, "a measurement")

    return timer.us(step, before)


def measure(cp: ContextParallel, transport: Transport, case: Case, tokens: int, timer: Timer) -> dict:
    """A row; the same on every rank. transport: of the group of `cp`."""
    device = timer.device
    alone = one_us(case, tokens, timer)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    shards = split(cp, case, tokens)
    own = compressors_of(case, shards.tokens(cp.rank), tokens, device)
    plan = cp.plan(shards, own[0].spec, cache_block_table=pages_of(own), rows_per_page=ROWS_PER_PAGE)
    parts = [Part(c, Scratch.like(c.state, max(1, len(shards.segments[cp.rank])))) for c in own]

    def together() -> None:  # ranks begin each repetition together
        transport.gather(torch.zeros(1, dtype=torch.int64, device=device), "a barrier")

    def handover() -> None:
        with torch.inference_mode():
            exchange(parts, plan, transport, How(None, None))

    times = {
        "cut_us": timer.us(lambda: cp.compress(own, plan), together),
        "exchange_us": messages_us(plan, own, transport, timer, together),
        "handover_us": timer.us(handover, together),
        "gather_us": timer.us(lambda: cp.gather(own, plan), together),
    }
    assert int(plan.errors) == 0
    mine = torch.tensor([alone, *times.values(), float(plan.bytes_sent(own))], dtype=torch.float64, device=device)
    most = transport.gather(mine.view(torch.int64), "figures").view(torch.float64).view(cp.size, -1).amax(0).tolist()
    row = {"one_us": most[0], **dict(zip(times, most[1:-1], strict=True))}
    row = {name: round(us, 2) for name, us in row.items()} | {"bytes": int(most[-1]), "share": round(most[1] / most[0], 4)}
    what = {"bench": "parallel", "case": f"{case.name} s{tokens}", "variant": f"{cp.size} {cp.layout}{' graph' * timer.graph}"}
    return what | row


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--layout", default="contiguous,zigzag", help="separated by commas (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--graph", action="store_true", help="record calls in CUDA graphs")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    timer, rows = Timer(device, args.repeats, args.graph), []
    for layout in args.layout.split(","):
        cp = ContextParallel(layout=layout)
        for case in CASES:
            if args.only in case.name:
                row = measure(cp, Transport(dist.group.WORLD, None), case, args.tokens, timer)
                rows.append(row)
                if cp.rank == 0:
                    print(row, flush=True)
                    protocol.append_rows(args.out, [protocol.environment(args.commit) | row])
    if dist.get_rank() == 0:
        columns = ("case", "variant", "one_us", "cut_us", "share", "exchange_us", "bytes", "handover_us", "gather_us")
        show("prefill, cut over GPUs", columns, [[str(row[name]) for name in columns] for row in rows])
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
