"""`kvfold.store` without a plan: the bytes of the plan form at any slots and positions, into one cache or two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend, Weights
from support.ops_support import through_operators
from support.record_support import Pages
from test_store import PRESETS, ROWS_PER_PAGE, SLOTS, Step, same, spec_of
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache, UnsupportedError, reference
from kvfold.storage.formats import FORMATS

INT32, INT64, BF16 = torch.int32, torch.int64, torch.bfloat16
SPEC = CompressorSpec(head_dim=128, ratio=4, rope_dim=16)
PLAIN = CompressorSpec(head_dim=128, ratio=4, rope_dim=0)
COUNT = 6


class Rows:
    """Six rows of the small spec, each with a slot and a position, and caches of 4 pages of 3 rows."""

    def __init__(self, backend: Backend, spec: CompressorSpec = SPEC) -> None:
        self.backend, self.spec = backend, spec
        weights, g = Weights.make(spec, max_positions=64), torch.Generator().manual_seed(5)
        self.norm_weight, self.rope = weights.norm_weight.to(backend.device), weights.rope.to(backend.device)
        self.rows = torch.randn(COUNT, spec.head_dim, generator=g).to(backend.device)
        self.slots, self.positions = self.ints([7, 0, 11, 3, 4, 9]), self.ints([5, 63, 0, 17, 17, 2])
        self.errors = self.ints([0], INT32)

    def ints(self, values: list[int], dtype: torch.dtype = INT64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.backend.device)

    def pages(self, fmt: str = "bf16", rows_per_page: int = 3, num_pages: int = 4) -> Pages:
        return Pages(self.backend, fmt, self.spec, num_pages, rows_per_page, gap=16)

    def store(self, pages: Pages, *also: Pages, **changed: object) -> None:
        given = {
            "slots": self.slots, "positions": self.positions, "spec": self.spec, "norm_weight": self.norm_weight,
            "rope": self.rope, "also": tuple(one.cache for one in also), "errors": self.errors, "backend": self.backend.name,
        }  # fmt: skip
        kvfold.store(changed.pop("rows", self.rows), pages.cache, **(given | changed))


@pytest.mark.parametrize(("fmt", "preset"), PRESETS)
def test_same_bytes_as_with_a_plan(backend: Backend, fmt: str, preset: str) -> None:
    step = Step(spec_of(preset, backend), backend)
    scale = 0.37 if FORMATS[fmt].takes_scale else 1.0
    planned, placed, ratio, device = step.pages(fmt, scale), step.pages(fmt, scale), step.spec.ratio, backend.device
    for dtype in (torch.float32, BF16):
        rows = step.pooled(dtype)
        step.store(rows, step.plan(SLOTS), planned)
        wide = torch.full((len(SLOTS), 3 * step.spec.head_dim), torch.nan, dtype=dtype, device=device)
        given = wide[:, step.spec.head_dim : 2 * step.spec.head_dim]  # of any row stride
        order = [2, 0, 3, 1]
        given.copy_(rows[order])
        kvfold.store(
            given,
            placed.cache,
            slots=torch.tensor([SLOTS[i] for i in order], dtype=INT32 if dtype == BF16 else INT64, device=device),
            positions=torch.tensor(
                [[0, ratio, 2 * ratio, 0][i] for i in order], dtype=INT64 if dtype == BF16 else INT32, device=device
            ),
            spec=step.spec,
            norm_weight=step.norm_weight,
            rope=step.rope,
            backend=backend.name,
        )
        assert same(planned, placed)


@pytest.mark.parametrize("spec", [SPEC, PLAIN, replace(SPEC, hadamard=True)], ids=["rope", "plain", "hadamard"])
def test_without_the_norm(backend: Backend, spec: CompressorSpec) -> None:
    """What is left is RoPE and Hadamard; the norm, done elsewhere, gives the entry of the whole call."""
    given = Rows(backend, spec)
    bare, at = given.pages("fp32"), given.slots
    given.store(bare, norm_weight=None)
    want = given.rows.double()
    if spec.rope_dim:
        want = reference.rope(want, given.rope, given.positions, spec.rope_dim)
    want = reference.hadamard(want) if spec.hadamard else want
    got = bare.cache.read(at)
    assert float((got - want).abs().max()) < 1e-5
    if spec is PLAIN:
        assert torch.equal(got, given.rows)
    whole, normed = given.pages("fp32"), reference.rms_norm(given.rows.double(), given.norm_weight.double(), spec.norm_eps)
    given.store(whole)
    given.store(bare, rows=normed.float(), norm_weight=None)
    assert float((bare.cache.read(at) - whole.cache.read(at)).abs().max()) < 1e-5 and int(given.errors) == 0


def test_positions_are_not_needed_without_rope(backend: Backend) -> None:
    given = Rows(backend, PLAIN)
    one, other = given.pages(), given.pages()
    given.store(one, positions=None, rope=None)
    given.store(other, positions=given.positions - 1000)  # not read
    assert same(one, other) and int(given.errors) == 0 and not same(one, given.pages())


@pytest.mark.parametrize("formats", [("fp32", "bf16"), ("bf16", "fp32"), ("bf16_trtllm", "fp32")])
def test_into_two_caches(backend: Backend, formats: tuple[str, str]) -> None:
    """Each cache gets what a call of its own gives it, whatever the pages of either; refused rows are counted once."""
    given = Rows(backend)
    one, other = given.pages(formats[0]), given.pages(formats[1], rows_per_page=5, num_pages=2)
    alone, apart = given.pages(formats[0]), given.pages(formats[1], rows_per_page=5, num_pages=2)
    given.store(one, other)
    assert int(given.errors) == 1  # slot 11 is in the first cache alone
    given.errors.zero_()
    given.store(alone)
    assert int(given.errors) == 0
    given.store(apart)
    assert int(given.errors) == 1
    assert same(one, alone) and same(other, apart) and not same(one, given.pages(formats[0]))
    given.store(other, one, norm_weight=None)
    given.store(apart, norm_weight=None)
    given.store(alone, norm_weight=None)
    assert same(one, alone) and same(other, apart)


def test_indexer_formats_together(backend: Backend) -> None:
    step = Step(kvfold.V4_INDEXER, backend)
    rows, at = step.pooled(), torch.tensor(SLOTS, device=backend.device)
    places = {"slots": at, "positions": torch.arange(4, device=backend.device) * 3, "spec": step.spec}
    how = {"norm_weight": step.norm_weight, "rope": step.rope, "backend": backend.name}
    for first, second in (("indexer_mxfp4", "indexer_fp8_vllm"), ("indexer_fp8_vllm", "bf16")):
        both, alone = ([step.pages(fmt) for fmt in (first, second)] for _ in range(2))
        kvfold.store(rows, both[0].cache, also=[both[1].cache], **places, **how)
        for pages in alone:
            kvfold.store(rows, pages.cache, **places, **how)
        assert all(same(a, b) for a, b in zip(both, alone, strict=True))


def test_skips_and_refusals(backend: Backend) -> None:
    """Negative slots are skipped in silence and their rows not read; what cannot be is skipped and counted."""
    given = Rows(backend)
    full, big = given.pages(), 1 << 40
    given.store(full)
    for dtype, slots, positions, kept, errors in (
        (INT64, [7, -1, 11, -9, 4, -big], None, [0, 2, 4], 0),
        (INT32, [-1, -2, -3, -4, -5, -(1 << 31)], [-1] * 6, [], 0),
        (INT64, [12, 0, big, 3, 13, (1 << 63) - 1], None, [1, 3], 4),
        (INT64, None, [5, 64, 0, -1, 17, big], [0, 2, 4], 3),
        (INT32, None, [-(1 << 31), 63, 65, 17, (1 << 31) - 1, 2], [1, 3, 5], 3),
        (INT64, [-1, 12, 11, 12, 4, -1], [64, 64, 64, 17, 17, -5], [4], 3),
    ):
        at = given.slots.to(dtype) if slots is None else given.ints(slots, dtype)
        where = given.positions.to(dtype) if positions is None else given.ints(positions, dtype)
        pages, blank = given.pages(), given.pages()
        rows = given.rows.clone()
        rows[[i for i in range(COUNT) if i not in kept]] = torch.nan
        given.errors.zero_()
        given.store(pages, rows=rows, slots=at, positions=where)
        assert int(given.errors) == errors, (slots, positions)
        given.store(pages, rows=rows, slots=at, positions=where, errors=None)  # uncounted, and the same
        only = given.slots.clone()
        only[[i for i in range(COUNT) if i not in kept]] = -1
        given.store(blank, slots=only)
        assert same(pages, blank), (slots, positions)


def test_nothing_to_do(backend: Backend) -> None:
    given = Rows(backend)
    pages = given.pages()
    given.store(pages, rows=given.rows[:0], slots=given.slots[:0], positions=given.positions[:0])
    given.store(pages, slots=torch.full_like(given.slots, -1))
    assert same(pages, given.pages()) and int(given.errors) == 0
    empty = EntryCache.allocate("bf16", 0, 3, SPEC, device=backend.device)
    how = {"spec": SPEC, "norm_weight": given.norm_weight, "rope": given.rope, "backend": backend.name}
    kvfold.store(given.rows, empty, slots=given.slots, positions=given.positions, errors=given.errors, **how)
    assert int(given.errors) == COUNT


def test_places_that_are_not_aligned(backend: Backend) -> None:
    """An engine passes slices of its slots, positions and counters."""
    given = Rows(backend)
    one, other = given.pages(), given.pages()
    given.store(one)
    shifted = {name: torch.cat([x[:1], x])[1:] for name, x in (("slots", given.slots), ("positions", given.positions.int()))}
    counters = given.ints([0, 0, 0], INT32)
    given.store(other, **shifted, errors=counters[1:2])
    assert same(one, other) and counters.tolist() == [0, 0, 0]
    given.store(other, **(shifted | {"slots": shifted["slots"] + 5}), errors=counters[1:2])
    assert counters.tolist() == [0, 3, 0]


def test_traced(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    given = Rows(backend)
    want = given.pages(), given.pages("fp32")
    given.store(*want)
    given.store(want[0], slots=given.slots + 1, norm_weight=None, errors=None)
    eager = int(given.errors)
    through_operators(monkeypatch)
    got = given.pages(), given.pages("fp32")
    given.errors.zero_()
    given.store(*got)
    given.store(got[0], slots=given.slots + 1, norm_weight=None, errors=None)
    assert same(want[0], got[0]) and same(want[1], got[1]) and int(given.errors) == eager


def test_compiled() -> None:
    given = Rows(Backend("torch", torch.device("cpu")))
    want, got = (given.pages(), given.pages("fp32")), (given.pages(), given.pages("fp32"))
    given.store(*want)

    def call(rows: Tensor, slots: Tensor, positions: Tensor, errors: Tensor) -> None:
        kvfold.store(
            rows * 1, got[0].cache, slots=slots, positions=positions, spec=SPEC, norm_weight=given.norm_weight,
            rope=given.rope, also=(got[1].cache,), errors=errors,
        )  # fmt: skip

    torch.compile(call, backend="aot_eager", fullgraph=True)(given.rows, given.slots, given.positions, given.errors)
    assert same(want[0], got[0]) and same(want[1], got[1])


def test_arguments(backend: Backend) -> None:
    """Every bad argument is named, and nothing has been written."""
    given = Rows(backend)
    pages, second = given.pages(), given.pages("fp32")
    other = Rows(backend, PLAIN).pages()
    step = Step(kvfold.V4_INDEXER, backend)
    shared = EntryCache(pages.cache.storage, "bf16", 2, SPEC)
    for error, name, changed in (
        (TypeError, "rows", {"rows": None}),
        (TypeError, "rows", {"rows": given.rows.half()}),
        (ValueError, "rows", {"rows": given.rows[:, :64]}),
        (ValueError, "rows", {"rows": given.rows.repeat(1, 2)[:, ::2]}),
        (ValueError, "rows", {"rows": given.rows.to("meta")}),
        (TypeError, "slots", {"slots": None}),
        (TypeError, "slots", {"slots": given.slots.float()}),
        (ValueError, "slots", {"slots": given.slots[:5]}),
        (ValueError, "slots", {"slots": given.slots.repeat_interleave(2)[::2]}),
        (TypeError, "positions", {"positions": None}),
        (TypeError, "positions", {"positions": given.positions.short()}),
        (ValueError, "positions", {"positions": given.positions[:, None]}),
        (TypeError, "errors", {"errors": given.slots[:1]}),
        (ValueError, "errors", {"errors": given.slots.int()}),
        (TypeError, "spec", {"spec": None}),
        (ValueError, "cache", {"spec": replace(SPEC, hadamard=True)}),
        (TypeError, "norm_weight", {"norm_weight": given.norm_weight.half()}),
        (ValueError, "norm_weight", {"norm_weight": given.norm_weight[:64]}),
        (TypeError, "rope", {"rope": None}),
        (ValueError, "rope", {"rope": given.rope[:, :8]}),
        (TypeError, "also", {"also": second.cache}),
        (TypeError, r"also\[0\]", {"also": (None,)}),
        (UnsupportedError, "also", {"also": (second.cache, second.cache)}),
        (ValueError, r"also\[0\]", {"also": (other.cache,)}),
        (ValueError, r"also\[0\]", {"also": (pages.cache,)}),
        (ValueError, r"also\[0\]", {"also": (shared,)}),
        (ValueError, "backend", {"backend": "cuda"}),
        (TypeError, "pdl", {"pdl": 1}),
    ):
        with pytest.raises(error, match=rf"^{name}\b" if "[" not in name else rf"^{name}"):
            given.store(pages, **({"also": (second.cache,)} | changed))
    assert same(pages, given.pages()) and same(second, given.pages("fp32")) and int(given.errors) == 0
    flat, memory = given.pages().cache, given.rows.clone().view(INT32)
    for changed in ({"errors": memory[0, :1]}, {"errors": flat.storage[0, :4].view(INT32)}):
        with pytest.raises(ValueError, match=r"errors must not share memory"):
            how = {"spec": SPEC, "norm_weight": None, "rope": given.rope, "backend": backend.name}
            kvfold.store(memory.view(torch.float32), flat, slots=given.slots, positions=given.positions, **how, **changed)
    plan, rest = step.plan(SLOTS), {"spec": step.spec, "norm_weight": step.norm_weight, "rope": step.rope}
    target = step.pages("bf16").cache
    for name, value in (("slots", given.slots), ("positions", given.positions), ("errors", given.errors), ("also", (target,))):
        with pytest.raises(TypeError, match=rf"^{name} must be left out with a plan"):
            kvfold.store(step.pooled(), plan, target, **rest, **{name: value})
    with pytest.raises(TypeError, match=r"^plan must be a StepPlan"):
        kvfold.store(step.pooled(), target, target, slots=given.slots, **rest)
    with pytest.raises(TypeError, match=r"^slots must be"):
        kvfold.store(step.pooled(), target, **rest)
    with pytest.raises(TypeError, match=r"^plan must be"):
        kvfold.store(step.pooled(), None, target, **rest)


def test_the_same_call_again_with_others(backend: Backend) -> None:
    """What is remembered of a cache's calls is of the arguments that it was for."""
    given = Rows(backend)
    one, other, second = given.pages(), given.pages(), given.pages("fp32")
    calls = (
        {},
        {"norm_weight": None},
        {"rows": given.rows.bfloat16()},
        {"slots": given.slots.int()},
        {"positions": given.positions.int()},
    )
    for changed in (*calls, *calls[::-1]):
        given.store(one, **changed)
        given.store(one, second, **changed)
        fresh, apart = EntryCache(other.cache.storage, "bf16", 3, SPEC), given.pages("fp32")
        kvfold.store(
            changed.get("rows", given.rows), fresh, slots=given.slots, positions=given.positions, spec=SPEC, rope=given.rope,
            norm_weight=changed.get("norm_weight", given.norm_weight), also=(apart.cache,), backend=backend.name,
        )  # fmt: skip
        assert same(one, other) and same(second, apart), changed
    assert ROWS_PER_PAGE == 3


@pytest.mark.gpu
def test_in_a_graph_behind_the_launch_that_made_its_places() -> None:
    """Slots, positions and rows are written by the launch before, in a graph that is replayed with others."""
    given = Rows(BACKENDS["cuda"])
    pages, slots, positions, rows = given.pages(), given.slots.clone(), given.positions.clone(), given.rows.clone()

    def step() -> None:
        slots.copy_(given.slots)
        positions.copy_(given.positions)
        rows.copy_(given.rows)
        given.store(pages, rows=rows, slots=slots, positions=positions)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for turn in range(4):
        given.slots.copy_(given.slots.roll(1))
        given.positions.add_(turn).remainder_(64)
        given.rows.mul_(1.5)
        graph.replay()
        want = given.pages()
        want.cache.storage.copy_(pages.cache.storage)
        given.store(want, pdl=False)
        assert same(pages, want) and int(given.errors) == 0
