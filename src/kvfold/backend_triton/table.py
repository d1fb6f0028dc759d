"""How each kernel is launched: the one table that dispatch, `warmup`, ahead-of-time builds and the documents read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..contract import UnsupportedError
from ..spec import CompressorSpec

ANY = (1 << 31) - 1
SPILLS_TRITON = "3.6"  # that rows were measured with; another may spill more, which `kvfold aot` then says
# Numbers of windows up to which a call is told from one of more: half a window, one and two to each of the 132 multiprocessors
# of an H200; what 8k tokens beside 64 sequences that decode may come to at ratio 128; and two to each program at ratio 4.
ITEM_BOUNDS = (66, 132, 200, 264, 2376, ANY)


@dataclass(frozen=True)
class Config:
    """A row of the table. It serves a call of its `kind` inside its bounds; of several, the first one.

    Attributes:
        kind: of the state, `"fold"`, `"rows"` or `"window"`; or `"store"`, which has none.
        head_dims: narrowest and widest entry it serves.
        window_rows: fewest and most tokens per entry (`spec.window_rows`).
        max_new_tokens: longest step of a sequence, by the plan's bound.
        ahead: tokens whose loads are in flight at once. Any value gives the same bits.
        num_warps: per program. Any value gives the same bits.
        slice: channels per program; 0 for whole rows. `"window"`, and `"fold"` with `programs`.
        tile: `"window"`: rows in flight at once. Any value gives the same bits.
        registers: bound on registers per thread, so that more programs share a multiprocessor; 0 for none.
        programs: most programs, each of which takes work in turn; 0 for one per work item, which has all its loads under way
            before the first use, so that `ahead` holds a step.
        together: with `programs`, `"fold"` and `"rows"`: windows that a program folds side by side; of `"rows"`, where all rows
            of a window are ahead.
        pair_programs: most programs of each of two compressors in one launch, of which this is the first one's row, where
            `programs` would have two windows each or less; 0 for `programs`.
        most_items: most windows of a call.
        prompt: `"window"`: whoever pools rows that are all new also writes them. Any value gives the same bits.
        spills, pair_spills: bytes that a thread may spill on sm_90, alone and as the first of two in one launch: what the worst
            format does, kv_score in bf16, under `SPILLS_TRITON`. Rows with a bound on registers were fastest so; of
            raw rows, pages that are smaller than a window spill most.
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
    programs: int = 0
    together: int = 1
    pair_programs: int = 0
    most_items: int = ANY
    prompt: bool = False
    spills: int = 0
    pair_spills: int = 0

    @property
    def most_programs(self) -> str:
        """`programs` in words; in brackets, `pair_programs`."""
        most = str(self.programs or "one each")
        return f"{most} ({self.pair_programs})" if self.pair_programs else most

    def serves(self, kind: str, head_dim: int, window_rows: int, max_new_tokens: int, items: int) -> bool:
        return (
            kind == self.kind
            and self.head_dims[0] <= head_dim <= self.head_dims[1]
            and self.window_rows[0] <= window_rows <= self.window_rows[1]
            and max_new_tokens <= self.max_new_tokens
            and items <= self.most_items
        )


_NARROW, _MIDDLE, _WIDE = (16, 128), (256, 256), (512, 4096)
_ALL = (1, 8192)
_SHORT_WINDOWS: dict[str, Any] = {"ahead": 4, "num_warps": 4, "slice": 32, "tile": 128, "registers": 128, "programs": 528}
_LONG_WINDOWS: dict[str, Any] = _SHORT_WINDOWS | {"slice": 64, "tile": 64, "programs": 1056, "prompt": True}

# Warps of "store", alone at 16 rows on an H200: 128 channels 1.99 us with one warp, 1.99 with 2, 2.10 with 4 (indexer_mxfp4)
# and 1.86, 2.04, 2.16 (indexer_fp8_vllm); 512 channels 2.29, 2.11, 1.85 and 1.97 with 1, 2, 4 and 8 (fp8_ds_mla).

