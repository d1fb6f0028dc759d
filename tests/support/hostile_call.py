"""Makes one hostile call and says how it ended; anything but a result, a count or an error by name is a fault."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from support.helpers import Backend
from support.hostile_cases import Case, Spoil, draw
from support.hostile_facts import disagreement
from support.hostile_order import BEFORE, INSIDE
from support.hostile_outcome import Outcome, judge, last_line
from support.hostile_plain import ACCEPTED, PLAIN
from support.hostile_tensors import IN_PLACE, TENSORS, plain
from support.hostile_values import COMPRESSORS, OBJECTS, SPECS, TWINS, VALUES, other_objects, rewrite
from support.hostile_world import HostileWorld, has_memory, tensors_of
from torch import Tensor

from kvfold import StepPlan
from kvfold.training import Packing

SLOW = 5.0  # seconds of a call over a handful of tokens, on a machine that has other work too
ATTEMPTS = 50
AGREEING = ("compress", "compress_many", "store", "store, placed", "restore", "check", "dump", "check, placed",
            "dump, placed", "training.compress", "training.compress, two", "compress_backward")  # fmt: skip


class Inapplicable(Exception):
    """A spoil that its target cannot have, such as int32 as a quantized tensor."""


@cache
def world_of(function: str, kind: str, backend: Backend) -> HostileWorld:
    return HostileWorld(function, kind, backend)


def call(seed: int, index: int, backend: Backend, begun: Callable[[Case], None] = lambda case: None) -> Outcome:
    """Call number `index` of the run with this seed; `begun` is told the case before it is made."""
    for attempt in range(ATTEMPTS):
        case = draw(lambda *key: world_of(*key, backend), random.Random(f"{seed} {index} {attempt}"), backend)
        begun(case)
        try:
            return run(case, backend)
        except Inapplicable:
            continue
    raise AssertionError(f"nothing applicable was drawn for call {index} of seed {seed}")


def run(case: Case, backend: Backend) -> Outcome:
    """One case. Where other tensors of the same values were given, the results are those of the good ones."""
    if case.function in PLAIN:
        return _run_plain(case)
    world = world_of(case.function, case.kind, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, results = _attempt(case, world, clean=False)
        if found.word == "slow":  # the first of its kind may import half of torch
            found, results = _attempt(case, world, clean=False)
        hows = {spoil.how for spoil in case.spoils}
        if found.fault or found.word == "refused" or hows == {"contents"} or undefined(results):
            return found
        if "memory of" in hows and (len(case.spoils) > 1 or case.kind == "window"):
            return found  # what is written through one shows in the other; pools and pages may share memory, unchecked
        if case.kind == "window" and backend.device.type == "cuda" and hows & {"tensor", "memory of", "in place"}:
            return found  # addresses and strides choose the order of sums there: see `WindowState`
        later = {spoil.target for spoil in case.spoils if spoil.when == "later"}
        if later:
            good, unchanged = _attempt(case._replace(spoils=()), world, clean=True)
            others = {name: value for name, value in unchanged.items() if name not in later}
            if good.word == found.word and _differing(results, others) is None:
                return found  # what changed is not what the call uses
        want, expected = _attempt(case, world, clean=True)
    if want.fault or want.word != found.word:
        return Outcome(case, "wrong result", f"{found.word}; with plain tensors of the same values {want.word}: {want.text}")
    name = _differing(results, expected)
    return found if name is None else Outcome(case, "wrong result", f"{name} is not what plain tensors of the same values give")


def _differing(results: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first result that is not as expected."""
    for name, value in expected.items():
        if name != "duplicates" and not _same(results.get(name), value):
            return name
    return None


def _run_plain(case: Case) -> Outcome:
    function, good = PLAIN[case.function]
    given = dict(good)
    for spoil in case.spoils:
        how, what = spoil.how, spoil.what
        one = what if how == "word" else OBJECTS[what]() if how == "object" else VALUES[what]
        given[spoil.target] = [one] if how == "several" else (one, one) if how == "pairs" else one
    start = time.perf_counter()
    try:
        function(**given)
    except RuntimeError as error:
        if case.function not in ACCEPTED or ACCEPTED[case.function] not in str(error):
            return judge(case, error)
    except Exception as error:
        return judge(case, error)
    taken = time.perf_counter() - start
    return Outcome(case, "slow", f"{taken:.1f} s") if taken > SLOW else Outcome(case, "ok")


