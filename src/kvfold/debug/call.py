"""A call as a value: its arguments, checked; copies of what it writes, which kernels cannot tell from the originals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments.checks import check_dtype, check_type, traced
from ..calls.checks import check_compress, check_many, check_placed, check_store, compressors_of
from ..compress import compress, compress_many
from ..contract import UnsupportedError
from ..plan import StepPlan
from ..storage.cache import EntryCache
from ..storage.fold_state import FoldState
from ..storage.mean_state import MeanState
from ..storage.snapshots import Snapshots
from ..storage.step import Compressor, Outputs, Placed
from ..storage.window_state import WindowState
from ..store import other_caches, store
from .compare import UNWRITTEN

History = Sequence[Tensor | None] | None  # of `check`: `full_history`


class Places(NamedTuple):
    """Where the rows of a `store` without a plan go; the arguments are its own."""

    slots: Tensor | None = None
    positions: Tensor | None = None
    also: Sequence[EntryCache] = ()
    errors: Tensor | None = None


NOWHERE = Places()


@dataclass
class Call:
    """One call of `compress`, `compress_many` or `store`.

    Attributes:
        name: of the function.
        compressors: of `store` one without state for each of its caches, whose `kv_score` are the pooled rows.
        plan: None of a `store` without one, which has `places` instead.
        rows, latent: of `compress`: where pooled and normed rows go, or None.
        backend: the chosen one.
        room: places of entries that what it writes has; None: as many as the plan.
    """

    name: str
    compressors: tuple[Compressor, ...]
    plan: StepPlan | None
    rows: Tensor | None
    backend: str
    pdl: bool | None = None
    latent: Tensor | None = None
    places: Places | None = None
    room: int | None = None

    @classmethod
    def of(
        cls, given: Compressor, plan: StepPlan | EntryCache | None, out: Outputs, backend: str | None, at: Places = NOWHERE
    ) -> Call:
        """From the arguments of any of the three, which tell them apart. Raises what the call itself would."""
        placed = isinstance(plan, EntryCache) or (plan is None and at.slots is not None)
        if not placed:
            _leave_out(at._replace(also=at.also or None)._asdict(), "with a plan")
        if placed:
            call = cls._placed(given, plan, out, at)
        elif _are_compressors(given.kv_score):
            _leave_out(given._asdict() | {"kv_score": None} | out._asdict(), "when compressors are given")
            call = cls("compress_many", tuple(compressors_of(given.kv_score)), plan, None, "")
        elif isinstance(given.state, EntryCache):
            surplus = {"cache": given.cache, "ape": given.ape, "snapshots": given.snapshots}
            _leave_out(surplus | out._asdict(), "for a store")
            call = cls("store", (given._replace(state=None, cache=given.state),), plan, None, "")
        else:
            call = cls("compress", (given,), plan, out.rows, "", latent=out.latent)
        call.backend = call.check(backend)
        if any(isinstance(c.state, MeanState) for c in call.compressors):
            why = "nothing says of which position a row is; compare the call with that of a FoldState"
            raise UnsupportedError(f"state must be a FoldState or a WindowState for check and dump, got MeanState: {why}")
        return call

    @classmethod
    def _placed(cls, given: Compressor, plan: StepPlan | EntryCache | None, out: Outputs, at: Places) -> Call:
        """Of a `store` without a plan: its cache stands in the plan's place, or has its name."""
        cache = given.cache if plan is None else plan
        surplus = {"cache": None if plan is None else given.cache, "state": given.state, "ape": given.ape}
        _leave_out(surplus | {"snapshots": given.snapshots} | out._asdict(), "for a store without a plan")
        made = [given._replace(state=None, cache=one) for one in (cache, *other_caches(at.also))]
        return cls("store", tuple(made), None, None, "", places=at)

    @property
    def placed(self) -> Placed:
        """What `store` without a plan is given."""
        c, at = self.compressors[0], self.places
        caches = tuple(one.cache for one in self.compressors)
        return Placed(c.kv_score, at.slots, at.positions, caches, c.spec, c.norm_weight, c.rope, at.errors)

    @property
    def device(self) -> torch.device:
        return self.compressors[0].device

    @property
    def errors(self) -> Tensor | None:
        """What it counts refusals in."""
        return self.places.errors if self.plan is None else self.plan.errors

    def check(self, backend: str | None) -> str:
        """Checks the arguments as the call does, and returns the backend to use."""
        c = self.compressors[0]
        if self.places is not None:
            return check_placed(self.placed, backend)
        if self.name == "compress_many":
            return check_many(self.compressors, self.plan, backend)
        if self.name == "store":
            chosen = check_store(c, self.plan, backend)
            self.room = self.plan.room(c.kv_score)
            return chosen
        chosen = check_compress(c, self.plan, Outputs(self.rows, self.latent), backend)
        self.room = self.plan.room(self.rows, self.latent)
        return chosen

    def run(self) -> None:
        """Makes the call."""
        how, c = {"backend": self.backend, "pdl": self.pdl}, self.compressors[0]
        weights = {"spec": c.spec, "norm_weight": c.norm_weight, "rope": c.rope}
        if self.name == "compress_many":
            compress_many(self.compressors, self.plan, **how)
        elif self.places is not None:
            caches, at = [one.cache for one in self.compressors], self.places
            where = {"slots": at.slots, "positions": at.positions, "also": caches[1:], "errors": at.errors}
            store(c.kv_score, caches[0], **where, **weights, **how)
        elif self.name == "store":
            store(c.kv_score, self.plan, c.cache, **weights, **how)
        else:
            weights |= {"ape": c.ape, "rows": self.rows, "latent": self.latent, "snapshots": c.snapshots}
            compress(c.kv_score, self.plan, c.state, c.cache, **weights, **how)

    def on_copies(self, rows: torch.dtype | None, backend: str) -> Call:
        """The call, made on copies; its `errors` count from 0, and rows of entries that are not made keep `UNWRITTEN`."""
        made = tuple(map(_copy, self.compressors))
        if self.places is not None:
            errors = torch.zeros(1, dtype=torch.int32, device=self.device)
            new = replace(self, compressors=made, places=self.places._replace(errors=errors), backend=backend)
            new.run()
            return new
        plan, out = copy_plan(self.plan), []
        for dtype in (rows, None if self.latent is None else torch.bfloat16):
            room = plan.entry_capacity if self.room is None else self.room
            shape, (integers, fill) = (room, made[0].spec.head_dim), UNWRITTEN.get(dtype, (None, 0))
            full = None if dtype is None else torch.full(shape, fill, dtype=integers, device=plan.items.device).view(dtype)
            out.append(full)
        new = replace(self, compressors=made, plan=plan, rows=out[0], latent=out[1], backend=backend)
        new.run()
        return new

    def alone(self, i: int) -> Call:
        """`compress` of compressor i by itself, which has the same bits."""
        return replace(self, name="compress", compressors=(self.compressors[i],), rows=None, latent=None)


