"""The plans of a group of layers, at addresses that stay: what CUDA graphs record.

vLLM builds the metadata of a step before the step, outside of any graph, and so are plans updated. Which plan a recorded call
reads must follow from the graph alone, not from the step:

- a step whose requests all bring at most 1 + drafts tokens has a plan for its number of requests. vLLM records its decode
  graphs over these, padded to the graph's number of requests;
- any other step, and any number of requests, has one plan, sized by vLLM's limits. So have graphs that vLLM records over parts
  of a model (piecewise), as these are replayed for any number of requests. Once it is recorded, every step updates it.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

from ...plan import StepPlan
from ..errors import Errors

ERRORS = Errors()


class Limits(NamedTuple):
    """Of vLLM: most requests and tokens of a step, and most tokens of a request that decodes."""

    requests: int
    tokens: int
    decode: int


class Batch(NamedTuple):
    """A step, as vLLM tells its metadata builders: `requests` and `tokens` with padding, `longest` a bound on each request."""

    requests: int
    tokens: int
    longest: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor


class Recorded(Enum):
    """Whether a call is being recorded in a CUDA graph: of the whole model, or of a piece of it."""

    NOT = 0
    WHOLE = 1
    PIECE = 2


class StateIn(NamedTuple):
    """How plans find the state. kind: "pages", "rings" (one block for each request) or "slots" (that block is a fold state)."""

    kind: str
    page_size: int


class Plans:
    """The plans of the compressors that share tables of state pages, and slots of cache entries.

    Args:
        token_slots: int64 `[limits.tokens]`, the slot of each token's entry, which vLLM writes before each `update`; None if
            calls over these plans have no cache.
    """

    def __init__(self, ratio: int, limits: Limits, state: StateIn, token_slots: torch.Tensor | None) -> None:
        self.ratio, self.limits, self.state, self.token_slots = ratio, limits, state, token_slots
        self.current: StepPlan | None = None
        self._recorded = False
        self._plans: dict[tuple[int, ...], StepPlan] = {}
        self._any: StepPlan | None = None
        self._lengths: torch.Tensor | None = None
        self._ends: torch.Tensor | None = None

    def update(self, batch: Batch) -> None:
        """Plans a step: what `current` is, and what recorded calls will read."""
        short = batch.longest <= self.limits.decode
        if short:
            self.current = self._update(batch, batch.query_start_loc, batch.seq_lens, self.limits.decode, None)
        if not short or self._recorded or self._any is None:
            whole = self._pad(batch)
            self._any = self._update(whole, self._ends, self._lengths, self.limits.tokens, self.limits.tokens)
            self.current = self.current if short else self._any

    def choose(self, recorded: Recorded = Recorded.NOT) -> StepPlan:
        """The plan for a call now. recorded: where it is being recorded."""
        if self.current is None:
            raise RuntimeError("plans must be updated before a step: vLLM built no metadata of this group of layers")
        plan = self._any if recorded is Recorded.PIECE else self.current
        self._recorded |= recorded is not Recorded.NOT and plan is self._any
        return plan

    def _pad(self, batch: Batch) -> Batch:
        """The step as one of as many requests as there can be, in buffers of ours; those behind its own bring no tokens."""
        table = batch.block_table
        room = table.untyped_storage().nbytes() // table.element_size() - table.storage_offset()
        rows = min(self.limits.requests, (room - table.shape[1]) // max(table.stride(0), 1) + 1)
        rows, n = max(rows, batch.requests), batch.requests
        if self._lengths is None or len(self._lengths) != rows:
            self._lengths = torch.zeros(rows, dtype=torch.int32, device=table.device)
            self._ends = torch.zeros(rows + 1, dtype=torch.int32, device=table.device)
        self._lengths[:n].copy_(batch.seq_lens)
        self._ends[: n + 1].copy_(batch.query_start_loc)
        self._ends[n + 1 :].copy_(batch.query_start_loc[n:].expand(rows - n))
        return batch._replace(requests=rows, block_table=table.as_strided((rows, table.shape[1]), table.stride()))

    def _update(self, batch: Batch, ends: torch.Tensor, lengths: torch.Tensor, longest: int, tokens: int | None) -> StepPlan:
        table = batch.block_table
        key = (batch.requests, longest, table.data_ptr(), table.stride(0), table.shape[1])
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._build(table, ends, lengths, longest, tokens)
        else:
            plan.update(cu_seqlens=ends, seq_lens=lengths)
        return plan

    def _build(
        self, table: torch.Tensor, ends: torch.Tensor, lengths: torch.Tensor, longest: int, tokens: int | None
    ) -> StepPlan:
        if self.state.kind == "slots":
            where = {"state_slots": table[:, 0], "null_slot": 0}
        else:
            pages = table[:, :1] if self.state.kind == "rings" else table
            where = {"block_tables": (pages, pages), "page_size": self.state.page_size, "null_page": 0}
            where |= {"ring": True} if self.state.kind == "rings" else {}
        where |= {} if self.token_slots is None else {"token_slots": self.token_slots}
        return StepPlan.build(
            self.ratio, None, ends, longest, seq_lens=lengths, max_tokens=tokens, errors=ERRORS[table.device], **where
        )
