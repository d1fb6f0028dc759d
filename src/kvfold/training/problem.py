"""What a training call is made of, between its checks, autograd and the backends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch

from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import FORMATS, RecordFormat

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


@dataclass(frozen=True)
class How:
    """All else of a call. fmt: of fake quantization, None without. backend: one of `BACKENDS`, after the checks."""

    spec: CompressorSpec
    round_rows: bool
    out_dtype: torch.dtype
    fmt: RecordFormat | None
    latent: bool
    backend: str

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Once, as every launch looks for its kernel by it."""
        return hash((self.spec, self.round_rows, self.out_dtype, self.fmt, self.latent, self.backend))

    @property
    def record(self) -> RecordFormat:
        """What finishing an entry goes by: the format of fake quantization, or one of plain rows."""
        return _record(self.fmt, self.out_dtype, self.round_rows)

    @property
    def way_back(self) -> RecordFormat:
        """What the backward goes by: as all but the rounding of pooled rows passes gradients as they are, the same for many."""
        return _record(None, torch.bfloat16, self.round_rows)

    def capacity(self, x: Inputs) -> int:
        return x.value.shape[0] // self.spec.ratio

    @cached_property
    def keeps(self) -> bool:
        """Whether the fold of each entry is kept for the backward: `Entries.kept`."""
        return self.spec.gate and (state_kind(self.spec) == "fold" or self.spec.window_rows > MOST_AGAIN)

    def kept_shape(self, x: Inputs) -> tuple[int, ...]:
        return (3, self.capacity(x), self.spec.head_dim) if self.keeps else (0,)

    def latent_shape(self, x: Inputs) -> tuple[int, ...]:
        return (self.capacity(x), self.spec.head_dim) if self.latent else (0,)


def rounds_rows(asked: bool | None, fmt: RecordFormat | None, dtype: torch.dtype) -> bool:
    """Whether pooled rows of kv_score of this dtype are rounded to bf16."""
    if fmt is None:
        return asked is not False and dtype == torch.bfloat16
    return fmt.round_rows if asked is None else asked


@lru_cache(maxsize=256)
def _record(fmt: RecordFormat | None, out_dtype: torch.dtype, round_rows: bool) -> RecordFormat:
    """Remembered, as a format checks itself when it is made."""
    return replace(fmt or FORMATS["bf16" if out_dtype == torch.bfloat16 else "fp32"], round_rows=round_rows)


class Entries(NamedTuple):
    """The results of the forward.

    entries: `[capacity, head_dim]` in `out_dtype`. latent: the same before RoPE; without `latent=True` an empty tensor.
    kept: what the backward needs besides the inputs, fp32 `[3, capacity, head_dim]`: for each channel the largest score, the
    inverse of the sum of weights, and the pooled value; zeros where there is no entry. An empty tensor for windows of up to 8
    tokens, which the backward folds again.
    """

    entries: torch.Tensor
    latent: torch.Tensor
    kept: torch.Tensor

    def whole(self) -> Entries:
        """With empty tensors for what is None."""
        latent = self.entries.new_empty(0) if self.latent is None else self.latent
        kept = self.entries.new_empty(0, dtype=torch.float32) if self.kept is None else self.kept
        return Entries(self.entries, latent, kept)


class Gradients(NamedTuple):
    """The results of the backward.

    value: the gradient of kv_score, or of the first of its two tensors. score: that of the second, or None. ape, norm_weight:
    fp32, whatever the dtype of the parameter; ape is None if the spec has none.
    """

    value: torch.Tensor
    score: torch.Tensor | None
    ape: torch.Tensor | None
    norm_weight: torch.Tensor


class Runs(NamedTuple):
    """Which windows of a call are summed by themselves, where not all of a batch are in it: of a kernel of the backward.

    rows: int32 `[runs, 4]`: a run's first window, the one behind its last, and the sum that it goes on with. No two of a call
    go on with one. windows: of the call. longest: windows of a run.
    """

    rows: torch.Tensor
    windows: int
    longest: int


class Sums(NamedTuple):
    """What a backward with `Runs` goes on with, in fp32, fp64 with the torch backend: ape `[n, ratio * channels]`, None where
    there is none; norm_weight `[m, head_dim]`. of_ape, of_weight: its runs."""

    ape: torch.Tensor | None
    norm_weight: torch.Tensor
    of_ape: Runs
    of_weight: Runs


class Recipe(NamedTuple):
    """How rows of sums are made of others, of which each is some of the windows of a group, or all of some groups of a block.

    rows: int32 `[n + 1]`: row i is made of items `rows[i]` to before `rows[i + 1]`, in order. items: int32: twice where the sum
    is, in units of `head_dim` numbers; and 1 if it begins a group, whose items are added up before it is added to the row.
    """

    rows: torch.Tensor
    items: torch.Tensor


# Of a row of tails: the row of its first token, that of the fold before or -1, and from which place in its window to before
# which one it has tokens.
TAIL_FIELDS = ("token", "before", "begin", "end")


class Records(NamedTuple):
    """The records of all entries of a call with fake quantization, entry e in slot e: what `storage.pack` takes of a cache."""

    format: RecordFormat
    spec: CompressorSpec
    rows_per_page: int
    scale_tensor: torch.Tensor | None
    pages: torch.Tensor
    scale_pages: torch.Tensor | None


def scratch_records(x: Inputs, how: How) -> Records:
    """Not written yet."""
    fmt, spec, device = how.record, how.spec, x.value.device
    pages = -(-how.capacity(x) // ROWS_OF_A_PAGE)
    storage = torch.empty(pages, fmt.page_bytes(spec, ROWS_OF_A_PAGE), dtype=torch.uint8, device=device)
    scales = scale = None
    if fmt.separate:
        scales = torch.empty(pages, ROWS_OF_A_PAGE * fmt.tail_bytes(spec), dtype=torch.uint8, device=device)
    if fmt.takes_scale:
        scale = torch.ones(1, dtype=torch.float32, device=device) if x.scale is None else x.scale
    return Records(fmt, spec, ROWS_OF_A_PAGE, scale, storage, scales)
