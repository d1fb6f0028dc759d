"""The two states of `benchmarks.experiments.representations`: the same records up to rounding, and bytes as counted."""

from __future__ import annotations

import pytest
import torch
from support.helpers import SPECS

from benchmarks.experiments import representations
from benchmarks.lib import floor
from benchmarks.lib.protocol import Case, Variant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter takes the kernels where there is no GPU
HIT, MISS = Case("decode", 512, 4, 2, 4, "hit"), Case("decode", 512, 4, 2, 1, "miss")
VARIANT = Variant.parse("fold:fp8_ds_mla")


@pytest.mark.parametrize("name", ["csa", "indexer"])
def test_both_states_give_the_same_records(name: str) -> None:
    torch.manual_seed(0)
    assert representations.check_records(SPECS[name], 4, DEVICE) == 15


def test_a_wrong_fold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: here the state loses its rows between steps."""
    compress = representations.compress_fold_rows

    def forgetful(kv_score: torch.Tensor, plan: object, state: representations.FoldRows, *rest: object) -> None:
        compress(kv_score, plan, state, *rest)
        state.rows.mul_(0.5)

    monkeypatch.setattr(representations, "compress_fold_rows", forgetful)
    with pytest.raises(RuntimeError, match="differ"):
        representations.check_records(SPECS["indexer"], 1, DEVICE)


@pytest.mark.parametrize("case", [HIT, MISS], ids=lambda case: case.name)
def test_timed_step_is_not_refused(case: Case) -> None:
    assert len(representations.fold_rows_calls(case, VARIANT, 4, 2, DEVICE)) == 2


def test_a_missing_row_is_refused() -> None:
    step = representations.Step(MISS, VARIANT, DEVICE)
    state = representations.FoldRows.allocate(MISS.spec, MISS.batch, 1, DEVICE)
    (b,) = step.buffers()
    representations.compress_fold_rows(b.kv_score, step.plan, state, b.cache, step.weights[0])
    assert int(step.plan.errors) == MISS.batch
    assert not state.rows.any() and (state.positions == -1).all()


def test_bytes() -> None:
    fold, bias, token, weights = 3 * 512 * 4, 2 * 512 * 4, 2 * 1024 * 2, 512 * 4 + 64 * 4
    hit = representations.traffic(HIT, VARIANT)
    assert hit.read == 4 * bias + weights + 2 * (4 * token + fold + 16 + 8 + 4)
    assert hit.write == 2 * (7 * fold + 4 * 4 + 584)
    miss = representations.traffic(MISS, VARIANT)
    assert miss.read == bias + 2 * (token + fold + 16 + 4) and miss.write == 2 * (2 * fold + 4)
    assert floor.traffic(HIT, VARIANT).total < hit.total and floor.traffic(MISS, VARIANT).total < miss.total
    assert representations.FoldRows.allocate(HIT.spec, 1, 5, "meta").bytes_per_slot == 7 * (2 * fold + 4)
