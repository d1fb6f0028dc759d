"""What a training call is made of, between its checks, autograd and the backends."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from ..spec import CompressorSpec
from ..storage.cache import EntryCache
from ..storage.fold_state import state_kind
from ..storage.formats import FORMATS, RecordFormat
from ..storage.pack import unpack_records

ROWS_OF_A_PAGE = 64  # of the records that fake quantization makes
MOST_AGAIN = 8  # rows of a window that the backward folds again; of longer ones the fold is kept


class Inputs(NamedTuple):
    """The tensors of a call. value: rows `[K | S]` where `score` is None. pieces: of its `Packing`. scale: of records."""

    value: torch.Tensor
    score: torch.Tensor | None
    pieces: torch.Tensor
    ape: torch.Tensor | None
    norm_weight: torch.Tensor
    rope: torch.Tensor | None
    scale: torch.Tensor | None

    @property
    def wide(self) -> torch.dtype:
        """What is summed and kept in: fp64 of fp64, else fp32."""
        return torch.float64 if self.value.dtype == torch.float64 else torch.float32

    @property
    def kv_score(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self.value if self.score is None else (self.value, self.score)


class How(NamedTuple):
    """All else of a call. fmt: of fake quantization, None without. backend: one of `BACKENDS`, after the checks."""

    spec: CompressorSpec
    round_rows: bool
    out_dtype: torch.dtype
    fmt: RecordFormat | None
    latent: bool
    backend: str

    @property
    def record(self) -> RecordFormat:
        """What finishing an entry goes by: the format of fake quantization, or one of plain rows."""
        return _record(self.fmt, self.out_dtype, self.round_rows)

    def capacity(self, x: Inputs) -> int:
        return x.value.shape[0] // self.spec.ratio

    @property
    def keeps(self) -> bool:
        """Whether the fold of each entry is kept for the backward: `Entries.kept`."""
        return self.spec.gate and (state_kind(self.spec) == "fold" or self.spec.window_rows > MOST_AGAIN)

    def kept_shape(self, x: Inputs) -> tuple[int, ...]:
        return (3, self.capacity(x), self.spec.head_dim) if self.keeps else (0,)

    def latent_shape(self, x: Inputs) -> tuple[int, ...]:
        return (self.capacity(x), self.spec.head_dim) if self.latent else (0,)


@lru_cache(maxsize=256)
def _record(fmt: RecordFormat | None, out_dtype: torch.dtype, round_rows: bool) -> RecordFormat:
    """Remembered, as a format checks itself when it is made."""
    return replace(fmt or FORMATS["bf16" if out_dtype == torch.bfloat16 else "fp32"], round_rows=round_rows)


class Entries(NamedTuple):
    """What the forward gives.

    entries: `[capacity, head_dim]` in `out_dtype`. latent: the same before RoPE; without `latent=True` an empty tensor.
    kept: what the backward takes besides the inputs, fp32: `[3, capacity, head_dim]`, the largest score, the inverse of the
    sum of weights and the pooled row of each channel, zeros where there is no entry; of windows of up to 8 tokens an empty
    tensor.
    """

    entries: torch.Tensor
    latent: torch.Tensor
    kept: torch.Tensor


class Gradients(NamedTuple):
    """What the backward gives.

    value: as kv_score, or as the first of two tensors. score: as the second, or None. ape, norm_weight: fp32, whatever the
    dtype of the parameter; ape None where there is none.
    """

    value: torch.Tensor
    score: torch.Tensor | None
    ape: torch.Tensor | None
    norm_weight: torch.Tensor


def scratch_cache(x: Inputs, how: How) -> EntryCache:
    """A cache for the records of all entries of a call with fake quantization; entry e has slot e."""
    pages = -(-how.capacity(x) // ROWS_OF_A_PAGE)
    scale = 1.0 if x.scale is None else x.scale
    return EntryCache.allocate(how.record, pages, ROWS_OF_A_PAGE, how.spec, device=x.value.device, scale=scale)


def read_back(cache: EntryCache, x: Inputs, how: How) -> torch.Tensor:
    """What an attention kernel reads of the records, zeros in rows without an entry."""
    found = unpack_records(cache, torch.arange(how.capacity(x), device=x.value.device))
    there = x.pieces[: how.capacity(x), 1:2] >= 0
    return torch.where(there, found, 0.0).to(how.out_dtype)