def _are_compressors(given: object) -> bool:
    """Whether this is what `compress_many` takes, and not tokens, which may be two tensors."""
    several = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    return several and not (len(given) > 0 and all(isinstance(x, Tensor) for x in given))


def _leave_out(arguments: dict[str, object], why: str) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise TypeError(f"{name} must be left out {why}, got {type(value).__name__}")


def _copy(c: Compressor) -> Compressor:
    state, cache, snapshots = c.state, c.cache, c.snapshots
    if isinstance(state, FoldState):
        state = FoldState(state.spec, _twin(state.rows), _twin(state.positions), state.max_new_tokens, state.round_inputs)
    elif isinstance(state, WindowState):
        state = WindowState(_twin(state.kv), _twin(state.score))
    if cache is not None:
        scales = None if cache.scale_pages is None else _twin(cache.scale_pages)
        cache = EntryCache(_twin(cache.pages), cache.format, cache.rows_per_page, cache.spec, scales=scales, scale=cache.scale)
    if snapshots is not None:
        copies = _twin(snapshots.rows), _twin(snapshots.positions)
        snapshots = Snapshots(snapshots.spec, *copies, snapshots.page_size)
    return c._replace(state=state, cache=cache, snapshots=snapshots)


def copy_plan(plan: StepPlan) -> StepPlan:
    """A plan with tensors of its own, whose `errors` count from 0."""
    new = copy.copy(plan)
    for name, x in vars(plan).items():
        if isinstance(x, Tensor):
            setattr(new, name, _twin(x))  # how its kernels read a tensor depends on how it lies
    new.block_tables = plan.block_tables and tuple(map(_twin, plan.block_tables))
    new.fresh = True
    new.errors.zero_()
    return new


