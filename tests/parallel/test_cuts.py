"""A step cut over ranks has the bits of one process: entries, and what the next step reads; wherever it is cut."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from support.parallel_support import ROWS_PER_PAGE, SPECS, Rank, Step, World, check_steps, drawn_cuts, every_cut

import kvfold
from kvfold.parallel import ContextParallel, Shards
from kvfold.parallel.schedule import Reads, schedule


@pytest.mark.parametrize("name", ["fold", "overlap", "rows", "wide overlap"])
def test_every_cut_in_two(world: World, name: str) -> None:
    total = 2 * SPECS[name].ratio + 2
    steps = [Step((name,), (total,), cuts=cuts) for cuts in every_cut(total, 2)]
    assert sum(world.run(2, check_steps, steps)) > len(steps) // 2, "carries were sent"


def test_every_cut_in_three(world: World) -> None:
    """Most chunks are shorter than the two windows that a carry is made of: it comes from two ranks."""
    steps = [Step(("overlap",), (9,), cuts=cuts) for cuts in every_cut(9, 3)]
    world.run(3, check_steps, steps)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_packed_sequences_cut_anywhere(world: World, layout: str, ranks: int) -> None:
    draw, steps = random.Random(ranks), []
    for name in ("fold", "overlap", "rows", "wide overlap"):
        for each in (False, True):
            lengths = tuple(draw.choice((0, 1, draw.randrange(8), draw.randrange(60))) for _ in range(4))
            start_pos = tuple(draw.randrange(25) for _ in lengths) if draw.random() < 0.5 else None
            cuts = None if each else drawn_cuts(draw, sum(lengths), ranks * (2 if layout == "zigzag" else 1))
            steps.append(Step((name,), lengths, start_pos, layout, each, cuts))
    world.run(ranks, check_steps, steps)


def by_slots(group: dist.ProcessGroup) -> tuple[bool, list[int]]:
    """The same step told by a table, and by a slot for each entry, of which one is dropped; the bytes of all pages."""
    cp, step = ContextParallel(group), Step(("overlap",), (21, 9), start_pos=(6, 0))
    shards, storages = cp.split(step.lengths, start_pos=step.starts), []
    for how in ("table", "slots"):
        mine = Rank(step)
        mine.one_process((0, 0), step.starts)
        where = {"cache_block_table": mine.table, "rows_per_page": ROWS_PER_PAGE}
        if how == "slots":
            windows = [(0, w) for w in range(1, 6)] + [(1, w) for w in range(2)]
            slots = [int(mine.table[b, w // ROWS_PER_PAGE]) * ROWS_PER_PAGE + w % ROWS_PER_PAGE for b, w in windows]
            dropped, slots[4] = slots[4], -1
            where = {"entry_slots": torch.tensor(slots)}
        errors = torch.zeros(1, dtype=torch.int32)
        plan = cp.plan(shards, SPECS["overlap"], errors=errors, **where)
        own = mine.own(shards.index(cp.rank))
        cp.compress(own, plan, backend="torch")
        cp.gather(own, plan)
        assert int(errors) == 0 and plan.errors is errors
        storages.append(own[0].cache.storage)
    size = own[0].spec.head_dim * 4
    differ = (storages[0] != storages[1])[:, : ROWS_PER_PAGE * size].reshape(-1, size).any(1).nonzero()[:, 0]
    return differ.tolist() == [dropped], plan.entry_slots.tolist()


def test_entries_by_slots(world: World) -> None:
    for only_the_dropped_one, slots in world.run(2, by_slots):
        assert only_the_dropped_one and slots[4] == -1


def test_long_sequences(world: World) -> None:
    draw = random.Random(0)
    steps = [Step(names, (2000,), layout=layout, cuts=drawn_cuts(draw, 2000, 8 if layout == "zigzag" else 4))
             for names in (("fold",), ("overlap", "indexer")) for layout in ("contiguous", "zigzag")]  # fmt: skip
    world.run(4, check_steps, steps)


def test_what_compressors_may_be(world: World) -> None:
    """Two in one message, other dtypes, records, two tensors of tokens, a state in bf16, one without a state."""
    bf16 = torch.bfloat16
    steps = [
        Step(("overlap", "indexer"), (37, 5), cuts=(0, 14, 42)),
        Step(("overlap", "indexer"), (37, 5), cuts=(0, 14, 42), dtype=bf16, two=True),
        Step(("fold",), (50,), cuts=(0, 23, 50), dtype=bf16, two=True, fmt="bf16"),
        Step(("indexer",), (37, 5), cuts=(0, 13, 42), dtype=bf16, fmt="mxfp4"),
        Step(("tokens",), (9, 4), cuts=(0, 5, 13)),
    ]
    world.run(2, check_steps, steps)


def test_kernels_are_cut_as_well(world: World) -> None:
    """The Triton backend, interpreted, by the same code."""
    steps = [Step(("fold",), (14,), cuts=(0, 3, 5, 14)), Step(("overlap", "indexer"), (13, 3), cuts=(0, 3, 9, 16))]
    world.run(3, check_steps, [step._replace(backend="triton") for step in steps])


def test_common_cuts_take_one_round() -> None:
    """All ranks send at once unless one is too short to have a carry of its own."""
    for ratio, overlap in ((128, False), (4, True)):
        for layout in ("contiguous", "zigzag"):
            for lengths in ((100_003,), (5000, 60_001, 1)):
                made = schedule(Shards.build(lengths, 4, layout=layout, each=len(lengths) == 1), Reads(ratio, overlap, True))
                assert made.rounds == 1
    assert schedule(Shards.build((1024,), 4), Reads(128, False, True)).rounds == 0, "cuts on windows of ratio 128 need nothing"
    assert schedule(Shards.build((20,), 4, cuts=(0, 8, 9, 10, 20)), Reads(128, False, True)).rounds == 3, "a chain"
    short = schedule(Shards.build((400,), 4, cuts=(0, 200, 201, 202, 400)), Reads(128, False, True))
    assert [(m.round, m.source, m.target) for m in short.messages] == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fold", "overlap"])
def test_on_a_gpu_nothing_waits(name: str) -> None:
    """A plan, a step that goes on from an earlier one, and what training is told: a copy from the host would wait."""
    spec, device = SPECS[name], torch.device("cuda", 0)
    cp = ContextParallel()
    shards, whole = cp.split([30, 9], start_pos=[5, 0]), cp.split([30, 9])
    state = kvfold.FoldState.allocate(spec, 2, 8, device=device)
    cache = kvfold.EntryCache.allocate("fp32", 2, 16, spec, device=device)
    ape, weight = torch.zeros(spec.ratio, spec.channels, device=device), torch.ones(spec.head_dim, device=device)
    rope = kvfold.reference.rope_table(64, spec.rope_dim).to(device)
    layer = [(torch.zeros(39, 2 * spec.channels, device=device), state, cache, spec, ape, weight, rope)]
    table = torch.tensor([[0], [1]], dtype=torch.int32, device=device)

    def step() -> None:
        plan = cp.plan(shards, spec, cache_block_table=table, rows_per_page=16)
        cp.compress(layer, plan)
        cp.gather(layer, plan)
        cp.packing(whole, spec, device=device)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
