"""What kernels are given: run-time arguments, grouped by what they describe, and what is compiled in.

A kernel takes numbers and addresses one by one and groups them again. Launches fill these groups with tensors and numbers,
variants with types; `flat` puts them in the order of the kernel's parameters. Defaults are for what a call lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, get_type_hints

from .table import MULTIPROCESSORS

# Types of arguments, by Triton's names. A stride is 64-bit, and counts for the alignment of what lies that far apart.
STRIDE = "stride"
LOOSE = "loose "  # before a pointer that is read number by number, so that its alignment does not matter
Int = Annotated[Any, "i32"]
Long = Annotated[Any, "i64"]
Stride = Annotated[Any, STRIDE]
Ints = Annotated[Any, "*i32"]
Longs = Annotated[Any, "*i64"]
Floats = Annotated[Any, "*fp32"]  # or bf16, where a call may have either
Bytes = Annotated[Any, "*u8"]


class Plan(NamedTuple):
    """The work of a step, from a `StepPlan`: work items, how many, each entry's cache slot, entries, and the error count."""

    items: Ints
    num_items: Ints
    entry_slots: Longs
    entry_capacity: Int
    errors: Ints


class SnapshotTable(NamedTuple):
    """The plan's table of snapshots, `[sequences, width]`: the snapshot of each page of `page_size` positions."""

    pages: Ints = None
    width: Int = None
    page_size: Int = None


class Tokens(NamedTuple):
    """The step's new tokens: `count` rows of `kv_score`, `stride` elements apart, and the bias of their scores.

    apart, skew: for scores in a tensor of their own, see kernels/tokens.py.
    """

    kv_score: Floats = None
    stride: Stride = 0
    count: Int = 0
    ape: Floats = None
    apart: Stride = None
    skew: Stride = None


class State(NamedTuple):
    """A `FoldState`: rows, tags, the number of slots, and its `ring`.

    stride, pitch: elements from a slot's first row to the next slot's, and from its first tag to the next slot's. A `MeanState`
    has no tags: there `ring` banks follow the rows, and `pitch` is the slots from bank to bank.
    """

    rows: Floats = None
    tags: Ints = None
    num_slots: Int = None
    ring: Int = None
    stride: Stride = None
    pitch: Int = None


class Snapshots(NamedTuple):
    """Snapshots of a `FoldState`: rows, the position that each stands for, and how many snapshots there are.

    stride, pitch: as in `State`, from snapshot to snapshot.
    """

    rows: Floats = None
    tags: Ints = None
    count: Int = None
    stride: Stride = None
    pitch: Int = None


class Scratch(NamedTuple):
    """Memory by which programs of a launch communicate: pooled channels, and tickets (kernels/slices.py, kernels/items.py)."""

    workspace: Longs = None
    arrivals: Ints = None


class Output(NamedTuple):
    """Where entries go: pooled rows, normed rows, and a cache with all that finishing an entry takes.

    max_position: rows of `rope`. num_slots: of the cache, `rows_per_page` on each page. scale: the address of the scale of the
    whole cache, for formats that have one; a number, as it need not be aligned like what is read 16 bytes at a time.
    """

    rows: Floats = None
    latent: Annotated[Any, "*bf16"] = None
    norm_weight: Floats = None
    rope: Floats = None
    max_position: Int = 0
    pages: Bytes = None
    page_stride: Stride = 0
    scales: Bytes = None
    scales_stride: Stride = 0
    rows_per_page: Int = 1
    num_slots: Long = 0
    scale: Long = None


class Places(NamedTuple):
    """For `store` without a plan: the cache slot and the position of each row."""

    slots: Any = None
    positions: Any = None


class Pool(NamedTuple):
    """One of the two pools of a `WindowState`, of values or of scores, and its block table `[sequences, width]`.

    step: that of the table, as in `Numbers`.
    """

    rows: Floats
    page_stride: Stride
    row_stride: Stride
    num_pages: Int
    table: Ints
    width: Int
    step: Long = None


class Item(NamedTuple):
    """A work item: one window of one sequence in this step.

    window: its number in the sequence. start, end: the step's positions of the sequence, `[start, end)`. token: the row of
    `kv_score` of position `start`. slot: in the state. entry: its number in the step, -1 where the window does not end.
    sequence: its number in the batch.
    """

    window: Any
    start: Any
    end: Any
    token: Any
    slot: Any
    entry: Any
    sequence: Any


class Compressor(NamedTuple):
    """One compressor, over a `FoldState` or without a state: what kernels take after the plan and its `SnapshotTable`."""

    tokens: Tokens
    state: State
    snapshots: Snapshots
    scratch: Scratch
    output: Output


