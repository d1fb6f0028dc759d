"""The promise of the library: however a sequence is cut, its entries and its state have the same bits.

Each test runs one prefill of a sequence, and the same sequence cut in some way; the cut runs share one batch, so that they
also differ in slot, neighbours and place in kv_score. Compared are the record bytes of every entry and every state row held.
"""

from __future__ import annotations

import random
from functools import lru_cache

import pytest
import torch
from support.helpers import SPECS, Backend, Engine, Weights, make_tokens, shape_of
from torch import Tensor

from kvfold import CompressorSpec
from kvfold.backend_torch.fold import exp2

# Both formats of a 512-wide entry, and both input dtypes: bf16 rows are exact in an fp32 state, and in a bf16 one.
CASES = [
    pytest.param("hca", "fp32", torch.float32, torch.float32, id="hca-fp32"),
    pytest.param("hca", "fp8_ds_mla", torch.bfloat16, torch.float32, id="hca-fp8-bf16in"),
    pytest.param("csa", "fp32", torch.float32, torch.float32, id="csa-fp32"),
    pytest.param("csa", "fp8_ds_mla", torch.bfloat16, torch.bfloat16, id="csa-fp8-bf16in-bf16state"),
    pytest.param("indexer", "fp32", torch.float32, torch.float32, id="indexer-fp32"),
    pytest.param("indexer", "bf16", torch.bfloat16, torch.float32, id="indexer-bf16-bf16in"),
]
cases = pytest.mark.parametrize("name, fmt, dtype, state_dtype", CASES)


