"""One hostile call as plain data, and how one is drawn from a seed and its number in the run."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from support.helpers import Backend
from support.hostile_order import BEFORE, INSIDE
from support.hostile_plain import PLAIN, WORDS
from support.hostile_tensors import IN_PLACE, SAME_ADDRESS, TENSORS
from support.hostile_values import COMPRESSORS, CONTENTS, SPECS, TWINS, VALUES, objects_for, other_objects
from support.hostile_world import FUNCTIONS, HostileWorld
from torch import Tensor


class Spoil(NamedTuple):
    """One argument and what becomes of it.

    when: `"made"`: a leaf, before the objects of the call are built. `"given"`: an argument, after that. `"assigned"`: an
        attribute of an object among the arguments. `"later"`: a leaf itself, which objects and earlier calls know.
    target: by dotted name. how: a family below. what: one of the family, by name. seed: of what is random in it.
    """

    when: str
    target: str
    how: str
    what: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.target} ({self.when}): {self.how} {self.what!r}"


class Case(NamedTuple):
    """A function, the kind of its state, calls that come before, and one or two spoiled arguments."""

    function: str
    kind: str
    before: tuple[str, ...]
    spoils: tuple[Spoil, ...]

    def __str__(self) -> str:
        first = f" after {', '.join(self.before)}" if self.before else ""
        return f"{self.function} over {self.kind}{first}; " + "; ".join(map(str, self.spoils))


# Public attributes of objects that a caller can replace. What stands in the plan's own tensors is kvfold's to write.
ATTRIBUTES = {
    "plan": ("errors", "entry_slots", "state_slots", "snapshot_table", "cache_block_table", "items", "num_items", "entry_items",
             "cu_entries", "start_pos", "cu_seqlens"),
    "state": ("rows", "positions", "kv", "score"),
    "cache": ("storage", "scales", "pages", "scale_pages"),
    "snapshots": ("rows", "positions"),
    "packing": ("pieces", "cu_entries"),
}  # fmt: skip
CALLERS = ("errors", "entry_slots", "state_slots", "snapshot_table", "cache_block_table", "rows", "positions", "kv", "score",
           "storage", "scales", "pages")  # fmt: skip
WEIGHTS = {
    "compress": 22, "project_compress": 9, "project_compress, fp8": 6, "compress_many": 9, "store": 13, "store, placed": 10,
    "restore": 12, "StepPlan.update": 13,
    "EntryCache.read": 8, "EntryCache.raw": 3, "EntryCache.from_blocks": 6, "Snapshots.of": 4, "FoldState.history_of": 2,
    "mark_static": 2, "check": 1.2, "dump": 0.5, "check, placed": 0.6, "dump, placed": 0.3,
    "training.compress": 9, "training.compress, two": 5, "compress_backward": 7, "Packing.build": 4,
}  # fmt: skip

# What is to be seen on the interpreter, and on a GPU beside that; the rest is the same on every backend.
ON_THE_DEVICE = ("StepPlan.update", "EntryCache.read", "Snapshots.of", "check", "Packing.build")
LAUNCHING = ("compress", "project_compress", "project_compress, fp8", "compress_many", "store", "store, placed", "restore",
             "training.compress", "training.compress, two", "compress_backward")  # fmt: skip
PLAIN_SHARE, LATER_SHARE = 0.15, 0.08


def _plain(rng: random.Random) -> Case:
    """One of a function without tensors; `how` is also a list of a value, or a pair of it."""
    function = rng.choice(list(PLAIN))
    targets = rng.sample(list(PLAIN[function][1]), k=rng.choice((1, 1, 2)))
    spoils = []
    for target in targets:
        how = rng.choices(("value", "object", "word", "several", "pairs"), (6, 1, 3, 1, 1))[0]
        what = rng.choice({"object": objects_for(target), "word": list(WORDS)}.get(how, list(VALUES)))
        spoils.append(Spoil("given", target, how, what))
    return Case(function, "", (), tuple(spoils))


def draw(world_of: Callable[[str, str], HostileWorld], rng: random.Random, backend: Backend) -> Case:
    """`world_of(function, kind)` is its world, of which only the names and types of arguments are looked at."""
    everything = backend == ("torch", torch.device("cpu"))
    if everything and rng.random() < PLAIN_SHARE:
        return _plain(rng)
    functions = tuple(WEIGHTS) if everything else LAUNCHING if backend.slow else (*LAUNCHING, *ON_THE_DEVICE)
    function = rng.choices(functions, [WEIGHTS[name] for name in functions])[0]
    kind = rng.choice(FUNCTIONS[function].kinds)
    world = world_of(function, kind)
    if rng.random() < LATER_SHARE:
        tensors = [name for name in world.taken if isinstance(world.good[name], Tensor)]
        ways = [way for way in IN_PLACE if backend.device.type == "cpu" or way not in SAME_ADDRESS]
        spoil = Spoil("later", rng.choice(tensors), "in place", rng.choice(ways))
        return Case(function, kind, ("a good call",) if rng.random() < 0.8 else ("a refused call",), (spoil,))
    before = tuple(rng.choices(list(BEFORE), k=rng.choice((1, 1, 2)))) if rng.random() < 0.3 else ()
    spoils = tuple(_spoil(world, rng) for _ in range(rng.choice((1, 1, 2))))
    inside = [spoil for spoil in spoils if spoil.how == "inside"]
    if len({spoil.target for spoil in spoils}) == 1 or inside:
        spoils = tuple(inside[:1]) or spoils[:1]
    return Case(function, kind, before if not function.startswith(("check", "dump")) else (), spoils)


def _spoil(world: HostileWorld, rng: random.Random) -> Spoil:
    objects = [name for name in world.function.arguments if name.split(".")[-1] in ATTRIBUTES and name not in world.good]
    when = rng.choices(("made", "given", "assigned"), (6, 3, 2 if objects else 0))[0]
    if when == "made":
        target = rng.choice(world.taken)
        if target.split(".")[-1] == "spec" and rng.random() < 0.6:
            return Spoil(when, target, "spec", rng.choice(list(SPECS)))
        return Spoil(when, target, *_way(world, rng, isinstance(world.good[target], Tensor), target))
    if when == "given":
        target = rng.choice(world.function.arguments)
        last = target.split(".")[-1]
        if last == "compressors":
            return Spoil(when, target, "compressors", rng.choice(list(COMPRESSORS)))
        if last == "spec" and rng.random() < 0.6:
            return Spoil(when, target, "spec", rng.choice(list(SPECS)))
        if last in ("state", "cache", "snapshots") and rng.random() < 0.4:
            return Spoil(when, target, "other object", rng.choice(list(other_objects(last, world.spec, world.backend.device))))
        if target in world.good:
            return Spoil(when, target, *_way(world, rng, isinstance(world.good[target], Tensor), target))
        how = rng.choice(("value", "object", "twin", "argument"))
        what = rng.choice(
            list({"value": VALUES, "object": objects_for(target), "twin": TWINS}.get(how) or world.function.arguments)
        )
        return Spoil(when, target, how, what)
    target = rng.choice(objects)
    attribute = rng.choice(ATTRIBUTES[target.split(".")[-1]])
    way = _way(world, rng, True, target)
    if attribute not in CALLERS and way[0] == "contents":
        way = ("tensor", rng.choice(list(TENSORS)), way[2])
    if attribute not in CALLERS and way[0] == "memory of":
        way = (*way[:2], way[2] | 1)  # with its own contents
    return Spoil(when, f"{target}.{attribute}", *way)


def _way(world: HostileWorld, rng: random.Random, tensor: bool, target: str) -> tuple[str, str, int]:
    seed = rng.randrange(1 << 16)
    if not tensor:
        how = rng.choices(("value", "object", "argument"), (8, 1, 1))[0]
    else:
        how = rng.choices(
            ("tensor", "contents", "memory of", "value", "argument", "inside", "object"), (9, 7, 4, 1, 1, 1, 0.3)
        )[0]
    tensors = [name for name in world.taken if isinstance(world.good[name], Tensor) and name != target]
    choices = {
        "value": VALUES, "object": objects_for(target), "tensor": TENSORS, "contents": ("one number", "one number", *CONTENTS),
        "memory of": tensors, "argument": world.taken, "inside": INSIDE,
    }[how]  # fmt: skip
    return (how, rng.choice(list(choices)), seed) if choices else ("value", rng.choice(list(VALUES)), seed)
