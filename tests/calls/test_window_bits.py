"""Over paged raw state too, the bits of an entry depend on no cut of its sequence, no batch, order, table or page size."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import SPECS, Backend, Engine, Weights, bits, make_tokens
from support.window_support import WindowEngine, cut, run
from torch import Tensor

import kvfold
from kvfold import CompressorSpec
from kvfold.backend_triton import table as configs
from kvfold.backend_triton.table import CONFIGS, MULTIPROCESSORS

NARROW = CompressorSpec(head_dim=128, ratio=128)
SIXTEEN = CompressorSpec(head_dim=128, ratio=16)
CASES = [
    pytest.param(SPECS["indexer"], torch.float32, torch.float32, id="4-overlap"),
    pytest.param(SPECS["indexer"], torch.float32, torch.bfloat16, id="4-overlap-bf16state"),
    pytest.param(CompressorSpec(head_dim=256, ratio=4), torch.bfloat16, torch.bfloat16, id="4-bf16-bf16state"),
    pytest.param(SIXTEEN, torch.float32, torch.bfloat16, id="16-bf16state"),
    pytest.param(NARROW, torch.bfloat16, torch.float32, id="128-bf16"),
]
cases = pytest.mark.parametrize("spec, dtype, state_dtype", CASES)


class Whole:
    """One sequence after a single prefill: its pooled rows and records, which every other way must give to the bit."""

    def __init__(
        self, spec: CompressorSpec, backend: Backend, tokens: Tensor, state_dtype: torch.dtype, fmt: str = "fp32"
    ) -> None:
        self.spec, self.tokens, self.length = spec, tokens, len(tokens)
        self.weights = Weights.make(spec)
        self.windows = len(tokens) // spec.ratio
        self.options = {"backend": backend, "state_dtype": state_dtype, "fmt": fmt, "weights": self.weights}
        engine = self.engine(num_sequences=1, page_size=32)
        self.pooled = run(engine, 0, tokens, [len(tokens)])
        self.records = engine.records(0, self.windows)

    def engine(self, num_sequences: int, page_size: int, **options) -> WindowEngine:
        return WindowEngine(
            self.spec, num_sequences=num_sequences, length=self.length + 300, page_size=page_size, **self.options, **options
        )

    def check(self, engine: Engine, sequence: int, first: int, end: int, what: object = "") -> None:
        """Windows first..end of a sequence have the records of the one prefill."""
        differing = (engine.records(sequence, end)[first:] != self.records[first:end]).any(dim=1).nonzero().flatten()
        assert not len(differing), f"{what}: entries {(differing + first).tolist()} differ"

    def check_pooled(self, pooled: dict[int, Tensor], what: object = "") -> None:
        for window, row in pooled.items():
            assert torch.equal(bits(row), bits(self.pooled[window])), f"{what}: pooled row of window {window} differs"


def phases(spec: CompressorSpec, n: int) -> list[int]:
    """Starts so that steps of up to n tokens fall everywhere round the end of window 1."""
    return list(range(max(spec.ratio, 2 * spec.ratio - n), 2 * spec.ratio + 1))


@cases
def test_every_cut(backend: Backend, spec: CompressorSpec, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """Two chunks, cut anywhere; for ratio 128 near the ends of windows."""
    whole = Whole(spec, backend, make_tokens(spec, 3 * spec.ratio + 2, seed=50, dtype=dtype), state_dtype)
    cuts = [x for x in range(1, whole.length) if spec.ratio < 128 or x % 128 in (0, 1, 127)]
    if backend.slow:
        cuts = cuts[:: 1 if spec.ratio < 8 else 6 if spec.ratio < 128 else 3]
    engine = whole.engine(num_sequences=len(cuts), page_size=5)
    for begin, end in ((0, 1), (1, 2)):
        batch = []
        for i, x in enumerate(cuts):
            ends = (0, x, whole.length)
            batch.append((i, ends[begin], whole.tokens[ends[begin] : ends[end]]))
        step = engine.step(batch)
        for i, x in enumerate(cuts):
            whole.check_pooled({window: row for (b, window), row in step.pooled.items() if b == i}, f"cut at {x}")
    for i, x in enumerate(cuts):
        whole.check(engine, i, 0, whole.windows, f"cut at {x}")


@cases
def test_random_chunks(backend: Backend, spec: CompressorSpec, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """Sequences that go on in steps of their own, some sitting out, in any order, with pages taken back behind them."""
    whole = Whole(spec, backend, make_tokens(spec, 3 * spec.ratio + 3, seed=51, dtype=dtype), state_dtype)
    rng, ways = random.Random(7), 3 if backend.slow else 6
    engine, at = whole.engine(num_sequences=ways, page_size=3), [0] * ways
    while min(at) < whole.length:
        sizes = [min(rng.choice((1, 2, 3, 7, spec.ratio, rng.randint(1, 2 * spec.ratio))), whole.length - p) for p in at]
        sizes = [size * rng.randint(0, 1) for size in sizes]
        order = rng.sample(range(ways), ways)
        for i in range(ways):  # all that a later step reads begins one window before the one it is in
            engine.retire(i, max(at[i] // spec.ratio - 1, 0) * spec.ratio)
        engine.step([(i, at[i], whole.tokens[at[i] : at[i] + sizes[i]]) for i in order], padding=rng.randint(0, 2))
        at = [p + size for p, size in zip(at, sizes, strict=True)]
    for i in range(ways):
        whole.check(engine, i, 0, whole.windows)


@pytest.mark.parametrize("page_size", [3, 128])
@cases
def test_every_accepted_count(
    backend: Backend, spec: CompressorSpec, dtype: torch.dtype, state_dtype: torch.dtype, page_size: int
) -> None:
    """Steps of n tokens of which k are accepted, for every k <= n <= 8, from the phases near a window's end."""
    if backend.slow and page_size == 3:
        pytest.skip("the interpreter does one page size")
    end = 2 * spec.ratio + 4
    whole = Whole(spec, backend, make_tokens(spec, end, seed=52, dtype=dtype), state_dtype)
    wrong = make_tokens(spec, end + 8, seed=53, dtype=dtype)
    ways = [(start, n, k) for n in range(1, 9) for k in range(n + 1) for start in phases(spec, 5)]
    ways = ways[:: 21 if backend.slow else 2]
    engine = whole.engine(num_sequences=len(ways), page_size=page_size)
    for i, (start, _, _) in enumerate(ways):  # what the step can need, and no page for anything before it
        engine.put(i, whole.tokens[:start])
        engine.retire(i, max(start // spec.ratio - spec.overlap, 0) * spec.ratio)
    at, rejected = [start for start, _, _ in ways], [False] * len(ways)
    while min(at) < end:
        batch, after = [], list(at)
        for i, (_, n, k) in enumerate(ways):
            if at[i] >= end:
                continue
            accepted = k
            if k == 0:  # a step that accepts nothing, then one that accepts all, and so on
                accepted = n if rejected[i] else 0
                rejected[i] = not rejected[i]
            accepted = min(accepted, end - at[i])
            batch.append((i, at[i], torch.cat([whole.tokens[at[i] : at[i] + accepted], wrong[at[i] + accepted : at[i] + n]])))
            after[i] += accepted
        engine.step(batch)
        at = after
    for i, way in enumerate(ways):
        whole.check(engine, i, way[0] // spec.ratio, whole.windows, way)


@pytest.mark.parametrize("page_size", [1, 3, 4, 7, 8, 32, 48, 128, 256])
@pytest.mark.parametrize("spec", [SPECS["indexer"], SIXTEEN, NARROW], ids=["4-overlap", "16", "128"])
def test_any_page_size_batch_and_order(backend: Backend, spec: CompressorSpec, page_size: int) -> None:
    """A prefill, chunks and decodes: each alone, then together in another order, among absent ones, with other tables."""
    if backend.slow and page_size in (3, 8, 32) + (4, 7, 256) * (spec.ratio == 128):
        pytest.skip("the interpreter does smaller and larger ones, those that divide the window and those that do not")
    whole = Whole(spec, backend, make_tokens(spec, 2 * spec.ratio + 3, seed=54), torch.float32)
    starts = [0, 1, spec.ratio - 1, spec.ratio, spec.ratio + 2, 2 * spec.ratio - 1]
    if backend.slow and spec.ratio == 128:
        starts = starts[2:5:2]
    order = random.Random(page_size).sample(range(len(starts)), len(starts))
    for batches, seed in (([[i] for i in range(len(starts))], 0), ([order], 1)):
        engine = whole.engine(num_sequences=len(starts) + 1, page_size=page_size, seed=seed, one_pool=seed == 1)
        for batch in batches:
            for i in batch:
                engine.put(i, whole.tokens[: starts[i]])
            steps = [(i, starts[i], whole.tokens[starts[i] :]) for i in batch]
            if seed == 1:
                steps[1:1] = [(len(starts), 7, whole.tokens[:0])]
            step = engine.step(steps, padding=seed)
            for (b, window), row in step.pooled.items():
                whole.check_pooled({window: row}, f"start {steps[b][1]}, batch of {len(batch)}")
        for i, start in enumerate(starts):
            whole.check(engine, i, start // spec.ratio, whole.windows, f"start {start}")


ROWS = {
    "fewer rows in flight": {"tile": 16},
    "narrow slices": {"slice": 16, "num_warps": 2},
    "whole rows": {"slice": 0, "num_warps": 8},
    "one program": {"programs": 1 / MULTIPROCESSORS, "slice": 32},
}


@pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS)
def test_any_row_of_the_table(backend: Backend, changes: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """However programs share the work, whether they also write what they pool, and however long a step may be."""
    if backend.name == "torch":
        pytest.skip("the torch backend has no table")
    ratio = 32 if backend.slow else 128
    spec = CompressorSpec(head_dim=64, ratio=ratio, rope_dim=32)
    length = 3 * ratio + 5
    tokens = make_tokens(spec, length, seed=55, dtype=torch.bfloat16)
    whole = Whole(spec, backend, tokens, torch.bfloat16)
    for prompt in (False, True):
        rows = tuple(replace(c, **changes, prompt=prompt) if c.kind == "window" else c for c in CONFIGS)
        monkeypatch.setattr(configs, "CONFIGS", rows)
        engine = whole.engine(num_sequences=3, page_size=ratio)
        # A prompt; one that starts inside a window, and one at the start of it, go on; and both end a window in a short step.
        for batch in (
            [(0, 0, length)],
            [(1, 0, ratio - 4), (2, 0, ratio)],
            [(2, ratio, ratio + 3), (1, ratio - 4, ratio)],
            [(1, 2 * ratio - 4, 7), (2, 2 * ratio + 3, ratio + 2)],
        ):
            step = engine.step([(i, start, tokens[start : start + n]) for i, start, n in batch])
            for (b, window), row in step.pooled.items():
                whole.check_pooled({window: row}, f"prompt={prompt}, {batch[b]}")
        for sequence, windows in ((0, 3), (1, 2), (2, 3)):
            whole.check(engine, sequence, 0, windows)


@pytest.mark.parametrize("page_size", [48, 128])
@cases
def test_rows_of_odd_strides_and_addresses(
    backend: Backend, spec: CompressorSpec, dtype: torch.dtype, state_dtype: torch.dtype, page_size: int
) -> None:
    """kv_score as a slice of a wider tensor, from an odd column on, in a prompt and in decoding: the same bits."""
    if backend.slow and page_size == 48:
        pytest.skip("the interpreter does one page size")
    whole = Whole(spec, backend, make_tokens(spec, 2 * spec.ratio + 2, seed=56, dtype=dtype), state_dtype)
    engine = whole.engine(num_sequences=2, page_size=page_size)
    compress = engine.compress

    def odd(kv_score: Tensor, *args: object, **options: object) -> None:
        rows, width = kv_score.shape
        wide = torch.full((rows, width + 3), torch.nan, dtype=kv_score.dtype, device=kv_score.device)
        wide[:, 1 : width + 1] = kv_score
        compress(wide[:, 1 : width + 1], *args, **options)

    engine.compress = odd  # type: ignore[method-assign]
    for sequence, steps in ((0, [whole.length]), (1, [2 * spec.ratio - 1, 1, 2])):
        whole.check_pooled(run(engine, sequence, whole.tokens, steps))
        whole.check(engine, sequence, 0, whole.windows)


# (batch, ratio, head_dim, new tokens per step), as the public tests of this operation have them
PUBLIC = [
    (1, 4, 128, 4),
    (1, 4, 512, 3),
    (1, 4, 512, 8),
    (1, 4, 128, 16),
    (2, 128, 128, 4),
    *[(1, 128, 512, n) for n in range(2, 9)],
    *[(1, 128, 128, n) for n in (16, 128, 129, 257)],
]


class Decode:
    """Four windows of a batch of sequences in steps of n tokens: all pooled rows and records.

    The interpreter, which takes milliseconds for each program, does two windows of 128, and short steps only round their ends.
    """

    def __init__(self, backend: Backend, batch: int, ratio: int, head_dim: int, n: int) -> None:
        spec = CompressorSpec(head_dim=head_dim, ratio=ratio, overlap=ratio == 4)
        self.windows = 2 if backend.slow and ratio == 128 else 4
        length = self.windows * ratio
        texts = [make_tokens(spec, length, seed=60 + b, dtype=torch.bfloat16) for b in range(batch)]
        engine = WindowEngine(
            spec, backend, num_sequences=batch, length=length, page_size=48, fmt="fp8_ds_mla" if head_dim == 512 else "fp32"
        )
        self.pooled: dict[tuple[int, int], Tensor] = {}  # of a sequence and a window
        at, steps = 0, cut(length, n)
        if backend.slow and ratio == 128 and n < 16:
            steps = [120, *cut(16, n), 112, *cut(8, n)]
        for size in steps:
            self.pooled.update(engine.step([(b, at, text[at : at + size]) for b, text in enumerate(texts)]).pooled)
            at += size
        assert at == length
        self.records = [engine.records(b, self.windows) for b in range(batch)]


SINGLE: dict[tuple, Decode] = {}  # one token at a time, which several cases compare with


@pytest.mark.parametrize("batch, ratio, head_dim, next_n", PUBLIC)
def test_the_public_cases(backend: Backend, batch: int, ratio: int, head_dim: int, next_n: int) -> None:
    """In steps of next_n tokens, and one token at a time: the same bits."""
    if backend.slow and ratio == 128 and (batch == 2 or next_n in (3, 4, 5, 6, 7)):
        pytest.skip("the interpreter does some of these")
    case = (backend, batch, ratio, head_dim)
    single = SINGLE[case] = SINGLE.get(case) or Decode(*case, 1)
    several = Decode(*case, next_n)
    assert len(single.pooled) == len(several.pooled) == batch * single.windows
    for owner, row in single.pooled.items():
        assert torch.equal(bits(several.pooled[owner]), bits(row)), f"sequence and window {owner}"
    for ours, theirs in zip(several.records, single.records, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("page_size", [2, 4, 128])
@pytest.mark.parametrize("spec", [SPECS["indexer"], SIXTEEN], ids=["4-overlap", "16"])
def test_reuse_of_a_prefix_inside_a_window(backend: Backend, spec: CompressorSpec, page_size: int) -> None:
    """A second sequence shares the pages of the first up to a position and goes on with other tokens; the first goes on too."""
    first = Whole(spec, backend, make_tokens(spec, 3 * spec.ratio, seed=55), torch.float32)
    length = 3 * spec.ratio
    for position in range(spec.ratio, 2 * spec.ratio + 1, 1 if spec.ratio == 4 else 5):
        other = torch.cat([first.tokens[:position], make_tokens(spec, length - position, seed=56)])
        second = Whole(spec, backend, other, torch.float32)
        engine, at = first.engine(num_sequences=2, page_size=page_size), [position + 1, position]
        engine.step([(0, 0, first.tokens[: at[0]])])
        engine.share(0, 1, position)
        for n in (1, length):  # both in one batch
            engine.step([(i, at[i], (first.tokens, other)[i][at[i] : at[i] + n]) for i in (0, 1)])
            at = [at[0] + n, at[1] + n]
        first.check(engine, 0, 0, 3, f"the first, shared up to {position}")
        second.check(engine, 1, position // spec.ratio, 3, f"the second, from {position}")


@pytest.mark.parametrize("spec", [SPECS["indexer"], SIXTEEN], ids=["4-overlap", "16"])
def test_pages_on_one_scratch_page(backend: Backend, spec: CompressorSpec) -> None:
    """A prompt whose early pages all are one scratch page, shared by two sequences: its entries are made of live rows."""
    whole = Whole(spec, backend, make_tokens(spec, 4 * spec.ratio + 1, seed=57), torch.float32)
    engine = whole.engine(num_sequences=2, page_size=spec.ratio)
    engine.scratch = [engine.free[0].pop()]
    engine.free[1].remove(engine.scratch[0])
    for i in range(2):
        engine.give(i, whole.length)
        for table in engine.tables:
            table[i, :2] = engine.scratch[0]
    engine.step([(i, 0, whole.tokens[: whole.length - 3]) for i in range(2)])
    engine.step([(i, whole.length - 3, whole.tokens[whole.length - 3 :]) for i in range(2)])
    for i in range(2):
        whole.check(engine, i, 0, whole.windows)


@pytest.mark.parametrize("spec", [SPECS["indexer"], NARROW], ids=["4-overlap", "128"])
def test_the_row_strides_are_free(backend: Backend, spec: CompressorSpec) -> None:
    """kv_score as a column slice of a wider projection, and a step that is repeated: the same bits, aligned or not."""
    whole = Whole(spec, backend, make_tokens(spec, spec.ratio + 3, seed=58), torch.float32)
    engine = whole.engine(num_sequences=1, page_size=8)
    plan = engine.step([(0, 0, whole.tokens)]).plan
    before = engine.snapshot()

    def pooled(left: int, right: int) -> Tensor:
        wide = torch.full((whole.length, left + 2 * spec.channels + right), torch.nan, device=backend.device)
        inner = wide[:, left : left + 2 * spec.channels]
        inner.copy_(whole.tokens)
        rows = torch.full((1, spec.head_dim), torch.nan, device=backend.device)
        engine.cache.storage.fill_(0)
        engine.compress(inner, plan, rows=rows)
        for was, now in zip(before[:2], engine.snapshot()[:2], strict=True):
            assert torch.equal(was, now)
        return rows.cpu()

    for left, right in ((0, 16), (8, 16), (1, 2), (16, 0), (32, 48), (16, 8), (3, 0))[: 3 if backend.slow else 7]:
        whole.check_pooled({0: pooled(left, right)[0]})
        whole.check(engine, 0, 0, 1)


@pytest.mark.parametrize("spec", [SPECS["indexer"], SIXTEEN], ids=["4-overlap", "16"])
def test_one_plan_for_many_steps(backend: Backend, spec: CompressorSpec) -> None:
    """The plan is updated in place, and so are the tables and slots that it was built from, as a CUDA graph would do it."""
    whole = Whole(spec, backend, make_tokens(spec, 3 * spec.ratio, seed=59), torch.float32)
    device, n = backend.device, 3
    engine = whole.engine(num_sequences=3, page_size=4)  # sequence 0 starts later, 2 is padding
    tables = [torch.full_like(table, -99).to(device) for table in engine.tables]
    slots = torch.full((2,), -1, dtype=torch.int64, device=device)
    nothing = torch.zeros(3, dtype=torch.int32, device=device)
    plan = kvfold.StepPlan.build(
        spec.ratio, nothing, torch.zeros(4, dtype=torch.int32, device=device), n,
        block_tables=(tables[0], tables[1]), page_size=4, entry_slots=slots,
    )  # fmt: skip
    at = [-spec.ratio, 0]
    while min(at) < whole.length:
        starts = [max(x, 0) for x in at]
        new = [whole.tokens[start : max(0, x + n)] for start, x in zip(starts, at, strict=True)]
        ends = [start + len(tokens) for start, tokens in zip(starts, new, strict=True)]
        targets = [engine.cache_slot(i, w) for i in (0, 1) for w in range(starts[i] // spec.ratio, ends[i] // spec.ratio)]
        for i in (0, 1):
            engine.give(i, ends[i])
            for mine, table in zip(tables, engine.tables, strict=True):
                mine[i] = table[i].to(device)
        slots.copy_(torch.tensor([*targets, -1, -1][:2]))
        cu_seqlens = torch.tensor([0, len(new[0]), len(new[0]) + len(new[1]), len(new[0]) + len(new[1])]).int()
        plan.update(torch.tensor([*starts, 5], dtype=torch.int32, device=device), cu_seqlens.to(device))
        engine.compress(torch.cat([*new, torch.full((1, 2 * spec.channels), torch.nan)]).to(device), plan)
        at = [x + n for x in at]
    assert int(plan.errors) == 0
    for i in (0, 1):
        whole.check(engine, i, 0, whole.windows)


def test_pools_of_more_than_two_to_the_31_elements(backend: Backend, tmp_path: Path) -> None:
    """The last pages of pools of 4.3 GB each, on the CPU as files with holes."""
    spec, page_size = SPECS["indexer"], 256
    pages = (1 << 31) // (page_size * spec.channels) + 3

    def pool(name: str) -> Tensor:
        size = pages * page_size * spec.channels
        if backend.device.type == "cuda":
            flat = torch.empty(size, dtype=torch.bfloat16, device=backend.device)
        else:
            flat = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=torch.bfloat16)
        return flat.view(pages, page_size, spec.channels)

    whole = Whole(spec, backend, make_tokens(spec, 4 * spec.ratio, seed=49), torch.bfloat16)
    engine, at = whole.engine(num_sequences=1, page_size=page_size), 0
    engine.state = kvfold.WindowState(pool("kv"), pool("score"))
    tables = [torch.tensor([[page]], dtype=torch.int32, device=backend.device) for page in (pages - 1, pages - 2)]
    for n in (6, 1, 9):
        ints = {"dtype": torch.int32, "device": backend.device}
        plan = kvfold.StepPlan.build(
            spec.ratio, torch.tensor([at], **ints), torch.tensor([0, n], **ints), n,
            block_tables=(tables[0], tables[1]), page_size=page_size,
            entry_slots=torch.arange(at // spec.ratio, (at + n) // spec.ratio, device=backend.device),
        )  # fmt: skip
        engine.compress(whole.tokens[at : at + n].to(backend.device), plan)
        at += n
        assert int(plan.errors) == 0
    whole.check(engine, 0, 0, whole.windows)
    for rows, want in zip(
        (engine.state.kv[-1], engine.state.score[-2]), engine.stored(whole.tokens, torch.arange(at)), strict=True
    ):
        assert torch.equal(bits(rows[:at].cpu()), bits(want))
