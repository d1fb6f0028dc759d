"""`kvfold.store`, the second stage alone: the bytes that `compress` writes, entry by entry, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from support.helpers import Backend, Weights, bits, make_tokens
from support.record_support import Pages
from torch import Tensor

import kvfold
from kvfold import CompressorSpec
from kvfold.storage.formats import FORMATS

SPECS = {"hca": kvfold.V4_HCA, "csa": kvfold.V4_CSA, "indexer": kvfold.V4_INDEXER}
PRESETS = [
    pytest.param(name, preset, id=f"{name}-{preset}")
    for name, fmt in FORMATS.items()
    for preset, spec in SPECS.items()
    if not fmt.head_dims or spec.head_dim in fmt.head_dims
]
ROWS_PER_PAGE, NUM_PAGES = 3, 4
NUM_SLOTS = ROWS_PER_PAGE * NUM_PAGES
SLOTS = [10, 4, 0, 5]  # of the four entries; 4 and 5 are neighbours in one page


def spec_of(preset: str, backend: Backend) -> CompressorSpec:
    # 128 tokens a window take a CPU seconds; the epilogue sees no more of the ratio than a position.
    return replace(kvfold.V4_HCA, ratio=16) if preset == "hca" and backend.device.type == "cpu" else SPECS[preset]


@dataclass
class Step:
    """Two sequences whose step ends three windows and one; the second one starts inside its first window."""

    spec: CompressorSpec
    backend: Backend

    def __post_init__(self) -> None:
        ratio, device = self.spec.ratio, self.backend.device
        self.weights = Weights.make(self.spec)
        self.ape = None if self.weights.ape is None else self.weights.ape.to(device)
        self.norm_weight, self.rope = self.weights.norm_weight.to(device), self.weights.rope.to(device)
        self.lengths = [3 * ratio + 1, ratio]
        self.tokens = make_tokens(self.spec, sum(self.lengths), 31).to(device)

    def plan(self, entry_slots: list[int]) -> kvfold.StepPlan:
        device = self.backend.device
        return kvfold.StepPlan.build(
            self.spec.ratio,
            torch.zeros(2, dtype=torch.int32, device=device),
            torch.tensor([0, self.lengths[0], sum(self.lengths)], dtype=torch.int32, device=device),
            max(self.lengths),
            state_slots=torch.arange(2, dtype=torch.int32, device=device),
            entry_slots=torch.tensor(entry_slots, dtype=torch.int64, device=device),
        )

    def pages(self, fmt: str, scale: float = 1.0) -> Pages:
        return Pages(self.backend, fmt, self.spec, NUM_PAGES, ROWS_PER_PAGE, gap=20, scale=scale)

    def compress(self, plan: kvfold.StepPlan, pages: Pages | None, rows: Tensor | None = None) -> None:
        state = kvfold.FoldState.allocate(self.spec, 2, max(self.lengths), device=self.backend.device)
        kvfold.compress(
            self.tokens,
            plan,
            state,
            None if pages is None else pages.cache,
            spec=self.spec,
            ape=self.ape,
            norm_weight=self.norm_weight,
            rope=self.rope,
            rows=rows,
            backend=self.backend.name,
        )

    def store(self, rows: Tensor, plan: kvfold.StepPlan, pages: Pages, rope: Tensor | None = None) -> None:
        kvfold.store(
            rows,
            plan,
            pages.cache,
            spec=self.spec,
            norm_weight=self.norm_weight,
            rope=self.rope if rope is None else rope,
            backend=self.backend.name,
        )

    def pooled(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows that `compress` delivers without a cache."""
        return _pooled(self.spec, self.backend, dtype).clone()


@cache
def _pooled(spec: CompressorSpec, backend: Backend, dtype: torch.dtype) -> Tensor:
    step = Step(spec, backend)
    rows = torch.full((len(SLOTS), spec.head_dim), torch.nan, dtype=dtype, device=backend.device)
    step.compress(step.plan(SLOTS), None, rows)
    assert rows.isfinite().all()
    return rows


def same(a: Pages, b: Pages) -> bool:
    """All bytes, canaries and gaps included."""
    return all((x == y).all() for x, y in zip(a.now(), b.now(), strict=True))


@pytest.fixture
def indexer(backend: Backend) -> Step:
    return Step(kvfold.V4_INDEXER, backend)


