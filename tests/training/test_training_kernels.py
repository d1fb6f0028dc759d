"""The kernels of training: every spec has its row of the table, and none minds long tensors."""

from __future__ import annotations

import pytest
import torch
from support.helpers import Backend, norm_error
from support.training_support import Problem

import kvfold
from kvfold import CompressorSpec
from kvfold.training import Packing, compress_backward, compress_forward, table


def test_every_spec_has_its_rows() -> None:
    for head_dim in (16, 32, 128, 256, 512, 1024, 2048, 4096):
        for ratio, overlap in ((1, False), (2, True), (4, True), (8, False), (9, False), (128, False), (4096, True)):
            spec = CompressorSpec(head_dim, ratio, overlap, rope_dim=16)
            for entries in (0, 1, 100, 4096, 1 << 26):
                whole = "forward", "read", "sum", *["entries"] * (spec.window_rows > 8)
                for kernel in (*whole, *(("finish", "spread") if spec.window_rows > 8 else ("again",))):
                    config = table.choose(kernel, spec, entries)
                    groups = table.groups_of(config, entries)
                    assert groups == 0 if kernel in whole else 1 <= groups <= max(config.groups, entries / 32)


@pytest.mark.gpu
@pytest.mark.parametrize("spec, n", [(kvfold.V4_CSA, 41), (kvfold.V4_HCA, 300)], ids=["csa", "hca"])
def test_beyond_two_to_the_31_elements(spec: CompressorSpec, n: int) -> None:
    """The last sequence of a long packing against the same alone, to the bit."""
    place = Backend("triton", torch.device("cuda", 0))
    last = Problem.make(spec, torch.bfloat16, [n], spare=0)
    tokens = (1 << 31) // spec.kv_score_width + 2 * spec.ratio
    rows = torch.zeros(tokens, spec.kv_score_width, dtype=torch.bfloat16, device="cuda")
    rows[-n:] = last.kv_score.cuda()
    given, count = last.given(place), n // spec.ratio
    found = []
    for cu, some in (([0, tokens - n, tokens], rows), ([0, n], rows[-n:])):
        packing = Packing.build(torch.tensor(cu).cuda(), len(some), spec.ratio, max_seqlen=1024)
        forward = compress_forward(some, packing, **given)
        first = int(packing.cu_entries[-2])
        g = torch.zeros_like(forward.entries)
        g[first : first + count] = last.incoming()[:count].to(g)
        backward = compress_backward(g, some, packing, forward.kept, **given)
        found.append((forward.entries[first : first + count], backward.value[-n:], backward.ape, backward.norm_weight))
    for a, b in zip(*(pair[:2] for pair in found), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(pair[2:] for pair in found), strict=True):
        assert norm_error(a, b) < 1e-5