class Hidden(NamedTuple):
    """Hidden states of a step's tokens: `count` rows, `stride` elements apart."""

    rows: Annotated[Any, "*bf16"] = None
    stride: Stride = 0
    count: Int = 0


class Weights(NamedTuple):
    """Weights of a projection: a row for each of the `columns` of its sums, in up to four tensors, one after the other.

    cut_1, gap_1: from column `cut_1` on, rows lie `gap_1` elements further than if they followed the row before. scales,
    scales_1: where rows are codes, the scales of the first tensor, and how many elements after them those of the tensor at
    `cut_1` begin.
    """

    rows: Annotated[Any, "*bf16"] = None
    columns: Int = 0
    cut_1: Int = None
    gap_1: Stride = None
    cut_2: Int = None
    gap_2: Stride = None
    cut_3: Int = None
    gap_3: Stride = None
    scales: Annotated[Any, LOOSE + "*fp32"] = None
    scales_1: Long = None
    scales_2: Long = None
    scales_3: Long = None


class Sums(NamedTuple):
    """Results of a projection: rows of kv_score, `stride` elements apart, or parts of it, which are `step` elements apart."""

    rows: Floats = None
    stride: Stride = 0
    step: Stride = None


class ProjectArguments(NamedTuple):
    """Arguments of the product of `project_compress`."""

    hidden: Hidden
    weights: Weights
    sums: Sums


class AddArguments(NamedTuple):
    """Arguments of the sum of a projection's parts."""

    parts: Sums
    columns: Int
    kv_score: Sums


class WindowArguments(NamedTuple):
    """Arguments of `compress` over a `WindowState`.

    null_page: the number that means no page, besides -1; None where tables have a step of None. ring: how many positions a
    sequence's pages hold, where its table is a ring, else None.
    """

    plan: Plan
    entry_items: Ints
    cu_entries: Ints
    batch: Int
    tokens: Tokens
    kv_pool: Pool
    score_pool: Pool
    page_size: Int
    null_page: Int
    ring: Int
    scratch: Scratch
    output: Output


class RestoreArguments(NamedTuple):
    """Arguments of `restore`: for each i, the slot and the snapshot of its last page before `start_pos`."""

    state: State
    snapshots: Snapshots
    page_size: Int
    slots: Ints
    pages: Ints
    start_pos: Ints
    errors: Ints


class Numbers(NamedTuple):
    """Numbers that an engine keeps: contiguous int32 where `step` is None, else int32 or int64 at any stride.

    step: twice the 32-bit words from one number, or one row of a table, to the next, and 1 more where they are int64.
    """

    at: Ints = None
    step: Long = None


class Metadata(NamedTuple):
    """What only an engine's metadata has: all None in a plain plan, and all numbers in any other.

    totals: 1 where lengths are those after the step. by_slot: 1 where sequences have state slots. null_slot, null_page: the
    number that means none, besides -1. source: what says where entries go, a table (1), slots of tokens (2) or of entries (3),
    `num_slots` of them; 0 for nothing. no_slot: the token slot that means none. reserved: 1 where entries have the places of
    `cu_rows`.
    """

    totals: Int = None
    by_slot: Int = None
    null_slot: Int = None
    null_page: Int = None
    source: Int = None
    slots: Numbers = Numbers()
    num_slots: Long = None
    no_slot: Int = None
    reserved: Int = None
    cu_rows: Numbers = Numbers()


class PlanArguments(NamedTuple):
    """Arguments of `StepPlan.update`: what it is given, the plan's own tensors, and the cache's block table."""

    lengths: Numbers
    cu_seqlens: Numbers
    state_slots: Numbers
    batch: Int
    max_new_tokens: Int
    max_tokens: Int
    own_start_pos: Ints
    own_cu_seqlens: Ints
    cu_entries: Ints
    items: Ints
    num_items: Ints
    errors: Ints
    item_capacity: Int
    entry_items: Ints
    entry_capacity: Int
    table: Numbers
    table_width: Int
    rows_per_page: Int
    entry_slots: Longs
    num_chunks: Int
    metadata: Metadata


def types_of(kind: type, **changed: Any) -> Any:
    """One of the classes above, filled with the types of its fields, except for those in `changed`."""
    hints = get_type_hints(kind, include_extras=True)
    types = {name: hint.__metadata__[0] if hasattr(hint, "__metadata__") else types_of(hint) for name, hint in hints.items()}
    return kind(**types | changed)


def flat(group: Any) -> list:
    """The values of a group in order, with those of nested groups in their places."""
    return [x for part in group for x in (flat(part) if isinstance(part, tuple) else (part,))]


