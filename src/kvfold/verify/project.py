"""What `kvfold verify` asks of projections: kv_score as fp64 has it, and the same bits from hidden states on."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..compress import project_compress
from ..contract import projected_worst
from ..plan import StepPlan
from ..storage.fold_state import FoldState
from ..storage.weights import ScaledWeight, Weight
from ..testing.engine import Engine, prefill
from ..testing.projected import ProjectedEngine
from .case import Mismatch, same

CUTS = (1, 5, 33)  # tokens of calls whose kv_score is compared, besides all at once: other tiles


def kv_score_of(hidden: Tensor, weight: Weight, weights: dict, backend: str) -> Tensor:
    """What `project_compress` makes of one sequence, whose entries go nowhere."""
    spec, count, device = weights["spec"], hidden.shape[0], hidden.device
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    plan = StepPlan.build(spec.ratio, zero, zero.new_tensor([0, count]), count, state_slots=zero if spec.gate else None)
    state = FoldState.allocate(spec, 1, 1, device=device) if spec.gate else None
    kv_score = torch.empty(count, spec.kv_score_width, dtype=torch.float32, device=device)
    project_compress(hidden, weight, plan, state, None, kv_score=kv_score, backend=backend, **weights)
    return kv_score


def check_kv_score(hidden: Tensor, weight: Tensor, weights: dict, backend: str) -> float:
    """Raises Mismatch unless kv_score is within its bound of fp64 and each row has the same bits in every batch.

    Returns the largest error as a fraction of that bound.
    """
    found = kv_score_of(hidden, weight, weights, backend)
    most = hidden.double().abs() @ weight.double().abs().T * projected_worst(hidden.shape[1])
    worst = float(((found.double() - reference.projected(hidden, weight)).abs() / most).max())
    if not worst <= 1:
        raise Mismatch(f"kv_score is off by {worst:.2f} times its bound")
    for count in CUTS:
        if not torch.equal(kv_score_of(hidden[-count:], weight, weights, backend), found[-count:]):
            raise Mismatch(f"kv_score of {count} tokens alone has other bits")
    return worst


def check_scaled(hidden: Tensor, weight: ScaledWeight, weights: dict, backend: str) -> float:
    """Raises Mismatch unless kv_score by a weight in FP8 has, in every batch, the bits of the bf16 weight that it stands for.

    Otherwise as `check_kv_score` of that bf16 weight.
    """
    stood = weight.dequantized()
    right = kv_score_of(hidden, stood, weights, backend)
    for count in (len(hidden), *CUTS):
        if not torch.equal(kv_score_of(hidden[-count:], weight, weights, backend), right[-count:]):
            raise Mismatch(f"kv_score of {count} tokens by a weight in FP8 has other bits than by the same in bf16")
    return check_kv_score(hidden, stood, weights, backend)


def check_cut(engine: ProjectedEngine, whole: Engine, steps: list) -> None:
    """Raises Mismatch unless `steps` of hidden states have the bits of one `compress` of kv_score."""
    engine.run(steps)
    whole.run(prefill(whole.lengths))
    same(engine, whole)
