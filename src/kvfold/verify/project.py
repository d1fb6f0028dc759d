"""What `kvfold verify` asks of projections: kv_score as fp64 has it, and the same bits from hidden states on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..compress import project_compress
from ..contract import projected_worst
from ..plan import StepPlan
from ..spec import CompressorSpec
from ..storage.fold_state import FoldState
from ..storage.weights import ScaledWeight, Weight, blocks_of
from ..testing.engine import Engine, prefill
from ..testing.projected import ProjectedEngine
from .case import Mismatch, same

CUTS = (1, 5, 33)  # tokens of calls whose kv_score is compared, besides all at once: other tiles


def hidden_of(lengths: Sequence[int], width: int, device: torch.device) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(n, width, generator=draw).bfloat16().to(device) for n in lengths]


def weight_of(spec: CompressorSpec, width: int, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(6)
    return (torch.randn(spec.kv_score_width, width, generator=draw) / width**0.5).bfloat16().to(device)


def scaled_of(spec: CompressorSpec, width: int, device: torch.device) -> ScaledWeight:
    """Of all finite codes, and scales that are no powers of two."""
    draw, rows = torch.Generator().manual_seed(7), spec.kv_score_width
    codes = torch.randint(0, 256, (rows, width), generator=draw, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    scales = torch.rand(blocks_of(rows), blocks_of(width), generator=draw) / 256 / width**0.5 + 1e-6
    return ScaledWeight(codes.view(torch.float8_e4m3fn).to(device), scales.to(device))


def kv_score_of(hidden: Tensor, weight: Weight, weights: dict, backend: str) -> Tensor:
    """What `project_compress` makes of one sequence, whose entries go nowhere."""
    spec, count, device = weights["spec"], hidden.shape[0], hidden.device
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    plan = StepPlan.build(spec.ratio, zero, zero.new_tensor([0, count]), count, state_slots=zero if spec.gate else None)
    state = FoldState.allocate(spec, 1, 1, device=device) if spec.gate else None
    kv_score = torch.empty(count, spec.kv_score_width, device=device)
    project_compress(hidden, weight, plan, state, None, kv_score=kv_score, backend=backend, **weights)
    return kv_score


def check_kv_score(hidden: Tensor, weight: Tensor, weights: dict, backend: str) -> float:
    """Raises Mismatch unless it is within the bound of fp64, and each row the same in every batch. Returns the largest error,
    over that bound."""
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
    """Raises Mismatch unless kv_score of a weight in FP8 has in every batch the bits of the weight in bf16 that it stands for.
    Else as `check_kv_score` of that."""
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
