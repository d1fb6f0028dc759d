"""kv_score and entries against fp64, within the bounds of docs/numerics.md."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend
from support.project_support import SPECS, Projected

from kvfold import reference
from kvfold.backend_torch.project import project_tokens
from kvfold.contract import projected_worst
from kvfold.testing.projected import make_hidden, make_weight


@pytest.mark.parametrize("width", [256, 448, 4096])
@pytest.mark.parametrize("count", [3, 40])
def test_kv_score(width: int, count: int, backend: Backend) -> None:
    if backend.slow and width > 1000 and count > 16:
        pytest.skip("the interpreter would take minutes")
    one, hidden = Projected(SPECS["rows"], backend, width), make_hidden(count, width)
    kv_score = torch.empty(count, one.spec.kv_score_width, device=backend.device)
    one.step(hidden, [(0, 0, min(count, 32)), (1, 0, count - 32)][: 1 + (count > 32)], kv_score=kv_score)
    weight = one.weight.cpu()
    most = hidden.double().abs() @ weight.double().abs().T
    error = (kv_score.cpu().double() - reference.projected(hidden, weight)).abs()
    assert (error <= projected_worst(width) * most).all()


@pytest.mark.parametrize("width", [320, 1088])
def test_the_order_of_sums(width: int) -> None:
    """The torch backend's, number by number: chunks, pairs of chunks, and the pairs in turn. Products of bf16 are exact."""
    hidden, weight = make_hidden(3, width).float(), make_weight(SPECS["rows"].kv_score_width, width).float().t()
    chunk, total = -(-width // 8 // 64) * 64, torch.zeros(3, weight.shape[1])
    for first in range(0, 8 * chunk, 2 * chunk):
        pair = []
        for start in (first, first + chunk):
            pair.append(torch.zeros_like(total))
            for i in range(start, min(start + chunk, width)):
                pair[-1] = pair[-1] + hidden[:, i, None] * weight[i]
        total = total + (pair[0] + pair[1])
    assert torch.equal(project_tokens(hidden, weight), total)


@pytest.mark.parametrize("name", SPECS)
def test_entries(name: str, backend: Backend) -> None:
    """By how much more than `compress` of the exact kv_score, in fp32, an entry is off: less than that kv_score's error."""
    one, hidden = Projected(SPECS[name], backend), make_hidden(32, 512)
    one.run(hidden, [32])
    entries = one.entries(hidden)
    rows = one.cache.read(torch.arange(len(entries), device=backend.device)).cpu().double()
    assert (rows - entries).abs().max() < 2e-5 * entries.abs().max()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_with_its_token(value: float, backend: Backend) -> None:
    """All of its kv_score, and no bit of another token's, in the same tile or not; nor a token behind the last one."""
    good, found = make_hidden(21, 512), []
    bad = torch.full((25, 512), torch.nan).bfloat16()
    bad[:21] = good
    bad[5, 100] = value
    for hidden in (good, bad[:21]):
        one = Projected(SPECS["rows"], backend)
        found.append(torch.empty(21, one.spec.kv_score_width, device=backend.device))
        one.step(hidden, [(0, 0, 21)], kv_score=found[-1])
    others = torch.arange(21, device=backend.device) != 5
    assert torch.equal(found[0][others], found[1][others])
    assert not found[1][5].isfinite().any()
