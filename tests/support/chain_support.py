"""`Chain`: layers of a small model in fixed buffers, stepped over and over, to test dependent launches and CUDA graphs."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from support.helpers import Backend, Weights
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, StepPlan

BATCH, SLOTS, MOST, AHEAD = 6, 4, 4, 4  # sequences of a step, slots, longest step, plans made ahead
LENGTH, PAGE, ROWS_PER_PAGE = 400, 16, 16  # where a sequence ends, positions per page of raw rows, entries per page
WIDE, NARROW = kvfold.V4_HCA, CompressorSpec(head_dim=128, ratio=128)
MAIN, INDEXER = kvfold.V4_CSA, kvfold.V4_INDEXER
# By the ratio and the kind of state that share a plan: what each layer calls in a step, and for which compressors.
LAYERS: dict[tuple[int, str], list[tuple[str, list[tuple[CompressorSpec, str]]]]] = {
    (128, "fold"): [
        ("compress", [(WIDE, "fp8_ds_mla")]),
        ("compress", [(NARROW, "fp32")]),
        ("idle", []),
        ("compress and store", [(WIDE, "fp8_ds_mla")]),
    ],
    (4, "fold"): [
        ("many", [(MAIN, "fp8_ds_mla"), (INDEXER, "indexer_mxfp4")]),
        ("compress", [(INDEXER, "fp32")]),
        ("many", [(MAIN, "bf16"), (INDEXER, "indexer_fp8_vllm")]),
    ],
    (128, "window"): [("compress", [(WIDE, "fp8_ds_mla")]), ("compress", [(NARROW, "fp32")])],
    (4, "window"): [("compress", [(MAIN, "fp8_ds_mla")]), ("compress", [(INDEXER, "indexer_mxfp4")])],
}


class Compressor(NamedTuple):
    """One compressor's buffers; `kv_score` has one tensor for each of the plans made ahead."""

    spec: CompressorSpec
    state: kvfold.FoldState | kvfold.WindowState
    cache: kvfold.EntryCache
    kv_score: list[Tensor]
    ape: Tensor
    norm_weight: Tensor
    rope: Tensor
    rows: Tensor


class Step(NamedTuple):
    """What an engine writes before a step, on the CPU: the i-th sequence of the batch has slot `slots[i]`, -1 for none."""

    start_pos: Tensor
    cu_seqlens: Tensor
    slots: Tensor
    seed: int


