"""`project_compress` and `project_compress_many` while they are traced: operators, with the bits of eager calls."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS
from support.helpers import Backend
from support.project_support import FOLD, NARROW, ROWS, SPECS, Projected, moved
from torch._subclasses import FakeTensorMode

import kvfold
from kvfold.testing.projected import make_hidden, make_scaled_weight


@pytest.fixture(autouse=True)
def anew() -> None:
    torch._dynamo.reset()


def use_fp8(*layers: Projected) -> None:
    for i, one in enumerate(layers):
        one.weight = make_scaled_weight(one.spec.kv_score_width, 256, i, device=one.backend.device)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", SPECS)
def test_compiled(name: str, fp8: bool, backend: Backend) -> None:
    """A prompt, and a step behind it, in whole graphs; with a kv_score of the caller's and without."""
    hidden = make_hidden(20, 256).to(backend.device)
    eager, traced = Projected(SPECS[name], backend, 256), Projected(SPECS[name], backend, 256)
    if fp8:
        use_fp8(eager)
        traced.weight = eager.weight

    def call(hidden, plan, state, cache, kv_score):
        kvfold.project_compress(
            hidden, traced.weight, plan, state, cache, kv_score=kv_score, backend=backend.name, **traced.given
        )

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for at, count, given in ((0, 17, False), (17, 3, True)):
        kv_score = torch.empty(count, eager.spec.kv_score_width, device=backend.device) if given else None
        plan = traced.plan([(0, at, count)])
        compiled(hidden[at : at + count], plan, traced.state, traced.cache, kv_score)
        wanted = torch.empty(count, eager.spec.kv_score_width, device=backend.device)
        eager.step(hidden[at : at + count], [(0, at, count)], kv_score=wanted)
        assert int(plan.errors) == 0 and (kv_score is None or torch.equal(kv_score, wanted))
    assert torch.equal(traced.records(0), eager.records(0)) and eager.records(0).any()


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("form", ["list", "stacked", "halves"])
def test_two_compiled(form: str, fp8: bool, backend: Backend) -> None:
    """By a weight for each, by one for both, and by values and scores of one of them apart."""
    hidden = make_hidden(20, 256).to(backend.device)
    eager, traced = ([Projected(spec, backend, 256) for spec in (ROWS, NARROW)] for _ in range(2))
    if fp8:
        use_fp8(*eager)
        use_fp8(*traced)
    weights = [one.weight for one in traced]
    weight = weights
    if form == "halves":
        halves = [make_scaled_weight(NARROW.channels, 256, i) for i in (3, 4)]
        kept = tuple(moved(half, backend.device) if fp8 else half.dequantized().to(backend.device) for half in halves)
        weight = [weights[0], kept]
        eager[1].weight = kept
    if form == "stacked":
        weight = kvfold.ScaledWeight(*map(torch.cat, zip(*weights, strict=True))) if fp8 else torch.cat(weights)
    plan = traced[0].plan([(0, 0, 20)])

    def call(hidden, plan, states, caches):
        made = [(None, s, c, *one.given.values()) for one, s, c in zip(traced, states, caches, strict=True)]
        kvfold.project_compress_many(hidden, weight, made, plan, backend=backend.name)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    compiled(hidden, plan, [one.state for one in traced], [one.cache for one in traced])
    for one, other in zip(eager, traced, strict=True):
        one.step(hidden, [(0, 0, 20)])
        assert torch.equal(one.records(0), other.records(0)) and one.records(0).any()


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_fake(fp8: bool) -> None:
    """Of tensors without memory nothing is made."""
    with FakeTensorMode():
        one = Projected(FOLD, BACKENDS["torch"], 256)
        plan = one.plan([(0, 0, 4)])
        made = kvfold.ScaledWeight(torch.empty(FOLD.kv_score_width, 256, dtype=torch.float8_e4m3fn), torch.empty(1, 2))
        weight = made if fp8 else one.weight
        kvfold.project_compress(make_hidden(4, 256), weight, plan, one.state, one.cache, **one.given)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_real_tensors_beside_fake_ones(fp8: bool) -> None:
    """Are refused by name, in lists too."""
    one = Projected(FOLD, BACKENDS["torch"], 256)
    weight, kv_score = make_scaled_weight(FOLD.kv_score_width, 256) if fp8 else one.weight, torch.empty(4, FOLD.kv_score_width)
    mode = FakeTensorMode()
    hidden, kv_score = (mode.from_tensor(x) for x in (make_hidden(4, 256), kv_score))
    with pytest.raises(TypeError, match=r"^weight must be of FakeTensors like the others, got a real one \(weights\)"):
        given = one.plan([(0, 0, 4)]), one.state, one.cache
        kvfold.project_compress(hidden, weight, *given, kv_score=kv_score, **one.given)


def test_what_is_no_tensor_is_named() -> None:
    """In a trace, too, whose operator takes lists of tensors."""
    with FakeTensorMode():
        one = Projected(FOLD, BACKENDS["torch"], 256)
        half = kvfold.ScaledWeight(torch.empty(32, 256, dtype=torch.float8_e4m3fn), torch.empty(1, 2))
        for i, name in ((0, "codes"), (1, "scales")):
            weight = [half, half]
            weight[i] = half._replace(**{name: None})
            with pytest.raises(TypeError, match=rf"^weight\[{i}\]\.{name} must be a Tensor, got NoneType"):
                one.step(make_hidden(4, 256), [(0, 0, 4)], tuple(weight))


def test_shapes_and_dtypes_are_checked_in_a_trace() -> None:
    """Of two tensors, too, before anything runs."""
    with FakeTensorMode():
        one = Projected(FOLD, BACKENDS["torch"], 256)
        half, codes = torch.empty(32, 256, dtype=torch.bfloat16), torch.empty(32, 256, dtype=torch.float8_e4m3fn)
        scaled = kvfold.ScaledWeight(codes, torch.empty(1, 2))
        for weight, error, words in (
            ((half, half[:31]), ValueError, r"weight\[1\] must have shape \[32, 256\], got \[31, 256\]"),
            ((half, half.float()), TypeError, r"weight\[1\] must be torch.bfloat16, got torch.float32"),
            ((codes, half), TypeError, r"weight\[0\] must be torch.bfloat16, or a kvfold.ScaledWeight, got .* without scales"),
            ((scaled, scaled._replace(scales=torch.empty(2, 2))), ValueError, r"weight\[1\].scales must have shape \[1, 2\]"),
            ((scaled._replace(codes=half), scaled), TypeError, r"weight\[0\].codes must be torch.float8_e4m3fn, got"),
        ):
            with pytest.raises(error, match=f"^{words}"):
                one.step(make_hidden(4, 256), [(0, 0, 4)], weight)


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_opcheck(fp8: bool) -> None:
    """The operator says of itself what it mutates, by torch's own checks."""
    weight = make_scaled_weight(64, 256)
    weights, scales = ([weight.codes], [weight.scales]) if fp8 else ([weight.dequantized()], [])
    given = make_hidden(3, 256), weights, scales, [1], [torch.zeros(3, 64)], False, "torch", None
    tests = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"
    # The first compares all arguments by sums, which torch has not for FP8.
    torch.library.opcheck(torch.ops.kvfold.project.default, given, test_utils=tests[fp8:])
