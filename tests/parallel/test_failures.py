"""What goes wrong is said, by rank or by argument, and nothing half-written is taken for done."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support.parallel_support import ROWS_PER_PAGE, SIZE, SPECS, Rank, Step, World

import kvfold
from kvfold.parallel import ContextParallel, RankError, Shards
from kvfold.parallel.transport import Transport


def raised(call) -> str:
    try:
        call()
    except RankError as error:
        return str(error)
    return ""


def without_rank_0(_: dist.ProcessGroup) -> tuple[str, str, bool, float]:
    """Rank 0 never calls; rank 1 goes on from its tokens. A group of its own, as gloo closes one that failed."""
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    if dist.get_rank() != 1:
        return "", "", True, 0.0
    mine = Rank(Step(("fold",), (20,), cuts=(0, 5, 20)))
    exchange, split = (ContextParallel(group, timeout=timedelta(seconds=1)) for group in groups)
    shards = Shards.build((20,), 2, cuts=(0, 5, 20))
    own = mine.own(shards.index(1))
    exchange._agreed.add(repr([(c.spec, c.state.rows.dtype, c.cache.format) for c in own]))  # rank 0 was there then
    before = own[0].cache.storage.clone(), own[0].state.positions.clone()
    plan = exchange.plan(shards, own[0].spec, cache_block_table=mine.table, rows_per_page=ROWS_PER_PAGE)
    start = time.monotonic()
    first = raised(lambda: exchange.compress(own, plan))
    second = raised(lambda: split.split((20,)))
    unwritten = torch.equal(own[0].cache.storage, before[0]) and torch.equal(own[0].state.positions, before[1])
    return first, second, unwritten, time.monotonic() - start


def test_a_rank_that_stops_is_named(world: World) -> None:
    exchange, split, unwritten, seconds = world.run(SIZE, without_rank_0)[1]
    assert exchange.startswith("rank 0 did not answer, for the carries of round 0: ")
    assert split.startswith("rank 0 did not answer, for the arguments of all ranks: ")
    assert unwritten and seconds < 30


def other_arguments(group: dist.ProcessGroup) -> list[str]:
    cp = ContextParallel(group)
    one = int(cp.rank == 1)
    found = [
        raised(lambda: cp.split((20 + one,))),
        raised(lambda: cp.split((20,), start_pos=(one,))),
        raised(lambda: cp.split((20,), cuts=(0, 5 + one, 20))),
        raised(lambda: ContextParallel(group, "zigzag" if one else "contiguous").split((20,))),
    ]
    mine = Rank(Step(("overlap", "indexer"), (20,)))
    shards = cp.split((20,))
    own = mine.own(shards.index(cp.rank))
    plan = cp.plan(shards, own[0].spec, cache_block_table=mine.table, rows_per_page=ROWS_PER_PAGE)
    return [*found, raised(lambda: cp.compress(own[: 1 + one], plan))]


def test_ranks_that_do_not_agree_are_told_on_what(world: World) -> None:
    for rank, found in enumerate(world.run(2, other_arguments)):
        for name, text in zip(("lengths", "start_pos", "cuts", "layout", "compressors"), found, strict=True):
            assert text.startswith(f"{name} must be the same on all ranks, got "), (name, text)
            assert text.endswith(f" on rank {rank}, not so on [{1 - rank}]")


def without_history(group: dist.ProcessGroup) -> tuple[int, int, bool, int]:
    """The state has nothing of the tokens before the step, which rank 0 goes on from; they end on rank 1."""
    cp = ContextParallel(group)
    mine = Rank(Step(("overlap",), (20,), start_pos=(6,)))
    shards = cp.split((20,), start_pos=(6,), cuts=(0, 1, 20))
    own = mine.own(shards.index(cp.rank))
    plan = cp.plan(shards, own[0].spec, cache_block_table=mine.table, rows_per_page=ROWS_PER_PAGE)
    before = own[0].cache.storage.clone()
    cp.compress(own, plan)
    alone, unwritten = int(plan.errors), torch.equal(own[0].cache.storage, before)
    cp.gather(own, plan)
    return alone, int(plan.errors), unwritten, int((own[0].state.positions >= 0).sum())


def test_a_refusal_reaches_all_that_goes_on_from_it(world: World) -> None:
    for alone, after, unwritten, _ in world.run(2, without_history):
        assert alone > 0 and after > 0 and unwritten


def test_wrong_arguments_are_named() -> None:
    cp, spec = ContextParallel(), SPECS["overlap"]
    shards, state = Shards.build((9,), 1), kvfold.FoldState.allocate(spec, 1, 1)
    plan = cp.plan(shards, spec, device="cpu")
    good = kvfold.Compressor(torch.zeros(9, 64), state, None, spec, torch.zeros(4, 32), None, None)
    windows = kvfold.WindowState(torch.zeros(1, 4, 32), torch.zeros(1, 4, 32))
    calls = {
        "group": lambda: ContextParallel("all"),
        "layout": lambda: ContextParallel(layout="ring"),
        "timeout": lambda: ContextParallel(timeout=3),
        "lengths": lambda: cp.split(9),
        r"lengths\[1\]": lambda: cp.split((1, -1)),
        "start_pos": lambda: cp.split((9,), start_pos=(1, 2)),
        "cuts": lambda: cp.split((9,), cuts=(0, 8)),
        "shards": lambda: cp.plan(Shards.build((9,), 2), spec),
        "spec": lambda: cp.plan(shards, 4),
        "state_slots": lambda: cp.plan(shards, spec, state_slots=(0, 1)),
        "entry_slots": lambda: cp.plan(shards, spec, entry_slots=torch.zeros(3, dtype=torch.int64)),
        "cache_block_table": lambda: cp.plan(
            shards, spec, cache_block_table=torch.zeros(1, 1, dtype=torch.int32), rows_per_page=1
        ),
        "rows_per_page": lambda: cp.plan(shards, spec, cache_block_table=torch.zeros(1, 1, dtype=torch.int32)),
        "errors": lambda: cp.plan(shards, spec, errors=torch.zeros(2, dtype=torch.int32)),
        "plan": lambda: cp.compress([good], shards),
        "compressors": lambda: cp.compress(good, plan),
        r"compressors\[0\]: spec": lambda: cp.compress([good._replace(spec=SPECS["fold"])], plan),
        r"compressors\[0\]: kv_score": lambda: cp.compress([good._replace(kv_score=torch.zeros(8, 64))], plan),
        r"compressors\[0\]: kv_score(?= must be a torch.Tensor)": lambda: cp.compress([good._replace(kv_score=None)], plan),
        r"compressors\[0\]: kv_score(?= must have shape)": lambda: cp.compress([good._replace(kv_score=torch.zeros(9))], plan),
        r"compressors\[1\]: kv_score\[1\]": lambda: cp.compress([good, good._replace(kv_score=(torch.zeros(9, 32), 1))], plan),
        r"compressors\[1\]: state": lambda: cp.compress([good, good._replace(state=windows)], plan),
        r"compressors\[0\]: snapshots": lambda: cp.compress(
            [good._replace(snapshots=kvfold.Snapshots.allocate(spec, 1, 4))], plan
        ),
    }
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must"):
            call()
    cp.compress([good], plan)
    assert int(plan.errors) == 0


def test_nothing_of_a_former_owner_is_left() -> None:
    """Also where the next step reads nothing, as one that were rewound would find the rows of another sequence."""
    cp, spec = ContextParallel(), SPECS["fold"]
    for length in (2 * spec.ratio, 2 * spec.ratio + 1):
        mine = Rank(Step(("fold",), (length,)))
        mine.one_process([0], [length - 1])
        (own,) = mine.own(torch.arange(length))
        assert (own.state.positions >= 0).sum() > 1
        plan = cp.plan(cp.split((length,)), spec, cache_block_table=mine.table, rows_per_page=ROWS_PER_PAGE)
        cp.compress([own], plan)
        assert own.state.positions.max() == (-1 if length % spec.ratio == 0 else length - 1)
        assert (own.state.positions >= 0).sum() == length % spec.ratio


def test_a_mesh_is_a_group(world: World) -> None:
    assert world.run(SIZE, over_a_mesh) == [(rank % 2, 2) for rank in range(SIZE)]


def over_a_mesh(_: dist.ProcessGroup) -> tuple[int, int]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    with pytest.raises(ValueError, match=r"^group must be a mesh of one dimension"):
        ContextParallel(mesh)
    cp = ContextParallel(mesh["cp"])
    cp.split((20,))
    return cp.rank, cp.size


def test_one_process_needs_no_group() -> None:
    transport = Transport(None, None)
    transport.agree(lengths=(1,))
    assert torch.equal(transport.gather(torch.arange(3), "numbers"), torch.arange(3)[None])