def _twin(x: Tensor) -> Tensor:
    return put(laid_out(x.shape, x.stride(), x.data_ptr() % 16, x.dtype, x.device), x)


def put(made: Tensor, contents: Tensor) -> Tensor:
    """Writes into a tensor whose rows may overlap: as they do where the contents are from, of which each has its place."""
    if len(made) > 1 and made.stride(0) < made[0].numel():
        for row, values in zip(made, contents, strict=True):
            row.copy_(values)
        return made
    return made.copy_(contents)


def spread_of(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """The outer stride that `laid_out` gives a tensor, and the elements that it spans."""
    if 0 in shape:
        return stride[0], 0
    outer, *inner = stride
    span = 1 + sum((n - 1) * s for n, s in zip(shape[1:], inner, strict=True))
    if outer > span:  # what lies apart stays so, as numbers that do have a kernel of their own
        outer = span + ((outer - span) % 16 or 16)
    return outer, span + (shape[0] - 1) * outer


def laid_out(shape: Sequence[int], stride: Sequence[int], address: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of which address and strides are, mod 16, what kernels are chosen by; gaps between pages shrink."""
    outer, elements = spread_of(shape, stride)
    if elements == 0:
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = elements * dtype.itemsize
    flat = torch.zeros(size + 16, dtype=torch.uint8, device=device)
    return flat[address : address + size].view(dtype).as_strided(shape, (outer, *stride[1:]))


def check_history(history: History, call: Call) -> None:
    """Checks `full_history`, of a call whose other arguments were checked."""
    if history is None:
        return
    if call.name != "compress":
        raise TypeError(f"full_history must be left out for {call.name}, got {type(history).__name__}")
    plan, spec = call.plan, call.compressors[0].spec
    if isinstance(history, (Tensor, str)) or not isinstance(history, Sequence) or len(history) != plan.batch:
        raise ValueError(f"full_history must have a tensor or None for each of the plan's {plan.batch} sequences")
    for b, (start, one) in enumerate(zip(plan.start_pos.tolist(), history, strict=True)):
        if one is not None:
            check_type(f"full_history[{b}]", one, Tensor)
            check_dtype(f"full_history[{b}]", one, (torch.float32, torch.bfloat16))
            if tuple(one.shape) != (start, spec.kv_score_width):
                raise ValueError(f"full_history[{b}] must be [{start}, {spec.kv_score_width}], got {list(one.shape)}")


def check_outside(name: str, kv_score: object) -> None:
    """That a call which synchronizes with the host is neither traced nor captured."""
    first = kv_score[0] if isinstance(kv_score, (tuple, list)) and kv_score else kv_score
    first = first[0] if isinstance(first, tuple) and first else first
    if traced(first):
        raise RuntimeError(f"{name} must be called outside of torch.compile and of fake tensors")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name} must be called outside of a CUDA graph's capture: before a replay, with its contents")
