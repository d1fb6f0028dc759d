"""What `aot` compiles for V4.1 and for engines' own ways: kernels that `warmup` would prepare too. A few are compiled."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from test_aot import python

import kvfold
from kvfold import V4_CSA, V4_INDEXER, V41_INDEX_K, V41_MAIN_R1, V41_MAIN_R2
from kvfold.backend_triton import prepare as preparing
from kvfold.backend_triton.keys import Key
from kvfold.precompile.combinations import SPECS, combinations
from kvfold.storage.formats import FORMATS

FP32, INT64 = torch.float32, torch.int64
NAMES = ("bf16", "indexer_mxfp4_v41", "v41_mxfp8")


def test_every_way_of_a_call_is_compiled() -> None:
    every = list(combinations(SPECS, (None, *(FORMATS[name] for name in NAMES))))
    ways = {(c.spec, c.kind, c.apart, c.latent, c.tables) for c in every}
    for apart, latent in product((False, True), (False, True)):
        assert (V41_MAIN_R2, "rows", apart, latent, "plain") in ways
        assert (V41_MAIN_R2, "window", apart, latent, "plain") in ways
    for tables in ("engine", "ring"):
        assert {(V41_MAIN_R2, "window", on, on, tables) for on in (False, True)} <= ways
    assert {(spec, "ungated", False, on, "plain") for spec in (V41_MAIN_R1, V41_INDEX_K) for on in (False, True)} <= ways
    keys = [c for c in every if c.kind == "store" and c.spec == V41_INDEX_K]
    ways = ((False, True, False), (True, True, False), (True, True, True))
    wanted = {(name, *way) for name in ("bf16", "indexer_mxfp4_v41") for way in ways} | {("bf16", True, False, False)}
    assert {(c.fmt.name, c.placed, c.normed, c.other is not None) for c in keys} == wanted
    assert {(c.snapshots, c.apart) for c in every if c.kind == "pair"} == {(False, False), (True, False), (False, True)}


def test_warmup_would_prepare_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a kernel of a report is one that calls can get."""
    prepared: set[Key] = set()
    monkeypatch.setattr(preparing, "prepare", lambda keys, *rest: prepared.update(keys) or 1)
    monkeypatch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda *_: torch.device("cuda", 0))
    specs = (V4_CSA, V4_INDEXER, V41_MAIN_R1, V41_MAIN_R2, V41_INDEX_K)
    formats = [FORMATS[name] for name in NAMES]
    every = list(combinations(specs, (None, *formats)))
    pairs = {((c.spec, c.fmt.name), (c.other[0], c.other[1].name)) for c in every if c.kind == "pair"}
    kvfold.warmup(
        specs, [None, *NAMES], max_new_tokens={c.config.max_new_tokens for c in every if c.config}, states=("fold", "window"),
        norm_weight_dtypes=(FP32, None), rows=(None, FP32), latents=(False, True), apart=(False, True), many=pairs,
        snapshots=(False, True), plans=("plain", "engine", "ring"), slot_dtypes=(INT64,), position_dtypes=(INT64,),
        also=[(name, "bf16") for name in NAMES],
    )  # fmt: skip
    left = [c.name for c in every if c.key() not in prepared]
    assert not left


FEW = """
import json, sys
from kvfold.precompile.combinations import combinations, compile_one
from kvfold.spec import V41_INDEX_K, V41_MAIN_R2
from kvfold.storage.formats import FORMATS

every = list(combinations((V41_MAIN_R2, V41_INDEX_K), (None, FORMATS["bf16"], FORMATS["indexer_mxfp4_v41"])))
def first(**wanted):
    return next(c for c in every if all(getattr(c, name) == value for name, value in wanted.items()))
chosen = [
    first(kind="window", tables="ring", apart=True, latent=True),
    first(kind="ungated", spec=V41_INDEX_K, latent=True, fmt=FORMATS["indexer_mxfp4_v41"]),
    first(kind="store", spec=V41_INDEX_K, placed=True, normed=False),
]
print(json.dumps([len(compile_one(one, "sm_90").asm["cubin"]) for one in chosen]))
"""


def test_a_few_compile(tmp_path: Path) -> None:
    assert all(size > 1000 for size in json.loads(python(tmp_path, FEW)))
