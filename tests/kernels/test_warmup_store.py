"""Which kernels `warmup` prepares for `store` without a plan: those that calls ask for, without a GPU."""

from __future__ import annotations

import sys
from itertools import product

import pytest
import torch
from conftest import BACKENDS

import kvfold
from kvfold import CompressorSpec, EntryCache, reference
from kvfold.backend_triton import launch
from kvfold.backend_triton import prepare as preparing
from kvfold.backend_triton.keys import StoreKey

FP32, BF16, INT32, INT64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
SPECS = (CompressorSpec(head_dim=128, ratio=4), CompressorSpec(head_dim=128, ratio=4, rope_dim=0))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> set:
    found: set = set()
    monkeypatch.setattr(preparing, "prepare", lambda keys, device, dependent, workers, progress=None: found.update(keys) or 1)
    monkeypatch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda device, interpreted: torch.device("cuda", 0))
    return found


def test_warmup_prepares_what_calls_ask_for(prepared: set, monkeypatch: pytest.MonkeyPatch) -> None:
    kvfold.warmup(
        SPECS,
        ["bf16", "mxfp4"],
        rows=(FP32, BF16),
        norm_weight_dtypes=(FP32, None),
        slot_dtypes=(INT32, INT64),
        position_dtypes=(INT64,),
        also=[("bf16", "indexer_mxfp4"), ("mxfp4", "bf16")],
    )
    asked: set = set()
    monkeypatch.setattr(launch, "launcher_of", lambda key, device: asked.add(key) or (lambda *arguments: None))
    backend = BACKENDS["cuda" if torch.cuda.is_available() else "interpreter"]
    here = {"device": backend.device}
    for spec, dtype, slots, normed in product(SPECS, (FP32, BF16), (INT32, INT64), (True, False)):
        rows, at = torch.zeros(2, 128, dtype=dtype, **here), torch.arange(2, **here)
        for formats in (("bf16",), ("mxfp4",), ("bf16", "indexer_mxfp4"), ("mxfp4", "bf16")):
            cache, *also = (EntryCache.allocate(fmt, 1, 4, spec, **here) for fmt in formats)
            kvfold.store(
                rows, cache, slots=at.to(slots), positions=at, spec=spec, also=also, backend=backend.name,
                norm_weight=torch.ones(128, **here) if normed else None, rope=reference.rope_table(8, spec.rope_dim).to(**here),
            )  # fmt: skip
    assert asked == {key for key in prepared if isinstance(key, StoreKey) and key.slots is not None} and len(asked) == 64


def test_nothing_of_it_unless_asked_for(prepared: set) -> None:
    kvfold.warmup(SPECS[:1], ["bf16"], rows=(FP32,))
    assert [key.slots for key in prepared if isinstance(key, StoreKey)] == [None]


@pytest.mark.parametrize(
    "name, wrong",
    [("slot_dtypes", (FP32,)), ("slot_dtypes", INT64), ("position_dtypes", (None,)), ("also", ("bf16", "fp32")),
     ("also", [("bf16",)]), ("also", [("bf16", None)]), ("also", [("bf16", "nothing")]), ("also", [("bf16", "fp8_ds_mla")])],
)  # fmt: skip
def test_mistakes(prepared: set, name: str, wrong: object) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
        kvfold.warmup(SPECS[:1], ["bf16"], **{name: wrong})
    assert not prepared
