"""Good calls, spoiled: a `Case` says how, as plain data, and `World` holds the tensors of a call in one guarded arena.

They lie between canary bytes. After a call, a refused one above all, every byte of the arena that is
not of an element which the call may write must be as before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from support.helpers import CANARY, Backend, Weights, make_tokens
from torch import Tensor

import kvfold
from kvfold import CompressorSpec, EntryCache, FoldState, Snapshots, StepPlan, WindowState

ARENA, GAP = 1 << 21, 256
TOP, BOTTOM, LONG_TOP, LONG_BOTTOM = (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, -(1 << 63)
_OVERLAP, _PLAIN = CompressorSpec(64, 4, overlap=True, rope_dim=16), CompressorSpec(32, 16, rope_dim=16, hadamard=True)
# By the kind of state: the spec, the cache's format, of which the first has a buffer for scales, and the plan's bound on new
# tokens, which chooses the kernel.
KINDS = {
    "rows": (_OVERLAP, "mxfp4", 8),
    "rows, long steps": (_OVERLAP, "bf16", 4096),
    "fold": (_PLAIN, "bf16", 8),
    "fold, long steps": (_PLAIN, "fp32", 4096),
    "window": (_OVERLAP, "fp8_tensor", 8),
}
STARTS, LENGTHS, SLOTS, PAGE, ROWS_PER_PAGE, MOST = (0, 12, 18), (5, 5, 7), 4, 4, 4, 18
CALLS = ("compress", "many", "store", "place", "restore", "update", "check", "read")


class Change(NamedTuple):
    """One argument, by its dotted name, and what becomes of it."""

    argument: str
    how: str
    what: Any = None


class Case(NamedTuple):
    """A call, the kind of state of its compressor, and one to three changes."""

    call: str
    kind: str
    changes: tuple[Change, ...]


class World:
    """The arguments of a good call by dotted names, with all tensors in one arena.

    Sequence b has slot b, and `STARTS[b]` tokens in its state; slot 3 is nobody's.
    """

    def __init__(self, kind: str, call: str, backend: Backend) -> None:
        self.kind, self.call, self.backend = kind, call, backend
        self.spec, self.fmt, self.max_new_tokens = KINDS[kind]
        self.arena = torch.full((ARENA,), CANARY, dtype=torch.uint8, device=backend.device)
        self.used = GAP
        self.leaves: dict[str, Any] = {}
        many = ("0.", "1.") if call == "many" else ("",)
        for prefix in many:
            self._compressor(prefix, self.spec)
        self._plan()
        self.leaves |= {"backend": backend.name, "pdl": None}
        self._own(call)

    def put(self, tensor: Tensor) -> Tensor:
        """A copy in the arena, behind canaries."""
        size = tensor.numel() * tensor.element_size()
        assert self.used + size + GAP <= ARENA
        place = self.arena[self.used : self.used + size].view(tensor.dtype).view(tensor.shape)
        self.used += -(-(size + GAP) // GAP) * GAP
        return place.copy_(tensor)

    def ints(self, *values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return self.put(torch.tensor(values, dtype=dtype))

    def _compressor(self, prefix: str, spec: CompressorSpec) -> None:
        found: dict[str, Any] = {"spec": spec}
        weights = Weights.make(spec, max_positions=64)
        found |= {name: self.put(getattr(weights, name)) for name in ("ape", "norm_weight", "rope")}
        tokens = make_tokens(spec, sum(LENGTHS) + 2, seed=1)
        found["kv_score"] = self.put(tokens)
        # The state as an earlier step left it.
        before = torch.cat([make_tokens(spec, start, seed=2) for start in STARTS])
        ends = torch.tensor([0, *STARTS]).cumsum(0).int()
        zeros, slots = torch.zeros(3, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
        if self.kind == "window":
            state = WindowState.allocate(spec, 3 * 10, PAGE)
            state.kv.fill_(torch.nan), state.score.fill_(torch.nan)
            table = torch.arange(30, dtype=torch.int32).view(3, 10)
            plan = StepPlan.build(spec.ratio, zeros, ends, 18, block_tables=(table, table), page_size=PAGE)
        else:
            state = FoldState.allocate(spec, SLOTS, 8)
            plan = StepPlan.build(spec.ratio, zeros, ends, 18, state_slots=slots)
        weights_of = {"spec": spec, "ape": weights.ape, "norm_weight": None, "rope": None}
        kvfold.compress(before, plan, state, None, **weights_of, backend="torch")
        if self.kind == "window":
            found |= {"state.kv": self.put(state.kv), "state.score": self.put(state.score)}
        else:
            found |= {"state.rows": self.put(state.rows), "state.positions": self.put(state.positions)}
            found["state.max_new_tokens"] = 8
            kept = Snapshots.allocate(spec, 6, 8)
            found |= {"snapshots.rows": self.put(kept.rows), "snapshots.positions": self.put(kept.positions)}
            found["snapshots.page_size"] = 8
        cache = EntryCache.allocate(self.fmt, 8, ROWS_PER_PAGE, spec)
        found |= {"cache.storage": self.put(cache.storage), "cache.fmt": self.fmt}
        found |= {"cache.rows_per_page": ROWS_PER_PAGE, "cache.scale": 1.0}
        found["cache.scales"] = None if cache.scales is None else self.put(cache.scales)
        self.leaves |= {prefix + name: value for name, value in found.items()}

    def _plan(self) -> None:
        ratio = self.spec.ratio
        found = {
            "plan.ratio": ratio,
            "plan.start_pos": self.ints(*STARTS),
            "plan.cu_seqlens": self.put(torch.tensor([0, *LENGTHS]).cumsum(0).int()),
            "plan.max_new_tokens": self.max_new_tokens,
            "plan.max_tokens": MOST,
        }
        if self.kind == "window":
            found["plan.block_tables.0"] = self.put(torch.arange(30, dtype=torch.int32).view(3, 10))
            found["plan.block_tables.1"] = self.put(torch.arange(30, dtype=torch.int32).view(3, 10))
            found["plan.page_size"] = PAGE
            found["plan.entry_slots"] = self.put(torch.arange(12))
        else:
            found["plan.state_slots"] = self.ints(0, 1, 2)
            found["plan.cache_block_table"] = self.put(torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 7]], dtype=torch.int32))
            found["plan.rows_per_page"] = ROWS_PER_PAGE
            found["plan.snapshot_table"] = self.put(torch.tensor([[0], [1], [2]], dtype=torch.int32))
            found["plan.snapshot_page_size"] = 8
        self.leaves |= found

    def _own(self, call: str) -> None:
        """What only this call takes."""
        spec, leaves = self.spec, self.leaves
        if call in ("compress", "store", "check"):
            # E: the slots, or as `StepPlan.build` reckons with a block table.
            count = 12 if self.kind == "window" else min(3 * -(-self.max_new_tokens // spec.ratio), MOST // spec.ratio + 3)
            leaves["rows"] = self.put(torch.ones(count, spec.head_dim))
        if call == "place":
            leaves["rows"] = self.put(torch.ones(5, spec.head_dim))
            leaves |= {"slots": self.ints(7, -1, 0, 31, 12, dtype=torch.int64), "positions": self.ints(0, 9, 63, 5, 5)}
            leaves["errors"] = self.ints(0)
        if call == "restore":
            leaves["snapshots.positions"].view(-1, leaves["snapshots.positions"].shape[1])[0].copy_(
                torch.arange(8 - leaves["snapshots.positions"].shape[1], 8)
            )
            leaves |= {
                "slots": self.ints(3, -1),
                "pages": self.ints(0, 1),
                "start_pos": self.ints(8, 0),
                "errors": self.ints(0),
            }
        if call == "update":
            leaves |= {"start_pos": self.ints(1, 2, 3), "cu_seqlens": self.ints(0, 4, 4, 9)}
        if call == "read":
            leaves |= {"slots": self.put(torch.tensor([0, 5, 31])), "slot": 3}

    def names(self) -> list[str]:
        """The arguments that this call takes."""
        prefixes = {
            "store": ("rows", "plan", "cache", "spec", "norm_weight", "rope", "backend", "pdl"),
            "place": ("rows", "slots", "positions", "errors", "cache", "spec", "norm_weight", "rope", "backend", "pdl"),
            "read": ("cache", "slot"),
        }
        prefixes |= {"restore": ("state", "snapshots", "slots", "pages", "start_pos", "errors", "backend", "spec")}
        prefixes["update"] = ("plan", "start_pos", "cu_seqlens")
        wanted = prefixes.get(self.call)
        return sorted(
            n for n in self.leaves if wanted is None or n.split(".")[0].rstrip("s") in {w.rstrip("s") for w in wanted}
        )

    # Objects of their arguments. What is not None in `whole` takes the place of an object.

    def _make(self, kind: Callable[..., Any], prefix: str, **more: Any) -> Any:
        if prefix in self.leaves:
            return self.leaves[prefix]
        found = {n.removeprefix(prefix + "."): v for n, v in self.leaves.items() if n.startswith(prefix + ".")}
        if "block_tables.0" in found:
            found["block_tables"] = found.pop("block_tables.0"), found.pop("block_tables.1")
        return kind(**found, **more)

    def _spec_of(self, prefix: str) -> Any:
        return self.leaves[prefix + "spec"]

    def compressor(self, prefix: str = "") -> list[Any]:
        """`(kv_score, state, cache, spec, ape, norm_weight, rope, snapshots)`."""
        spec, found = self._spec_of(prefix), self.leaves
        return [
            found[prefix + "kv_score"],
            self.state(prefix),
            self._make(EntryCache, prefix + "cache", spec=spec),
            spec,
            *(found[prefix + name] for name in ("ape", "norm_weight", "rope")),
            self.snapshots(prefix),
        ]

    def state(self, prefix: str = "") -> Any:
        if self.kind == "window":
            return self._make(WindowState, prefix + "state")
        return self._make(FoldState, prefix + "state", spec=self._spec_of(prefix))

    def snapshots(self, prefix: str = "") -> Any:
        return None if self.kind == "window" else self._make(Snapshots, prefix + "snapshots", spec=self._spec_of(prefix))

    def plan(self) -> Any:
        return self._make(StepPlan.build, "plan")

    def run(self) -> int:
        """Makes the call; returns the errors that it counted."""
        found, how = self.leaves, {"backend": self.leaves["backend"]}
        if self.call in ("compress", "check"):
            kv_score, state, cache, spec, ape, norm_weight, rope, snapshots = self.compressor()
            plan = self.plan()
            named = {"spec": spec, "ape": ape, "norm_weight": norm_weight, "rope": rope, "rows": found["rows"], **how}
            if self.call == "check":
                kvfold.check(kv_score, plan, state, cache, **named)
            else:
                kvfold.compress(kv_score, plan, state, cache, **named, snapshots=snapshots, pdl=found["pdl"])
        elif self.call == "many":
            both, plan = [tuple(self.compressor(prefix)) for prefix in ("0.", "1.")], self.plan()
            kvfold.compress_many(both, plan, **how, pdl=found["pdl"])
        elif self.call == "store":
            cache, plan = self._make(EntryCache, "cache", spec=found["spec"]), self.plan()
            named = {name: found[name] for name in ("spec", "norm_weight", "rope", "pdl")}
            kvfold.store(found["rows"], plan, cache, **named, **how)
        elif self.call == "place":
            cache = self._make(EntryCache, "cache", spec=found["spec"])
            named = {name: found[name] for name in ("slots", "positions", "errors", "spec", "norm_weight", "rope", "pdl")}
            kvfold.store(found["rows"], cache, **named, **how)
            return int(found["errors"])
        elif self.call == "restore":
            arguments = [found[name] for name in ("slots", "pages", "start_pos", "errors")]
            kvfold.restore(self.state(), self.snapshots(), *arguments, **how)
            return int(found["errors"])
        elif self.call == "update":
            plan = self.plan()
            plan.update(found["start_pos"], found["cu_seqlens"])
        else:
            cache = self._make(EntryCache, "cache", spec=found["spec"])
            cache.read(found["slots"])
            cache.raw(found["slot"])
            return 0
        return int(plan.errors)

    def written(self) -> list[Tensor]:
        """What the call may write, of its arguments."""
        prefixes = {
            "compress": ("state", "cache", "snapshots", "rows"), "many": ("0.state", "1.state", "0.cache", "1.cache",
            "0.snapshots", "1.snapshots"), "store": ("cache",), "place": ("cache", "errors"), "restore": ("state", "errors"),
        }.get(self.call, ())  # fmt: skip
        return [v for n, v in self.leaves.items() if isinstance(v, Tensor) and n.startswith(prefixes or "nothing")]


def change(world: World, one: Change) -> None:
    """Changes one argument in place of the good one."""
    value = world.leaves[one.argument]
    how, what = one.how, one.what
    if how == "be":
        world.leaves[one.argument] = what
    elif not _plain(world, value):  # another change was here before
        return
    elif how == "set" and value.numel():  # one number
        at, number = what
        if not value.dtype.is_floating_point:
            number = min(max(number, torch.iinfo(value.dtype).min), torch.iinfo(value.dtype).max)
        value.detach()[tuple(int(i) for i in torch.unravel_index(torch.tensor(at % value.numel()), value.shape))] = number
    elif how == "alias" and _plain(world, world.leaves[what]):  # the memory of another argument, and what lies behind it
        other = world.leaves[what]
        start, size = other.storage_offset() * other.element_size(), value.numel() * value.element_size()
        if start % value.element_size() == 0 and start + size <= ARENA:
            world.leaves[one.argument] = world.arena[start : start + size].view(value.dtype).view(value.shape)
    elif how in TRANSFORMS:
        world.leaves[one.argument] = TRANSFORMS[how](world, value)


def _plain(world: World, x: object) -> bool:
    plain = isinstance(x, Tensor) and x.layout == torch.strided and x.dtype not in (torch.bool, torch.complex64)
    return plain and x.untyped_storage().data_ptr() == world.arena.untyped_storage().data_ptr()


def _spaced(world: World, x: Tensor) -> Tensor:
    """Every element of the last dimension twice as far from the next."""
    return world.put(torch.stack([x, x], dim=-1))[..., 0]


def _strided(world: World, x: Tensor) -> Tensor:
    """The first dimension further apart, as a slice of something wider."""
    return world.put(torch.cat([x, x], dim=1))[:, : x.shape[1]] if x.dim() > 1 else _spaced(world, x)


def _expanded(world: World, x: Tensor) -> Tensor:
    return world.put(x[:1]).expand(x.shape) if x.dim() and x.shape[0] else x


def _turned(world: World, x: Tensor) -> Tensor:
    return world.put(x.transpose(0, -1).contiguous()).transpose(0, -1) if x.dim() > 1 else x


def _cast(dtype: torch.dtype) -> Callable[[World, Tensor], Tensor]:
    return lambda world, x: world.put(torch.zeros(x.shape, dtype=dtype))


def _with_gradient(world: World, x: Tensor) -> Tensor:
    return x.detach().requires_grad_() if x.dtype.is_floating_point else x


TRANSFORMS: dict[str, Callable[[World, Tensor], Tensor]] = {
    "spaced": _spaced,
    "strided": _strided,
    "expanded": _expanded,
    "turned": _turned,
    "with gradient": _with_gradient,
    "on meta": lambda world, x: x.to("meta"),
    "sparse": lambda world, x: torch.zeros(x.shape, dtype=x.dtype, device=x.device).to_sparse(),
    "without its first": lambda world, x: x[1:] if x.dim() else x,
    "empty": lambda world, x: x[:0] if x.dim() else x,
    "no columns": lambda world, x: x[:, :0] if x.dim() > 1 else x,
    "narrower": lambda world, x: x[..., :-1] if x.dim() else x,
    "longer": lambda world, x: world.put(torch.cat([x, x])) if x.dim() and x.element_size() * x.numel() < 1 << 18 else x,
    "one dimension more": lambda world, x: x[None],
    "one dimension less": lambda world, x: x[0] if x.dim() and x.shape[0] else x,
    "misaligned": lambda world, x: world.put(torch.cat([x.flatten()[:1], x.flatten()]))[1:].view(x.shape) if x.numel() else x,
    **{f"as {dtype}": _cast(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32,
                                                torch.int64, torch.uint8, torch.bool, torch.complex64)},
}  # fmt: skip


def run(case: Case, backend: Backend) -> str:
    """Makes the spoiled call; AssertionError where it fails otherwise than it should. Says how it ended."""
    world = World(case.kind, case.call, backend)
    words = {part for name in world.leaves for part in name.split(".")} | {"compressors", "state", "plan", "cache", "table"}
    words |= {"block_tables", "head_dim"}
    for one in case.changes:
        if one.argument in world.leaves:
            change(world, one)
    before = world.arena.clone()
    try:
        errors = world.run()
    except (TypeError, ValueError) as error:
        named = set(re.findall(r"\w+", str(error).split("\n")[0]))
        assert named & words, f"the error names no argument: {type(error).__name__}: {error}"
        assert torch.equal(world.arena, before), "a refused call wrote something"
        return "refused"
    may = torch.zeros_like(world.arena)
    for tensor in world.written():
        if tensor.device == may.device and tensor.numel() and tensor.layout == torch.strided:
            _cover(may, tensor.detach())
    wrong = ((world.arena != before) & (may == 0)).nonzero().flatten().tolist()
    assert not wrong, f"bytes {wrong[:8]} of the arena were written, which are no element of what is written"
    return "counted" if errors else "done"


def _cover(may: Tensor, tensor: Tensor) -> None:
    """Marks the bytes of a tensor of the arena."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    like = torch.empty(0, dtype=kind, device=may.device)
    like.set_(may.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()).fill_(1)
    like.fill_(-1 if kind != torch.uint8 else 255)
