"""Pages that are shorter than a window, of which each 8 rows of a window share one: what vLLM has at ratio 128."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend, Weights, bits, make_tokens, norm_error
from support.window_support import SCORE, VALUE, WindowEngine

import kvfold
from kvfold import CompressorSpec, StepPlan
from kvfold.backend_triton.keys import pages_of
from kvfold.contract import pooled_bound

LONG, SHORT = CompressorSpec(head_dim=128, ratio=128), CompressorSpec(head_dim=128, ratio=16)
SPECS = {"128": LONG, "16": SHORT}
TOP, BOTTOM = (1 << 31) - 1, -(1 << 31)


def test_how_windows_lie_on_pages() -> None:
    overlap = CompressorSpec(head_dim=128, ratio=4, overlap=True)
    asked = [(LONG, 256), (LONG, 128), (LONG, 64), (LONG, 24), (LONG, 8), (LONG, 4), (LONG, 12), (SHORT, 8), (overlap, 8)]
    assert [pages_of(*one) for one in asked] == ["one", "one", "lanes", "lanes", "lanes", "any", "any", "lanes", "one"]
    assert pages_of(CompressorSpec(head_dim=128, ratio=16, overlap=True), 8) == "any"


@pytest.mark.parametrize("name, page_size", [("16", 8), ("16", 24), ("128", 8), ("128", 24), ("128", 64)])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_steps_that_end_a_window(backend: Backend, name: str, page_size: int, state_dtype: torch.dtype) -> None:
    """New rows of 1 to 9 tokens, of which 9 are more than share a page: the bits of windows on one page each."""
    if backend.slow and state_dtype == torch.bfloat16 and (name, page_size) not in (("16", 8), ("128", 24)):
        pytest.skip("the interpreter does one page size of each ratio in bf16")
    spec, new = SPECS[name], (1, 4, 8, 9)
    tokens, weights = make_tokens(spec, 2 * spec.ratio + 3, seed=71), Weights.make(spec)
    found = []
    for size in (spec.ratio, page_size):
        engine = WindowEngine(
            spec, backend, num_sequences=len(new) + 1, length=len(tokens), page_size=size, state_dtype=state_dtype,
            weights=weights, one_pool=size == 8,
        )  # fmt: skip
        starts = [2 * spec.ratio - n for n in new]
        for i, start in enumerate(starts):
            engine.put(i, tokens[:start])
        step = engine.step([(i, start, tokens[start : 2 * spec.ratio + 3 * (i == 1)]) for i, start in enumerate(starts)])
        found.append([step.pooled[i, 1] for i in range(len(new))])
    for n, one, other in zip(new, *found, strict=True):
        assert torch.equal(bits(one), bits(other)), f"{n} new tokens"


# The step adds 4 positions, 124..127, the last of window 0, whose pages are 8 positions long: columns 0 to 15.
BAD_PAGES = {
    # what: (changes of a table as (pool, column, page), errors, whether the entry is made)
    "no page to read values": ([(VALUE, 0, -1)], 1, False),
    "no page to read scores": ([(SCORE, 7, -1)], 1, False),
    "no page for the last rows": ([(VALUE, 15, -1)], 1, False),
    "a page beyond the pool": ([(SCORE, 14, TOP)], 1, False),
    "a page far below": ([(VALUE, 3, BOTTOM)], 1, False),
    "none at all": ([(pool, column, -1) for pool in (VALUE, SCORE) for column in range(16)], 1, False),
    "all wrong": ([(pool, column, -2) for pool in (VALUE, SCORE) for column in range(16)], 1, False),
}


@pytest.mark.parametrize("what", BAD_PAGES)
def test_bad_pages(backend: Backend, what: str) -> None:
    changes, errors, made = BAD_PAGES[what]
    engine, tokens = WindowEngine(LONG, backend, num_sequences=2, length=128, page_size=8), make_tokens(LONG, 128, seed=72)
    for i in range(2):
        engine.put(i, tokens[:124])
        engine.give(i, 128)
    for pool, column, page in changes:
        engine.tables[pool][0, column] = page
    step = engine.step([(0, 124, tokens[124:]), (1, 124, tokens[124:])], strict=False)
    assert step.errors == errors and set(step.pooled) == {(1, 0)} | ({(0, 0)} if made else set())
    assert norm_error(step.pooled[1, 0][None], engine.reference(tokens)) <= pooled_bound(128)


@pytest.mark.parametrize("page, errors", [(-1, 0), (-3, 1)])
def test_last_rows_that_are_all_new_need_no_page(backend: Backend, page: int, errors: int) -> None:
    """Their page is not read: without one the rows are not kept, and a wrong one is counted."""
    engine, tokens = WindowEngine(LONG, backend, num_sequences=1, length=128, page_size=8), make_tokens(LONG, 128, seed=73)
    engine.put(0, tokens[:120])
    engine.give(0, 128)
    for table in engine.tables:
        table[0, 15] = page
    step = engine.step([(0, 120, tokens[120:])], strict=False)
    made = torch.stack([step.pooled[0, 0]])
    assert step.errors == errors and norm_error(made, engine.reference(tokens)) <= pooled_bound(128)


@pytest.mark.parametrize(
    "columns, made", [((16, 15), False), ((3, 16), False), ((16, 0), False), ((0, 0), False), ((16, 16), True)]
)
def test_tables_that_are_too_narrow(backend: Backend, columns: tuple[int, int], made: bool) -> None:
    engine, tokens = WindowEngine(LONG, backend, num_sequences=1, length=128, page_size=8), make_tokens(LONG, 128, seed=74)
    engine.put(0, tokens[:124])
    engine.give(0, 128)
    engine.tables = [table[:, :width] for table, width in zip(engine.tables, columns, strict=True)]
    step = engine.step([(0, 124, tokens[124:])], strict=False)
    assert step.errors == (not made) and set(step.pooled) == ({(0, 0)} if made else set())


def test_pools_without_pages(backend: Backend) -> None:
    """Nothing is read of them."""
    device = backend.device
    rows = torch.zeros(4, 2 * LONG.head_dim, device=device)
    table = torch.full((1, 16), -1, dtype=torch.int32, device=device)
    pooled = torch.full((1, LONG.head_dim), 777.0, device=device)
    ends, start = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 4], [124]))
    plan = StepPlan.build(128, start, ends, 4, block_tables=(table, table), page_size=8)
    state = kvfold.WindowState.allocate(LONG, 0, 8, device=device)
    ape = torch.zeros(128, 128, device=device)
    given = {"norm_weight": None, "rope": None, "rows": pooled, "backend": backend.name}
    kvfold.compress(rows, plan, state, None, spec=LONG, ape=ape, **given)
    assert int(plan.errors) == 1 and (pooled == 777).all()


@pytest.mark.parametrize("way", ["int64", "int32 of a wider table"])
def test_tables_of_an_engine(backend: Backend, way: str) -> None:
    """Columns of other tables, in which page 0 is none's, and pages that lie apart: vLLM's. The bits of plain ones."""
    spec, device, end = LONG, backend.device, 256
    tokens, weights = make_tokens(spec, end, seed=75), Weights.make(spec)
    engine = WindowEngine(spec, backend, num_sequences=2, length=end, page_size=8, weights=weights)
    for i in range(2):
        engine.put(i, tokens[: end - 4])
        engine.give(i, end)
    pages = engine.state.num_pages
    wide = torch.full((pages + 1, 8 * 2 * spec.channels + 32), torch.nan, device=device)
    pool = wide.as_strided((pages + 1, 8, 2 * spec.channels), (wide.stride(0), 2 * spec.channels, 1))
    for half, mine in zip(pool.chunk(2, dim=2), engine.pools, strict=True):
        half[1:] = mine[:pages]
    dtype = torch.int64 if way == "int64" else torch.int32
    tables = [torch.full((3, 40), -9, dtype=dtype, device=device) for _ in range(2)]
    for table, mine in zip(tables, engine.tables, strict=True):
        table[1:, 2:34] = mine[:, :32].to(device) + 1
        table[2, 2 + 16] = 0  # none's: sequence 1 lacks a page of window 1
    ends, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 4, 8], [end, end]))
    plan = StepPlan.build(
        spec.ratio, None, ends, 4, seq_lens=lengths, block_tables=tuple(table[1:, 2:34] for table in tables), page_size=8,
        null_page=0,
    )  # fmt: skip
    pooled = torch.full((2, spec.head_dim), 777.0, device=device)
    state = kvfold.WindowState(*pool.chunk(2, dim=2))
    rows = tokens[end - 4 :].repeat(2, 1).to(device)
    given = {"spec": spec, "ape": weights.ape.to(device), "norm_weight": None, "rope": None}
    given |= {"rows": pooled, "backend": backend.name}
    kvfold.compress(rows, plan, state, None, **given)
    plain = engine.step([(0, end - 4, tokens[end - 4 :])]).pooled[0, 1]
    assert torch.equal(bits(pooled[0].cpu()), bits(plain))
    assert int(plan.errors) == 1 and (pooled[1] == 777).all()
