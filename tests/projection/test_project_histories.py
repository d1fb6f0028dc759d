"""Histories of an engine whose steps begin with hidden states: to the bit what one `compress` of their kv_score gives."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend
from support.project_support import SPECS

from kvfold.testing import Engine, ProjectedEngine, Step, chunks, drafts, make_weights
from kvfold.testing.engine import prefill
from kvfold.testing.projected import make_hidden, make_weight
from kvfold.verify.case import same
from kvfold.verify.project import kv_score_of

LENGTHS, WIDTH = (41, 19, 33), 320
STEPS = {
    "prompt": prefill(LENGTHS),
    "chunks": chunks(LENGTHS),
    "one": drafts(LENGTHS, 1, 17),
    "drafts": drafts(LENGTHS, 4, 9),
    "padding": [step._replace(bound=max(step.bound, 2), absent=(2, 0), behind=5) for step in chunks(LENGTHS)],
}

ON_THE_INTERPRETER = (("fold", "drafts", "fold"), ("rows", "padding", "fold"), ("rows", "chunks", "window"))


@pytest.mark.parametrize("kind", ["fold", "window", "mean"])
@pytest.mark.parametrize("history", STEPS)
@pytest.mark.parametrize("name", SPECS)
def test_histories(name: str, history: str, kind: str, backend: Backend) -> None:
    """Over a `MeanState`, which follows the cuts, they are those of the same steps of `compress`."""
    spec, steps = SPECS[name], [Step._make(step) for step in STEPS[history]]
    if kind == "mean" and (name != "fold" or history == "drafts"):
        pytest.skip("only fold rows have a MeanState, which rejects no draft")
    if kind == "window" and not spec.gate:
        pytest.skip("without a gate there is no state")
    if backend.slow and (name, history, kind) not in ON_THE_INTERPRETER:
        pytest.skip("the interpreter would take minutes")
    device = torch.device(backend.device)
    weights = make_weights(spec, max(LENGTHS), "normal", torch.Generator().manual_seed(1), torch.float32, device)
    hidden = make_hidden(sum(LENGTHS), WIDTH, device=device).split(LENGTHS)
    weight = make_weight(spec.kv_score_width, WIDTH, device=device)
    tokens = [kv_score_of(text, weight, weights, backend.name) for text in hidden]
    how = {"kind": kind, "fmt": "fp32", "backend": backend.name}
    cut = ProjectedEngine.make(tokens, weights, **how).begin(hidden, weight)
    cut.run(steps)
    whole = Engine.make(tokens, weights, **how)
    whole.run(steps if kind == "mean" else prefill(LENGTHS))
    same(cut, whole)
