"""Objects that many calls share, and what is remembered about them, so that the next call need not check them again."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensor

from ..arguments.checks import check_type, name_of
from ..arguments.overlap import Place, check_apart, join_bounds

_set = object.__setattr__
MOST_PLANS = 16  # remembered of a layer: an engine has one for each size of its graphs


def where(tensors: Sequence[torch.Tensor]) -> list:
    """Where tensors are. On a CPU, where a call takes long, also their dtypes, sizes and strides, which may change in place."""
    if tensors and tensors[0].is_cpu:
        return [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]
    return [x.data_ptr() for x in tensors]


def dtype_name(x: torch.Tensor) -> str:
    """A tensor's dtype as `bfloat16`."""
    return str(x.dtype).removeprefix("torch.")


def row_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of one slot or page of these tensors, whose first dimension counts them."""
    return sum(math.prod(x.shape[1:]) * x.element_size() for x in tensors)


class Checked:
    """Base of states, caches, snapshots and plans: checked as a whole when made, and again after a change.

    Attributes:
        _token: identifies the attributes as they were checked; None after one was set, or if no constructor ran.
        _tensors: all memory that the object covers.
        _watched, _addresses: the tensors whose addresses every call compares, and these addresses; None for `FakeTensor`s. On
            a CPU also dtypes, sizes and strides are compared. On a GPU a tensor must keep them while the object holds it.
    """

    _token: object | None = None
    _tensors: tuple[torch.Tensor, ...] = ()
    _watched: tuple[torch.Tensor, ...] = ()
    _addresses: list | None = None
    _watched_on_gpu = True
    _made_by = "allocate"
    _unchecked: tuple[str, ...] = ()  # attributes that no check looks at

    def __setattr__(self, name: str, value: object) -> None:
        _set(self, name, value)
        if name[0] != "_" and name not in self._unchecked and self._token is not None:
            _set(self, "_token", None)

    def __repr__(self) -> str:
        """One line about the object, without reading any tensor's contents; for a half-built object, what is known."""
        known: list[str] = []
        try:
            for name, value in self._facts():
                known.append(f"{name}={value}")
        except Exception as error:  # whatever is missing or of a wrong type: a debugger prints it all the same
            known.append(f"and it is not whole: {' '.join(str(error).split())}")
        return f"{type(self).__name__}({', '.join(known)})"

    def _facts(self) -> Iterator[tuple[str, object]]:
        """What `__repr__` tells, known from attributes, shapes and dtypes alone."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, object]:
        """What copies and pickles take along: nothing that is remembered, as they have memory of their own."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _check(self) -> None:
        """Checks the attributes together and sets `_tensors`. Raises TypeError and ValueError, which name an attribute."""
        raise NotImplementedError

    def _watch(self) -> tuple[torch.Tensor, ...]:
        """The tensors whose memory must stay where it is."""
        return self._tensors

    def _validate(self) -> None:
        self._check()
        self._watched = self._watch() if self._watched_on_gpu or not self._tensors[0].is_cuda else ()
        fake = any(isinstance(x, FakeTensor) for x in self._tensors)
        self._addresses = None if fake else where(self._watched)
        self._token = object()


def check_made(name: str, value: object, kind: type[Checked]) -> None:
    """Raises unless `value` is of this kind, its attributes fit together and its memory is there."""
    check_type(name, value, kind)
    if value._token is not None and value._addresses == where(value._watched):
        return
    try:
        value._validate()
    except AttributeError as error:
        raise ValueError(f"{name} must be made by {name_of(kind)}.{kind._made_by}: {error}") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if value._addresses is None:
        raise TypeError(f"{name} must be of real tensors like the others, got FakeTensors")


class RememberingState(Checked):
    """A state: it remembers what the calls of its layer have in common."""

    _workspaces: list  # scratch of the kernels, made once and kept for the next call: backend_triton/launch.py
    _recorded: list  # the same for calls that made theirs while they were recorded in a CUDA graph
    _chosen: tuple | None = None  # the kernel of the last call: backend_triton/launch.py
    _layer: Layer | None = None  # what the last call got with this state
    _pair: tuple = (None, None)  # `_layer` of both states of the last launch of two

    def __setstate__(self, attributes: dict[str, object]) -> None:
        vars(self).update(attributes)
        self._forget()

    def _forget(self) -> None:
        """Sets everything remembered to what it is before the first call."""
        self._workspaces, self._recorded = [], []
        self._forget_calls()

    def _forget_calls(self) -> None:
        """All but the scratch, which recorded CUDA graphs go on using."""
        self._chosen, self._layer, self._pair = None, None, (None, None)


class Layer:
    """What comes with a state, or with the cache of a `store`, in every step: other objects, weights, and all addresses.

    It is checked once, and again if an object has another token, or a weight is another tensor, address or dtype. (A module
    that is cast twice may come back to its first address.)
    """

    __slots__ = ("bounds", "dtypes", "plans", "prepared", "tokens", "weights", "where")

    def __init__(self, tokens: tuple, weights: Sequence[torch.Tensor | None], places: Sequence[Place]) -> None:
        """Raises ValueError, which names two of `places` that share memory."""
        self.tokens = tokens
        # Weak: a layer must not keep the weights of a caller alive.
        self.weights = [(lambda: None) if x is None else weakref.ref(x) for x in weights]
        self.dtypes = [None if x is None else x.dtype for x in weights]
        self.where = where([x for x in weights if x is not None])
        self.bounds = check_apart(places)
        self.plans: dict[int, Met] = {}
        self.prepared: Any = None  # what the last call without a plan launched: backend_triton/launch.py

    def same(self, tokens: tuple, weights: tuple[torch.Tensor | None, ...]) -> bool:
        given = self.given(weights)
        # Their lengths differ where a weight died that is now None.
        return self.tokens == tokens and given is not None and self.where == where(given)

    def given(self, weights: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor] | None:
        """Those of `weights` that are there; None where one is another tensor than before, or of another dtype."""
        found = []
        for known, dtype, x in zip(self.weights, self.dtypes, weights):  # noqa: B905 (every call comes here)
            if known() is not x:
                return None
            if x is not None:
                if x.dtype is not dtype:
                    return None
                found.append(x)
        return found

    def met(self, plan: Checked) -> Met | None:
        """What is known of this plan as it is now."""
        known = self.plans.get(id(plan))
        return known if known is not None and known.token is plan._token else None

    def meet(self, plan: Checked, places: Callable[[], list[Place]]) -> Met:
        """Remembers a plan. Raises ValueError where it shares memory with the layer; `places` are of both."""
        both = join_bounds(self.bounds, plan._bounds)
        if both is None:
            both = check_apart(places())
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        known = self.plans[id(plan)] = Met(plan._token, both)
        return known


@dataclass(slots=True, eq=False)
class Met:
    """A layer and a plan together: the memory that their tensors span, and the gaps in which the last call's tensors lay."""

    token: object
    bounds: list[int]
    where: list = field(default_factory=list)  # all tensors of the last call but its tokens and `Outputs`
    rooms: dict[str, tuple[int, int]] = field(default_factory=dict)  # by the names of arguments
    device: torch.device | None = None
    rows_in_bf16: bool = False  # so that kv_score must be, too
    counted: tuple = (None, (), 0, 0)  # how many tokens the last call had, and what follows: backend_triton/launch.py
    prepared: Any = None  # what the last call launched: backend_triton/launch.py
