"""What the tests of operators share: a small layer as a module, and a recorder of the operators that run."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend, Weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kvfold
from kvfold import CompressorSpec, StepPlan

MOST = 4  # new tokens of a sequence in a step
MAIN = CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8)
INDEXER = CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=8, hadamard=True)
NARROW = CompressorSpec(head_dim=16, ratio=16, rope_dim=8)
SPECS = (MAIN, INDEXER, NARROW)
ON_BOTH = pytest.mark.parametrize(
    "where", [BACKENDS["torch"], pytest.param(BACKENDS["cuda"], marks=pytest.mark.gpu)], ids=("cpu", "cuda")
)


class Layer(nn.Module):
    """Projections and compressors: a pair in one call, and one whose rows are stored by a call of their own."""

    width = 24

    def __init__(self, where: Backend, slots: int = 3) -> None:
        super().__init__()
        self.where, device = where, where.device
        torch.manual_seed(0)
        self.project = nn.ModuleList([nn.Linear(self.width, 2 * spec.channels, bias=False) for spec in SPECS]).to(device)
        self.states = {spec: kvfold.FoldState.allocate(spec, slots, MOST, device=device) for spec in SPECS}
        formats = dict(zip(SPECS, ("bf16", "fp32", "bf16"), strict=True))
        self.caches = {spec: kvfold.EntryCache.allocate(fmt, slots, 8, spec, device=device) for spec, fmt in formats.items()}
        self.rows = torch.zeros(slots + 1, NARROW.head_dim, device=device)
        self.weights = {}
        for spec in SPECS:
            made = Weights.make(spec, max_positions=64)
            named = {"ape": made.ape, "norm_weight": made.norm_weight, "rope": made.rope}
            self.weights[spec] = {name: tensor.to(device) for name, tensor in named.items()}

    def plans(self, batch: int) -> tuple[StepPlan, StepPlan]:
        """For ratios 4 and 16; sequence b has state slot b and cache page b."""
        slots = torch.arange(batch, dtype=torch.int32, device=self.where.device)
        start, ends = lengths_of(self.where, [0] * batch, [0] * batch)
        pages = {"cache_block_table": slots[:, None].contiguous(), "rows_per_page": 8}
        return tuple(StepPlan.build(ratio, start, ends, MOST, state_slots=slots, **pages) for ratio in (4, 16))

    def forward(self, hidden: Tensor, small: StepPlan, large: StepPlan, start: Tensor, ends: Tensor) -> list[Tensor]:
        """A step of hidden states `[T, width]`; returns what the projections gave."""
        scores = [project(hidden) for project in self.project]
        self.compress(scores, small, large, start, ends)
        return scores

    def compress(self, scores: list[Tensor], small: StepPlan, large: StepPlan, start: Tensor, ends: Tensor) -> None:
        small.update(start, ends)
        large.update(start, ends)
        pair = [
            (score, self.states[spec], self.caches[spec], spec, *self.weights[spec].values())
            for score, spec in zip(scores, SPECS[:2], strict=False)
        ]
        kvfold.compress_many(pair, small)
        weights, rows = self.weights[NARROW], self.rows[: large.entry_capacity]
        kvfold.compress(scores[2], large, self.states[NARROW], None, spec=NARROW, **weights, rows=rows)
        rest = {name: weights[name] for name in ("norm_weight", "rope")}
        kvfold.store(rows, large, self.caches[NARROW], spec=NARROW, **rest)

    def hidden(self, tokens: int, seed: int) -> Tensor:
        return torch.randn(tokens, self.width, generator=torch.Generator().manual_seed(seed)).to(self.where.device)

    def contents(self) -> list[Tensor]:
        """Copies of what a step writes."""
        held = [(state.rows, state.positions) for state in self.states.values()]
        return [x.clone() for x in (*(x for pair in held for x in pair), *(c.storage for c in self.caches.values()), self.rows)]

    def check_equal(self, other: Layer) -> None:
        """The same bits, and each has written something everywhere."""
        for i, (x, y) in enumerate(zip(self.contents(), other.contents(), strict=True)):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), f"buffer {i} differs"
        assert all(bool((state.positions >= 0).any()) for state in self.states.values())
        assert self.caches[MAIN].storage.any() and self.caches[INDEXER].storage.any()


def through_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real calls go through the operators too."""
    for module in ("compress", "store", "plan", "restore"):
        monkeypatch.setattr(sys.modules[f"kvfold.{module}"], "traced", lambda tensor: True)


class Recorder(TorchDispatchMode):
    """Keeps the last call of each operator of kvfold: itself and its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "kvfold":
            self.calls[operator._schema.name] = operator, args
        return operator(*args, **(kwargs or {}))


def lengths_of(where: Backend, start: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """`start_pos` and `cu_seqlens`."""
    ints = {"dtype": torch.int32, "device": where.device}
    return torch.tensor(start, **ints), torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], **ints)
