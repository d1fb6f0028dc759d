"""What the kernels must compute, in plain PyTorch: the mathematics of an entry, and a slow simulator of the state.

Nothing here knows a memory layout or a way to be fast. `pooled`, `rms_norm`, `rope` and `hadamard` are the four stages
of an entry and `entries` is all of them; `Simulator` says which positions a slot holds after any sequence of steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .spec import CompressorSpec


def projected(hidden: Tensor, weight: Tensor) -> Tensor:
    """kv_score in fp64, `[T, 2 * channels]`, of hidden states `[T, hidden_dim]` and a weight `[2 * channels, hidden_dim]`."""
    return hidden.double() @ weight.double().T


def pooled(kv_score: Tensor, spec: CompressorSpec, ape: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The pooled rows of one sequence, from its first token: a softmax-weighted mean per window and channel.

    kv_score: [T, 2*channels], any float dtype, a row is `[K | S]`; without a gate [T, channels], rows `K`, which are the
    pooled rows. ape: [ratio, channels], None for a spec without it.
    Returns [T // ratio, head_dim] in `dtype` (fp64 or fp32), in which all is computed. Tokens after the last full
    window make no entry. Raises ValueError for a kv_score or ape of another shape, and for an ape that the spec does not have.
    """
    value, score = windows_of(kv_score, spec, ape, dtype)
    return (score.softmax(dim=1) * value).sum(dim=1)


