"""The kernels of training: they compile for a GPU that need not be here, and every spec has its row of the table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import Backend, norm_error
from support.training_support import Problem

import kvfold
from kvfold import CompressorSpec
from kvfold.training import Packing, compress_backward, compress_forward, table

ROOT = Path(__file__).parents[2]
COMPILE = """
import torch
from kvfold import CompressorSpec
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import TARGETS
from kvfold.precompile.resources import resources
from kvfold.storage.formats import FORMATS
from kvfold.training.launch import keys_of
from kvfold.training.problem import How

target, pair, made = TARGETS["sm_90"], (torch.bfloat16, True, torch.float32), set()
overlap, long = CompressorSpec(64, 2, overlap=True, hadamard=True), CompressorSpec(64, 16, has_ape=False)
for spec, fmt, latent in ((overlap, None, True), (long, FORMATS["mxfp4"], False), (CompressorSpec(64, 5, True), None, False)):
    for kernel, key in keys_of(How(spec, True, torch.bfloat16, fmt, latent, ""), pair, 64).items():
        compiled = variant_of(key, True, kernel in ("spread", "sum")).compile(target)
        found = resources(compiled, target)
        assert not found.spilled, (kernel, found)
        made.add(kernel)
assert made == {"forward", "again", "finish", "spread", "sum"}
"""


def test_kernels_compile_for_a_gpu() -> None:
    """In a process of its own, as this one may interpret. Two tensors, latents, records; none spills."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_spec_has_its_rows() -> None:
    for head_dim in (16, 32, 128, 256, 512, 1024, 2048, 4096):
        for ratio, overlap in ((1, False), (2, True), (4, True), (8, False), (9, False), (128, False), (4096, True)):
            spec = CompressorSpec(head_dim, ratio, overlap, rope_dim=16)
            for entries in (0, 1, 100, 4096, 1 << 26):
                for kernel in ("forward", "sum", *(("finish", "spread") if spec.window_rows > 8 else ("again",))):
                    config = table.choose(kernel, spec, entries)
                    groups = table.groups_of(config, entries)
                    assert groups == 0 if kernel in ("forward", "sum") else 1 <= groups <= config.groups


@pytest.mark.gpu
def test_beyond_two_to_the_31_elements() -> None:
    """The last sequence of a long packing against the same alone, to the bit."""
    spec, place = kvfold.V4_CSA, Backend("triton", torch.device("cuda", 0))
    last = Problem.make(spec, torch.bfloat16, [41], spare=0)
    tokens = (1 << 20) + 64
    assert tokens * spec.kv_score_width > 1 << 31
    rows = torch.zeros(tokens, spec.kv_score_width, dtype=torch.bfloat16, device="cuda")
    rows[-41:] = last.kv_score.cuda()
    given = last.given(place)
    found = []
    for cu, some in (([0, tokens - 41, tokens], rows), ([0, 41], rows[-41:])):
        packing = Packing.build(torch.tensor(cu).cuda(), len(some), spec.ratio, max_seqlen=1024)
        forward = compress_forward(some, packing, **given)
        first = int(packing.cu_entries[-2])
        g = torch.zeros_like(forward.entries)
        g[first : first + 10] = last.incoming()[:10].to(g)
        backward = compress_backward(g, some, packing, forward.kept, **given)
        found.append((forward.entries[first : first + 10], backward.value[-41:], backward.ape, backward.norm_weight))
    for a, b in zip(*(pair[:2] for pair in found), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(pair[2:] for pair in found), strict=True):
        assert norm_error(a, b) < 1e-5
