"""kvfold's vLLM plug-in without vLLM: when it does nothing, what it refuses, and the plans that CUDA graphs record."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

import kvfold
from kvfold.integrations import switch
from kvfold.integrations.vllm import patch, plugin, refused, register
from kvfold.integrations.vllm.hooks import COMPRESSORS, Compressed, Group, tell_slots
from kvfold.integrations.vllm.plans import ERRORS, Batch, Limits, Plans, Recorded, StateIn

SPEC = kvfold.CompressorSpec(head_dim=16, ratio=4, overlap=True, rope_dim=8)
LIMITS = Limits(requests=4, tokens=24, decode=2)


def ints(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_inert_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVFOLD_ENGINES", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # any import of it fails
    plugin.load()
    monkeypatch.setenv("KVFOLD_ENGINES", "sglang")
    plugin.load()
    assert "vllm" not in switch.ON and refused() == 0


def test_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFOLD_ENGINES", "sglang, vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="vllm must be installed"):
        plugin.load()


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="state must be one of window, fold, got 'raw'"):
        register("raw")
    monkeypatch.setenv("KVFOLD_ENGINES", "vllm:pools")
    with pytest.raises(ValueError, match="KVFOLD_ENGINES must have one of window, fold behind vllm:, got 'pools'"):
        plugin.load()
    monkeypatch.setenv("KVFOLD_ENGINES", "vlm")
    with pytest.raises(ValueError, match=r"KVFOLD_ENGINES must have names of .*'vlm'"):
        plugin.load()


def make_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with all that the plug-in looks for, and nothing else."""
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    for name, needed in patch.NEEDED.items():
        module = ModuleType(name)
        for path, parameters in needed.items():
            first, *rest = path.split(".")
            value = getattr(module, first, None) or type(first, (), {})
            setattr(module, first, value)
            if rest:
                exec(f"def {rest[0]}({', '.join(parameters)}): ...", scope := {})
                setattr(value, rest[0], scope[rest[0]])
        monkeypatch.setitem(sys.modules, name, module)


V4 = "vllm.models.deepseek_v4.compressor"


def test_classes_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    make_vllm(monkeypatch)
    monkeypatch.setattr(sys.modules[V4].DeepseekCompressor, "forward", lambda self, x, positions, rope: None)
    with pytest.raises(
        kvfold.UnsupportedError, match=r"DeepseekCompressor\.forward does not take kv_score, positions, rotary_emb"
    ):
        register()
    make_vllm(monkeypatch)
    monkeypatch.delattr(sys.modules[V4], "CompressorMetadataBuilder")
    with pytest.raises(kvfold.UnsupportedError, match=r"has no CompressorMetadataBuilder\.build"):
        register()
    make_vllm(monkeypatch)
    monkeypatch.setitem(sys.modules, V4, None)
    with pytest.raises(kvfold.UnsupportedError, match=f"{V4} cannot be imported"):
        register()
    assert "vllm" not in switch.ON


