"""The corners of what README says is supported: each against fp64, and to the bit however the sequence is cut."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from support.helpers import Backend, Engine, bits, make_tokens, norm_error
from support.window_support import WindowEngine, cut
from torch import Tensor

from kvfold import CompressorSpec, reference
from kvfold.contract import pooled_bound
from kvfold.storage.fold_state import state_kind

FP32, BF16 = torch.float32, torch.bfloat16


class Corner(NamedTuple):
    """A compressor over a state of input or fold rows (page_size 0), or over raw rows on pages of that many."""

    head_dim: int
    ratio: int
    overlap: bool = False
    has_ape: bool = True
    rope_dim: int = 0
    dtype: torch.dtype = FP32  # of kv_score
    kept: torch.dtype = FP32  # of the rows of the state
    page_size: int = 0

    @property
    def spec(self) -> CompressorSpec:
        return CompressorSpec(
            head_dim=self.head_dim, ratio=self.ratio, overlap=self.overlap, has_ape=self.has_ape, rope_dim=self.rope_dim
        )

    @property
    def name(self) -> str:
        kind = f"window{self.page_size}" if self.page_size else state_kind(self.spec)
        return "-".join((kind, f"hd{self.head_dim}", f"R{self.ratio}" + "o" * self.overlap))


CORNERS = (
    # Input rows: windows of every length up to 8 and beyond, of which most are no multiple of the group of 4 that is folded at
    # once, of every width of kernel.
    Corner(16, 1),
    Corner(512, 1, has_ape=False, rope_dim=64, dtype=BF16, kept=BF16),
    Corner(32, 1, overlap=True, dtype=BF16),
    Corner(64, 2, rope_dim=64, dtype=BF16, kept=BF16),
    Corner(128, 2, overlap=True, has_ape=False),
    Corner(16, 3, has_ape=False, rope_dim=2),
    Corner(512, 3, overlap=True, dtype=BF16),
    Corner(512, 5),
    Corner(256, 5, overlap=True, has_ape=False, dtype=BF16, kept=BF16),
    Corner(1024, 7, dtype=BF16, kept=BF16),
    Corner(16, 7, overlap=True),
    Corner(512, 8, has_ape=False, dtype=BF16),
    Corner(64, 8, overlap=True, dtype=BF16, kept=BF16),
    Corner(32, 9, overlap=True, rope_dim=32),
    Corner(2048, 2, overlap=True),
    Corner(4096, 1, dtype=BF16, kept=BF16),
    # Fold rows.
    Corner(16, 9, has_ape=False),
    Corner(256, 10, rope_dim=256, dtype=BF16),
    Corner(512, 31, dtype=BF16),
    Corner(4096, 9),
    Corner(16, 4096, dtype=BF16),
    # Raw rows, of which the ratio is a power of two.
    Corner(16, 1, page_size=1),
    Corner(64, 1, page_size=16, has_ape=False, dtype=BF16),
    Corner(512, 1, page_size=4, rope_dim=64, dtype=BF16, kept=BF16),
    Corner(4096, 1, page_size=3),
    Corner(16, 1, overlap=True, page_size=4, dtype=BF16, kept=BF16),
    Corner(32, 2, page_size=4, dtype=BF16),
    Corner(16, 2, overlap=True, page_size=3, has_ape=False, rope_dim=16),
    Corner(256, 4, page_size=4, has_ape=False),
    Corner(16, 8, page_size=5, dtype=BF16, kept=BF16),
    Corner(16, 8, overlap=True, page_size=16),
    Corner(2048, 16, page_size=16, dtype=BF16),
    Corner(16, 16, overlap=True, page_size=16, dtype=BF16),
    Corner(16, 2048, page_size=2048, dtype=BF16),
    Corner(16, 1024, overlap=True, page_size=64),
)


def make_engine(corner: Corner, backend: Backend, length: int) -> Engine:
    spec, ways, windows = corner.spec, 3, length // corner.ratio
    if corner.page_size:
        return WindowEngine(
            spec, backend, num_sequences=ways, length=length, page_size=corner.page_size, state_dtype=corner.kept
        )  # fmt: skip
    return Engine(spec, backend, num_slots=ways, max_new_tokens=8, max_entries=windows, state_dtype=corner.kept)


def run(engine: Engine, slot: int, tokens: Tensor, steps: list[int]) -> Tensor:
    """The pooled rows; behind the new tokens of each step stands one of NaN, which nobody may read."""
    rows, at = [], 0
    for n in steps:
        rows += engine.step([(slot, at, tokens[at : at + n])], padding=1).pooled.values()
        at += n
    return torch.stack(rows)


@pytest.mark.parametrize("corner", CORNERS, ids=lambda corner: corner.name)
def test_corner(backend: Backend, corner: Corner) -> None:
    spec = corner.spec
    if backend.slow and (spec.ratio > 16 or spec.head_dim * spec.ratio > 8192):
        pytest.skip("the interpreter takes seconds")
    length = max(2 * spec.ratio + 1, 9)
    tokens = make_tokens(spec, length, seed=spec.ratio, dtype=corner.dtype)
    engine = make_engine(corner, backend, length)
    whole = run(engine, 0, tokens, [length])  # at least 9 tokens, and so a kernel for long steps
    if isinstance(engine, WindowEngine):
        want = engine.reference(tokens)
    else:
        want = reference.pooled(tokens, spec, engine.weights.ape)
    assert norm_error(whole, want) <= pooled_bound(spec.window_rows)
    others = [[1, 1, 1, length - 3], cut(length, 4)] if spec.ratio <= 16 else [[length - 3, 1, 2]]
    others = others[-1:] if backend.slow else others
    for slot, steps in enumerate(others, start=1):
        assert torch.equal(bits(run(engine, slot, tokens, steps)), bits(whole)), f"other bits in steps {steps}"


@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("ratio, overlap", [(1, False), (4, True), (16, False)])
def test_scores_as_large_as_a_mask(backend: Backend, ratio: int, overlap: bool, page_size: int) -> None:
    """-1e9 for all tokens of a channel weighs them all alike, and beside others nothing."""
    corner = Corner(16, ratio, overlap, has_ape=False, page_size=page_size)
    tokens = make_tokens(corner.spec, 2 * ratio, seed=1)
    tokens[:, corner.spec.channels :: 2] = -1e9
    tokens[0, -1] = -1e9
    got = run(make_engine(corner, backend, len(tokens)), 0, tokens, [len(tokens)])
    assert norm_error(got, reference.pooled(tokens, corner.spec, None)) <= pooled_bound(corner.spec.window_rows)
