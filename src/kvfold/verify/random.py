"""Cases of `verify --random`, drawn from all that is supported, as plain data: the same for a seed and an index everywhere."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from ..precompile.choices import fits
from ..spec import CompressorSpec
from ..storage.fold_state import state_kind
from ..storage.formats import FORMATS, RecordFormat
from ..testing.engine import Step
from ..testing.told import PLAIN, Told

CASES_PER_SHAPE = 5  # cases in a row that share a shape, since on a GPU it is kernels that take time
BOUNDS = (1, 2, 4, 8)  # of the plans of short steps, each of which has kernels of its own
LONG = 1 << 13  # the bound of a plan with a longer step
FLOATS = ("bfloat16", "float32")
# Ratios: share of all cases, from, to. A window is folded token by token on a CPU, so long ones are few.
RATIOS = ((0.3, 1, 3), (0.35, 4, 8), (0.2, 9, 32), (0.1, 33, 128), (0.04, 129, 1024), (0.01, 1025, 4096))
Pages = tuple[tuple[int, ...], ...]  # by sequence; -1: none
VALUES = ("normal", "peaked", "tied", "masked", "hidden", "zeros")


@dataclass(frozen=True)
class Budget:
    """How large a case may be: tokens of all its sequences, those times channels, steps, and steps times rows of a window."""

    tokens: int
    elements: int
    steps: int
    rows: int


BUDGETS = {
    "torch": Budget(6000, 1 << 18, 10, 500),
    "interpreted": Budget(300, 1 << 14, 5, 100),
    "triton": Budget(6000, 1 << 19, 12, 1 << 20),
}


@dataclass(frozen=True)
class Shape:
    """What kernels are compiled for.

    Attributes:
        state: "fold", "window", or "none" without a gate. dtypes are named as in torch.
        rounds: of a `FoldState`: its bf16 rows are of fp32 inputs. in_pages: it lies in an engine's pages.
        rows: dtype of the pooled rows that the run in pieces asks for, or None. latent: whether it asks for normed ones.
        two: values and scores of the run in pieces are two tensors. told: what its plans are told. ring: its tables are rings.
        scale_on_device: the scale of its cache is a tensor. also: format of a second cache for `store` without a plan.
        addressing: of entries: "table", "slots", "tokens", or "none" without a cache.
        page_size: of a window's pools, 0 for a fold. snapshot: positions per page of snapshots, 0 for none.
        aligned: addresses and strides of the run in pieces are multiples of 16.
        bound: of plans of short steps. max_new_tokens: of the `FoldState`.
        other: the second compressor of one launch.
    """

    spec: CompressorSpec
    state: str
    state_dtype: str
    kv_dtype: str
    fmt: str | None
    scale: float
    norm_dtype: str
    rows: str | None
    addressing: str
    page_size: int
    snapshot: int
    aligned: bool
    bound: int
    max_new_tokens: int
    other: Shape | None = None
    rounds: bool = False
    in_pages: bool = False
    latent: bool = False
    two: bool = False
    told: Told = PLAIN
    ring: bool = False
    scale_on_device: bool = False
    also: str | None = None

    @property
    def nobodys(self) -> int:
        """Pages and slots at the start of each pool that belong to nobody, as their number means none."""
        return int(self.told.null == 0)


@dataclass(frozen=True)
class RandomCase:
    """A shape, values and a history. Tables are by sequence, and -1 stands for no page.

    Attributes:
        values: what tokens are like. draw: the seed of their numbers.
        lengths: tokens of each sequence; in the end `steps` have had all of them.
        slots: of each sequence; one that begins after another has ended may have its slot, or its pages.
        entry_pages: pages of the cache. gap: bytes between them. blocks: they come as an engine's view.
        left, right: elements beside kv_score's columns.
        kv_pages, score_pages: of a window's pools, which have `pages` pages; `joined`: the pools are columns of one tensor;
            `freed`: pages before those that a step needs are -1 in its tables. Of rings each sequence has all pages of its own.
        snapshot_pages: where snapshots go. hit: (sequence, page): restored in the end, and gone on with.
        store: pooled rows are stored by `kvfold.store` too.
    """

    seed: int
    index: int
    shape: Shape
    values: str
    draw: int
    lengths: tuple[int, ...]
    steps: tuple[Step, ...]
    slots: tuple[int, ...]
    rows_per_page: int
    entry_pages: Pages
    gap: int
    blocks: bool
    left: int
    right: int
    kv_pages: Pages = ()
    score_pages: Pages = ()
    pages: int = 0
    joined: bool = False
    freed: bool = False
    snapshot_pages: Pages = ()
    hit: tuple[int, int] | None = None
    store: bool = False

    @property
    def history(self) -> str:
        """What its steps are like, in words."""
        new = [n for step in self.steps for _, start, n, _ in step.parts if start and n]
        most = max(new, default=0)
        found = ["prefill" if most == 0 else "decode" if most == 1 else "short steps" if most <= max(BOUNDS) else "chunks"]
        found += ["rejected"] * any(kept < new for step in self.steps for _, _, new, kept in step.parts)
        found += ["padding"] * any(step.absent or step.behind for step in self.steps)
        found += ["restore"] * (self.hit is not None) + ["pair"] * (self.shape.other is not None)
        found += ["ring"] * self.shape.ring
        return ", ".join(found)


def draw_case(seed: int, index: int, budget: Budget) -> RandomCase:
    """Case `index` of a seed."""
    shape = draw_shape(random.Random(f"kvfold {seed} shape {index // CASES_PER_SHAPE}"), budget)
    return _Drawer(random.Random(f"kvfold {seed} case {index}"), shape, budget).case(seed, index)


def draw_shape(rng: random.Random, budget: Budget) -> Shape:
    """A compressor, its state, cache and dtypes."""
    state = rng.choices(("fold", "window", "none"), (0.57, 0.33, 0.1))[0]
    gate = state != "none"
    ratio, overlap = (_ratio(rng, budget, state), rng.random() < 0.4) if gate else (1, False)
    # A wide record of a long window is beyond the budget.
    fitting = [name for name, fmt in FORMATS.items() if ratio <= 128 or not fmt.head_dims]
    fmt = FORMATS[rng.choice(fitting)] if rng.random() < 0.85 else None
    if fmt is not None and fmt.head_dims:
        width = rng.choice(fmt.head_dims)
    else:
        least = max(16, 0 if fmt is None else fmt.group)
        most = 12 - (least.bit_length() - 1)
        width = least << (rng.randint(0, most) if rng.random() < 0.2 else min(int(rng.expovariate(0.7)), most))
    # A window, with the one before it, is to be within the budget; the width gives way where it may, and else the ratio.
    while width * (1 + overlap) * ratio * 2 > budget.elements:
        if width > 64 and (fmt is None or not fmt.head_dims):
            width //= 2
        elif ratio > 1:
            ratio //= 2
        else:
            overlap = False
            break
    rope = rng.choice((0, width, 2 * rng.randint(0, width // 2), min(64, width)))
    rope = rope if fmt is None or fmt.rope_dim is None else fmt.rope_dim
    eps, has_ape, hadamard = rng.choice((1e-6, 1e-5, 1e-3, 1e-20)), gate and rng.random() < 0.7, rng.random() < 0.3
    spec = CompressorSpec(width, ratio, overlap, has_ape, rope, eps, hadamard, gate)
    kv_dtype, state_dtype, rounds = rng.choice(FLOATS), rng.choice(FLOATS), False
    if state == "none" or (state == "fold" and state_kind(spec) == "fold"):
        state_dtype = "float32"
    elif state == "fold" and kv_dtype == "float32" and state_dtype == "bfloat16":
        rounds = rng.random() < 0.5
        state_dtype = "bfloat16" if rounds else "float32"
    rows = rng.choice((None, *FLOATS)) if fmt is not None else rng.choice(FLOATS)
    snapshot = 0
    if state == "fold" and rng.random() < 0.3:
        some = rng.randint(1, max(2, 2 * ratio))
        snapshot = some if state_kind(spec) == "fold" else ratio * rng.randint(1, 3)
    wants = _wants(rng, spec, fmt) if rng.random() < 0.6 else {}
    told = wants.get("told", PLAIN)
    ways = ("table", "slots", *["tokens"] * (told != PLAIN))
    shape = Shape(
        spec, state, state_dtype, kv_dtype, fmt and fmt.name,
        scale=rng.choice((1.0, 0.5, 0.037, 3.2)) if fmt is not None and fmt.takes_scale else 1.0,
        norm_dtype=rng.choice(FLOATS), rows=rows,
        addressing=rng.choice(ways if fmt is not None else ("none", *ways)), rounds=rounds,
        page_size=rng.choice((ratio, 2 * ratio, rng.randint(1, 9), rng.randint(1, 2 * ratio + 1), 16, 64))
        if state == "window" else 0,
        snapshot=snapshot, aligned=rng.random() < 0.6, bound=rng.choice(BOUNDS), max_new_tokens=rng.choice((1, 2, 4, 5, 8)),
        in_pages=state == "fold" and rng.random() < 0.2, ring=state == "window" and rng.random() < 0.4, **wants,
    )  # fmt: skip
    if state == "fold" and fmt is not None and rng.random() < 0.25:
        return _with_other(rng, shape)
    return shape


def _wants(rng: random.Random, spec: CompressorSpec, fmt: RecordFormat | None) -> dict:
    """Of a `Shape`: what calls are given where an engine has its own way."""
    found: dict = {"latent": rng.random() < 0.5, "two": spec.gate and rng.random() < 0.5}
    if rng.random() < 0.7:
        found["told"] = Told(
            totals=rng.random() < 0.5, wide=rng.random() < 0.5, apart=rng.choice((0, 0, 1, 16)), before=rng.choice((0, 0, 3)),
            reserved=rng.choice((-1, 0, 2)), null=rng.choice((-1, 0)),
        )  # fmt: skip
    if fmt is not None:
        found["scale_on_device"] = fmt.takes_scale and rng.random() < 0.5
        others = [name for name, other in FORMATS.items() if fits(spec, other)]
        found["also"] = rng.choice((None, rng.choice(others)))
    return found


def _with_other(rng: random.Random, shape: Shape) -> Shape:
    """With a second compressor of the same ratio in the launch, which shares the plan."""
    fmt = rng.choice(
        [fmt for fmt in FORMATS.values() if not fmt.head_dims or min(fmt.head_dims) <= 128 or shape.spec.head_dim >= 512]
    )
    width = min(fmt.head_dims) if fmt.head_dims else max(16, fmt.group, rng.choice((32, 64, 128)))
    rope = fmt.rope_dim if fmt.rope_dim is not None else 2 * rng.randint(0, width // 2)
    # Overlap decides what state a short window has; a pair may be of two kinds.
    spec = CompressorSpec(width, shape.spec.ratio, rng.choice((True, shape.spec.overlap)), True, rope, 1e-6, rng.random() < 0.5)
    kv_dtype = rng.choice(FLOATS)
    rows = state_kind(spec) == "rows" and kv_dtype == "bfloat16"
    shape = replace(shape, rows=None, snapshot=0, latent=False)
    kept = rng.choice(FLOATS) if rows else "float32"
    other = replace(shape, spec=spec, fmt=fmt.name, kv_dtype=kv_dtype, state_dtype=kept, scale=1.0, rounds=False)
    return replace(shape, other=replace(other, scale_on_device=False, also=None))


def _ratio(rng: random.Random, budget: Budget, state: str) -> int:
    most = budget.tokens * 3 // 4
    known = [(share, low, min(high, most)) for share, low, high in RATIOS if low <= most]
    _, low, high = rng.choices(known, [share for share, _, _ in known])[0]
    ratio = rng.randint(low, high)
    if ratio > 1024 and rng.random() < 0.5:
        ratio = high
    return 1 << (ratio.bit_length() - 1) if state == "window" else ratio


class _Drawer:
    """Draws a history and the tables for it."""

    def __init__(self, rng: random.Random, shape: Shape, budget: Budget) -> None:
        self.rng, self.shape, self.budget = rng, shape, budget
        self.ratio, self.fold, self.window = shape.spec.ratio, shape.state == "fold", shape.state == "window"
        self.ring_pages = self._ring_pages() if shape.ring else 0
        both = (shape.spec, shape.other.spec) if shape.other else (shape.spec,)
        self.rows = self.fold and any(state_kind(spec) == "rows" for spec in both if spec.gate)
        self.channels = sum(spec.channels for spec in both)
        self.most_steps = max(2, min(budget.steps, budget.rows // max(spec.window_rows for spec in both)))

    def case(self, seed: int, index: int) -> RandomCase:
        rng, shape, lengths = self.rng, self.shape, self._lengths()
        # By sequence, whose slot or pages it has after that one's end; -1 for its own.
        after = [-1 if b == 0 or rng.random() < 0.7 else b - 1 for b in range(len(lengths))]
        found: dict = {"freed": self.window and not shape.ring and rng.random() < 0.4}
        found["steps"] = self._steps(lengths, after, found["freed"])
        found["rows_per_page"] = rng.choice((1, 2, 3, 5, 8, 64))
        width = 16 if shape.aligned else rng.choice((1, 2, 4, 8))
        wide = rng.random() < 0.5
        found |= {"left": width * rng.randint(0, 3) * wide, "right": width * rng.randint(1, 3) * wide}
        found["gap"] = rng.choice((0, 16, 64)) if shape.aligned else rng.choice((0, 4, 20))
        columns = [-(-max(n // self.ratio, 1) // found["rows_per_page"]) for n in lengths]
        found["entry_pages"] = self._tables(columns, rng.choice((0, 0, 0, 0.15)))
        if shape.snapshot:
            pages = self._tables([n // shape.snapshot for n in lengths], 0.0)
            found["snapshot_pages"] = tuple(tuple(page - shape.nobodys for page in row) for row in pages)
            ends = [(b, k) for b, n in enumerate(lengths) for k in range(n // shape.snapshot) if (k + 1) * shape.snapshot < n]
            found["hit"] = rng.choice(ends) if ends else None
        if self.window:
            columns = [self.ring_pages or -(-n // shape.page_size) for n in lengths]
            found["pages"], found["joined"] = sum(columns) + rng.randint(0, 2), rng.random() < 0.4
            kv, score = (self._tables(columns, 0.0, found["pages"]) for _ in range(2))
            found["kv_pages"], found["score_pages"] = self._shared(kv, after), self._shared(score, after)
        return RandomCase(
            seed, index, shape, rng.choice(VALUES), rng.randrange(1 << 31), tuple(lengths), slots=self._slots(after),
            store=shape.fmt is not None and rng.random() < 0.3,
            blocks=self._blocks(found["rows_per_page"], found["gap"]), **found,
        )  # fmt: skip

    def _blocks(self, rows_per_page: int, gap: int) -> bool:
        """Whether the cache is an engine's view of blocks, which takes pages that begin where records may."""
        wanted, shapes = self.rng.random() < 0.4, [shape for shape in (self.shape, self.shape.other) if shape and shape.fmt]
        apart = [(FORMATS[shape.fmt], FORMATS[shape.fmt].page_bytes(shape.spec, rows_per_page) + gap) for shape in shapes]
        return wanted and bool(apart) and all(size % fmt.alignment == 0 for fmt, size in apart)

    def _ring_pages(self) -> int:
        """Pages of each ring: for the rows that the next step needs alone, or so that short steps can be taken back."""
        shape, least = self.shape, self.shape.spec.window_rows - 1
        rows = least + self.rng.choice((0, shape.bound, 2 * shape.bound))
        return max(1, -(-rows // shape.page_size) + self.rng.choice((0, 0, 1)))

    def _lengths(self) -> list[int]:
        """One sequence has a window at least; the others are as they come."""
        rng = self.rng
        room = min(self.budget.tokens, max(self.budget.elements // self.channels, self.ratio + 1))
        lengths = []
        for b in range(rng.choice((1, 1, 2, 2, 3, 4))):
            least = self.ratio if b == 0 else 1
            if room < least:
                break
            windows = rng.choice((1, 2, 3, 5)) if self.ratio > 8 else rng.randint(2, 12)
            length = rng.randint(least, max(least, min(room, windows * self.ratio + rng.randint(0, self.ratio))))
            lengths.append(length)
            room -= length
        rng.shuffle(lengths)
        return lengths

    def _steps(self, lengths: list[int], after: list[int], freed: bool) -> tuple[Step, ...]:
        rng, at, steps = self.rng, [0] * len(lengths), []
        mood = rng.choice(("mixed", "mixed", "mixed", "decode", "drafts"))
        junk = [rng.randint(1, min(n, 2 * self.ratio, 64)) if rng.random() < 0.3 else 0 for n in lengths]
        owned = tuple((b, 0, n, 0) for b, n in enumerate(junk) if n and after[b] == -1)  # before, by one whose tokens are NaN
        steps += [self._step(owned)] if owned else []
        while at != lengths:
            ready = [b for b, n in enumerate(lengths) if at[b] < n and (after[b] == -1 or at[after[b]] == lengths[after[b]])]
            chosen = [b for b in ready if rng.random() < 0.7] or ready[:1]
            parts = []
            for b in rng.sample(chosen, len(chosen)):
                if (
                    not (self.fold or freed or self.ring_pages) and rng.random() < 0.1
                ):  # raw rows stay until they are overwritten
                    at[b] = rng.randint(0, at[b])
                new = self._new(at[b], lengths[b] - at[b], len(steps), mood)
                kept = new if mood == "decode" else self._kept(at[b], new, len(steps))
                parts.append((b, at[b], new, kept))
                at[b] += kept
            waiting = [b for b, n in enumerate(lengths) if b not in chosen and at[b] < n]
            parts += [(b, at[b], 0, 0) for b in waiting if rng.random() < 0.2 and b in ready]
            steps.append(self._step(tuple(parts)))
        return tuple(steps)

    def _new(self, at: int, left: int, done: int, mood: str) -> int:
        """Tokens of a sequence's part of a step. A history that decodes or drafts has a prompt that leaves so many steps."""
        if done >= self.most_steps:
            return left
        rng, ratio = self.rng, self.ratio
        if mood != "mixed":
            new = 1 if mood == "decode" else self.shape.bound
            return min(new, left) if at else max(1, left - new * rng.randint(0, self.most_steps))
        to_end = ratio - at % ratio
        some = (1, rng.randint(1, 8), rng.randint(1, 8), rng.randint(1, left), to_end, to_end + 1, max(to_end - 1, 1), left)
        return min(rng.choice(some if at else (*some, left, rng.randint(1, left))), left)

    def _kept(self, at: int, new: int, done: int) -> int:
        """How many of them stay: any in a step that a `FoldState` can be rewound in, else its start or its last ones.

        Of the last ones those of the last window, where a compressor of the case keeps input rows.
        """
        rng, most = self.rng, self.shape.max_new_tokens
        if self.ring_pages and new + self.shape.spec.window_rows - 1 > self.ring_pages * self.shape.page_size:
            return new
        if done >= self.most_steps or rng.random() < 0.55:
            return new
        if not self.fold or new <= most:
            return rng.randint(0, new)
        if self.rows:
            most = min(most, (at + new - 1) % self.ratio + 1)
        return rng.choice((0, rng.randint(new - most, new)))

    def _step(self, parts: tuple[tuple[int, int, int, int], ...]) -> Step:
        rng = self.rng
        # Over raw rows a sequence without pages has entries that nobody takes, which only its cache table can say.
        some = rng.choice((0, 0, 1, 2))
        absent = tuple(rng.randint(0, 3) if self.fold else 0 for _ in range(some))
        most = max(1, *(new for _, _, new, _ in parts), *absent)
        bound = self.shape.bound if most <= self.shape.bound else LONG
        room = (len(parts) + some) * -(-bound // self.ratio) * self.shape.spec.head_dim
        return Step(bound, parts, absent, rng.choice((0, 0, 3)), rng.random() < 0.2 and room <= 1 << 20)

    def _tables(self, columns: list[int], missing: float, pages: int = 0) -> Pages:
        """Shuffled pages for each sequence, of which some are -1; of so many `pages` as they need, or more."""
        first = self.shape.nobodys
        found = iter(first + page for page in self.rng.sample(range(max(pages, sum(columns))), sum(columns)))
        return tuple(tuple(-1 if self.rng.random() < missing else next(found) for _ in range(n)) for n in columns)

    def _shared(self, tables: Pages, after: list[int]) -> Pages:
        """A sequence that begins after another takes its pages as far as they go."""
        found = list(tables)
        for b, owner in enumerate(after):
            if owner >= 0:
                found[b] = (*found[owner], *found[b])[: len(found[b])]
        return tuple(found)

    def _slots(self, after: list[int]) -> tuple[int, ...]:
        first = self.shape.nobodys
        free = iter(first + slot for slot in self.rng.sample(range(len(after) + 1), len(after)))
        found: list[int] = []
        for owner in after:
            found.append(next(free) if owner < 0 else found[owner])
        return tuple(found)