def script(rounds: int, seed: int, live: int = BATCH) -> list[list[Step]]:
    """Decode steps of 1 to 4 tokens, any number of them rejected, of sequences that end and make room for others.

    live: the most sequences of a step that have tokens.
    """
    rng, at = random.Random(seed), [0] * SLOTS
    found = []
    for step in range(rounds * AHEAD):
        slots = [*rng.sample(range(SLOTS), SLOTS), -1, -1][:BATCH]
        rng.shuffle(slots)
        starts, lengths, used = [], [], 0
        for slot in slots:
            if slot == -1:
                # Absent, but within the tables: with block tables a position beyond them would be counted.
                starts.append(rng.randint(0, LENGTH - MOST))
                lengths.append(rng.randint(0, MOST))
                continue
            if at[slot] + MOST > LENGTH or rng.random() < 0.01:
                at[slot] = 0
            n = rng.randint(0 if rng.random() < 0.2 else 1, MOST) if used < live else 0
            used += n > 0
            starts.append(at[slot])
            lengths.append(n)
            at[slot] += rng.randint(n // 2, n)
        ints = {"dtype": torch.int32}
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        found.append(Step(torch.tensor(starts, **ints), ends, torch.tensor(slots, **ints), 1000 * seed + step))
    return [found[i : i + AHEAD] for i in range(0, len(found), AHEAD)]


class Chain:
    """The layers' state and caches, and the buffers that `load` fills and `launch` reads."""

    def __init__(self, backend: Backend, *, pdl: bool | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.backend, self.pdl, self.dtype = backend, pdl, dtype
        device = backend.device
        ints = {"dtype": torch.int32, "device": device}
        # What is read again by `StepPlan.update`: all start as a step in which nobody has tokens.
        self.starts = [torch.zeros(BATCH, **ints) for _ in range(AHEAD)]
        self.ends = [torch.zeros(BATCH + 1, **ints) for _ in range(AHEAD)]
        self.slots = [torch.full((BATCH,), -1, **ints) for _ in range(AHEAD)]
        columns = -(-LENGTH // PAGE)
        self.tables = [[torch.full((BATCH, columns + i), -1, **ints) for i in (0, 1)] for _ in range(AHEAD)]
        self.order = [torch.randperm(SLOTS * columns, generator=torch.Generator().manual_seed(i)).int() for i in (0, 1)]
        self.entries = {r: [torch.full((BATCH, self._pages(r)), -1, **ints) for _ in range(AHEAD)] for r in (4, 128)}
        self.plans = {key: [self._plan(*key, k) for k in range(AHEAD)] for key in LAYERS}
        self.idle = StepPlan.build(
            128, torch.zeros(2, **ints), torch.zeros(3, **ints), MOST, state_slots=torch.zeros(2, **ints),
            entry_slots=torch.zeros(2, dtype=torch.int64, device=device),
        )  # fmt: skip
        self.layers = {
            key: [(how, [self._compressor(*one, key[1]) for one in some]) for how, some in layers]
            for key, layers in LAYERS.items()
        }

    @staticmethod
    def _pages(ratio: int) -> int:
        return -(-LENGTH // ratio // ROWS_PER_PAGE)

    def _plan(self, ratio: int, kind: str, k: int) -> StepPlan:
        tables = self.tables[k]
        state = (
            {"state_slots": self.slots[k]} if kind == "fold" else {"block_tables": (tables[0], tables[1]), "page_size": PAGE}
        )
        return StepPlan.build(
            ratio, self.starts[k], self.ends[k], MOST,
            cache_block_table=self.entries[ratio][k], rows_per_page=ROWS_PER_PAGE, **state,
        )  # fmt: skip

    def _compressor(self, spec: CompressorSpec, fmt: str, kind: str) -> Compressor:
        device, weights = self.backend.device, Weights.make(spec)
        if kind == "fold":
            state = kvfold.FoldState.allocate(spec, SLOTS, MOST, device=device)
        else:
            state = kvfold.WindowState.allocate(spec, len(self.order[0]), PAGE, device=device)
            state.kv.zero_()
            state.score.zero_()
        return Compressor(
            spec,
            state,
            kvfold.EntryCache.allocate(fmt, SLOTS * self._pages(spec.ratio), ROWS_PER_PAGE, spec, device=device),
            [torch.zeros(BATCH * MOST, 2 * spec.channels, dtype=self.dtype, device=device) for _ in range(AHEAD)],
            weights.ape.to(device),
            weights.norm_weight.to(device),
            weights.rope.to(device),
            torch.zeros(self.plans[spec.ratio, kind][0].entry_capacity, spec.head_dim, device=device),
        )

    @property
    def compressors(self) -> list[Compressor]:
        return [c for layers in self.layers.values() for _, some in layers for c in some]

    def load(self, steps: list[Step]) -> None:
        """Writes what an engine writes before steps: lengths, slots, pages and tokens."""
        columns = self.tables[0][0].shape[1]
        for k, step in enumerate(steps):
            self.starts[k].copy_(step.start_pos)
            self.ends[k].copy_(step.cu_seqlens)
            self.slots[k].copy_(step.slots)
            present = step.slots >= 0
            slots = step.slots.clamp(min=0).long()
            for table, order in zip(self.tables[k], self.order, strict=True):
                # With block tables nobody is absent: pages that are not there say that nothing is kept.
                table[:, :columns].copy_(torch.where(present[:, None], order.view(SLOTS, columns)[slots], -1))
            for ratio, tables in self.entries.items():
                pages = torch.arange(SLOTS * self._pages(ratio)).int().view(SLOTS, -1)
                tables[k].copy_(torch.where(present[:, None], pages[slots], -1))
            draw = torch.Generator().manual_seed(step.seed)
            noise = torch.randn(BATCH * MOST, 2 * MAIN.channels, generator=draw)
            for c in self.compressors:
                c.kv_score[k].copy_(noise[:, : c.kv_score[k].shape[1]])

    def launch(self) -> None:
        """All launches of the loaded steps.

        The plans of several steps are made first; then each layer does one step after the other, so that most launches read
        what the launch right before them wrote.
        """
        for plans in self.plans.values():
            for k, plan in enumerate(plans):
                plan.update(self.starts[k], self.ends[k])
        for key, layers in self.layers.items():
            for how, some in layers:
                for k, plan in enumerate(self.plans[key]):
                    self.call(how, some, plan, k)

    def call(self, how: str, some: list[Compressor], plan: StepPlan, k: int) -> None:
        """A layer's step."""
        options = {"backend": self.backend.name, "pdl": self.pdl}
        if how == "idle":  # a launch in which no program has anything to do
            (_, (c,)) = self.layers[128, "fold"][0]
            kvfold.compress(c.kv_score[k], self.idle, c.state, c.cache, **named(c), **options)
        elif how == "many":
            kvfold.compress_many([(c.kv_score[k], c.state, c.cache, *named(c).values()) for c in some], plan, **options)
        elif how == "compress":
            for c in some:
                kvfold.compress(c.kv_score[k], plan, c.state, c.cache, **named(c), **options)
        else:
            for c in some:
                kvfold.compress(c.kv_score[k], plan, c.state, None, **{**named(c), "norm_weight": None}, rows=c.rows, **options)
                rest = {name: value for name, value in named(c).items() if name != "ape"}
                kvfold.store(c.rows, plan, c.cache, **rest, **options)

    def check_errors(self) -> None:
        for key, plans in self.plans.items():
            assert not any(int(plan.errors) for plan in plans), f"refused by layers of {key}"

    def contents(self) -> list[Tensor]:
        """Copies of all that calls write, as bytes."""
        found = []
        for c in self.compressors:
            state = (c.state.rows, c.state.positions) if isinstance(c.state, kvfold.FoldState) else (c.state.kv, c.state.score)
            found += [*state, c.cache.storage, c.rows]
            if c.cache.scales is not None:
                found.append(c.cache.scales)
        found += [plan.errors for plans in self.plans.values() for plan in plans]
        return [tensor.reshape(-1).view(torch.uint8).clone() for tensor in found]


def named(c: Compressor) -> dict[str, object]:
    return {"spec": c.spec, "ape": c.ape, "norm_weight": c.norm_weight, "rope": c.rope}


def same(one: list[Tensor], other: list[Tensor]) -> None:
    differing = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not torch.equal(a, b)]
    assert not differing, f"buffers {differing} of {len(one)} differ"
