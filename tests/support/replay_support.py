"""Calls of every kind for the tests of `dump` and `replay`, and a file of one written again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.debug_support import Snapped, two
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache, StepPlan
from kvfold.debug import file as debug_file
from kvfold.debug.call import Call as Value
from kvfold.debug.call import Places
from kvfold.storage.formats import FORMATS
from kvfold.storage.step import Compressor, Outputs
from kvfold.testing import Engine, Step, make_pools, make_state, make_tokens, make_weights

FOLD = CompressorSpec(head_dim=32, ratio=16, rope_dim=8)
ROWS = CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8)
BARE = CompressorSpec(head_dim=32, ratio=4, has_ape=False, rope_dim=0)


class Made:
    """A call with its arguments, as a user has them."""

    def __init__(self, function: Callable[..., None], *args: Any, **options: Any) -> None:
        self.function, self.args, self.options = function, args, options

    def call(self, backend: str) -> None:
        self.function(*self.args, **self.options, backend=backend)

    def dump(self, path: Path, backend: str, **more: Any) -> None:
        kvfold.dump(path, *self.args, **self.options, backend=backend, **more)

    def tensors(self) -> dict[str, Tensor]:
        """Of the caller, as the file names them."""
        args = dict(zip(("kv_score", "plan", "state", "cache"), self.args, strict=False))
        given: dict[str, Any] = dict.fromkeys(Compressor._fields) | self.options | args
        plan, out = given.pop("plan"), Outputs(given.pop("rows", None), given.pop("latent", None))
        places = Places(**{name: given.pop(name) for name in Places._fields if name in given})
        return debug_file.tensors_of(Value.of(Compressor(**given), plan, out, "torch", places))


def snapped(spec: CompressorSpec, page_size: int, device: torch.device, dtype: torch.dtype | None = None) -> Made:
    call = Snapped(spec, page_size, device)
    rows = None if dtype is None else torch.full((call.plan.entry_capacity, spec.head_dim), 7.0, dtype=dtype, device=device)
    return Made(kvfold.compress, *call.args, **call.named, rows=rows)


def pair(device: torch.device) -> Made:
    return Made(kvfold.compress_many, *two(device))


def store(device: torch.device) -> Made:
    call = Snapped(ROWS, 4, device)
    pooled = torch.randn(call.plan.entry_capacity, ROWS.head_dim, device=device).bfloat16()
    weights = {name: call.weights[name] for name in ("spec", "norm_weight", "rope")}
    return Made(kvfold.store, pooled, call.plan, call.cache, **weights)


def window(device: torch.device) -> Made:
    """Pools that are one bf16 tensor, kv_score that is columns of a projection, unaligned pages of several layers."""
    draw, ints = torch.Generator().manual_seed(5), {"dtype": torch.int32, "device": device}
    weights = make_weights(ROWS, 4095, "normal", draw, torch.bfloat16, device)
    state = make_pools(ROWS, 12, 8, torch.bfloat16, device, joined=True)
    table = torch.tensor([[9, 2, 5], [0, 7, -1]], **ints)
    size = FORMATS["fp8_tensor"].page_bytes(ROWS, 4)
    storage = torch.full((6, 3, size + 34), 7, dtype=torch.uint8, device=device)[:, 1]
    cache = EntryCache(storage, "fp8_tensor", 4, ROWS, scale=0.02)

    def plan(start: list[int], ends: list[int]) -> StepPlan:
        slots = torch.tensor([5, -1, 23, 0, 99, -1, -1], dtype=torch.int64, device=device)
        return StepPlan.build(
            4, torch.tensor(start, **ints), torch.tensor(ends, **ints), 13, block_tables=(table, table.flip(1).contiguous()),
            page_size=8, entry_slots=slots,
        )  # fmt: skip

    projected = torch.zeros(26, 2 * ROWS.channels + 9, dtype=torch.bfloat16, device=device)
    kv_score = projected[:, 3:-6]
    kv_score.copy_(make_tokens(ROWS, [26], "normal", draw, torch.bfloat16, device)[0])
    kvfold.compress(kv_score, plan([0, 0], [0, 13, 20]), state, cache, **weights)
    return Made(kvfold.compress, kv_score, plan([11, 7], [0, 4, 12]), state, cache, **weights)


def bare(device: torch.device) -> Made:
    """No ape, norm, rope, cache or entry slots; absent and refused sequences; a table that names what is not there."""
    tokens = make_tokens(BARE, [5, 10, 3, 3], "normal", torch.Generator().manual_seed(6), torch.bfloat16, device)
    weights = {"spec": BARE, "ape": None, "norm_weight": None, "rope": None}
    state = make_state(BARE, 4, 2, torch.bfloat16, device)
    engine = Engine(tokens, weights, state, None, slots=[3, 0, -1, 11], pages=(), rows_per_page=1, entries="none")
    args, named = engine.arguments(Step.of((0, 0, 5), (1, 9, 1), (2, 0, 3), (3, 0, 3)))
    args[1].errors += 40
    return Made(kvfold.compress, *args, **named, rows=torch.full((args[1].entry_capacity, 32), 7.0, device=device))


def engine(device: torch.device) -> Made:
    """Rings of pages, of which 0 is none; total lengths, a slot per token, reserved places, int64, numbers between others."""
    draw, wide = torch.Generator().manual_seed(7), {"dtype": torch.int64, "device": device}
    weights = make_weights(BARE, 40, "normal", draw, torch.float32, device)
    state, scale = make_pools(BARE, 8, 4, torch.float32, device), torch.tensor(float("inf"), device=device)
    cache = EntryCache(torch.full((5, 300), 7, dtype=torch.uint8, device=device), "fp8_tensor", 4, BARE, scale=scale)
    table = torch.tensor([[3, 6, 1, 9, 9], [5, 2, 0, 9, 9]], **wide)[:, :3]  # the second has but two of its pages
    other = torch.tensor([[7, 4, 2], [3, 1, 5]], dtype=torch.int32, device=device)

    def plan(ends: list[int], lengths: list[int], **more: Any) -> StepPlan:
        by_token = torch.arange(26, **wide).view(13, 2)[:, 1]  # slots 1, 3, ... of rows
        return StepPlan.build(
            4, None, torch.tensor(ends, **wide), 6, seq_lens=torch.tensor([lengths, [0, 0]], **wide).t().reshape(2, 2)[:, 0],
            block_tables=(table, other), page_size=4, ring=True, null_page=0, token_slots=by_token, no_slot=0,
            cu_rows=torch.tensor([1, 3, 6], **wide), max_rows=9, **more,
        )  # fmt: skip

    tokens = make_tokens(BARE, [13, 13], "normal", draw, torch.float32, device)
    kvfold.compress(tokens[0], plan([2, 8, 13], [6, 5]), state, None, **weights)
    scores = torch.full((13, 3 * BARE.channels), torch.nan, device=device)[:, : BARE.channels]
    scores.copy_(tokens[1][:, BARE.channels :])
    rows = torch.full((5, 32), 7.0, device=device)
    latent = torch.full((9, 32), 7.0, dtype=torch.bfloat16, device=device)
    given = (tokens[1][:, : BARE.channels].contiguous(), scores), plan([2, 8, 13], [11, 10]), state, cache
    return Made(kvfold.compress, *given, **weights, rows=rows, latent=latent)


def placed(device: torch.device) -> Made:
    """`store` without a plan into two caches, with neither a norm nor `errors`."""
    rows = torch.randn(6, 48, generator=torch.Generator().manual_seed(8)).to(device)[:, :32]
    caches = [EntryCache.allocate(fmt, 4, 3, BARE, device=device) for fmt in ("fp32", "fp8_tensor")]
    slots = torch.tensor([7, 0, -1, 11, 12, 3], dtype=torch.int32, device=device)
    weights = {"spec": BARE, "norm_weight": None, "rope": None}
    return Made(kvfold.store, rows, caches[0], slots=slots, positions=None, also=caches[1:], **weights)


CASES: dict[str, Callable[[torch.device], Made]] = {
    "fold": lambda device: snapped(FOLD, 5, device),
    "rows": lambda device: snapped(ROWS, 4, device, torch.bfloat16),
    "pair": pair,
    "store": store,
    "window": window,
    "bare": bare,
    "engine": engine,
    "placed": placed,
}
HEADLINES = {
    "window": "REFUSED: 1 window", "bare": "REFUSED: 2 of 3 sequences", "engine": "REFUSED: 1 window",
    "placed": "REFUSED: 1 of 5 rows",
}  # fmt: skip


def rewrite(path: Path, change: Callable[[dict, dict, dict], None]) -> None:
    """`change(tensors, metadata, about)` and the file written again."""
    with safe_open(path, framework="pt") as file:
        said = dict(file.metadata())
    tensors, about = load_file(path), json.loads(said["about"])
    change(tensors, said, about)
    said["about"] = json.dumps(about)
    said["crc32"] = str(zlib.crc32(said["about"].encode()))
    save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata=said)
