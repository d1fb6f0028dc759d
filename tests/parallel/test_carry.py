"""What a carry holds, its bytes, and that a step which goes on from one has the bits of one that never stopped."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend, Engine, Weights, make_tokens

import kvfold
from kvfold.parallel import Carry, put_carry, take_carry

SPECS = {
    "fold": kvfold.CompressorSpec(head_dim=16, ratio=16, rope_dim=8),
    "overlap": kvfold.CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8),
    "short": kvfold.CompressorSpec(head_dim=16, ratio=3, rope_dim=8, has_ape=False),
    "folded with overlap": kvfold.CompressorSpec(head_dim=16, ratio=1, overlap=True, rope_dim=8),
}
