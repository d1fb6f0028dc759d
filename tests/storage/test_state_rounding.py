"""`FoldState(round_inputs=True)`: fp32 rows in a bf16 state have the bits of bf16 rows, and an error that is bounded."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.helpers import SMALL_ROWS, Backend, Engine, bits, make_tokens
from support.ops_support import lengths_of, through_operators

import kvfold
from kvfold import CompressorSpec, FoldState, StepPlan, reference
from kvfold.contract import pooled_bound

BF16, FP32 = torch.bfloat16, torch.float32
SPECS = {**SMALL_ROWS, "rows-8": CompressorSpec(head_dim=128, ratio=8, rope_dim=8)}
MOST = 3


class Rounding(Engine):
    def _make_state(self, num_slots: int, max_new_tokens: int, dtype: torch.dtype) -> FoldState:
        like = super()._make_state(num_slots, max_new_tokens, BF16)
        return FoldState(self.spec, like.rows, like.positions, max_new_tokens, round_inputs=True)


def engines(spec: CompressorSpec, backend: Backend) -> tuple[Engine, Engine]:
    made = {"num_slots": 3, "max_new_tokens": MOST, "max_entries": 24}
    return Engine(spec, backend, state_dtype=BF16, **made), Rounding(spec, backend, **made)


@pytest.mark.parametrize("name", SPECS)
def test_the_bits_of_rows_that_were_rounded_before(backend: Backend, name: str) -> None:
    """Prompts, chunks, drafts of which some are rejected, decode, steps that outrun the ring, and another owner."""
    spec = SPECS[name]
    ratio, (rounded, rounding) = spec.ratio, engines(spec, backend)
    steps, at = [(0, 5 * ratio + 2), (5 * ratio + 1, 1)], 5 * ratio + 2
    for accepted in range(MOST + 1):
        steps.append((at, MOST))
        at += accepted
    steps += [(at, 1), (at + 1, 1), (at + 2, 4 * ratio + 5), (at + 2, 2), (0, ratio + 1), (ratio + 1, ratio)]
    for number, (start, count) in enumerate(steps):
        new = make_tokens(spec, start + count, seed=number // 8)[start:] * 3
        one = rounded.step([(1, start, new.bfloat16())])
        other = rounding.step([(1, start, new)])
        assert one.pooled.keys() == other.pooled.keys()
        assert all(torch.equal(bits(row), bits(other.pooled[at])) for at, row in one.pooled.items())
        assert rounded.tags(1) == rounding.tags(1) and torch.equal(bits(rounded.state.rows), bits(rounding.state.rows))
    assert torch.equal(rounded.cache.storage, rounding.cache.storage) and bool(rounded.cache.storage.any())


@pytest.mark.parametrize("name", ["rows", "rows-8"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_how_far_from_exact(backend: Backend, name: str, scale: float) -> None:
    """Scores move by at most `D = 2^-8 max|S|`, and a channel by `(exp(2D) (1 + 2^-8) - 1 + pooled_bound) sum p|k|`."""
    spec, (_, engine) = SPECS[name], engines(SPECS[name], backend)
    tokens = make_tokens(spec, 8 * spec.ratio, seed=1) * scale
    step = engine.step([(2, 0, tokens)])
    ape = engine.weights.ape
    exact, sizes = reference.pooled(tokens, spec, ape), tokens.clone()
    sizes[:, : spec.channels] = sizes[:, : spec.channels].abs()
    mean, moved = reference.pooled(sizes, spec, ape), 2.0**-8 * float(tokens[:, spec.channels :].abs().max())
    bound = torch.tensor(2 * moved).exp() * (1 + 2.0**-8) - 1 + pooled_bound(spec.window_rows)
    got = torch.stack([step.pooled[0, window] for window in range(8)])
    assert bool(((got - exact).abs() <= bound * mean).all())
    assert not torch.equal(got, engines(spec, backend)[1].step([(2, 0, tokens + 1e-2)]).pooled[0, 0])


def test_pairs_snapshots_and_operators(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    spec = SPECS["rows"]
    (rounded, rounding), tokens = engines(spec, backend), make_tokens(spec, 17, seed=2)
    for engine, new in ((rounded, tokens.bfloat16()), (rounding, tokens)):
        engine.make_snapshots(3, 8)
        engine.step([(0, 0, new)], snapshot_table=[[1, 2]])
        other = copy.deepcopy(engine.state)
        engine.snapshots = None
        start, ends = lengths_of(backend, [17], [2])
        slots = torch.zeros(1, dtype=torch.int32, device=backend.device)
        plan = StepPlan.build(4, start, ends, 2, state_slots=slots)
        more = make_tokens(spec, 2, seed=3).to(backend.device, new.dtype)
        pair = [(more, state, None, spec, engine.ape, None, None) for state in (engine.state, other)]
        kvfold.compress_many(pair, plan, backend=backend.name)
        through_operators(monkeypatch)
        kvfold.compress_many(pair, plan, backend=backend.name)
        monkeypatch.undo()
        assert torch.equal(bits(engine.state.rows), bits(other.rows))
    assert torch.equal(bits(rounded.state.rows), bits(rounding.state.rows))


def test_check_dump_and_copies(backend: Backend, tmp_path) -> None:
    spec, (_, engine) = SPECS["rows-8"], engines(SPECS["rows-8"], backend)
    tokens = make_tokens(spec, 20, seed=4).to(backend.device)
    engine.step([(1, 0, tokens[:9].cpu())])
    start, ends = lengths_of(backend, [9], [9])
    slots = torch.ones(1, dtype=torch.int32, device=backend.device)
    plan = StepPlan.build(8, start, ends, 9, state_slots=slots, entry_slots=torch.arange(2, device=backend.device))
    given = (tokens[9:18], plan, engine.state, engine.cache)
    how = {"spec": spec, "ape": engine.ape, "norm_weight": engine.norm_weight, "rope": engine.rope, "backend": backend.name}
    report = kvfold.check(*given, **how, full_history=[tokens[:9]])
    assert report.equal and report.referenced == 1, report
    kvfold.dump(tmp_path / "call.safetensors", *given, **how)
    again = kvfold.replay(tmp_path / "call.safetensors", device=backend.device, backend=backend.name)
    assert again.compressors[0].state.round_inputs and again.check().equal
    for one in (copy.deepcopy(engine.state), pickle.loads(pickle.dumps(engine.state))):
        assert one.round_inputs
    pages = torch.zeros(2, FoldState.page_bytes(spec, MOST, BF16), dtype=torch.uint8)
    paged = FoldState.over(pages, spec, MOST, dtype=BF16, round_inputs=True, fresh=True)
    assert paged.round_inputs and copy.copy(paged).round_inputs


def test_mistakes(backend: Backend) -> None:
    spec = SPECS["rows"]
    for error, how in ((ValueError, {"round_inputs": True}), (TypeError, {"dtype": BF16, "round_inputs": 1})):
        with pytest.raises(error, match=r"^round_inputs\b"):
            FoldState.allocate(spec, 1, MOST, **how)
    rounded, _ = engines(spec, backend)
    with pytest.raises(
        TypeError, match=r"^kv_score must be torch.bfloat16, as state keeps input rows in bf16 without round_inputs"
    ):
        rounded.step([(0, 0, make_tokens(spec, 4, seed=0))])