@pytest.mark.parametrize(("fmt", "preset"), PRESETS)
def test_same_bytes_as_compress(backend: Backend, fmt: str, preset: str) -> None:
    step = Step(spec_of(preset, backend), backend)
    scale = 0.37 if FORMATS[fmt].takes_scale else 1.0
    whole, stored = step.pages(fmt, scale), step.pages(fmt, scale)
    step.compress(step.plan(SLOTS), whole)
    plan = step.plan(SLOTS)
    step.store(step.pooled(), plan, stored)
    assert same(whole, stored) and int(plan.errors) == 0
    # The four records were written, and every byte that belongs to none of them is as it was.
    blank = step.pages(fmt, scale)
    assert not same(blank, stored)
    for slot in SLOTS:
        blank.cache.pages[_record(blank, slot)] = stored.cache.pages[_record(stored, slot)]
        target = blank.cache.pages if blank.cache.scale_pages is None else blank.cache.scale_pages
        source = stored.cache.pages if stored.cache.scale_pages is None else stored.cache.scale_pages
        target[_tail(blank, slot)] = source[_tail(stored, slot)]
    assert same(blank, stored)


def _record(pages: Pages, slot: int) -> tuple[int, slice]:
    width = pages.cache.format.row_bytes(pages.spec)
    at = slot % ROWS_PER_PAGE * width
    return slot // ROWS_PER_PAGE, slice(at, at + width)


def _tail(pages: Pages, slot: int) -> tuple[int, slice]:
    width = 0 if pages.cache.format.interleaved else pages.cache.format.tail_bytes(pages.spec)
    base = 0 if pages.cache.format.separate else ROWS_PER_PAGE * pages.cache.format.row_bytes(pages.spec)
    at = base + slot % ROWS_PER_PAGE * width
    return slot // ROWS_PER_PAGE, slice(at, at + width)


@pytest.mark.parametrize("preset", SPECS)
def test_bf16_rows(backend: Backend, preset: str) -> None:
    """bf16 rows are taken as the numbers they are; formats that round rows anyway give the same bytes from either."""
    step = Step(spec_of(preset, backend), backend)
    rows, rounded = step.pooled(), step.pooled(torch.bfloat16)
    assert torch.equal(bits(rounded), bits(rows.bfloat16()))
    for fmt in ("fp32", "bf16", "bf16_trtllm", "fp8_tensor", "fp8_tensor_trtllm", "mxfp4"):
        pages = [step.pages(fmt) for _ in range(3)]
        for given, target in zip((rows, rounded, rounded.float()), pages, strict=True):
            step.store(given, step.plan(SLOTS), target)
        assert same(pages[1], pages[2])
        assert same(pages[0], pages[1]) == FORMATS[fmt].round_rows


def test_skips_and_refusals(indexer: Step) -> None:
    """-1 is skipped in silence; a slot outside the cache, or an entry beyond the RoPE table, is skipped and counted."""
    rows, ratio = indexer.pooled(), indexer.spec.ratio
    full = indexer.pages("indexer_fp8_vllm")
    indexer.store(rows, indexer.plan(SLOTS), full)
    at = torch.tensor(SLOTS, device=rows.device)
    want = full.cache.read(at)
    for slots, rope, kept, errors in (
        ([10, -1, 0, -1], None, [0, 2], 0),
        ([-1, -1, -1, -1], None, [], 0),
        ([NUM_SLOTS, 4, -2, 5], None, [1, 3], 2),
        ([NUM_SLOTS + 5, 1 << 40, -(1 << 40), 5], None, [3], 3),
        # The sequences' entries are at positions 0, R, 2R and 0.
        (SLOTS, indexer.rope[:ratio], [0, 3], 2),
        (SLOTS, indexer.rope[: ratio + 1], [0, 1, 3], 1),
        (SLOTS, indexer.rope[:0], [], 4),
        ([10, 4, -1, 5], indexer.rope[: ratio + 1], [0, 1, 3], 0),
    ):
        plan, pages = indexer.plan(slots), indexer.pages("indexer_fp8_vllm")
        indexer.store(rows, plan, pages, rope)
        assert int(plan.errors) == errors, slots
        assert torch.equal(pages.cache.read(at[kept]), want[kept])
        only = indexer.pages("indexer_fp8_vllm")
        for i in kept:
            one = [-1] * len(SLOTS)
            one[i] = slots[i]
            indexer.store(rows, indexer.plan(one), only)
        assert same(pages, only), slots