CONFIGS = (
    # Ratio 128, 4 against 8 warps at batch 16/64/256: one token 1.91/2.21/3.06 against 2.00/2.33/3.16 us, four 2.64/3.16/4.85
    # against 2.82/3.30/5.18.
    Config("fold", _NARROW, _ALL, 1, ahead=1, num_warps=1),
    Config("fold", _NARROW, _ALL, 4, ahead=4, num_warps=1),
    Config("fold", _NARROW, _ALL, 8, ahead=8, num_warps=1),
    Config("fold", _NARROW, _ALL, ANY, ahead=8, num_warps=1, programs=2112),
    Config("fold", _MIDDLE, _ALL, 1, ahead=1, num_warps=2),
    Config("fold", _MIDDLE, _ALL, 4, ahead=4, num_warps=2),
    Config("fold", _MIDDLE, _ALL, 8, ahead=8, num_warps=2),
    Config("fold", _MIDDLE, _ALL, ANY, ahead=8, num_warps=2, programs=1056),
    Config("fold", _WIDE, _ALL, 1, ahead=1, num_warps=4),
    Config("fold", _WIDE, _ALL, 4, ahead=4, num_warps=4),
    Config("fold", _WIDE, _ALL, 8, ahead=8, num_warps=4),
    # A window for every second multiprocessor, a prompt of 8k: 9.8 us with half a window to a program; before its last stretch
    # was shortened 11.3, with a quarter and 4 warps 12.1, with an eighth and 2 warps 12.4, 13.8 whole. Programs that share a
    # window fetch its tokens before the wait; without that, 1.7 us more. When it took 9.95: half windows with 4 warps 12.2; two
    # windows side by side, a quarter of each, 15.1; 128 registers and 8 tokens ahead, so that the next launch finds room, 16.5;
    # tokens and ape by way of shared memory, 16 to 20 tokens ahead at all times, 10.0, or 13.2 with room for the next launch.
    Config("fold", _WIDE, _ALL, ANY, ahead=16, num_warps=8, slice=256, programs=264, most_items=66),
    # Few windows: each is a chain of 128 tokens, so many loads ahead and 2 channels per thread. 64 windows, 8 warps with 8, 12
    # and 16 tokens ahead: 18.1, 17.0 and 15.6 us; 4 warps with 8, 16 and 32: 20.3, 17.6 and 29.9 (which spills). 128 windows,
    # a prompt of 16k: 14.7 us; half windows with 4 and 8 warps 16.5 and 20.4.
    Config("fold", _WIDE, _ALL, ANY, ahead=16, num_warps=8, programs=264, most_items=132),
    # That many may be 64 long windows and as many that get a token or two, which must find programs beside the long ones: 8k
    # tokens beside 64 sequences that decode 4 each take 11.2 us (10.0 without these); at 12.4, the row above took 13.5.
    Config("fold", _WIDE, _ALL, ANY, ahead=16, num_warps=4, slice=256, programs=264, most_items=200),
    # Two windows to a multiprocessor, so two programs: a prompt of 32k in 22.9 us, and with all registers for one in 27.0.
    Config("fold", _WIDE, _ALL, ANY, ahead=8, num_warps=8, registers=128, programs=264, most_items=264, spills=4),
    # Many windows are as fast as their instructions. 1 and 8 prompts of 64k: 38.9 and 263 us; windows one by one 39.8 and 285;
    # 3 programs to a multiprocessor with 8 tokens ahead 47.9 and 277; 5 with 96 registers 42.0 and 268.
    Config("fold", _WIDE, _ALL, ANY, ahead=4, num_warps=4, registers=128, programs=528, together=2, spills=32),
    Config("rows", _NARROW, (1, 8), 8, ahead=8, num_warps=2),
    # The indexer alone, 1 and 8 prompts of 64k: two windows to a warp 25.8 and 150 us; four to two warps 28.3 and 150; one to a
    # warp 36.5 and 184, two to two warps 177; with 80, 96 or 168 registers 195, 174 and 160.
    Config("rows", _NARROW, _ALL, ANY, ahead=8, num_warps=1, registers=128, programs=2112, together=2, spills=156),
    Config("rows", _MIDDLE, (1, 8), 8, ahead=8, num_warps=4),
    Config("rows", _MIDDLE, _ALL, ANY, ahead=8, num_warps=1, programs=1584),
    # 4 against 8 warps, main and indexer in one launch: one token 2.83/3.75/5.32 against 3.09/3.88/8.56 us, four tokens
    # 3.47/4.16/6.54 against 3.58/4.68/9.11; without the bound on registers 512 programs did not fit at once.
    Config("rows", _WIDE, (1, 8), 8, ahead=8, num_warps=4, registers=128, spills=8),
    # 8 programs fit a multiprocessor, but with 1188 in all 8k tokens beside 64 sequences that decode 4 are two windows to each,
    # where 1056 have three: 13.7 us, and 17.5. 8k tokens alone 12.8, and 11.7 with a pause (prefill_rows.py). Rows that do not
    # come by halves 13.7, all 8 rows ahead 15.4. Halves with 112 registers 13.3, with 96 and 1320 programs 15.2; one warp to a
    # window 18 to 22. In a pair, 4k, 6k and 8k tokens in 10.9, 13.5 and 16.4 us, and by the row below in 12.5, 16.5 and 17.8;
    # 8k with 594 programs for each 19.3, 684 16.6, 924 16.4, 1056 16.5, and with two programs for it to one for the indexer,
    # all at once, 16.8; 6k without the pause 14.7.
    Config(
        "rows",
        _WIDE,
        _ALL,
        ANY,
        ahead=4,
        num_warps=2,
        registers=128,
        programs=1188,
        pair_programs=792,
        most_items=2376,
        spills=68,
    ),
    # 1 and 8 prompts of 64k: 71.8 and 527 us, 8 programs to a multiprocessor, 4 warps to each quarter of its registers. When
    # one took 75 to 78: with 168 registers, 6 programs, 77.5; 96 and 10 programs 94; 4 warps 88. What is between fits no more
    # programs, and those that do not fit come last: 109 with 112 or 144. Rows by halves, the second when there is room, 86.6.
    # The rows of the next window under way while this one is finished: in registers 76.4 and 572; in shared memory, when these
    # took 84 and 648, 101 and 736. A pair of few windows, which takes this row with snapshots, measured without: 8k in 17.6 us
    # with 792 programs for each, and 20.5 with 1056, which leave the other no room until they end.
    Config(
        "rows",
        _WIDE,
        _ALL,
        ANY,
        ahead=8,
        num_warps=2,
        registers=128,
        programs=1056,
        pair_programs=792,
        spills=252,
        pair_spills=328,
    ),
    Config("window", _NARROW, (1, 16), 8, ahead=4, num_warps=1, registers=128, programs=2112),
    Config("window", _NARROW, (1, 16), ANY, ahead=4, num_warps=1, registers=128, programs=2112, prompt=True),
    Config("window", _NARROW, _ALL, 8, **_SHORT_WINDOWS, spills=300),
    Config("window", _NARROW, _ALL, ANY, **_LONG_WINDOWS, spills=216),
    # Without the bound it takes 128 registers too, and spills 4 bytes.
    Config("window", _MIDDLE, (1, 16), 8, ahead=4, num_warps=2, registers=128, programs=1056),
    Config("window", _MIDDLE, (1, 16), ANY, ahead=4, num_warps=2, registers=128, programs=1056, prompt=True, spills=16),
    Config("window", _MIDDLE, _ALL, 8, **_SHORT_WINDOWS, spills=300),
    Config("window", _MIDDLE, _ALL, ANY, **_LONG_WINDOWS, spills=216),
    Config("window", _WIDE, (1, 16), 8, ahead=4, num_warps=4, registers=128, programs=528),
    # A prompt fetches the first windows' tokens before it waits: 8k in 32.9 instead of 33.6 us, 64k in 230 instead of 229.
    Config("window", _WIDE, (1, 16), ANY, ahead=4, num_warps=4, registers=128, programs=528, prompt=True, spills=8),
    # One new token at batch 1, 16, 64 and 256, and four where 2 of 64 sequences end a window, as in most steps of an engine:
    # 3.1/5.1/11.9/35.5 and 3.5 us. When these took 3.7/5.9/13.2/41.0 and 3.9: tiles of 64 rows 4.1/6.4/13.6/41.5 and 4.3, and
    # with 96 registers and 5 programs to a multiprocessor 4.2/6.3/14.7/43.4 and 4.3; slices of 64, tiles of 64,
    # 4.6/6.5/15.0/40.3 and 4.8; 2 warps with slices of 32 4.5/6.4/14.9/43.0 and 4.5; half as many programs, so that the next
    # launch finds room, 57 at batch 256; one program for each slice 17.4 at 64 and 53.8 at 256. Rows by way of shared memory,
    # three tiles of 64 ahead, whose loads take no registers: 4.6/6.7/14.7/40.3 and 5.1 with 2 warps; with slices of 64, 4 warps
    # and 264 programs 5.1/6.7/15.4/41.8 and 5.4. Programs that do nothing but pool are 15 to 20 % faster so (10.7 and 34.8 us
    # at 64 and 256), which does not come through here: why is not known. Rows of the next slice in registers while this one is
    # summed: 3.7/6.3/13.2/39.2 and 4.1; where that spilled 400 bytes, 16.6 at 64 and 46.8 at 256.
    Config("window", _WIDE, _ALL, 8, **_SHORT_WINDOWS, spills=292),
    # Prompts of 8k and 64k: 17.0 and 119 us; when these took 18.7 and 121, slices of 32 channels 20.2 and 156, as memory is
    # written best in long pieces: a kernel that only moves the bytes takes 150, 121 and 114 us with pieces of 32, 64 and 128
    # channels. 4 lanes, tiles of 32 rows and slices of 128: 18.9 and 115, but decoding wants 8 lanes.
    Config("window", _WIDE, _ALL, ANY, **_LONG_WINDOWS, spills=216),
    Config("store", _NARROW, _ALL, ANY, ahead=1, num_warps=1),
    Config("store", _MIDDLE, _ALL, ANY, ahead=1, num_warps=2),
    Config("store", _WIDE, _ALL, ANY, ahead=1, num_warps=4),
)


def item_bound(items: int, bounds: tuple[int, ...] = ITEM_BOUNDS) -> int:
    """The number of windows that a call of `items` is taken for, so that few kernels serve all of them."""
    return next(bound for bound in bounds if items <= bound)


def pair_bounds(kinds: set[str]) -> tuple[int, ...]:
    """The bounds of `item_bound` for two compressors in one launch, whose states are of these `kinds`.

    Fold rows of few windows are shared in slices, and a pair's kernel has no workspace for them.
    """
    return ITEM_BOUNDS if kinds == {"rows"} else (ANY,)


def choose(kind: str, spec: CompressorSpec, max_new_tokens: int, items: int = ANY) -> Config:
    """The first row of the table that serves a call; `items`: the windows that it may touch.

    Raises:
        UnsupportedError: there is none.
    """
    for config in CONFIGS:
        if config.serves(kind, spec.head_dim, spec.window_rows, max_new_tokens, items) and not _odd_window(kind, spec):
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
