"""`FoldStatePool`, which needs no SGLang: slots, snapshots, transfer and rejected drafts."""

from __future__ import annotations

import ctypes

import pytest
import torch

import kvfold
from kvfold.integrations.sglang import FoldStatePool

SPECS = {"C4": kvfold.V4_CSA, "indexer": kvfold.V4_INDEXER, "C128": kvfold.V4_HCA, "R2": kvfold.V41_MAIN_R2}
N, PAGES = 640, 4


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Text:
    def __init__(self, spec: kvfold.CompressorSpec) -> None:
        draw = torch.Generator().manual_seed(1)
        self.spec, self.rows = spec, torch.randn(N, spec.kv_score_width, generator=draw)
        self.ape = torch.randn(spec.ratio, spec.channels, generator=draw) if spec.has_ape else None
        self.errors = ints(0)

    def step(self, pool: FoldStatePool, slot: int, start: int, new: int, pages: torch.Tensor | None = None) -> torch.Tensor:
        """The pooled rows of a step of this text."""
        spec = self.spec
        kept = {} if pages is None or pool.snapshots is None else {"snapshot_table": pages[None], "snapshot_page_size": 256}
        plan = kvfold.StepPlan.build(
            spec.ratio, ints(start), ints(0, new), new, state_slots=ints(slot), errors=self.errors, **kept
        )
        rows = torch.zeros(plan.entry_capacity, spec.head_dim)
        kvfold.compress(
            self.rows[start : start + new],
            plan,
            pool.state,
            None,
            spec=spec,
            ape=self.ape,
            norm_weight=None,
            rope=None,
            rows=rows,
            snapshots=pool.snapshots if kept else None,
        )
        return rows[: (start + new) // spec.ratio - start // spec.ratio]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("length", [1, 3, 127, 128, 256, 301])
def test_transfer(name: str, length: int) -> None:
    """Items that the indices name are all that another pool needs, in another slot; at most one, and none if none is needed."""
    text = Text(SPECS[name])
    here, there = (FoldStatePool(text.spec, 5, 4) for _ in range(2))
    there.slot_rows.fill_(77)
    text.step(here, 2, 0, length)
    mine, its = here.transfer_indices(2, length), there.transfer_indices(4, length)
    assert mine == [2] * len(its) and its == [4] * len(mine)
    assert len(mine) == (length % text.spec.ratio > 0 or text.spec.overlap)
    for a, b, size in zip(here.buf_infos()[0], there.buf_infos()[0], here.buf_infos()[2], strict=True):
        for i, j in zip(mine, its, strict=True):
            ctypes.memmove(b + j * size, a + i * size, size)
    whole = text.step(FoldStatePool(text.spec, 1, 4), 0, 0, 640)
    assert torch.equal(text.step(there, 4, length, 640 - length), whole[length // text.spec.ratio :])
    assert int(text.errors) == 0


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("hit", [256, 512])
def test_prefix_hit(name: str, hit: int) -> None:
    """In the slot of a former owner, behind a prefill in chunks; what leaves nothing at the end of a page has no pages."""
    text = Text(SPECS[name])
    pool = FoldStatePool(text.spec, 3, 1, num_pages=PAGES)
    assert (pool.page_rows is None) == (not text.spec.overlap) == (pool.page_buf_infos()[0] == [])
    pages = ints(3, 1, 0)
    other = Text(text.spec)
    other.rows = -other.rows
    other.step(pool, 2, 0, 300)
    whole = torch.cat([text.step(pool, 1, at, 80, pages) for at in range(0, N, 80)])
    pool.on_prefix_hit(ints(2, -1), ints(int(pages[hit // 256 - 1]), 0), ints(hit, 0), text.errors)
    assert torch.equal(text.step(pool, 2, hit, N - hit, pages), whole[hit // text.spec.ratio :])
    assert int(text.errors) == 0


def test_a_page_of_other_positions_is_refused() -> None:
    text = Text(kvfold.V4_CSA)
    pool = FoldStatePool(text.spec, 3, 1, num_pages=PAGES)
    text.step(pool, 1, 0, 300, ints(3, 1, 0))
    pool.on_prefix_hit(ints(2), ints(1), ints(256), text.errors)  # page 1 is not yet full
    assert int(text.errors) == 1


@pytest.mark.parametrize("name", SPECS)
def test_rejected_drafts_need_nothing(name: str) -> None:
    text = Text(SPECS[name])
    pool = FoldStatePool(text.spec, 2, 4)
    whole = text.step(FoldStatePool(text.spec, 1, 1), 0, 0, 300)
    rows, at = [text.step(pool, 1, 0, 117)], 117
    for accepted in (1, 2, 3, 4, 3, 2, 1, 4, 4):
        right = text.rows.clone()
        text.rows[at + accepted : at + 4] = 7.0
        made = text.step(pool, 1, at, 4)
        text.rows = right
        rows.append(made[: (at + accepted) // text.spec.ratio - at // text.spec.ratio])
        at += accepted
    rows.append(text.step(pool, 1, at, 300 - at))
    assert torch.equal(torch.cat(rows), whole) and int(text.errors) == 0


@pytest.mark.parametrize("changed", [{"num_slots": -1}, {"num_slots": 2.5}, {"num_pages": -3}, {"num_pages": "4"}])
def test_wrong_sizes_are_named(changed: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(changed))} must be"):
        FoldStatePool(**({"spec": kvfold.V4_CSA, "num_slots": 2} | changed))


def test_cleared_slots_are_refused() -> None:
    text = Text(kvfold.V4_HCA)
    pool = FoldStatePool(text.spec, 2, 1)
    text.step(pool, 1, 0, 5)
    pool.clear(ints(1))
    text.step(pool, 1, 5, 1)
    assert int(text.errors) == 1
    text.step(pool, 1, 0, 130)
    assert int(text.errors) == 1
