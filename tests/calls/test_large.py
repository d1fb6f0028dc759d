"""Buffers of more than 2**31 bytes and elements, really allocated: their last pages and slots do what those of small ones do.

Pools of bf16 rows are in test_window_bits.py. Each test also runs with small buffers, on every backend.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.helpers import MAX_POSITIONS, SPECS, Backend, Weights, bits, make_tokens
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, StepPlan, WindowState

LIMIT = 1 << 31
sizes = pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["small", "large"])


def count(large: bool, limit: int, each: int) -> int:
    """How many pages or slots of `each` elements or bytes there are: so many that the last one begins beyond `limit`."""
    return limit // each + 3 if large else 5


def room(backend: Backend, large: bool, size: int) -> None:
    """Skips where so many bytes cannot be had; the torch backend indexes with 64 bits anyway."""
    if large and (backend.device.type != "cuda" or backend.name != "triton"):
        pytest.skip("large buffers are for the kernels on a GPU")
    if large and torch.cuda.mem_get_info()[0] < 1.2 * size:
        pytest.skip(f"needs {size >> 30} GiB of GPU memory")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """One process at a time: side by side their buffers may not fit in a GPU."""
    with (Path(tempfile.gettempdir()) / "kvfold-test-large").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def int32(values: list, backend: Backend) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=backend.device)


class Run:
    """One sequence in two steps, of which the second goes on inside a window, and what they made."""

    def __init__(self, spec: CompressorSpec, backend: Backend, dtype: torch.dtype = torch.float32) -> None:
        self.spec, self.backend = spec, backend
        self.cuts = (0, spec.ratio + spec.ratio // 2, 2 * spec.ratio + 1)
        self.tokens = make_tokens(spec, self.cuts[-1], seed=77, dtype=dtype).to(backend.device)
        weights = Weights.make(spec, max_positions=MAX_POSITIONS)
        self.named = {
            "spec": spec,
            "ape": weights.ape.to(backend.device),
            "norm_weight": weights.norm_weight.to(backend.device),
            "rope": weights.rope.to(backend.device),
        }

    def __call__(
        self, state: FoldState | WindowState, cache: EntryCache, slots: list[int], *, apart: bool = False, **where: object
    ) -> list[Tensor]:
        """Both steps; entry i goes to cache slot `slots[i]`. Returns the pooled rows and the records read back.

        apart: with `store` as a call of its own.
        """
        pooled = []
        for start, end in zip(self.cuts, self.cuts[1:], strict=False):
            first, last = start // self.spec.ratio, end // self.spec.ratio
            targets = torch.tensor(slots[first:last], dtype=torch.int64, device=self.backend.device)
            plan = StepPlan.build(
                self.spec.ratio, int32([start], self.backend), int32([0, end - start], self.backend), end - start,
                entry_slots=targets, **where,
            )  # fmt: skip
            rows = torch.full((last - first, self.spec.head_dim), torch.nan, device=self.backend.device)
            now = None if apart else cache
            kvfold.compress(self.tokens[start:end], plan, state, now, rows=rows, backend=self.backend.name, **self.named)
            if apart:
                named = {name: value for name, value in self.named.items() if name != "ape"}
                kvfold.store(rows, plan, cache, backend=self.backend.name, **named)
            assert int(plan.errors) == 0
            pooled.append(rows)
        read = cache.read(torch.tensor(slots, dtype=torch.int64, device=self.backend.device))
        assert read.isfinite().all() and read.any()
        return [torch.cat(pooled), read]


def same(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(bits(a), bits(b))


def fold_state(spec: CompressorSpec, backend: Backend, slots: int, dtype: torch.dtype) -> FoldState:
    """Like `allocate`, but full of NaN, so that what is read without being written shows."""
    state = FoldState.allocate(spec, slots, 4, device=backend.device, dtype=dtype)
    state.rows.fill_(torch.nan)
    return state


@sizes
@pytest.mark.parametrize("name, dtype", [("hca", torch.float32), ("csa", torch.bfloat16), ("indexer", torch.float32)])
def test_the_last_slot_of_a_fold_state(backend: Backend, name: str, dtype: torch.dtype, large: bool) -> None:
    spec = SPECS[name]
    like = FoldState.allocate(spec, 1, 4, device="meta", dtype=dtype)
    slots = count(large, LIMIT, like.rows.numel())
    room(backend, large, slots * like.bytes_per_slot)
    run = Run(spec, backend, dtype if dtype == torch.bfloat16 else torch.float32)
    found = []
    for n in (slots, 2):
        cache = EntryCache.allocate("fp32", 1, 4, spec, device=backend.device)
        state = fold_state(spec, backend, n, dtype)
        assert not large or n == 2 or (n - 1) * like.rows.numel() > LIMIT
        found.append([*run(state, cache, [2, 0], state_slots=int32([n - 1], backend)), state.rows[n - 1].clone()])
        assert (state.positions[: n - 1] == -1).all()
        found[-1].append(state.positions[n - 1].clone())
        del state
    for a, b in zip(*found, strict=True):
        assert torch.equal(*(x.view(torch.int16) if x.dtype == torch.bfloat16 else x.view(torch.int32) for x in (a, b)))


@sizes
@pytest.mark.parametrize("apart", [False, True], ids=["fused", "store"])
@pytest.mark.parametrize("fmt, limit", [("fp32", LIMIT), ("fp32", 2 * LIMIT), ("fp8_ds_mla", LIMIT), ("mxfp4", LIMIT)])
def test_the_last_slots_of_a_cache(backend: Backend, fmt: str, limit: int, large: bool, apart: bool) -> None:
    """Beyond 2**31 and 2**32 bytes; the record's tail lies in the same page, or in a buffer of its own."""
    spec = SPECS["csa"]
    like = EntryCache.allocate(fmt, 1, 64, spec, device="meta")
    pages = count(large, limit, like.storage.shape[1])
    room(backend, large, pages * like.storage.shape[1])
    run, found = Run(spec, backend), []
    for n in (pages, 2):
        cache = EntryCache.allocate(fmt, n, 64, spec, device=backend.device)
        last = [64 * n - 1, 64 * (n - 1)]
        state = fold_state(spec, backend, 1, torch.float32)
        found.append(run(state, cache, last, state_slots=int32([0], backend), apart=apart))
        found[-1].append(cache.storage[-1].view(torch.int32).clone())
        assert not cache.storage[:-1].any()
        del cache
    same(*found)


