"""`Step`: what stands in SGLang's metadata in the place of its compress plan, for all layers of one ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...plan import StepPlan
from ...storage.host import on_device
from .source import ERRORS, Source, source_of
from .tables import SwaPages, kept_positions, kept_tokens, request_rings

_verify_tokens: list[int] = []  # of the verify step whose metadata SGLang is building


def verify(build: Any, backend: Any, *args: Any, **kwargs: Any) -> Any:
    """An AROUND hook of what builds a verify step: no request of it has more tokens than there are drafts."""
    _verify_tokens.append(int(backend.speculative_num_draft_tokens))
    try:
        return build(backend, *args, **kwargs)
    finally:
        _verify_tokens.pop()


@dataclass(eq=False)
class Step:
    """Lengths and request slots of a step, and the plan that `bind` makes of them once SGLang knows the cache slots.

    SGLang builds it in a CUDA graph or before one, and copies a new step into the one that a graph was recorded with: all
    tensors keep their addresses.

    Attributes:
        most, tokens: host bounds on the new tokens of a request, and of all.
        slots, seq_lens: int64 `[B]`, the step's own copies; `cu_seqlens`: int32 `[B + 1]`.
        num_pages: host bound on the prefix pages of a request.
        banks: whether the online pool's drafts go to banks.
        long: of rings of SWA pages, whether new rows are stored behind the launch; of others, a prefill.
        on_host: a long step whose lengths the host knows; then it chose `kept`, or `may_hit`.
        may_hit: whether a request may go on at the end of a prefix page.
        kept: tokens, their places in a group of 4, and rows of the pool: what is stored behind the launch.
        table: of the state's pages, or of snapshots.
        hits: as `restore` takes them.
    """

    source: Source
    compress_ratio: int
    most: int
    tokens: int
    slots: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens: torch.Tensor
    maps: SwaPages
    num_pages: int
    banks: bool
    long: bool
    on_host: bool
    may_hit: bool
    kept: tuple[torch.Tensor, ...] = ()
    hits: tuple[torch.Tensor, ...] = ()
    table: torch.Tensor | None = None
    out_loc: torch.Tensor | None = None
    plan: StepPlan | None = None
    stream: int | None = None

    def copy_(self, other: Step) -> None:
        """Becomes another step of the same shape, in place. Neither may be of a prefill whose lengths the host knew."""
        mine, its = ((s.compress_ratio, s.source, s.most, s.tokens, s.banks, len(s.slots)) for s in (self, other))
        if mine != its:
            raise ValueError(f"other must be a step of the same shape, {mine}, got {its}")
        if self.on_host or other.on_host:
            raise ValueError("other must be planned on the device, as SGLang does for graphs, got a step planned on the host")
        self.slots.copy_(other.slots)
        self.seq_lens.copy_(other.seq_lens)
        self.cu_seqlens.copy_(other.cu_seqlens)
        if self.plan is not None:
            self._fill()
            self._mark_stream()
            self.plan.update(cu_seqlens=self.cu_seqlens, seq_lens=self.seq_lens)

    def bind(self, out_loc: torch.Tensor) -> None:
        """Plans the step. `out_loc` `[tokens]`: SGLang's cache slot of each token, 0 where there is none."""
        self.out_loc = out_loc
        self._fill()
        self._mark_stream()
        places: dict[str, Any] = {"state_slots": self.slots, "null_slot": 0}
        if self.source.kind in ("ring", "pages"):
            places = {
                "block_tables": (self.table, self.table),
                "page_size": min(self.compress_ratio, self.source.ring),
                "ring": True,
            }
        elif self.table is not None:
            places |= {"snapshot_table": self.table, "snapshot_page_size": self.source.page_size}
        self.plan = StepPlan.build(
            self.compress_ratio,
            None,
            self.cu_seqlens,
            self.most,
            seq_lens=self.seq_lens,
            max_tokens=self.tokens,
            token_slots=out_loc,
            no_slot=0,
            errors=ERRORS[out_loc.device],
            **places,
        )

    def _mark_stream(self) -> None:
        self.stream = torch.cuda.current_stream().cuda_stream if self.slots.is_cuda else None

    def _fill(self) -> None:
        """Computes tables, hits and kept rows, into the tensors that are there."""
        source, slots = self.source, self.slots
        start = self.seq_lens - self.cu_seqlens.diff()
        if source.kind == "ring":
            self._set("table", (request_rings(slots, max(source.ring // self.compress_ratio, 1)),))
        elif source.kind == "pages":
            width = (self.most + 10) // 4 + 1  # of a window's old rows, the new ones and both ends
            end = start if self.long else self.seq_lens
            self._set("table", (self.maps.groups(slots, start, end, source.ring, width),))
            if self.long:
                self._set("kept", self._kept(start))
        elif source.kind == "fold" and self.compress_ratio == 4:
            self._set("table", (self.maps.pages(slots, self.num_pages),))
            if self.may_hit:
                self._set("hits", self.maps.hits(slots, start))

    def _kept(self, start: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of a long step over rings of SWA pages: the new rows that later steps may read; all others go to nobody's row."""
        token = self.kept[0] if self.kept else torch.arange(self.tokens, device=start.device)
        b = torch.searchsorted(self.cu_seqlens[1:], token.to(torch.int32), right=True).clamp(max=len(start) - 1)
        position, slots = token - self.cu_seqlens[b] + start[b], self.slots[b]
        row = self.maps.ring_rows(slots, position.clamp(0, self.maps.req_to_token.shape[1] - 1), self.source.ring)
        if not self.on_host:
            keep = (token < self.cu_seqlens[-1]) & (slots > 0)
            keep &= kept_positions(position, self.seq_lens[b], self.source.ring, self.source.page_size)
            row = torch.where(keep, row, self.source.rows - 1)
        return token, position % self.compress_ratio, row

    def _set(self, name: str, new: tuple[torch.Tensor, ...]) -> None:
        old = getattr(self, name)
        if isinstance(old, torch.Tensor):
            old.copy_(new[0])
        elif old and len(old) == len(new):
            for mine, x in zip(old, new, strict=True):
                mine.copy_(x)
        else:
            setattr(self, name, new[0] if name == "table" else new)


def create_step(
    compress_ratio: int,
    *,
    is_prefill: bool,
    token_to_kv_pool: Any,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor | None = None,
    seq_lens_cpu: list[int] | None = None,
    extend_lens_cpu: list[int] | None = None,
    use_prefill_cuda_graph: bool = False,
    num_q_tokens: int | None = None,
    online_state_slot_offset: int = 0,
) -> Step:
    """What SGLang's `create_paged_compressor_data` is replaced by; its arguments are SGLang's."""
    source = source_of(token_to_kv_pool, compress_ratio)
    batch, device = req_pool_indices.shape[0], req_pool_indices.device
    host = is_prefill and extend_lens_cpu is not None and seq_lens_cpu is not None
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device)
    if not is_prefill:
        most, tokens = 1, batch
    else:
        torch.cumsum(extend_lens[:batch], 0, dtype=torch.int32, out=cu_seqlens[1:])
        tokens = sum(extend_lens_cpu[:batch]) if host else int(num_q_tokens)
        most = max(extend_lens_cpu[:batch], default=1) if host else tokens
        most = min([most, *_verify_tokens[-1:]])
    drafts = is_prefill and bool(_verify_tokens)
    # A step of more than ring - 7 tokens could write a row of a ring where it reads an old one. kvfold sees that of rings of a
    # request, not of those of SWA pages.
    long = most > source.ring - 7 if source.kind == "pages" else is_prefill and not drafts
    on_host, may_hit, kept, page_size = long and host, long, (), source.page_size
    if on_host:
        ends, new = seq_lens_cpu[:batch], extend_lens_cpu[:batch]
        may_hit = any(end > n and (end - n) % page_size == 0 for end, n in zip(ends, new, strict=True))
        if source.kind == "pages":
            kept = (on_device(kept_tokens(ends, new, source.ring, page_size), device),)
    longest = max(seq_lens_cpu[:batch], default=0) if host else req_to_token.shape[1]
    return Step(
        source,
        compress_ratio,
        max(most, 1),
        tokens,
        slots=req_pool_indices.to(torch.int64, copy=True),
        seq_lens=seq_lens[:batch].to(torch.int64, copy=True),
        cu_seqlens=cu_seqlens,
        maps=SwaPages(req_to_token, token_to_kv_pool.full_to_swa_index_mapping, page_size),
        num_pages=-(-longest // page_size),
        banks=online_state_slot_offset > 0,
        long=long,
        on_host=on_host,
        may_hit=may_hit,
        kept=kept,
    )
