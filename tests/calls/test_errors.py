"""Mistakes that the host can see raise an error which names the argument, and nothing is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import SPECS, Backend, Engine, make_tokens

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, StepPlan, WindowState

SPEC = SPECS["csa"]
OTHER = SPECS["indexer"]


class Call:
    """A good call of `compress`; a test spoils one argument."""

    def __init__(self, backend: Backend) -> None:
        self.engine = Engine(SPEC, backend, num_slots=2, max_new_tokens=4)
        self.device = backend.device
        tokens = make_tokens(SPEC, 9, seed=0).to(self.device)
        plan = self.plan(4)
        self.arguments: dict[str, Any] = {
            "kv_score": tokens,
            "plan": plan,
            "state": self.engine.state,
            "cache": self.engine.cache,
            "spec": SPEC,
            "ape": self.engine.ape,
            "norm_weight": self.engine.norm_weight,
            "rope": self.engine.rope,
            "rows": torch.zeros(2, 512, device=self.device),
            "backend": backend.name,
        }

    def plan(self, ratio: int, device: torch.device | str | None = None, **options: Any) -> StepPlan:
        device = device or self.device
        return StepPlan.build(
            ratio,
            torch.tensor([0], dtype=torch.int32, device=device),
            torch.tensor([0, 9], dtype=torch.int32, device=device),
            9,
            state_slots=torch.tensor([0], dtype=torch.int32, device=device),
            **(options or {"entry_slots": torch.tensor([0, 1], device=device)}),
        )

    def spoiled(self, **arguments: Any) -> None:
        arguments = {**self.arguments, **arguments}
        positional = [arguments.pop(name) for name in ("kv_score", "plan", "state", "cache")]
        kvfold.compress(*positional, **arguments)


def raises(name: str, kind: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError)) -> Any:
    """An error whose message names the argument as a word."""
    return pytest.raises(kind, match=rf"\b{re.escape(name)}\b")


def test_the_good_call_is_good(backend: Backend) -> None:
    call = Call(backend)
    call.spoiled()
    assert int(call.arguments["plan"].errors) == 0 and not call.engine.entries(0, 2).isnan().any()


def spare(x: torch.Tensor) -> torch.Tensor:
    """The same values, every row twice as far from the next within the last dimension."""
    return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]


SPOILED: dict[str, tuple[str, Callable[[Call], dict[str, Any]]]] = {
    "kv_score: width": ("kv_score", lambda c: {"kv_score": torch.zeros(9, 1024, device=c.device)}),
    "kv_score: dimensions": ("kv_score", lambda c: {"kv_score": torch.zeros(1, 9, 2048, device=c.device)}),
    "kv_score: dtype": ("kv_score", lambda c: {"kv_score": torch.zeros(9, 2048, device=c.device).half()}),
    "kv_score: last stride": ("kv_score", lambda c: {"kv_score": spare(c.arguments["kv_score"])}),
    "kv_score: type": ("kv_score", lambda c: {"kv_score": [1.0]}),
    "plan: ratio": ("plan", lambda c: {"plan": c.plan(128)}),
    "plan: type": ("plan", lambda c: {"plan": None}),
    "plan: no entry slots": (
        "plan must have entry_slots, token_slots or a cache_block_table",
        lambda c: {"plan": c.plan(4, entry_slots=None), "rows": None},
    ),
    "state: type": ("state", lambda c: {"state": c.engine.state.rows}),
    "state: spec": ("state", lambda c: {"state": FoldState.allocate(OTHER, 2, 4, device=c.device)}),
    "cache: type": ("cache", lambda c: {"cache": c.engine.cache.storage}),
    "cache: spec": ("cache", lambda c: {"cache": EntryCache.allocate("fp32", 2, 5, OTHER, device=c.device)}),
    "spec: type": ("spec", lambda c: {"spec": "csa"}),
    "ape: missing": ("ape", lambda c: {"ape": None}),
    "ape: shape": ("ape", lambda c: {"ape": torch.zeros(4, 512, device=c.device)}),
    "ape: dtype": ("ape", lambda c: {"ape": torch.zeros(4, 1024, device=c.device).bfloat16()}),
    "ape: stride": ("ape", lambda c: {"ape": torch.zeros(1024, 4, device=c.device).t()}),
    "norm_weight: missing": ("norm_weight", lambda c: {"norm_weight": None}),
    "norm_weight: shape": ("norm_weight", lambda c: {"norm_weight": torch.ones(128, device=c.device)}),
    "norm_weight: dtype": ("norm_weight", lambda c: {"norm_weight": torch.ones(512, device=c.device).double()}),
    "norm_weight: stride": ("norm_weight", lambda c: {"norm_weight": torch.ones(1024, device=c.device)[::2]}),
    "rope: missing": ("rope", lambda c: {"rope": None}),
    "rope: shape": ("rope", lambda c: {"rope": torch.zeros(100, 32, device=c.device)}),
    "rope: dtype": ("rope", lambda c: {"rope": torch.zeros(100, 64, device=c.device).bfloat16()}),
    "rope: stride": ("rope", lambda c: {"rope": torch.zeros(100, 128, device=c.device)[:, ::2]}),
    "rows: shape": ("rows", lambda c: {"rows": torch.zeros(3, 512, device=c.device)}),
    "rows: dtype": ("rows", lambda c: {"rows": torch.zeros(2, 512, device=c.device).double()}),
    "rows: stride": ("rows", lambda c: {"rows": torch.zeros(2, 1024, device=c.device)[:, ::2]}),
    "backend: unknown": ("backend", lambda c: {"backend": "cuda"}),
    "device of plan": ("plan", lambda c: {"plan": c.plan(4, device="cpu" if c.device.type != "cpu" else "meta")}),
    "device of state": ("state", lambda c: {"state": FoldState.allocate(SPEC, 2, 4, device="meta")}),
    "device of cache": ("cache", lambda c: {"cache": EntryCache.allocate("fp32", 2, 5, SPEC, device="meta")}),
    "device of ape": ("ape", lambda c: {"ape": c.engine.ape.to("meta")}),
    "device of norm_weight": ("norm_weight", lambda c: {"norm_weight": c.engine.norm_weight.to("meta")}),
    "device of rope": ("rope", lambda c: {"rope": c.engine.rope.to("meta")}),
    "device of rows": ("rows", lambda c: {"rows": torch.zeros(2, 512, device="meta")}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_compress(backend: Backend, what: str) -> None:
    call = Call(backend)
    name, spoil = SPOILED[what]
    before, arguments = call.engine.snapshot(), spoil(call)
    with raises(name):
        call.spoiled(**arguments)
    for was, now in zip(before, call.engine.snapshot(), strict=True):
        assert torch.equal(was, now)


def test_kv_score_elsewhere(backend: Backend) -> None:
    """Which of two devices is the wrong one cannot be known; the error names an argument that is not where kv_score is."""
    call = Call(backend)
    with pytest.raises((ValueError, TypeError), match=r"\b(plan|state|kv_score)\b.*\bmeta\b"):
        call.spoiled(kv_score=call.arguments["kv_score"].to("meta"))


def test_an_ape_that_the_spec_does_not_have(backend: Backend) -> None:
    spec = CompressorSpec(head_dim=128, ratio=4, has_ape=False)
    engine = Engine(spec, backend, num_slots=1, max_new_tokens=1)
    engine.ape = torch.zeros(4, 128, device=backend.device)
    with raises("ape", ValueError):
        engine.step([(0, 0, make_tokens(spec, 4, seed=0))])


def test_fp32_tokens_for_a_bf16_state(backend: Backend) -> None:
    engine = Engine(SPEC, backend, num_slots=1, max_new_tokens=1, state_dtype=torch.bfloat16)
    with raises("kv_score", TypeError):
        engine.step([(0, 0, make_tokens(SPEC, 4, seed=0))])


BAD_SPECS = {
    "head_dim": [{"head_dim": 96}, {"head_dim": 0}, {"head_dim": -128}, {"head_dim": 128.0}],
    "ratio": [{"ratio": 0}, {"ratio": -4}, {"ratio": True}],
    "rope_dim": [{"rope_dim": 63}, {"rope_dim": 256}, {"rope_dim": -2}],
    "norm_eps": [{"norm_eps": 0.0}, {"norm_eps": 1e-60}, {"norm_eps": float("nan")}, {"norm_eps": "small"}],
    "overlap": [{"overlap": 1}],
    "has_ape": [{"has_ape": None}],
    "hadamard": [{"hadamard": "yes"}],
}


@pytest.mark.parametrize("name, change", [(name, change) for name, changes in BAD_SPECS.items() for change in changes])
def test_spec(name: str, change: dict[str, Any]) -> None:
    with raises(name):
        CompressorSpec(**{"head_dim": 128, "ratio": 4, **change})


def int32(*values: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


BAD_PLANS: list[tuple[str, dict[str, Any]]] = [
    ("ratio", {"ratio": 0}),
    ("ratio", {"ratio": 4.0}),
    ("start_pos", {"start_pos": torch.tensor([0.0, 0.0])}),
    ("start_pos", {"start_pos": int32(0, 0)[None]}),
    ("start_pos", {"start_pos": [0, 0]}),
    ("start_pos", {"start_pos": int32(0, 1).bool()}),
    ("cu_seqlens", {"cu_seqlens": int32(0, 4)}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 4.0, 8.0])}),
    ("cu_seqlens", {"cu_seqlens": int32(0, 4, 8, device="meta")}),
    ("cu_seqlens", {"cu_seqlens": None}),
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", {"max_new_tokens": torch.tensor(4)}),
    ("max_tokens", {"max_tokens": -1}),
    ("state_slots", {"state_slots": int32(0)}),
    ("state_slots", {"state_slots": torch.tensor([0.0, 1.0])}),
    ("state_slots", {"state_slots": int32(0, 1, device="meta")}),
    ("state_slots", {"state_slots": None}),
    ("entry_slots", {"entry_slots": int32(0, 1).short()}),
    ("entry_slots", {"entry_slots": torch.zeros(2, 1, dtype=torch.int64)}),
    ("entry_slots", {"entry_slots": torch.zeros(2, dtype=torch.int64, device="meta")}),
    ("entry_slots", {"cache_block_table": int32(0, 0)[:, None], "rows_per_page": 4}),  # both
    ("cache_block_table", {"entry_slots": None, "cache_block_table": int32(0)[:, None], "rows_per_page": 4}),
    ("cache_block_table", {"entry_slots": None, "cache_block_table": int32(0, 0), "rows_per_page": 4}),
    ("cache_block_table", {"entry_slots": None, "cache_block_table": torch.zeros(2, 1), "rows_per_page": 4}),
    ("rows_per_page", {"entry_slots": None, "cache_block_table": int32(0, 0)[:, None]}),
    ("rows_per_page", {"entry_slots": None, "cache_block_table": int32(0, 0)[:, None], "rows_per_page": 0}),
]


@pytest.mark.parametrize("at", range(len(BAD_PLANS)), ids=lambda at: f"{BAD_PLANS[at][0]}-{at}")
def test_plan(at: int) -> None:
    good = {
        "ratio": 4,
        "start_pos": int32(0, 0),
        "cu_seqlens": int32(0, 4, 8),
        "max_new_tokens": 4,
        "state_slots": int32(0, 1),
        "entry_slots": torch.tensor([0, 1]),
    }
    StepPlan.build(**good)
    name, change = BAD_PLANS[at]
    with raises(name):
        StepPlan.build(**{**good, **change})


def test_plan_update() -> None:
    plan = StepPlan.build(4, int32(0, 0), int32(0, 4, 8), 4, state_slots=int32(0, 1), entry_slots=torch.tensor([0, 1]))
    before = plan.items.clone()
    with raises("start_pos"):
        plan.update(int32(0), int32(0, 4, 8))
    with raises("cu_seqlens"):
        plan.update(int32(0, 0), int32(0, 4))
    with raises("cu_seqlens"):
        plan.update(int32(0, 0), torch.tensor([0.0, 4.0, 8.0]))
    with raises("start_pos"):
        plan.update(int32(0, 0, device="meta"), int32(0, 4, 8))
    assert torch.equal(plan.items, before)


def test_state() -> None:
    good = FoldState.allocate(SPEC, 2, 4)
    fold = FoldState.allocate(SPECS["hca"], 2, 4)
    FoldState(SPEC, good.rows, good.positions, 4)
    for name, call in (
        ("spec", lambda: FoldState.allocate("csa", 2, 4)),
        ("num_slots", lambda: FoldState.allocate(SPEC, -1, 4)),
        ("max_new_tokens", lambda: FoldState.allocate(SPEC, 2, 0)),
        ("dtype", lambda: FoldState.allocate(SPEC, 2, 4, dtype=torch.float16)),
        ("rows", lambda: FoldState(SPEC, good.rows[:, 1:], good.positions, 4)),
        ("rows", lambda: FoldState(SPEC, good.rows.double(), good.positions, 4)),
        ("rows", lambda: FoldState(SPEC, spare(good.rows), good.positions, 4)),
        ("rows", lambda: FoldState(SPECS["hca"], fold.rows.bfloat16(), fold.positions, 4)),
        ("rows", lambda: FoldState(SPEC, good.rows, good.positions, 99)),
        ("positions", lambda: FoldState(SPEC, good.rows, good.positions[:1], 4)),
        ("positions", lambda: FoldState(SPEC, good.rows, good.positions.long(), 4)),
        ("positions", lambda: FoldState(SPEC, good.rows, good.positions.to("meta"), 4)),
        ("positions", lambda: FoldState(SPEC, good.rows, spare(good.positions), 4)),
        ("position", lambda: good.history_of(-1)),
    ):
        with raises(name):
            call()


def test_cache() -> None:
    good = EntryCache.allocate("fp8_ds_mla", 3, 4, SPEC)
    EntryCache(good.storage, "fp8_ds_mla", 4, SPEC)
    EntryCache(torch.zeros(3, 4000, dtype=torch.uint8)[:, :2880], "fp8_ds_mla", 4, SPEC)  # pages lie further apart
    for name, call in (
        ("fmt", lambda: EntryCache.allocate("fp7", 3, 4, SPEC)),
        ("fmt", lambda: EntryCache.allocate(8, 3, 4, SPEC)),
        ("head_dim", lambda: EntryCache.allocate("fp8_ds_mla", 3, 4, OTHER)),
        ("num_pages", lambda: EntryCache.allocate("fp32", -1, 4, SPEC)),
        ("rows_per_page", lambda: EntryCache.allocate("fp32", 3, 0, SPEC)),
        ("spec", lambda: EntryCache.allocate("fp32", 3, 4, None)),
        ("storage", lambda: EntryCache(good.storage, "fp32", 4, SPEC)),  # pages too small
        ("storage", lambda: EntryCache(good.storage[0], "fp8_ds_mla", 4, SPEC)),
        ("storage", lambda: EntryCache(spare(good.storage), "fp8_ds_mla", 4, SPEC)),
        ("storage", lambda: EntryCache(None, "fp8_ds_mla", 4, SPEC)),
        ("storage", lambda: EntryCache(good.storage[:1].expand(3, -1), "fp8_ds_mla", 4, SPEC)),  # pages overlap
        ("slots", lambda: good.read(torch.tensor([12]))),
        ("slots", lambda: good.read(torch.tensor([-1]))),
        ("slots", lambda: good.read(torch.tensor([0.0]))),
        ("slots", lambda: good.read([0])),
    ):
        with raises(name):
            call()


def test_what_is_no_dense_tensor_or_no_number(backend: Backend) -> None:
    """Sparse tensors, switches that are no bool, and numbers of any kind that are none or out of range."""
    call = Call(backend)
    before, rows = call.engine.snapshot(), call.arguments["rows"]
    for name, bad in (
        ("kv_score", call.arguments["kv_score"].to_sparse()),
        ("rows", rows.to_sparse()),
        ("norm_weight", call.engine.norm_weight.to_sparse()),
        ("pdl", "no"),
        ("pdl", 1),
    ):
        with raises(name, TypeError):
            call.spoiled(**{name: bad})
    for was, now in zip(before, call.engine.snapshot(), strict=True):
        assert torch.equal(was, now)
    state, cache = FoldState.allocate(SPEC, 1, 4), EntryCache.allocate("bf16", 1, 4, SPEC)
    for name, make in (
        ("rows", lambda: FoldState(SPEC, state.rows.to_sparse(), state.positions, 4)),
        ("kv", lambda: kvfold.WindowState(torch.zeros(2, 2, 16).to_sparse(), torch.zeros(2, 2, 16))),
        ("storage", lambda: EntryCache(cache.storage.to_sparse(), "bf16", 4, SPEC)),
        ("scale", lambda: EntryCache(cache.storage, "bf16", 4, SPEC, scale="one")),
        ("scale", lambda: EntryCache(cache.storage, "bf16", 4, SPEC, scale="1.0")),
        ("scale", lambda: EntryCache(cache.storage, "bf16", 4, SPEC, scale=torch.ones(2))),
        ("scale", lambda: EntryCache(cache.storage, "bf16", 4, SPEC, scale=None)),
        ("scale", lambda: EntryCache(cache.storage, "fp8_tensor", 4, SPEC, scale=True)),
        ("scale", lambda: EntryCache(cache.storage, "fp8_tensor", 4, SPEC, scale=torch.tensor(True))),
        ("scale", lambda: EntryCache(cache.storage, "fp8_tensor", 4, SPEC, scale=bytearray(b"2"))),
    ):
        with raises(name, TypeError):
            make()
    for scale in (10**400, -(10**400), float("nan"), float("inf"), 0):
        with raises("scale", ValueError):
            EntryCache(cache.storage, "bf16", 4, SPEC, scale=scale)
    assert EntryCache(cache.storage, "fp8_tensor", 4, SPEC, scale=torch.tensor(2.0)).scale == 2.0


def test_more_than_kernels_can_count() -> None:
    """Bounds that an int32 of a kernel cannot take; nothing is allocated for them."""
    for bounds in ({"max_new_tokens": 1 << 30}, {"max_new_tokens": 1 << 30, "max_tokens": 1 << 29}):
        with raises("max_new_tokens", ValueError):
            StepPlan.build(1, int32(0), int32(0, 4), **bounds, state_slots=int32(0))
    starts = torch.zeros(1 << 12, dtype=torch.int32)
    with raises("max_new_tokens", ValueError):
        StepPlan.build(1, starts, torch.zeros((1 << 12) + 1, dtype=torch.int32), 1 << 20, state_slots=starts, max_tokens=64)
    call = Call(Backend("torch", torch.device("cpu")))
    with raises("kv_score", ValueError):
        call.spoiled(kv_score=torch.zeros(1, 2048).expand(1 << 31, -1))
    for spec, most in ((kvfold.V4_CSA, 599_184), (CompressorSpec(head_dim=1024, ratio=128), 699_048)):
        largest = FoldState.allocate(spec, 1, most, device="meta")
        assert largest.rows[0].numel() <= 2**31 - 1
        with raises("max_new_tokens", ValueError):
            FoldState.allocate(spec, 1, most + 1, device="meta")
        with raises("max_new_tokens", ValueError):
            FoldState.page_bytes(spec, most + 1)
        with raises("max_new_tokens", ValueError):
            FoldState(spec, largest.rows, largest.positions, most + 1)
    stride = (2**31 - 512) // 7
    for apart in (stride, stride + 1):
        pool = torch.empty_strided((1, 8, 512), (0, apart, 1), device="meta")
        if apart == stride:
            WindowState(pool, pool.clone())
        else:
            with raises("kv", ValueError):
                WindowState(pool, pool.clone())
