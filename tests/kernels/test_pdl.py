"""Dependent launches (PDL) change no bit, however long the chain of calls over the same buffers."""

from __future__ import annotations

import pytest
import torch
from conftest import BACKENDS
from support.chain_support import Chain, same, script
from support.helpers import Backend

import kvfold
from kvfold.backend_triton import launch
from kvfold.backend_triton import launcher as dispatch

GPU = BACKENDS["cuda"]


def run(backend: Backend, rounds: int, pdl: bool | None, seed: int = 0) -> list[torch.Tensor]:
    chain = Chain(backend, pdl=pdl)
    for steps in script(rounds, seed):
        chain.load(steps)
        chain.launch()
    chain.check_errors()
    return chain.contents()


def test_the_order_of_the_layers_changes_nothing(backend: Backend) -> None:
    """Each layer doing several steps, as here, or each step doing all layers, as an engine does."""
    if backend.slow:
        pytest.skip("the interpreter runs one launch after the other, and takes 40 s for a round; the torch backend does 20")
    rounds = script(20, 5)
    one, other = Chain(backend), Chain(backend)
    for steps in rounds:
        one.load(steps)
        one.launch()
        other.load(steps)
        for key, plans in other.plans.items():
            for k, plan in enumerate(plans):
                plan.update(other.starts[k], other.ends[k])
                for how, some in other.layers[key]:
                    other.call(how, some, plan, k)
    one.check_errors()
    same(one.contents(), other.contents())
    assert all(c.cache.storage.any() for c in one.compressors if c.spec.ratio == 4)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_a_chain_of_dependent_launches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 rounds of 4 steps over 10 layers; all but the first launch of each plan are dependents."""
    dependents: list[bool] = []
    rule = launch.use_pdl

    def counted(*args: object) -> bool:
        dependents.append(rule(*args))
        return dependents[-1]

    monkeypatch.setattr(launch, "use_pdl", counted)
    want = run(GPU, 60, False, seed)
    assert not any(dependents)
    dependents.clear()
    for pdl in (True, None):
        same(run(GPU, 60, pdl, seed), want)
    if dispatch.supports_pdl(GPU.device):
        assert sum(dependents) / 2 >= 200


@pytest.mark.gpu
def test_a_chain_in_a_cuda_graph() -> None:
    """The same launches, plan updates among them, recorded once and replayed with other lengths, slots, pages and tokens."""
    rounds = script(30, 7)
    found = []
    for pdl in (False, True):
        chain = Chain(GPU, pdl=pdl)
        chain.load(rounds[0])
        chain.launch()  # compiles, and does the first round
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain.launch()
        for steps in rounds[1:]:
            chain.load(steps)
            graph.replay()
        torch.cuda.synchronize()
        chain.check_errors()
        found.append(chain.contents())
    same(*found)
    eager = Chain(GPU, pdl=True)
    for steps in rounds:
        eager.load(steps)
        eager.launch()
    same(eager.contents(), found[0])


class Plan:
    """As much of a plan as the rule looks at."""

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh


@pytest.mark.parametrize("supported", [False, True])
def test_the_rule(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch after an update is an ordinary one, whoever it is; later ones depend unless the caller says no."""
    monkeypatch.setattr(launch, "supports_pdl", lambda device: supported)
    device = torch.device("cpu")
    for wanted in (None, True):
        plan = Plan(fresh=True)
        assert [launch.use_pdl(wanted, plan, device) for _ in range(3)] == [False, supported, supported]
        plan.fresh = True  # the next update
        assert [launch.use_pdl(wanted, plan, device) for _ in range(2)] == [False, supported]
    plan = Plan(fresh=True)
    assert not launch.use_pdl(False, plan, device)  # it was the first launch all the same
    assert launch.use_pdl(True, plan, device) == supported
    one, other = Plan(fresh=True), Plan(fresh=True)  # each plan for itself
    assert [launch.use_pdl(None, plan, device) for plan in (one, other, one, other)] == [False, False, supported, supported]


def test_no_gpu_has_no_dependents() -> None:
    assert not dispatch.supports_pdl(torch.device("cpu"))
    assert not kvfold.StepPlan.fresh  # a plan that was updated by no kernel waits for none


@pytest.mark.gpu
def test_every_update_makes_a_plan_fresh() -> None:
    chain = Chain(GPU)
    for key, plans in chain.plans.items():
        for k, plan in enumerate(plans):
            assert plan.fresh  # built, and not used
            chain.call(*chain.layers[key][0], plan, k)
            assert not plan.fresh
            plan.update(chain.starts[k], chain.ends[k])
            assert plan.fresh
