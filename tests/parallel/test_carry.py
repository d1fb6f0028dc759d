"""What a carry holds, its bytes, and that a step which goes on from one has the bits of one that never stopped."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend, Engine, bits, make_tokens
from support.parallel_support import SPECS, read_rows

import kvfold
from kvfold.parallel import Carry, put_carry, take_carry

NAMES = ["fold", "overlap", "rows", "wide overlap"]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_goes_on_from_a_carry(backend: Backend, name: str) -> None:
    """At every position, in another slot of another state, that held another sequence."""
    spec = SPECS[name]
    total = 2 * spec.ratio + 2
    tokens, other = make_tokens(spec, total, 0), make_tokens(spec, total, 1)
    whole = Engine(spec, backend, num_slots=1, max_new_tokens=2)
    want = whole.step([(0, 0, tokens)]).pooled
    for position in range(0, total + 1, 5 if backend.slow else 1):
        left, right = (Engine(spec, backend, num_slots=3, max_new_tokens=2) for _ in range(2))
        left.step([(2, 0, tokens[:position])]) if position else None
        right.step([(1, 0, other)])
        carry = take_carry(left.state, ints(2).to(backend.device), ints(position).to(backend.device))
        assert carry.positions.tolist() == [position]
        tags = right.state.positions.clone()
        put_carry(right.state, ints(1).to(backend.device), ints(position).to(backend.device), carry)
        tags[1] = right.state.positions[1]
        assert torch.equal(right.state.positions, tags), "tags of other slots"
        again = take_carry(right.state, ints(1).to(backend.device), ints(position).to(backend.device))
        assert torch.equal(read_rows(spec, position, again.rows[0]), read_rows(spec, position, carry.rows[0]))
        if position < total:
            got = right.step([(1, position, tokens[position:])]).pooled
            for (_, window), row in got.items():
                assert torch.equal(bits(row), bits(want[0, window])), f"entry {window} from {position} on"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_what_a_step_reads(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    if name == "fold" and dtype == torch.bfloat16:
        with pytest.raises(kvfold.UnsupportedError, match="dtype"):
            kvfold.carry_bytes(spec, dtype=dtype)
        return
    state = kvfold.FoldState.allocate(spec, 1, 1, dtype=dtype)
    for position in range(3 * spec.ratio):
        rows = Carry.empty(state, 1, inside=position % spec.ratio > 0).rows
        assert kvfold.carry_bytes(spec, position, dtype=dtype) == (rows.nbytes if position else 0)
        assert read_rows(spec, position, Carry.empty(state, 1).rows[0]).nbytes <= rows.nbytes
    assert kvfold.carry_bytes(spec, dtype=dtype) == Carry.empty(state, 1).rows.nbytes


def test_bytes_of_v4() -> None:
    """As docs/parallel.md says."""
    assert kvfold.carry_bytes(kvfold.V4_HCA) == 6144 and kvfold.carry_bytes(kvfold.V4_HCA, 1280) == 0
    of_cut = [(kvfold.carry_bytes(spec, 8, dtype=torch.bfloat16), kvfold.carry_bytes(spec, dtype=torch.bfloat16))
              for spec in (kvfold.V4_CSA, kvfold.V4_INDEXER)]  # fmt: skip
    assert of_cut == [(8192, 20480), (2048, 5120)]
    assert kvfold.carry_bytes(kvfold.V41_MAIN_R1) == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_there_is_refused(name: str) -> None:
    """A slot without the history gives a carry of no position; a slot that gets one of another position holds nothing."""
    spec, backend = SPECS[name], Backend("torch", torch.device("cpu"))
    engine = Engine(spec, backend, num_slots=2, max_new_tokens=2)
    tokens = make_tokens(spec, 2 * spec.ratio + 1, 0)
    engine.step([(0, 0, tokens)])
    end = len(tokens)
    # Slot 1 is empty, 7 and -1 are none, and a position ahead is not there.
    carry = take_carry(engine.state, ints(0, 1, 7, -1, 0), ints(end, end, end, end, end + 1))
    assert carry.positions.tolist() == [end, -1, -1, -1, -1]
    before = engine.state.rows.clone(), engine.state.positions.clone()
    put_carry(engine.state, ints(7, -1), ints(end, end), Carry(carry.rows[:2], carry.positions[:2]))
    assert torch.equal(bits(engine.state.rows), bits(before[0])) and torch.equal(engine.state.positions, before[1])
    put_carry(engine.state, ints(5, 1, -1), ints(end, end, end), Carry(carry.rows[[0, 1, 2]], carry.positions[[0, 1, 2]]))
    assert torch.equal(engine.state.positions, before[1]), "slot 1 gets a carry of no position and is empty as before"
    put_carry(engine.state, ints(0), ints(end + 1), Carry(carry.rows[:1], carry.positions[:1]))
    assert (engine.state.positions[0] == -1).all()
    assert engine.step([(0, end, tokens[:1])], strict=False).errors == 1


def test_a_short_carry_has_no_inside_of_a_window() -> None:
    spec, backend = SPECS["overlap"], Backend("torch", torch.device("cpu"))
    engine = Engine(spec, backend, num_slots=2, max_new_tokens=2)
    engine.step([(0, 0, make_tokens(spec, 10, 0)), (1, 0, make_tokens(spec, 8, 0))])
    out = Carry.empty(engine.state, 2, inside=False)
    assert take_carry(engine.state, ints(0, 1), ints(10, 8), out=out).positions.tolist() == [-1, 8]


def test_wrong_arguments_are_named() -> None:
    state = kvfold.FoldState.allocate(SPECS["overlap"], 2, 1)
    good = Carry.empty(state, 1)
    for name, call in {
        "state": lambda: take_carry(None, ints(0), ints(0)),
        "slots": lambda: take_carry(state, ints(0).float(), ints(0)),
        "positions": lambda: take_carry(state, ints(0), ints(0, 0)),
        "out": lambda: take_carry(state, ints(0), ints(0), out=good.rows),
        "out.positions": lambda: take_carry(
            state, ints(0, 1), ints(0, 0), out=Carry.empty(state, 2)._replace(positions=ints(0))
        ),
        "carry.rows": lambda: put_carry(state, ints(0), ints(0), good._replace(rows=good.rows[:, :3])),
        "carry.positions": lambda: put_carry(state, ints(0), ints(0), good._replace(positions=ints(0).long())),
        "spec": lambda: kvfold.carry_bytes(state),
        "position": lambda: kvfold.carry_bytes(state.spec, -1),
    }.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must"):
            call()
