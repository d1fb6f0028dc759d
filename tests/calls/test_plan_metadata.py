"""Plans from an engine's metadata: a slot per token, null pages, reserved places, int64 and strided numbers, total lengths."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.helpers import Backend

import kvfold
from kvfold import StepPlan
from kvfold.arguments.checks import check_numbers
from kvfold.backend_torch.plan import update_torch
from kvfold.backend_triton.kernels.plan_metadata import SCAN_METADATA
from kvfold.backend_triton.launch import update_on_gpu
from kvfold.contract import INT32_MAX, MOST_POSITIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NOWHERE = "nowhere"  # of an entry that no output has a place for


class Said(NamedTuple):
    """What a plan says of a step, in plain numbers."""

    starts: list[int]
    items: list[tuple[int, ...]]
    counts: list[int]
    slots: dict[int, int]
    errors: int


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def model(
    ratio: int, starts: list[int], offsets: list[int], most: int, most_tokens: int, capacity: int, given: dict[str, Any]
) -> Said:
    """The rules of `StepPlan.update`, one sequence and one entry after the other."""
    totals, slots = given.get("totals", False), given.get("state_slots")
    items, counts, found, errors = [], [], {}, 0
    for b, start in enumerate(starts):
        length, token = offsets[b + 1] - offsets[b], offsets[b]
        start -= length if totals else 0
        slot = b if slots is None else slots[b]
        if slot == given.get("null_slot") or slot == -1 or length == 0:
            counts.append(0)
            continue
        first_row = max(offsets[0], 0)
        fits = start >= 0 and start + length <= MOST_POSITIONS and 0 < length <= most and slot >= 0
        if not fits or not first_row <= token <= INT32_MAX or token - first_row + length > most_tokens:
            errors += 1
            counts.append(0)
            continue
        end, before = start + length, sum(counts)
        first, made = start // ratio, (start + length) // ratio - start // ratio
        counts.append(made)
        place, rows = before, given.get("cu_rows")
        if rows is not None:
            room = max(before, *rows[:b], 0) <= rows[b] and rows[b] + made <= min(rows[b + 1], MOST_POSITIONS)
            place = rows[b] if room else MOST_POSITIONS
        for i, window in enumerate(range(first, (end - 1) // ratio + 1)):
            entry = place + i if (window + 1) * ratio <= end else -1
            items.append((window, start, end, token, min(slot, INT32_MAX), entry, b))
            if 0 <= entry < capacity:
                target, wrong = slot_of(given, b, window, entry, token + (window + 1) * ratio - 1 - start)
                found[entry] = target
                errors += wrong
    return Said(starts, items, counts, found, errors)


def slot_of(given: dict[str, Any], b: int, window: int, entry: int, last_token: int) -> tuple[int, bool]:
    """The cache slot of an entry, and whether nobody has one for it."""
    if given.get("token_slots") is not None:
        if last_token >= len(given["token_slots"]):
            return -1, True
        slot = given["token_slots"][last_token]
        return (-1 if slot < 0 or slot == given.get("no_slot", -1) else slot), False
    if given.get("entry_slots") is not None:
        return given["entry_slots"][entry], False
    if given.get("cache_block_table") is None:
        return -1, False
    row, size = given["cache_block_table"][b], given["rows_per_page"]
    if window // size >= len(row) or (row[window // size] < -1 and row[window // size] != given.get("null_page")):
        return -1, True
    page = row[window // size]
    return (-1 if page in (-1, given.get("null_page")) else min(page, INT32_MAX) * size + window % size), False


def laid(values: Any, how: str) -> torch.Tensor:
    """A tensor of these numbers: `int32` or `int64`, and `apart` with others between rows, or between all of a vector."""
    dtype = torch.int64 if "int64" in how else torch.int32
    made = torch.tensor(values, dtype=dtype, device=DEVICE)
    if "apart" not in how:
        return made
    wide = torch.full((*made.shape[:1], made.shape[1] + 3 if made.dim() == 2 else 3), -77, dtype=dtype, device=DEVICE)
    view = wide[:, 1 : 1 + made.shape[1]] if made.dim() == 2 else wide[:, 1]
    view.copy_(made)
    return view


def said(plan: StepPlan) -> Said:
    used, counts = int(plan.num_items), plan.cu_entries.diff().tolist()
    items = [tuple(row) for row in plan.items[:used, :7].tolist()]
    slots = {} if plan.entry_slots is None else plan.entry_slots.tolist()
    made = [item[5] for item in items if 0 <= item[5] < plan.entry_capacity]
    index = plan.entry_items.tolist()
    assert index[: sum(counts)] == [i for i, item in enumerate(items) if item[5] != -1][: plan.entry_capacity]
    assert set(index[sum(counts) :]) <= {-1}
    return Said(plan.start_pos.tolist(), items, counts, {e: slots[e] for e in made} if slots else {}, int(plan.errors))


@pytest.mark.parametrize("seed", range(41))
def test_random_steps_are_what_a_slow_model_says(seed: int) -> None:
    """A plan and a stream of steps, on both backends, with everything that metadata can have and everything that is refused."""
    draw = random.Random(seed)
    ratio, batch, most = draw.choice([(4, 37, 9), (2, 40, 3), (1, 5, 4), (128, 20, 700), (4, 1, 300)])
    if seed == 40:  # more sequences than a program counts at a time
        ratio, batch, most = 4, SCAN_METADATA + 37, 9
    source = draw.choice(["token_slots", "entry_slots", "cache_block_table", None])
    hows = {name: draw.choice(["int32", "int64", "int32 apart", "int64 apart"]) for name in (
        "start", "cu_seqlens", "state_slots", "token_slots", "entry_slots", "cache_block_table", "cu_rows")}  # fmt: skip
    wrong, totals, reserved = draw.random() < 0.5, draw.random() < 0.5, draw.random() < 0.5
    paged, room = draw.random() < 0.4, draw.choice([batch * most, batch * most // 2])
    given: dict[str, Any] = {}
    if not paged and draw.random() < 0.5:
        given["null_slot"] = 0
    if source == "cache_block_table":
        given |= {"rows_per_page": draw.choice([1, 3]), **({"null_page": 0} if draw.random() < 0.5 else {})}
    elif source == "token_slots":
        given["no_slot"] = draw.choice([0, -1])
    count = draw.choice([room, room // 2])
    plan, tensors = None, {}

    def step() -> tuple[list[int], list[int], dict[str, Any]]:
        lengths = [draw.choice([0, 1, draw.randint(1, most)]) for _ in range(batch)]
        while sum(lengths) > room:
            lengths[draw.randrange(batch)] = 0
        first = draw.choice([0, 0, 7, 1000])
        offsets = [first + sum(lengths[:b]) for b in range(batch + 1)]
        starts = [draw.randint(0, 5 * ratio) for _ in range(batch)]
        now: dict[str, Any] = {}
        if not paged:
            now["state_slots"] = [draw.choice([-1, 0, b, b]) for b in range(batch)]
        if source == "cache_block_table":
            now[source] = [[draw.choice([-1, 0, draw.randint(1, 60)]) for _ in range(6)] for _ in range(batch)]
        elif source == "token_slots":
            now[source] = [draw.choice([-1, 0, draw.randint(1, 900)]) for _ in range(count + first)]
        elif source == "entry_slots":
            now[source] = [draw.choice([-1, draw.randint(0, 900)]) for _ in range(count)]
        if reserved:
            gaps = [n // ratio + draw.choice([0, 1, 2]) for n in lengths]
            now["cu_rows"] = [draw.choice([0, 3]) + sum(gaps[:b]) for b in range(batch + 1)]
            now["cu_rows"] = sorted(now["cu_rows"])
        if wrong:
            spoil(draw, hows, lengths, starts, offsets, now, ratio, most)
        starts = [x + (offsets[b + 1] - offsets[b]) * totals for b, x in enumerate(starts)]
        limit = 2**63 - 1 if "int64" in hows["start"] else INT32_MAX
        return [max(min(x, limit), -limit) for x in starts], offsets, now

    for _ in range(4 if seed < 40 else 2):
        starts, offsets, now = step()
        if source == "token_slots" and plan is not None:  # of the length that the plan was built with
            have = len(tensors["token_slots"])
            now[source] = (now[source] + [-1] * have)[:have]
        made = {name: laid(value, hows[name]) for name, value in now.items()}
        lengths = {"seq_lens" if totals else "start_pos": laid(starts, hows["start"])}
        cu_seqlens = laid(offsets, hows["cu_seqlens"])
        if plan is None:
            tensors = made
            where = {"block_tables": (int32([[1]] * batch),) * 2, "page_size": 4} if paged else {}
            bound = {"max_rows": batch * (most // ratio + 3) + 3} if reserved and source != "entry_slots" else {}
            plan = StepPlan.build(
                ratio, lengths.get("start_pos"), cu_seqlens, most, seq_lens=lengths.get("seq_lens"), max_tokens=room, **where,
                **made, **given, **bound,
            )  # fmt: skip
        for name, tensor in made.items():
            tensors[name].copy_(tensor)
        want = model(ratio, starts, offsets, most, plan.max_tokens, plan.entry_capacity, given | now | {"totals": totals})
        for update in (update_torch, update_on_gpu):
            plan.errors.zero_()
            plan.items.fill_(-99)
            update(plan, *lengths.values(), cu_seqlens, totals)
            got = said(plan)
            assert got.items == want.items and got.counts == want.counts, update
            assert got.errors == want.errors, update
            assert source is None or got.slots == want.slots, update
            clamped = [
                max(min(x - (offsets[b + 1] - offsets[b]) * totals, INT32_MAX), -INT32_MAX - 1) for b, x in enumerate(starts)
            ]
            assert got.starts == clamped


def spoil(draw, hows, lengths, starts, offsets, now, ratio, most) -> None:
    """Puts in some of what cannot be."""
    batch = len(starts)
    starts[draw.randrange(batch)] = draw.choice([-7, MOST_POSITIONS - 3, INT32_MAX])
    if "int64" in hows["start"]:
        starts[draw.randrange(batch)] = draw.choice([2**31, 2**40, 2**62, -(2**40), 2**32 + 5])
    at = draw.randrange(batch)
    offsets[at + 1 :] = [x + draw.choice([most, -3]) for x in offsets[at + 1 :]]
    if "int64" in hows["cu_seqlens"] and draw.random() < 0.5:
        offsets[-1] = draw.choice([2**31 + 3, 2**40, -(2**35), offsets[-2] + 2**32 + 1])
    if "state_slots" in now:
        now["state_slots"][draw.randrange(batch)] = draw.choice([-7, INT32_MAX])
        if "int64" in hows["state_slots"]:
            now["state_slots"][draw.randrange(batch)] = draw.choice([2**31, 2**32, -(2**40), 2**33 + 1])
    if "cache_block_table" in now:
        now["cache_block_table"][draw.randrange(batch)][0] = draw.choice([-2, INT32_MAX])
        if "int64" in hows["cache_block_table"]:
            now["cache_block_table"][draw.randrange(batch)][1] = draw.choice([2**32, 2**62, -(2**32)])
    if "token_slots" in now and "int64" in hows["token_slots"]:
        now["token_slots"][: len(now["token_slots"]) // 2] = [2**32, 2**40] * (len(now["token_slots"]) // 4)
    if "cu_rows" in now:
        rows = now["cu_rows"]
        rows[draw.randrange(batch)] += draw.choice([1, -5])
        if "int64" in hows["cu_rows"]:
            rows[draw.randrange(batch)] = draw.choice([2**31, 2**33, -(2**33), 2**62])


def test_what_an_engine_has_is_taken_by_name() -> None:
    """A decode slice behind prompts, total lengths, one count of errors for several plans."""
    errors = torch.full((1,), 5, dtype=torch.int32, device=DEVICE)
    for bound in (10, 2, None):
        plan = StepPlan.build(
            4, int32([7, 3]), int32([8, 9, 10]), 1, max_tokens=bound, state_slots=int32([0, 1]), errors=errors,
            token_slots=torch.arange(100, 110, device=DEVICE),
        )  # fmt: skip
        assert plan.items[: int(plan.num_items), :7].tolist() == [[1, 7, 8, 8, 0, 0, 0], [0, 3, 4, 9, 1, 1, 1]]
        assert plan.entry_slots[:2].tolist() == [108, 109] and plan.errors is errors and int(errors) == 5
    plan.update(int32([7, -3]), int32([8, 9, 10]))
    assert int(errors) == 6
    plan.update(seq_lens=torch.tensor([9, 5], device=DEVICE), cu_seqlens=int32([8, 9, 10]))
    assert plan.start_pos.tolist() == [8, 4] and plan.start_pos.dtype == torch.int32 and int(errors) == 6
    same = StepPlan.build(4, None, int32([8, 9, 10]), 1, seq_lens=int32([9, 5]), state_slots=int32([0, 1]))
    assert same.start_pos.tolist() == [8, 4] and torch.equal(same.items[:, :7], plan.items[:, :7])


def test_places_of_entries() -> None:
    """Reserved places: entry i of sequence b is number cu_rows[b] + i; one without room is refused, the others are not."""
    slots = torch.arange(3, device=DEVICE)
    rows = int32([1, 4, 6, 9])
    plan = StepPlan.build(4, int32([0, 3, 0]), int32([0, 8, 9, 17]), 8, state_slots=slots, cu_rows=rows, max_rows=9)
    entries = [item[5] for item in plan.items[: int(plan.num_items)].tolist()]
    assert entries == [1, 2, 4, 6, 7] and plan.cu_entries.tolist() == [0, 2, 3, 5]
    assert plan.entry_capacity == 9 and plan.entry_items[:6].tolist() == [0, 1, 2, 3, 4, -1]
    rows.copy_(int32([1, 4, 6, 7]))  # no room for two
    plan.update(int32([0, 3, 0]), int32([0, 8, 9, 17]))
    assert [item[5] for item in plan.items[: int(plan.num_items)].tolist()] == [1, 2, 4, MOST_POSITIONS, MOST_POSITIONS + 1]


@pytest.mark.parametrize("between", [1, 3, 40, SCAN_METADATA + 20])
def test_places_that_go_back(between: int) -> None:
    """Behind sequences that end nothing, a place that an earlier sequence has is refused, and not given twice."""
    batch = between + 2
    rows = int32([2, *[10] * between, 4, 8])
    offsets = int32([0, *[4] * (between + 1), 8])
    slots = torch.arange(batch, device=DEVICE)
    plan = StepPlan.build(1, int32([0] * batch), offsets, 4, state_slots=slots, cu_rows=rows, max_rows=12)
    entries = [item[5] for item in plan.items[: int(plan.num_items)].tolist()]
    assert entries == [2, 3, 4, 5, *range(MOST_POSITIONS, MOST_POSITIONS + 4)]


GOOD = {
    "ratio": 4, "start_pos": int32([0, 0]), "cu_seqlens": int32([0, 4, 8]), "max_new_tokens": 4, "state_slots": int32([0, 1]),
}  # fmt: skip
PAGED = {"state_slots": None, "block_tables": (int32([[1, 2], [3, 4]]),) * 2, "page_size": 4}
TOKENS = {"token_slots": torch.arange(8, device=DEVICE)}
BAD: list[tuple[str, dict[str, Any]]] = [
    ("start_pos", {"seq_lens": int32([4, 4])}),  # both
    ("seq_lens", {"start_pos": None}),  # neither
    ("seq_lens", {"start_pos": None, "seq_lens": int32([4, 4]).float()}),
    ("cu_seqlens", {"cu_seqlens": int32([0, 4, 8]).short()}),
    ("cu_seqlens", {"cu_seqlens": None}),
    ("token_slots", {"token_slots": [1, 2]}),
    ("token_slots", {"token_slots": int32([[1], [2]])}),
    ("token_slots", {"token_slots": int32([1, 2]).float()}),
    ("token_slots", {**TOKENS, "entry_slots": torch.arange(2, device=DEVICE)}),
    ("token_slots", {**TOKENS, "cache_block_table": int32([[1], [2]]), "rows_per_page": 4}),
    ("no_slot", {**TOKENS, "no_slot": 1}),
    ("no_slot", {**TOKENS, "no_slot": -2}),
    ("no_slot", {**TOKENS, "no_slot": None}),
    ("no_slot", {"no_slot": 0}),
    ("null_page", {"null_page": 0}),
    ("null_page", {**PAGED, "null_page": -1}),
    ("null_page", {**PAGED, "null_page": True}),
    ("null_slot", {"null_slot": -1}),
    ("null_slot", {**PAGED, "null_slot": 0}),
    ("ring", {"ring": True}),
    ("ring", {**PAGED, "ring": 1}),
    ("block_tables", {**PAGED, "ring": True, "block_tables": (int32([[1], [2]]), int32([[1, 2], [3, 4]]))}),
    ("block_tables", {**PAGED, "ring": True, "block_tables": (int32([[], []]),) * 2}),
    ("cu_rows", {"cu_rows": int32([0, 1])}),
    ("cu_rows", {"cu_rows": int32([0, 1, 2]).float()}),
    ("max_rows", {"max_rows": 8}),
    ("max_rows", {"cu_rows": int32([0, 1, 2]), "max_rows": -1}),
    ("max_rows", {"cu_rows": int32([0, 1, 2]), "max_rows": 2.0}),
    ("max_rows", {"cu_rows": int32([0, 1, 2]), "max_rows": 2, "entry_slots": torch.arange(2, device=DEVICE)}),
    ("errors", {"errors": torch.zeros(1, dtype=torch.int64, device=DEVICE)}),
    ("errors", {"errors": int32([0, 0])}),
    ("errors", {"errors": 0}),
    ("state_slots", {"state_slots": int32([0, 1]).short()}),
    ("entry_slots", {"entry_slots": int32([0, 1]).float()}),
    ("cache_block_table", {"cache_block_table": int32([[1, 2, 3, 4]] * 2)[:, ::2], "rows_per_page": 4}),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(BAD)), ids=lambda at: f"{BAD[at][0]}-{at}")
def test_bad_metadata(at: int) -> None:
    StepPlan.build(**GOOD)
    StepPlan.build(**(GOOD | PAGED))
    name, change = BAD[at]
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        StepPlan.build(**{**GOOD, **change})


def test_bad_updates() -> None:
    plan = StepPlan.build(**GOOD, **TOKENS)
    before = plan.items.clone()
    for name, given in (
        ("start_pos", {"cu_seqlens": int32([0, 4, 8])}),
        ("seq_lens", {"start_pos": int32([0, 0]), "cu_seqlens": int32([0, 4, 8]), "seq_lens": int32([4, 4])}),
        ("seq_lens", {"seq_lens": int32([4]), "cu_seqlens": int32([0, 4, 8])}),
        ("seq_lens", {"seq_lens": plan.start_pos, "cu_seqlens": int32([0, 4, 8])}),  # which it writes
        ("cu_seqlens", {"seq_lens": int32([4, 4])}),
        ("start_pos", {"start_pos": int32([0, 0]).double(), "cu_seqlens": int32([0, 4, 8])}),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
            plan.update(**given)
    assert torch.equal(plan.items, before)


def test_numbers_too_far_apart() -> None:
    """The kernel works out how many bytes apart they are as an int32."""
    for dtype, apart in ((torch.int32, 2**29), (torch.int64, 2**28)):
        rows, meta = torch.empty((2, apart), dtype=dtype, device="meta"), torch.device("meta")
        check_numbers("start_pos", rows[:1, 0], (1,), meta, fake=True)  # of a single one it does not matter
        check_numbers("start_pos", torch.empty((2, apart - 1), dtype=dtype, device="meta")[:, 0], (2,), meta, fake=True)
        with pytest.raises(ValueError, match="start_pos must have numbers less than 2 GiB apart"):
            check_numbers("start_pos", rows[:, 0], (2,), meta, fake=True)


def test_traced() -> None:
    """As operators: what `update` takes and what calls know of the plan is in their schemas."""
    spec = kvfold.CompressorSpec(16, 2, has_ape=False, rope_dim=0)
    state = kvfold.WindowState.allocate(spec, 4, 8)
    state.kv.zero_(), state.score.zero_()
    table = torch.tensor([[3], [1]])
    slots, rows = torch.full((20,), 4, dtype=torch.int32), torch.zeros(9, 16)
    plan = StepPlan.build(
        2, None, torch.tensor([3, 10, 20]), 12, seq_lens=torch.tensor([7, 11]), block_tables=(table, table), page_size=8,
        ring=True, null_page=0, token_slots=slots, no_slot=0, cu_rows=torch.tensor([0, 4, 9]), max_rows=9,
    )  # fmt: skip
    scores = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))

    def call(scores: torch.Tensor, seq_lens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        plan.update(seq_lens=seq_lens, cu_seqlens=cu_seqlens)
        kvfold.compress(scores, plan, state, None, spec=spec, ape=None, norm_weight=None, rope=None, rows=rows)
        return rows.clone()

    lengths = torch.tensor([8, 12]), torch.tensor([3, 10, 20])
    want = call(scores, *lengths), state.kv.clone(), plan.items.clone()
    rows.zero_(), state.kv.zero_(), plan.items.zero_()
    seen = torch.compile(call, backend="aot_eager", fullgraph=True)(scores, *lengths), state.kv, plan.items
    assert all(torch.equal(one, other) for one, other in zip(seen, want, strict=True)) and want[0].any()
    assert int(plan.errors) == 0


def test_warmup_knows_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more kernel for each width of a plan, and two for each of a `WindowState`, where they are asked for."""
    from kvfold.backend_triton import keys, launcher, prepare
    from kvfold.backend_triton.variants import variant_of

    found: list = []
    monkeypatch.setattr(prepare, "prepare", lambda asked, *_: found.append(dict.fromkeys(asked)) or len(found[-1]))
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr("kvfold.precompile.warmup._gpu", lambda *_: torch.device("cpu"))
    spec = kvfold.CompressorSpec(16, 4, overlap=True, rope_dim=8)
    for plans in (("plain",), ("plain", "engine"), ("engine",), ("ring",)):
        kvfold.warmup([spec], [None], states=("window",), page_sizes=(4,), plans=plans, rows=(torch.float32,))
    kinds = [{(type(key), getattr(key, "tables", None), getattr(key, "metadata", None)) for key in some} for some in found]
    plain, engine = (keys.PlanKey, None, False), (keys.PlanKey, None, True)
    windows = {kind: (keys.WindowKey, kind, None) for kind in keys.TABLES}
    assert kinds == [
        {plain, windows["plain"]}, {plain, engine, windows["plain"], windows["engine"]},
        {engine, windows["plain"], windows["engine"]}, {plain, windows["ring"]},
    ]  # fmt: skip
    assert all(variant_of(key, True, False).arguments for some in found for key in some)
    with pytest.raises(ValueError, match="plans must be among"):
        kvfold.warmup([spec], [None], plans=("rings",))


