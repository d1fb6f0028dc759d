"""A hidden state gives the same kv_score and the same entries, to the bit, in every batch, cut and form of the call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.helpers import Backend
from support.project_support import FOLD, NARROW, ROWS, SPECS, Projected, apart

import kvfold
from kvfold.backend_triton import table
from kvfold.testing.projected import make_hidden, make_weight

CUTS = ([24], [1] * 24, [4] * 6, [3, 8, 1, 12], [23, 1])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rounded", [False, True], ids=["", "rounded"])
def test_every_cut(name: str, rounded: bool, backend: Backend) -> None:
    """Prefill, chunks and decode, which take other tiles of the product and other kernels behind it."""
    hidden = make_hidden(24, 512)
    found = [Projected(SPECS[name], backend).run(hidden, cuts, round_kv_score=rounded) for cuts in CUTS]
    assert all(torch.equal(one, found[0]) for one in found[1:])
    assert found[0].any()


@pytest.mark.parametrize("name", ["fold", "rows"])
def test_whoever_else_is_in_the_batch(name: str, backend: Backend) -> None:
    """A sequence alone, and beside one that is before it, at another position and of another length."""
    hidden, other = make_hidden(20, 576, 1), make_hidden(40, 576, 2)
    alone = Projected(SPECS[name], backend, 576).run(hidden, [20])
    beside = Projected(SPECS[name], backend, 576)
    beside.step(other[:9], [(1, 0, 9)])
    at = 9
    for start, count, many in ((0, 3, 4), (3, 1, 1), (4, 8, 11), (12, 8, 5)):
        both = torch.cat([other[at : at + many], hidden[start : start + count]])
        beside.step(both, [(1, at, many), (0, start, count)])
        at += many
    assert torch.equal(beside.records(0), alone)


def test_kv_score_is_the_same_in_every_tile(backend: Backend) -> None:
    """A row alone and in batches that each row of the table serves, strided and behind others."""
    if backend.name == "torch":
        counts = (1, 5, 64, 65, 130)
    else:
        counts = (1, 16, 17, 33, 65) if backend.slow else (1, 16, 17, 33, 65, 129, 513, 2049, 5000)
    one = Projected(replace(FOLD, ratio=4096), backend, 512)
    hidden = make_hidden(counts[-1], 512).to(backend.device)
    one.state = kvfold.FoldState.allocate(one.spec, 2, counts[-1], device=backend.device)
    found = []
    for count in counts:
        at = counts[-1] - count
        kv_score = torch.full((count, 2 * 32 + 8), torch.nan, device=backend.device)[:, :64]
        one.step(hidden[at:], [(0, 0, count)], kv_score=kv_score)
        found.append(kv_score)
    for one_of, count in zip(found, counts, strict=True):
        assert torch.equal(one_of.view(torch.int32), found[-1][counts[-1] - count :].view(torch.int32))


@pytest.mark.parametrize("row", range(len(table.TILINGS)))
def test_every_row_of_the_table(row: int, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for a few tokens, where its tiles are not full; a hidden_dim whose last chunk is short, and one with empty ones."""
    if backend.name == "torch":
        pytest.skip("it has no table")
    # The interpreter's sums are those of the depth of a tile, which is 64 for these.
    for width in (320, 448) if backend.slow else (320, 448, 832, 4096):
        hidden = make_hidden(5, width)
        hidden[2] = 0
        right = Projected(ROWS, backend, width).run(hidden, [5])
        with monkeypatch.context() as patch:
            patch.setattr(table, "TILINGS", (replace(table.TILINGS[row], max_tokens=table.ANY, max_columns=table.ANY),))
            assert torch.equal(Projected(ROWS, backend, width).run(hidden, [5]), right)


@pytest.mark.parametrize("form", ["two", "far", "turned", "kv_score", "bf16"])
def test_every_form(form: str, backend: Backend) -> None:
    """The weight in two tensors, behind each other or not in memory; and with a kv_score of the caller's."""
    hidden, rounded = make_hidden(20, 512), form == "bf16"
    for spec in (FOLD, ROWS):
        right = Projected(spec, backend).run(hidden, [4] * 5, round_kv_score=rounded)
        one, half = Projected(spec, backend), spec.channels
        more: dict = {"round_kv_score": rounded}
        if form == "two":
            more["weight"] = one.weight[:half], one.weight[half:]
        elif form in ("far", "turned"):
            more["weight"] = apart(one.weight, form == "turned")
        else:
            dtype = torch.bfloat16 if rounded else torch.float32
            more["kv_score"] = torch.empty(4, spec.kv_score_width, dtype=dtype, device=backend.device)
        assert torch.equal(one.run(hidden, [4] * 5, **more), right)