class Runs:
    """One sequence after a single prefill, against the same sequence cut in many ways in the slots of another engine."""

    def __init__(
        self, backend: Backend, spec: CompressorSpec, fmt: str, dtype: torch.dtype, state_dtype: torch.dtype, length: int
    ) -> None:
        self.spec = spec
        if backend.slow and self.spec.ratio > 8 and fmt != "fp32":
            pytest.skip("the interpreter does this in fp32: what is stored of an entry has no part in how it is cut")
        self.backend, self.fmt, self.state_dtype = backend, fmt, state_dtype
        self.weights = Weights.make(self.spec)
        self.tokens = make_tokens(self.spec, length, seed=17, dtype=dtype)
        self.length = length
        whole = self.engine(num_slots=1, max_new_tokens=length)  # a ring that holds every position
        whole.step([(0, 0, self.tokens)])
        self.records = whole.records(0, length // self.spec.ratio)
        self.rows = whole.held(0, length)
        assert set(self.rows) == set().union(*(self.kept(whole, x) for x in range(length)))

    @staticmethod
    def kept(engine: Engine, position: int) -> set:
        """The state rows of a position: nobody reads the fold row, or the hi or whole row, of a window's last position."""
        own = {position} if engine.state.kind == "fold" else {("hi", position)}
        own = own if (position + 1) % engine.spec.ratio else set()
        return own | ({("lo", position)} if engine.spec.overlap else set())

    def engine(self, num_slots: int, max_new_tokens: int = 8) -> Engine:
        return Engine(
            self.spec,
            self.backend,
            num_slots=num_slots,
            max_new_tokens=max_new_tokens,
            fmt=self.fmt,
            state_dtype=self.state_dtype,
            weights=self.weights,
        )

    def check(self, engine: Engine, slot: int, end: int) -> None:
        """Slot `slot`, now at `end` tokens, has the bits of the one prefill, and can go on."""
        windows = end // self.spec.ratio
        differing = (engine.records(slot, windows) != self.records[:windows]).any(dim=1).nonzero().flatten().tolist()
        assert not differing, f"slot {slot} at {end}: entries {differing} differ"
        held = engine.held(slot, end)
        assert engine.needed(end) <= set(held), f"slot {slot} at {end}: cannot go on"
        assert self.kept(engine, end - 1) <= set(held)
        for position, row in held.items():
            assert torch.equal(row, self.rows[position]), f"slot {slot} at {end}: row of position {position} differs"


@lru_cache(maxsize=8)
def runs_of(
    backend: Backend, spec: CompressorSpec, fmt: str, dtype: torch.dtype, state_dtype: torch.dtype, length: int
) -> Runs:
    """Made once for tests of the same prefill, which change nothing of it."""
    return Runs(backend, spec, fmt, dtype, state_dtype, length)


def length_for(spec: CompressorSpec) -> int:
    """So that every cut up to 3R + 2 leaves something to do, and for small ratios another entry."""
    return 3 * spec.ratio + 3 if spec.ratio > 8 else 4 * spec.ratio + 1


@cases
@pytest.mark.parametrize("window", range(4))
def test_every_cut_point(
    backend: Backend, name: str, fmt: str, dtype: torch.dtype, state_dtype: torch.dtype, window: int
) -> None:
    """All cuts of this window's tokens, up to 3R + 2, in one batch: a call for what is before the cut, one for the rest."""
    ratio = SPECS[name].ratio
    runs = runs_of(backend, SPECS[name], fmt, dtype, state_dtype, length_for(SPECS[name]))
    begin, length = window * ratio, runs.length
    cuts = [c for c in range(begin, begin + ratio) if 1 <= c <= 3 * ratio + 2]
    if ratio > 8 and fmt != "fp32":  # all of them are run in fp32; here those round the window's ends
        cuts = [c for c in cuts if c % ratio in (0, 1, 2, ratio - 1)]
    elif backend.slow and ratio > 8:  # round the window's ends, and all phases of 8 tokens, each in one of three windows
        cuts = [c for c in cuts if c % ratio in (0, 1, 2, ratio - 1) or (c % ratio % 17 == 4 and c % 3 == window % 3)]
    engine, first = runs.engine(num_slots=len(cuts) + 1), 0
    if backend.slow and ratio > 8:
        # A token takes the interpreter milliseconds: begin with copies of one sequence that has reached the window, and
        # end soon after it.
        first, length = begin, min(length, begin + ratio + 2)
        engine.step([(len(cuts), 0, runs.tokens[:begin])])
        for i in range(len(cuts)):
            engine.copy_slot(len(cuts), i)
    engine.step([(i, first, runs.tokens[first:cut]) for i, cut in enumerate(cuts)])
    for i, cut in enumerate(cuts):
        if cut > first:
            runs.check(engine, i, cut)
    engine.step([(i, cut, runs.tokens[cut:length]) for i, cut in enumerate(cuts)])
    for i in range(len(cuts)):
        runs.check(engine, i, length)


@cases
def test_random_chunks(backend: Backend, name: str, fmt: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    spec = SPECS[name]
    runs = runs_of(backend, spec, fmt, dtype, state_dtype, length_for(spec))
    rng, ways = random.Random(5), 3 if backend.slow and spec.ratio > 8 else 6
    engine, at = runs.engine(num_slots=ways), [0] * ways
    while min(at) < runs.length:
        sizes = [min(rng.choice((1, 2, 3, 7, spec.ratio, rng.randint(1, 2 * spec.ratio))), runs.length - p) for p in at]
        sizes = [size * rng.randint(0, 1) for size in sizes]  # now and then a sequence sits out
        order = rng.sample(range(ways), ways)
        engine.step([(i, at[i], runs.tokens[at[i] : at[i] + sizes[i]]) for i in order])
        at = [p + size for p, size in zip(at, sizes, strict=True)]
        for i in range(ways):
            if at[i]:
                runs.check(engine, i, at[i])


@cases
def test_decode_of_one_to_eight_tokens(
    backend: Backend, name: str, fmt: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    spec = SPECS[name]
    runs = Runs(backend, spec, fmt, dtype, state_dtype, min(length_for(spec), spec.ratio + 12))
    engine = runs.engine(num_slots=9)
    # The interpreter, which takes milliseconds for a token, prefills up to near the end of a long window.
    first = spec.ratio - 12 if backend.slow and spec.ratio > 8 else 0
    engine.step([(8, 0, runs.tokens[:first])])
    for slot in range(8):
        engine.copy_slot(8, slot)
    for start in range(first, runs.length):
        # Slot n - 1 decodes n tokens at a time; those whose turn it is not are absent from the step.
        batch = [(n - 1, start, runs.tokens[start : start + n]) for n in range(1, 9) if (start - first) % n == 0]
        engine.step(batch[::-1])
        for slot, _, new in batch:
            runs.check(engine, slot, start + len(new))


@cases
def test_every_accepted_count(backend: Backend, name: str, fmt: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """Steps of n tokens of which k are accepted, for every k <= n <= 8 and from every phase near a window's end."""
    spec = SPECS[name]
    first = 0 if spec.ratio <= 8 else spec.ratio - 9  # for ratio 128, decode starts shortly before a window's end
    runs = Runs(backend, spec, fmt, dtype, state_dtype, first + (10 if backend.slow else 14))
    wrong = make_tokens(spec, runs.length + 8, seed=18, dtype=dtype)
    wanted = [(n, k) for n in range(1, 9) for k in range(n + 1)]
    phases = range(4) if spec.ratio <= 8 else range(0, 8, 2)
    # Prefill once for each phase, and copy the sequence to the slots that go on from there.
    ways = [(first + phase, n, k) for phase in phases for n, k in wanted]
    if backend.slow:  # every second (n, k), or every fourth, from one phase; the torch backend does all from all phases
        ways = [way for i, way in enumerate(ways) if (i % len(wanted)) % 4 == i // len(wanted)]
        ways = ways[:: 2 if fmt == "fp32" else 4]
    engine = runs.engine(num_slots=len(ways) + 1)
    at = []
    for slot, (start, _, _) in enumerate(ways):
        if slot == 0 or start != ways[slot - 1][0]:
            engine.step([(len(ways), 0, runs.tokens[:start])])
        engine.copy_slot(len(ways), slot)
        at.append(start)

    rejected_all = [False] * len(ways)
    while min(at) < runs.length:
        batch: list[tuple[int, int, Tensor]] = []
        for slot, (_, n, k) in enumerate(ways):
            if at[slot] >= runs.length:
                continue
            start, accepted = at[slot], k
            if k == 0:  # a step that accepts nothing, then one that accepts all, and so on
                accepted = n if rejected_all[slot] else 0
                rejected_all[slot] = not rejected_all[slot]
            accepted = min(accepted, runs.length - start)
            drafts = torch.cat([runs.tokens[start : start + accepted], wrong[start + accepted : start + n]])
            batch.append((slot, start, drafts))
            at[slot] += accepted
        engine.step(batch)
        for slot, start, _ in batch:
            if at[slot] > start:
                runs.check(engine, slot, at[slot])


@cases
def test_any_batch_and_any_order(backend: Backend, name: str, fmt: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """A prefill, chunks and decodes of different sequences: alone, together, in another order, among absent ones."""
    spec, rng = shape_of(name, backend), random.Random(6)
    runs = Runs(backend, spec, fmt, dtype, state_dtype, spec.ratio + 5)  # for its engines and weights
    texts = [make_tokens(spec, 2 * spec.ratio + 3, seed=20 + i, dtype=dtype) for i in range(5)]
    starts = [0, 1, spec.ratio - 1, spec.ratio, spec.ratio + 2]
    news = [2 * spec.ratio + 3, spec.ratio + 1, 1, 3, 2]

    def run(batches: list[list[int]], slots: list[int], absent: bool) -> tuple[list[Tensor], list[dict[int, Tensor]]]:
        engine = runs.engine(num_slots=12)
        for batch in batches:
            engine.step([(slots[i], 0, texts[i][: starts[i]]) for i in batch])
            step = [(slots[i], starts[i], texts[i][starts[i] : starts[i] + news[i]]) for i in batch]
            if absent:
                step[1:1] = [(-1, 3, texts[0][:7]), (11, 2, texts[0][:0])]
            engine.step(step)
        ends = [start + new for start, new in zip(starts, news, strict=True)]
        records = [engine.records(slots[i], ends[i] // spec.ratio) for i in range(5)]
        return records, [engine.held(slots[i], ends[i]) for i in range(5)]

    alone = run([[i] for i in range(5)], slots=[0, 1, 2, 3, 4], absent=False)
    shuffled = rng.sample(range(5), 5)
    for batches, slots, absent in (
        ([[0, 1, 2, 3, 4]], [0, 1, 2, 3, 4], False),
        ([shuffled], rng.sample(range(11), 5), True),
        ([shuffled[:2], shuffled[2:]], rng.sample(range(11), 5), False),
    ):
        records, held = run(batches, slots, absent)
        for i in range(5):
            assert torch.equal(records[i], alone[0][i]), f"entries of sequence {i} differ"
            assert held[i].keys() == alone[1][i].keys()
            for position, row in held[i].items():
                assert torch.equal(row, alone[1][i][position]), f"sequence {i}: row of position {position} differs"


@pytest.mark.parametrize("name", SPECS)
def test_a_column_slice_of_a_wider_projection(backend: Backend, name: str) -> None:
    """The row stride of kv_score is free, and changes no bit."""
    spec = shape_of(name, backend)
    runs = Runs(backend, spec, "fp32", torch.float32, torch.float32, spec.ratio + 3)
    engine = runs.engine(num_slots=1)
    engine.step([(0, 0, runs.tokens)])
    plan = engine.step([(0, 0, runs.tokens)]).plan
    engine.state.rows.fill_(torch.nan)
    engine.state.positions.fill_(-1)
    engine.cache.storage.fill_(0)
    wide = torch.full((runs.length, 2 * spec.channels + 24), torch.nan, device=backend.device)
    wide[:, 8 : 8 + 2 * spec.channels] = runs.tokens.to(backend.device)
    engine.compress(wide[:, 8 : 8 + 2 * spec.channels], plan)
    runs.check(engine, 0, runs.length)


@pytest.mark.parametrize("n", [1, 5, 16, 33])
def test_the_weights_of_the_torch_backend_do_not_depend_on_their_neighbours(n: int) -> None:
    """`torch.exp2` on a CPU gives a row of 16 channels alone other bits than among others: it ends in a partial vector."""
    x = -40 * torch.rand(1 << 14, generator=torch.Generator().manual_seed(21))
    whole = exp2(x)
    assert torch.equal(whole, torch.cat([exp2(some) for some in x.split(n)]))
    assert float((whole.double() / torch.exp2(x.double()) - 1).abs().max()) <= 2**-24  # rounded once
    extremes = exp2(torch.tensor([0.0, -1.0, -126.0, -3e38, -torch.inf, torch.nan]))
    assert extremes[:5].tolist() == [1, 0.5, 2**-126, 0, 0] and bool(extremes[5].isnan())