class Layer:
    """Raw pages of two requests and a third that stays away, as plans of `Plans` find them."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(1)
        self.state = kvfold.WindowState.allocate(SPEC, 13, 4)
        self.cache = kvfold.EntryCache.allocate("bf16", 4, 8, SPEC)
        self.text = torch.randn(2, 24, SPEC.kv_score_width, generator=draw)
        self.slots = torch.full((LIMITS.tokens,), -1, dtype=torch.int64)
        self.table = torch.zeros(LIMITS.requests, 6, dtype=torch.int32)
        self.table[:2] = ints(list(range(1, 13))).view(2, 6)
        self.plans = Plans(4, LIMITS, StateIn("pages", 4), self.slots)
        self.weights = {
            "spec": SPEC,
            "ape": torch.randn(4, SPEC.channels, generator=draw),
            "norm_weight": torch.ones(16),
            "rope": kvfold.reference.rope_table(64, 8),
        }

    def plan(self, starts: list[int], lengths: list[int]) -> torch.Tensor:
        """Tells the plans of a step, as vLLM does, and returns its rows."""
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        self.slots.fill_(-1)
        rows = []
        for b, (start, new) in enumerate(zip(starts, lengths, strict=True)):
            for i in range(new):
                if (start + i) % 4 == 3:
                    self.slots[int(ends[b]) + i] = 8 * (1 + b) + (start + i) // 4
            rows.append(self.text[b, start : start + new])
        n, seq_lens = len(starts), ints([a + n for a, n in zip(starts, lengths, strict=True)])
        self.plans.update(Batch(n, sum(lengths), max(lengths), ends, seq_lens, self.table[:n]))
        return torch.cat(rows)

    def call(self, rows: torch.Tensor, plan: kvfold.StepPlan) -> None:
        kvfold.compress(rows, plan, self.state, self.cache, **self.weights)


STEPS = (([0, 0], [11, 5]), ([11, 5], [1, 2]), ([12, 6], [2, 2]), ([14], [2]), ([16, 8], [6, 8]), ([22, 16], [2, 1]))


def test_plans_for_any_step() -> None:
    """A plan for the number of requests that decode, and one for all other steps, give the same as a plan of its own."""
    ours, plain = Layer(), Layer()
    for starts, lengths in STEPS:
        ours.call(ours.plan(starts, lengths), ours.plans.choose())
        rows = plain.plan(starts, lengths)
        ends, seq_lens = (
            torch.tensor([0, *lengths]).cumsum(0).int(),
            ints([a + n for a, n in zip(starts, lengths, strict=True)]),
        )
        table = plain.table[: len(starts)]
        plan = kvfold.StepPlan.build(
            4, None, ends, 12, seq_lens=seq_lens, block_tables=(table, table), page_size=4, token_slots=plain.slots
        )
        plain.call(rows, plan)
    every = torch.tensor([8 + w for w in range(6)] + [16 + w for w in range(4)])
    assert torch.equal(ours.cache.read(every), plain.cache.read(every))
    assert int(ERRORS[torch.device("cpu")]) == 0


def test_a_table_somewhere_else_has_plans_of_its_own() -> None:
    """As vLLM may hand the same pages in another tensor: the one from before then says nothing of the step."""
    moved, still = Layer(), Layer()
    for starts, lengths in STEPS:
        moved.table, old = moved.table.clone(), moved.table
        old.zero_()
        for layer in (moved, still):
            layer.call(layer.plan(starts, lengths), layer.plans.choose())
    every = torch.tensor([8 + w for w in range(6)] + [16 + w for w in range(4)])
    assert torch.equal(moved.cache.read(every), still.cache.read(every)) and still.cache.read(every).any()
    assert int(ERRORS[torch.device("cpu")]) == 0


def test_recorded_plans_stay_and_follow() -> None:
    """What a graph recorded is updated in each later step: the plan of as many requests, and of a piece of the model any."""
    layer, again = Layer(), Layer()
    layer.call(layer.plan(*STEPS[0]), layer.plans.choose())
    again.call(again.plan(*STEPS[0]), again.plans.choose())
    whole = layer.plans.choose(Recorded.PIECE)  # as recorded: the same for each step from here on
    of_two = None
    for starts, lengths in STEPS[1:]:
        rows, other = layer.plan(starts, lengths), again.plan(starts, lengths)
        assert layer.plans.choose(Recorded.PIECE) is whole
        if max(lengths) <= LIMITS.decode and len(starts) == 2:
            of_two = of_two or layer.plans.choose()
            assert layer.plans.choose() is of_two is not whole
        layer.call(rows, whole)
        again.call(other, again.plans.choose())
    every = torch.tensor([8 + w for w in range(6)] + [16 + w for w in range(4)])
    assert torch.equal(layer.cache.read(every), again.cache.read(every))


def test_a_recorded_mixture_follows() -> None:
    """A graph of the whole model that may be replayed for any step is, with decode steps too."""
    layer = Layer()
    layer.plan(*STEPS[0])
    whole = layer.plans.choose(Recorded.WHOLE)
    assert layer.plans.choose() is whole
    layer.plan(*STEPS[1])
    assert layer.plans.choose() is not whole and whole.cu_seqlens.tolist() == [0, 1, 3, 3, 3]


def test_decode_plans_that_nobody_recorded_are_alone() -> None:
    layer = Layer()
    layer.plan(*STEPS[0])
    whole = layer.plans.choose()
    layer.plan(*STEPS[1])
    layer.plans.choose(Recorded.WHOLE)
    layer.plan(*STEPS[2])
    assert whole.cu_seqlens.tolist() == [0, 11, 16, 16, 16]  # as its last step left it


def test_a_batch_of_nobody() -> None:
    layer = Layer()
    layer.state.kv.zero_(), layer.cache.pages.zero_()
    table = torch.zeros_like(layer.table)
    layer.plans.update(Batch(3, 6, 2, ints([0, 2, 4, 6]), ints([2, 2, 2]), table[:3]))
    layer.call(layer.text[0, :6], layer.plans.choose())
    assert not bool(layer.state.kv.any()) and not bool(layer.cache.pages.any()) and int(ERRORS[torch.device("cpu")]) == 0


@pytest.mark.parametrize("state_first", [True, False])
def test_updated_by_whichever_builds_last(state_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder of caches writes slots, that of states knows the step: the plan has both, in every step."""
    monkeypatch.setitem(COMPRESSORS, "layer.state", Compressed(4, "layer"))
    layer, slots = Layer(), torch.full((LIMITS.tokens,), -1, dtype=torch.int64)

    class CacheBuilder:
        layer_names = ("layer", "another")
        compressed_slot_mapping_buffer = slots

        @tell_slots
        def build(self, common_prefix_len: int, common_attn_metadata: object, fast_build: bool = False) -> str:
            slots.fill_(-1)
            slots[3] = common_attn_metadata.slot
            return "metadata"

    group, builder = Group(["layer.state"], LIMITS, StateIn("pages", 4)), CacheBuilder()
    for slot in (9, 10):
        common = ModuleType("common")
        common.num_reqs, common.num_actual_tokens, common.slot = 1, 4, slot
        batch = Batch(1, 4, 4, ints([0, 4]), ints([4]), layer.table[:1])
        for turn in (state_first, not state_first):
            if turn:
                group.states_built(batch)
            else:
                assert builder.build(0, common) == "metadata"
        plan = group.plans_of("layer").choose()
        assert plan.entry_slots[0] == slot
    with pytest.raises(RuntimeError, match="no slots of another"):
        group.plans_of("another")