def _attempt(case: Case, world: HostileWorld, clean: bool) -> tuple[Outcome, dict[str, Any]]:
    world.reset()
    made = _Call(case, world, clean)
    try:
        made.prepare()
    except Inapplicable:
        raise
    except Exception as error:
        return Outcome(case, f"fault before: {type(error).__name__}", last_line(error)), {}
    start = time.perf_counter()
    try:
        made.run()
    except Inapplicable:
        raise
    except Exception as error:
        found = judge(case, error)
        if not found.fault and world.changed():
            found = Outcome(case, "written before an error", found.text)
        return found, {}
    taken = time.perf_counter() - start
    if taken > SLOW and world.backend == ("torch", torch.device("cpu")):
        return Outcome(case, "slow", f"{taken:.1f} s"), {}
    stray = world.stray(made.written())
    if stray:
        return Outcome(case, "bytes outside", f"{len(stray)} bytes, the first at {stray[0]} of the arena"), {}
    differ = disagreement(case.function, made.given) if case.function in AGREEING else None
    if differ is not None:
        return Outcome(case, "accepted, though two differ", differ), {}
    try:
        results = made.results()
    except Exception as error:
        return Outcome(case, "accepted and unreadable", f"{type(error).__name__}: {last_line(error)}"), {}
    return Outcome(case, "counted" if made.errors() else "ok"), results


class _Call:
    """A case over a world. clean: every tensor that a spoil makes is replaced by a plain one of the same values."""

    def __init__(self, case: Case, world: HostileWorld, clean: bool) -> None:
        self.case, self.world, self.clean = case, world, clean
        self.given: dict[str, Any] = {}
        self.result: Any = None

    def prepare(self) -> None:
        """The calls before, and the leaves."""
        world = self.world
        for spoil in self.case.spoils:
            if spoil.when == "later":
                world.leaves[spoil.target] = world.beside(world.leaves[spoil.target])
        if self.case.before:
            self.given = world.make(world.function.arguments)
            for name in self.case.before:
                BEFORE[name](world, self.given)
        for spoil in self.case.spoils:
            if spoil.when == "later":
                self._change_in_place(spoil)
            if spoil.when == "made" and spoil.how != "inside":
                world.leaves[spoil.target] = self._spoiled(spoil, world.leaves.get(spoil.target), world.leaves)
        world.mark()

    def _change_in_place(self, spoil: Spoil) -> None:
        world, tensor = self.world, self.world.leaves[spoil.target]
        world.aside = [(x, y) for x, y in world.aside if x is not tensor]
        try:
            IN_PLACE[spoil.what](tensor)
        except (RuntimeError, TypeError, IndexError):
            raise Inapplicable from None
        world.leaves[spoil.target] = plain(tensor) if self.clean else tensor
        if has_memory(tensor):
            world.watch([tensor])

    def run(self) -> None:
        inside = next((spoil for spoil in self.case.spoils if spoil.how == "inside"), None)
        if inside is None or self.clean:
            self._make_and_call()
            return
        value = self.world.leaves.get(inside.target)
        if not isinstance(value, Tensor) or (inside.what in ("grad", "jvp") and not value.is_floating_point()):
            raise Inapplicable

        def call(one: Tensor) -> None:
            self.world.leaves[inside.target] = one
            self._make_and_call()

        INSIDE[inside.what](call, value)

    def _make_and_call(self) -> None:
        world, names = self.world, self.world.function.arguments
        changed = [spoil.target for spoil in self.case.spoils if spoil.when == "made" or spoil.how == "inside"]
        changed += [spoil.target for spoil in self.case.spoils if spoil.when == "later" and self.clean]
        stale = [n for n in names if not self.case.before or any(t == n or t.startswith(n + ".") for t in changed)]
        self.given |= world.make(stale)
        plan = self.given.get("plan")
        if type(plan) is StepPlan:  # what it made for itself is not in the arena
            world.watch(x for x in vars(plan).values() if has_memory(x))
        for spoil in self.case.spoils:
            if spoil.how == "inside" or spoil.when in ("made", "later"):
                continue
            holder, key = self._place(spoil)
            old = holder[key] if isinstance(holder, dict) else getattr(holder, key, None)
            new = self._spoiled(spoil, old, self.given)
            if key == world.function.own and type(new) is not type(old):
                raise Inapplicable  # the method of another class, if there is one
            if isinstance(holder, dict):
                holder[key] = new
            else:
                setattr(holder, key, new)
        world.mark()
        self.result = world.function.call(self.given)

    def _place(self, spoil: Spoil) -> tuple[Any, str]:
        if spoil.when == "given":
            return self.given, spoil.target
        name, _, attribute = spoil.target.rpartition(".")
        holder = self.given[name]
        if not isinstance(getattr(holder, attribute, None), Tensor):
            raise Inapplicable
        return holder, attribute

    def _spoiled(self, spoil: Spoil, old: Any, others: dict[str, Any]) -> Any:
        """What takes the place of `old`; tensors of its `contents` are written in place."""
        how, what = spoil.how, spoil.what
        if how == "value":
            return VALUES[what]
        if how == "object":
            return OBJECTS[what]()
        if how == "argument":
            return others.get(what)
        if how == "spec":
            return replace(self.world.spec, **SPECS[what])
        if how == "other object":
            return other_objects(spoil.target.split(".")[-1], self.world.spec, self.world.backend.device)[what]()
        if how == "compressors":
            return COMPRESSORS[what]
        if how == "twin":
            try:
                return TWINS[what](old)
            except (TypeError, ValueError):  # a copy of what another spoil broke
                raise Inapplicable from None
        if type(old) is not Tensor or not has_memory(old):
            raise Inapplicable
        try:
            if how == "contents":
                if old.device.type == "meta" or not old.is_contiguous():
                    raise Inapplicable
                rewrite(old.detach(), what, spoil.seed)
                return old
            new = (
                self._in_memory_of(old, self.world.leaves.get(what), spoil)
                if how == "memory of"
                else self._transformed(old, what)
            )
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError):
            raise Inapplicable from None
        return plain(new) if self.clean else new

    def _transformed(self, old: Tensor, what: str) -> Any:
        new = TENSORS[what](self.world, old)
        if new is old or (what == "far expanded" and self.world.function.world == "read"):
            raise Inapplicable  # the same, or a request for what takes terabytes, which is the caller's business
        return new

    def _in_memory_of(self, old: Tensor, other: Any, spoil: Spoil) -> Tensor:
        """A tensor like `old` that begins in `other`; half of them with its contents written there."""
        world, size = self.world, old.element_size()
        if not isinstance(other, Tensor) or other.untyped_storage().data_ptr() != world.arena.untyped_storage().data_ptr():
            raise Inapplicable
        start = other.storage_offset() * other.element_size()
        start += spoil.seed % 4 * 16 if other.nbytes > 64 else 0
        if start % size or start + old.nbytes > len(world.arena):
            raise Inapplicable
        values = old.detach().clone()
        new = world.arena[start : start + old.nbytes].view(old.dtype).view(old.shape)
        return new.copy_(values) if spoil.seed % 2 else new

    # After the call

    def written(self) -> list[Tensor]:
        """What the call may write; of a plan its errors, and in `update` all that it made for itself."""
        function, plan = self.world.function, self.given.get("plan")
        found = [tensor for name in function.written for tensor in tensors_of(name, self.given.get(name)).values()]
        if type(plan) is StepPlan:
            own = tensors_of("plan", plan)
            if getattr(plan, "cache_block_table", None) is None:
                own.pop("plan.entry_slots", None)
            found += own.values() if function.own == "plan" else [own[name] for name in own if name == "plan.errors"]
        return found

    def results(self) -> dict[str, Any]:
        """Bits of all that the call writes or returns."""
        found: dict[str, Any] = {"result": self.result}
        if isinstance(self.result, dict):
            found = dict(self.result)
        names = (*self.world.function.written, "plan")
        for name in names:
            found |= tensors_of(name, self.given.get(name))
        plan = self.given.get("plan")
        if (
            type(plan) is StepPlan
            and all(has_memory(getattr(plan, x, None)) for x in ("num_items", "items"))
            and plan.num_items.numel() == 1
        ):
            found["plan.items"] = found["plan.items"][: int(plan.num_items)]
            if plan.reserved is False and isinstance(plan.entry_slots, Tensor) and has_memory(plan.cu_entries):
                # A place of no entry says nothing; in slots that are copied, as strided ones are, it is -1.
                found["plan.entry_slots"] = plan.entry_slots[: int(plan.cu_entries[-1])]
            found["duplicates"] = _duplicates(plan)
        if self.world.function.world == "restore":
            found["duplicates"] = _twice(self.given["slots"])
        packing = self.given.get("packing")
        if type(packing) is Packing and _readable(packing.pieces):
            found["duplicates"] = _uneven(packing)
        return {name: plain(value) for name, value in found.items()}

    def errors(self) -> int:
        holder = self.given.get("errors", getattr(self.given.get("plan"), "errors", 0))
        return int(holder) if has_memory(holder) and holder.numel() == 1 else 0


