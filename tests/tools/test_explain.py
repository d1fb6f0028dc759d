"""`explain` says what a step does: a real step on the torch backend changes the rows and bytes it names, and no others."""

from __future__ import annotations

import pytest
import torch
from support.helpers import SPECS, bits

import kvfold
from kvfold import CompressorSpec, testing
from kvfold.explain import explain
from kvfold.storage.formats import FORMATS
from kvfold.testing import Engine, Step, make_tokens, make_weights

PLAIN4 = CompressorSpec(head_dim=64, ratio=4, rope_dim=16)
STEPS = {"hca": [(0, 300), (127, 1), (128, 1), (250, 9), (383, 5)], "csa": [(0, 7), (6, 1), (9, 4), (23, 17), (40, 4)]}
CASES = [(name, *step) for name, steps in STEPS.items() for step in steps]
ROWS_PER_PAGE = 3


def sequence(spec: CompressorSpec, start: int, new: int, fmt: str, kind: str) -> Engine:
    """One sequence of the real width, of `start + new` tokens, that has taken the first `start`."""
    draw, length = torch.Generator().manual_seed(4), start + new
    tokens = make_tokens(spec, [length], "normal", draw, torch.float32, "cpu")
    weights = make_weights(spec, length, "normal", draw, torch.float32, "cpu")
    options = {"rows_per_page": ROWS_PER_PAGE, "shuffled": False, "rows": None, "backend": "torch"}
    engine = Engine.make(tokens, weights, kind=kind, fmt=fmt, **options)
    engine.run([Step.of((0, 0, start))] if start else [])
    return engine


@pytest.mark.parametrize("name, start, new", CASES)
def test_exactly_the_explained_state_rows_change(name: str, start: int, new: int) -> None:
    spec = SPECS[name]
    said = explain(spec, start, new, max_new_tokens=4)
    real = sequence(spec, start, new, "bf16", "fold")
    assert isinstance(real.state, kvfold.FoldState)
    assert (said.kind, said.ring, said.places) == (real.state.kind, real.state.ring, real.state.places)
    tags, rows = real.state.held()[0], bits(real.state.rows[0]).clone()
    own, lo = start - start % spec.ratio, real.state.places[0] * spec.ratio
    for row in said.reads:
        assert tags[row.row] == row.position and row.half == ("" if not spec.overlap else "hi" if row.row >= lo else "lo")
    halves = [*real.state.history_of(start), *(range(own, start) if spec.overlap else ())]
    assert [row.position for row in said.reads] == halves
    assert real.take(Step.of((0, start, new))) == 0
    after = real.state.held()[0]
    changed = (bits(real.state.rows[0]) != rows).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert sorted(row.row for row in said.writes) == changed
    for row in said.writes:
        assert after[row.row] == row.position
    expected = tags.clone()
    for row in said.writes:
        expected[row.row] = row.position
    for row in said.emptied:
        assert tags[row.row] == row.position
        expected[row.row] = -1
    assert torch.equal(after, expected)


@pytest.mark.parametrize("name, start, new", CASES)
def test_exactly_the_explained_starts_are_accepted(name: str, start: int, new: int) -> None:
    spec = SPECS[name]
    said = explain(spec, start, new, max_new_tokens=4)
    real = sequence(spec, start, new, "bf16", "fold")
    assert isinstance(real.state, kvfold.FoldState)
    real.take(Step.of((0, start, new)))
    tags, rows, accepted = real.state.positions.clone(), real.state.rows.clone(), []
    for p in range(max(0, start + new - 40), start + new):
        accepted += [p] if real.take(Step.of((0, p, 1))) == 0 else []
        real.state.positions.copy_(tags)
        real.state.rows.copy_(rows)
    first = max(0, start + new - 40)
    told = {p for p in said.starts if first <= p < start + new}
    told |= {p for p in range(first, start + new) if said.any_window and p % spec.ratio == 0}
    assert sorted(told) == accepted and start + new in said.starts
    if new <= 4:
        assert set(range(start, start + new + 1)) <= set(said.starts)