def test_entries_beyond_the_plan(indexer: Step) -> None:
    """A plan with fewer entry slots than entries: the others are counted, and their rows do not exist."""
    rows, full = indexer.pooled(), indexer.pages("bf16")
    indexer.store(rows, indexer.plan([*SLOTS[:2], -1, -1]), full)
    plan, pages = indexer.plan(SLOTS[:2]), indexer.pages("bf16")
    indexer.store(rows[:2].clone(), plan, pages)
    assert same(pages, full) and int(plan.errors) == 2


def test_bad_row_stays_alone(indexer: Step) -> None:
    """NaN and infinity in one row reach no other record."""
    rows = indexer.pooled()
    at = torch.tensor(SLOTS, device=rows.device)
    for fmt in ("bf16", "fp8_block128", "mxfp4", "indexer_mxfp4_sglang"):
        good = indexer.pages(fmt)
        indexer.store(rows, indexer.plan(SLOTS), good)
        for bad in (torch.nan, torch.inf, -torch.inf):
            spoiled = rows.clone()
            spoiled[1, 77] = bad
            pages = indexer.pages(fmt)
            indexer.store(spoiled, indexer.plan(SLOTS), pages)
            got, want = pages.cache.read(at), good.cache.read(at)
            assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
            assert not torch.equal(got[1], want[1])


def test_nothing_to_do(indexer: Step) -> None:
    """No sequences, absent ones, or windows that do not end: nothing is written and nothing counted."""
    device, ratio = indexer.backend.device, indexer.spec.ratio
    for start, lengths, slots in (([], [], []), ([0, 0], [ratio, ratio], [-1, -1]), ([0, 1], [ratio - 1, 0], [0, 1])):
        plan = kvfold.StepPlan.build(
            ratio,
            torch.tensor(start, dtype=torch.int32, device=device),
            torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device),
            ratio,
            state_slots=torch.tensor(slots, dtype=torch.int32, device=device),
            entry_slots=torch.arange(2, dtype=torch.int64, device=device),
        )
        pages = indexer.pages("bf16")
        indexer.store(torch.full((2, 128), torch.nan, device=device), plan, pages)
        assert same(pages, indexer.pages("bf16")) and int(plan.errors) == 0


def test_arguments(indexer: Step) -> None:
    """Every bad argument is named, and nothing has been written."""
    rows, pages, plan = indexer.pooled(), indexer.pages("indexer_mxfp4"), indexer.plan(SLOTS)
    unaddressed = indexer.plan(SLOTS)
    unaddressed.entry_slots = None
    base = {
        "rows": rows, "plan": plan, "cache": pages.cache, "spec": indexer.spec,
        "norm_weight": indexer.norm_weight, "rope": indexer.rope, "backend": indexer.backend.name,
    }  # fmt: skip
    other = Step(replace(indexer.spec, ratio=8), indexer.backend)
    for error, name, value in (
        (TypeError, "rows", None),
        (TypeError, "rows", rows.half()),
        (ValueError, "rows", rows[:3]),
        (ValueError, "rows", rows[:, :64]),
        (ValueError, "rows", rows.repeat(1, 2)[:, ::2]),
        (TypeError, "plan", None),
        (ValueError, "plan", unaddressed),
        (ValueError, "plan", other.plan(SLOTS)),
        (TypeError, "cache", None),
        (ValueError, "cache", other.pages("indexer_mxfp4").cache),
        (TypeError, "spec", None),
        (TypeError, "norm_weight", None),
        (TypeError, "norm_weight", indexer.norm_weight.half()),
        (ValueError, "norm_weight", indexer.norm_weight[:64]),
        (ValueError, "norm_weight", indexer.norm_weight.to("meta")),
        (TypeError, "rope", None),
        (ValueError, "rope", indexer.rope[:, :32]),
        (TypeError, "rope", indexer.rope.double()),
        (ValueError, "backend", "cuda"),
    ):
        with pytest.raises(error, match=name):
            kvfold.store(**{**base, name: value})
    assert same(pages, indexer.pages("indexer_mxfp4")) and int(plan.errors) == 0
    kvfold.store(**base)
    assert not same(pages, indexer.pages("indexer_mxfp4"))
