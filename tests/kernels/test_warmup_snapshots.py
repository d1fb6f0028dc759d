"""Which kernels `warmup` prepares for snapshots: those that calls ask for, without a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import BACKENDS
from support.helpers import SPECS, Engine, call_restore, make_tokens

import kvfold
from kvfold import CompressorSpec
from kvfold.backend_triton import launch
from kvfold.backend_triton import prepare as preparing
from kvfold.backend_triton.keys import PairKey, RestoreKey, StepKey

FP32 = torch.float32
SPEC = SPECS["indexer"]


def test_warmup_prepares_what_calls_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the keys of calls with snapshots and of `restore`, with page sizes that keep something and nothing."""
    prepared, asked = set(), set()
    monkeypatch.setattr(
        preparing, "prepare", lambda keys, device, dependent, workers, progress=None: prepared.update(keys) or 1
    )
    monkeypatch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda device, interpreted: torch.device("cuda", 0))
    fold = CompressorSpec(head_dim=64, ratio=16)
    for spec in (SPEC, fold):
        many = [((spec, None), (spec, None))]
        options = {"dtypes": (FP32,), "rows": (FP32,), "max_new_tokens": (9,), "many": many}
        kvfold.warmup([spec], ["fp32"], snapshots=(True,), **options)
    assert any(isinstance(key, RestoreKey) for key in prepared)
    backend = BACKENDS["cuda" if torch.cuda.is_available() else "interpreter"]
    monkeypatch.setattr(launch, "launcher_of", lambda key, device: asked.add(key) or (lambda *arguments: None))
    for spec, size in ((SPEC, 8), (fold, 8), (fold, 16)):
        first, second = (
            Engine(spec, backend, num_slots=1, max_new_tokens=2),
            Engine(spec, backend, num_slots=1, max_new_tokens=2),
        )
        for engine in (first, second):
            engine.make_snapshots(1, size)
        call_restore(first, first.snapshots, [0], [0], [0])
        plan = first.step([(0, 0, make_tokens(spec, 9, seed=0))], snapshot_table=[[0]]).plan
        rows = make_tokens(spec, 9, seed=0).to(backend.device)
        pair = [(rows, e.state, None, spec, e.ape, None, None, e.snapshots) for e in (first, second)]
        kvfold.compress_many(pair, plan, backend=backend.name)
    kinds = {(type(key), key[-1]) for key in asked if isinstance(key, StepKey | RestoreKey)}
    assert kinds == {(StepKey, True), (StepKey, False), (RestoreKey, 4), (RestoreKey, 1), (RestoreKey, 0)}
    assert any(isinstance(key, PairKey) for key in asked) and asked <= prepared
    for wrong in (True, (None,), "yes"):
        with pytest.raises((TypeError, ValueError), match=r"^snapshots\b"):
            kvfold.warmup([SPEC], ["fp32"], snapshots=wrong)
