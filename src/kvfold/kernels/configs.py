"""How each kernel is launched: the one table that dispatch reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """A row of the table; it serves a call when `kind` and `head_dim` are equal and no earlier row does.

    Attributes:
        kind: of the state, `"fold"` or `"rows"`; or `"store"`, which has none.
        head_dim: widest entry it serves.
        max_new_tokens: longest step it serves.
        ahead: tokens whose loads are in flight at once. Any value gives the same bits.
        num_warps: per program; a program is one window, all channels. Any value gives the same bits.
    """

    kind: str
    head_dim: int
    max_new_tokens: int
    ahead: int
    num_warps: int


_ANY = (1 << 31) - 1

# Warps, by store alone at 16 rows on an H200: 128 channels 1.99 us with one warp, 1.99 with 2, 2.10 with 4 (indexer_mxfp4) and
# 1.86, 2.04, 2.16 (indexer_fp8_vllm); 512 channels 2.29, 2.11, 1.85 and 1.97 with 1, 2, 4 and 8 (fp8_ds_mla).

CONFIGS = (
    Config("fold", 128, 1, ahead=1, num_warps=1),
    Config("fold", 128, 4, ahead=4, num_warps=1),
    Config("fold", 128, _ANY, ahead=8, num_warps=1),
    Config("fold", 256, 1, ahead=1, num_warps=2),
    Config("fold", 256, 4, ahead=4, num_warps=2),
    Config("fold", 256, _ANY, ahead=8, num_warps=2),
    Config("fold", 4096, 1, ahead=1, num_warps=4),
    Config("fold", 4096, 4, ahead=4, num_warps=4),
    Config("fold", 4096, _ANY, ahead=8, num_warps=4),
    Config("rows", 128, _ANY, ahead=8, num_warps=1),
    Config("rows", 256, _ANY, ahead=8, num_warps=2),
    Config("rows", 4096, _ANY, ahead=8, num_warps=4),
    Config("store", 128, _ANY, ahead=1, num_warps=1),
    Config("store", 256, _ANY, ahead=1, num_warps=2),
    Config("store", 4096, _ANY, ahead=1, num_warps=4),
)


def choose(kind: str, head_dim: int, max_new_tokens: int) -> Config:
    """The first row that serves this call. Every spec is served: the last row of each kind has the widest bounds."""
    for config in CONFIGS:
        if config.kind == kind and head_dim <= config.head_dim and max_new_tokens <= config.max_new_tokens:
            return config
    raise ValueError(f"no configuration for kind={kind!r}, head_dim={head_dim}, max_new_tokens={max_new_tokens}")
