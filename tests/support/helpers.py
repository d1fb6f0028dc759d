"""What tests share: seeded inputs, `Engine` (a serving engine in miniature, with canaries round its buffers), and bits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, reference
from kvfold.backend_triton import table as configs

CANARY = 0xA5
MARGIN = 4096  # canary bytes on each side of a buffer; keeps the buffer aligned
MAX_POSITIONS = 4096
SPECS = {"hca": kvfold.V4_HCA, "csa": kvfold.V4_CSA, "indexer": kvfold.V4_INDEXER}
SMALL_ROWS = {  # small ones whose state keeps input rows
    "rows": CompressorSpec(head_dim=32, ratio=4, overlap=True, rope_dim=16),
    "rows-2": CompressorSpec(head_dim=16, ratio=2, has_ape=False, rope_dim=8),
    "rows-3": CompressorSpec(head_dim=16, ratio=3, overlap=True, rope_dim=8),
}


class Backend(NamedTuple):
    """A value of `compress(backend=...)` and the device of its tensors."""

    name: str
    device: torch.device

    @property
    def slow(self) -> bool:
        """Whether this is Triton's interpreter: tests then draw fewer examples, of the same kind."""
        return self.name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def shape_of(name: str, backend: Backend) -> CompressorSpec:
    """One of SPECS, for tests to which only its kind matters: the interpreter takes milliseconds for a token, so there a window
    of fold rows has 16 of them. Windows of 128 are interpreted in tests/contract/test_bits.py and test_accuracy.py."""
    return replace(SPECS[name], ratio=16) if backend.slow and name == "hca" else SPECS[name]


def change_long_rows(monkeypatch: pytest.MonkeyPatch, **changed: object) -> None:
    """Another table of kernels: its rows for long steps over input rows have these values, programs in all."""
    changed = {k: n / configs.MULTIPROCESSORS if k.endswith("programs") else n for k, n in changed.items()}
    rows = (replace(c, **changed) if c.kind == "rows" and c.programs else c for c in configs.CONFIGS)
    monkeypatch.setattr(configs, "CONFIGS", tuple(rows))


def make_tokens(
    spec: CompressorSpec, n: int, seed: int, dtype: torch.dtype = torch.float32, score_scale: float = 1.0
) -> Tensor:
    """kv_score rows [n, 2*channels] on the CPU: unit normal values, normal scores times `score_scale`."""
    rows = torch.randn(n, 2 * spec.channels, generator=torch.Generator().manual_seed(seed))
    rows[:, spec.channels :] *= score_scale
    return rows.to(dtype)


@dataclass(frozen=True)
class Weights:
    """The parameters of a compressor, on the CPU."""

    ape: Tensor | None
    norm_weight: Tensor
    rope: Tensor

    @classmethod
    def make(cls, spec: CompressorSpec, seed: int = 0, max_positions: int = MAX_POSITIONS) -> Weights:
        g = torch.Generator().manual_seed(1000 + seed)
        ape = torch.randn(spec.ratio, spec.channels, generator=g) if spec.has_ape else None
        norm_weight = 1 + 0.2 * torch.randn(spec.head_dim, generator=g)
        return cls(ape, norm_weight, reference.rope_table(max_positions, spec.rope_dim))

    def entries(self, tokens: Tensor, spec: CompressorSpec) -> Tensor:
        """The fp64 reference entries of one sequence."""
        return reference.entries(tokens, spec, self.ape, self.norm_weight, self.rope)


class Step(NamedTuple):
    """What one call of `Engine.step` did: its plan, the errors it counted, and the pooled rows by (sequence, window)."""

    plan: kvfold.StepPlan
    errors: int
    pooled: dict[tuple[int, int], Tensor]