def windows_of(
    kv_score: Tensor, spec: CompressorSpec, ape: Tensor | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Values and biased scores of which entries are made, [windows, window_rows, head_dim] each; arguments as for `pooled`."""
    if kv_score.dim() != 2 or kv_score.shape[1] != spec.kv_score_width:
        raise ValueError(f"kv_score must be [T, {spec.kv_score_width}], got {list(kv_score.shape)}")
    if (ape is None) == spec.has_ape:
        raise ValueError(f"ape must be given exactly when spec.has_ape, which is {spec.has_ape}")
    if ape is not None and ape.shape != (spec.ratio, spec.channels):
        raise ValueError(f"ape must be [{spec.ratio}, {spec.channels}], got {list(ape.shape)}")
    windows, hd = kv_score.shape[0] // spec.ratio, spec.head_dim
    rows = kv_score.to(dtype)[: windows * spec.ratio].reshape(windows, spec.ratio, spec.kv_score_width)
    value, score = rows[..., : spec.channels], rows[..., spec.channels :]
    if not spec.gate:
        score = torch.zeros_like(value)
    if ape is not None:
        score = score + ape.to(dtype)
    if spec.overlap:
        # The lo half of a token serves the next window's entry, the hi half its own. Window 0 has no window before it.
        value = torch.cat([_previous(value[..., :hd], 0.0), value[..., hd:]], dim=1)
        score = torch.cat([_previous(score[..., :hd], -math.inf), score[..., hd:]], dim=1)
    return value, score


def _previous(windows: Tensor, first: float) -> Tensor:
    """Shift [windows, ratio, hd] by one window; the first is filled with `first`."""
    return torch.cat([torch.full_like(windows[:1], first), windows[:-1]])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x. x: [..., hd], weight: [hd]."""
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.to(x.dtype)


def rope(x: Tensor, table: Tensor, positions: Tensor, rope_dim: int) -> Tensor:
    """Rotate the last `rope_dim` channels of x [n, hd], channels 2i and 2i+1 a pair, by the angles of `positions` [n].

    table: [max_pos, rope_dim], the cosines of all pairs, then their sines. Computes in the dtype of x.
    """
    cos, sin = table[positions].to(x.dtype).split(rope_dim // 2, dim=1)
    still, turned = x[:, : x.shape[1] - rope_dim], x[:, x.shape[1] - rope_dim :]
    even, odd = turned[:, 0::2], turned[:, 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=2).flatten(1)
    return torch.cat([still, turned], dim=1)


_rotate = rope  # `entries` takes the table under the name it has in `compress`, which hides the function


def hadamard(x: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of the last dimension (a power of two), in natural (Sylvester) order."""
    hd = x.shape[-1]
    if hd & (hd - 1):
        raise ValueError(f"x must have a power of two as its last dimension, got {hd}")
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while matrix.shape[0] < hd:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return (x @ matrix) * hd**-0.5


def latents(
    kv_score: Tensor, spec: CompressorSpec, ape: Tensor | None, norm_weight: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The normed rows of one sequence, before they are rotated; arguments and result as for `entries`."""
    return rms_norm(pooled(kv_score, spec, ape, dtype), norm_weight, spec.norm_eps)


def entries(
    kv_score: Tensor,
    spec: CompressorSpec,
    ape: Tensor | None,
    norm_weight: Tensor,
    rope: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The entries of one sequence before quantization: pooled, normed, rotated, and Hadamard if the spec says so.

    kv_score, ape: as for `pooled`. norm_weight: [head_dim]. rope: [max_pos, rope_dim], cosines then sines.
    The position of an entry is that of its window's first token. Returns [T // ratio, head_dim] in `dtype`.
    """
    rows = latents(kv_score, spec, ape, norm_weight, dtype)
    if spec.rope_dim:
        positions = torch.arange(rows.shape[0], device=rows.device) * spec.ratio
        rows = _rotate(rows, rope, positions, spec.rope_dim)
    return hadamard(rows) if spec.hadamard else rows


def rope_table(
    max_pos: int,
    rope_dim: int,
    theta: float = 160000.0,
    factor: float = 16.0,
    original: int = 65536,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """The fp32 table [max_pos, rope_dim] (cosines, then sines) of DeepSeek-V4's compressed layers: RoPE with YaRN.

    A pair that turns more than `beta_fast` times within `original` positions keeps its frequency, one that turns less
    than `beta_slow` times has it divided by `factor`, those between are blended linearly. `factor=1` is plain RoPE.
    Raises ValueError for a negative `max_pos` and for a `rope_dim` that is odd or negative.
    """
    if max_pos < 0:
        raise ValueError(f"max_pos must not be negative, got {max_pos}")
    if rope_dim < 0 or rope_dim % 2:
        raise ValueError(f"rope_dim must be even and not negative, got {rope_dim}")
    pair = torch.arange(rope_dim // 2, dtype=torch.float64)
    base = theta ** (-2 * pair / rope_dim)

    def pair_that_turns(turns: float) -> float:
        return rope_dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), rope_dim - 1)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequency = base / factor * ramp + base * (1 - ramp)
    angle = torch.arange(max_pos, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


class Held(NamedTuple):
    """What a row of fold rows, or a place of input rows, holds: the tokens of one window, from its first to `position`."""

    position: int
    tokens: Tensor


class Simulator:
    """The state of many slots, one step of one sequence at a time: what a step may read, emits, keeps and forgets.

    The rules are those of DESIGN.md, "State". The memory of a slot is a list of `Held` or None. Fold rows: `ring` rows, then a
    spare one. Input rows: `places[0]` places of lo rows, then `places[1]` of hi or whole rows. What is held are raw tokens, so
    that an entry is `pooled` of exactly what the state remembers.
    """

    def __init__(self, spec: CompressorSpec, num_slots: int, max_new_tokens: int, ape: Tensor | None = None):
        if not spec.gate:
            raise ValueError("spec must have a gate: without one there is no state")
        self.spec, self.ape = spec, ape
        if not spec.overlap and spec.ratio > 8:
            self.kind, self.ring, self.places = "fold", max_new_tokens + 1, (0, 0)
            size = self.ring + 1
        else:
            self.kind, self.ring = "rows", math.ceil(max_new_tokens / spec.ratio)
            self.places = 2 * max(self.ring, 2) if spec.overlap else 0, 2 * self.ring
            size = sum(self.places)
        self.slots: list[list[Held | None]] = [[None] * size for _ in range(num_slots)]
        self.errors = 0

    def tags(self, slot: int) -> list[int]:
        """What `FoldState.positions[slot]` must be."""
        return [-1 if held is None else held.position for held in self.slots[slot]]

    def history_of(self, position: int) -> range:
        """The positions that a step starting at `position` reads."""
        window = position // self.spec.ratio
        if self.kind == "fold":
            return range(position - 1 if position % self.spec.ratio else position, position)
        return range(max(window - 1 if self.spec.overlap else window, 0) * self.spec.ratio, position)

    def can_start(self, slot: int, position: int) -> bool:
        """Whether a step of this slot from `position` would be accepted."""
        return None not in self._read(slot, position)

    def step(self, slot: int, start: int, tokens: Tensor) -> dict[int, Tensor] | None:
        """Fold `tokens` [n, 2*channels], those of positions start, start + 1, ..., into a slot.

        Returns the pooled fp64 row [head_dim] of every window that ends in the step, by window index. An absent
        sequence (slot -1, or no tokens) does nothing and returns {}; a refused one does nothing, adds to `errors` and
        returns None.
        """
        if slot == -1 or len(tokens) == 0:
            return {}
        if slot >= len(self.slots) or start < 0 or not self.can_start(slot, start):
            self.errors += 1
            return None
        memory, ratio, end = self.slots[slot], self.spec.ratio, start + len(tokens)

        read = self._read(slot, start)
        once = read[:-1] if self.spec.overlap and start % ratio else read  # lo and hi rows are of the same tokens
        first = min(start - start % ratio, self.history_of(start).start)  # of what is known, the start of a window
        known = torch.cat([torch.cat([*(memory[place].tokens for place in once), tokens[:0]])[: start - first], tokens])

        emitted = {}
        for window in range(start // ratio, end // ratio):
            oldest = max(window - 1 if self.spec.overlap else window, 0)
            seen = known[oldest * ratio - first : (window + 1) * ratio - first]
            emitted[window] = pooled(seen, self.spec, self.ape)[-1]

        (self._keep_folds if self.kind == "fold" else self._keep_rows)(memory, read, known, first, start, end)
        return emitted

    def _keep_folds(self, memory: list, read: list, known: Tensor, first: int, start: int, end: int) -> None:
        ratio, written = self.spec.ratio, []
        for x in range(max(start, end - self.ring), end):
            home = x % self.ring
            row = self.ring if home in read else home  # what this step reads, it does not overwrite
            # No step resumes from the end of a window, so a fold row of it is not kept; what stood there is gone.
            memory[row] = None if (x + 1) % ratio == 0 else Held(x, known[x - x % ratio - first : x + 1 - first])
            written.append(row)
        spare = memory[self.ring]
        stale = spare is not None and (spare.position >= start or spare.position < end - self.ring)
        if stale and self.ring not in read + written:
            memory[self.ring] = None

    def _keep_rows(self, memory: list, read: list, known: Tensor, first: int, start: int, end: int) -> None:
        ratio, last = self.spec.ratio, (end - 1) // self.spec.ratio
        for part in range(0 if self.spec.overlap else 1, 2):
            for window in range(start // ratio, last + 1):
                places, stop = self._places(part, window), min(end, (window + 1) * ratio)
                if window * ratio < start:  # begun before: goes on where it is
                    place = read[part - 2]
                elif last - window < self.places[part] // 2:
                    place, other = places[::-1] if places[0] in read else places  # what this step reads, it does not overwrite
                    if other not in read:
                        memory[other] = None
                else:
                    continue
                memory[place] = Held(stop - 1, known[window * ratio - first : stop - first])

    def _places(self, part: int, window: int) -> tuple[int, int]:
        """The home of a window's lo rows (part 0) or its hi or whole ones (part 1), and their other place."""
        count, base = self.places[part], self.places[0] * part
        return base + window % count, base + (window + count // 2) % count

    def _read(self, slot: int, start: int) -> list[int | None]:
        """Where all is that a step from `start` reads, None for what is missing: of the window before, then of its own."""
        window, inside = divmod(start, self.spec.ratio)
        if self.kind == "fold":
            return [self._find(slot, ((start - 1) % self.ring, self.ring), start - 1, start - 1)] if inside else []
        last = window * self.spec.ratio - 1
        found = [self._find(slot, self._places(0, window - 1), last, last)] if self.spec.overlap and window else []
        for part in range(0 if self.spec.overlap else 1, 2):
            if inside:
                found.append(self._find(slot, self._places(part, window), start - 1, last + self.spec.ratio))
        return found

    def _find(self, slot: int, places: tuple[int, int], least: int, most: int) -> int | None:
        """The first of these that holds tokens up to a position from `least` to `most`."""
        for place in places:
            held = self.slots[slot][place]
            if held is not None and least <= held.position <= most:
                return place
        return None
