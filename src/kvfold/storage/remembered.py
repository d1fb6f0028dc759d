"""What calls are made with again and again, and what is remembered of it, so that the next call is cheap."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor

from ..arguments.checks import check_type
from ..arguments.overlap import NO_ROOM, Place, check_apart, join_bounds

MOST_PLANS = 16  # remembered of a layer: an engine has one for each size of its graphs


def where(tensors: Sequence[torch.Tensor]) -> list:
    """Where tensors are. On a CPU, where a call takes long, also their dtypes, sizes and strides, which may change in place."""
    if tensors and tensors[0].is_cpu:
        return [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in tensors]
    return [x.data_ptr() for x in tensors]


class Checked:
    """Base of states, caches, snapshots and plans: checked whole when made, and again when something about them changed.

    Attributes:
        _token: stands for the attributes as they were checked; None where one was set since, or where nobody made the object.
        _tensors: all memory that it stands for.
        _watched, _addresses: those that every call looks for, and where they were; no list for `FakeTensor`s. Dtypes, sizes and
            strides that a tensor changes in place are seen on a CPU alone: on a GPU it keeps them while the object has it.
    """

    _token: object | None = None
    _tensors: tuple[torch.Tensor, ...] = ()
    _watched: tuple[torch.Tensor, ...] = ()
    _addresses: list | None = None
    _made_by = "allocate"
    _unchecked: tuple[str, ...] = ()  # attributes that no check looks at

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if not name.startswith("_") and name not in self._unchecked:
            object.__setattr__(self, "_token", None)

    def __getstate__(self) -> dict[str, object]:
        """What copies and pickles take: they are checked again."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_token", "_tensors", "_watched", "_addresses")}

    def _check(self) -> None:
        """Checks the attributes together and sets `_tensors`. Raises TypeError and ValueError, which name an attribute."""
        raise NotImplementedError

    def _validate(self) -> None:
        self._check()
        self._watched = self._watch()
        fake = any(isinstance(x, FakeTensor) for x in self._tensors)
        self._addresses = None if fake else where(self._watched)
        self._token = object()

    def _watch(self) -> tuple[torch.Tensor, ...]:
        return self._tensors


def check_made(name: str, value: object, kind: type[Checked]) -> None:
    """An object of this kind, whose attributes fit together and whose memory is there."""
    if not isinstance(value, kind):
        check_type(name, value, kind)
    elif value._token is None or value._addresses != where(value._watched):
        _check_again(name, value, kind)


def _check_again(name: str, value: Checked, kind: type[Checked]) -> None:
    try:
        value._validate()
    except AttributeError as error:
        raise ValueError(f"{name} must be made by {kind.__name__}.{kind._made_by}: {error}") from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if value._addresses is None:
        raise TypeError(f"{name} must be of real tensors like the others, got FakeTensors")


class Remembering(Checked):
    """Base of what remembers its calls. What it remembers is of its own tensors, by address: a copy begins without it."""

    def _forget(self) -> None:
        """Sets everything remembered to what it is before the first call; all of it, and nothing else."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, object]:
        blank = object.__new__(type(self))
        blank._forget()
        return {**super().__getstate__(), **blank.__dict__}


class RememberingState(Remembering):
    """A state, over which calls of one layer are made again and again."""

    _layer: Layer | None = None  # what the last call got with this state

    def _forget(self) -> None:
        self._workspaces: list = []  # scratch of the kernels, made once and kept for the next call: backend_triton/launch.py
        self._recorded: list = []  # the same for calls that made theirs while they were recorded in a CUDA graph
        self._forget_calls()

    def _forget_calls(self) -> None:
        """All but the scratch, which recorded CUDA graphs go on using."""
        self._chosen: tuple | None = None  # the kernel of the last call: backend_triton/launch.py
        self._layer = None
        self._pair: tuple = (None, None)  # `_layer` of both states of the last launch of two


def _nothing() -> None:
    """The reference to a weight that was not given."""


class Layer:
    """What a state, or the cache of a `store`, gets in every step: other objects and weights, and where all of it is.

    It is checked once, and again when an object has another token or a weight is not the same tensor at the same address and of
    the same dtype: a module that is cast twice may come back to its first address.
    """

    __slots__ = ("bounds", "dtypes", "plans", "tokens", "weights", "where")

    def __init__(self, tokens: tuple, weights: Sequence[torch.Tensor | None], places: Sequence[Place]) -> None:
        """Raises ValueError, which names two of `places` that share memory."""
        self.tokens = tokens
        # Weak: a layer must not keep the weights of a caller alive.
        self.weights = [_nothing if x is None else weakref.ref(x) for x in weights]
        self.dtypes = [None if x is None else x.dtype for x in weights]
        self.where = where([x for x in weights if x is not None])
        self.bounds = check_apart(places)
        self.plans: dict[int, Met] = {}

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


class Met:
    """A layer and a plan together: what their tensors span, and the room between it where those of the last call lay.

    prepared: what their last call launched: backend_triton/launch.py.
    """

    __slots__ = ("bounds", "device", "kv_score", "other", "prepared", "rows", "rows_in_bf16", "token", "where")

    device: torch.device
    rows_in_bf16: bool  # so that kv_score must be, too

    def __init__(self, token: object, bounds: list[int]) -> None:
        self.token, self.bounds = token, bounds
        self.where: list = []  # all tensors of the last call but `kv_score` and `rows`
        self.kv_score = self.rows = self.other = NO_ROOM
        self.prepared: Any = None