def test_the_benchmark_imports_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    from benchmarks.run import adapters

    (case,) = (case for case in adapters.cases([16], ["HCA"]) if case.name == "HCA b16 n1 spread")
    assert case.starts[0] == 511 and case.starts[15] == 511 - 120
    assert (adapters.SHAPES["step"].count(128), adapters.SHAPES["step"].count(4)) == (31, 30)
    with pytest.raises(SystemExit):
        adapters.parse(["--shapes", "CSA,MLA"])


def test_layers_of_a_group_share_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan for all layers whose states and whose caches share tables, and another for caches of another builder."""

    class CacheBuilder:
        def __init__(self, *layer_names: str) -> None:
            self.layer_names, self.compressed_slot_mapping_buffer = layer_names, torch.full((LIMITS.tokens,), -1)

        @tell_slots
        def build(self, common_prefix_len: int, common_attn_metadata: object, fast_build: bool = False) -> None: ...

    for name in ("a", "b", "c"):
        monkeypatch.setitem(COMPRESSORS, f"{name}.state", Compressed(4, name))
    group = Group([f"{name}.state" for name in ("a", "b", "c")], LIMITS, StateIn("pages", 4))
    common = ModuleType("common")
    common.num_reqs, common.num_actual_tokens = 1, 4
    group.states_built(Batch(1, 4, 4, ints([0, 4]), ints([4]), torch.zeros(1, 6, dtype=torch.int32)))
    builders = CacheBuilder("a", "b"), CacheBuilder("c", "d")
    for builder in builders:
        builder.build(0, common)
    assert group.plans_of("a") is group.plans_of("b") is not group.plans_of("c")
    assert group.plans_of("c").choose().token_slots is builders[1].compressed_slot_mapping_buffer
