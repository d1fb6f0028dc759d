"""How each kernel is launched: the one table that calls, `warmup`, ahead-of-time builds and the documents read.

Programs and windows are counted per multiprocessor; a call asks its device how many there are. Measurements: docs/notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..contract import HIDDEN_STEP, UnsupportedError
from ..spec import CompressorSpec

ANY = (1 << 31) - 1
SPILLS_TRITON = "3.6"  # that rows were measured with; another may spill more
MULTIPROCESSORS = 132  # of an H100 and an H200; stands in where there is no device to ask
BUCKETS = (0.5, 1, 1.5, 2, 18, ANY)  # calls are bucketed by windows per multiprocessor, so that few kernels serve all of them


@dataclass(frozen=True)
class Config:
    """A row of the table. It serves calls of its `kind` within its bounds, if no row before it does.

    Attributes:
        kind: that of the state, `"fold"`, `"mean"`, `"rows"` or `"window"`; or `"store"`, which has none.
        head_dims: narrowest and widest entry it serves.
        window_rows: fewest and most tokens per entry (`spec.window_rows`).
        max_new_tokens: longest step of a sequence, by the plan's bound.
        ahead: tokens whose loads are in flight at once. Any value gives the same bits.
        num_warps: per program. Any value gives the same bits.
        slice: channels per program; 0 for whole rows. `"window"`, and `"fold"` with `programs`.
        tile: `"window"`: rows in flight at once. Any value gives the same bits.
        registers: bound on registers per thread, so that more programs share a multiprocessor; 0 for none.
        programs: most programs per multiprocessor, each of which takes work in turn; 0 for one per work item, which has all
            its loads under way before the first use, so that `ahead` holds a step.
        together: with `programs`, `"fold"` and `"rows"`: windows that a program folds side by side; for `"rows"`, only where
            all rows of a window are ahead.
        pair_programs: `programs` for each of two compressors in one launch whose first one has this row, where `programs`
            would have at most two windows each; 0 for `programs`.
        bucket: most windows of a call, per multiprocessor.
        prompt: `"window"`: a program that pools rows that are all new also writes them. Any value gives the same bits.
        spills, pair_spills, engine_spills: bytes that a thread may spill on sm_90: alone, as the first of two in one launch,
            and over a `WindowState` with an engine's tables or rings. It is what the worst kernel spills with bf16 kv_score,
            under `SPILLS_TRITON`. Only rows that bound registers may spill: they were fastest so.
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
    programs: float = 0
    together: int = 1
    pair_programs: float = 0
    bucket: float = ANY
    prompt: bool = False
    spills: int = 0
    pair_spills: int = 0
    engine_spills: int = 0

    def programs_on(self, multiprocessors: int) -> int:
        """Most programs of a call on a device; 0 for one per work item."""
        return round(self.programs * multiprocessors)

    def pair_programs_on(self, multiprocessors: int) -> int:
        return round(self.pair_programs * multiprocessors)

    def serves(self, kind: str, head_dim: int, window_rows: int, max_new_tokens: int, bucket: float) -> bool:
        return (
            kind == self.kind
            and self.head_dims[0] <= head_dim <= self.head_dims[1]
            and self.window_rows[0] <= window_rows <= self.window_rows[1]
            and max_new_tokens <= self.max_new_tokens
            and bucket <= self.bucket
        )


Row = tuple[Config, ...]  # of the table as it is written: one or more widths of entries
_NARROW, _MIDDLE, _WIDE = (16, 128), (256, 256), (512, 4096)
_WARPS = {_NARROW: 1, _MIDDLE: 2, _WIDE: 4}


def _row(
    kind: str,
    max_new_tokens: int,
    *widths: tuple[int, int],
    rows: tuple[int, int] = (1, 8192),
    spills: Sequence[int] = (),
    engine_spills: Sequence[int] = (),
    **how: Any,
) -> Row:
    """A row for these widths, or rows for all. spills, engine_spills: those of each width, if any spills."""
    widths = widths or tuple(_WARPS)
    none = (0,) * len(widths)
    return tuple(
        Config(kind, width, rows, max_new_tokens, spills=most, engine_spills=engine, **how)
        for width, most, engine in zip(widths, spills or none, engine_spills or none, strict=True)
    )


