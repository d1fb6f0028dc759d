"""Times a prefill that is cut over GPUs beside one GPU, and the exchange alone beside its bytes.

torchrun --nproc-per-node 2 -m benchmarks.run.parallel --out benchmarks/results/parallel.jsonl
         [--tokens 1048576] [--training-tokens 262144] [--only SUBSTRING] [--layout contiguous,zigzag] [--graph]

One sequence, bf16 kv_score, records of vLLM. All figures are those of the slowest rank. `one_us`: `kvfold.compress` of all
tokens on one GPU, of two compressors `compress_many`. `cut_us`: `ContextParallel.compress` of a rank's tokens; the
all-gather of entries is apart, `gather_us`. `exchange_us`: the messages alone, beside `bytes`, the most that a rank sends.
`handover_us`: all that a cut adds but for the main call: tails, messages, putting carries. `share`: cut_us / one_us. --graph:
calls are recorded in CUDA graphs. Rows `train`: forward and backward of one compressor by autograd; `bytes`: the most that a
rank sends in one of them, sums of weights aside.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist

import kvfold
from kvfold.parallel import ContextParallel, ParallelPlan, Shards
from kvfold.parallel.exchange import How, Part, Scratch, exchange, run
from kvfold.parallel.training import bytes_sent
from kvfold.parallel.transport import Parcel, Transport
from kvfold.training import Packing, compress

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
        weight, rope = torch.ones(spec.head_dim, device=device), rope_of(positions + 1, spec.rope_dim, device)
        found.append(kvfold.Compressor(kv_score, state, cache, spec, ape, weight, rope))
    return found


@lru_cache(maxsize=4)
def rope_of(positions: int, rope_dim: int, device: torch.device) -> torch.Tensor:
    """Remembered, as a host takes a second for one of a million positions."""
    return kvfold.reference.rope_table(positions, rope_dim).to(device)


_ONE: dict[tuple, float] = {}  # what was measured: no cut changes it


def one_us(case: Case, tokens: int, timer: Timer) -> float:
    """On this GPU alone."""
    key = case.compressors, tokens, timer.graph
    if key not in _ONE:
        _ONE[key] = _one_us(case, tokens, timer)
    return _ONE[key]


def _one_us(case: Case, tokens: int, timer: Timer) -> float:
    found, zero = compressors_of(case, tokens, tokens, timer.device), torch.zeros(1, dtype=torch.int32, device=timer.device)
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=timer.device)
    where = {"cache_block_table": pages_of(found), "rows_per_page": ROWS_PER_PAGE}
    plan = kvfold.StepPlan.build(case.ratio, zero, ends, tokens, state_slots=zero, **where)

    us = timer.us(lambda: run(found, plan, How(None, None)))
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


def measure_training(cp: ContextParallel, transport: Transport, case: Case, tokens: int, timer: Timer) -> dict:
    """The same of a forward and a backward of one compressor, through autograd."""
    device, spec = timer.device, case.compressors[0][0]
    leaves = torch.randn(spec.ratio, spec.channels, device=device), torch.ones(spec.head_dim, device=device)
    ape, norm_weight = (x.requires_grad_() for x in leaves)
    rope = rope_of(tokens, spec.rope_dim, device)
    given = {"spec": spec, "ape": ape, "norm_weight": norm_weight, "rope": rope}

    def step(rows: int, entries: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        kv_score = torch.randn(rows, 2 * spec.channels, dtype=torch.bfloat16, device=device).requires_grad_()
        g = torch.randn_like(entries(kv_score))
        return lambda: torch.autograd.grad(entries(kv_score), [kv_score, ape, norm_weight], g)

    def together() -> None:
        transport.gather(torch.zeros(1, dtype=torch.int64, device=device), "a barrier")

    if ("train", spec, tokens) not in _ONE:
        whole = Packing.build(torch.tensor([0, tokens], dtype=torch.int32, device=device), tokens, spec.ratio)
        _ONE["train", spec, tokens] = timer.us(step(tokens, lambda x: compress(x, whole, **given)))
    alone = _ONE["train", spec, tokens]
    shards = split(cp, case, tokens)
    packing = cp.packing(shards, spec, device=device)
    cut = timer.us(step(shards.tokens(cp.rank), lambda x: cp.entries(x, packing, **given)), together)
    sent = max(bytes_sent(packing, spec, torch.bfloat16))
    mine = torch.tensor([alone, cut, float(sent)], dtype=torch.float64, device=device)
    one_us, cut_us, most = (
        transport.gather(mine.view(torch.int64), "figures").view(torch.float64).view(cp.size, -1).amax(0).tolist()
    )
    what = {"bench": "parallel", "case": f"train {case.name} s{tokens}"}
    what["variant"] = f"{cp.size} {cp.layout}{' graph' * timer.graph}"
    return what | {
        "one_us": round(one_us, 2),
        "cut_us": round(cut_us, 2),
        "bytes": int(most),
        "share": round(cut_us / one_us, 4),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = protocol.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of the prompt, 0 for none (default: %(default)s)")
    parser.add_argument("--training-tokens", type=int, default=1 << 18, help="0 for none (default: %(default)s)")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--layout", default="contiguous,zigzag", help="separated by commas (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--patience", type=int, default=60, help="seconds that a rank waits for another one")
    parser.add_argument("--graph", action="store_true", help="record calls in CUDA graphs")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    device, patience = torch.device("cpu"), timedelta(seconds=args.patience)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=patience, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=patience)
    timer, transport, rows = Timer(device, args.repeats, args.graph), Transport(dist.group.WORLD, None), []
    for layout in args.layout.split(","):
        cp = ContextParallel(layout=layout)
        todo = [(measure, case, args.tokens) for case in CASES if args.tokens]
        if args.training_tokens:
            todo += [(measure_training, case, args.training_tokens) for case in CASES if len(case.compressors) == 1]
        for call, case, tokens in todo:
            name = f"train {case.name}" if call is measure_training else case.name
            if args.only in name:
                row = call(cp, transport, case, tokens, timer)
                rows.append(row)
                if cp.rank == 0:
                    print(row, flush=True)
                    protocol.append_rows(args.out, [protocol.environment(args.commit) | row])
    if dist.get_rank() == 0:
        columns = ("case", "variant", "one_us", "cut_us", "share", "exchange_us", "bytes", "handover_us", "gather_us")
        show("prefill, cut over GPUs", columns, [[str(row.get(name, "")) for name in columns] for row in rows])
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
