"""Plans for paged raw state, the index from entries to items, and the mistakes that the host can see."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.helpers import SPECS, Backend, make_tokens
from support.window_support import WindowEngine

import kvfold
from kvfold import FoldState, StepPlan
from kvfold.backend_torch.plan import update_torch
from kvfold.backend_triton.launch import update_on_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = SPECS["indexer"]


def int32(values: Any, device: str = DEVICE) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def tables(batch: int, columns: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return int32([[7] * columns] * batch), int32([[9] * (columns + 1)] * batch)


def test_a_small_plan_by_hand() -> None:
    # Ratio 4. Sequence 0 adds tokens 2..8: ends windows 0 and 1, touches 2. Sequence 1 is absent. Sequence 2 adds 7..7.
    both = tables(3)
    plan = StepPlan.build(4, int32([2, 0, 7]), int32([0, 7, 7, 8]), 8, block_tables=both, page_size=5)
    assert plan.items[:4, :7].tolist() == [
        [0, 2, 9, 0, 0, 0, 0],
        [1, 2, 9, 0, 0, 1, 0],
        [2, 2, 9, 0, 0, -1, 0],
        [1, 7, 8, 7, 2, 2, 2],
    ]
    assert plan.num_items.tolist() == [4] and plan.cu_entries.tolist() == [0, 2, 2, 3] and plan.errors.tolist() == [0]
    assert plan.entry_items.dtype == torch.int32
    assert plan.entry_items.tolist() == [0, 1, 3] + [-1] * (plan.entry_capacity - 3)
    assert plan.state_slots is None and plan.page_size == 5
    assert plan.block_tables is not None
    assert plan.block_tables[0] is both[0] and plan.block_tables[1] is both[1]  # the caller's tensors
    plan.update(int32([0, 3, 0]), int32([0, 3, 4, 4]))  # fewer entries: the former ones are forgotten
    assert plan.entry_items.tolist() == [1] + [-1] * (plan.entry_capacity - 1)
    plan.update(int32([0, -3, 0]), int32([0, 9, 12, 11]))  # too many, a negative start, a negative length
    assert plan.num_items.tolist() == [0] and plan.errors.tolist() == [3]
    assert set(plan.entry_items.tolist()) == {-1}


def test_entry_items_with_state_slots() -> None:
    slots = torch.tensor([0, 1], device=DEVICE)  # fewer than entries
    plan = StepPlan.build(4, int32([2, 0, 3]), int32([0, 3, 7, 8]), 8, state_slots=int32([5, -1, 6]), entry_slots=slots)
    assert plan.items[: int(plan.num_items), 5].tolist() == [0, -1, 1]
    assert plan.entry_items.tolist() == [0, 2]
    assert plan.block_tables is None and plan.page_size is None
    plan.update(int32([0, 0, 0]), int32([0, 8, 8, 16]))
    assert plan.items[: int(plan.num_items), 5].tolist() == [0, 1, 2, 3]
    assert plan.entry_items.tolist() == [0, 1]


def test_no_sequences() -> None:
    plan = StepPlan.build(4, int32([]), int32([0]), 8, block_tables=(int32([]).view(0, 2), int32([]).view(0, 0)), page_size=1)
    assert plan.num_items.tolist() == [0] and plan.entry_items.numel() == 0


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_kernel_says_what_the_definition_says(seed: int, paged: bool) -> None:
    """`items` and `entry_items` of random batches, with all that is refused, and with too few places for entries."""
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("conftest switches the interpreter on where there is no GPU")
    draw = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, n: int) -> list[int]:
        return torch.randint(low, high, (n,), generator=draw).tolist()

    ratio, batch, most = [(4, 150, 9), (128, 70, 400), (1, 3, 200)][seed % 3]
    lengths = [0 if skip == 0 else n for skip, n in zip(ints(0, 4, batch), ints(1, most + 1, batch), strict=True)]
    starts = ints(0, 5 * ratio, batch)
    if seed >= 3:
        starts[ints(0, batch, 1)[0]] = -7
        lengths[ints(0, batch, 1)[0]] = most + 1
    cu_seqlens = int32([0, *torch.tensor(lengths).cumsum(0).tolist()])
    where = {"block_tables": tables(batch), "page_size": 4} if paged else {"state_slots": int32(ints(-1, 9, batch))}
    places = torch.zeros(sum(lengths) // ratio // 2, dtype=torch.int64, device=DEVICE) if seed % 2 else None
    plan = StepPlan.build(ratio, int32(starts), cu_seqlens, most, entry_slots=places, max_tokens=sum(lengths), **where)
    seen = []
    for update in (lambda *args: update_torch(plan, *args), lambda *args: update_on_gpu(plan, *args)):
        plan.errors.zero_()
        for tensor in (plan.items, plan.num_items, plan.cu_entries[1:], plan.entry_items):
            tensor.fill_(-99)
        update(plan.start_pos.clone(), plan.cu_seqlens.clone())
        found = (plan.items[: int(plan.num_items), :7], plan.num_items, plan.cu_entries, plan.entry_items, plan.errors)
        seen.append([tensor.clone() for tensor in found])
    for want, got in zip(*seen, strict=True):
        assert torch.equal(want, got)
    for entry, item in enumerate(seen[1][3].tolist()):
        assert item == -1 or seen[1][0][item, 5] == entry


def raises(name: str) -> Any:
    return pytest.raises((ValueError, TypeError), match=rf"\b{name}\b")


ONE = {"block_tables": tables(2), "page_size": 4}
BAD_PLANS: list[tuple[str, dict[str, Any]]] = [
    ("state_slots", {"block_tables": None, "page_size": None}),  # neither
    ("block_tables", {"block_tables": None, "page_size": None}),
    ("state_slots", {"state_slots": int32([0, 1])}),  # both
    ("block_tables", {"state_slots": int32([0, 1])}),
    ("page_size", {"page_size": None}),
    ("page_size", {"page_size": 0}),
    ("page_size", {"page_size": -4}),
    ("page_size", {"page_size": 4.0}),
    ("page_size", {"page_size": True}),
    ("page_size", {"block_tables": None, "state_slots": int32([0, 1])}),
    ("block_tables", {"block_tables": ONE["block_tables"][0]}),
    ("block_tables", {"block_tables": ONE["block_tables"][:1]}),
    ("block_tables", {"block_tables": (*ONE["block_tables"], None)}),
    ("block_tables", {"block_tables": (ONE["block_tables"][0], None)}),
    ("block_tables", {"block_tables": (tables(3)[0], tables(2)[1])}),
    ("block_tables", {"block_tables": (tables(2)[0], tables(2)[1][0])}),
    ("block_tables", {"block_tables": (tables(2)[0].short(), tables(2)[1])}),
    ("block_tables", {"block_tables": (tables(2)[0], tables(2)[1][:, ::2])}),
    ("block_tables", {"block_tables": (tables(2)[0].to("meta"), tables(2)[1])}),
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", {"max_new_tokens": -1}),
    ("max_new_tokens", {"max_new_tokens": 1 << 31}),
    ("max_new_tokens", {"max_new_tokens": (1 << 31) + 4}),
    ("max_new_tokens", {"max_new_tokens": 4.0}),
]


@pytest.mark.parametrize("at", range(len(BAD_PLANS)), ids=lambda at: f"{BAD_PLANS[at][0]}-{at}")
def test_bad_plans(at: int) -> None:
    good = {"ratio": 4, "start_pos": int32([0, 0]), "cu_seqlens": int32([0, 4, 8]), "max_new_tokens": 4, **ONE}
    StepPlan.build(**good)
    name, change = BAD_PLANS[at]
    with raises(name):
        StepPlan.build(**{**good, **change})


def test_what_a_window_state_is() -> None:
    state = kvfold.WindowState.allocate(SPEC, 5, 3, dtype=torch.bfloat16)
    assert state.kv.shape == state.score.shape == (5, 3, 256)
    assert (state.page_size, state.channels, state.num_pages, state.num_score_pages) == (3, 256, 5, 5)
    assert (state.dtype, state.device) == (torch.bfloat16, torch.device("cpu"))
    pool = torch.zeros(4, 8, 1024)
    state = kvfold.WindowState(pool[..., :512], pool[..., 512:])
    assert state.kv.data_ptr() == pool.data_ptr() and state.dtype == torch.float32 and state.channels == 512
    # Pools of unequal size, pages and rows apart, pages inside rows, and empty ones.
    kvfold.WindowState(torch.zeros(4, 8, 16), torch.zeros(9, 8, 16))
    kvfold.WindowState(torch.zeros(4, 20, 40)[:, :8, 4:20], torch.zeros(9, 8, 16)[::2])
    kvfold.WindowState(torch.zeros(8, 4, 16).transpose(0, 1), torch.zeros(4, 8, 16))
    assert kvfold.WindowState.allocate(SPEC, 0, 1).num_pages == 0


def test_bad_window_states() -> None:
    good = torch.zeros(4, 8, 16)
    for name, call in (
        ("kv", lambda: kvfold.WindowState(None, good)),
        ("kv", lambda: kvfold.WindowState(good.half(), good.half())),
        ("kv", lambda: kvfold.WindowState(good[0], good[0])),
        ("kv", lambda: kvfold.WindowState(torch.zeros(4, 0, 16), torch.zeros(4, 0, 16))),
        ("kv", lambda: kvfold.WindowState(torch.zeros(4, 8, 0), torch.zeros(4, 8, 0))),
        ("kv", lambda: kvfold.WindowState(torch.zeros(4, 8, 32)[..., ::2], good)),
        ("kv", lambda: kvfold.WindowState(good[:1].expand(4, -1, -1), good)),  # pages overlap
        ("kv", lambda: kvfold.WindowState(torch.zeros(600).as_strided((4, 8, 16), (128, 8, 1)), good)),  # rows overlap
        ("score", lambda: kvfold.WindowState(good, [])),
        ("score", lambda: kvfold.WindowState(good, good.bfloat16())),
        ("score", lambda: kvfold.WindowState(good, torch.zeros(4, 7, 16))),
        ("score", lambda: kvfold.WindowState(good, torch.zeros(4, 8, 17))),
        ("score", lambda: kvfold.WindowState(good, good.to("meta"))),
        ("score", lambda: kvfold.WindowState(good, good.transpose(1, 2).contiguous().transpose(1, 2))),
        ("spec", lambda: kvfold.WindowState.allocate("csa", 4, 8)),
        ("num_pages", lambda: kvfold.WindowState.allocate(SPEC, -1, 8)),
        ("page_size", lambda: kvfold.WindowState.allocate(SPEC, 4, 0)),
        ("page_size", lambda: kvfold.WindowState.allocate(SPEC, 4, 8.0)),
        ("dtype", lambda: kvfold.WindowState.allocate(SPEC, 4, 8, dtype=torch.float16)),
    ):
        with raises(name):
            call()


def test_bad_calls(backend: Backend) -> None:
    """A state and a plan that do not belong together; nothing is written."""
    engine = WindowEngine(SPEC, backend, num_sequences=1, length=8, page_size=4)
    tokens, device = make_tokens(SPEC, 8, seed=80), backend.device
    plan = engine.step([(0, 0, tokens)]).plan
    engine.state.kv.fill_(torch.nan)
    before = engine.snapshot()
    slots = torch.tensor([0, 1], device=device)
    start, ends = torch.zeros(1, dtype=torch.int32, device=device), torch.tensor([0, 8], dtype=torch.int32, device=device)
    fold_plan = StepPlan.build(4, start, ends, 8, state_slots=start, entry_slots=slots)
    other_pages = StepPlan.build(4, start, ends, 8, block_tables=plan.block_tables, page_size=8, entry_slots=slots)
    state = engine.state
    for name, kind, change in (
        ("plan", state, fold_plan),
        ("plan", state, other_pages),
        ("plan", FoldState.allocate(SPEC, 1, 8, device=device), plan),
        ("state", kvfold.WindowState.allocate(SPECS["csa"], 4, 4, device=device), plan),
        ("state", kvfold.WindowState.allocate(SPEC, 4, 4, device="meta"), plan),
        ("state", state.kv, plan),
    ):
        engine.state = kind
        with raises(name):
            engine.compress(tokens.to(device), change)
    engine.state = state
    for was, now in zip(before, engine.snapshot(), strict=True):
        assert torch.equal(was, now)