# (spec, dtype of the pools, one pool for values and scores, beyond how many bytes per element of 2**31)
POOLS = [
    pytest.param(SPECS["hca"], torch.float32, True, 4, id="128-one-pool-elements"),
    pytest.param(SPECS["hca"], torch.float32, False, 1, id="128-bytes"),
    pytest.param(SPECS["hca"], torch.bfloat16, False, 2, id="128-bf16-elements"),
    pytest.param(SPECS["csa"], torch.float32, False, 4, id="4-overlap-elements"),
]


@sizes
@pytest.mark.parametrize("spec, dtype, one_pool, width", POOLS)
def test_the_last_pages_of_raw_rows(
    backend: Backend, spec: CompressorSpec, dtype: torch.dtype, one_pool: bool, width: int, large: bool
) -> None:
    if backend.slow and spec.ratio == 128 and not one_pool:
        pytest.skip("the interpreter does one of them")
    size, columns = 64, 5
    whole = size * spec.channels * dtype.itemsize * (2 if one_pool else 1)
    pages = count(large, width * LIMIT, whole) + columns
    room(backend, large, pages * whole * (1 if one_pool else 2))
    run, found = Run(spec, backend), []
    for n in (pages, columns):
        pools = [
            torch.empty(n, size, spec.channels * (2 if one_pool else 1), dtype=dtype, device=backend.device)
            for _ in range(1 if one_pool else 2)
        ]
        for pool in pools:
            pool[0].fill_(torch.nan)
            pool[-columns:].fill_(torch.nan)
        c = spec.channels
        state = WindowState(pools[0][..., :c], pools[0][..., c:]) if one_pool else WindowState(*pools)
        cache = EntryCache.allocate("fp32", 1, 4, spec, device=backend.device)
        # The last pages, in an order of their own in each pool.
        tables = tuple(int32([[n - 1 - (i + j) % columns for i in range(columns)]], backend) for j in (0, 2))
        found.append(run(state, cache, [3, 1], block_tables=tables, page_size=size))
        for pool in (state.kv, state.score):
            found[-1].append(pool[-columns:].nan_to_num(123.0).clone())
            assert n == columns or pool[0].isnan().all()
        del state, pools, pool
    same(*found)
