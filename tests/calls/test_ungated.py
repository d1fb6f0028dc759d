"""A compressor without a gate: a window is a token, whose values are the entry before the norm, and nothing is kept."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from support.helpers import Backend, norm_error
from torch import Tensor

import kvfold
from kvfold import V41_INDEX_K, V41_MAIN_R1, V41_MAIN_R2, CompressorSpec, UnsupportedError, reference

NARROW = CompressorSpec(head_dim=32, ratio=1, rope_dim=8, has_ape=False, norm_eps=1e-20, gate=False)
ROWS_PER_PAGE, PAGES, LENGTH = 4, 6, 20
WEIGHT = 1 + 0.2 * torch.randn(512, generator=torch.Generator().manual_seed(3))


def ints(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


class Layer:
    """A cache in which sequence b has pages `[b * PAGES, (b + 1) * PAGES)`, and calls of one compressor with it."""

    def __init__(self, spec: CompressorSpec, backend: Backend, fmt: str | None, sequences: int) -> None:
        self.spec, self.backend, self.device = spec, backend, backend.device
        self.cache = None
        if fmt is not None:
            self.cache = kvfold.EntryCache.allocate(fmt, sequences * PAGES, ROWS_PER_PAGE, spec, device=self.device)
            self.cache.storage.fill_(0xA5)
        self.weight = WEIGHT[: spec.head_dim].to(self.device)
        self.rope = reference.rope_table(64, spec.rope_dim).to(self.device)

    def plan(self, batch: list[tuple[int, int, int]], bound: int, holes: frozenset[int] = frozenset()) -> kvfold.StepPlan:
        """batch: sequence, start and count, in the order of their tokens. holes: sequences whose entries are dropped."""
        tables = torch.full((len(batch), PAGES), -1, dtype=torch.int32, device=self.device)
        for i, (b, _, _) in enumerate(batch):
            if b not in holes:
                tables[i] = torch.arange(b * PAGES, (b + 1) * PAGES)
        ends = torch.tensor([0, *(count for _, _, count in batch)]).cumsum(0).int().to(self.device)
        start = ints(self.device, *(start for _, start, _ in batch))
        return kvfold.StepPlan.build(
            1, start, ends, bound, cache_block_table=tables, rows_per_page=ROWS_PER_PAGE, max_tokens=sum(n for _, _, n in batch)
        )

    def compress(self, kv: Tensor, plan: kvfold.StepPlan, **out: Tensor) -> None:
        kvfold.compress(
            kv.to(self.device), plan, None, self.cache, spec=self.spec, ape=None, norm_weight=self.weight, rope=self.rope,
            backend=self.backend.name, **out,
        )  # fmt: skip

    def outputs(self, plan: kvfold.StepPlan) -> dict[str, Tensor]:
        shape = plan.entry_capacity, self.spec.head_dim
        made = {name: torch.full(shape, torch.nan, device=self.device) for name in ("rows", "latent")}
        return made | {"latent": made["latent"].bfloat16()}


def texts(spec: CompressorSpec, dtype: torch.dtype, count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(11)
    return [torch.randn(LENGTH, spec.head_dim, generator=draw).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("spec", [V41_MAIN_R1, V41_INDEX_K, NARROW], ids=["main", "index", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_entries_are_those_of_the_reference(backend: Backend, spec: CompressorSpec, dtype: torch.dtype) -> None:
    layer, (first, second) = Layer(spec, backend, "fp32", 2), texts(spec, dtype, 2)
    plan = layer.plan([(0, 0, LENGTH), (1, 3, 5)], LENGTH)
    out = layer.outputs(plan)
    wide = torch.full((LENGTH + 8, spec.head_dim + 8), torch.nan, dtype=dtype)  # a column slice, NaN behind the last sequence
    wide[: LENGTH + 5, : spec.head_dim] = torch.cat([first, second[:5]])
    layer.compress(wide[:, : spec.head_dim], plan, **out)
    assert int(plan.errors) == 0
    rows, latent = (out[name].cpu() for name in ("rows", "latent"))
    assert torch.equal(rows[: LENGTH + 5], torch.cat([first, second[:5]]).float())
    assert bool(rows[LENGTH + 5 :].isnan().all()) and bool(latent[LENGTH + 5 :].isnan().all())
    weight, rope = layer.weight.cpu(), layer.rope.cpu()
    want = reference.latents(first, spec, None, weight)
    assert torch.equal(latent[:LENGTH], want.float().bfloat16()) or norm_error(latent[:LENGTH], want) < 2.0**-8
    got = layer.cache.read(torch.arange(LENGTH, device=layer.device)).cpu()
    assert norm_error(got, reference.entries(first, spec, None, weight, rope)) < 5e-7
    shifted = torch.cat([torch.zeros(3, spec.head_dim, dtype=dtype), second[:5]])
    got = layer.cache.read(torch.arange(3, 8, device=layer.device) + PAGES * ROWS_PER_PAGE).cpu()
    assert norm_error(got, reference.entries(shifted, spec, None, weight, rope)[3:]) < 5e-7


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8_tensor"])
def test_no_cut_changes_a_byte(backend: Backend, fmt: str) -> None:
    """Chunks, decode, drafts that are rejected, padding, dropped entries, a place that another had before: as one call."""
    rng, known = random.Random(5), texts(NARROW, torch.bfloat16, 3)
    whole = Layer(NARROW, backend, fmt, 3)
    plan = whole.plan([(b, 0, LENGTH) for b in range(3)], LENGTH)
    truth = whole.outputs(plan)
    whole.compress(torch.cat(known), plan, **truth)
    layer = Layer(NARROW, backend, fmt, 3)
    layer.cache.storage.fill_(0xFF)  # NaN in most formats
    done, steps = [0, 0, 0], 0
    while min(done) < LENGTH:
        steps += 1
        batch = [(b, done[b], min(rng.choice([0, 1, 1, 4, 7]), LENGTH - done[b])) for b in rng.sample(range(3), 3)]
        tokens = [known[b][start : start + count].clone() for b, start, count in batch]
        kept = [rng.randint(0, count) if count > 1 else count for _, _, count in batch]
        for new, n in zip(tokens, kept, strict=True):
            new[n:] = torch.nan  # drafts that will be rejected
        hole = frozenset({rng.choice(batch)[0]} if steps % 4 == 0 else ())
        plan = layer.plan(batch, 8, hole)
        out = layer.outputs(plan)
        layer.compress(torch.cat([*tokens, torch.full((2, 32), torch.nan, dtype=torch.bfloat16)]), plan, **out)
        assert int(plan.errors) == 0
        entry = 0
        for (b, start, count), n in zip(batch, kept, strict=True):
            for i in range(count):
                for name, x in out.items():
                    want = truth[name][b * LENGTH + start + i]
                    assert bool(x[entry].isnan().all()) if b in hole or i >= n else torch.equal(x[entry], want)
                entry += 1
            done[b] += 0 if b in hole else n
    slots = torch.cat([torch.arange(LENGTH) + b * PAGES * ROWS_PER_PAGE for b in range(3)]).to(layer.device)
    assert torch.equal(layer.cache.read(slots), whole.cache.read(slots))


def test_what_is_refused_is_counted(backend: Backend) -> None:
    layer, (text,) = Layer(NARROW, backend, "bf16", 1), texts(NARROW, torch.float32, 1)
    plan = layer.plan([(0, 0, 4), (0, 8, 3)], 4)
    before = layer.cache.storage.clone()
    layer.compress(text[:6], plan)  # of the second sequence's tokens only two are there
    assert int(plan.errors) == 1
    read = layer.cache.storage.view(-1)[: 4 * 64]
    assert not torch.equal(read, before.view(-1)[: 4 * 64]), "the first sequence was not refused"
    plan.errors.zero_()
    layer.compress(text[:0], plan)
    assert int(plan.errors) == 2
    plan = layer.plan([(0, 62, 4)], 4)  # beyond rope, and beyond the table of pages
    assert int(plan.errors) == 4
    far = kvfold.StepPlan.build(
        1, ints(layer.device, 62), ints(layer.device, 0, 4), 4,
        entry_slots=torch.tensor([0, 1, 99, -1], dtype=torch.int64, device=layer.device),
    )  # fmt: skip
    layer.compress(text[:4], far)
    assert int(far.errors) == 1  # its slot; the last one is dropped, whatever its position
    absent = kvfold.StepPlan.build(
        1, ints(layer.device, 0, 0), ints(layer.device, 0, 2, 4), 2, state_slots=ints(layer.device, -1, 7),
        entry_slots=torch.tensor([8, 9, 10], dtype=torch.int64, device=layer.device),
    )  # fmt: skip
    layer.compress(text[:4], absent)
    assert int(absent.errors) == 0


def test_without_a_cache(backend: Backend) -> None:
    """Latents and pooled rows alone, again and again with one plan by two layers: neither takes the other's weight."""
    (text,) = texts(NARROW, torch.float32, 1)
    layers = [Layer(NARROW, backend, None, 1) for _ in range(2)]
    layers[1].weight = layers[1].weight * 2
    plan = layers[0].plan([(0, 0, 5)], 5)
    for layer in (*layers, *layers):
        out = layer.outputs(plan)
        layer.rope = None
        layer.compress(text[:5], plan, latent=out["latent"])
        want = reference.latents(text[:5], NARROW, None, layer.weight.cpu())
        assert norm_error(out["latent"][:5].cpu(), want) < 2.0**-8
    layer.weight = None
    out = layer.outputs(plan)
    layer.compress(text[:5], plan, rows=out["rows"])
    assert torch.equal(out["rows"][:5].cpu(), text[:5])


