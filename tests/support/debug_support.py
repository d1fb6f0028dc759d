"""What the tests of `check`, `dump` and `replay` share: small calls with a history, and a backend that is wrong."""

from __future__ import annotations

import sys

import pytest
import torch
from support.helpers import SPECS

import kvfold
from kvfold.debug import call as debug_call
from kvfold.debug.check import check
from kvfold.testing import Engine, Step, make_cache, make_pools, make_state, make_tokens, make_weights

Device = str | torch.device


class Call:
    """A step of two sequences, of which the first has a history; `args` and `named` are those of `compress`."""

    def __init__(
        self, name: str, fmt: str, *, window: bool = False, dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> None:
        spec, where = SPECS[name], {"slots": [2, 0]}
        if window:
            where = {"kv": [range(10), range(10, 20)], "score": [range(20, 30), range(30, 40)]}
        state = make_pools(spec, 40, spec.ratio, dtype, device) if window else make_state(spec, 3, 4, dtype, device)
        cache = make_cache(fmt, spec, 3, 8, device)
        self._begin(state, cache, spec.ratio + 2, [3 * spec.ratio + 2, spec.ratio], pages=[[1], [2]], **where)

    def _begin(self, state, cache, old: int, lengths: list[int], snapshots=None, **where) -> None:
        """The first sequence takes `old` tokens; the step has the rest, and snapshots."""
        self.spec, device, draw = cache.spec, cache.storage.device, torch.Generator().manual_seed(1)
        tokens = make_tokens(self.spec, lengths, "normal", draw, torch.float32, device)
        self.weights = make_weights(self.spec, 4095, "normal", draw, torch.float32, device)
        self.engine = Engine(tokens, self.weights, state, cache, rows_per_page=8, rows=None, **where)
        self.engine.run([Step.of((0, 0, old), (1, 0, 0))])
        self.engine.snapshots, self.old = snapshots, tokens[0][:old]
        self.history = [self.old, None]
        self.args, self.named = self.engine.arguments(Step.of((0, old, lengths[0] - old), (1, 0, lengths[1])))
        self.new, self.plan, self.state, self.cache = self.args

    def check(self, **options: object) -> kvfold.debug.Report:
        return check(*self.args, **self.named, **options)


class Snapped(Call):
    """Two sequences that cross page ends, the first with a history; snapshots of the step go to pages 5, 3 and 4."""

    def __init__(self, spec: kvfold.CompressorSpec, page_size: int, device: Device = "cpu") -> None:
        state, cache = make_state(spec, 3, 4, torch.float32, device), make_cache("fp32", spec, 4, 8, device)
        self.snapshots = kvfold.Snapshots.allocate(spec, 6, page_size, device=device)
        self._begin(
            state, cache, page_size + 1, [3 * page_size + 1, page_size + 1], self.snapshots,
            slots=[2, 0], pages=[[3], [1]], snapshot_pages=[[-1, 5, 3], [4]],
        )  # fmt: skip


def two(device: str | torch.device) -> tuple[list[tuple], kvfold.StepPlan]:
    """What `compress_many` takes."""
    specs = [kvfold.CompressorSpec(head_dim=n, ratio=4, overlap=True, rope_dim=8) for n in (16, 32)]
    pair = [Snapped(spec, 4, device) for spec in specs]
    return [(one.new, one.state, one.cache, *one.named.values()) for one in pair], pair[0].plan


def wrong(monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    """A triton backend that is the torch backend, spoiled by `spoil(state, cache, rows, snapshots)` after the call."""
    real = debug_call.compress

    def compress(kv_score, plan, state, cache, *, rows, backend, **others):
        real(kv_score, plan, state, cache, rows=rows, backend="torch", **others)
        if backend == "triton":
            spoil(state, cache, rows, others["snapshots"])

    monkeypatch.setattr(debug_call, "compress", compress)
    monkeypatch.setattr(sys.modules["kvfold.calls.checks"], "choose_backend", lambda backend, *_: backend)