@pytest.mark.parametrize("fmt", sorted(FORMATS))
def test_exactly_the_explained_bytes_change(fmt: str) -> None:
    spec = SPECS["indexer" if FORMATS[fmt].head_dims == (128,) else "csa"]
    said = explain(spec, 11, 22, fmt=fmt, rows_per_page=ROWS_PER_PAGE)
    real = sequence(spec, 11, 22, fmt, "fold")
    for buffer in (real.cache.pages, real.cache.scale_pages):
        if buffer is not None:
            buffer.fill_(0xA5)
    assert real.take(Step.of((0, 11, 22))) == 0
    once = [None if b is None else b.clone() for b in (real.cache.pages, real.cache.scale_pages)]
    for buffer in (real.cache.pages, real.cache.scale_pages):
        if buffer is not None:
            buffer.fill_(0x5A)
    assert real.take(Step.of((0, 11, 22))) == 0  # a byte that is written has the same value under both fills
    for name, one, other in zip(("page", "scale page"), once, (real.cache.pages, real.cache.scale_pages), strict=True):
        spans = [span for entry in said.entries for span in entry.spans if span.buffer == name]
        if one is None:
            assert not spans
            continue
        told = torch.zeros_like(one, dtype=torch.bool)
        for span in spans:
            assert not told[span.page, span.start : span.stop].any()
            told[span.page, span.start : span.stop] = True
        assert torch.equal(told, one == other)
    assert [entry.window for entry in said.entries] == list(range(2, 8))


@pytest.mark.parametrize("state", ["fold", "window"])
@pytest.mark.parametrize("name", ["hca", "csa"])
def test_entries_are_made_of_the_explained_positions(name: str, state: str) -> None:
    """A NaN in a half row reaches the entries that take it, and no others."""
    spec = SPECS[name]
    start = 0
    new = 2 * spec.ratio + 3
    said = explain(spec, start, new, state=state)
    for position in (0, spec.ratio - 1, spec.ratio, new - 1):
        for half in ("lo", "hi"):
            real = sequence(spec, start, new, "fp32", state)
            lo = slice(0, spec.head_dim) if spec.overlap else slice(0, 0)
            real.tokens[0][position, lo if half == "lo" else slice(spec.channels - spec.head_dim, spec.channels)] = torch.nan
            assert real.take(Step.of((0, start, new))) == 0
            hit = real.cache.read(torch.arange(len(said.entries))).isnan().any(1).nonzero()[:, 0].tolist()
            assert hit == [entry.window for entry in said.entries if position in getattr(entry, half)]