def _scaled(row: Row) -> Row:
    """The rule for widths: 256 channels take two times and more take four times the warps, and as many times fewer programs."""
    return tuple(
        replace(c, num_warps=c.num_warps * _WARPS[c.head_dims], programs=c.programs // _WARPS[c.head_dims]) for c in row
    )


_SHORT: dict[str, Any] = {"ahead": 4, "num_warps": 4, "slice": 32, "tile": 128, "registers": 128, "programs": 4}
_LONG: dict[str, Any] = _SHORT | {"slice": 64, "tile": 64, "programs": 8, "prompt": True}
_FEW_ROWS: dict[str, Any] = {"rows": (1, 16), "ahead": 4, "num_warps": 1, "registers": 128, "programs": 16}

ROWS: tuple[Row, ...] = (
    # A short step has all its tokens ahead; few warps are faster: note 0050.
    *(_scaled(_row("fold", most, ahead=most, num_warps=1)) for most in (1, 4, 8)),
    _scaled(_row("fold", ANY, _NARROW, _MIDDLE, ahead=8, num_warps=1, programs=16)),
    # Half a window to a program, as there are multiprocessors without a window: note 0051.
    _row("fold", ANY, _WIDE, ahead=16, num_warps=8, slice=256, programs=2, bucket=0.5),
    # Few windows are chains of tokens, so many loads ahead and 2 channels per thread: note 0052.
    _row("fold", ANY, _WIDE, ahead=16, num_warps=8, programs=2, bucket=1),
    # A prompt beside sequences that decode, whose short windows must find programs beside the long ones: note 0052.
    _row("fold", ANY, _WIDE, ahead=16, num_warps=4, slice=256, programs=2, bucket=1.5),
    # Two programs to a multiprocessor, which fit by the bound on registers: note 0052.
    _row("fold", ANY, _WIDE, ahead=8, num_warps=8, registers=128, programs=2, bucket=2, spills=(4,)),
    # Many windows are as fast as their instructions, of which two side by side share some: note 0053.
    _row("fold", ANY, _WIDE, ahead=4, num_warps=4, registers=128, programs=4, together=2, spills=(160,)),
    # Of a `MeanState`, as the same of fold rows, without slices.
    *(_scaled(_row("mean", most, ahead=most, num_warps=1)) for most in (1, 4, 8)),
    _scaled(_row("mean", ANY, _NARROW, _MIDDLE, ahead=8, num_warps=1, programs=16)),
    _row("mean", ANY, _WIDE, ahead=16, num_warps=8, programs=2, bucket=1),
    _row("mean", ANY, _WIDE, ahead=4, num_warps=4, registers=128, programs=4, spills=(4,)),
    _scaled(_row("rows", 8, _NARROW, _MIDDLE, rows=(1, 8), ahead=8, num_warps=2)),
    # Windows of two rows are as fast as their instructions, of which fewer warps have fewer: note 0077.
    _row("rows", 8, _WIDE, rows=(1, 2), ahead=2, num_warps=2),
    # The bound on registers is so that 512 programs fit at once: note 0054.
    _row("rows", 8, _WIDE, rows=(1, 8), ahead=8, num_warps=4, registers=128, pair_spills=4),
    # Two windows to a warp: note 0055.
    _row("rows", ANY, _NARROW, ahead=8, num_warps=1, registers=128, programs=16, together=2, spills=(168,)),
    _row("rows", ANY, _MIDDLE, ahead=8, num_warps=1, programs=12),
    # One program more than fits, so that none has three windows where most have two: note 0056.
    _row(
        "rows", ANY, _WIDE, ahead=4, num_warps=2, registers=128, programs=9, pair_programs=6, bucket=18, spills=(64,),
        pair_spills=84,
    ),
    # As many programs as fit; a window's rows all ahead: note 0057.
    _row(
        "rows", ANY, _WIDE, ahead=8, num_warps=2, registers=128, programs=8, pair_programs=6, spills=(236,), pair_spills=328,
    ),
    # A long step fetches the first windows' tokens before it waits: note 0059.
    _scaled(_row("window", 8, **_FEW_ROWS, spills=(8, 20, 0), engine_spills=(220, 252, 248))),
    _scaled(_row("window", ANY, **_FEW_ROWS, prompt=True, spills=(4, 16, 8), engine_spills=(220, 252, 248))),
    # Slices of 32 channels for decoding: note 0058; of 64 for prompts, as memory is written best in long pieces: note 0059.
    _row("window", 8, **_SHORT, spills=(348, 336, 340), engine_spills=(456, 444, 460)),
    _row("window", ANY, **_LONG, spills=(260, 248, 264), engine_spills=(308, 268, 288)),
    # Notes 0060 and 0077.
    tuple(replace(c, num_warps=min(c.num_warps, 2)) for c in _scaled(_row("store", ANY, ahead=1, num_warps=1))),
)  # fmt: skip
CONFIGS: Row = tuple(config for row in ROWS for config in row)


@dataclass(frozen=True)
class Tiling:
    """A row of the table of projections. It serves steps of up to `max_tokens` tokens and kv_score of up to `max_columns`
    columns, if no row before it does. Rows with a `round` serve all other steps: a step takes the one that is done soonest.

    Attributes:
        columns, tokens: those of kv_score in a tile, the work of one program. Columns are at least 64, so that Hopper uses one
            kind of instruction for all; any such value gives the same bits.
        depth: numbers of hidden states and weights that a tile takes at once. Any value gives the same bits; with weights in
            FP8 it divides a block.
        parts: programs that share a tile, with a part of hidden_dim each: 8, 4 or 1. Any of these gives the same bits.
        stages: how many times `depth` numbers are under way at once, of each of two chunks where parts are 4 or 1; fewer on a
            GPU without enough shared memory.
        num_warps: per program. Any value gives the same bits.
        group: rows of tiles, of tokens, that programs take side by side. Any value gives the same bits.
        round: microseconds that one program on each multiprocessor takes, with its part of what follows, on an H200 at a
            hidden_dim of 7168. Only how rows compare matters.
        spills: as in `Config`. Tiles without parts spill at the ends of loops, where a thread has three sums of its own.
    """

    max_tokens: int
    columns: int
    tokens: int
    depth: int
    parts: int
    stages: int
    num_warps: int
    max_columns: int = ANY
    group: int = 1
    round: float = 0
    spills: int = 0

    def tiles(self, tokens: int, columns: int) -> int:
        """How many tiles a call has, each shared by `parts` programs."""
        return -(-columns // self.columns) * -(-tokens // self.tokens)

    def time(self, tokens: int, columns: int, multiprocessors: int) -> float:
        """Microseconds of a call, by whole rounds."""
        return self.round * -(-self.tiles(tokens, columns) * self.parts // multiprocessors)

    def depth_for(self, chunk: int) -> int:
        """The depth for this hidden_dim: no tile may cross from one chunk into the next."""
        return self.depth if chunk % self.depth == 0 else HIDDEN_STEP


# Notes 0076, 0079, 0081 and 0082.
TILINGS: tuple[Tiling, ...] = (
    Tiling(16, columns=64, tokens=16, depth=128, parts=8, stages=6, num_warps=4, max_columns=1024),
    Tiling(16, columns=64, tokens=16, depth=128, parts=8, stages=3, num_warps=4),
    Tiling(64, columns=64, tokens=64, depth=128, parts=8, stages=4, num_warps=4, max_columns=1024),
    Tiling(64, columns=64, tokens=64, depth=64, parts=8, stages=4, num_warps=4),
    Tiling(ANY, columns=64, tokens=128, depth=64, parts=4, stages=4, num_warps=4, round=12.4),
    Tiling(ANY, columns=64, tokens=128, depth=64, parts=1, stages=4, num_warps=4, round=33.5, spills=132),
    Tiling(ANY, columns=128, tokens=128, depth=64, parts=1, stages=3, num_warps=8, group=8, round=55, spills=16),
)


# Of weights in FP8, which each tile makes bf16 of its own. Longer steps than these serve have a launch that does so once, and
# then the rows above.
SCALED: tuple[Tiling, ...] = (
    Tiling(16, columns=64, tokens=16, depth=128, parts=8, stages=8, num_warps=4, max_columns=1024),
    Tiling(16, columns=64, tokens=16, depth=128, parts=8, stages=3, num_warps=4),
    Tiling(64, columns=64, tokens=64, depth=64, parts=8, stages=4, num_warps=4),
)


def tiling(tokens: int, columns: int, multiprocessors: int = MULTIPROCESSORS) -> Tiling:
    """The row that serves a step of so many tokens and kv_score of so many columns."""
    first = next(row for row in TILINGS if tokens <= row.max_tokens and columns <= row.max_columns)
    return _soonest(tokens, columns, multiprocessors) if first.round else first


def _soonest(tokens: int, columns: int, multiprocessors: int) -> Tiling:
    """Of the rows that have a `round` the one that is soonest done."""
    return min((row for row in TILINGS if row.round), key=lambda row: row.time(tokens, columns, multiprocessors))


def whole_rounds(tokens: int, columns: int, multiprocessors: int = MULTIPROCESSORS) -> int:
    """The tokens to cut from a step, which fill rounds of the last row, where that saves time; 0 for none."""
    last = TILINGS[-1]
    across = last.tiles(1, columns)
    rounds = last.tiles(tokens, columns) // multiprocessors
    cut = rounds * multiprocessors // across * last.tokens
    if not last.round or not 0 < cut < tokens:
        return 0

    now, rest = (
        _soonest(count, columns, multiprocessors).time(count, columns, multiprocessors) for count in (tokens, tokens - cut)
    )
    # By a twentieth at least, as there is a launch more.
    return cut if last.time(cut, columns, multiprocessors) + rest < 0.95 * now else 0


def scaled_tiling(tokens: int, columns: int) -> Tiling | None:
    """The same for weights in FP8; None where they are made bf16 before."""
    return next((row for row in SCALED if tokens <= row.max_tokens and columns <= row.max_columns), None)


def tilings(columns: int, scaled: bool = False) -> tuple[tuple[Tiling, bool], ...]:
    """All rows that serve some step, each with whether it is for weights in FP8. scaled: whether calls have such weights, which
    longer steps make bf16 first.
    """
    found = [row if row.round else tiling(row.max_tokens, columns) for row in TILINGS]
    rows = [(row, False) for row in found if not scaled or scaled_tiling(row.max_tokens, columns) is None]
    if scaled:
        of_codes = [scaled_tiling(row.max_tokens, columns) for row in SCALED]
        rows = [(row, True) for row in of_codes if row is not None] + rows
    return tuple(dict.fromkeys(rows))


def item_bucket(windows: int, multiprocessors: int, buckets: tuple[float, ...] = BUCKETS) -> float:
    """The bucket of a call that may touch so many windows on a device."""
    return next(bucket for bucket in buckets if windows <= bucket * multiprocessors)


def pair_buckets(kinds: set[str]) -> tuple[float, ...]:
    """The buckets of two compressors in one launch, whose states are of these `kinds`.

    Few windows of fold rows would be shared in slices, for which a pair's kernel has no workspace.
    """
    return BUCKETS if kinds == {"rows"} else (ANY,)


def choose(kind: str, spec: CompressorSpec, max_new_tokens: int, bucket: float = ANY) -> Config:
    """The first row of the table that serves a call. bucket: that of its windows (`item_bucket`).

    Raises:
        UnsupportedError: there is none.
    """
    # Tiles of raw rows are powers of two, and a window fills its tiles.
    odd = kind == "window" and spec.ratio & (spec.ratio - 1) != 0
    head_dim, window_rows = spec.head_dim, spec.window_rows
    for config in CONFIGS:
        if config.serves(kind, head_dim, window_rows, max_new_tokens, bucket) and not odd:
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


COLUMNS = (
    "kind", "head_dim", "rows of a window", "new tokens", "windows", "ahead", "warps", "slice", "tile", "registers", "programs",
    "together", "may spill",
)  # fmt: skip


TILING_COLUMNS = (
    "tokens of a step", "columns of kv_score", "columns", "tokens", "depth", "parts", "stages", "warps", "group", "round",
)  # fmt: skip


def tilings_in_words(rows: Iterable[Tiling]) -> list[tuple[str, ...]]:
    """`TILINGS` or `SCALED` for readers, by `TILING_COLUMNS`."""
    return [
        (
            _most(t.max_tokens),
            _most(t.max_columns),
            *map(str, (t.columns, t.tokens, t.depth, t.parts, t.stages, t.num_warps, t.group, t.round or "-")),
        )
        for t in rows
    ]


def in_words() -> list[tuple[str, ...]]:
    """`ROWS` for readers, by `COLUMNS`; where widths differ, a number for each."""
    return [_in_words(row, row[0]) for row in ROWS]


def _in_words(row: Row, c: Config) -> tuple[str, ...]:
    """c: the config of the row's narrowest width."""
    programs, spills = "-" if c.kind == "store" else "one each", "-"
    if c.programs:
        programs = _each(one.programs for one in row) + (f" ({c.pair_programs})" if c.pair_programs else "")
    if any(one.spills or one.pair_spills or one.engine_spills for one in row):
        spills = _each(one.spills for one in row) + " bytes" + (f", {c.pair_spills} in a pair" if c.pair_spills else "")
        spills += f"; engines {_each(one.engine_spills for one in row)}" if c.engine_spills else ""
    return (
        c.kind, _bounds(c.head_dims[0], row[-1].head_dims[1]), _bounds(*c.window_rows), _most(c.max_new_tokens),
        _most(c.bucket), str(c.ahead), _each(one.num_warps for one in row), str(c.slice or "whole"),
        str(c.tile) if c.kind == "window" else "-", str(c.registers or "-"), programs,
        str(c.together) if c.programs else "-", spills,
    )  # fmt: skip


def _bounds(low: int, high: int) -> str:
    return f"{low} to {high}" if low != high else str(low)


def _most(bound: float) -> str:
    return "any" if bound == ANY else f"up to {bound:g}"


def _each(values: Iterable[float]) -> str:
    found = [str(value) for value in values]
    return ", ".join(found) if len(set(found)) > 1 else found[0]
