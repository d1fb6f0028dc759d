"""Which kernels `warmup` prepares for V4.1 and for engines' own ways: those that calls then ask for, all of them; no GPU."""

from __future__ import annotations

import sys
from itertools import product

import pytest
import torch
from conftest import BACKENDS

import kvfold
from kvfold import CompressorSpec
from kvfold.backend_triton import launch
from kvfold.backend_triton import prepare as preparing
from kvfold.backend_triton.keys import Key, PairKey, PlanKey, RestoreKey, StepKey, StoreKey, WindowKey
from kvfold.testing import Engine, Step, Told, make_cache, make_state, make_tokens, make_weights, run_many

FP32, BF16 = torch.float32, torch.bfloat16
TOLD = Told(totals=True, wide=True, apart=2, before=3, reserved=1, null=0)
UNGATED = CompressorSpec(head_dim=32, ratio=1, rope_dim=8, has_ape=False, gate=False)
R2 = CompressorSpec(head_dim=32, ratio=2, rope_dim=8, has_ape=False)
FOLD = CompressorSpec(head_dim=32, ratio=16, rope_dim=8)
OVERLAP = CompressorSpec(head_dim=32, ratio=4, rope_dim=8, overlap=True)
NEW = 9  # tokens of a step


class Asked:
    """What is prepared, and what calls ask for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.prepared: set[Key] = set()
        self.keys: set[Key] = set()
        self.backend = BACKENDS["cuda" if torch.cuda.is_available() else "interpreter"]
        patch.setattr(preparing, "prepare", lambda keys, *rest: self.prepared.update(keys) or 1)
        patch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda *_: torch.device("cuda", 0))
        patch.setattr(launch, "launcher_of", lambda key, device: self.keys.add(key) or (lambda *arguments: None))

    def engine(self, spec: CompressorSpec, kind: str, fmt: str | None, dtype: torch.dtype = BF16, **how: object) -> Engine:
        draw, device = torch.Generator().manual_seed(1), self.backend.device
        tokens = make_tokens(spec, [NEW, NEW], "normal", draw, dtype, device)
        weights = make_weights(spec, NEW, "normal", draw, FP32, device)
        made = Engine.make(tokens, weights, kind=kind, most=NEW, page_size=8, backend=self.backend.name, **how)
        made.cache = None if fmt is None else make_cache(fmt, spec, made.cache.num_pages, 3, device)
        return made

    def take(self, engine: Engine) -> None:
        """A step of both sequences, and the update of its plan on a GPU."""
        step = Step.of((0, 0, NEW), (1, 0, NEW))
        engine.run([step])
        plan, told = engine.plan(step), engine.told
        lengths = [told.numbers(x, engine.device) for x in ([0, 0], [0, NEW, 2 * NEW])]
        launch.update_on_gpu(plan, *lengths, told.totals)

    def same(self, *kinds: type) -> None:
        """Every kernel that was asked for is prepared, and nothing is prepared that no call of these has asked for."""
        assert self.keys and self.keys <= self.prepared
        for kind in kinds:
            assert chosen(self.prepared, kind) == chosen(self.keys, kind) != set()


def chosen(keys: set[Key], kind: type) -> set[tuple]:
    """Keys of a kind without the rows of the table, which follow from sizes and not from what a caller chooses."""
    found = [key for key in keys if isinstance(key, kind)]
    if kind is PairKey:
        return {(key.first._replace(config=None), key.second._replace(config=None)) for key in found}
    return {key._replace(config=None) if hasattr(key, "config") else key for key in found}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


@pytest.mark.parametrize("spec", [UNGATED, R2, FOLD, OVERLAP], ids=["ungated", "ratio 2", "fold", "overlap"])
def test_latents_and_tensors_apart(asked: Asked, spec: CompressorSpec) -> None:
    """Over a `FoldState`, or without a gate: each with and without, with an engine's plans too."""
    ways = (False, True)
    kvfold.warmup(
        [spec], [None, "bf16"], rows=(FP32,), max_new_tokens=(NEW,), latents=ways, apart=ways, plans=("plain", "engine")
    )
    for fmt, latent, two, told in product((None, "bf16"), ways, ways if spec.gate else (False,), (Told(), TOLD)):
        for entries in ("table", "none") if fmt is None else ("table",):
            engine = asked.engine(spec, "fold", fmt, latent=latent, two=two, told=told, entries=entries)
            asked.take(engine)
    asked.same(StepKey)
    plans = chosen(asked.keys, PlanKey)
    assert {key.metadata for key in plans} == {False, True} and plans <= asked.prepared