def test_check_says_why(backend: Backend, tmp_path: Path) -> None:
    """`kvfold.check` of plans with metadata: a reason for everything that is counted, and equal where nothing is."""
    device = backend.device
    spec = kvfold.CompressorSpec(16, 2, has_ape=False, rope_dim=0)
    cache = kvfold.EntryCache.allocate("bf16", 4, 4, spec, device=device)
    rest = {"spec": spec, "norm_weight": torch.ones(16, device=device), "backend": backend.name}
    scores = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).to(device)

    def ints(values: Any) -> torch.Tensor:
        return torch.tensor(values, device=device)

    def checked(starts: list[int], state: Any, **given: Any) -> str:
        plan = StepPlan.build(2, ints(starts), ints([3, 10, 20]), 12, **given)
        out = torch.zeros(3, 16, device=device) if "cu_rows" in given else None
        kvfold.compress(scores, plan, state, cache, ape=None, rope=None, rows=out, **rest)
        text = str(kvfold.check(scores, plan, state, cache, ape=None, rope=None, **rest))
        assert "more than these refusals" not in text and "NOT COMPARABLE" not in text, text
        return text

    fold = kvfold.FoldState.allocate(spec, 3, 12, device=device)
    ring = kvfold.WindowState.allocate(spec, 4, 8, device=device)
    ring.kv.zero_(), ring.score.zero_()
    table = ints([[3], [1]])
    rings = {"block_tables": (table, table), "page_size": 8, "ring": True, "null_page": 0}
    tokens = {"token_slots": ints([-1, *range(15), -1, -1, -1, -1])}
    slots = {"state_slots": ints([0, 2]), "null_slot": 0}
    assert checked([1, 0], ring, **rings, **tokens).split("\n")[0].endswith(": equal")
    assert checked([1, 0], fold, **slots, **tokens).split("\n")[0].endswith(": equal")
    assert "token_slots has 15" in checked([1, 0], fold, **slots, token_slots=tokens["token_slots"][:15].contiguous())
    assert "token_slots is 99" in checked([1, 0], fold, **slots, token_slots=torch.full((20,), 99, device=device))
    tight = tokens | {"cu_rows": ints([0, 4, 6]), "max_rows": 9}
    assert "cu_rows[1] and the next have no room" in checked([1, 0], ring, **rings, **tight)
    assert "start_pos[1] is -2" in checked([1, -2], ring, **rings, **tokens)
    rings["block_tables"] = (ints([[3], [7]]), table)
    assert "block_tables[0][1, 0], the page with the values of position 2, is 7" in checked([1, 0], ring, **rings, **tokens)
    plan = StepPlan.build(2, ints([1, 0]), ints([3, 10, 20]), 12, **rings, **tokens)
    report = kvfold.check(scores, plan, ring, cache, ape=None, rope=None, **rest)
    kvfold.dump(tmp_path / "call", scores, plan, ring, cache, ape=None, rope=None, **rest)
    again = kvfold.replay(tmp_path / "call", device=device, backend=backend.name).check()
    assert again == report and "is 7" in str(again)
