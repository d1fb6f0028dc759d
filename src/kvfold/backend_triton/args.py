"""What kernels pass on to their parts: run-time arguments by what they are of, and what is compiled in, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Plan(NamedTuple):
    items: object
    num_items: object
    entry_slots: object
    entry_capacity: object
    errors: object


class Item(NamedTuple):
    """A work item: one window of one sequence in this step.

    window: its number in the sequence. start, end: the step's positions of the sequence, `[start, end)`. token: the row of
    `kv_score` of position `start`. slot: of the state. entry: its number in the step, -1 where the window does not end.
    sequence: its number in the batch.
    """

    window: object
    start: object
    end: object
    token: object
    slot: object
    entry: object
    sequence: object


class SnapTable(NamedTuple):
    pages: object
    width: object
    page_size: object


class Tokens(NamedTuple):
    kv_score: object
    stride: object
    count: object
    ape: object


class State(NamedTuple):
    rows: object
    tags: object
    num_slots: object
    ring: object


class Snaps(NamedTuple):
    rows: object
    tags: object
    count: object


class Scratch(NamedTuple):
    workspace: object
    arrivals: object


class Cache(NamedTuple):
    rows: object
    norm_weight: object
    rope: object
    max_position: object
    pages: object
    page_stride: object
    scales: object
    scales_stride: object
    rows_per_page: object
    num_slots: object
    scale: object


class Pool(NamedTuple):
    rows: object
    page_stride: object
    row_stride: object
    num_pages: object
    table: object
    width: object


@dataclass(frozen=True)
class Spec:
    RATIO: int
    OVERLAP: int
    KIND: str
    HISTORY: int
    HEAD_DIM: int
    LOG2: int
    ROPE_DIM: int
    EPS: float
    HADAMARD: bool


@dataclass(frozen=True)
class Fmt:
    ROUND_ROWS: bool
    ELEMENT: str
    GROUP: int
    SCALE: str
    FLOOR: float
    FLOOR_ON_SCALE: bool
    DIVIDE: bool
    ROTATED_BF16: bool
    PAD: int
    ROUND_VALUES: bool
    TIES_TO_ZERO: bool
    ROW_BYTES: int
    TAIL_BYTES: int


@dataclass(frozen=True)
class Target:
    """Facts of a GPU that kernels choose by. As they stand here, of none in particular: what Triton's interpreter gets.

    BF16_CONVERSION, E4M3_CONVERSION: it has an instruction that rounds fp32 to the nearest bf16 or e4m3.
    FAST_DIVISION: it has a division in two instructions for divisors that are neither tiny nor huge.
    COHERENT_STORES: other programs of the same launch see a plain store while it runs (NVIDIA's memory model).
    INLINE_PTX: it runs PTX.
    """

    BF16_CONVERSION: bool = False
    E4M3_CONVERSION: bool = False
    FAST_DIVISION: bool = False
    COHERENT_STORES: bool = False
    INLINE_PTX: bool = False
    THREADS_PER_WARP: int = 32


@dataclass(frozen=True)
class How:
    AHEAD: int
    TOGETHER: int
    SLICE: int
    PDL: bool = False
    TARGET: Target = Target()


class Sequence(NamedTuple):
    """The state of one sequence in a step: addresses of its rows and tags, and the step's positions `[start, end)`.

    h0: the first position before the step whose row the step reads; `start` where it reads none.
    """

    rows: object
    tags: object
    ring: object
    h0: object
    start: object
    end: object


class History(NamedTuple):
    """The last positions before a step, which of them it reads, and the tags of their homes and of their spare rows."""

    positions: object
    wanted: object
    home: object
    spare: object


class Opened(NamedTuple):
    """A window of fold rows that is being folded, and whose it is.

    live: where its first token would stand in kv_score. `[begin, stop)`: its new tokens, counted from its first position `x0`.
    first: whether it is the first one of its sequence in this step.
    """

    live: object
    begin: object
    stop: object
    slot: object
    x0: object
    start: object
    end: object
    entry: object
    sequence: object
    first: object


class Snap(NamedTuple):
    """Where a sequence's snapshots go: its row of the plan's table, positions per page, and the snapshots' rows and tags."""

    table: object
    width: object
    page_size: object
    rows: object
    tags: object
    count: object
    errors: object
