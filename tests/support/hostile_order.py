"""Calls around a spoiled one: good and refused ones before it, and transforms of torch inside of which it is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from support.hostile_world import HostileWorld
from torch import Tensor

from kvfold import EntryCache, StepPlan

Given = dict[str, Any]


def _call(world: HostileWorld, given: Given) -> None:
    world.function.call(given)


def _refused(world: HostileWorld, given: Given) -> None:
    """The same with something that is nothing of the kind."""
    for name in [name for name in world.function.arguments if name != world.function.own][:2]:
        with contextlib.suppress(TypeError, ValueError):
            world.function.call({**given, name: object()})


def _update(world: HostileWorld, given: Given) -> None:
    """Another step: the last sequence alone."""
    plan = given.get("plan")
    if isinstance(plan, StepPlan):
        plan.update(plan.start_pos.clone(), torch.tensor([0, 0, 0, 3], dtype=torch.int32, device=plan.start_pos.device))


def _update_nonsense(world: HostileWorld, given: Given) -> None:
    plan = given.get("plan")
    if isinstance(plan, StepPlan):
        ends = torch.tensor([5, -7, 1 << 30, 2], dtype=torch.int32, device=plan.start_pos.device)
        plan.update(torch.full_like(plan.start_pos, -9), ends)


def _update_refused(world: HostileWorld, given: Given) -> None:
    plan = given.get("plan")
    if isinstance(plan, StepPlan):
        with contextlib.suppress(TypeError, ValueError):
            plan.update(plan.start_pos, plan.start_pos)


def _other_objects(world: HostileWorld, given: Given) -> None:
    """The same with objects and weights that are gone afterwards."""
    others = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and name in world.leaves:
            others[name] = value.clone()
        elif isinstance(value, EntryCache):
            scales = None if value.scales is None else value.scales.clone()
            others[name] = EntryCache(
                value.storage.clone(), value.format, value.rows_per_page, value.spec, scales=scales, scale=value.scale
            )
    world.function.call(others)


def _other_plan(world: HostileWorld, given: Given) -> None:
    """The same with a plan that is gone afterwards."""
    if isinstance(given.get("plan"), StepPlan):
        world.function.call({**given, "plan": world.plan()})


BEFORE: dict[str, Callable[[HostileWorld, Given], None]] = {
    "a good call": _call,
    "a refused call": _refused,
    "an update": _update,
    "an update with nonsense": _update_nonsense,
    "a refused update": _update_refused,
    "a call with other tensors": _other_objects,
    "a call with another plan": _other_plan,
}


def _inside_vmap(call: Callable[[Tensor], None], x: Tensor) -> None:
    def run(one: Tensor) -> Tensor:
        call(one)
        return one

    torch.vmap(run)(x.detach()[None])


def _inside_functionalize(call: Callable[[Tensor], None], x: Tensor) -> None:
    def run(one: Tensor) -> Tensor:
        call(one)
        return one.clone()

    torch.func.functionalize(run)(x.detach())


def _inside_grad(call: Callable[[Tensor], None], x: Tensor) -> None:
    def run(one: Tensor) -> Tensor:
        call(one)
        return one.sum()

    torch.func.grad(run)(x.detach())


def _inside_jvp(call: Callable[[Tensor], None], x: Tensor) -> None:
    def run(one: Tensor) -> Tensor:
        call(one)
        return one.clone()

    torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))


def _inside_inference_mode(call: Callable[[Tensor], None], x: Tensor) -> None:
    with torch.inference_mode():
        call(x)


INSIDE: dict[str, Callable[[Callable[[Tensor], None], Tensor], None]] = {
    "vmap": _inside_vmap,
    "functionalize": _inside_functionalize,
    "grad": _inside_grad,
    "jvp": _inside_jvp,
    "inference mode": _inside_inference_mode,
}
