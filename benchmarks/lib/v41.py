"""V4.1's four source layers as a step pays for them: a launch for latent and main record of each, and one for its index key.

Between the two an engine has a linear layer, which makes the row of the key of the latent. It is not kvfold's, so it is not
here: the rows of the keys are there, as it would have left them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

import kvfold

from . import floor
from .floor import Traffic
from .protocol import Case, Variant

LAYERS = (2, 2, 2, 1)  # the ratio of each source layer
MAIN, KEY = "v41_mxfp8_interleaved_vllm", "indexer_mxfp4_v41"
STATES = ("fold", "ring")  # of ratio 2: kvfold's own, or vLLM's raw rows in fp32
ROWS_PER_PAGE = 64
RING = 8  # positions that a sequence has in vLLM's ring, in one block; block 0 is nobody's
BATCHES = (16, 64, 256)
STEPS = ((1, "hit"), (1, "spread"), (4, "hit"))  # new tokens, and of ratio 2 whether all sequences end a window or half of them


def cases() -> list[dict[int, Case]]:
    """Each step, as the case of either ratio. Their name is that of ratio 2."""
    return [
        {ratio: Case("decode", 512, ratio, batch, new, mode) for ratio in (2, 1)} for new, mode in STEPS for batch in BATCHES
    ]


def key_spec(ratio: int) -> kvfold.CompressorSpec:
    """Of the index key, which is stored by the plan of its layer."""
    return replace(kvfold.V41_INDEX_K, ratio=ratio, gate=ratio > 1)


class Traffics(NamedTuple):
    """Bytes of the two launches of a layer."""

    compress: Traffic
    store: Traffic

    @property
    def together(self) -> Traffic:
        return Traffic(self.compress.read + self.store.read, self.compress.write + self.store.write)


def traffic(case: Case, state: str) -> Traffics:
    """Of one layer. What both launches need, the plan and rotations, both read."""
    main = floor.traffic(case, Variant(state if case.ratio > 1 else "none", (MAIN,)), page_size=RING)
    entries = sum((start + case.new) // case.ratio - start // case.ratio for start in case.start_positions())
    key = floor.stored(case, key_spec(case.ratio), KEY)
    width = key_spec(case.ratio).head_dim
    return Traffics(Traffic(main.read, main.write + entries * 512 * 2), Traffic(key.read + entries * width * 2, key.write))


class Buffers(NamedTuple):
    """What one layer of one buffer set has for itself."""

    kv_score: torch.Tensor
    state: kvfold.FoldState | kvfold.WindowState | None
    latent: torch.Tensor
    cache: kvfold.EntryCache
    key_rows: torch.Tensor
    key_cache: kvfold.EntryCache


class Layer:
    """A source layer of one ratio in a step: its plan and weights, and any number of buffer sets for them."""

    def __init__(self, case: Case, state: str, device: str = "cuda") -> None:
        self.case, self.device = case, device
        self.kind = state if case.ratio > 1 else "none"
        self.spec, self.key_spec = case.spec, key_spec(case.ratio)
        starts = case.start_positions()
        self.start_pos = torch.tensor(starts, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.new
        last = max(starts) + case.new
        self.cache_pages = -(-(last // case.ratio + 1) // ROWS_PER_PAGE)
        pages = torch.arange(case.batch * self.cache_pages, dtype=torch.int32, device=device).view(case.batch, -1)
        options: dict = {"cache_block_table": pages, "rows_per_page": ROWS_PER_PAGE}
        if self.kind == "fold":
            options["state_slots"] = torch.arange(case.batch, dtype=torch.int32, device=device)
        elif self.kind == "ring":
            blocks = 1 + torch.randperm(case.batch, device=device).int()[:, None]
            options |= {"block_tables": (blocks, blocks), "page_size": RING, "ring": True, "null_page": 0}
            options["cache_block_table"] = pages + 1
        self.plan = kvfold.StepPlan.build(case.ratio, self.start_pos, self.cu_seqlens, case.new, **options)
        self.norms = [torch.ones(spec.head_dim, device=device) for spec in (self.spec, self.key_spec)]
        self.rope = kvfold.reference.rope_table(last + 1, self.spec.rope_dim).to(device)

    def buffers(self) -> Buffers:
        case, spec, device = self.case, self.spec, self.device

        def rows(count: int, width: int) -> torch.Tensor:
            return torch.randn(count, width, device=device).bfloat16()

        state = None
        if self.kind == "fold":
            state = floor.held_state(case, spec, self.start_pos)
        elif self.kind == "ring":
            pool = torch.randn(case.batch + 1, RING, 2 * spec.channels, device=device)
            state = kvfold.WindowState(pool[..., : spec.channels], pool[..., spec.channels :])
        pages = case.batch * self.cache_pages + 1
        caches = [
            kvfold.EntryCache.allocate(fmt, pages, ROWS_PER_PAGE, one, device=device)
            for fmt, one in ((MAIN, spec), (KEY, self.key_spec))
        ]
        entries = self.plan.entry_capacity
        kv_score, key_rows = rows(case.batch * case.new, spec.kv_score_width), rows(entries, self.key_spec.head_dim)
        latent = torch.zeros(entries, spec.head_dim, dtype=torch.bfloat16, device=device)
        return Buffers(kv_score, state, latent, caches[0], key_rows, caches[1])

    def calls(self, own: Buffers) -> tuple[Callable[[], None], Callable[[], None]]:
        """The two launches over a buffer set."""
        plan, (norm, key_norm) = self.plan, self.norms
        given = {"spec": self.spec, "ape": None, "norm_weight": norm, "rope": self.rope, "latent": own.latent}
        key = {"spec": self.key_spec, "norm_weight": key_norm, "rope": self.rope}
        return (
            lambda: kvfold.compress(own.kv_score, plan, own.state, own.cache, **given),
            lambda: kvfold.store(own.key_rows, plan, own.key_cache, **key),
        )


class Step:
    """One step of the four layers; each has buffers of its own, and those of a ratio share plan and weights."""

    def __init__(self, cases: dict[int, Case], state: str, device: str = "cuda", layers: tuple[int, ...] = LAYERS) -> None:
        self.layers = layers
        self.made = {ratio: Layer(cases[ratio], state, device) for ratio in sorted(set(layers))}
        self.traffics = [traffic(cases[ratio], state) for ratio in layers]

    def launches(self) -> list[Callable[[], None]]:
        """Of a new buffer set, in order."""
        return [call for ratio in self.layers for call in self.made[ratio].calls(self.made[ratio].buffers())]

    def call(self, launches: list[Callable[[], None]]) -> Callable[[], None]:
        def step() -> None:
            for launch in launches:
                launch()

        return step

    def check(self, call: Callable[[], None]) -> None:
        """Makes the call once; a step that is refused would be fast."""
        call()
        for ratio, layer in self.made.items():
            if int(layer.plan.errors):
                raise RuntimeError(f"{layer.case.name}: plan.errors is {int(layer.plan.errors)} after the ratio-{ratio} layers")