def undefined(results: dict[str, Any]) -> bool:
    """Two sequences in one slot, entries in one cache slot, pages in one snapshot, or pieces that no `Packing.build` made: the
    documents call that undefined."""
    return bool(results.get("duplicates"))


def _twice(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or not _readable(tensor) or tensor.numel() < 2 or tensor.is_complex():
        return False
    known = tensor[tensor >= 0].tolist()
    return len(set(known)) < len(known)


def _duplicates(plan: StepPlan) -> bool:
    tables = (plan.state_slots, plan.entry_slots, plan.snapshot_table, plan.cache_block_table, *(plan.block_tables or ()))
    return any(_twice(x) for x in tables)


def _uneven(packing: Packing) -> bool:
    """Whether a token is in no piece, or in two."""
    seen = torch.zeros(packing.tokens, dtype=torch.int32)
    for token, window, rest, _ in packing.pieces.tolist():
        seen[max(token, 0) : max(token, 0) + (packing.ratio if window >= 0 else max(rest, 0))] += 1
    return bool((seen != 1).any())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if not (_readable(a) and _readable(b)):  # what was not looked at, as the call succeeded with it
            return True
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
    return isinstance(a, Tensor) == isinstance(b, Tensor) and (isinstance(a, Tensor) or a == b)


def _readable(x: Tensor) -> bool:
    return has_memory(x) and x.numel() <= 1 << 24
