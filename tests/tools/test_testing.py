"""The miniature engine: its runs give the same bits however they are cut, and what is wrong is an error."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend, bits, norm_error

from kvfold import CompressorSpec, Snapshots, check, reference
from kvfold.contract import pooled_bound
from kvfold.testing import Engine, Step, chunks, drafts, make_tokens, make_weights, prefill, run_many
from kvfold.testing.engine import UNWRITTEN
from kvfold.testing.projected import make_hidden, make_scaled_weight, make_weight

LENGTHS = [37, 20, 9]
LONG = CompressorSpec(head_dim=16, ratio=16, rope_dim=8)
SHORT = CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8)
OTHER = CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=8, hadamard=True)
CUTS = [chunks(LENGTHS), drafts(LENGTHS, 1, 15), drafts(LENGTHS, 4, 6)]


def made(spec: CompressorSpec, backend: Backend, **options: object) -> Engine:
    draw = torch.Generator().manual_seed(1)
    tokens = make_tokens(spec, LENGTHS, "normal", draw, torch.float32, backend.device)
    weights = make_weights(spec, max(LENGTHS), "normal", draw, torch.float32, backend.device)
    return Engine.make(tokens, weights, backend=backend.name, **options)


def check_same(one: Engine, other: Engine) -> None:
    for got, want in zip(one.pooled + one.entries(), other.pooled + other.entries(), strict=True):
        assert torch.equal(bits(got), bits(want)) and not got.isnan().any()


@pytest.mark.parametrize("kind", ["fold", "window"])
@pytest.mark.parametrize("spec", [LONG, SHORT], ids=["long", "short"])
def test_the_same_bits_however_cut(backend: Backend, spec: CompressorSpec, kind: str) -> None:
    """In slots and pages whose former owner left NaN, too."""
    whole = made(spec, backend, kind=kind)
    whole.run(prefill(LENGTHS))
    for got, tokens in zip(whole.pooled, whole.tokens, strict=True):
        want = reference.pooled(tokens.cpu(), spec, whole.weights["ape"].cpu())
        assert len(got) == len(want) and (len(got) == 0 or norm_error(got.cpu(), want) <= pooled_bound(spec.window_rows))
    for steps in CUTS:
        cut = made(spec, backend, kind=kind)
        cut.run(chunks(LENGTHS), wrong=True)
        cut.run(steps)
        check_same(cut, whole)


def test_schedules_keep_every_token() -> None:
    for steps in [prefill(LENGTHS), *CUTS]:
        at = [0] * len(LENGTHS)
        for step in steps:
            assert step.bound == max(part.new for part in step.parts)
            for part in step.parts:
                assert part.start == at[part.sequence] and 0 <= part.kept <= part.new
                at[part.sequence] += part.kept
        assert at == LENGTHS
    assert {(part.new, part.kept) for step in CUTS[2][1:] for part in step.parts} >= {(4, kept) for kept in range(5)}


def test_a_prefix_hit(backend: Backend) -> None:
    kept = Snapshots.allocate(SHORT, 7, 8, device=backend.device)
    engine = made(SHORT, backend, snapshots=kept, snapshot_pages=[[3, 0, 6, 1], [2, 5], [4]])
    engine.run(chunks(LENGTHS))
    before = engine.pooled[0].clone()
    engine.pooled[0].zero_()
    engine.hit(0, 16, next(slot for slot in range(4) if slot not in engine.slots))
    engine.run([Step.of((0, 16, 21))])
    assert torch.equal(bits(engine.pooled[0][4:]), bits(before[4:])) and not engine.pooled[0][:4].any()


def test_pairs_and_stored_rows_give_the_same_bytes(backend: Backend) -> None:
    together, alone = ([made(spec, backend) for spec in (SHORT, OTHER)] for _ in range(2))
    run_many(together, CUTS[0])
    for one, other in zip(together, alone, strict=True):
        other.run(CUTS[0])
        apart = made(other.spec, backend)
        apart.store(other.pooled)
        for same in (one, apart):
            assert torch.equal(same.cache.storage, other.cache.storage)


def test_a_refused_step_is_an_error() -> None:
    engine, late = made(SHORT, Backend("torch", torch.device("cpu"))), Step.of((1, 0, 4), (0, 8, 4))
    with pytest.raises(AssertionError, match="1 sequences or entries were refused"):
        engine.run([late])
    assert engine.take(late) == 1 and all((rows == UNWRITTEN).all() for rows in engine.pooled)
    assert engine.take(Step.of((1, 0, 4))) == 0 and (engine.pooled[1][0] != UNWRITTEN).all()


@pytest.mark.parametrize("kind", ["fold", "window"])
def test_the_arguments_of_a_step_are_those_of_a_call(backend: Backend, kind: str) -> None:
    """In slots and pages in order, here."""
    engine = made(SHORT, backend, kind=kind, shuffled=False)
    engine.run([Step.of((0, 0, 6), (1, 0, 3))])
    args, named = engine.arguments(Step.of((0, 6, 4), (1, 3, 1, 0)))
    assert args[0].isnan().any(dim=1).tolist() == [False] * 4 + [True]
    for pages in (engine.kv, engine.score) if kind == "window" else ([engine.slots], engine.pages):
        counted = [page for row in pages for page in row]
        assert counted == list(range(len(counted)))
    report = check(*args, **named, backend=backend.name)
    assert report.equal and report.entries == 2, report


@pytest.mark.parametrize("values", ["normal", "zeros", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_draw(dtype: torch.dtype, values: str) -> None:
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            draw = torch.Generator().manual_seed(3)
            weights = make_weights(LONG, 9, values, draw, torch.float32, torch.device("cpu"))
            tokens = make_tokens(LONG, LENGTHS, values, draw, torch.float32, torch.device("cpu"))
            found.append([*tokens, *(weights[name] for name in ("ape", "norm_weight", "rope"))])
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*found, strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_draw_of_a_projection(dtype: torch.dtype) -> None:
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            found.append([make_hidden(5, 256), make_weight(64, 256), *make_scaled_weight(64, 256)])
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*found, strict=True):
        assert one.dtype is other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