@pytest.mark.parametrize("name, start, new", [("hca", 250, 9), ("csa", 9, 4), ("csa", 12, 3)])
def test_exactly_the_explained_raw_rows_are_read_and_written(name: str, start: int, new: int) -> None:
    spec = SPECS[name]
    said = explain(spec, start, new, state="window", page_size=8)
    real = sequence(spec, start, new, "fp32", "window")
    assert isinstance(real.state, kvfold.WindowState)
    assert said.kind == "window"
    read = {(row.page, row.row) for row in said.reads}
    for page in range(real.state.num_pages):
        for row in range(8):
            if (page, row) not in read:
                real.state.kv[page, row] = torch.nan  # read or not: it must not reach an entry
    real.take(Step.of((0, start, new)))
    entries = explain(spec, start, new, rows_per_page=ROWS_PER_PAGE).entries
    slots = torch.tensor([entry.page * ROWS_PER_PAGE + entry.row for entry in entries], dtype=torch.int64)
    assert not real.cache.read(slots).isnan().any()
    written = [(p // 8, p % 8) for p in range(start, start + new)]
    assert [(row.page, row.row) for row in said.writes] == written
    finite = (~real.state.kv.isnan().any(2)).nonzero().tolist()
    assert {tuple(x) for x in finite} == read | set(written)
    spoiled = sequence(spec, start, new, "fp32", "window")
    for page, row in read:  # each of them is needed
        kept = spoiled.state.kv[page, row].clone()
        spoiled.state.kv[page, row] = torch.nan
        spoiled.take(Step.of((0, start, new)))
        assert spoiled.cache.read(slots).isnan().any()
        spoiled.state.kv[page, row] = kept


@pytest.mark.parametrize("pages", [1, 2, 3])
@pytest.mark.parametrize("name, start, new", [("csa", 9, 4), ("csa", 23, 17), ("csa", 4, 2), ("v41", 7, 3), ("v41", 2, 1)])
def test_rings_keep_the_explained_rows(name: str, start: int, new: int, pages: int) -> None:
    """A row that is read is needed, one that is written is another afterwards, and named starts give the right bits."""
    spec = SPECS["csa"] if name == "csa" else kvfold.CompressorSpec(head_dim=32, ratio=2, has_ape=False, rope_dim=8)
    size, tail = 8 if name == "csa" else 2, 9
    said = explain(spec, start, new, state="window", page_size=size, ring=pages)
    assert said.ring == pages * size and said.kind == "window"
    tokens = make_tokens(spec, [start + new + tail], "normal", torch.Generator().manual_seed(4), torch.float32, "cpu")
    weights = make_weights(spec, 99, "normal", torch.Generator().manual_seed(4), torch.float32, "cpu")

    def engine(ring: bool = True) -> Engine:
        state = testing.make_pools(spec, pages if ring else 30, size, torch.float32, "cpu")
        table = [list(range(pages if ring else 30))]
        where = {"kv": table, "score": table, "ring": ring, "pages": [range(99)], "rows_per_page": 1, "backend": "torch"}
        made = Engine(tokens, weights, state, None, **where)
        made.run([Step.of((0, 0, start))])
        return made

    real = engine()
    before = real.state.kv.clone()
    assert real.take(Step.of((0, start, new))) == 0
    changed = (bits(real.state.kv) != bits(before)).any(2).nonzero().tolist()
    assert sorted([row.page, row.row] for row in said.writes) == changed
    whole = engine(False)
    whole.run([Step.of((0, start, new + tail))])
    windows = slice(start // spec.ratio, (start + new) // spec.ratio)
    for row in said.reads:
        spoiled = engine()
        spoiled.state.kv[row.page, row.row] = torch.nan
        spoiled.take(Step.of((0, start, new)))
        assert spoiled.pooled[0][windows].isnan().any(), row
    for p in range(start, start + new + 1):
        again = engine()
        again.run([Step.of((0, start, new)), Step.of((0, p, start + new + tail - p))])
        same = torch.equal(again.pooled[0][p // spec.ratio :], whole.pooled[0][p // spec.ratio :])
        assert same == (p in said.starts or (said.any_window and p % spec.ratio == 0)), p


def test_other_specs_and_errors() -> None:
    said = explain(PLAIN4, 5, 3)
    assert said.kind == "rows" and [(entry.lo, entry.hi) for entry in said.entries] == [(range(0), range(4, 8))]
    assert explain(kvfold.V4_HCA, 0, 1).entries == ()
    for arguments, word in (
        ({"start": -1, "new": 1}, "start"),
        ({"start": 0, "new": 0}, "new"),
        ({"start": 0, "new": 4, "fmt": "fp7"}, "fmt"),
        ({"start": 0, "new": 4, "fmt": "indexer_mxfp4"}, "head_dim"),
        ({"start": 0, "new": 1, "state": "ring"}, "state"),
        ({"start": 0, "new": 1, "page_size": 0}, "page_size"),
        ({"start": 0, "new": 1, "ring": 1}, "^ring must be 0 without"),
        ({"start": 0, "new": 1, "state": "window", "page_size": 3, "ring": 2}, "^ring must be of 7 rows at least"),
    ):
        with pytest.raises(ValueError, match=word):
            explain(kvfold.V4_CSA, **arguments)