def test_rings_and_tables_of_engines(asked: Asked) -> None:
    """Over a `WindowState`: plain tables, an engine's, and rings, alone and with an engine's numbers."""
    ways = (False, True)
    kvfold.warmup([R2, OVERLAP], ["bf16"], states=("window",), max_new_tokens=(NEW,), latents=ways, apart=ways,
                  page_sizes=(8,), plans=("plain", "engine", "ring"))  # fmt: skip
    for spec, latent, two, ring, told in product((R2, OVERLAP), ways, ways, ways, (Told(), TOLD)):
        asked.take(asked.engine(spec, "window", "bf16", latent=latent, two=two, ring=ring, told=told, rows=None))
    asked.same(WindowKey)
    assert {key.tables for key in asked.keys if isinstance(key, WindowKey)} == {"plain", "engine", "ring"}
    asked.prepared.clear()
    kvfold.warmup([R2], ["bf16"], states=("window",), max_new_tokens=(NEW,), page_sizes=(8,), plans=("ring",))
    asked.keys.clear()
    asked.take(asked.engine(R2, "window", "bf16", ring=True, rows=None))
    asked.same(WindowKey)


@pytest.mark.parametrize("rounds", [False, True])
def test_inputs_that_the_state_rounds(asked: Asked, rounds: bool) -> None:
    kvfold.warmup([OVERLAP], ["bf16"], dtypes=(FP32, BF16), state_dtypes=(BF16,), max_new_tokens=(NEW,), round_inputs=rounds)
    for dtype in (FP32, BF16) if rounds else (BF16,):
        engine = asked.engine(OVERLAP, "fold", "bf16", dtype, rows=None)
        for gap in (None, 64):  # and in an engine's pages, which are no kernel of their own
            engine.state = make_state(OVERLAP, 3, NEW, BF16, engine.device, round_inputs=rounds, gap=gap)
            asked.take(engine)
    asked.same(StepKey)


def test_scales_on_the_device_have_no_kernel_of_their_own(asked: Asked) -> None:
    kvfold.warmup(
        [R2], ["fp8_tensor"], max_new_tokens=(NEW,), rows=(FP32,), slot_dtypes=(torch.int32,), position_dtypes=(torch.int32,)
    )
    for number in (0.5, torch.tensor(0.5)):
        engine = asked.engine(R2, "fold", "fp8_tensor")
        scale = number if isinstance(number, float) else number.to(engine.device)
        engine.cache = make_cache("fp8_tensor", R2, engine.cache.num_pages, 3, engine.device, scale=scale)
        asked.take(engine)
        engine.store(engine.pooled)
        engine.store_placed(engine.pooled)
    asked.same(StepKey, StoreKey)


def test_pairs_and_snapshots_of_tensors_apart(asked: Asked) -> None:
    other = CompressorSpec(head_dim=16, ratio=4, rope_dim=8, overlap=True, hadamard=True)
    many = [((OVERLAP, "bf16"), (other, "bf16"))]
    kvfold.warmup([], [], max_new_tokens=(NEW,), apart=(True,), many=many, plans=("engine",), snapshots=(True,))
    engines = [asked.engine(spec, "fold", "bf16", two=True, told=TOLD) for spec in (OVERLAP, other)]
    for engine in engines:
        engine.snapshots = kvfold.Snapshots.allocate(engine.spec, 4, 8, device=engine.device)
        engine.snapshot_pages = [[0], [1]]
    step = Step.of((0, 0, NEW), (1, 0, NEW))
    plan = engines[0].plan(step)
    given = [(e.kv_score(step), e.state, e.cache, *e.weights.values(), e.snapshots) for e in engines]
    kvfold.compress_many(given, plan, backend=asked.backend.name)
    asked.same(PairKey)
    for engine in engines:
        engine.hit(0, 8, 1)
    asked.same(PairKey, RestoreKey)
    asked.prepared.clear()
    asked.keys.clear()
    kvfold.warmup([], [], max_new_tokens=(NEW,), apart=(True,), many=many)
    for engine in engines:
        engine.snapshots = None
    run_many(engines, [step])
    asked.same(PairKey)
