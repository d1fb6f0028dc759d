"""What the tests of `check`, `dump` and `replay` share: small calls with a history, and a backend that is wrong."""

from __future__ import annotations

import sys

import pytest
import torch
from support.helpers import SPECS, Weights, make_tokens

import kvfold
from kvfold.debug import call as debug_call
from kvfold.debug.check import check


class Call:
    """A step of two sequences, of which the first has a history; `args` are those of `compress`."""

    def __init__(self, name: str, fmt: str, *, window: bool = False, dtype: torch.dtype = torch.float32) -> None:
        spec = self.spec = SPECS[name]
        self.old, self.new = make_tokens(spec, spec.ratio + 2, 1), make_tokens(spec, 3 * spec.ratio, 2)
        w = Weights.make(spec)
        self.weights = {"spec": spec, "ape": w.ape, "norm_weight": w.norm_weight, "rope": w.rope}
        self.cache = kvfold.EntryCache.allocate(fmt, 3, 8, spec)
        if window:
            self.state: kvfold.FoldState | kvfold.WindowState = kvfold.WindowState.allocate(spec, 40, spec.ratio, dtype=dtype)
            table = torch.arange(20, dtype=torch.int32).view(2, 10)
            self.where = {"block_tables": (table, table + 20), "page_size": spec.ratio}
        else:
            self.state = kvfold.FoldState.allocate(spec, 3, 4, dtype=dtype)
            self.where = {"state_slots": torch.tensor([2, 0], dtype=torch.int32)}
        kvfold.compress(self.old, self.step([0, 0], [len(self.old), 0]), self.state, self.cache, **self.weights)
        self.plan = self.step([len(self.old), 0], [2 * spec.ratio, spec.ratio])

    def step(self, starts: list[int], lengths: list[int]) -> kvfold.StepPlan:
        cu = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        start, pages = torch.tensor(starts, dtype=torch.int32), torch.tensor([[1], [2]], dtype=torch.int32)
        return kvfold.StepPlan.build(
            self.spec.ratio, start, cu, max(lengths), **self.where, cache_block_table=pages, rows_per_page=8
        )

    def check(self, **options: object) -> kvfold.debug.Report:
        return check(self.new, self.plan, self.state, self.cache, **self.weights, **options)

    @property
    def history(self) -> list[torch.Tensor | None]:
        return [self.old, None]


class Snapped:
    """Two sequences that cross page ends, the first with a history; snapshots of the step go to pages 5, 3 and 4."""

    def __init__(self, spec: kvfold.CompressorSpec, page_size: int, device: str | torch.device = "cpu") -> None:
        self.spec, ints = spec, {"dtype": torch.int32, "device": device}
        self.state = kvfold.FoldState.allocate(spec, 3, 4, device=device)
        self.cache = kvfold.EntryCache.allocate("fp32", 4, 8, spec, device=device)
        self.snapshots = kvfold.Snapshots.allocate(spec, 6, page_size, device=device)
        w = Weights.make(spec)
        self.weights = {"spec": spec, "ape": w.ape, "norm_weight": w.norm_weight, "rope": w.rope}
        self.weights = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.weights.items()}
        where = {
            "state_slots": torch.tensor([2, 0], **ints), "cache_block_table": torch.tensor([[3], [1]], **ints),
            "rows_per_page": 8, "snapshot_table": torch.tensor([[-1, 5, 3], [4, -1, -1]], **ints),
            "snapshot_page_size": page_size,
        }  # fmt: skip
        old, self.new = page_size + 1, make_tokens(spec, 3 * page_size + 1, 4).to(device)

        def plan(start: list[int], ends: list[int], most: int) -> kvfold.StepPlan:
            return kvfold.StepPlan.build(
                spec.ratio, torch.tensor(start, **ints), torch.tensor(ends, **ints), most, **where
            )  # fmt: skip

        first = plan([0, 0], [0, old, old], old)
        kvfold.compress(make_tokens(spec, old, 3).to(device), first, self.state, self.cache, **self.weights)
        self.plan = plan([old, 0], [0, 2 * page_size, 3 * page_size + 1], 2 * page_size)
        self.one = (self.new, self.state, self.cache, spec, *list(self.weights.values())[1:], self.snapshots)

    def check(self, **options: object) -> kvfold.debug.Report:
        return check(self.new, self.plan, self.state, self.cache, **self.weights, snapshots=self.snapshots, **options)


def two(device: str | torch.device) -> tuple[list[tuple], kvfold.StepPlan]:
    """What `compress_many` takes."""
    specs = [kvfold.CompressorSpec(head_dim=n, ratio=4, overlap=True, rope_dim=8) for n in (16, 32)]
    pair = [Snapped(spec, 4, device) for spec in specs]
    return [one.one for one in pair], pair[0].plan


def wrong(monkeypatch: pytest.MonkeyPatch, spoil) -> None:
    """A triton backend that is the torch backend, spoiled by `spoil(state, cache, rows, snapshots)` after the call."""
    real = debug_call.compress

    def compress(kv_score, plan, state, cache, *, rows, backend, **others):
        real(kv_score, plan, state, cache, rows=rows, backend="torch", **others)
        if backend == "triton":
            spoil(state, cache, rows, others["snapshots"])

    monkeypatch.setattr(debug_call, "compress", compress)
    monkeypatch.setattr(sys.modules["kvfold.calls.checks"], "choose_backend", lambda backend, *_: backend)
