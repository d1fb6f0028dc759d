"""The good call of each public function that takes tensors, with everything that it reads or writes in one guarded arena.

`HostileWorld` is `fuzz_support.World`, made once for a function and put back for each call. Its `leaves` are tensors and
numbers by dotted name; `make` builds from them what the function takes, by argument.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from support.fuzz_support import ARENA, GAP, KINDS, ROWS_PER_PAGE, World
from support.helpers import Backend
from torch import Tensor

import kvfold
from kvfold import EntryCache, FoldState, Snapshots, StepPlan, WindowState, training
from kvfold.contract import LEAST_HIDDEN, SCALE_BLOCK

OBJECTS = ("state", "cache", "snapshots", "plan")
COMPRESSOR = ("kv_score", "state", "cache", "spec", "ape", "norm_weight", "rope", "snapshots")
SPARE = 1 << 17  # bytes of the arena for tensors that a case lays out anew
NOT_GIVEN = ("state_slots", "entry_slots", "cache_block_table", "rows_per_page", "snapshot_table", "snapshot_page_size",
             "page_size")  # fmt: skip
FOLD_KINDS, ALL_KINDS, SHORT_KINDS = tuple(kind for kind in KINDS if kind != "window"), tuple(KINDS), ("rows", "fold")


class Function(NamedTuple):
    """A public function, or a method with its object as an argument.

    world: whose leaves it takes (`fuzz_support.CALLS`). arguments: their names. written: those that it may write. own: of a
        method, which of them is its object.
    """

    world: str
    kinds: tuple[str, ...]
    arguments: tuple[str, ...]
    call: Callable[[dict[str, Any]], Any]
    written: tuple[str, ...] = ()
    own: str = ""


def _named(given: dict[str, Any], *positional: str) -> tuple[list[Any], dict[str, Any]]:
    return [given[name] for name in positional], {name: value for name, value in given.items() if name not in positional}


def _compress(given: dict[str, Any]) -> None:
    positional, named = _named(given, "kv_score", "plan", "state", "cache")
    kvfold.compress(*positional, **named)


def _project(given: dict[str, Any]) -> None:
    positional, named = _named(given, "hidden", "weight", "plan", "state", "cache")
    kvfold.project_compress(*positional, **named)


def _project_fp8(given: dict[str, Any]) -> None:
    weight = kvfold.ScaledWeight(given["weight.codes"], given["weight.scales"])
    positional, named = _named(given, "hidden", "weight.codes", "weight.scales", "plan", "state", "cache")
    kvfold.project_compress(positional[0], weight, *positional[3:], **named)


def _many(given: dict[str, Any]) -> None:
    both = [tuple(given[f"{i}.{name}"] for name in COMPRESSOR) for i in (0, 1)]
    shape = given["compressors"]
    kvfold.compress_many(both if shape is None else shape(both), given["plan"], backend=given["backend"], pdl=given["pdl"])


def _store(given: dict[str, Any]) -> None:
    positional, named = _named(given, "rows", "plan", "cache")
    kvfold.store(*positional, **named)


def _place(given: dict[str, Any]) -> None:
    positional, named = _named(given, "rows", "cache")
    kvfold.store(*positional, **named)


def _restore(given: dict[str, Any]) -> None:
    positional, named = _named(given, "state", "snapshots", "slots", "pages", "start_pos", "errors")
    kvfold.restore(*positional, **named)


def _check(given: dict[str, Any]) -> None:
    positional, named = _named(given, "kv_score", "plan", "state", "cache")
    kvfold.check(*positional, **named)


def _dump(given: dict[str, Any]) -> None:
    """Into a file of its own, and from there again, if it was written."""
    positional, named = _named(given, "kv_score", "plan", "state", "cache")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "call.safetensors")
        kvfold.dump(path, *positional, **named)
        kvfold.replay(path)


def _check_placed(given: dict[str, Any]) -> None:
    positional, named = _named(given, "rows", "cache")
    kvfold.check(*positional, **named)


def _dump_placed(given: dict[str, Any]) -> None:
    positional, named = _named(given, "rows", "cache")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "call.safetensors")
        kvfold.dump(path, *positional, **named)
        kvfold.replay(path)


def _update(given: dict[str, Any]) -> None:
    StepPlan.update(given["plan"], given["start_pos"], given["cu_seqlens"])


def _read(given: dict[str, Any]) -> Tensor:
    return EntryCache.read(given["cache"], given["slots"])


def _raw(given: dict[str, Any]) -> dict[str, Tensor]:
    return EntryCache.raw(given["cache"], given["slot"])


def _from_blocks(given: dict[str, Any]) -> None:
    positional, named = _named(given, "view", "fmt", "spec")
    EntryCache.from_blocks(*positional, **named)


def _of(given: dict[str, Any]) -> Tensor:
    return Snapshots.of(given["snapshots"], given["positions"])


def _history(given: dict[str, Any]) -> range:
    return FoldState.history_of(given["state"], given["position"])


def _mark(given: dict[str, Any]) -> None:
    kvfold.ops.mark_static(*(value for value in given.values() if value is not None))


def _train(given: dict[str, Any]) -> dict[str, Tensor]:
    """Entries and latents, and if anything wants a gradient those, too."""
    named = dict(given)
    value, score, packing = named.pop("kv_score"), named.pop("score", None), named.pop("packing")
    results = training.compress(value if "score" not in given else (value, score), packing, **named)
    both = results if isinstance(results, tuple) else (results,)
    found = dict(zip(("entries", "latent"), both, strict=False))
    leaves = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.requires_grad and n not in ("rope", "cache_scale")}
    if leaves and all(x.requires_grad for x in both):
        gradients = torch.autograd.grad([x.sum() for x in both], list(leaves.values()))
        found |= {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}
    return found


def _train_backward(given: dict[str, Any]) -> dict[str, Any]:
    positional, named = _named(given, "d_entries", "kv_score", "packing", "kept")
    return training.compress_backward(*positional, **named)._asdict()


def _pack(given: dict[str, Any]) -> dict[str, Tensor]:
    positional, named = _named(given, "cu_seqlens", "tokens", "ratio")
    made = training.Packing.build(*positional, **named)
    return {"pieces": made.pieces, "cu_entries": made.cu_entries}


_HOW = ("backend", "pdl")
_TRAIN = ("packing", "spec", "ape", "norm_weight", "rope", "round_rows", "out_dtype", "fake_quant")
_PLACED = ("rows", "cache", "slots", "positions", "spec", "norm_weight", "rope", "errors")
_WRITTEN = ("state", "cache", "snapshots", "rows", "latent")
FUNCTIONS: dict[str, Function] = {
    "compress": Function("compress", ALL_KINDS, (*COMPRESSOR, "plan", "rows", "latent", *_HOW), _compress, _WRITTEN),
    "project_compress": Function(
        "compress", ALL_KINDS, ("hidden", "weight", *COMPRESSOR, "plan", "rows", "latent", "round_kv_score", *_HOW), _project,
        (*_WRITTEN, "kv_score"),
    ),
    "project_compress, fp8": Function(
        "compress", ALL_KINDS,
        ("hidden", "weight.codes", "weight.scales", *COMPRESSOR, "plan", "rows", "latent", "round_kv_score", *_HOW),
        _project_fp8, (*_WRITTEN, "kv_score"),
    ),
    "compress_many": Function(
        "many", FOLD_KINDS, ("compressors", *(f"{i}.{name}" for i in (0, 1) for name in COMPRESSOR), "plan", *_HOW), _many,
        tuple(f"{i}.{name}" for i in (0, 1) for name in ("state", "cache", "snapshots")),
    ),
    "store": Function("store", ALL_KINDS, ("rows", "plan", "cache", "spec", "norm_weight", "rope", *_HOW), _store, ("cache",)),
    "store, placed": Function(
        "place", ALL_KINDS, (*_PLACED, *_HOW), _place, ("cache", "errors"),
    ),
    "restore": Function(
        "restore", FOLD_KINDS, ("state", "snapshots", "slots", "pages", "start_pos", "errors", "backend"), _restore,
        ("state", "errors"),
    ),
    "StepPlan.update": Function("update", ALL_KINDS, ("plan", "start_pos", "cu_seqlens"), _update, own="plan"),
    "EntryCache.read": Function("read", ALL_KINDS, ("cache", "slots"), _read, own="cache"),
    "EntryCache.raw": Function("read", ALL_KINDS, ("cache", "slot"), _raw, own="cache"),
    "EntryCache.from_blocks": Function("read", ALL_KINDS, ("view", "fmt", "spec", "scales", "scale"), _from_blocks),
    "Snapshots.of": Function("read", FOLD_KINDS, ("snapshots", "positions"), _of, own="snapshots"),
    "FoldState.history_of": Function("read", FOLD_KINDS, ("state", "position"), _history, own="state"),
    "mark_static": Function("compress", ALL_KINDS, ("state", "cache", "plan", "snapshots", "rows"), _mark),
    "check": Function("check", ALL_KINDS, (*COMPRESSOR, "plan", "rows", "latent", "backend", "full_history"), _check),
    "dump": Function("compress", ALL_KINDS, (*COMPRESSOR, "plan", "rows", "latent", *_HOW), _dump),
    "check, placed": Function("place", ALL_KINDS, (*_PLACED, "backend"), _check_placed),
    "dump, placed": Function("place", ALL_KINDS, (*_PLACED, *_HOW), _dump_placed),
    "training.compress": Function(
        "train", SHORT_KINDS, ("kv_score", *_TRAIN, "cache_scale", "latent", "backend"), _train,
    ),
    "training.compress, two": Function(
        "train", SHORT_KINDS, ("kv_score", "score", *_TRAIN, "cache_scale", "latent", "backend"), _train,
    ),
    "compress_backward": Function(
        "train", SHORT_KINDS, ("d_entries", "kv_score", "kept", *_TRAIN, "d_latent", "backend"), _train_backward,
    ),
    "Packing.build": Function("train", SHORT_KINDS, ("cu_seqlens", "tokens", "ratio", "max_seqlen"), _pack),
}  # fmt: skip
# What a constructor alone takes is spoiled before it makes an object of any of the above: see `Spoil.when`.


class HostileWorld(World):
    """The world of one function and kind; `reset` puts every byte and leaf back.

    Attributes:
        leaves: what a case spoils; good: the same before that; taken: those that the function's arguments are made of.
    """

    def __init__(self, name: str, kind: str, backend: Backend) -> None:
        self.function = FUNCTIONS[name]
        super().__init__(kind, self.function.world, backend)
        if "slots" in self.leaves and self.function.world == "read":
            self.leaves |= {"positions": self.put(torch.tensor([0, 7, 12])), "position": 13}
        if "view" in self.function.arguments:
            pages, fmt = self.leaves["cache.storage"], self.leaves["cache.fmt"]
            self.leaves |= {"view": self.put(pages.reshape(len(pages), ROWS_PER_PAGE, -1)), "fmt": fmt, "scale": 1.0}
            self.leaves["scales"] = self.leaves["cache.scales"]
        for field in NOT_GIVEN:
            self.leaves.setdefault(f"plan.{field}", None)
        if "latent" in self.function.arguments and "rows" in self.leaves:
            self.leaves["latent"] = self.put(self.leaves["rows"].bfloat16())
        if "hidden" in self.function.arguments:
            self._project()
        if self.function.world == "check":
            self.leaves["full_history"] = None
        if self.function.world == "train":
            self._train()
        if self.function.world != "compress" and "rows" not in self.function.arguments:
            self.leaves.pop("rows", None)
        assert self.used + SPARE <= ARENA
        self.arena = self.arena[: self.used + SPARE]
        self._pristine, self.good, self._used = self.arena.clone(), dict(self.leaves), self.used
        self._before, self.aside = self.arena.clone(), []
        names = self.function.arguments
        self.taken = [n for n in self.leaves if n in names or any(n.startswith(name + ".") for name in names)]
        self.reset()

    def _project(self) -> None:
        """Hidden states in place of kv_score, which receives what is made of them."""
        count, columns = self.leaves["kv_score"].shape
        hidden, weight = torch.ones(count, LEAST_HIDDEN), torch.ones(columns, LEAST_HIDDEN) / 64
        self.leaves |= {"hidden": self.put(hidden.bfloat16())}
        if "weight" in self.function.arguments:
            self.leaves |= {"weight": self.put(weight.bfloat16())}
        else:
            scales = torch.full((-(-columns // SCALE_BLOCK), LEAST_HIDDEN // SCALE_BLOCK), 0.5)
            self.leaves |= {"weight.codes": self.put(weight.to(torch.float8_e4m3fn)), "weight.scales": self.put(scales)}
        self.leaves |= {"kv_score": self.put(torch.zeros(count, columns)), "round_kv_score": False}

    def _train(self) -> None:
        """Packed sequences of whole windows, tails and nothing, in place of a step."""
        good, spec, two = self.leaves, self.spec, "score" in self.function.arguments
        found = {name: good[name] for name in ("spec", "ape", "norm_weight", "rope", "backend")}
        rows = torch.cat([good["kv_score"]] * 3)[:50]
        parts = {"kv_score": rows[:, : spec.channels], "score": rows[:, spec.channels :]} if two else {"kv_score": rows}
        found |= {name: self.put(part.contiguous()) for name, part in parts.items()}
        cu_seqlens = self.ints(0, 9, 9, 41)
        own = {"cu_seqlens": cu_seqlens, "tokens": 50, "ratio": spec.ratio, "max_seqlen": 40}
        found |= own if self.function.call is _pack else {f"packing.{name}": value for name, value in own.items()}
        found |= dict.fromkeys(("round_rows", "out_dtype", "cache_scale", "d_latent")) | {"latent": False}
        found["fake_quant"] = "mxfp4" if self.kind == "rows" else None
        if "kept" in self.function.arguments:
            given = {name: found[name] for name in ("spec", "ape", "norm_weight", "rope", "fake_quant")}
            packing = training.Packing.build(cu_seqlens, 50, spec.ratio, max_seqlen=40)
            made = training.compress_forward(found["kv_score"], packing, **given, backend="torch")
            found |= {"kept": self.put(made.kept), "d_entries": self.put(torch.ones_like(made.entries))}
        self.leaves = {name: value for name, value in found.items() if name.split(".")[0] in self.function.arguments}

    def reset(self) -> None:
        self.arena.copy_(self._pristine)
        self.leaves, self.used, self.aside = dict(self.good), self._used, []

    def put(self, tensor: Tensor) -> Tensor:
        """A copy in the arena, or beside it where it is too large; a tensor without memory stays what it is."""
        size = tensor.numel() * tensor.element_size()
        if self.used + size + GAP > len(self.arena):
            return self.beside(tensor)
        return super().put(tensor.detach())

    def beside(self, tensor: Tensor) -> Tensor:
        """A copy with a storage of its own, which is watched like the arena."""
        copy = tensor.detach().to(self.backend.device, copy=True)
        self.aside.append((copy, copy.clone()))
        return copy

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Watches the storages of these too, as far as they are not the arena."""
        arena = self.arena.untyped_storage().data_ptr()
        self.aside += [(x, x) for x in tensors if x.untyped_storage().data_ptr() != arena]

    # Objects

    def make(self, names: Iterable[str]) -> dict[str, Any]:
        """These arguments, objects built from their leaves."""
        return {name: self._argument(name) for name in names}

    def _argument(self, name: str) -> Any:
        prefix, last = name.rpartition(".")[0], name.rpartition(".")[2]
        prefix += "." if prefix else ""
        if last == "plan":
            return self.plan()
        if last == "state":
            return self.state(prefix)
        if last == "snapshots":
            return self.snapshots(prefix)
        if last == "packing":
            return self._make(training.Packing.build, "packing")
        if last == "cache":
            return self._make(EntryCache, prefix + "cache", spec=self._spec_of(prefix))
        return self.leaves.get(name)

    # What was written

    def mark(self) -> None:
        """Remembers every byte as it is now."""
        with torch._C._DisableFuncTorch():
            self._before.copy_(self.arena)
            self.aside = [(tensor, _bytes(tensor)) for tensor, _ in self.aside]

    def changed(self) -> bool:
        """Whether any byte is another one than at `mark`."""
        return not torch.equal(self.arena, self._before) or any(
            not torch.equal(_bytes(tensor), before) for tensor, before in self.aside
        )

    def stray(self, written: Iterable[Tensor]) -> list[int]:
        """Bytes of the arena that changed since `mark` and are of no element of these."""
        different = self.arena != self._before
        if not different.any():
            return []
        may = torch.zeros_like(self.arena)
        for tensor in written:
            _cover(may, tensor, self.arena)
        return (different & (may == 0)).nonzero().flatten().tolist()