def test_spec() -> None:
    for field, value in (("ratio", 2), ("overlap", True), ("has_ape", True)):
        with pytest.raises(ValueError, match=rf"^{field} must be .* without a gate"):
            replace(NARROW, **{field: value})
    with pytest.raises(TypeError, match=r"^gate must be a bool"):
        replace(NARROW, gate=1)
    assert NARROW.kv_score_width == 32 and replace(NARROW, gate=True).kv_score_width == 64
    assert replace(V41_INDEX_K, ratio=2, gate=True).norm_eps == V41_MAIN_R2.norm_eps == 1e-20


def test_errors() -> None:
    backend = Backend("torch", torch.device("cpu"))
    layer, (text,) = Layer(NARROW, backend, "bf16", 1), texts(NARROW, torch.float32, 1)
    plan = layer.plan([(0, 0, 4)], 4)
    gated = replace(NARROW, gate=True)
    state = kvfold.FoldState.allocate(gated, 1, 4)
    given = {"spec": NARROW, "ape": None, "norm_weight": layer.weight, "rope": layer.rope}
    with pytest.raises(ValueError, match=r"^state must be None, as spec has no gate"):
        kvfold.compress(text, plan, state, layer.cache, **given)
    with pytest.raises(ValueError, match=r"^ape must be None"):
        kvfold.compress(text, plan, None, layer.cache, **given | {"ape": torch.zeros(1, 32)})
    with pytest.raises(TypeError, match=r"^state must be a FoldState, a MeanState or a WindowState, got NoneType"):
        kvfold.compress(torch.zeros(4, 64), plan, None, layer.cache, **given | {"spec": gated})
    with pytest.raises(ValueError, match=r"^kv_score must have shape \[any, 32\]"):
        kvfold.compress(torch.zeros(4, 64), plan, None, layer.cache, **given)
    with pytest.raises(ValueError, match=r"^plan must have state_slots for a FoldState, got neither"):
        kvfold.compress(torch.zeros(4, 64), plan, state, None, **given | {"spec": gated})
    with pytest.raises(UnsupportedError, match="spec must have a gate in compress_many"):
        kvfold.compress_many([(text, None, layer.cache, NARROW, None, layer.weight, layer.rope)], plan)
    for make in (
        lambda: kvfold.FoldState.allocate(NARROW, 1, 4),
        lambda: kvfold.WindowState.allocate(NARROW, 1, 4),
        lambda: kvfold.Snapshots.allocate(NARROW, 1, 4),
        lambda: reference.Simulator(NARROW, 1, 4),
    ):
        with pytest.raises(ValueError, match=r"^spec must have a gate"):
            make()
    with pytest.raises(ValueError, match=r"^state_slots or block_tables must be given"):
        kvfold.StepPlan.build(2, ints(backend.device, 0), ints(backend.device, 0, 4), 4)
    with pytest.raises(ValueError, match=r"^kv_score must not share memory with|^latent must not share memory with"):
        memory = torch.zeros(4, 32, dtype=torch.bfloat16)
        kvfold.compress(memory, plan, None, layer.cache, **given, latent=memory)
