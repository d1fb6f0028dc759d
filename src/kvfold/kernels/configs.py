"""How each kernel is launched: the one table that dispatch, `warmup`, ahead-of-time builds and the documents read."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import CompressorSpec

ANY = (1 << 31) - 1


@dataclass(frozen=True)
class Config:
    """A row of the table. It serves a call of its `kind` inside its bounds; of several, the first one.

    Attributes:
        kind: of the state, `"fold"`, `"rows"` or `"window"`; or `"store"`, which has none.
        head_dims: narrowest and widest entry it serves.
        window_rows: fewest and most tokens per entry (`spec.window_rows`).
        max_new_tokens: longest step of a sequence, by the plan's bound.
        ahead: tokens whose loads are in flight at once. Any value gives the same bits.
        num_warps: per program. Any value gives the same bits, but for `"window"`, whose sums follow it.
        slice: `"window"`: channels per program; 0 for whole rows, as all other kinds have.
        tile: `"window"`: rows in flight at once, at most.
        registers: bound on registers per thread, so that more programs share a multiprocessor; 0 for none.
        once: `"fold"`, `"rows"`: a step fits in one stretch of `ahead` tokens; all its loads are issued before the first use.
    """

    kind: str
    head_dims: tuple[int, int]
    window_rows: tuple[int, int]
    max_new_tokens: int
    ahead: int
    num_warps: int
    slice: int = 0
    tile: int = 128
    registers: int = 0
    once: bool = False

    def serves(self, kind: str, head_dim: int, window_rows: int, max_new_tokens: int) -> bool:
        return (
            kind == self.kind
            and self.head_dims[0] <= head_dim <= self.head_dims[1]
            and self.window_rows[0] <= window_rows <= self.window_rows[1]
            and max_new_tokens <= self.max_new_tokens
        )


_NARROW, _MIDDLE, _WIDE = (16, 128), (256, 256), (512, 4096)
_ALL = (1, 8192)

# Warps of "store", alone at 16 rows on an H200: 128 channels 1.99 us with one warp, 1.99 with 2, 2.10 with 4 (indexer_mxfp4)
# and 1.86, 2.04, 2.16 (indexer_fp8_vllm); 512 channels 2.29, 2.11, 1.85 and 1.97 with 1, 2, 4 and 8 (fp8_ds_mla).

CONFIGS = (
    # Ratio 128, 4 against 8 warps at batch 16/64/256: one token 1.91/2.21/3.06 against 2.00/2.33/3.16 us, four 2.64/3.16/4.85
    # against 2.82/3.30/5.18.
    Config("fold", _NARROW, _ALL, 1, ahead=1, num_warps=1, once=True),
    Config("fold", _NARROW, _ALL, 4, ahead=4, num_warps=1, once=True),
    Config("fold", _NARROW, _ALL, 8, ahead=8, num_warps=1, once=True),
    Config("fold", _NARROW, _ALL, ANY, ahead=8, num_warps=1),
    Config("fold", _MIDDLE, _ALL, 1, ahead=1, num_warps=2, once=True),
    Config("fold", _MIDDLE, _ALL, 4, ahead=4, num_warps=2, once=True),
    Config("fold", _MIDDLE, _ALL, 8, ahead=8, num_warps=2, once=True),
    Config("fold", _MIDDLE, _ALL, ANY, ahead=8, num_warps=2),
    Config("fold", _WIDE, _ALL, 1, ahead=1, num_warps=4, once=True),
    Config("fold", _WIDE, _ALL, 4, ahead=4, num_warps=4, once=True),
    Config("fold", _WIDE, _ALL, 8, ahead=8, num_warps=4, once=True),
    Config("fold", _WIDE, _ALL, ANY, ahead=8, num_warps=4),
    Config("rows", _NARROW, (1, 8), 8, ahead=8, num_warps=2, once=True),
    Config("rows", _NARROW, _ALL, ANY, ahead=8, num_warps=1),
    Config("rows", _MIDDLE, (1, 8), 8, ahead=8, num_warps=4, once=True),
    Config("rows", _MIDDLE, _ALL, ANY, ahead=8, num_warps=2),
    # 4 against 8 warps, main and indexer in one launch: one token 2.83/3.75/5.32 against 3.09/3.88/8.56 us, four tokens
    # 3.47/4.16/6.54 against 3.58/4.68/9.11; without the bound on registers 512 programs did not fit at once.
    Config("rows", _WIDE, (1, 8), 8, ahead=8, num_warps=4, registers=128, once=True),
    Config("rows", _WIDE, _ALL, ANY, ahead=8, num_warps=4),
    # One row of the table serves every number of new tokens: the order of the sums, and so the bits, must not follow it.
    Config("window", _NARROW, (1, 16), ANY, ahead=4, num_warps=1),
    Config("window", _NARROW, _ALL, ANY, ahead=4, num_warps=4, slice=16),
    Config("window", _MIDDLE, (1, 16), ANY, ahead=4, num_warps=2),
    Config("window", _MIDDLE, _ALL, ANY, ahead=4, num_warps=4, slice=32),
    Config("window", _WIDE, (1, 16), ANY, ahead=4, num_warps=4, registers=128),
    # Four programs to a multiprocessor; batch 16/64/256 one token: 6.9/15.5/47 us with 128 registers, 7.7/19.8/68 unbound.
    Config("window", _WIDE, _ALL, ANY, ahead=4, num_warps=4, slice=32, registers=128),
    Config("store", _NARROW, _ALL, ANY, ahead=1, num_warps=1),
    Config("store", _MIDDLE, _ALL, ANY, ahead=1, num_warps=2),
    Config("store", _WIDE, _ALL, ANY, ahead=1, num_warps=4),
)


class UnsupportedError(ValueError):
    """No kernel is configured for what was asked; the message lists what there is."""


def choose(kind: str, spec: CompressorSpec, max_new_tokens: int) -> Config:
    """The first row of the table that serves a call.

    Raises:
        UnsupportedError: there is none.
    """
    for config in CONFIGS:
        if config.serves(kind, spec.head_dim, spec.window_rows, max_new_tokens) and not _odd_window(kind, spec):
            return config
    rows = [config for config in CONFIGS if config.kind == kind] or list(CONFIGS)
    listed = "; ".join(
        f"{c.kind}: head_dim {c.head_dims[0]} to {c.head_dims[1]}, {c.window_rows[0]} to {c.window_rows[1]} rows per window"
        + (", ratio a power of two" if c.kind == "window" else "")
        for c in dict.fromkeys(rows)
    )
    raise UnsupportedError(
        f"spec must be one that a kernel is configured for, got kind={kind!r}, head_dim={spec.head_dim}, ratio={spec.ratio}, "
        f"overlap={spec.overlap}, max_new_tokens={max_new_tokens}; there is: {listed}"
    )


def _odd_window(kind: str, spec: CompressorSpec) -> bool:
    """Tiles of raw rows are powers of two, and a window fills its tiles."""
    return kind == "window" and spec.ratio & (spec.ratio - 1) != 0
