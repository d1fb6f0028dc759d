"""The torch backend for a batch whose sequences are all at one position, which the host knows.

No plan, no slots, no tags: a row's place follows from its position, so a step of one token is a few small operations. The fold,
the norm and the rotation are those of `compress`, and so are the bits of the entries. For adapters on a CPU.
"""

from __future__ import annotations

import torch

from ..contract import ROWS_AT_ONCE
from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import FORMATS
from ..storage.pack import to_bf16
from .finish import norm, turn
from .fold import empty_fold, fold_group, fold_step, fold_steps

_ELEMENTS = 1 << 18  # of values that are worked on at once: they stay in a core's cache


def even_shape(spec: CompressorSpec, max_new_tokens: int) -> tuple[int, ...]:
    """The shape of a sequence's rows, with which the last `max_new_tokens` positions can be taken back.

    Position x is in row `x % rows`. A row is `(m, l, a)` after the token, fp32 `[3, head_dim]`, or the input row `[K | S]`.
    """
    if state_kind(spec) == "fold":
        return max_new_tokens + 1, 3, spec.head_dim
    windows = 1 + spec.overlap + -(-(max_new_tokens - 1) // spec.ratio)
    return windows * spec.ratio, 2 * spec.channels


def step_even(
    kv: torch.Tensor,
    gate: torch.Tensor,
    start: int,
    rows: torch.Tensor,
    entries: torch.Tensor,
    spec: CompressorSpec,
    ape: torch.Tensor,
    norm_weight: torch.Tensor,
    rope: torch.Tensor,
) -> None:
    """Folds the tokens of a step and writes the entries of the windows that end in it. Call it without autograd.

    A step may have any length; after it, only the history of its last `max_new_tokens` positions is there.

    Args:
        kv, gate: bf16 or fp32 `[batch, new, channels]`; start: the position of the first.
        rows: `[batch, *even_shape]`, fp32, or of input rows in the dtype of `kv`. Mutated.
        entries: fp32 or bf16 `[batch, at least (start + new) // ratio, head_dim]`. Those from `start // ratio` on are written.
        ape: fp32 `[ratio, channels]`; norm_weight: `[head_dim]`.
        rope: fp32 `[windows that end, rope_dim]`, cosines then sines of their first positions.
    """
    pooled = (_fold if state_kind(spec) == "fold" else _pool)(kv, gate, start, rows, spec, ape)
    if pooled is None:
        return
    batch, done, width = pooled.shape
    fmt = FORMATS["fp32" if entries.dtype == torch.float32 else "bf16"]
    y = norm(pooled.reshape(-1, width), spec, norm_weight, fmt)
    y = turn(y, spec, rope.repeat(batch, 1), None, fmt).view(pooled.shape)
    first = start // spec.ratio
    entries[:, first : first + done] = y if entries.dtype == torch.float32 else to_bf16(y)


def _fold(
    kv: torch.Tensor, gate: torch.Tensor, start: int, rows: torch.Tensor, spec: CompressorSpec, ape: torch.Tensor
) -> torch.Tensor | None:
    """Over fold rows: the rest of the current window, whole windows side by side, and the start of the next."""
    (batch, new), ratio, ring = kv.shape[:2], spec.ratio, rows.shape[1]
    if new == 1:
        return _fold_one(kv[:, 0], gate[:, 0], start, rows, spec, ape[start % ratio])
    kv, gate, pooled, at = kv.float(), gate.float(), [], 0
    head = min(new, -start % ratio)
    side_by_side = max(1, _ELEMENTS // (16 * batch * spec.head_dim))
    parts = [(1, head), *_pieces((new - head) // ratio, side_by_side, ratio), (1, (new - head) % ratio)]
    for windows, length in parts:
        if not windows * length:
            continue
        place, stop = (start + at) % ratio, at + windows * length
        k = kv[:, at:stop].unflatten(1, (windows, length))
        s = gate[:, at:stop].unflatten(1, (windows, length)) + ape[place : place + length]
        if place:  # the row may be written to while it is still read
            state = rows[:, (start - 1) % ring].clone()[:, None].unbind(2)
        else:
            state = empty_fold(batch, windows, spec.head_dim, device=kv.device)
        for j, (m, sums) in enumerate(fold_steps(state, k, s)):
            for window in range(windows):
                x = start + at + window * ratio + j
                if x >= start + new - ring and (x + 1) % ratio:  # no step goes on from a window's end
                    torch.stack([part[:, window] for part in (m, *sums)], 1, out=rows[:, x % ring])
        if (place + length) % ratio == 0:
            pooled.append(sums[1] / sums[0])
        at = stop
    return torch.cat(pooled, 1) if pooled else None


def _fold_one(
    k: torch.Tensor, s: torch.Tensor, start: int, rows: torch.Tensor, spec: CompressorSpec, bias: torch.Tensor
) -> torch.Tensor | None:
    """The same for one token, in as few operations as it takes."""
    ratio, ring = spec.ratio, rows.shape[1]
    if start % ratio:
        state = rows[:, (start - 1) % ring].unbind(1)
    else:
        state = empty_fold(len(k), spec.head_dim, device=k.device)
    state = fold_step(state, k.float(), s.float() + bias)
    if (start + 1) % ratio:
        torch.stack(state, 1, out=rows[:, start % ring])
        return None
    return (state[2] / state[1])[:, None]


def _pieces(windows: int, most: int, ratio: int) -> list[tuple[int, int]]:
    return [(min(most, windows - i), ratio) for i in range(0, windows, most)]


def _pool(
    kv: torch.Tensor, gate: torch.Tensor, start: int, rows: torch.Tensor, spec: CompressorSpec, ape: torch.Tensor
) -> torch.Tensor | None:
    """Over input rows: all rows of each window that ends, old ones from the state and new ones live."""
    (batch, new), ratio, held = kv.shape[:2], spec.ratio, rows.shape[1]
    begun, ended = start // ratio, (start + new) // ratio
    before = min(begun, int(spec.overlap))  # windows before the first that ends here, whose lo rows it needs
    first = (begun - before) * ratio
    if ended > begun:
        fresh = torch.cat([kv, gate], 2)[:, : ended * ratio - start]
        old = (rows[:, a % held : a % held + b - a] for a, b in _straight(first, start, held))
        windows = torch.cat([*old, fresh], 1).unflatten(1, (-1, ratio))
    last = min(new, held)
    for a, b in _straight(start + new - last, start + new, held):
        place = rows[:, a % held : a % held + b - a]
        place[..., : spec.channels] = kv[:, a - start : b - start]
        place[..., spec.channels :] = gate[:, a - start : b - start]
    if ended == begun:
        return None
    side_by_side = max(1, _ELEMENTS // (batch * spec.window_rows * spec.head_dim))
    pooled = []
    for i in range(before, windows.shape[1], side_by_side):
        lo = min(i, int(spec.overlap))  # windows that are here for their lo rows
        pooled.append(_pool_windows(windows[:, i - lo : i + side_by_side].float(), lo, spec, ape))
    return torch.cat(pooled, 1)


def _straight(begin: int, end: int, held: int) -> list[tuple[int, int]]:
    """Positions from `begin` to `end`, at most `held`, in pieces whose rows are contiguous."""
    turn_at = (begin // held + 1) * held
    pieces = [(begin, min(end, turn_at)), (turn_at, end)]
    return [(a, b) for a, b in pieces if b > a]


def _pool_windows(windows: torch.Tensor, before: int, spec: CompressorSpec, ape: torch.Tensor) -> torch.Tensor:
    """The pooled rows `[batch, n, head_dim]` of windows `[batch, n + before, ratio, 2 * channels]`."""
    width, count = spec.head_dim, windows.shape[1] - before
    k, s = windows.split(spec.channels, -1)
    halves = [(k[:, before:, :, -width:], s[:, before:, :, -width:] + ape[:, -width:])]
    if spec.overlap:
        lo_k, lo_s = k[:, :count, :, :width], s[:, :count, :, :width] + ape[:, :width]
        if not before:  # what is not there weighs nothing, and adding -0 changes no bit
            lo_k = torch.cat([torch.full_like(lo_k[:, :1], -0.0), lo_k[:, :-1]], 1)
            lo_s = torch.cat([torch.full_like(lo_s[:, :1], -torch.inf), lo_s[:, :-1]], 1)
        halves.insert(0, (lo_k, lo_s))
    if spec.ratio % ROWS_AT_ONCE:  # a group has rows of both
        halves = [tuple(torch.cat(x, 2) for x in zip(*halves, strict=True))]
    state = None
    for k, s in halves:
        for j in range(0, k.shape[2], ROWS_AT_ONCE):
            state = fold_group(state, k[:, :, j : j + ROWS_AT_ONCE], s[:, :, j : j + ROWS_AT_ONCE])
    return state[2] / state[1]