class Engine:
    """State, cache and weights of one compressor; window w of slot s has cache slot `s * max_entries + w`.

    State rows start as NaN and every buffer lies between canary bytes. Each step checks the canaries, and that nothing
    outside the batch's state slots and the step's cache slots changed.
    """

    def __init__(
        self,
        spec: CompressorSpec,
        backend: Backend,
        *,
        num_slots: int,
        max_new_tokens: int,
        max_entries: int = 8,
        fmt: str = "fp32",
        rows_per_page: int = 5,
        state_dtype: torch.dtype = torch.float32,
        weights: Weights | None = None,
    ) -> None:
        self.spec, self.backend, self.fmt, self.max_entries = spec, backend, fmt, max_entries
        self.weights = weights or Weights.make(spec)
        device = backend.device
        self.ape = None if self.weights.ape is None else self.weights.ape.to(device)
        self.norm_weight, self.rope = self.weights.norm_weight.to(device), self.weights.rope.to(device)
        self._guarded: list[tuple[str, Tensor]] = []
        self.snapshots: kvfold.Snapshots | None = None  # a test's own; then `step` takes their table

        self.state = self._make_state(num_slots, max_new_tokens, state_dtype)
        pages = -(-num_slots * max_entries // rows_per_page)
        like = kvfold.EntryCache.allocate(fmt, 1, rows_per_page, spec, device="meta")
        storage = self._allocate("cache.storage", (pages, like.storage.shape[1]), torch.uint8)
        self.cache = kvfold.EntryCache(storage, fmt, rows_per_page, spec)

    def _make_state(self, num_slots: int, max_new_tokens: int, dtype: torch.dtype) -> kvfold.FoldState:
        like = kvfold.FoldState.allocate(self.spec, num_slots, max_new_tokens, device="meta", dtype=dtype)
        rows = self._allocate("state.rows", tuple(like.rows.shape), like.rows.dtype)
        rows.fill_(torch.nan)
        positions = self._allocate("state.positions", tuple(like.positions.shape), torch.int32)
        positions.fill_(-1)
        return kvfold.FoldState(self.spec, rows, positions, max_new_tokens)

    def make_snapshots(self, num_pages: int, page_size: int) -> None:
        """Snapshots of the state, full of NaN and between canaries as well."""
        like = kvfold.Snapshots.allocate(self.spec, num_pages, page_size, device="meta", dtype=self.state.rows.dtype)
        rows = self._allocate("snapshots.rows", tuple(like.rows.shape), like.rows.dtype)
        rows.fill_(torch.nan)
        positions = self._allocate("snapshots.positions", tuple(like.positions.shape), torch.int32)
        positions.fill_(-1)
        self.snapshots = kvfold.Snapshots(self.spec, rows, positions, page_size)

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        whole = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8, device=self.backend.device)
        self._guarded.append((name, whole))
        return whole[MARGIN : MARGIN + size].view(dtype).view(shape)

    def check_canaries(self) -> None:
        """Bytes beside tensors are as they were, and the scratch of slices is as the next call needs it."""
        assert not any(scratch.any() for made in self.state._workspaces for scratch in made), "words or tickets were left"
        for name, whole in self._guarded:
            intact = bool((whole[:MARGIN] == CANARY).all()) and bool((whole[-MARGIN:] == CANARY).all())
            assert intact, f"bytes beside {name} were overwritten"

    def cache_slot(self, slot: int, window: int) -> int:
        return slot * self.max_entries + window

    def step(
        self,
        batch: list[tuple[int, int, Tensor]],
        *,
        strict: bool = True,
        padding: int = 0,
        snapshot_table: list[list[int]] | None = None,
    ) -> Step:
        """One call of `compress` for sequences (state slot, start position, new kv_score rows).

        `padding` appends that many rows of NaN to kv_score, beyond the last sequence. With `strict`, refusals fail.
        `snapshot_table`: a row for each sequence, where there are snapshots.
        """
        ratio, device = self.spec.ratio, self.backend.device
        tokens = [new for _, _, new in batch]
        dtype = tokens[0].dtype if tokens else torch.float32
        tokens.append(torch.full((padding, 2 * self.spec.channels), torch.nan, dtype=dtype))
        lengths = [len(new) for _, _, new in batch]
        owners = [
            (b, window)
            for b, (slot, start, new) in enumerate(batch)
            if slot != -1 and len(new) and start >= 0
            for window in range(start // ratio, (start + len(new)) // ratio)
        ]
        targets = [self.cache_slot(batch[b][0], window) for b, window in owners]
        plan = kvfold.StepPlan.build(
            ratio,
            torch.tensor([start for _, start, _ in batch], dtype=torch.int32, device=device),
            torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]).int().to(device),
            max([1, *lengths]),
            state_slots=torch.tensor([slot for slot, _, _ in batch], dtype=torch.int32, device=device),
            entry_slots=torch.tensor(targets, dtype=torch.int64, device=device),
            snapshot_table=None if snapshot_table is None else torch.tensor(snapshot_table, dtype=torch.int32, device=device),
            snapshot_page_size=None if snapshot_table is None else self.snapshots.page_size,
        )
        pooled = torch.full((len(targets), self.spec.head_dim), torch.nan, device=device)
        before = self.snapshot()
        self.compress(torch.cat(tokens).to(device), plan, rows=pooled)
        self.check_canaries()
        self.check_untouched(before, [slot for slot, _, _ in batch], targets)
        errors = int(plan.errors)
        assert errors == 0 or not strict, f"{errors} refused"
        return Step(plan, errors, {owner: pooled[i].cpu() for i, owner in enumerate(owners)})

    def compress(self, kv_score: Tensor, plan: kvfold.StepPlan, rows: Tensor | None = None) -> None:
        """`kvfold.compress` with this engine's tensors."""
        kvfold.compress(
            kv_score,
            plan,
            self.state,
            self.cache,
            spec=self.spec,
            ape=self.ape,
            norm_weight=self.norm_weight,
            rope=self.rope,
            rows=rows,
            snapshots=self.snapshots,
            backend=self.backend.name,
        )

    def snapshot(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the bits of state rows, tags and cache."""
        return tuple(tensor.clone() for tensor in self.live())

    def live(self) -> tuple[Tensor, Tensor, Tensor]:
        """The bits of state rows, tags and cache, where they are."""
        return bits(self.state.rows), self.state.positions, self.cache.storage

    def check_untouched(self, before: tuple[Tensor, Tensor, Tensor], slots: list[int], targets: list[int]) -> None:
        """All but these state slots and cache slots is as it was in a snapshot."""
        rows, tags, storage = self.live()
        own = [slot for slot in slots if 0 <= slot < self.state.num_slots]
        for now, expected, what in ((rows, before[0], "state rows"), (tags, before[1], "tags")):
            expected[own] = now[own]
            assert torch.equal(now, expected), f"the {what} of another slot changed"
        page, byte = self._record_bytes(targets)
        expected = before[2]
        expected[page, byte] = storage[page, byte]
        assert torch.equal(storage, expected), "cache bytes of another entry changed"

    def _record_bytes(self, slots: list[int]) -> tuple[Tensor, Tensor]:
        """Where the bytes of these cache slots are in `cache.storage`: pages [n, 1] and bytes [n, record]."""
        n = self.cache.rows_per_page
        index = torch.tensor(slots, dtype=torch.int64, device=self.backend.device)[:, None]
        page, row = index // n, index % n
        fmt = self.cache.format
        assert not fmt.separate and not fmt.interleaved, "the tails of this format are not behind the records of a page"
        width, tail = fmt.row_bytes(self.spec), fmt.tail_bytes(self.spec)
        body = row * width + torch.arange(width, device=index.device)
        byte = torch.cat([body, n * width + row * tail + torch.arange(tail, device=index.device)], dim=1)
        return page, byte

    def records(self, slot: int, windows: int) -> Tensor:
        """The cache bytes uint8 [windows, record] of a slot's first entries."""
        return self.cache.storage[self._record_bytes([self.cache_slot(slot, w) for w in range(windows)])].cpu()

    def entries(self, slot: int, windows: int) -> Tensor:
        """The dequantized fp32 entries [windows, head_dim] of a slot's first windows."""
        slots = torch.arange(windows, device=self.backend.device) + self.cache_slot(slot, 0)
        return self.cache.read(slots).cpu()

    def tags(self, slot: int) -> list[int]:
        return self.state.positions[slot].tolist()

    def held(self, slot: int, end: int) -> dict[int, Tensor]:
        """The bits of the state row of each position before `end` that a slot holds; a home row hides a spare one.

        Of input rows, whose halves are kept apart, by `(half, position)`, "lo" or "hi", which are whole rows without overlap.
        """
        rows, lo = bits(self.state.rows[slot]).cpu(), self.state.places[0] * self.spec.ratio
        found = {}
        for row, position in reversed(list(enumerate(self.state.held()[slot].tolist()))):
            if 0 <= position < end:
                found[position if self.state.kind == "fold" else (("lo", "hi")[row >= lo], position)] = rows[row]
        return found

    def needed(self, start: int) -> set:
        """What `held` must have for a step from `start`."""
        history = self.state.history_of(start)
        if self.state.kind == "fold":
            return set(history)
        own = range(start - start % self.spec.ratio, start)
        return {("lo", x) for x in history if self.spec.overlap} | {("hi", x) for x in own}

    def copy_slot(self, source: int, target: int) -> None:
        """Moves a sequence: its state rows, their tags and its entries."""
        self.state.rows[target] = self.state.rows[source]
        self.state.positions[target] = self.state.positions[source]
        page, byte = self._record_bytes([self.cache_slot(source, w) for w in range(self.max_entries)])
        to_page, to_byte = self._record_bytes([self.cache_slot(target, w) for w in range(self.max_entries)])
        self.cache.storage[to_page, to_byte] = self.cache.storage[page, byte]


def call_restore(engine: Engine, snapshots: kvfold.Snapshots, slots: list[int], pages: list[int], ends: list[int]) -> int:
    """`restore` between canaries; returns how many were refused."""
    slots, pages, start_pos, errors = (
        torch.tensor(x, dtype=torch.int32, device=engine.backend.device) for x in (slots, pages, ends, [0])
    )
    kvfold.restore(engine.state, snapshots, slots, pages, start_pos, errors, backend=engine.backend.name)
    engine.check_canaries()
    return int(errors)


def bits(x: Tensor) -> Tensor:
    """The same memory as integers, so that NaNs compare too."""
    return x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def norm_error(got: Tensor, want: Tensor) -> float:
    """The largest over rows of |got - want| / |want|, Euclidean norms, in fp64."""
    got, want = got.double(), want.double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())
