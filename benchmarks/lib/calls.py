"""Ready calls of `compress` and `compress_many`: the tensors of a case, as the step before would have left them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

import kvfold

from . import floor, protocol
from .floor import PAGE_SIZE
from .protocol import Case, Variant


class Weights(NamedTuple):
    """What a compressor takes in every step, shared by all buffer sets."""

    ape: torch.Tensor
    norm_weight: torch.Tensor
    rope: torch.Tensor


class Buffers(NamedTuple):
    """What one compressor of one buffer set has for itself; the cache or the pooled rows are None."""

    kv_score: torch.Tensor
    state: kvfold.FoldState | kvfold.WindowState
    cache: kvfold.EntryCache | None
    rows: torch.Tensor | None


class Step:
    """One step of a case: its plan and weights, and any number of buffer sets for them."""

    def __init__(
        self, case: Case, variant: Variant, device: str = "cuda", parts: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """parts: start and new tokens of each sequence, where they are not those of the case; over FoldStates only."""
        self.case, self.variant, self.device = case, variant, device
        self.specs = variant.specs(case)
        parts = parts or [(start, case.new) for start in case.start_positions()]
        self.starts, lengths = [start for start, _ in parts], [new for _, new in parts]
        self.batch, self.tokens, self.longest = len(parts), sum(lengths), max(lengths)
        self.start_pos = torch.tensor(self.starts, dtype=torch.int32, device=device)
        self.cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        end = max(start + new for start, new in parts)
        self.rows_per_page = 64 if case.ratio == 4 else 2
        self.cache_pages = -(-(end // case.ratio + 1) // self.rows_per_page)
        self.plan = self.make_plan()
        self.weights = [
            Weights(
                torch.randn(spec.ratio, spec.channels, device=device),
                torch.ones(spec.head_dim, device=device),
                kvfold.reference.rope_table(end + 1, spec.rope_dim).to(device),
            )
            for spec in self.specs
        ]

    def make_plan(self, **more: object) -> kvfold.StepPlan:
        """A plan of this step; sequences have their cache pages one behind the other. more: options of `StepPlan.build`."""
        case, device = self.case, self.device
        cache = torch.arange(self.batch * self.cache_pages, dtype=torch.int32, device=device).view(self.batch, -1)
        options: dict = {"cache_block_table": cache, "rows_per_page": self.rows_per_page}
        if self.variant.state == "window":
            *tables, self.state_pages = window_tables(case)
            options |= {"block_tables": tuple(table.to(device) for table in tables), "page_size": PAGE_SIZE}
        else:
            options["state_slots"] = torch.arange(self.batch, dtype=torch.int32, device=device)
        return kvfold.StepPlan.build(
            case.ratio, self.start_pos, self.cu_seqlens, self.longest, max_tokens=self.tokens, **options | more
        )

    def buffers(self, rows_dtype: torch.dtype = torch.bfloat16) -> list[Buffers]:
        """A new buffer set: one `Buffers` for each compressor of the call."""
        case, found = self.case, []
        for spec, output in zip(self.specs, self.variant.outputs, strict=True):
            kv_score = torch.randn(self.tokens, 2 * spec.channels, dtype=torch.bfloat16, device=self.device)
            state = self._window_state(spec) if self.variant.state == "window" else floor.held_state(case, spec, self.start_pos)
            cache = rows = None
            if output == "rows":
                rows = torch.empty(self.plan.entry_capacity, spec.head_dim, dtype=rows_dtype, device=self.device)
            else:
                pages = self.batch * self.cache_pages
                cache = kvfold.EntryCache.allocate(output, pages, self.rows_per_page, spec, device=self.device)
            found.append(Buffers(kv_score, state, cache, rows))
        return found

    def call(self, buffers: list[Buffers], pdl: str = "default") -> Callable[[], None]:
        """The call itself; `pdl` is "on", "off" or "default"."""
        options = {} if pdl == "default" else {"pdl": pdl == "on"}
        if self.variant.state == "many":
            compressors = [
                (b.kv_score, b.state, b.cache, spec, *weights)
                for b, spec, weights in zip(buffers, self.specs, self.weights, strict=True)
            ]
            return lambda: kvfold.compress_many(compressors, self.plan, **options)
        (b,), (spec,), (weights,) = buffers, self.specs, self.weights
        options |= {"spec": spec, "rows": b.rows, **weights._asdict()}
        return lambda: kvfold.compress(b.kv_score, self.plan, b.state, b.cache, **options)

    def check(self, call: Callable[[], None]) -> None:
        """Makes the call once; a step that is refused would be fast."""
        call()
        if int(self.plan.errors):
            raise RuntimeError(f"{self.case.name}: plan.errors is {int(self.plan.errors)} after the benchmark's own step")

    def _window_state(self, spec: kvfold.CompressorSpec) -> kvfold.WindowState:
        pools = [torch.randn(self.state_pages, PAGE_SIZE, spec.channels, device=self.device) for _ in range(2)]
        return kvfold.WindowState(*pools)


def window_tables(case: Case) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Block tables of value and score pages, int32 `[batch, pages of a sequence]` on the CPU, and how many pages they use.

    Both are permuted, each in its own way. From the window before the step's first on, pages are the sequences' own: that is
    all that a step can touch. Those before, which an engine has and no step reads, are one page for all: so 256 sequences fit.
    """
    ends = [start + case.new for start in case.start_positions()]
    numbers = torch.zeros(case.batch, -(-max(ends) // PAGE_SIZE), dtype=torch.int64)
    used = 1
    for b, end in enumerate(ends):
        first = max((end - case.new) // case.ratio - 1, 0) * case.ratio // PAGE_SIZE
        own = -(-end // PAGE_SIZE) - first
        numbers[b, first : first + own] = torch.arange(used, used + own)
        used += own
    draw = torch.Generator().manual_seed(0)
    value, score = (torch.randperm(used, generator=draw)[numbers].int() for _ in range(2))
    return value, score, used


def calls_of(case: Case, variant: Variant, pdl: str = "default") -> list[Callable[[], None]]:
    """One checked call for each buffer set that the protocol wants."""
    step = Step(case, variant)
    sets = protocol.buffer_sets(floor.traffic(case, variant).total)
    calls = [step.call(step.buffers(), pdl) for _ in range(sets)]
    step.check(calls[0])
    return calls
