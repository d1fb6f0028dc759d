"""Processes that are ranks of gloo groups, started once for all tests; and a step cut over ranks, beside one process."""

from __future__ import annotations

import copy
import multiprocessing
import os
import random
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from itertools import combinations_with_replacement
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from support import fast_interpreter
from torch import Tensor

import kvfold
from kvfold.parallel import ContextParallel, take_carry
from kvfold.storage.pack import read_fields

SIZE = 4
PATIENCE = 120.0  # seconds until a command that does not come back fails

SPECS = {
    "fold": kvfold.CompressorSpec(head_dim=16, ratio=9, rope_dim=8),
    "plain fold": kvfold.CompressorSpec(head_dim=16, ratio=9, rope_dim=8, has_ape=False),
    "overlap": kvfold.CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8),
    "indexer": kvfold.CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=8, hadamard=True),
    "rows": kvfold.CompressorSpec(head_dim=16, ratio=3, rope_dim=8, has_ape=False),
    "wide overlap": kvfold.CompressorSpec(head_dim=16, ratio=9, overlap=True, rope_dim=8),
    "tokens": kvfold.CompressorSpec(head_dim=16, ratio=1, rope_dim=8, has_ape=False, gate=False),
}


class World:
    """SIZE processes, of which the first n are a group for each n. `run` calls a function on all of them."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, ranks: int, function: Callable[..., Any], *given: Any) -> list[Any]:
        """What `function(group of `ranks` processes, *given)` returns on each of them. Their first error is raised here."""
        pipes = self._pipes[:ranks]
        for pipe in pipes:
            pipe.send((ranks, function, given))
        found: dict[int, Any] = {}
        while len(found) < ranks:
            ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in found], PATIENCE)
            if not ready:
                raise TimeoutError(f"{function.__name__}: of {ranks} ranks only {sorted(found)} came back")
            for pipe in ready:
                text, found[pipes.index(pipe)] = pipe.recv()
                assert not text, f"rank {pipes.index(pipe)}:\n{text}"  # others may wait for it
        return [found[rank] for rank in range(ranks)]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(rank: int, store: str, pipe: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    fast_interpreter.install()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, SIZE), rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    groups = {n: dist.new_group(range(n)) for n in range(1, SIZE + 1)}
    while (command := pipe.recv()) is not None:
        ranks, function, given = command
        try:
            pipe.send(("", function(groups[ranks], *given)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
    os._exit(0)  # the threads of gloo are slow to end


class Step(NamedTuple):
    """A step of packed sequences. names: of the specs that take part, all of one ratio and overlap."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    start_pos: tuple[int, ...] | None = None
    layout: str = "contiguous"
    each: bool = False
    cuts: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    fmt: str = "fp32"
    backend: str = "torch"
    two: bool = False  # values and scores are two tensors

    @property
    def starts(self) -> tuple[int, ...]:
        return self.start_pos or (0,) * len(self.lengths)


def every_cut(total: int, chunks: int) -> list[tuple[int, ...]]:
    return [(0, *inner, total) for inner in combinations_with_replacement(range(total + 1), chunks - 1)]


def drawn_cuts(draw: random.Random, total: int, chunks: int) -> tuple[int, ...]:
    """Some short, some empty, some on a window."""
    inner = [draw.choice((draw.randrange(total + 1), draw.randrange(min(total, 12) + 1))) for _ in range(chunks - 1)]
    if draw.random() < 0.3 and inner:
        inner = [inner[0]] * len(inner)
    return 0, *sorted(inner), total


ROWS_PER_PAGE = 5
UNTOUCHED = 0xA5