@dataclass(frozen=True)
class Spec:
    """A `CompressorSpec` and the kind of its state, "" for none, as compiled in. LOG2: the logarithm of HEAD_DIM."""

    RATIO: int
    HEAD_DIM: int
    LOG2: int
    ROPE_DIM: int
    EPS: float
    HADAMARD: bool
    OVERLAP: int = 0
    KIND: str = ""


@dataclass(frozen=True)
class Format:
    """A `RecordFormat`, as compiled in: its fields by their names there (storage/formats.py)."""

    ROUND_ROWS: bool
    ROUND_NORMED: bool
    ROUND_VALUES: bool
    FP4_FIRST: str
    ELEMENT: str
    GROUP: int
    SCALE: str
    FLOOR: float
    FLOOR_ON_SCALE: bool
    DIVIDE: bool
    ROTATED_BF16: bool
    INTERLEAVED: bool
    TIES_TO_ZERO: bool
    UNSIGNED_ZERO: bool
    NEAREST_SCALE: bool
    ZERO_SMALL: bool
    PAD: int
    VALUES_BYTES: int
    ROTATED_AT: int
    ROW_BYTES: int
    TAIL_BYTES: int


@dataclass(frozen=True)
class Target:
    """Facts of a GPU that kernels choose by. The defaults are for no GPU in particular: what Triton's interpreter gets.

    BF16_CONVERSION, E4M3_CONVERSION: it has an instruction that rounds fp32 to the nearest bf16 or e4m3.
    FAST_DIVISION: it has a division in two instructions for divisors that are neither tiny nor huge.
    COHERENT_STORES: other programs of the same launch see a plain store while it runs (NVIDIA's memory model).
    INLINE_PTX: it runs PTX. BF16_PRODUCTS: its matrix units take bf16 as it is.
    SHARED_BYTES: shared memory that a program may have.
    """

    BF16_CONVERSION: bool = False
    E4M3_CONVERSION: bool = False
    FAST_DIVISION: bool = False
    COHERENT_STORES: bool = False
    INLINE_PTX: bool = False
    THREADS_PER_WARP: int = 32
    BF16_PRODUCTS: bool = False
    SHARED_BYTES: int = 0


@dataclass(frozen=True)
class Schedule:
    """How the work is cut, from a row of the table; `table.Config` says what each field means.

    SLICE: channels of a program's part of an entry. PDL: launched as a dependent of the launch before it. MULTIPROCESSORS: how
    many the GPU has. ROUNDED: whether a projection is rounded to bf16, whatever dtype it is stored in.
    """

    AHEAD: int = 0
    TOGETHER: int = 0
    SLICE: int = 0
    ROUNDED: bool = False
    PDL: bool = False
    MULTIPROCESSORS: int = MULTIPROCESSORS
    TARGET: Target = Target()


@dataclass(frozen=True)
class Product:
    """How a projection is cut, from a row of its table (`table.Tiling`), and the order of its sums.

    HIDDEN_DIM: numbers of a hidden state. CHUNK: how many of them one chain of instructions sums. COLUMNS, TOKENS, DEPTH: those
    of a tile. PARTS: programs that share a tile, a part of hidden_dim to each. STAGES: tiles under way at once. GROUP: rows of
    tiles that programs take side by side. SCALED: whether weights are codes with scales.
    """

    HIDDEN_DIM: int
    CHUNK: int
    COLUMNS: int
    TOKENS: int
    DEPTH: int
    PARTS: int
    STAGES: int
    GROUP: int
    SCALED: bool


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
    """Tags of fold rows: of the home of the last position before a step, and of the spare row."""

    home: object
    spare: object


class Tags(NamedTuple):
    """Tags of input rows: of both places of everything that a step may read (kernels/places.py)."""

    before_home: object
    before_other: object
    lo_home: object
    lo_other: object
    hi_home: object
    hi_other: object


class Live(NamedTuple):
    """The tokens of a work item: `Tokens`, counted from its position 0."""

    kv_score: object
    stride: object
    count: object
    ape: object
    apart: object
    skew: object


class Kept(NamedTuple):
    """Places of the input rows that a step reads, -1 for those that it does not.

    before: lo rows of the window before the one that it starts in. lo, hi: rows of that window itself.
    """

    before: object
    lo: object
    hi: object


class Opened(NamedTuple):
    """A window of fold rows that is being folded, and whose it is.

    live: where its first token would stand in kv_score. apart: that of this token, as in `Tokens`. `[begin, stop)`: its new
    tokens, counted from its first position `x0`. first: whether it is the first one of its sequence in this step.
    """

    live: object
    apart: object
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
    """Where a sequence's snapshots go: the plan's table of them and the sequence's row in it, and the snapshots themselves."""

    table: object
    row: object
    snapshots: object
    errors: object
