"""Argument checks: every failure names the argument, what came and what is accepted."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor


def traced(tensor: object) -> bool:
    """Whether a call is being traced, by torch.compile or over fake tensors: then it must be an operator (ops.py)."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def check_switch(name: str, value: object) -> None:
    """True, False or None."""
    if value is not None and value is not True and value is not False:
        raise TypeError(f"{name} must be a bool or None, got {type(value).__name__}")


def check_dtype(name: str, tensor: torch.Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in accepted:
        names = " or ".join(str(dtype) for dtype in accepted)
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")


def check_dense(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or not tensor.is_contiguous():
        check_dense(name, tensor)
        raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> None:
    """`None` in `shape` accepts any size there."""
    have = tensor.shape
    fits = len(have) == len(shape)
    if fits:
        for i, want in enumerate(shape):  # every eager call comes here five times: no generators
            if want is not None and have[i] != want:
                fits = False
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(have)}")


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def check_tensor(
    name: str,
    tensor: object,
    shape: tuple[int | None, ...],
    accepted: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """A dense tensor of this shape, dtype and device; its rows may be anywhere only where the caller says so."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_dtype(name, tensor, accepted)
    check_shape(name, tensor, shape)
    check_device(name, tensor, device)
    check_contiguous(name, tensor)