class Rank:
    """States, caches and weights of one process, and the step's tokens, the same in every process.

    turned: sequences have the state slots and pages of another one, as they may on other ranks.
    """

    def __init__(self, step: Step, turned: int = 0) -> None:
        self.step, batch = step, len(step.lengths)
        self.ends = [s + n for s, n in zip(step.starts, step.lengths, strict=True)]
        draw = torch.Generator().manual_seed(sum(self.ends))
        spec = SPECS[step.names[0]]
        self.pages = max(self.ends, default=0) // spec.ratio // ROWS_PER_PAGE + 1
        owners = torch.arange(batch).roll(turned)
        self.slots, self.table = owners.int(), torch.arange(batch * self.pages, dtype=torch.int32).view(batch, -1)[owners]
        self.compressors, self.whole = [], []
        for name in step.names:
            spec = SPECS[name]
            whole = [torch.randn(n, spec.kv_score_width, generator=draw).to(step.dtype) for n in self.ends]
            state = None
            if spec.gate:
                kept = torch.float32 if kvfold.FoldState.allocate(spec, 0, 1).kind == "fold" else step.dtype
                state = kvfold.FoldState.allocate(spec, batch, 4, dtype=kept)
                state.rows.fill_(torch.nan)
            cache = kvfold.EntryCache.allocate(step.fmt, batch * self.pages, ROWS_PER_PAGE, spec)
            for x in (cache.storage, cache.scales):
                if x is not None:
                    x.fill_(UNTOUCHED)
            ape = torch.randn(spec.ratio, spec.channels, generator=draw) if spec.has_ape else None
            norm_weight = 1 + 0.2 * torch.randn(spec.head_dim, generator=draw)
            rope = kvfold.reference.rope_table(max(self.ends, default=0) + 1, spec.rope_dim)
            self.whole.append(whole)
            self.compressors.append(kvfold.Compressor(whole, state, cache, spec, ape, norm_weight, rope))

    def one_process(self, starts: Sequence[int], ends: Sequence[int]) -> None:
        """`kvfold.compress` of these tokens of each sequence."""
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        if not sum(lengths):
            return
        plan = kvfold.StepPlan.build(
            self.compressors[0].spec.ratio,
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
            max(lengths),
            state_slots=self.slots,
            cache_block_table=self.table,
            rows_per_page=ROWS_PER_PAGE,
        )
        for c, whole in zip(self.compressors, self.whole, strict=True):
            tokens = torch.cat([x[start:end] for x, start, end in zip(whole, starts, ends, strict=True)])
            weights = {"spec": c.spec, "ape": c.ape, "norm_weight": c.norm_weight, "rope": c.rope}
            kvfold.compress(tokens, plan, c.state, c.cache, **weights, backend=self.step.backend)
        assert int(plan.errors) == 0

    def own(self, index: Tensor) -> list[kvfold.Compressor]:
        """The compressors with these of the step's tokens."""
        found = []
        for c, whole in zip(self.compressors, self.whole, strict=True):
            new = torch.cat([x[start:] for x, start in zip(whole, self.step.starts, strict=True)])[index]
            tokens = tuple(part.contiguous() for part in new.chunk(2, dim=1)) if self.step.two else new
            found.append(c._replace(kv_score=tokens))
        return found

    def entries(self, cache: kvfold.EntryCache, sequence: int, windows: range) -> Tensor:
        """The bytes of these entries, field by field."""
        at = torch.tensor(windows, dtype=torch.int64)
        slots = self.table[sequence, at // ROWS_PER_PAGE].long() * ROWS_PER_PAGE + at % ROWS_PER_PAGE
        fields = read_fields(cache, slots).values()
        return torch.cat([x.contiguous().view(torch.uint8).flatten(1) for x in fields], dim=1)

    def held(self) -> list[Tensor]:
        """What a next step reads of each sequence that the step had tokens of, in each state."""
        some = [b for b, n in enumerate(self.step.lengths) if n]
        found = []
        for c in self.compressors:
            if c.state is not None:
                for b in some:
                    end = torch.tensor([self.ends[b]], dtype=torch.int32)
                    rows, positions = take_carry(c.state, self.slots[b : b + 1], end)
                    assert positions.tolist() == end.tolist(), "the history is not held"
                    found.append(read_rows(c.spec, self.ends[b], rows[0]))
        return found


def read_rows(spec: kvfold.CompressorSpec, position: int, rows: Tensor) -> Tensor:
    """Of a carry's rows those that a step from `position` reads, as integers."""
    inside, ratio = position % spec.ratio, spec.ratio
    if rows.shape[1] == 3 * spec.head_dim:
        at = [0] * (inside > 0)
    elif spec.overlap:
        at = [*range(ratio * (position >= ratio)), *range(ratio, ratio + inside), *range(2 * ratio - 1, 2 * ratio - 1 + inside)]
    else:
        at = [*range(inside)]
    return rows[at].view(torch.int16 if rows.dtype == torch.bfloat16 else torch.int32)


def check_steps(group: dist.ProcessGroup, steps: Sequence[Step]) -> int:
    """Each step cut over the group, against the same in this process alone, bit by bit. Returns the messages sent here."""
    sent = 0
    for step in steps:
        try:
            sent += _check_step(group, step)
        except Exception as error:
            raise AssertionError(f"{step}: {error}") from error
    return sent


@lru_cache(maxsize=4)
def _alone(step: Step) -> Rank:
    """The step in one process."""
    alone = Rank(step)
    alone.one_process([0] * len(step.lengths), step.starts)
    alone.one_process(step.starts, alone.ends)
    return alone


def _check_step(group: dist.ProcessGroup, step: Step) -> int:
    alone = _alone(step._replace(layout="contiguous", each=False, cuts=None, two=False))
    cp = ContextParallel(group, step.layout)
    mine = Rank(step, turned=cp.rank)
    mine.one_process([0] * len(step.lengths), step.starts)
    shards = cp.split(step.lengths, start_pos=step.start_pos, each=step.each, cuts=step.cuts)
    where = {"state_slots": mine.slots.tolist(), "cache_block_table": mine.table, "rows_per_page": ROWS_PER_PAGE}
    plan = cp.plan(shards, mine.compressors[0].spec, **where)
    own, blank = mine.own(shards.index(cp.rank)), [copy.deepcopy(c.cache) for c in mine.compressors]
    cp.compress(own, plan, backend=step.backend)
    assert int(plan.errors) == 0, "refused"
    ratio = plan.reads.ratio
    for rank in range(cp.size):
        for sequence, windows in shards.windows(rank, ratio):
            for c, reference, unwritten in zip(mine.compressors, alone.compressors, blank, strict=True):
                got = mine.entries(c.cache, sequence, windows)
                owner, cache = (alone, reference.cache) if rank == cp.rank else (mine, unwritten)
                want = owner.entries(cache, sequence, windows)
                assert torch.equal(got, want), f"entries {windows} of sequence {sequence}, which rank {rank} owns"
    cp.gather(own, plan)
    for b, (start, end) in enumerate(zip(step.starts, mine.ends, strict=True)):
        windows = range(start // ratio, end // ratio)
        for c, reference in zip(mine.compressors, alone.compressors, strict=True):
            got, want = (r.entries(x.cache, b, windows) for r, x in ((mine, c), (alone, reference)))
            assert torch.equal(got, want), f"gathered entries of sequence {b}"
    for got, want in zip(mine.held(), alone.held(), strict=True):
        assert torch.equal(got, want), "state"
    assert int(plan.errors) == 0
    return len(plan.messages)
