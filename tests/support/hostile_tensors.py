"""Tensors that are not what they look like: views with a lazy sign, freed storages, tensors of transforms and of tracing.

Each takes a good tensor of a `HostileWorld` and gives another one of the same shape and, where that can be, of the same
values: so a call either refuses it by name or has the results of the good one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from support.fuzz_support import TRANSFORMS
from support.hostile_world import HostileWorld, has_memory
from torch import Tensor
from torch._subclasses import FakeTensorMode

Transform = Callable[[HostileWorld, Tensor], Any]


class Wrapper(Tensor):
    """A tensor without memory of its own: what it holds is another one."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [x.inner if isinstance(x, Wrapper) else x for x in args]
        return func(*args, **(kwargs or {}))


class Plain(Tensor):
    """A subclass with memory and without behaviour of its own."""


def _negated(world: HostileWorld, x: Tensor) -> Tensor:
    return world.put(-x)._neg_view()


def _conjugated(world: HostileWorld, x: Tensor) -> Tensor:
    return x.to(torch.complex64).conj()


def _imaginary(world: HostileWorld, x: Tensor) -> Tensor:
    return torch.complex(x.float(), -x.float()).conj().imag


def _freed(part: int) -> Transform:
    def free(world: HostileWorld, x: Tensor) -> Tensor:
        copy = x.detach().clone()
        copy.untyped_storage().resize_(copy.nbytes // part if part else 0)
        return copy

    return free


def _inference(world: HostileWorld, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return world.beside(x)


def _leaked(transform: Callable[..., Any]) -> Transform:
    """A tensor of a transform that has ended."""

    def leak(world: HostileWorld, x: Tensor) -> Tensor:
        found: list[Tensor] = []

        def keep(one: Tensor) -> Tensor:
            found.append(one)
            return one.sum()

        transform(keep)(x[None] if transform is torch.vmap else x.detach())
        return found[0]

    return leak


def _nested(layout: torch.layout) -> Transform:
    return lambda world, x: torch.nested.as_nested_tensor([row.clone() for row in x] or [x.clone()], layout=layout)


def _quantized(world: HostileWorld, x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint8)


def _overlapping(world: HostileWorld, x: Tensor) -> Tensor:
    """Rows that begin within the row before."""
    whole = world.put(x)
    return whole.as_strided(whole.shape, (1, *whole.stride()[1:])) if whole.dim() > 1 else whole


def _far_expanded(world: HostileWorld, x: Tensor) -> Tensor:
    """Two thousand million rows in the memory of one."""
    return world.put(x[:1]).expand(1 << 31, *x.shape[1:]) if x.dim() and x.shape[0] else x


def _viewed(dtype: torch.dtype) -> Transform:
    """The same bytes under another type of the same width, if it is one."""
    return lambda world, x: world.put(x).view(dtype) if x.dtype.itemsize == dtype.itemsize else x


def _with_names(world: HostileWorld, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return x.detach().rename(*"abcdefgh"[: x.dim()])


OF_TORCH: dict[str, Transform] = {
    "negated view": _negated,
    "conjugated view": _conjugated,
    "imaginary part of a conjugated view": _imaginary,
    "zero tensor": lambda world, x: torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device),
    "freed": _freed(0),
    "half freed": _freed(2),
    "inference mode": _inference,
    "fake": lambda world, x: FakeTensorMode().from_tensor(x),
    "functional": lambda world, x: torch._to_functional_tensor(x),
    "wrapper subclass": lambda world, x: Wrapper(x),
    "plain subclass": lambda world, x: x.as_subclass(Plain),
    "parameter": lambda world, x: torch.nn.Parameter(x.detach(), requires_grad=x.is_floating_point()),
    "uninitialized parameter": lambda world, x: torch.nn.UninitializedParameter(dtype=x.dtype, device=x.device),
    "uninitialized buffer": lambda world, x: torch.nn.UninitializedBuffer(dtype=x.dtype, device=x.device),
    "leaked from vmap": _leaked(torch.vmap),
    "leaked from grad": _leaked(torch.func.grad),
    "nested": _nested(torch.strided),
    "nested, jagged": _nested(torch.jagged),
    "sparse rows": lambda world, x: torch.zeros(x.shape, dtype=x.dtype, device=x.device).to_sparse_csr(),
    "mkldnn": lambda world, x: x.float().cpu().to_mkldnn(),
    "quantized": _quantized,
    "of a graph": lambda world, x: x.detach().clone().requires_grad_() * 1,
    "lazily cloned": lambda world, x: torch._lazy_clone(x),
    "with names": _with_names,
    "on a CPU": lambda world, x: x.cpu(),
    "rows that overlap": _overlapping,
    "far expanded": _far_expanded,
    "one number for all": lambda world, x: world.put(x.flatten()[:1]).expand(x.shape) if x.numel() else x,
    "no dimensions": lambda world, x: world.put(x.flatten()[0]) if x.numel() else x,
    **{f"bytes as {dtype}": _viewed(dtype) for dtype in (torch.uint32, torch.int32, torch.float32, torch.float16, torch.int16,
                                                        torch.float64, torch.int8, torch.float8_e4m3fnuz, torch.float8_e5m2)},
}  # fmt: skip
NO_TENSORS: dict[str, Transform] = {
    "numpy array": lambda world, x: x.detach().cpu().numpy(),
    "list": lambda world, x: x.tolist()[:64],
    "storage": lambda world, x: x.untyped_storage(),
    "class": lambda world, x: type(x),
}
TENSORS: dict[str, Transform] = {**TRANSFORMS, **OF_TORCH, **NO_TENSORS}


def _grown(x: Tensor) -> None:
    x.resize_(x.shape[0] + 1, *x.shape[1:])[-1] = 0


# Of a tensor that objects already hold, by itself: nobody is told.
IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "freed": lambda x: x.untyped_storage().resize_(0),
    "half freed": lambda x: x.untyped_storage().resize_(x.nbytes // 2),
    "grown": _grown,
    "emptied": lambda x: x.resize_(0),
    "turned": lambda x: x.transpose_(0, -1),
    "flattened": lambda x: x.resize_(x.numel()),
    "other strides": lambda x: x.as_strided_(x.shape, (0, *x.stride()[1:])),
    "moved": lambda x: x.set_(x.clone()),
    "other memory": lambda x: setattr(x, "data", torch.zeros_like(x)),
    "other dtype": lambda x: setattr(x, "data", x.to(torch.bfloat16 if x.is_floating_point() else torch.int64)),
    "other shape": lambda x: setattr(x, "data", x[:0].clone()),
    "with a gradient": lambda x: x.requires_grad_(),
    "another class": lambda x: setattr(x, "__class__", Plain),
}
# Other sizes at the same address: on a GPU a tensor keeps them while an object or a layer has it (memory.py, DESIGN.md).
SAME_ADDRESS = ("grown", "emptied", "turned", "flattened", "other strides")


def plain(x: Any) -> Any:
    """A tensor of the same values and memory of its own, without anything lazy; anything else stays what it is."""
    if isinstance(x, Wrapper):
        return x.inner.clone()
    if type(x) not in (Tensor, Plain, torch.nn.Parameter) or not has_memory(x) or x.numel() > 1 << 24:
        return x
    with torch.inference_mode(False), torch.no_grad():
        return x.detach().as_subclass(Tensor).resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
