"""`check`, `dump`, `replay` and `explain` of what V4.1 needs: no gate, latents, values and scores apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calls.test_apart import BF16, CASES, Run, apart, tokens_of
from support.helpers import Backend

import kvfold
from kvfold import V41_MAIN_R1, CompressorSpec, reference
from kvfold.explain import explain

UNGATED = CompressorSpec(head_dim=32, ratio=1, rope_dim=8, has_ape=False, gate=False)


def both(backend: Backend, path: Path, *given: object, **named: object) -> kvfold.debug.check.Report:
    """The report of a call, after that of its replay was found to be the same."""
    found = kvfold.check(*given, **named, backend=backend.name)
    kvfold.dump(path, *given, **named, backend=backend.name)
    again = kvfold.replay(path, device=backend.device, backend=backend.name)
    assert str(again.check()) == str(found)
    assert torch.equal(again.latent, named["latent"]) == (found.entries == 0), "the call was not made again"
    return found


@pytest.mark.parametrize("name", ["fold", "overlap snapshots", "window ratio 2"])
def test_of_two_tensors(backend: Backend, name: str, tmp_path: Path) -> None:
    case, run = CASES[name], Run(CASES[name], backend)
    tokens, plan = tokens_of(case, 23, backend.device), run.plan((18, 5), 18)
    latent = torch.zeros(plan.entry_capacity, case.spec.head_dim, dtype=BF16, device=backend.device)
    weights = {"spec": case.spec, "ape": run.ape, "norm_weight": run.weight, "rope": run.rope}
    given = plan, run.state, run.cache
    report = both(backend, tmp_path / "call", apart(tokens), *given, **weights, latent=latent, snapshots=run.snapshots)
    assert report.equal and report.entries == report.referenced > 0
    if case.kind == "fold":
        many = kvfold.check([run.one(apart(tokens))], plan, backend=backend.name)
        assert many.equal and many.entries == report.entries


def test_without_a_gate(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ints = {"dtype": torch.int32, "device": backend.device}
    slots = torch.arange(6, device=backend.device)
    plan = kvfold.StepPlan.build(1, torch.zeros(1, **ints), torch.tensor([0, 6], **ints), 6, entry_slots=slots)
    cache = kvfold.EntryCache.allocate("bf16", 2, 4, UNGATED, device=backend.device)
    weights = {
        "spec": UNGATED, "norm_weight": torch.ones(32, device=backend.device),
        "rope": reference.rope_table(8, 8).to(backend.device), "latent": torch.zeros(6, 32, dtype=BF16, device=backend.device),
    }  # fmt: skip
    tokens = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to(backend.device)
    report = both(backend, tmp_path / "call", tokens, plan, None, cache, **weights)
    assert report.equal and report.entries == report.referenced == 6
    report = both(backend, tmp_path / "call", tokens[:5], plan, None, cache, **weights)
    assert report.headline == "REFUSED: 1 of 1 sequences" and "kv_score has 5 rows" in str(report)
    history = [torch.zeros(1, 64)]
    with pytest.raises(ValueError, match=r"^full_history\[0\] must be \[0, 32\]"):
        kvfold.check(tokens, plan, None, cache, **weights, full_history=history)


def test_a_wrong_latent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("torch", torch.device("cpu"))
    run, case = Run(CASES["ratio 2"], backend), CASES["ratio 2"]
    plan, tokens = run.plan((4, 4), 4), tokens_of(case, 8, backend.device)
    latent = torch.zeros(plan.entry_capacity, 32, dtype=BF16)
    from kvfold.backend_torch import finish

    norm = finish.norm
    monkeypatch.setattr(finish, "norm", lambda *given: norm(*given) * 1.01)
    found = kvfold.check(tokens, plan, run.state, None, spec=case.spec, norm_weight=run.weight, latent=latent, backend="torch")
    assert found.headline == "DIFFERENT" and found.first.stage == "latent"


def test_explain_without_a_gate() -> None:
    said = explain(V41_MAIN_R1, 3, 2, fmt="fp8_ds_mla")
    assert said.kind == "none" and not (said.reads or said.writes or said.emptied)
    assert [(entry.window, entry.position, *entry.hi) for entry in said.entries] == [(3, 3, 3), (4, 4, 4)]
    assert said.starts == (3, 4, 5) and said.any_window
