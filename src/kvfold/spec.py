"""What a compressor computes: `CompressorSpec`, and the presets of DeepSeek-V4 and V4.1."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass

from .arguments.checks import check_type


@dataclass(frozen=True)
class CompressorSpec:
    """The shape and the mathematics of one compressor; hashable, so it can key a table.

    Args:
        head_dim: width of an entry, in channels; a power of two from 16 to 4096.
        ratio: tokens per window, from 1 to 4096.
        overlap: an entry also takes the `lo` half of every token of the window before (V4's layers of ratio 4).
        has_ape: whether a bias `ape[t % ratio]` is added to the score row of token t (V4.1 has none).
        rope_dim: how many of an entry's last channels are rotated; even, 0 to leave out RoPE.
        norm_eps: epsilon of RMSNorm, added to the mean square; from 2**-126, the smallest normal fp32, to below 1.
        hadamard: whether the whole entry is multiplied by a Hadamard matrix after RoPE (the reference's indexer does that).
        gate: whether tokens have scores. False is for windows of one token, which need no weights: `kv_score` holds values
            only, an entry is its token's row, and there is no state. Needs ratio 1, no overlap and no ape.

    Raises:
        TypeError, ValueError: naming the field.
    """

    head_dim: int
    ratio: int
    overlap: bool = False
    has_ape: bool = True
    rope_dim: int = 64
    norm_eps: float = 1e-6
    hadamard: bool = False
    gate: bool = True

    def __post_init__(self) -> None:
        for name in ("head_dim", "ratio", "rope_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        for name in ("overlap", "has_ape", "hadamard", "gate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {type(getattr(self, name)).__name__}")
        if not 16 <= self.head_dim <= 4096 or self.head_dim & (self.head_dim - 1):
            raise ValueError(f"head_dim must be a power of two from 16 to 4096, got {self.head_dim}")
        if not 1 <= self.ratio <= 4096:
            raise ValueError(f"ratio must be from 1 to 4096, got {self.ratio}")
        if not 0 <= self.rope_dim <= self.head_dim or self.rope_dim % 2:
            raise ValueError(f"rope_dim must be even and from 0 to head_dim={self.head_dim}, got {self.rope_dim}")
        if not isinstance(self.norm_eps, (int, float)) or not 2.0**-126 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps must be a number from 2**-126 to below 1, got {self.norm_eps!r}")
        for name, wanted in (("ratio", 1), ("overlap", False), ("has_ape", False)):
            if not self.gate and getattr(self, name) != wanted:
                have = f"without a gate, as there are no scores, got {getattr(self, name)}"
                raise ValueError(f"{name} must be {wanted} {have}")
        # How an operator gets the spec (ops.py): as a string, since torch.compile would turn its numbers into variables.
        object.__setattr__(self, "_text", json.dumps(astuple(self)))

    @property
    def channels(self) -> int:
        """Width of a value row and of a score row: `head_dim`, or `2 * head_dim` with overlap."""
        return self.head_dim * (2 if self.overlap else 1)

    @property
    def kv_score_width(self) -> int:
        """Width of a row of `kv_score`: `2 * channels`, or `channels` without a gate."""
        return self.channels * (2 if self.gate else 1)

    @property
    def window_rows(self) -> int:
        """Tokens that one entry is made of: `ratio`, or `2 * ratio` with overlap."""
        return self.ratio * (2 if self.overlap else 1)


def check_spec(name: str, spec: object) -> None:
    """Raises unless this is a `CompressorSpec` that its constructor made, not one from `__new__` alone."""
    if not isinstance(spec, CompressorSpec):
        check_type(name, spec, CompressorSpec)
    if "_text" not in spec.__dict__:
        raise ValueError(f"{name} must be made by CompressorSpec(...), got one without fields")


V4_HCA = CompressorSpec(head_dim=512, ratio=128)
V4_CSA = CompressorSpec(head_dim=512, ratio=4, overlap=True)
V4_INDEXER = CompressorSpec(head_dim=128, ratio=4, overlap=True, hadamard=True)

# V4.1's compressors, without ape or overlap: `V41_MAIN_R1` and `V41_MAIN_R2` make the main entries of layers of ratio 1 and 2.
# `compress(..., latent=latent)` also gives their normed rows, of which a linear layer, 512 to 128, makes the rows of the index
# key. `store` finishes those by `V41_INDEX_K`; over a plan of ratio 2 by `replace(V41_INDEX_K, ratio=2, gate=True)`.
V41_MAIN_R1 = CompressorSpec(head_dim=512, ratio=1, has_ape=False, norm_eps=1e-20, gate=False)
V41_MAIN_R2 = CompressorSpec(head_dim=512, ratio=2, has_ape=False, norm_eps=1e-20)
V41_INDEX_K = CompressorSpec(head_dim=128, ratio=1, has_ape=False, norm_eps=1e-20, gate=False)
