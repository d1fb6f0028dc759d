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


class SnapTable(NamedTuple):
    snap_table: object
    snap_width: object
    snap_page_size: object


class Tokens(NamedTuple):
    kv_score: object
    kv_stride: object
    num_tokens: object
    ape: object


class State(NamedTuple):
    state_rows: object
    state_tags: object
    num_slots: object
    ring: object


class Snaps(NamedTuple):
    snap_rows: object
    snap_tags: object
    num_snaps: object


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
    cache_slots: object
    cache_scale: object


class KvPool(NamedTuple):
    kv_pool: object
    kv_page_stride: object
    kv_row_stride: object
    kv_pages: object
    kv_table: object
    kv_width: object


class ScorePool(NamedTuple):
    score_pool: object
    score_page_stride: object
    score_row_stride: object
    score_pages: object
    score_table: object
    score_width: object


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
class How:
    AHEAD: int
    TOGETHER: int
    SLICE: int
    PDL: bool = False
    HARDWARE: bool = False