def has_memory(x: Any) -> bool:
    """Whether this is a tensor whose every element can be looked at: dense, of no transform, and within its storage."""
    if not isinstance(x, Tensor) or isinstance(x, torch.nn.parameter.UninitializedTensorMixin):
        return False
    if torch._is_functional_tensor(x) or torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_nested or x.is_quantized:
        return False
    if x.layout is not torch.strided or x.device.type == "meta" or x._is_zerotensor():
        return False
    try:
        behind = x.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return x.numel() == 0 or (behind * x.element_size() <= x.untyped_storage().nbytes() and x.data_ptr() != 0)
    except (RuntimeError, NotImplementedError):  # neither storage nor strides
        return False


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a storage; none of one that was freed."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone()


def _cover(may: Tensor, tensor: Tensor, arena: Tensor) -> None:
    """Marks the bytes of a tensor of the arena; others are not in it."""
    if not has_memory(tensor) or tensor.untyped_storage().data_ptr() != arena.untyped_storage().data_ptr():
        return
    size = tensor.element_size()
    at = torch.full(tensor.shape, tensor.storage_offset() * size, dtype=torch.int64, device=arena.device)
    for d, (count, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        steps = torch.arange(count, device=arena.device) * (stride * size)
        at += steps.view([-1 if i == d else 1 for i in range(tensor.dim())])
    for byte in range(size):
        may[at.flatten() + byte] = 1


def tensors_of(name: str, thing: Any) -> dict[str, Tensor]:
    """The tensors of an argument, by dotted name."""
    if isinstance(thing, Tensor):
        return {name: thing}
    fields = {
        FoldState: ("rows", "positions"), WindowState: ("kv", "score"), Snapshots: ("rows", "positions"),
        EntryCache: ("pages", "scale_pages"),
        StepPlan: ("start_pos", "cu_seqlens", "cu_entries", "items", "num_items", "entry_items", "entry_slots", "errors"),
    }.get(type(thing), ())  # fmt: skip
    found = {f"{name}.{field}": getattr(thing, field, None) for field in fields}
    return {field: value for field, value in found.items() if isinstance(value, Tensor)}