def test_one_tensor_as_both(backend: Backend) -> None:
    one, other, hidden = Projected(FOLD, backend), Projected(FOLD, backend), make_hidden(20, 512)
    values = one.weight[:32]
    assert torch.equal(one.run(hidden, [20], weight=(values, values)), other.run(hidden, [20], weight=torch.cat([values] * 2)))


@pytest.mark.parametrize("form", ["stacked", "list", "tuples", "asked"])
@pytest.mark.parametrize("cuts", [[20], [1] * 6, [4] * 5], ids=["prompt", "one", "drafts"])
def test_two_compressors(form: str, cuts: list[int], backend: Backend) -> None:
    """Main and indexer at once, as each by itself."""
    specs, hidden = (ROWS, NARROW), make_hidden(20, 512)
    right = [Projected(spec, backend).run(hidden, cuts) for spec in specs]
    both = [Projected(spec, backend) for spec in specs]
    weights: object = [one.weight for one in both]
    if form == "stacked":
        weights = torch.cat(weights)
    elif form == "tuples":
        weights = [apart(one.weight, turned) for one, turned in zip(both, (False, True), strict=True)]
    at = 0
    for count in cuts:
        plan = both[0].plan([(0, at, count)])
        given = []
        for one in both:
            kv_score = torch.empty(count, one.spec.kv_score_width, device=backend.device) if form == "asked" else None
            given.append((kv_score, one.state, one.cache, *one.given.values()))
        kvfold.project_compress_many(hidden[at : at + count].to(backend.device), weights, given, plan, backend=backend.name)
        assert int(plan.errors) == 0
        at += count
    assert all(torch.equal(one.records(0), records) for one, records in zip(both, right, strict=True))


def test_rounded_as_compress_would_be_given_it(backend: Backend) -> None:
    """What is folded is kv_score as it comes back: `compress` of that gives the same records."""
    hidden = make_hidden(20, 512)
    for spec, dtype in ((FOLD, torch.float32), (ROWS, torch.bfloat16), (ROWS, torch.float32)):
        one, other = Projected(spec, backend), Projected(spec, backend)
        kv_score = torch.empty(20, spec.kv_score_width, dtype=dtype, device=backend.device)
        found = one.run(hidden, [20], kv_score=kv_score, round_kv_score=True)
        plan = other.plan([(0, 0, 20)])
        kvfold.compress(kv_score, plan, other.state, other.cache, backend=backend.name, **other.given)
        assert torch.equal(found, other.records(0))
        assert torch.equal(kv_score.float(), kv_score.bfloat16().float())


def test_input_rows_in_bf16(backend: Backend) -> None:
    hidden = make_hidden(20, 512)
    right = Projected(ROWS, backend).run(hidden, [20], round_kv_score=True)
    assert torch.equal(Projected(ROWS, backend, kept=torch.bfloat16).run(hidden, [4] * 5, round_kv_score=True), right)


def test_other_states(backend: Backend) -> None:
    """A `MeanState`, and no state: `compress` of the same kv_score."""
    hidden = make_hidden(20, 512).to(backend.device)
    one, other = Projected(FOLD, backend), Projected(FOLD, backend)
    for each in (one, other):
        each.state = kvfold.MeanState.allocate(FOLD, 2, device=backend.device)
    for at, count in ((0, 13), (13, 4), (17, 3)):
        kv_score = torch.empty(count, FOLD.kv_score_width, device=backend.device)
        one.step(hidden[at : at + count], [(0, at, count)])
        other.step(hidden[at : at + count], [(0, at, count)], kv_score=kv_score)
    assert torch.equal(one.records(0), other.records(0))
    assert torch.equal(one.state.rows[0], other.state.rows[0])


def test_what_it_leaves_alone(backend: Backend) -> None:
    """Rows of kv_score beyond its columns; nothing happens without tokens."""
    one = Projected(FOLD, backend)
    room = torch.full((6, FOLD.kv_score_width + 16), 7.0, device=backend.device)
    one.step(make_hidden(4, 512), [(0, 0, 4)], kv_score=room[1:5, :64])
    assert (room[0] == 7).all() and (room[5] == 7).all() and (room[:, 64:] == 7).all()
    assert not (room[1:5, :64] == 7).any()


def test_weights_of_every_seed_differ() -> None:
    """What the tests above compare is not all alike."""
    assert not torch.equal(make_weight(FOLD.kv_score_width, 512), make_weight(FOLD.kv_score_width, 512, 1))
