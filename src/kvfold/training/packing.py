"""`Packing`: which tokens make which entry, computed once for all layers of one ratio."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._subclasses import FakeTensor

from ..arguments.checks import check_int, check_memory, check_numbers
from ..contract import INT32_MAX, MOST_POSITIONS

MOST_PIECES = (1 << 28) - 1  # kernels find a piece by an int32 of its numbers


class Packing:
    """The windows of packed sequences, on the device of `cu_seqlens`. Made by `build`, and not mutated by any call.

    Entries are sequence-major: entry `cu_entries[b] + w` is window w of sequence b. Tokens after the last full window of a
    sequence make none. There are `capacity` rows of entries, whatever the lengths are; rows after the last entry are zeros.

    Attributes:
        tokens: rows of kv_score.
        ratio: that of the compressors.
        capacity: rows of entries, `tokens // ratio`.
        max_seqlen: the bound on a sequence's length that `build` was given, or `tokens`.
        cu_entries: int32 `[B + 1]`, entries before each sequence, and the total.
        pieces: int32 `[capacity + B + 2, 4]`, columns `token`, `window`, `rest`, `begin`. If `window` is not -1, row n is entry
            n: window `window` of its sequence, whose first token is row `token` of kv_score; `rest` is 1 if no window of the
            sequence follows. After these come rows with `window` -1: `rest` tokens from `token` on that belong to no window.
            Each token is in exactly one piece; otherwise its gradient would be undefined. `begin` is 0, but for a window that
            is cut over GPUs: then it is the place in the window of the first token that is here.
    """

    tokens: int
    ratio: int
    capacity: int
    max_seqlen: int
    cu_entries: torch.Tensor
    pieces: torch.Tensor

    def __init__(self, tokens: int, ratio: int, max_seqlen: int, cu_entries: torch.Tensor, pieces: torch.Tensor) -> None:
        self.tokens, self.ratio, self.capacity, self.max_seqlen = tokens, ratio, tokens // ratio, max_seqlen
        self.cu_entries, self.pieces = cu_entries, pieces

    @classmethod
    def build(cls, cu_seqlens: torch.Tensor, tokens: int, ratio: int, *, max_seqlen: int | None = None) -> Packing:
        """From the offsets of packed sequences. Nothing waits for the device; a CUDA graph can record it.

        Args:
            cu_seqlens: int32 or int64 `[B + 1]`, B at least 1: sequence b has rows `[cu_seqlens[b], cu_seqlens[b + 1])` of
                kv_score. Offsets must start at 0 and not decrease. The host does not read them, so wrong ones are not refused
                but clamped: none below the one before it, none beyond `tokens`. Rows outside all sequences make no entries.
            tokens: rows of kv_score, padding included.
            ratio: tokens per window.
            max_seqlen: an upper bound on every sequence's length, by which calls check that the RoPE table is long enough.
                Tokens beyond it make no entries. Default: `tokens`.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        check_memory("cu_seqlens", cu_seqlens, fake=True)
        check_numbers("cu_seqlens", cu_seqlens, (None,), cu_seqlens.device, fake=True)
        if cu_seqlens.shape[0] < 2:
            raise ValueError(f"cu_seqlens must have a sequence, and so 2 numbers or more, got {cu_seqlens.shape[0]}")
        check_int("tokens", tokens, 0, INT32_MAX)
        check_int("ratio", ratio, 1, 4096)
        if max_seqlen is None:
            max_seqlen = min(tokens, MOST_POSITIONS)
        check_int("max_seqlen", max_seqlen, 0, MOST_POSITIONS)
        count = tokens // ratio + cu_seqlens.shape[0] + 1
        if count > MOST_PIECES:
            raise ValueError(
                f"tokens and cu_seqlens must make at most {MOST_PIECES} pieces, a window and a sequence each, got {count}"
            )
        with _mode_of(cu_seqlens):
            return cls(tokens, ratio, max_seqlen, *_pieces(cu_seqlens, tokens, ratio, max_seqlen, count))


def _mode_of(tensor: torch.Tensor) -> AbstractContextManager:
    """That of a `FakeTensor`, in which new tensors are such, too."""
    fake = not torch.compiler.is_compiling() and isinstance(tensor, FakeTensor)
    return tensor.fake_mode if fake else nullcontext()


def _pieces(
    cu_seqlens: torch.Tensor, tokens: int, ratio: int, max_seqlen: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cu_entries` and `pieces`, in whole-tensor operations whose shapes do not depend on what the lengths are."""
    device = cu_seqlens.device
    cu = cu_seqlens.long().clamp(0, tokens).cummax(0).values
    first, last = cu.new_zeros(1), cu.new_full((1,), tokens)
    # Rows before the first sequence and behind the last one are a segment each, without a window.
    start, end = torch.cat([first, cu]), torch.cat([cu, last])
    length = end - start
    windows = length.clamp(max=max_seqlen) // ratio
    inner = torch.arange(windows.shape[0], device=device)
    windows = torch.where((inner > 0) & (inner < windows.shape[0] - 1), windows, 0)
    rests = (length - windows * ratio + ratio - 1) // ratio  # pieces of up to `ratio` tokens
    cu_windows, cu_rests = windows.cumsum(0), rests.cumsum(0)

    number = torch.arange(count, device=device)
    behind = number - cu_windows[-1]  # its number among those that are of no window
    of_window = behind < 0
    segment = torch.where(
        of_window,
        torch.searchsorted(cu_windows, number, right=True),
        torch.searchsorted(cu_rests, behind.clamp(min=0), right=True),
    )
    there = segment < windows.shape[0]
    segment = segment.clamp(max=windows.shape[0] - 1)
    local = torch.where(of_window, number - (cu_windows - windows)[segment], behind - (cu_rests - rests)[segment])
    token = start[segment] + torch.where(of_window, 0, windows[segment] * ratio) + local * ratio
    left = torch.minimum(end[segment] - token, torch.full_like(token, ratio))
    rest = torch.where(of_window, local == windows[segment] - 1, torch.where(there, left, 0))
    pieces = [torch.where(there, token, 0), torch.where(of_window, local, -1), rest, torch.zeros_like(token)]
    return cu_windows[:-1].int(), torch.stack(pieces, dim=1).int()
