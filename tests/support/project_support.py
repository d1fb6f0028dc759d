"""A layer with its projection: hidden states in, records out, in whatever cuts."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, reference
from kvfold.testing.projected import make_weight

from .helpers import Backend, Weights

FOLD = CompressorSpec(head_dim=32, ratio=16, rope_dim=8)
ROWS = CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=8)
NARROW = CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8, hadamard=True)
TWO = CompressorSpec(head_dim=32, ratio=2, rope_dim=8, has_ape=False)
ONE = CompressorSpec(head_dim=32, ratio=1, rope_dim=8, has_ape=False, gate=False)
SPECS = {"fold": FOLD, "rows": ROWS, "ratio 2": TWO, "ungated": ONE}
MOST, WINDOWS = 32, 40  # new tokens of a step and entries of a sequence


def moved(weight: kvfold.ScaledWeight, device: torch.device) -> kvfold.ScaledWeight:
    return kvfold.ScaledWeight(*(x.to(device) for x in weight))


def apart(weight: Tensor, turned: bool = False) -> tuple[Tensor, Tensor]:
    """Values and scores as tensors of their own, with NaN between them, where the other half would be of one tensor. turned:
    scores before values."""
    half = len(weight) // 2
    room = torch.full((3 * half, weight.shape[1]), torch.nan, dtype=weight.dtype, device=weight.device)
    values, scores = (room[2 * half :], room[:half]) if turned else (room[:half], room[2 * half :])
    return values.copy_(weight[:half]), scores.copy_(weight[half:])


class Projected:
    """One compressor with its weight, a state of two slots and a cache of `WINDOWS` entries for each."""

    def __init__(self, spec: CompressorSpec, backend: Backend, width: int = 512, *, kept: torch.dtype = torch.float32) -> None:
        self.spec, self.backend, device = spec, backend, backend.device
        self.weight = make_weight(spec.kv_score_width, width, device=device)
        weights = Weights.make(spec, max_positions=WINDOWS * spec.ratio)
        self.given = {
            "spec": spec,
            "ape": None if weights.ape is None else weights.ape.to(device),
            "norm_weight": weights.norm_weight.to(device),
            "rope": weights.rope.to(device),
        }
        self.state = kvfold.FoldState.allocate(spec, 2, MOST, device=device, dtype=kept) if spec.gate else None
        self.cache = kvfold.EntryCache.allocate("fp32", 2 * WINDOWS // 8, 8, spec, device=device)

    def plan(self, steps: list[tuple[int, int, int]]) -> kvfold.StepPlan:
        """steps: slot, first position and number of new tokens of each sequence."""
        device, ratio = self.backend.device, self.spec.ratio
        slots = [slot * WINDOWS + w for slot, p, n in steps for w in range(p // ratio, (p + n) // ratio)]
        numbers = {"dtype": torch.int32, "device": device}
        return kvfold.StepPlan.build(
            ratio,
            torch.tensor([p for _, p, _ in steps], **numbers),
            torch.tensor([0, *accumulate(n for *_, n in steps)], **numbers),
            max(n for *_, n in steps),
            state_slots=torch.tensor([slot for slot, *_ in steps], **numbers),
            entry_slots=torch.tensor(slots, dtype=torch.int64, device=device),
        )

    def step(self, hidden: Tensor, steps: list[tuple[int, int, int]], weight: object = None, **more: object) -> None:
        plan = self.plan(steps)
        kvfold.project_compress(
            hidden.to(self.backend.device),
            self.weight if weight is None else weight,
            plan,
            self.state,
            self.cache,
            backend=self.backend.name,
            **self.given,
            **more,
        )
        assert int(plan.errors) == 0

    def run(self, hidden: Tensor, cuts: list[int], **more: object) -> Tensor:
        """One sequence in slot 0, cut so; its records."""
        at = 0
        for count in cuts:
            self.step(hidden[at : at + count], [(0, at, count)], **more)
            at += count
        return self.records(0)

    def records(self, slot: int) -> Tensor:
        rows = self.cache.rows_per_page
        return self.cache.storage[slot * WINDOWS // rows : (slot + 1) * WINDOWS // rows].cpu().clone()

    def entries(self, hidden: Tensor) -> Tensor:
        """What fp64 makes of one sequence."""
        kv_score = reference.projected(hidden, self.weight.cpu())
        given = [None if x is None else x.cpu() for x in (self.given["ape"], self.given["norm_weight"], self.given["rope"])]
        return reference.entries(kv_score, self.spec, *given)
